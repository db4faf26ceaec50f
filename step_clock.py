"""How long each process computes in a step, and how far the slowest is behind the others.

Imports nothing of this project.
"""

import time
from typing import Any

import torch
from torch.autograd import Variable


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
