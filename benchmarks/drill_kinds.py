"""Faults of the drill that one table describes: what happens inside a run, or to its data, and how the run must end.

Each is brought about by having a function of the product, or of a library, do something first (`before`): raise what
the system would raise, wait, or end the process. The product's own functions run otherwise.
"""

import errno
import fcntl
import io
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch

import train_hebrew_asr_enhanced as training
from hebrew_asr import processes
from hebrew_asr.checkpoints import store
from hebrew_asr.data import identity, utterances
from hebrew_asr.data.audio import AudioError
from hebrew_asr.training import watch

BETWEEN = (1, 2, 3, 4, 7, 8, 9, 10)  # steps after which nothing is evaluated
NOT_LAST = (1, 2, 3, 4, 5, 7, 8, 9, 10, 11)  # steps of more than one utterance
HOSTILE = "\n\x1b[2J\u202e\u2028 {}'\"; rm.wav"  # in a recording's name


@dataclass(frozen=True)
class Place:
    """A process of a run that a fault hits."""

    folder: Path  # of the fault; the run's own is below it
    rank: int
    is_last: bool  # of the processes
    step: int
    clip: bytes  # of the corpus for training
    heldout_clip: bytes

    @property
    def is_again(self) -> bool:
        """Whether this is the same command again."""
        return (self.folder / "again").exists()

    @property
    def done(self) -> int:
        return steps_done(self.folder)


def steps_done(folder: Path) -> int:
    """The last step that the first process has marked."""
    try:
        return int((folder / "where-0").read_text().split()[-1])
    except (OSError, ValueError, IndexError):
        return -1


@dataclass(frozen=True)
class Kind:
    bring_about: Callable[[Place], None]
    """Changes this process."""
    ends: str
    """How the run that is hit must end: `finished`, `failed`, `preempted`, or `killed` (in any way). `refused`: it is
    killed from outside, and the fault hits the same command again, which must end with a message."""
    said: str = ""
    """What stands in the log then."""
    loses_nothing: bool = False
    """Else the steps since the last checkpoint."""
    steps: tuple[int, ...] = tuple(range(1, 12))
    processes: int = 1
    has_same_bits: bool = True
    settings: tuple[tuple[str, Any], ...] = ()
    lasts: bool = False
    """Whether it hits all runs, not only one."""
    without: Callable[[], None] | None = None
    """Takes the mend out of the product: the control, which must not survive."""


def before(owner: Any, name: str, action: Callable[..., None]) -> None:
    """Has a function call `action` with its arguments first."""
    function = getattr(owner, name)

    def changed(*args: Any, **kwargs: Any) -> Any:
        action(*args, **kwargs)
        return function(*args, **kwargs)

    setattr(owner, name, changed)


def failing(number: str) -> OSError:
    return OSError(getattr(errno, number), os.strerror(getattr(errno, number)))


def unreadable(place: Place, number: str) -> None:
    """Files of checkpoints cannot be read while the command begins again."""

    def refuse(path: Path) -> None:
        if place.is_again and "checkpoints" in path.parts:
            raise failing(number)

    before(store, "sha256", refuse)


def unreadable_is_invalid() -> None:
    verify = store.verify

    def believed(folder: Path) -> store.Checkpoint:
        try:
            return verify(folder)
        except store.UnreadableCheckpoint as error:
            raise store.InvalidCheckpoint(str(error)) from error

    store.verify = believed


def save_fails(place: Place, number: str, once: bool) -> None:
    failed = []

    def fail(parent: Path, step: int, *rest: Any) -> None:
        if step >= place.step and not (once and failed):
            failed.append(step)
            raise failing(number)

    before(store, "write", fail)


def slow_disk(place: Place, seconds: float, is_stopped: bool) -> None:
    def wait(parent: Path, step: int, *rest: Any) -> None:
        if step >= place.step:
            if is_stopped:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(seconds)

    before(store, "write", wait)


def out_of_memory(place: Place, function: str) -> None:
    """Once, in a function of the trainer."""
    failed = []

    def fail(trainer: Any, *rest: Any) -> None:
        if place.is_last and trainer.state.global_step + (function == "scaled_loss") >= place.step and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("out of memory, says the drill")

    before(training.GradualUnfreezeTrainer, function, fail)


def no_smaller_parts() -> None:
    def give_up(*_: Any) -> None:
        raise torch.OutOfMemoryError

    before(training.GradualUnfreezeTrainer, "in_smaller_parts", give_up)


def no_locks(place: Place) -> None:
    """In the run's folder; the cache of `datasets` is elsewhere, and has them."""

    def refuse(file: Any, *_: Any) -> None:
        if str(place.folder) in str(getattr(file, "name", "")):
            raise failing("ENOLCK")

    before(fcntl, "flock", refuse)


def console(place: Place, behind: str) -> None:
    """Another console than the log."""
    if behind == "ASCII":
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w", closefd=False), "ascii") for n in (1, 2))
        return
    if behind == "closed pipe":
        reads, descriptor = os.pipe()
        os.close(reads)
    else:
        descriptor = os.open("/dev/full", os.O_WRONLY)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)


def plain_console() -> None:
    processes.use_console = lambda: None


def decoder_dies(place: Place) -> None:
    """By one recording, in each worker of the loader."""

    def die(audio: dict[str, Any], *rest: Any) -> None:
        if torch.utils.data.get_worker_info() and audio["bytes"] == place.clip:
            os.kill(os.getpid(), signal.SIGSEGV)

    before(utterances, "decode_audio", die)


def evaluation_file_vanishes(place: Place) -> None:
    def vanish(audio: dict[str, Any], *rest: Any) -> None:
        if place.done >= 1 and audio["bytes"] == place.heldout_clip:
            raise AudioError("no such audio file")

    before(utterances, "decode_audio", vanish)


def clock(place: Place, seconds: float) -> None:
    real = time.time
    time.time = lambda: real() + seconds * (place.done >= place.step)


def end_in(place: Place, owner: Any, name: str, number: signal.Signals) -> None:
    """Ends this process, or asks it to, as it enters a function after its step."""
    asked = []

    def end(*_: Any, **__: Any) -> None:
        if place.done >= place.step and not asked:
            asked.append(True)
            os.kill(os.getpid(), number)

    before(owner, name, end)


def again_and_again(place: Place) -> None:
    """Ends each run five steps after it began or went on."""
    steps: list[int] = []

    def end(_: watch.Watch, where: str) -> None:
        if where.startswith("step "):
            steps.append(int(where.split()[1]))
            if steps[-1] >= steps[0] + 4:
                os.kill(os.getpid(), signal.SIGKILL)

    before(watch.Watch, "mark", end)


def nothing(place: Place) -> None:
    """What happens, happens outside."""


def other_data_are_the_same() -> None:
    identity.differences = lambda *_: []


def exchanged(column: str, table: pyarrow.Table) -> pyarrow.Table:
    """The first two rows' values, one in the place of the other."""
    order = [1, 0, *range(2, len(table))]
    return table.set_column(table.column_names.index(column), column, table[column].take(order))


OTHER_DATA: dict[str, tuple[str, Callable[[pyarrow.Table], pyarrow.Table]]] = {  # who: which corpus, and what of it
    "transcripts exchanged": ("corpus", partial(exchanged, "transcript")),
    "recordings exchanged": ("corpus", partial(exchanged, "audio")),
    "rows reordered": ("corpus", lambda table: table.take(list(range(len(table)))[::-1])),
    "a row fewer": ("corpus", lambda table: table.slice(1)),
    "evaluation set exchanged": ("heldout", partial(exchanged, "transcript")),
    "evaluation set replaced": ("heldout", lambda table: table.slice(3)),
}


def put_other_data(who: str | None, work: Path, folder: Path) -> None:
    """Changes a corpus under the run, with the same time of change; None: puts both back as they were."""
    for name in ("corpus", "heldout"):
        whole, file = work / name / "train.parquet", folder / name / "train.parquet"
        times, (changed, change) = file.stat(), OTHER_DATA[who] if who else ("", None)
        if change and name == changed:
            pyarrow.parquet.write_table(change(pyarrow.parquet.read_table(whole)), file)
        else:
            shutil.copy(whole, file)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


OTHER = Kind(nothing, "refused", "--accept_changed_data", steps=(4, 5, 6, 7, 8, 9))
UNREADABLE = ("EACCES", "EIO", "ESTALE", "EMFILE", "ETIMEDOUT")
SPOTS = {  # who: where a process ends, the first step after which it does, and whether it says before that it was asked
    "starting": (training, "report_data", -1),
    "the first evaluation": (training.GradualUnfreezeTrainer, "transcribe", 0),
    "an evaluation": (training.GradualUnfreezeTrainer, "transcribe", 6),
    "the final model": (training, "finish", 12),
    "the final evaluation": (training, "evaluate_final", 12),
}
INJECTED = {  # kind, who or what
    **{
        ("kill -9, then unreadable", number): Kind(
            partial(unreadable, number=number), "refused", "cannot be read", steps=(4, 5, 6, 7, 8, 9),
            without=unreadable_is_invalid,
        )
        for number in UNREADABLE
    },
    **{("kill -9, then other data", who): OTHER for who in OTHER_DATA},
    ("kill -9, then other data", "rows reordered"): replace(OTHER, without=other_data_are_the_same),
    **{
        ("saves fail", number): Kind(partial(save_fails, number=number, once=False), "failed")
        for number in ("EIO", "ENOSPC")
    },
    **{
        ("a save fails", number): Kind(
            partial(save_fails, number=number, once=True), "finished", failing(number).strerror, True, BETWEEN
        )
        for number in ("EIO", "ESTALE", "EDQUOT")
    },
    ("out of memory", "a step"): Kind(
        partial(out_of_memory, function="scaled_loss"), "finished", "do not fit the device's memory", True, NOT_LAST,
        processes=2, has_same_bits=False, without=no_smaller_parts,
    ),
    ("out of memory", "an evaluation"): Kind(
        partial(out_of_memory, function="transcribe"), "finished", "memory", True, (0, 6)
    ),
    ("no locks", ""): Kind(no_locks, "finished", "file system without locks", True),
    ("console", "closed pipe"): Kind(
        partial(console, behind="closed pipe"), "finished", loses_nothing=True, without=plain_console
    ),
    ("console", "full disk"): Kind(partial(console, behind="full disk"), "finished", loses_nothing=True),
    ("console", "ASCII"): Kind(
        partial(console, behind="ASCII"), "finished", "\\u05", loses_nothing=True, without=plain_console
    ),
    ("decoder dies", "by one recording"): Kind(
        decoder_dies, "failed", "does not survive, one of",
        settings=(("dataloader_num_workers", 1), ("stall_timeout_minutes", 1.0)),  # a death is seen after 5 s
    ),
    ("evaluation file vanishes", ""): Kind(
        evaluation_file_vanishes, "failed", "recordings of the evaluation set could not be read", True
    ),
    ("slow disk", ""): Kind(partial(slow_disk, seconds=1.5, is_stopped=False), "finished", loses_nothing=True),
    ("SIGTERM on a slow disk", ""): Kind(
        partial(slow_disk, seconds=60, is_stopped=True), "preempted", settings=(("preemption_grace_seconds", 2.0),)
    ),
    ("clock", "a day back"): Kind(partial(clock, seconds=-86400.0), "finished", loses_nothing=True),
    ("clock", "a year on"): Kind(partial(clock, seconds=365 * 86400.0), "finished", loses_nothing=True),
    **{
        ("kill -9 in", who): Kind(
            partial(end_in, owner=owner, name=name, number=signal.SIGKILL), "killed", steps=(step,)
        )
        for who, (owner, name, step) in SPOTS.items()
    },
    **{
        ("SIGTERM in", who): Kind(
            partial(end_in, owner=owner, name=name, number=signal.SIGTERM),
            "killed" if who in ("starting", "the final model") else "preempted",
            loses_nothing=True,
            steps=(step,),
        )
        for who, (owner, name, step) in SPOTS.items()
    },
    ("kill -9, again and again", ""): Kind(again_and_again, "killed", lasts=True),
    ("upload asked for later", ""): Kind(nothing, "finished", loses_nothing=True, settings=(("skip_hf_upload", True),)),
}  # fmt: skip


def clip_in(work: Path, name: str, number: int) -> bytes:
    table = pyarrow.parquet.read_table(work / name / "train.parquet")
    return table["audio"][random.Random(number).randrange(len(table))].as_py()["bytes"]
