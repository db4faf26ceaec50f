"""Error rates equal an independent computation, and the normalisation equals the leaderboard's."""

import random
import time
import unicodedata
from types import SimpleNamespace
from typing import Any

import hebrew
import jiwer
import numpy as np
import pytest

from hebrew_asr.text.intervals import error_rate_interval
from hebrew_asr.text.scoring import (
    DELETED,
    ErrorCounts,
    count_utterance,
    leaderboard_normalize,
    repeats,
    score,
    whisper_basic_normalizer,
)
from hebrew_asr.training.measuring import Output, pool

REMOVED = "\u061c\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff\"'"


def leaderboard(text: str) -> str:
    """The rules again, written apart from the project's code, with the package that the leaderboard itself uses."""
    text = "".join(c for c in text if c not in REMOVED[:-2])
    text = hebrew.Hebrew(text).no_niqqud().string.replace('"', "").replace("'", "").lower()
    kept = []
    position = 0
    while position < len(text):
        character = text[position]
        ends = {"[": "]>", "<": "]>", "(": ")"}.get(character)
        end = min((text.find(c, position + 1) for c in ends or "" if text.find(c, position + 1) >= 0), default=-1)
        if ends and end >= 0 and not (character == "(" and end == position + 1):
            position = end + 1
            continue
        kept.append(character)
        position += 1
    text = unicodedata.normalize("NFKC", "".join(kept))
    text = "".join(" " if unicodedata.category(c)[0] in "MSP" else c for c in text).lower()
    return " ".join(text.split())


def edits(reference: list, hypothesis: list) -> int:
    row = list(range(len(hypothesis) + 1))
    for i, r in enumerate(reference, 1):
        previous, row[0] = row[0], i
        for j, h in enumerate(hypothesis, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (r != h))
    return row[-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('צה"ל', "צהל"),
        ("צה״ל", "צה ל"),
        ("ג'ירפה", "גירפה"),
        ("שָׁלוֹם עוֹלָם", "שלום עולם"),
        ("בית־ספר", "בית ספר"),
        ("שלום,   עולם!", "שלום עולם"),
        ("\u200fשלום\u200e", "שלום"),
        ("[צחוק] שלום (לא ברור) WhatsApp", "שלום whatsapp"),
        ("3.5%", "3 5"),
        ("...", ""),
    ],
)
def test_normalisation_of_known_cases(text, expected):
    assert leaderboard_normalize(text) == expected


def random_text(rng: random.Random) -> str:
    alphabet = "אבגדהוזחטיכךלמםנןסעפףצץקרשת" * 3 + "abcXYZ0123456789" + "      " + "\"'׳״־-.,!?()[]<>%₪"
    alphabet += "\u05b0\u05b4\u05b8\u05bc\u05c1\u05bd\u0591\u200f\u200e\u2067\ufeff"
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(0, 40)))


def test_score_equals_an_independent_computation_on_random_pairs():
    rng = random.Random(7)
    references = [random_text(rng) for _ in range(400)]
    hypotheses = ["" if rng.random() < 0.1 else random_text(rng) if rng.random() < 0.3 else r for r in references]
    for text in references + hypotheses:
        assert leaderboard_normalize(text) == leaderboard(text), repr(text)
    pairs = [(leaderboard(r), leaderboard(h)) for r, h in zip(references, hypotheses, strict=True)]
    scored = [(r, h) for r, h in pairs if r]
    words = sum(len(r.split()) for r, _ in scored)
    result = score(references, hypotheses)
    assert result["wer"] == pytest.approx(100 * sum(edits(r.split(), h.split()) for r, h in scored) / words, abs=1e-9)
    characters = sum(len(r) for r, _ in scored)
    assert result["cer"] == pytest.approx(100 * sum(edits(list(r), list(h)) for r, h in scored) / characters, abs=1e-9)
    assert result["empty_references"] == sum(not r for r, _ in pairs) > 0
    assert result["empty_predictions"] == sum(not h for _, h in scored) > 0


def alignment_counts(reference: list, hypothesis: list) -> set[tuple[int, int, int, int]]:
    """Hits, substitutions, deletions, insertions of every alignment with the fewest edits."""
    rows = [[{(0, 0, 0, j)} for j in range(len(hypothesis) + 1)]]
    for i, r in enumerate(reference, 1):
        row = [{(0, 0, i, 0)}]
        for j, h in enumerate(hypothesis, 1):
            ways = {(a + (r == h), b + (r != h), c, d) for a, b, c, d in rows[-1][j - 1]}
            ways |= {(a, b, c + 1, d) for a, b, c, d in rows[-1][j]} | {(a, b, c, d + 1) for a, b, c, d in row[-1]}
            fewest = min(sum(way[1:]) for way in ways)
            row.append({way for way in ways if sum(way[1:]) == fewest})
        rows.append(row)
    return rows[-1][-1]


def test_pooled_counts_and_their_rates_equal_an_independent_computation_normalised_and_raw():
    rng = random.Random(8)
    texts = [text for text in (random_text(rng) for _ in range(600)) if leaderboard(text)]
    pairs = []
    for text in texts:
        words = text.split()
        for _ in range(rng.randrange(3)):  # a word or two exchanged, left out or added
            place = rng.randrange(len(words) + 1)
            words[place : place + rng.randrange(2)] = random_text(rng).split()[: rng.randrange(2)]
        pairs.append((text, "" if rng.random() < 0.1 else " ".join(words) + rng.choice(["", "\n", "\t."])))
    utterances = [count_utterance(*pair) for pair in pairs]
    by_leaderboard = [(leaderboard(r), leaderboard(h)) for r, h in pairs]
    assert [(u.reference, u.hypothesis) for u in utterances] == by_leaderboard
    as_they_are = [(" ".join(r.split()), " ".join(h.split())) for r, h in pairs]
    for compared, counted in (
        (by_leaderboard, [u.counts for u in utterances]),
        (as_they_are, [u.raw_counts for u in utterances]),
    ):
        hits = substitutions = deletions = insertions = 0
        for (r, h), counts in zip(compared, counted, strict=True):
            kept = counts.words - counts.substitutions - counts.deletions
            found = (kept, counts.substitutions, counts.deletions, counts.insertions)
            assert found in alignment_counts(r.split(), h.split())
            hits, substitutions = hits + found[0], substitutions + found[1]
            deletions, insertions = deletions + found[2], insertions + found[3]
        total = sum(counted, ErrorCounts())
        assert min(substitutions, deletions, insertions) > 20
        assert (total.substitutions, total.deletions, total.insertions) == (substitutions, deletions, insertions)
        words, hypothesis_words = sum(len(r.split()) for r, _ in compared), sum(len(h.split()) for _, h in compared)
        assert total.words == words
        assert total.wer == pytest.approx(100 * (substitutions + deletions + insertions) / words, abs=1e-9)
        assert total.wil == pytest.approx(100 - 100 * (hits / words) * (hits / hypothesis_words), abs=1e-9)
        assert total.wil == pytest.approx(100 * jiwer.wil(*map(list, zip(*compared, strict=True))), abs=1e-9)
        letters = sum(len(r) for r, _ in compared)
        assert total.cer == pytest.approx(100 * sum(edits(list(r), list(h)) for r, h in compared) / letters, abs=1e-9)


def test_an_utterance_without_words_has_no_counts_and_an_empty_hypothesis_loses_all_information():
    utterance = count_utterance("(לא ברור) ...", "שלום")
    assert (utterance.reference, utterance.hypothesis) == ("", "שלום")
    assert utterance.counts is None and utterance.raw_counts is None
    counts = count_utterance("אחת, שתיים", "").counts
    assert (counts.wer, counts.wil, counts.deletions) == (100.0, 100.0, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("תודה תודה תודה תודה תודה", True),
        ("תודה, תודה. תודה! תודה, תודה", True),
        ("אז אמרתי לו תודה רבה תודה רבה תודה רבה תודה רבה והלכתי", True),
        ("אני לא יודע אני לא יודע אני לא יודע", True),
        ("כל מה שרציתי להגיד לכם הערב זה שאני שמח מאוד להיות כאן " * 3, True),
        ("כל מה שרציתי להגיד לכם הערב זה שאני שמח מאוד להיות כאן " * 2, False),
        ("לא " * 4, False),
        ("כן כן כן", False),
        ("לא לא", False),
        ("לאט לאט, אחד אחד, יום יום", False),
        ("תודה רבה תודה רבה תודה רבה", False),
        ("תודה רבה תודה לך תודה רבה תודה לכם תודה רבה", False),
        ("אני לא יודע אני לא יודע אני לא זוכר", False),
        ("חחחחחחחח", True),
        ("הוא צחק חחחח", False),
        ("בלהבלהבלהבלה", True),
        ("אההה גלגל צמצם טיקטקטיקטק", False),
        ("1000000 שקלים", False),
        ("", False),
    ],
)
def test_a_loop_repeats_and_what_people_say_twice_does_not(text, expected):
    assert repeats(text) is expected


def test_an_empty_hypothesis_counts_as_all_deletions():
    result = score(["אחת שתיים", "שלוש ארבע"], ["אחת שתיים", ""])
    assert (result["wer"], result["wer_nonempty"], result["empty_predictions"]) == (50.0, 0.0, 1)


def test_the_interval_is_over_recordings_where_utterances_share_enough_of_them():
    """What one recording gets wrong, it gets wrong as a whole: as utterances of their own they would seem certain."""
    references, names = ["אחת שתיים שלוש"] * 60 + ["..."], [f"recording {i // 5}" for i in range(60)] + ["another"]
    hypotheses = ["אחת שתיים שלוש" if i // 5 % 3 else "אחת שתיים ארבע" for i in range(60)] + ["אחת"]
    errors, words = [int(not i // 5 % 3) for i in range(60)], [3] * 60
    alone, together = error_rate_interval(errors, words), error_rate_interval(errors, words, names[:60])
    assert together.high - together.low > 1.5 * (alone.high - alone.low)
    few, each = names[:40] + ["same"] * 21, [str(i) for i in range(61)]
    for given, expected in ((names, together), (None, alone), (few, alone), (each, alone)):
        found = score(references, hypotheses, given)
        assert (found["wer"], found["wer_low"], found["wer_high"]) == (expected.value, expected.low, expected.high)
    rows: Any = SimpleNamespace(column={"reference": references, "recording": names}.__getitem__)
    heard = [(row, Output(hypotheses[row], None, 1.0, 1)) for row in reversed(range(61))]
    run_log: Any = SimpleNamespace(note_full_memory=lambda halved, names: None)
    metrics, *texts = pool(heard, 0, rows, None, run_log)
    assert (metrics["wer_low"], metrics["wer_high"]) == (together.low, together.high)
    assert texts == [references, hypotheses]


def test_no_reference_with_a_word_is_an_error():
    with pytest.raises(ValueError, match="no reference holds a word"):
        score(["...", ""], ["א", "ב"])


def test_brackets_are_dropped_as_whispers_normaliser_does_and_in_linear_time():
    draw = np.random.default_rng(0)
    for _ in range(3000):
        text = "".join(draw.choice(list("()[]<>אb "), draw.integers(0, 14)))
        assert leaderboard_normalize(text) == whisper_basic_normalizer(text.translate(DELETED)).strip(), text
    began = time.perf_counter()
    for opening in ("[", "(", "<", "((((" + "[)]"):
        leaderboard_normalize(opening * 100_000)
    assert time.perf_counter() - began < 5, "100,000 of them took minutes"
