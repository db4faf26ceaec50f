"""How much is in a step, how long each process computes in it, and how far the slowest is behind the others."""

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any

import accelerate
import torch
from torch.autograd import Variable

from hebrew_asr.model.costs import Work, flops, peak_flops
from hebrew_asr.model.frames import FRAMES_PER_CHUNK
from hebrew_asr.model.loss import IGNORED_LABEL
from hebrew_asr.model.packing import useful_tokens


@dataclass
class Window:
    """What was done since the last line of the log."""

    audio_seconds: float = 0.0
    """Of all processes, as are positions and useful."""
    positions: float = 0.0
    """Of the language model."""
    useful: float = 0.0
    """Of them, those that are not padding."""
    fullest: float = 0.0
    """Positions of the process that had the most of them in a step, summed over the steps."""
    work: Work = field(default_factory=Work)
    """Of this process."""
    waited: float = 0.0
    """Seconds of this process without data."""
    sampled: float = 0.0
    """Seconds of this process in rollouts (Round 3)."""
    computed: list[float] = field(default_factory=list)
    """Seconds of this process in the forward and backward passes of each step."""

    def add_step(self, counts: "StepCounts", accelerator: accelerate.Accelerator) -> float:
        """Sums the counts of a step over the processes, in place, and adds them; returns the items of the loss."""
        fullest = counts.reduce(accelerator)
        self.audio_seconds += counts.frames / FRAMES_PER_CHUNK
        self.positions += counts.positions
        self.useful += counts.useful
        self.fullest += fullest
        return counts.items

    def numbers(self, model: torch.nn.Module, seconds: float, computed: list[list[float]]) -> dict[str, float]:
        """Speed, and how far it is from its limit, for the log; `computed` is that of every process."""
        trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        done = sum(flops(model.config, self.work, trains.__contains__).values())
        peak = peak_flops()
        rare = {"train/time_in_rollouts": self.sampled / seconds, "train/mfu": done / seconds / peak if peak else 0}
        return {
            "train/audio_seconds_per_second": self.audio_seconds / seconds,
            "train/useful_tokens": self.useful / max(1, self.positions),
            "train/balance": self.useful / max(1, len(computed) * self.fullest),
            "train/rank_spread": spread(computed),
            "train/waiting_for_data": self.waited / seconds,
            "train/gigaflops_per_second": done / seconds / 1e9,
        } | {name: value for name, value in rare.items() if value}


@dataclass
class StepCounts:
    """What is in one optimizer step: of this process, and after `reduce` of all."""

    items: float = 0.0
    """That the loss is a sum over."""
    frames: float = 0.0
    """Mel frames of the utterances."""
    positions: float = 0.0
    """Of the language model."""
    useful: float = 0.0
    """Of them, those that are not padding."""
    dropped: float = 0.0
    """Utterances left out."""
    broken: float = 0.0
    """Of them, those that cannot be heard."""
    dead_workers: float = 0.0

    def add(self, batch: dict[str, torch.Tensor], items: torch.Tensor) -> None:
        """Adds a micro-batch; one without supervised tokens (of a process without work) is silence."""
        has_labels = bool((batch["labels"] != IGNORED_LABEL).any())
        self.items += int(items)
        self.frames += int(batch["input_features_mask"].sum()) * has_labels
        self.positions += batch["input_ids"].numel()
        self.useful += int(useful_tokens(batch)) * has_labels

    def reduce(self, accelerator: accelerate.Accelerator) -> float:
        """Sums over the processes, in one exchange; returns the positions of the process that has most of them."""
        mine = list(dataclasses.asdict(self).values())
        by_process = [0.0] * accelerator.num_processes
        by_process[accelerator.process_index] = self.positions
        sums = torch.tensor([*mine, *by_process], dtype=torch.float64, device=accelerator.device)
        sums = accelerator.reduce(sums, reduction="sum").tolist()
        for name, value in zip(dataclasses.asdict(self), sums, strict=False):
            setattr(self, name, value)
        return max(sums[len(mine) :])


class StepClock:
    """Times this process's forward and backward passes of a step, without what it waits for other processes.

    It begins where all processes have just met, and ends when the last backward pass has gone through, before
    DistributedDataParallel waits for the gradients of the others: autograd calls what was queued in its order, and DDP
    queues later. On CUDA the marks are events of the stream, so that nothing waits for the device in between.
    """

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        self.began = self.ended = self._mark()

    def _mark(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        self.began = self._mark()

    def end_after(self, loss: torch.Tensor) -> None:
        """Lets the step end with the backward pass of this loss."""
        loss.register_hook(lambda _: Variable._execution_engine.queue_callback(self._end))

    def _end(self) -> None:
        self.ended = self._mark()

    def seconds(self) -> float:
        """Of the last step; waits until the device is through with it."""
        if not self.on_cuda:
            return self.ended - self.began
        self.ended.synchronize()
        return self.began.elapsed_time(self.ended) / 1000  # from ms


def spread(by_process: list[list[float]]) -> float:
    """How much longer than the mean the slowest process of each step took, as a share of all steps' mean.

    Args:
        by_process: seconds of each step, for each process.
    """
    slowest = sum(max(step) for step in zip(*by_process, strict=True))
    return slowest / max(1e-9, sum(map(sum, by_process)) / len(by_process)) - 1
