"""What a run trains on, step by step: rows that are known from the start, or a stream that is read on the way."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import accelerate
import torch
from transformers import Qwen3ASRProcessor

from hebrew_asr.data.mixture import Mixture
from hebrew_asr.data.rows import SpeechRows
from hebrew_asr.data.selection import load_train_and_eval
from hebrew_asr.data.shared_memory import sent
from hebrew_asr.data.stream import SpeechStream, StreamedSource, StreamReader, load_streams_and_eval
from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.errors import InputError
from hebrew_asr.processes import load_in_turn
from hebrew_asr.training.batches import Collator, GlobalBatchSampler, UtteranceTokens, collate_step, collate_streamed
from hebrew_asr.training.settings import Settings
from hebrew_asr.training.watch import die_of_a_lost_batch, outlive_stop_signals

ORDER_STEP = 1_000_003  # from the seed of one order of the epochs to that of the next
TrainingData = SpeechRows | list[StreamedSource]


class Feed(Protocol):
    """The training data of one process."""

    dataset: SpeechDataset
    epoch: int
    """Counted from 1; the trainer sets it before it asks for the loader's batches."""

    def __len__(self) -> int:
        """Steps of an epoch."""
        ...

    def loader(self) -> torch.utils.data.DataLoader:
        """An epoch's steps, each (micro-batches of this process, lines on what was dropped)."""
        ...

    def facts(self) -> dict[str, Any]:
        """What a resumed run must find as it was."""
        ...

    def reorder(self, order: int) -> None:
        """Lets the epochs have another order: 0 is the seed's own, each time the run goes back it is the next."""
        ...

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of this process's place in the data."""
        ...

    def restore(self, states: list[Any]) -> None:
        """Goes on from the `state` of every process."""
        ...

    def names_of_step(self, step: int) -> list[str]:
        """This process's utterances of the step that runs."""
        ...


S = TypeVar("S", "GlobalBatchSampler", "StreamSteps")


class StepsOfEpochs(Generic[S]):
    """The part that feeds share: their sampler knows the epoch and its steps."""

    sampler: S

    @property
    def epoch(self) -> int:
        return self.sampler.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.sampler.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)


class ListedFeed(StepsOfEpochs[GlobalBatchSampler]):
    """Rows that are all known: any step of any epoch is a function of the seed."""

    def __init__(self, dataset: SpeechDataset, collator: Collator, config: Settings, rank: int, processes: int):
        self.dataset, self.config, self.processes = dataset, config, processes
        self.mixture = Mixture(dataset.rows, config.train_sources, config.seed)
        tokens = UtteranceTokens(dataset.rows, collator, config)
        self.sampler = GlobalBatchSampler(self.mixture, tokens, config, rank, processes)
        is_packed = config.tokens_per_micro_batch is not None
        self.collate: Callable[[Any], Any] = functools.partial(collate_step, collator, is_packed)

    def loader(self) -> torch.utils.data.DataLoader:
        return speech_loader(self.dataset, self.sampler, self.collate, self.config, self.seconds_at_once)

    @property
    def seconds_at_once(self) -> float:
        """Of audio, in this process's share of a step."""
        share = self.config.target_effective_batch / self.processes
        return share * float(self.dataset.rows.seconds.mean())

    def facts(self) -> dict[str, Any]:
        rows = self.dataset.rows
        return {"train_utterances": len(rows), "train_seconds": round(float(rows.seconds.sum()), 3)}

    def reorder(self, order: int) -> None:
        seed = self.config.seed + ORDER_STEP * order
        self.sampler.mixture = self.mixture = Mixture(self.dataset.rows, self.config.train_sources, seed)

    def state(self) -> None:
        return None

    def restore(self, states: list[Any]) -> None:
        pass

    def names_of_step(self, step: int) -> list[str]:
        mine = next(itertools.islice(self.sampler, (step - 1) % len(self.sampler), None))
        rows = [(number, self.dataset.rows[number]) for micro_batch in mine for _, number in micro_batch]
        return [f"{row['recording']} (utterance {number}, {row['text']!r})" for number, row in rows]


class StreamSteps:
    """Names the steps of an epoch of a stream: (epoch, step)."""

    def __init__(self, steps: int):
        self.steps, self.epoch = steps, 1

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, step) for step in range(self.steps))


class StreamFeed(StepsOfEpochs[StreamSteps]):
    """A stream, of which `steps_per_epoch` steps are called an epoch."""

    def __init__(
        self,
        streams: list[StreamedSource],
        dataset: SpeechDataset,
        collator: Collator,
        config: Settings,
        rank: int,
        processes: int,
    ):
        self.config, self.rank, self.processes = config, rank, processes
        self.sampler = StreamSteps(config.steps_per_epoch or 0)
        stream = SpeechStream(
            streams,
            dataset.utterance,
            functools.partial(collate_streamed, collator, config.tokens_per_micro_batch, config.batch_size),
            share=config.target_effective_batch // processes,
            seed=config.seed,
            rank=rank,
            processes=processes,
        )
        self.dataset = dataset
        self.reader = StreamReader(stream, config.dataloader_num_workers, pin_memory=torch.cuda.is_available())

    def loader(self) -> torch.utils.data.DataLoader:
        steps: Any = self.sampler
        return torch.utils.data.DataLoader(self.reader, batch_sampler=steps, collate_fn=lambda step: step)

    def facts(self) -> dict[str, Any]:
        return {}

    def reorder(self, order: int) -> None:
        self.reader.go_on_from(self.reader.state, self.config.seed + ORDER_STEP * order)

    def state(self) -> dict[str, Any]:
        return self.reader.state

    def restore(self, states: list[Any]) -> None:
        if len(states) != self.processes:
            raise InputError(
                f"a streamed run goes on with as many processes as before: {len(states)}, not {self.processes}"
            )
        self.reader.go_on_from(states[self.rank], self.reader.stream.seed)

    def names_of_step(self, step: int) -> list[str]:
        return self.reader.last


def open_feed(
    data: TrainingData, processor: Qwen3ASRProcessor, collator: Collator, config: Settings, rank: int, processes: int
) -> ListedFeed | StreamFeed:
    """The feed of one process, of what `load_data` returned."""
    if isinstance(data, SpeechRows):
        dataset = SpeechDataset(data, processor, config, training=True)
        return ListedFeed(dataset, collator, config, rank, processes)
    return StreamFeed(data, SpeechDataset(None, processor, config, training=True), collator, config, rank, processes)


def load_data(config: Settings, state: accelerate.PartialState) -> tuple[TrainingData, SpeechRows]:
    """Training data and evaluation rows; the first process of each machine reads and caches."""
    load = load_streams_and_eval if config.streaming else load_train_and_eval
    return load_in_turn(state, functools.partial(load, config, config.seed))


def speech_loader(
    dataset: SpeechDataset,
    batch_sampler: Any,
    collate: Callable[[Any], Any],
    config: Settings,
    seconds_at_once: float,
) -> torch.utils.data.DataLoader:
    """torch's loader over utterances, with workers that do not die of the signal that stops a run.

    `seconds_at_once`: of audio in a batch.
    """
    workers = config.dataloader_num_workers
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=sent(collate, workers, seconds_at_once),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=2 if workers else None,
        worker_init_fn=functools.partial(start_worker, seconds=config.preemption_grace_seconds),
    )


def start_worker(number: int, seconds: float) -> None:
    outlive_stop_signals(number, seconds)
    die_of_a_lost_batch()
