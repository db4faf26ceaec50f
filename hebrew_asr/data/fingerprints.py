"""Acoustic fingerprints: the same sound under other encodings."""

import math
from collections.abc import Hashable

import numpy as np

from hebrew_asr.data.audio import SAMPLE_RATE

FRAME, HOP = 1024, 256  # samples: 64 ms every 16 ms
SMOOTHED_FRAMES, LAG_FRAMES = 8, 5
QUIET = 1e-4  # of the clip's mean power: below it is the codec's noise, and the word is 0, "not compared"
BLOCK_WORDS, CANDIDATES = 256, 32  # the 32 likeliest alignments of every 4 s of a query are verified
FEWEST_WORDS = 25  # compared, 0.4 s of sound: shorter clips match nothing
OVERLAP_SHARE, ENOUGH_WORDS = 0.75, 188  # of the shorter clip must be in common, but never more than 3 s


def fingerprint(waveform: np.ndarray) -> np.ndarray:
    """Returns the fingerprint of a waveform (samples,) at 16 kHz: (words,) uint32, one word every 16 ms.

    A bit is the sign of the difference of neighbouring bands' power (33 between 300 and 3400 Hz, which telephone
    speech keeps), differenced again over time, as in Haitsma & Kalker 2002, A Highly Robust Audio Fingerprinting
    System. Gain cancels, re-encoding flips few bits. Less than 0.25 s gives no word.
    """
    edges, bins = np.geomspace(300, 3400, 35)[:, None], np.arange(FRAME // 2 + 1) * SAMPLE_RATE / FRAME
    slopes = (bins - edges[:-1]) / np.diff(edges, axis=0)  # 0 at a triangle's lower end, 1 at its peak
    filters = np.maximum(0, np.minimum(slopes[:-1], 1 - slopes[1:])).T.astype(np.float32)  # (bins, 33)
    window = np.hanning(FRAME).astype(np.float32)
    padded = np.pad(waveform, (0, max(0, FRAME + (SMOOTHED_FRAMES - 1) * HOP - len(waveform))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME)[::HOP]
    blocks = (frames[i : i + BLOCK_WORDS] * window for i in range(0, len(frames), BLOCK_WORDS))
    power = np.concatenate([np.abs(np.fft.rfft(block)) ** 2 @ filters for block in blocks])
    total = np.cumsum(np.pad(power, ((1, 0), (0, 0))), axis=0, dtype=np.float64)
    power = total[SMOOTHED_FRAMES:] - total[:-SMOOTHED_FRAMES]
    slope, level = np.diff(power, axis=1), power.sum(axis=1)
    words = np.packbits(slope[LAG_FRAMES:] > slope[:-LAG_FRAMES], axis=1).view(np.uint32)[:, 0]
    words[np.minimum(level[LAG_FRAMES:], level[:-LAG_FRAMES]) <= QUIET * level.mean()] = 0
    return words


def overlap_needed(a: np.ndarray, b: np.ndarray) -> float:
    """Words that two fingerprints must have in common for their bit error rate to mean something."""
    return max(FEWEST_WORDS, min(ENOUGH_WORDS, OVERLAP_SHARE * min(np.count_nonzero(a), np.count_nonzero(b))))


def bit_error_rate(a: np.ndarray, b: np.ndarray, offset: int) -> tuple[float, int]:
    """Returns (share of bits that differ, words compared) where word i of `a` meets word i + offset of `b`."""
    a, b = a[max(0, -offset) :], b[max(0, offset) :]
    a, b = a[: len(b)], b[: len(a)]
    compared = (a != 0) & (b != 0)
    words = int(np.count_nonzero(compared))
    return int(np.bitwise_count((a ^ b)[compared]).sum()) / max(1, 32 * words), words


def fingerprint_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the lowest bit error rate over all alignments with enough overlap; 1.0 when there is none."""
    rates = (bit_error_rate(a, b, offset) for offset in range(1 - len(a), len(b)))
    return min((rate for rate, words in rates if words >= overlap_needed(a, b)), default=1.0)


class FingerprintIndex:
    """Finds the clips that share sound with a query: add the evaluation clips, ask with each training clip.

    Each half of a word is looked up; the alignments on which most halves meet are verified by bit error rate.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[Hashable, np.ndarray]] = []
        self.lists: list[tuple[np.ndarray, np.ndarray]] = []  # of each half: places ordered by key, each key's first

    def add(self, key: Hashable, fingerprint: np.ndarray) -> None:
        self.entries.append((key, fingerprint))
        self.lists = []

    def build(self) -> None:
        words = np.concatenate([np.zeros(0, np.uint32), *(words for _, words in self.entries)])
        lengths = np.array([len(words) for _, words in self.entries], dtype=np.int64)
        self.clips, self.starts = np.repeat(np.arange(len(lengths)), lengths), np.cumsum(lengths) - lengths
        places = np.flatnonzero(words).astype(np.int32)
        for half in words.view(np.uint16).reshape(-1, 2).T:
            ordered = places[np.argsort(half[places], kind="stable")]
            self.lists.append((ordered, np.searchsorted(half[ordered], np.arange(2**16 + 1))))

    def matches(self, fingerprint: np.ndarray) -> list[tuple[Hashable, float]]:
        """Returns (key, bit error rate) of every clip that is in the query, holds it or overlaps it, best first."""
        if not self.lists:
            self.build()
        best: dict[int, float] = {}
        for start in range(0, len(fingerprint), BLOCK_WORDS):
            for clip, offset in self.candidates(fingerprint[start : start + BLOCK_WORDS], start):
                held = self.entries[clip][1]
                for near in (offset - 1, offset, offset + 1):
                    rate, words = bit_error_rate(fingerprint, held, near)
                    # Chance brings the rate of other sound lower in short overlaps (0.31 in 0.5 s, 0.40 in 2 s).
                    if words >= overlap_needed(fingerprint, held) and rate <= 0.32 - 0.6 / math.sqrt(words):
                        best[clip] = min(rate, best.get(clip, 1.0))
        return [(self.entries[clip][0], rate) for clip, rate in sorted(best.items(), key=lambda match: match[1])]

    def candidates(self, block: np.ndarray, start: int) -> np.ndarray:
        """Returns (alignments, 2) of clip and offset, for a block of a query from its word `start` on."""
        queried = np.flatnonzero(block)
        meetings = []
        for half, (places, first) in zip(block[queried].view(np.uint16).reshape(-1, 2).T, self.lists, strict=True):
            counts = first[half.astype(np.int64) + 1] - first[half]
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            found = places[np.repeat(first[half], counts) + within]
            offsets = found - self.starts[self.clips[found]] - np.repeat(queried + start, counts)
            meetings.append((self.clips[found] << 32) + (offsets + 2**31))
        alignments, votes = np.unique(np.concatenate(meetings), return_counts=True)
        most = alignments[np.argsort(-votes, kind="stable")[:CANDIDATES]]
        return np.stack([most >> 32, (most & 0xFFFFFFFF) - 2**31], axis=1)
