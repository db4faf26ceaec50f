"""Batches from a loader's workers: through shared memory (/dev/shm), or by value where that is too small for them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_map

PLACE = Path("/dev/shm")  # Docker gives it 64 MB
BYTES_PER_SECOND = 100 * 128 * 4  # of log-mel features of audio
AHEAD = 2  # batches that each worker prepares
MARGIN = 1.5  # longer utterances than the mean, padding, tokens


class Array(NamedTuple):
    """A tensor on its way."""

    values: np.ndarray


class ByValue:
    """A batch that is written into the workers' pipe as it is."""

    def __init__(self, batch: Any):
        self.batch = batch

    def __reduce__(self) -> tuple[Callable, tuple]:
        return restored, (tree_map(lambda one: Array(one.numpy()) if torch.is_tensor(one) else one, self.batch),)


def restored(batch: Any) -> Any:
    def is_array(one: Any) -> bool:
        return isinstance(one, Array)

    return tree_map(lambda one: torch.from_numpy(one.values) if is_array(one) else one, batch, is_leaf=is_array)


def needed(workers: int, seconds_at_once: float) -> float:
    """Bytes for the batches of one process's loader; of all processes of this machine together."""
    return MARGIN * workers * AHEAD * seconds_at_once * BYTES_PER_SECOND * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_too_small(workers: int, seconds_at_once: float) -> bool:
    free = shutil.disk_usage(PLACE).free if PLACE.exists() else 0
    return workers > 0 and free < needed(workers, seconds_at_once)


def advice(workers: int, seconds_at_once: float) -> str | None:
    """What to say before the first step where shared memory is too small; None: it is large enough."""
    if not is_too_small(workers, seconds_at_once):
        return None
    megabytes = needed(workers, seconds_at_once) / 1e6
    return (
        f"warning: {PLACE} is too small for the {megabytes:.0f} MB of batches that {workers} workers prepare: they come"
        f" by a pipe, which is slower. Docker gives more by --shm-size={max(1, round(2 * megabytes / 1000))}g; fewer"
        " dataloader_num_workers need less"
    )


def sent(collate: Callable[[Any], Any], workers: int, seconds_at_once: float) -> Callable[[Any], Any]:
    """`collate` for a loader's workers, by value where shared memory is too small."""
    return (lambda items: ByValue(collate(items))) if is_too_small(workers, seconds_at_once) else collate
