"""How transcripts are compared: the ivrit.ai leaderboard's normalisation, word and character errors.

Imports nothing of this project, so that training, evaluation and rewards can all use it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from hebrew_asr.text.intervals import by_recording, error_rate_interval

ZERO_WIDTH_AND_BIDI = "\u061c\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
# Vowel points as the package `hebrew`, which the leaderboard calls, defines them: meteg (U+05BD), rafe (U+05BF) and
# cantillation (U+0591-05AF) are not among them and fall to the symbol rule of the last step.
NIQQUD = "".join(map(chr, [*range(0x05B0, 0x05BD), 0x05C1, 0x05C2, 0x05C4, 0x05C5, 0x05C7]))
DELETED = str.maketrans("", "", ZERO_WIDTH_AND_BIDI + NIQQUD + "\"'")
whisper_basic_normalizer = BasicTextNormalizer()
IN_BRACKETS = (  # as Whisper's normaliser has them, with what closes them, and what opens them as a space
    (re.compile(r"[<\[][^>\]]*[>\]]"), ">]", str.maketrans("<[", "  ")),
    (re.compile(r"\(([^)]+?)\)"), ")", str.maketrans("(", " ")),
)


def leaderboard_normalize(text: str) -> str:
    """Returns `text` as the ivrit.ai leaderboard compares it.

    Bidi and zero-width marks, niqqud and ASCII quotes are deleted; then Whisper's basic normaliser lower-cases, drops
    bracketed text, applies NFKC and turns every other symbol or punctuation mark into a space. So `צה"ל` becomes one
    word and `צה״ל` (with U+05F4) two.
    """
    text = text.translate(DELETED)
    for pattern, closing, opening in IN_BRACKETS:
        # Past the last bracket that closes, the pattern would look from each one that opens to the text's end.
        end = max(map(text.rfind, closing)) + 1
        text = pattern.sub("", text[:end]) + text[end:].translate(opening)
    return whisper_basic_normalizer(text).strip()


@dataclass(frozen=True)
class ErrorCounts:
    """Edits and reference lengths of one or more utterances; counts add, rates do not."""

    words: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    characters: int = 0
    character_edits: int = 0

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        return ErrorCounts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def errors(self) -> int:
        """Edits of words."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer(self) -> float:
        """Word error rate in percent."""
        return 100 * self.errors / self.words

    @property
    def cer(self) -> float:
        """Character error rate in percent."""
        return 100 * self.character_edits / self.characters

    @property
    def wil(self) -> float:
        """Word information lost in percent: 1 - hits / reference words * hits / hypothesis words, all pooled."""
        hits = self.words - self.substitutions - self.deletions
        hypothesis_words = hits + self.substitutions + self.insertions
        return 100 * (1 - hits / self.words * hits / hypothesis_words) if hypothesis_words else 100.0


def count_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Aligns one utterance with jiwer; both texts are taken as they are, and `reference` must hold a word."""
    words = jiwer.process_words(reference, hypothesis)
    characters = jiwer.process_characters(reference, hypothesis)
    return ErrorCounts(
        words=words.hits + words.substitutions + words.deletions,
        substitutions=words.substitutions,
        deletions=words.deletions,
        insertions=words.insertions,
        characters=characters.hits + characters.substitutions + characters.deletions,
        character_edits=characters.substitutions + characters.deletions + characters.insertions,
    )


@dataclass(frozen=True)
class Utterance:
    """One utterance as it is compared; counts of many add up to those of the corpus."""

    reference: str
    """Normalised, as the hypothesis is."""
    hypothesis: str
    counts: ErrorCounts | None
    """On the normalised texts; None where nothing of the reference survives normalisation."""
    raw_counts: ErrorCounts | None
    """On the texts as they are but for whitespace, each run of which is one space; None where `counts` is."""


def count_utterance(reference: str, hypothesis: str) -> Utterance:
    """Normalises and aligns one utterance; an empty hypothesis counts as all deletions."""
    normalized = leaderboard_normalize(reference), leaderboard_normalize(hypothesis)
    if not normalized[0]:
        return Utterance(*normalized, counts=None, raw_counts=None)
    raw = " ".join(reference.split()), " ".join(hypothesis.split())
    return Utterance(*normalized, counts=count_errors(*normalized), raw_counts=count_errors(*raw))


LONGEST_REPEATED_PHRASE = 12  # words
REPEATED_LETTER = re.compile(r"([^\W\d_])\1{5,}")
REPEATED_SYLLABLES = re.compile(r"([^\W\d_]{2,4})\1{3,}")


def repeats(text: str) -> bool:
    """Whether the normalised text runs in a loop, as a decoder does that no longer listens.

    A loop is, without a pause,
    - one word five times or more, two words four times or more, or a phrase of 3 to 12 words three times or more;
    - inside a word, one letter six times or more, or 2 to 4 letters four times or more; digits do not count.

    People do repeat: Hebrew doubles words to intensify or distribute (לאט לאט, אחד אחד), and emphasis says כן כן כן or
    לא לא לא לא, so a single word needs one more than four; the longer a phrase, the sooner its return is no accident.
    No Hebrew word has a letter six times in a row (חחחח for laughter and אההה are written with fewer), and reduplicated
    stems (גלגל, צמצם) double their syllable only. Speech itself can loop (songs, slogans, a number read out in digits):
    a loop counts against a hypothesis only where its reference has none, `repeats(hypothesis) and not
    repeats(reference)`.
    """
    text = leaderboard_normalize(text)
    if REPEATED_LETTER.search(text) or REPEATED_SYLLABLES.search(text):
        return True
    words = text.split()
    for length in range(1, LONGEST_REPEATED_PHRASE + 1):
        times = max(3, 6 - length)
        same = 0  # words in a row that equal the one a phrase earlier
        for earlier, word in zip(words, words[length:], strict=False):
            same = same + 1 if word == earlier else 0
            if same == length * (times - 1):
                return True
    return False


def score(
    references: Sequence[str], hypotheses: Sequence[str], recordings: Sequence[str] | None = None
) -> dict[str, float]:
    """Corpus-level WER and CER in percent, with what a reader needs to trust them.

    Args:
        references: what was said, one text an utterance.
        hypotheses: what was written, in the same order; an empty one counts as all deletions.
        recordings: what each utterance is from; the interval is then over these, where `by_recording` finds enough.

    Returns:
        `wer` and `cer` on normalised text, `wer_low` and `wer_high` (the 95 % interval of `wer`), `wer_raw` on the text
        as it is, `wer_nonempty` over the utterances whose hypothesis is not empty, and counts: `utterances`, `words`,
        `empty_predictions`, and `empty_references`, the utterances that are left out because nothing of their reference
        survives normalisation.

    Raises:
        ValueError: no reference holds a word.
    """
    total, nonempty, raw = ErrorCounts(), ErrorCounts(), ErrorCounts()
    empty_predictions = empty_references = 0
    errors, words, names = [], [], []
    for reference, hypothesis, name in zip(references, hypotheses, recordings or references, strict=True):
        utterance = count_utterance(reference, hypothesis)
        if utterance.counts is None or utterance.raw_counts is None:
            empty_references += 1
            continue
        total += utterance.counts
        errors.append(utterance.counts.errors)
        words.append(utterance.counts.words)
        names.append(name)
        raw += utterance.raw_counts
        if utterance.hypothesis:
            nonempty += utterance.counts
        else:
            empty_predictions += 1
    if not total.words:
        raise ValueError("no reference holds a word after normalisation, so there is no error rate")
    interval = error_rate_interval(errors, words, by_recording(names) if recordings else None)
    return {
        "wer": total.wer,
        "wer_low": interval.low,
        "wer_high": interval.high,
        "cer": total.cer,
        "wer_raw": raw.wer,
        "wer_nonempty": nonempty.wer if nonempty.words else float("nan"),
        "utterances": len(references) - empty_references,
        "words": total.words,
        "empty_predictions": empty_predictions,
        "empty_references": empty_references,
    }
