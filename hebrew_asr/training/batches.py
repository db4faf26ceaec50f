"""Which utterances make up a step, and who takes which."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow
import pyarrow.compute
import torch

from hebrew_asr.data.mixture import Mixture
from hebrew_asr.data.rows import SpeechRows
from hebrew_asr.data.sources import DataConfig
from hebrew_asr.data.utterances import has_context
from hebrew_asr.model.packing import SHORTEST_CLIP, TOKENS_PER_CHUNK, deal_step
from hebrew_asr.training.settings import BatchSettings

TEXTS_TOKENISED = 1000  # to learn how many tokens a character is


class UtteranceTokens:
    """How many tokens each utterance has, from its seconds and characters: nothing is decoded, few texts tokenised."""

    def __init__(self, rows: SpeechRows, around: int, tokenize: Callable[[str], list[int]], config: DataConfig):
        """`around`: tokens of the prompt without audio, of the language's name and of the end."""
        self.seed, self.context_prob = config.seed, config.prev_context_prob
        sample = np.unique(np.linspace(0, len(rows) - 1, min(TEXTS_TOKENISED, len(rows))).astype(int))
        texts = rows.index["text"].take(pyarrow.array(rows.used[sample])).to_pylist()
        per_character = sum(len(tokenize(text)) for text in texts) / max(1, sum(map(len, texts)))

        def text_tokens(column: str) -> np.ndarray:
            characters = pyarrow.compute.fill_null(pyarrow.compute.utf8_length(rows.index[column]), 0)
            return per_character * characters.to_numpy()[rows.used]

        audio = TOKENS_PER_CHUNK * np.maximum(rows.seconds, SHORTEST_CLIP)
        self.utterance = (around + audio + text_tokens("text")).astype(np.float32)
        self.context = text_tokens("previous").astype(np.float32)

    def of(self, epoch: int, numbers: np.ndarray) -> np.ndarray:
        tokens = self.utterance[numbers]
        if self.context_prob:
            given = [has_context(self.seed, epoch, number, self.context_prob) for number in numbers.tolist()]
            tokens = tokens + given * self.context[numbers]
        return tokens


class StreamedEpochs:
    """What GlobalBatchSampler is to the trainer, where epochs are so many steps of a stream."""

    def __init__(self, steps: int):
        self.steps, self.epoch = steps, 1

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, step) for step in range(self.steps))


class GlobalBatchSampler(torch.utils.data.Sampler):
    """Yields, for each optimizer step, this process's micro-batches of (epoch, number).

    An epoch's order is cut into steps of `target_effective_batch` utterances over all processes. The last step holds
    what is left and repeats nobody: a process may get an empty micro-batch. Within a step the utterances are dealt by
    their tokens (`batching.deal_step`), every process computing the deal of all; or, where `batch_size` governs, by
    number alone.
    """

    def __init__(self, mixture: Mixture, tokens: UtteranceTokens, config: BatchSettings, rank: int, processes: int):
        self.mixture, self.tokens, self.rank, self.processes = mixture, tokens, rank, processes
        self.effective_batch, self.batch_size = config.target_effective_batch, config.batch_size
        self.budget = config.tokens_per_micro_batch
        self.epoch = 1

    def __len__(self) -> int:
        return math.ceil(len(self.mixture) / self.effective_batch)

    def __iter__(self) -> Iterator[list[list[tuple[int, int]]]]:
        order = self.mixture.order(self.epoch)
        for start in range(0, len(order), self.effective_batch):
            step = order[start : start + self.effective_batch]
            if self.budget is None:
                slots = self.processes * math.ceil(len(step) / (self.processes * self.batch_size))
                mine = np.array_split(step, slots)[self.rank :: self.processes]
            else:
                deal = deal_step(self.tokens.of(self.epoch, step), self.processes, self.budget)
                mine = [step[places] for places in deal[self.rank]]
            yield [[(self.epoch, int(number)) for number in micro_batch] for micro_batch in mine]
