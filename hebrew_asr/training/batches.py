"""Which utterances make up a step, and who takes which."""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import pyarrow
import pyarrow.compute
import torch

from hebrew_asr.data.mixture import Mixture
from hebrew_asr.data.rows import SpeechRows
from hebrew_asr.data.utterances import SystemTurns, system_turn
from hebrew_asr.model.frames import SHORTEST_CLIP, TOKENS_PER_CHUNK
from hebrew_asr.model.packing import deal_step
from hebrew_asr.model.prompts import Prompts
from hebrew_asr.training.settings import Settings

TEXTS_TOKENISED = 1000  # to learn how many tokens a character is


class TokenSettings(SystemTurns, Protocol):
    """The settings that an utterance's number of tokens depends on."""

    language: str


class UtteranceTokens:
    """How many tokens each utterance has, from its seconds and characters: nothing is decoded, few texts tokenised."""

    def __init__(self, rows: SpeechRows, prompts: Prompts, config: TokenSettings):
        self.config = config
        around = len(prompts.prompt(0, "")) + len(prompts.language_prefix(config.language)) + 1
        self.system_turn = len(prompts.prompt(0, "")) - len(prompts.prompt(0, None))
        sample = np.unique(np.linspace(0, len(rows) - 1, min(TEXTS_TOKENISED, len(rows))).astype(int))
        texts = rows.index["text"].take(pyarrow.array(rows.used[sample])).to_pylist()
        per_character = sum(len(prompts.tokens(text)) for text in texts) / max(1, sum(map(len, texts)))

        def text_tokens(column: str) -> np.ndarray:
            characters = pyarrow.compute.fill_null(pyarrow.compute.utf8_length(rows.index[column]), 0)
            return per_character * characters.to_numpy()[rows.used]

        audio = TOKENS_PER_CHUNK * np.maximum(rows.seconds, SHORTEST_CLIP)
        text, previous = text_tokens("text"), text_tokens("previous")
        commas = pyarrow.compute.count_substring(rows.index["text"], " ").to_numpy()[rows.used]
        self.utterance = (around + audio + text).astype(np.float32)
        self.text, self.previous = text.astype(np.float32), previous.astype(np.float32)
        self.listed = (text + commas).astype(np.float32)

    def of(self, epoch: int, numbers: np.ndarray) -> np.ndarray:
        tokens = self.utterance[numbers]
        if self.config.no_system_prob or self.config.prev_context_prob:
            turns = [system_turn(self.config, epoch, number, len(self.utterance)) for number in numbers.tolist()]
            kinds, lenders = np.array([turn.kind for turn in turns]), [turn.lender for turn in turns]
            context = np.where(self.previous[numbers] > 0, self.previous[numbers], self.text[lenders])
            context = np.where([turn.is_list for turn in turns], self.listed[lenders], context)
            tokens = tokens + (kinds == "context") * context - (kinds == "none") * self.system_turn
        return tokens


class Collator(Prompts):
    """What the feed and the rollouts know of the training script's collator."""

    in_one_row: bool
    """Whether packed batches have one row: where attention stays inside an utterance without a mask."""

    def __call__(self, utterances: list[dict[str, Any]], training: bool) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def packed(self, utterances: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        raise NotImplementedError


def collate_step(
    collator: Collator, is_packed: bool, micro_batches: list[list[dict[str, Any]]]
) -> tuple[list[dict[str, torch.Tensor]], list[str]]:
    """One step's share of one process, and the utterances left out of it because they do not decode."""
    dropped = [u["dropped"] for utterances in micro_batches for u in utterances if "dropped" in u]
    kept = [[u for u in utterances if "dropped" not in u] for utterances in micro_batches]
    if not is_packed:
        return [collator(utterances, training=True) for utterances in kept], dropped
    return [collator.packed(utterances) for utterances in kept], dropped


def collate_streamed(
    collator: Collator, budget: int | None, batch_size: int, utterances: list[dict[str, Any]]
) -> list[dict[str, torch.Tensor]]:
    """One process's share of a step of a stream, whose utterances are not known before they are read."""
    prompts, targets = collator.sequences(utterances, [u["features"].shape[1] for u in utterances])
    tokens = np.array([len(prompt + target) for prompt, target in zip(prompts, targets, strict=True)])
    if budget is None:
        deal = np.array_split(np.arange(len(tokens)), math.ceil(len(tokens) / batch_size))
    else:
        (deal,) = deal_step(tokens, processes=1, budget=budget)
    return [collator.packed([utterances[place] for place in places]) for places in deal]


def collate_evaluation(
    collator: Collator, batches: list[list[dict[str, Any]]]
) -> tuple[list[int], dict[str, torch.Tensor]]:
    """The rows of one evaluation batch, and its tensors."""
    (utterances,) = batches
    return [u["index"] for u in utterances], collator(utterances, training=False)


def evaluation_batches(seconds: np.ndarray, longest: float, batch_size: int) -> list[list[tuple[int, int]]]:
    """Batches of (0, row) over an evaluation set, longest first.

    A batch has as many padded seconds as `batch_size` utterances of `longest` seconds, and no more than four times as
    many utterances, so that a small set is not one batch.
    """
    budget = batch_size * longest
    batches: list[list[tuple[int, int]]] = []
    size = 0
    for row in np.argsort(-seconds, kind="stable").tolist():
        if not batches or len(batches[-1]) == size:
            batches.append([])
            size = min(4 * batch_size, max(1, int(budget / seconds[row])))
        batches[-1].append((0, row))
    return batches


class GlobalBatchSampler(torch.utils.data.Sampler):
    """Yields, for each optimizer step, this process's micro-batches of (epoch, number).

    An epoch's order is cut into steps of `target_effective_batch` utterances over all processes. The last step is
    smaller; no utterance is repeated to fill it, so that a process may get an empty micro-batch. Within a step the
    utterances are dealt by their tokens (`packing.deal_step`), every process computing the deal of all; or, without a
    token budget, by number alone.
    """

    def __init__(self, mixture: Mixture, tokens: UtteranceTokens, config: Settings, rank: int, processes: int):
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
