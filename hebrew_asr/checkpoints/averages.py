"""Averages of weights: of several checkpoints, and a moving one that is kept while training.

Sums are in fp64 and the averages in fp32; a final model is cast to its one type when it is written. Imports nothing of
the training script: its trainer is passed in.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import Qwen3ASRForConditionalGeneration

from hebrew_asr.checkpoints import store
from hebrew_asr.checkpoints.store import Checkpoint
from hebrew_asr.checkpoints.tensors import AVERAGE, WEIGHTS, load_tensors


def mean_of(found: list[Checkpoint]) -> Iterator[tuple[str, torch.Tensor]]:
    """The mean of each tensor over checkpoints, in fp32, one tensor after the other.

    A checkpoint has two tied weights once, so that what is loaded from here stays tied.
    """
    for tensors in zip(*(checkpoint.tensors(WEIGHTS) for checkpoint in found), strict=True):
        (name,) = {name for name, _ in tensors}
        yield name, (sum(tensor.double() for _, tensor in tensors) / len(tensors)).float()


def newest(place: Path, count: int) -> list[Checkpoint]:
    """The valid ones of the newest checkpoints, at most `count`, the newest first."""
    return valid(store.names(place), count)


def lowest_wer(place: Path, count: int) -> list[Checkpoint]:
    """The valid ones of the checkpoints with a WER, at most `count`, the lowest first."""
    return valid(store.by_wer(place), count)


def valid(folders: Iterable[Path], count: int) -> list[Checkpoint]:
    found = []
    for folder in folders:
        if len(found) < count:
            try:
                found.append(store.verify(folder))
            except store.InvalidCheckpoint:
                continue
    return found


def model_of(found: list[Checkpoint], is_moving: bool = False) -> Qwen3ASRForConditionalGeneration:
    """The mean of checkpoints as a model in fp32, or the moving average that the first one holds.

    What no stage trains is the same in every checkpoint of a run.
    """
    model = Qwen3ASRForConditionalGeneration.from_pretrained(found[0].folder, dtype=torch.float32)
    load_tensors(model, found[0].tensors(AVERAGE) if is_moving else mean_of(found))
    return model
