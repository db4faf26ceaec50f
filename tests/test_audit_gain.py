"""The benchmark of what the audit gains: what it spoils."""

from collections import Counter

import numpy as np

from benchmarks.audit_gain import spoil

TEXTS = [f"a{n} b{n} c{n}" for n in range(200)]


def test_what_is_spoilt_is_wrong_in_the_way_that_is_said():
    wrong = spoil(TEXTS, np.random.default_rng(1))
    kinds = Counter(kind for kind, _ in wrong.values())
    assert kinds["exchanged"] == 10 and kinds["a word missing"] + kinds["a word changed"] == 10 and len(kinds) == 3
    exchanged = {number: text for number, (kind, text) in wrong.items() if kind == "exchanged"}
    assert sorted(exchanged.values()) == sorted(TEXTS[number] for number in exchanged), "nothing is lost"
    assert all(text != TEXTS[number] for number, text in exchanged.items())
    for number, (kind, text) in wrong.items():
        kept = [word in text.split() for word in TEXTS[number].split()].count(True)
        assert {"exchanged": (0, 3), "a word missing": (2, 2), "a word changed": (2, 3)}[kind] == (
            kept,
            len(text.split()),
        )
