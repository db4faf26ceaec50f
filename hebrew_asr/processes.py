"""Processes of a run: start together, agree on an error, leave together."""

import contextlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import datasets
import torch
import torch.distributed
import transformers
from accelerate.utils import gather_object

from hebrew_asr.console import use_console
from hebrew_asr.errors import InputError
from hebrew_asr.start import imported, say_last

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")  # there as soon as the driver is loaded


class Task(torch.utils.data.Dataset):
    """A function of one item, for torch's loader to run in processes."""

    def __init__(self, items: list[Any], function: Callable[[Any], Any]):
        self.items, self.function = items, function

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.function(self.items[index])


def in_processes(items: list[Any], function: Callable[[Any], Any], workers: int) -> Iterator[Any]:
    """The results in order."""
    workers = min(workers, len(items) - 1)  # the loader's processes share what this one has loaded
    task = Task(items, function)
    return iter(torch.utils.data.DataLoader(task, None, collate_fn=lambda one: one, num_workers=max(0, workers)))


@contextlib.contextmanager
def fail_together():
    """Runs its block on every rank; an InputError on any of them becomes the same InputError on all."""
    problem = None
    try:
        yield
    except InputError as error:
        problem = str(error)
    if first := next(filter(None, gather_object([problem])), None):
        raise InputError(first)


def load_in_turn(state: accelerate.PartialState, load: Callable[[], Any]) -> Any:
    """The first process of each machine reads and caches, the others find the cache; InputError on all or on none."""
    data, problem = None, None
    with state.local_main_process_first():
        try:
            data = load()
        except InputError as error:
            problem = error  # raised below: this block must be left by every rank
    with fail_together():
        if problem:
            raise problem
    return data


def join_processes(timeout_minutes: int) -> accelerate.PartialState:
    """The processes of this launch, on a GPU each or all on the CPU, their libraries quiet.

    Raises InputError for a GPU that torch cannot use. A process that waits longer than that for the others ends.
    """
    state = accelerate.PartialState(cpu=not has_gpu(), timeout=timedelta(minutes=timeout_minutes))
    quiet_libraries(state.is_main_process)
    return state


def quiet_libraries(is_main: bool) -> None:
    """Warnings of the libraries from the first process only, and their progress bars too, on a terminal.

    What a library will change in its next version is not for the command's user.
    """
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_warning() if is_main else transformers.logging.set_verbosity_error()
    if not (is_main and sys.stderr.isatty()):
        transformers.logging.disable_progress_bar()
    if not is_main:
        datasets.disable_progress_bars()


def launch(command: Callable[[list[str]], None]) -> None:
    """Runs a command with its command line's arguments; an InputError is one message and exit status 1.

    Every rank meets an InputError at the same place, and they leave together. What else fails may fail on one rank
    alone: that one shows its traceback and ends at once, since on NCCL an orderly end would wait for the others.
    """
    imported()
    use_console()
    try:
        command(sys.argv[1:])
    except InputError as error:
        say_last(f"error: {error}")
        leave_process_group()
        sys.exit(1)
    except KeyboardInterrupt:
        say_last("\ninterrupted")
        os._exit(128 + signal.SIGINT)
    except Exception:
        if not torch.distributed.is_initialized():
            raise
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)


def leave_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def has_gpu(driver: Path = NVIDIA_DRIVER) -> bool:
    """Whether this process has a GPU; InputError where the machine has one that torch cannot use.

    Hiding all GPUs (CUDA_VISIBLE_DEVICES empty or -1) is to choose the CPU.
    """
    if torch.cuda.is_available():
        return True
    if not driver.exists() or os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return False
    try:
        torch.cuda.init()
        problem = "torch finds none of its GPUs"
    except (RuntimeError, AssertionError) as error:
        problem = str(error).strip().splitlines()[0]
    raise InputError(
        f"this machine has an NVIDIA driver, but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it:"
        f" {problem}. Update the driver, or install torch for its CUDA (nvidia-smi names it); to run on the CPU all the"
        " same, set CUDA_VISIBLE_DEVICES=-1"
    )
