"""The order of an epoch over weighted sources."""

import numpy as np

from hebrew_asr.data.rows import SpeechRows
from hebrew_asr.data.sources import Source


class Mixture:
    """Which utterances an epoch has, and in which order: a pure function of the epoch, the same on every process.

    Without probabilities an epoch is every utterance once. With them its sources have those shares, and it ends when
    the first source that is not replayed has been heard once; the others go on where they stopped in the next epoch.
    """

    def __init__(self, rows: SpeechRows, sources: list[Source], seed: int):
        self.seed = seed
        self.rows = [np.flatnonzero(rows.source_numbers == number) for number in range(len(sources))]
        sizes = np.array([len(mine) for mine in self.rows])
        self.counts = sizes  # utterances of each source in an epoch
        if sources[0].probability is not None:
            shares = np.array([source.probability for source in sources])
            ends = np.array([not source.replay for source in sources])
            self.counts = np.maximum(1, np.round(shares * np.min((sizes / shares)[ends]))).astype(int)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def order(self, epoch: int) -> np.ndarray:
        """Numbers of the epoch's utterances (epochs from 1), shuffled."""
        chosen = [self.taken(number, (epoch - 1) * count, count) for number, count in enumerate(self.counts.tolist())]
        return np.random.default_rng([self.seed, epoch]).permutation(np.concatenate(chosen))

    def taken(self, number: int, begin: int, count: int) -> np.ndarray:
        """`count` utterances of a source from place `begin` of its endless passes, each pass another permutation."""
        mine, taken = self.rows[number], []
        while count:
            passed, place = divmod(begin, len(mine))
            here = np.random.default_rng([self.seed, number, passed, 1]).permutation(mine)[place : place + count]
            taken.append(here)
            begin, count = begin + len(here), count - len(here)
        return np.concatenate(taken)
