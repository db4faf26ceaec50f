"""What keeps the processes of a run together: when to stop, whether all answer, whether all hold the same weights.

Imports nothing of this project.
"""

import contextlib
import fcntl
import multiprocessing.queues
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # what torchrun passes on to its processes
LAUNCHER_ENDED = 255
ONE_SIGNAL_SECONDS = 3.0  # a scheduler signals the launcher and every process, and the launcher passes its own on
LOCK_SECONDS = 30.0
DEATHS_IN_A_ROW = 3  # of a loader's workers, without a batch in between, before it is given up
DEAD_WORKER = re.compile(r"DataLoader worker \(pid|Pin memory thread exited")  # in what torch raises for one


class Watch:
    """Hears signals, lets the processes agree to stop, and ends a process that cannot go on.

    Signals arrive in a thread, by a socket that the C level of the interpreter writes to: they are heard while the
    main thread waits inside a collective that will never end.
    """

    def __init__(self, rank: int, processes: int, grace_seconds: float, stall_minutes: float, report: Callable):
        """`report(line)` is called before the process is ended by force."""
        self.rank, self.processes = rank, processes
        self.grace_seconds, self.stall_seconds, self.report = grace_seconds, 60 * stall_minutes, report
        self.stop: int = 0  # the signal that asked this process to stop
        self.where = "the start"
        self._stop_time = self._marked = time.monotonic()
        self._thread: threading.Thread | None = None
        # Process groups of their own: gloo, whatever training uses
        self._control: Any = None
        self._barrier: Any = None

    def __enter__(self) -> "Watch":
        """Begins to listen; every process does it at the same place."""
        if self.processes > 1:
            self._control = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))
            self._answer_time = timedelta(seconds=min(30.0, self.stall_seconds))
            # The group's own timeout: monitored_barrier waits that long for process 0, whatever it is told.
            self._barrier = torch.distributed.new_group(backend="gloo", timeout=self._answer_time)
        self._parent = os.getppid()
        self._heard, hears = socket.socketpair()
        self._wake = hears
        hears.setblocking(False)
        self._before = {s: signal.getsignal(s) for s in STOP_SIGNALS if signal.getsignal(s) is not signal.SIG_IGN}
        for number in self._before:  # one that is ignored (nohup) stays so
            signal.signal(number, lambda *_: None)
        self._old_fd = signal.set_wakeup_fd(hears.fileno(), warn_on_full_buffer=False)
        self._closed = threading.Event()
        self.mark("the start")
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stops watching; after a stop, further signals are ignored, since the process is about to end."""
        if not self._thread:
            return
        self._closed.set()
        self._thread.join()
        signal.set_wakeup_fd(self._old_fd)
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.stop else before)
        self._heard.close(), self._wake.close()
        self._thread = None

    def mark(self, where: str) -> None:
        """Notes that this process gets on, and with what."""
        self.where, self._marked = where, time.monotonic()

    def agree_to_stop(self) -> int:
        """The signal that asked any process to stop, the same answer on all; 0: go on."""
        if self._control is None:
            return self.stop
        asked = torch.tensor(self.stop)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, group=self._control)
        return int(asked)

    def seconds_left(self) -> float:
        """Of the grace time, for all processes: of the one that was asked to stop first."""
        spent = time.monotonic() - self._stop_time if self.stop else 0.0
        return self.grace_seconds - max(self.gather(spent))

    def differing_ranks(self, number: int) -> list[int]:
        """The processes whose number is not that of the first one."""
        if self._control is None:
            return []
        numbers = [torch.tensor(0) for _ in range(self.processes)]
        torch.distributed.all_gather(numbers, torch.tensor(number), group=self._control)
        return [rank for rank, other in enumerate(numbers) if other != numbers[0]]

    def gather(self, value: Any) -> list[Any]:
        if self._control is None:
            return [value]
        values: list[Any] = [None] * self.processes
        torch.distributed.all_gather_object(values, value, group=self._control)
        return values

    def _watch(self) -> None:
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        while not self._closed.is_set():
            ready, _, _ = select.select([self._heard], [], [], 0.2)
            for number in self._heard.recv(64) if ready else b"":
                if number in self._before:
                    self._note(number)
            if under_torchrun and not self.stop and os.getppid() != self._parent:
                self._note(LAUNCHER_ENDED)
            now = time.monotonic()
            if self.stop and now - self._stop_time > self.grace_seconds:
                self._end(
                    f"{stop_name(self.stop)}, but {self.where} did not come to an end within {self.grace_seconds:g} s"
                )
            if now - self._marked > self.stall_seconds:
                self._end(f"no progress for {self.stall_seconds:g} s since {self.where}: {self._missing()}")

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if not self.stop:
            self.stop, self._stop_time = number, now
        elif now - self._stop_time > ONE_SIGNAL_SECONDS:
            os._exit(128 + number)

    def _missing(self) -> str:
        """Which process does not answer, as the others see it."""
        if self._barrier is None:
            return "it hangs"
        try:
            torch.distributed.monitored_barrier(self._barrier, self._answer_time, wait_all_ranks=True)
        except RuntimeError as error:
            return str(error).strip().splitlines()[0]
        return "every process answers, yet training does not go on"

    def _end(self, line: str) -> None:
        with contextlib.suppress(Exception):
            self.report(line)
        print(f"error: process {self.rank}: {line}", file=sys.stderr, flush=True)
        os._exit(exit_status(self.stop) if self.stop else 1)


@contextlib.contextmanager
def ends_at_a_signal(note: Callable[[str], None]):
    """A signal to stop ends the process at once within the block, after `note` of the signal's name.

    For what comes before and after training, where nothing is to be saved. Where a Watch listens, it alone hears them.
    """
    process = os.getpid()

    def end(number: int, _: Any) -> None:
        if os.getpid() != process:  # a worker that was forked here, and that its own parent ends
            signal.signal(number, signal.SIG_DFL)
            return os.kill(os.getpid(), number)
        note(stop_name(number))
        os._exit(exit_status(number))

    before = {s: signal.getsignal(s) for s in STOP_SIGNALS if signal.getsignal(s) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is end:  # else Watch has heard one, and ignores others
                signal.signal(number, handler)


def exit_status(stop: int) -> int:
    """Of a run that a signal stopped, as schedulers and shells know it."""
    return 128 + (signal.SIGTERM if stop == LAUNCHER_ENDED else stop)


def stop_name(number: int) -> str:
    return "its launcher ended" if number == LAUNCHER_ENDED else signal.Signals(number).name


def outlive_stop_signals(_: int, seconds: float) -> None:
    """For a loader's workers: whoever signals every process means the run, which still needs them for so long."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: signal.setitimer(signal.ITIMER_REAL, seconds))  # its SIGALRM ends them


def die_of_a_lost_batch() -> None:
    """For a loader's workers: a batch that cannot be sent (no shared memory) ends the worker, which is then replaced.

    Else the worker would go on with the next one, and the run wait for ever.
    """

    def die(error: Exception, _: Any) -> None:
        print(f"warning: a worker of the loader cannot send its batch: {error}", file=sys.stderr, flush=True)
        os._exit(1)

    cast(Any, multiprocessing.queues.Queue)._on_queue_feeder_error = staticmethod(die)


class Batches:
    """A loader's batches; when one of its workers dies, new workers go on with the batch that is due.

    Torch's own handler of SIGCHLD would raise wherever the main thread is just then, in the middle of a step too.
    Without it, whoever waits for the next batch finds out, within 5 s.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        again: Callable[[int], Iterator[Any]],
        died: Callable[[str], None],
        begun: Callable[[], list[str]] = list,
    ):
        """`again(n)` gives what follows the first n batches, `died(why)` is called for each death; `begun()` names the
        recordings that workers have begun with and not ended."""
        self.first = self.batches = batches
        self.again, self.died, self.begun = again, died, begun
        self.done = 0
        self.deaths = 0  # in a row
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Any:
        """The next batch; RuntimeError when workers go on dying before it comes."""
        while True:
            try:
                batch = next(self.batches)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a stream makes its loader at its first batch
                self.done, self.deaths = self.done + 1, 0
                return batch
            except (RuntimeError, ConnectionError, EOFError) as error:
                # Tensors of a batch that is there are fetched from its worker: with that the connection is gone. What a
                # worker itself has raised says that it was caught.
                gone = not isinstance(error, RuntimeError) and "Caught " not in str(error)
                if not gone and not DEAD_WORKER.search(str(error)):
                    raise
                self.deaths += 1
                self.died(f"a DataLoader worker is gone ({type(error).__name__})" if gone else str(error))
                if self.deaths == DEATHS_IN_A_ROW:
                    names = ", ".join(self.begun())
                    raise RuntimeError(
                        f"{self.deaths} workers of the loader died one after the other: out of memory (give fewer, by"
                        " dataloader_num_workers), too little of /dev/shm (docker run --shm-size), or a recording that"
                        f" the decoder does not survive{f', one of {names}' if names else ''}"
                    ) from error
            with contextlib.suppress(AttributeError):  # a loader within the training process has none
                cast(Any, self.batches)._shutdown_workers()  # the others; they would go on holding memory
            self.batches = self.again(self.done)


def checksum(parameters: Iterable[torch.Tensor]) -> int:
    """A number of the parameters' bits, the same only where (nearly) every bit is; holds one of them at a time."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [p.detach().view(words[p.element_size()]).sum(dtype=torch.int64) for p in parameters]
    weights = torch.arange(1, 2 * len(sums), 2, device=sums[0].device)
    return int((torch.stack(sums) * weights).sum())


def take_lock(folder: Path) -> Any:
    """Takes the run's folder for this process until it ends, or returns None if another one keeps it.

    What a killed run left behind (workers of its loader) keeps it for a few seconds more.
    """
    file = open(folder / ".lock", "a")  # noqa: SIM115, it is held open
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > end:
                file.close()
                return None
            time.sleep(0.5)
        except OSError as error:  # a file system without locks
            line = (
                f"{folder} is on a file system without locks ({error.strerror}): see to it that no other run is there"
            )
            print(f"warning: {line}", file=sys.stderr, flush=True)
            return file
