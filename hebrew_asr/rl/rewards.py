"""Rewards of a transcript: what is right about it and what is wrong, each a number between 0 and 1.

Every function takes the reference and the hypothesis as texts. Both are normalised as the leaderboard normalises them,
so that punctuation, spaces, niqqud and marks earn nothing. A reference without words is a recording in which nobody
speaks: its right transcript is empty.
"""

import dataclasses
from dataclasses import dataclass

from hebrew_asr.text.scoring import count_errors, leaderboard_normalize, repeats


@dataclass
class RewardWeights:
    """What each part counts in the reward; what is wrong is subtracted."""

    wer: float = 1.0
    """Of 1 − WER."""
    cer: float = 0.0
    """Of 1 − CER. It tells apart transcripts with equally many wrong words."""
    repetition: float = 0.5
    language: float = 0.5
    nonspeech: float = 0.5
    length: float = 0.0


def one_minus_wer(reference: str, hypothesis: str) -> float:
    """1 − WER, not below 0: a loop of insertions is as wrong as saying nothing."""
    return one_minus_rate(reference, hypothesis, "wer")


def one_minus_cer(reference: str, hypothesis: str) -> float:
    return one_minus_rate(reference, hypothesis, "cer")


def one_minus_rate(reference: str, hypothesis: str, rate: str) -> float:
    reference, hypothesis = leaderboard_normalize(reference), leaderboard_normalize(hypothesis)
    if not reference:
        return float(not hypothesis)
    return max(0.0, 1 - getattr(count_errors(reference, hypothesis), rate) / 100)


def repetition(reference: str, hypothesis: str) -> float:
    """1 for a loop that is not in the reference."""
    return float(repeats(hypothesis) and not repeats(reference))


def text_on_nonspeech(reference: str, hypothesis: str) -> float:
    """1 for words where nobody speaks."""
    return float(not leaderboard_normalize(reference) and bool(leaderboard_normalize(hypothesis)))


def wrong_length(reference: str, hypothesis: str) -> float:
    """How far the number of characters is off, of the reference's, at most 1; nothing where nobody speaks."""
    expected, found = len(leaderboard_normalize(reference)), len(leaderboard_normalize(hypothesis))
    return min(1.0, abs(found - expected) / expected) if expected else 0.0


def wrong_language(expected: str | None, named: str | None) -> float:
    """1 for another language than expected before the transcript; None is that of recordings in which nobody speaks."""
    return float(named != expected)


def reward_parts(reference: str, hypothesis: str, expected: str | None, named: str | None) -> dict[str, float]:
    """Every part by the name of its weight."""
    return {
        "wer": one_minus_wer(reference, hypothesis),
        "cer": one_minus_cer(reference, hypothesis),
        "repetition": repetition(reference, hypothesis),
        "language": wrong_language(expected, named),
        "nonspeech": text_on_nonspeech(reference, hypothesis),
        "length": wrong_length(reference, hypothesis),
    }


EARNED = ("wer", "cer")  # the other parts are penalties


def total_reward(parts: dict[str, float], weights: RewardWeights) -> float:
    each = dataclasses.asdict(weights)
    return sum(each[name] * value * (1 if name in EARNED else -1) for name, value in parts.items())
