"""Training data that is read while it is trained on, for corpora that do not fit the disk.

The reading, the shards and their division over processes are `datasets`' own. A row passes the filters of a start
(texts, headers, leaks by words and by bytes), what is left out is reported with each step. Not looked for in a stream:
duplicates, and leaks by sound. Imports nothing of the training scripts.
"""

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node

from hebrew_asr.data.loading import load_source
from hebrew_asr.data.rows import RowSettings, SpeechRows, describe_row, load_rows, row_settings
from hebrew_asr.data.selection import to_choose_by
from hebrew_asr.data.shared_memory import sent
from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.errors import InputError
from hebrew_asr.files import DIGEST

BLOCK_ROWS = 256  # rows that are read at once and shuffled; a resumed run reads the rest of its block again


@dataclass
class StreamedSource:
    """A source whose rows are read as they are needed."""

    source: Source
    rows: datasets.IterableDataset
    settings: RowSettings
    leaks: "Leaks"


def open_stream(source: Source, config: DataConfig, leaks: "Leaks") -> StreamedSource:
    """Finds the shards; raises InputError."""
    rows = load_source(source, streaming=True)
    return StreamedSource(source, rows, row_settings(source, rows.column_names, config, for_training=True), leaks)


def load_streams_and_eval(config: DataConfig, seed: int) -> tuple[list[StreamedSource], SpeechRows]:
    """Like `load_train_and_eval`, with the training sources opened and not read."""
    heldout = load_rows(config.eval_sources, config, for_training=False)
    leaks = Leaks(heldout, config)  # of all of it, however much of it is evaluated
    streams = [open_stream(source, config, leaks) for source in config.train_sources]
    return streams, to_choose_by(heldout, config, seed)


class Leaks:
    """What the evaluation sets hold, to be kept out of training."""

    def __init__(self, heldout: SpeechRows, config: DataConfig):
        self.contents = {name[:DIGEST] for name in heldout.column("digest")}
        counted = zip(heldout.column("words"), heldout.column("word_count"), strict=True)
        self.sentences = {words for words, count in counted if count >= config.leak_min_words}

    def reason(self, piece: dict[str, Any]) -> str:
        if piece["digest"][:DIGEST] in self.contents:
            return "audio of an evaluation set"
        return "text of an evaluation set" if piece["words"] in self.sentences else ""


class EndlessPieces:
    """The pieces of one source for one process, pass after pass, each with another order of the shards.

    `state` is all that an equal object needs to go on from here.
    """

    def __init__(self, stream: StreamedSource, seed: tuple[int, ...]):
        self.stream, self.seed = stream, seed
        self.rows = copy.deepcopy(stream.rows)  # the number of the pass is in memory that workers would share
        self.state: dict[str, Any] = {"pass": 1, "block": 0, "rows": None, "taken": 0}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields pieces with `audio`, `pass` and, where one cannot be used, `dropped`."""
        while True:
            state = self.state
            self.rows.set_epoch(state["pass"])
            self.rows.load_state_dict(state["rows"])
            rows = iter(self.rows)
            while block := list(islice(rows, BLOCK_ROWS)):
                after = self.rows.state_dict()
                pieces = [piece | {"pass": state["pass"]} for row in block for piece in self.described(row)]
                random = np.random.default_rng([*self.seed, state["pass"], state["block"]])
                for place in random.permutation(len(pieces))[state["taken"] :].tolist():
                    state["taken"] += 1
                    yield pieces[place]
                state |= {"block": state["block"] + 1, "rows": after, "taken": 0}
            if not state["block"]:
                raise InputError(f"{self.stream.source}: this process's share of it has no rows")
            state |= {"pass": state["pass"] + 1, "block": 0, "rows": None, "taken": 0}

    def described(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        pieces = [
            piece | {"audio": row["audio"] and row["audio"] | {"channel": piece.get("channel")}}
            for piece in describe_row(row, self.stream.settings)
        ]
        return [p if p["dropped"] else p | {"dropped": self.stream.leaks.reason(p)} for p in pieces]


class SpeechStream(torch.utils.data.IterableDataset):
    """One process's share of the steps of a run, for ever.

    Args:
        streams: the sources; where there are several, each has a probability.
        featurize: makes an utterance of (piece, pass, number), or a dict with `dropped`.
        collate: makes a step's micro-batches of utterances.
        share: this process's utterances in a step.
    """

    def __init__(
        self,
        streams: list[StreamedSource],
        featurize: Callable[[dict[str, Any], int, int], dict[str, Any]],
        collate: Callable[[list[dict[str, Any]]], list[Any]],
        share: int,
        seed: int,
        rank: int,
        processes: int,
    ):
        self.featurize, self.collate, self.share = featurize, collate, share
        self.seed, self.rank = seed, rank
        self.streams = [dataclasses.replace(s, rows=split_by_process(s.rows, rank, processes)) for s in streams]
        shards = min(s.rows.num_shards for s in streams)
        self.most_workers = shards if shards < processes else shards // processes
        self.shares = np.array([1.0 if s.source.probability is None else s.source.probability for s in streams])
        self.start: dict[str, Any] = {}  # the reader's state

    def workers(self, wanted: int) -> int:
        """At most as many as every source has shards for each process."""
        return min(wanted, self.most_workers)

    def __iter__(self) -> Iterator[tuple[list[Any], list[str], list[str], int, dict[str, Any]] | None]:
        """Yields (micro-batches, what was dropped, names of the utterances, worker, its state after the step)."""
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        sources = [
            EndlessPieces(stream, (self.seed, number, self.rank, worker)) for number, stream in enumerate(self.streams)
        ]
        taken = np.zeros(len(sources), np.int64)
        if before := self.start["workers"].get(str(worker)):
            taken = np.array(before["taken"])
            for source, state in zip(sources, before["sources"], strict=True):
                source.state = copy.deepcopy(state)
        if worker < self.start["steps"] % workers:
            yield None  # its turn in this round was before the start
        pieces = [iter(source) for source in sources]
        # The passes of which something was kept; of those before a start in mid-pass nothing is known
        kept = [{source.state["pass"], source.state["pass"] - 1} if before else set() for source in sources]
        while True:
            utterances, dropped, names = [], [], []
            while len(utterances) < self.share:
                number = int(np.argmax(self.shares * (taken.sum() + 1) - taken))  # the one furthest behind
                piece = next(pieces[number])
                if piece["pass"] > 1 and piece["pass"] - 1 not in kept[number]:
                    source = self.streams[number].source
                    raise InputError(f"{source}: a whole pass over this process's share gave nothing to train on")
                utterance = {"dropped": f"{piece['dropped']}: {piece['recording']}"}
                if not piece["dropped"]:
                    utterance = self.featurize(piece, piece["pass"], int(piece["digest"][:15], 16))
                if "dropped" in utterance:
                    dropped.append(utterance["dropped"])
                else:
                    utterances.append(utterance)
                    names.append(f"{piece['recording']} ({piece['text']!r})")
                    taken[number] += 1
                    kept[number] = {piece["pass"], piece["pass"] - 1}
            state = {"taken": taken.tolist(), "sources": [copy.deepcopy(source.state) for source in sources]}
            yield self.collate(utterances), dropped, names, worker, state


def split_by_process(rows: datasets.IterableDataset, rank: int, processes: int) -> datasets.IterableDataset:
    """Whole shards for each process; where there are fewer shards, each reads all and uses its own rows."""
    strategy = "shards" if rows.num_shards >= processes else "auto"
    return split_dataset_by_node(rows, rank, processes, strategy=strategy)


MEAN_SECONDS = 10.0  # of an utterance, for the size of a batch; nobody has heard them yet


class StreamReader(torch.utils.data.Dataset):
    """One process's steps of a SpeechStream, which runs in workers: whichever step is asked for is the next one.

    `state` is all that an equal reader needs to go on from here; `last` names the utterances of the last step.
    """

    def __init__(self, stream: SpeechStream, workers: int, pin_memory: bool):
        self.stream, self.last = stream, []
        self.workers, self.pin_memory = stream.workers(workers), pin_memory
        self.state: dict[str, Any] = {"steps": 0, "num_workers": self.workers, "workers": {}}
        self.items: Iterator | None = None

    def go_on_from(self, state: dict[str, Any], seed: int) -> None:
        """Drops what was read ahead; raises InputError for a state of another number of workers."""
        if state["num_workers"] != self.workers:
            raise InputError(
                f"a streamed run goes on with as many workers as before: {state['num_workers']}, not {self.workers}"
                " (dataloader_num_workers)"
            )
        self.state, self.items, self.stream.seed = copy.deepcopy(state), None, seed

    def __iter__(self) -> "StreamReader":
        return self

    def __next__(self) -> tuple[list[Any], list[str]]:
        if self.items is None:
            self.stream.start = copy.deepcopy(self.state)
            self.items = iter(
                torch.utils.data.DataLoader(
                    self.stream,
                    batch_size=None,
                    collate_fn=sent(lambda item: item, self.workers, self.stream.share * MEAN_SECONDS),
                    num_workers=self.workers,
                    prefetch_factor=2 if self.workers else None,
                    pin_memory=self.pin_memory,
                )
            )
        try:
            while (item := next(self.items)) is None:
                pass
        except RuntimeError:  # a worker died: whoever asks again goes on from `state`
            self.items = None
            raise
        except InputError as error:  # of one process, and of a worker: there the message has its traceback around it
            message = (
                str(error).strip().splitlines()[-1].removeprefix(f"{InputError.__module__}.{InputError.__qualname__}: ")
            )
            print(f"error: {message}", file=sys.stderr, flush=True)
            raise InputError(message) from error
        micro_batches, dropped, self.last, worker, state = item
        self.state["steps"] += 1
        self.state["workers"][str(worker)] = state
        return micro_batches, dropped

    def __getitems__(self, step: Any) -> tuple[list[Any], list[str]]:
        return next(self)
