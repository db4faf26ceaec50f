"""How transcripts are compared: the ivrit.ai leaderboard's normalisation, word and character errors.

Imports nothing of this project, so that training, evaluation and rewards can all use it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

ZERO_WIDTH_AND_BIDI = "\u061c\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
# Vowel points as the package `hebrew`, which the leaderboard calls, defines them: meteg (U+05BD), rafe (U+05BF) and
# cantillation (U+0591-05AF) are not among them and fall to the symbol rule of the last step.
NIQQUD = "".join(map(chr, [*range(0x05B0, 0x05BD), 0x05C1, 0x05C2, 0x05C4, 0x05C5, 0x05C7]))
DELETED = str.maketrans("", "", ZERO_WIDTH_AND_BIDI + NIQQUD + "\"'")

whisper_basic_normalizer = BasicTextNormalizer()


def leaderboard_normalize(text: str) -> str:
    """Returns `text` as the ivrit.ai leaderboard compares it.

    Bidi and zero-width marks, niqqud and ASCII quotes are deleted; then Whisper's basic normaliser lower-cases, drops
    bracketed text, applies NFKC and turns every other symbol or punctuation mark into a space. So `צה"ל` becomes one
    word and `צה״ל` (with U+05F4) two.
    """
    return whisper_basic_normalizer(text.translate(DELETED)).strip()


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
    def wer(self) -> float:
        """Word error rate in percent."""
        return 100 * (self.substitutions + self.deletions + self.insertions) / self.words

    @property
    def cer(self) -> float:
        """Character error rate in percent."""
        return 100 * self.character_edits / self.characters


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


def score(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
    """Corpus-level WER and CER in percent, with what a reader needs to trust them.

    Args:
        references: what was said, one text an utterance.
        hypotheses: what was written, in the same order; an empty one counts as all deletions.

    Returns:
        `wer` and `cer` on normalised text, `wer_raw` on the text as it is, `wer_nonempty` over the utterances whose
        hypothesis is not empty, and counts: `utterances`, `words`, `empty_predictions`, and `empty_references`, the
        utterances that are left out because nothing of their reference survives normalisation.

    Raises:
        ValueError: no reference holds a word.
    """
    total, nonempty, raw = ErrorCounts(), ErrorCounts(), ErrorCounts()
    empty_predictions = empty_references = 0
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        normalized_reference = leaderboard_normalize(reference)
        if not normalized_reference:
            empty_references += 1
            continue
        normalized_hypothesis = leaderboard_normalize(hypothesis)
        counts = count_errors(normalized_reference, normalized_hypothesis)
        total += counts
        raw += count_errors(reference.strip(), hypothesis.strip())
        if normalized_hypothesis:
            nonempty += counts
        else:
            empty_predictions += 1
    if not total.words:
        raise ValueError("no reference holds a word after normalisation, so there is no error rate")
    return {
        "wer": total.wer,
        "cer": total.cer,
        "wer_raw": raw.wer,
        "wer_nonempty": nonempty.wer if nonempty.words else float("nan"),
        "utterances": len(references) - empty_references,
        "words": total.words,
        "empty_predictions": empty_predictions,
        "empty_references": empty_references,
    }
