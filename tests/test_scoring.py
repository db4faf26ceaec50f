"""Error rates equal an independent computation, and the normalisation equals the leaderboard's."""

import random
import unicodedata

import hebrew
import pytest

from hebrew_scoring import leaderboard_normalize, score

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


def test_an_empty_hypothesis_counts_as_all_deletions():
    result = score(["אחת שתיים", "שלוש ארבע"], ["אחת שתיים", ""])
    assert (result["wer"], result["wer_nonempty"], result["empty_predictions"]) == (50.0, 0.0, 1)


def test_no_reference_with_a_word_is_an_error():
    with pytest.raises(ValueError, match="no reference holds a word"):
        score(["...", ""], ["א", "ב"])
