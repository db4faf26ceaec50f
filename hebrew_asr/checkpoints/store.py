"""Checkpoints that are complete or invisible: written, verified, listed, pruned and read.

A checkpoint is a folder `step-<number>` of safetensors and JSON. It is written under a name that no reader looks for,
every file flushed to the disk, its manifest last; then the folder is renamed. A reader checks every file against the
manifest before it believes one, and opens nothing but safetensors and JSON: a checkpoint from a stranger runs no code.
"""

import contextlib
import errno
import hashlib
import json
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from hebrew_asr.errors import InputError
from hebrew_asr.files import UNFINISHED, flush, put, sha256

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8})(?:-(\d+))?")  # a second one of the same step ends in -2
SET_ASIDE = "set-aside-"  # what such a name begins with is no checkpoint
ADOPTED = "adopted.json"  # beside the checkpoints of a run that took one of another run over: which one
SPARE_BYTES = 2**20  # on top of what the tensors and documents have, for headers and the manifest
STATUS_LOCK = threading.RLock()
Say = Callable[[str], None]


class InvalidCheckpoint(Exception):
    """A folder that is not, or no longer, what its manifest says."""


class UnreadableCheckpoint(InputError):
    """A checkpoint that cannot be read now (rights, a mount, a broken disk), so that nobody knows what it is worth."""

    def __init__(self, place: Path, error: OSError):
        super().__init__(
            f"{place} cannot be read ({error.strerror or error}), which does not say that it is damaged: nothing was"
            " changed. Mend the rights, the mount or the disk and start again; or name a checkpoint with --resume; or"
            " move it away"
        )


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    facts: dict[str, Any]
    """What the manifest says beside the files: step, wer, and whatever the writer of it added."""

    @property
    def step(self) -> int:
        return self.facts["step"]

    @property
    def wer(self) -> float | None:
        """Of the evaluation at this step, if there was one."""
        return self.facts["wer"]

    def document(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def shapes(self, name: str) -> dict[str, list[int]]:
        """The tensors of one file and their shapes."""
        with safe_open(self.folder / name, "pt") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118, it is no dict

    def tensors(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of one file, one after the other."""
        with safe_open(self.folder / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                yield key, file.get_tensor(key)


# ------------------------------------------------------------------------------------------------------------- Writing
def write(
    parent: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], documents: dict[str, bytes], facts: dict
) -> Checkpoint:
    """Writes a checkpoint; when this raises, or the machine dies, there is none.

    Args:
        tensors: for each safetensors file its tensors, in host memory.
        documents: the other files' contents.
        facts: of the manifest, beside `step`; `wer` among them.
    """
    parent.mkdir(parents=True, exist_ok=True)
    needed = SPARE_BYTES + sum(map(len, documents.values()))
    needed += sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it needs {needed / 1e9:.3f} GB, {free / 1e9:.3f} GB are free")
    folder = parent / f"step-{step:08d}"
    for number in range(2, 100):
        if folder.exists():
            folder = parent / f"step-{step:08d}-{number}"
    unfinished = parent / f"{UNFINISHED}{folder.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        for name, group in tensors.items():
            save_file(group, unfinished / name, metadata={"format": "pt"})
        for name, content in documents.items():
            (unfinished / name).write_bytes(content)
        facts = {"step": step, **facts}
        seal(unfinished, (*tensors, *documents), facts)
        unfinished.rename(folder)
        flush(parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return Checkpoint(folder, facts)


def seal(folder: Path, names: Iterable[str], facts: dict[str, Any]) -> None:
    """Flushes a folder's files to the disk, and then the manifest of them.

    All get the mode that the umask gives: safetensors writes files that their owner alone may read.
    """
    files = {}
    for name in names:
        (folder / name).chmod(folder.stat().st_mode & 0o666)
        flush(folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    (folder / MANIFEST).write_text(json.dumps(facts | {"files": files}, indent=1))
    flush(folder / MANIFEST)
    flush(folder)


class Writer:
    """Writes checkpoints in a thread: training waits for the copy to host memory, and for nothing else.

    A checkpoint that cannot be written is reported and counted, and the run goes on with the last one it has.
    """

    def __init__(
        self,
        parent: Path,
        keep: int,
        say: Say,
        done: Callable[[Checkpoint], None],
        in_use: Callable[[], Collection[Path]] = tuple,
        failed: Callable[[], None] = lambda: None,
    ):
        """`done` is called, in the thread, with each checkpoint that is on the disk, `failed` for each that is not;
        `in_use` are not pruned."""
        self.parent, self.keep, self.say, self.done, self.in_use = parent, keep, say, done, in_use
        self.failed = failed
        self.newest: Checkpoint | None = None
        self.failures = 0
        self.problem = ""  # why the last one that is not there was not written
        self.stalls: list[float] = []  # seconds that training stood still for each save
        self._host: dict[str, torch.Tensor] = {}  # buffers in host memory, used again by the next save
        self._thread: threading.Thread | None = None
        self._bug: Exception | None = None

    def save(
        self, step: int, tensors: dict[str, dict[str, torch.Tensor]], documents: dict[str, bytes], facts: dict
    ) -> None:
        """Copies the tensors to host memory and writes from there; waits first for a write that is still going on."""
        started = time.perf_counter()
        self.wait()
        copies = {name: self._to_host(name, group) for name, group in tensors.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.stalls.append(time.perf_counter() - started)
        self._thread = threading.Thread(target=self._write, args=(step, copies, documents, facts))
        self._thread.start()

    def wait(self) -> None:
        """Waits until what was to be saved is on the disk, or is given up; raises what is no trouble of the disk."""
        if self._thread:
            self._thread.join()
        if self._bug:
            raise self._bug

    def _to_host(self, name: str, group: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        copies = {}
        for key, tensor in group.items():
            buffer = self._host.get(f"{name}/{key}")
            if buffer is None:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._host[f"{name}/{key}"] = buffer
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()  # the other processes gather it too, in the same order
            copies[key] = buffer.copy_(tensor.detach(), non_blocking=True)
        return copies

    def _write(self, step: int, tensors: dict, documents: dict[str, bytes], facts: dict) -> None:
        started = time.perf_counter()
        try:
            self.newest = write(self.parent, step, tensors, documents, facts)
        except (OSError, SafetensorError) as error:  # safetensors has errors of its own for a full disk
            self.failures += 1
            self.problem = str(error)
            last = self.newest.folder.name if self.newest else "none"
            self.say(f"warning: no checkpoint of step {step} ({error}); the last one is {last}, training goes on")
            self.failed()
            return
        except Exception as error:
            self._bug = error
            return
        seconds, folder = time.perf_counter() - started, self.newest.folder
        try:
            size = sum(file.stat().st_size for file in folder.iterdir())
            self.say(
                f"checkpoint {folder.name}: {size / 1e6:.1f} MB in {seconds:.2f} s, while training stood still for"
                f" {self.stalls[-1]:.3f} s"
            )
            prune(self.parent, self.keep, self.say, self.in_use())
            self.done(self.newest)
        except (OSError, UnreadableCheckpoint) as error:
            self.say(f"warning: checkpoint {folder.name} is there, but older ones may be too many ({error})")
        except Exception as error:
            self._bug = error


# ---------------------------------------------------------------------------------------------- Verifying and choosing
def verify(folder: Path) -> Checkpoint:
    """Reads the manifest and checks every file against it.

    Raises InvalidCheckpoint, which names the file and why, where the content is wrong, and UnreadableCheckpoint where
    that cannot be said.
    """
    manifest = verify_files(folder)
    if not isinstance(manifest.get("step"), int):
        raise InvalidCheckpoint("its manifest cannot be read: step is no number")
    manifest["wer"] = manifest.get("wer")
    return Checkpoint(folder, manifest)


def verify_files(folder: Path) -> dict[str, Any]:
    """Checks a folder against its manifest, as `verify` does; returns what that says beside the files."""
    try:
        manifest = read_manifest(folder)
        files = manifest.pop("files")
        for name, entry in files.items():
            path = folder / name
            found = path.lstat() if Path(name).name == name else None
            if found is None or not stat.S_ISREG(found.st_mode):
                raise InvalidCheckpoint(f"{name} is not there, or no file of the folder")
            if found.st_size != entry["bytes"]:
                raise InvalidCheckpoint(f"{name} has {found.st_size} bytes, the manifest says {entry['bytes']}")
            if sha256(path) != entry["sha256"]:
                raise InvalidCheckpoint(f"{name} has another content than the manifest says")
    except (FileNotFoundError, NotADirectoryError) as error:
        name = Path(error.filename).name
        raise InvalidCheckpoint("it has no manifest" if name == MANIFEST else f"{name} is not there") from None
    except OSError as error:
        raise UnreadableCheckpoint(folder, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidCheckpoint(f"its manifest cannot be read: {error!r}") from error
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def names(parent: Path) -> list[Path]:
    """The checkpoints' folders, the newest first, valid or not; raises UnreadableCheckpoint."""
    try:
        inside = list(parent.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UnreadableCheckpoint(parent, error) from error
    found = [(match, path) for path in inside if (match := NAME.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda f: (int(f[0][1]), int(f[0][2] or 1)), reverse=True)]


def newest_name(parent: Path) -> str | None:
    """Of the newest checkpoint, valid or not; None where there is none, or none can be seen."""
    try:
        return next((path.name for path in names(parent)), None)
    except UnreadableCheckpoint:
        return None


def newest_valid(parent: Path, say: Say) -> Checkpoint | None:
    """The newest checkpoint that is what its manifest says; every newer one that is not is named."""
    for folder in names(parent):
        try:
            return verify(folder)
        except InvalidCheckpoint as problem:
            say(f"warning: checkpoint {folder.name} is not used: {problem}")
    return None


def number_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    match = NAME.fullmatch(folder.name)
    assert match, f"{folder} is named as no checkpoint is"
    return int(match[1])


def best_valid(parent: Path, say: Say) -> Checkpoint | None:
    """The valid checkpoint of the lowest WER, of equal ones the earliest; without any WER the newest."""
    for folder in by_wer(parent):
        try:
            return verify(folder)
        except InvalidCheckpoint as problem:
            say(f"warning: checkpoint {folder.name} is not used: {problem}")
    return newest_valid(parent, say)


def by_wer(parent: Path) -> list[Path]:
    """The checkpoints' folders whose manifest has a WER, the lowest first, unverified; raises UnreadableCheckpoint.

    Only those that were evaluated on the set of the newest one.
    """
    found, sets = [], []
    for folder in names(parent):
        try:
            manifest = read_manifest(folder)
            sets.append(manifest.get("run", {}).get("data", {}).get("evaluation"))
            if sets[-1] in (None, sets[0]):  # None: of an older version
                found.append((float(manifest["wer"]), manifest["step"], folder))
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
            continue
        except OSError as error:
            raise UnreadableCheckpoint(folder, error) from error
    return [folder for *_, folder in sorted(found)]


def settle(checkpoint: Checkpoint | None, parent: Path) -> Checkpoint | None:
    """Makes a checkpoint the newest of a run: hides what is later, after a copy of one of another run is complete."""
    if checkpoint and checkpoint.folder.parent.resolve() != parent.resolve():
        return adopt(checkpoint, parent)
    set_aside_after(parent, checkpoint.step if checkpoint else -1)
    if checkpoint is None:
        (parent / ADOPTED).unlink(missing_ok=True)
    return checkpoint


def adopt(checkpoint: Checkpoint, parent: Path) -> Checkpoint:
    """Copies a checkpoint of another run in the place of this one's, with the best one up to it if that is beside it.

    What this run had is hidden when the copies are on the disk; when this raises, all is as it was.
    """
    parent.mkdir(parents=True, exist_ok=True)
    earlier = [folder for folder in by_wer(checkpoint.folder.parent) if number_of(folder) <= checkpoint.step]
    copies = {folder.name: parent / f"{UNFINISHED}{folder.name}" for folder in (*earlier[:1], checkpoint.folder)}
    try:
        for name, unfinished in copies.items():
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(checkpoint.folder.parent / name, unfinished)
            for path in (*unfinished.iterdir(), unfinished):
                flush(path)
    except OSError as error:
        for unfinished in copies.values():
            shutil.rmtree(unfinished, ignore_errors=True)
        raise InputError(f"{checkpoint.folder} cannot be copied to {parent}: {error}") from error
    for name, unfinished in copies.items():
        if (parent / name).exists():
            set_aside(parent / name)
        unfinished.rename(parent / name)
    for folder in names(parent):
        if folder.name not in copies:
            set_aside(folder)
    taken = parent / checkpoint.folder.name
    put(parent / ADOPTED, json.dumps({"folder": str(checkpoint.folder.resolve()), "sha256": sha256(taken / MANIFEST)}))
    return Checkpoint(taken, checkpoint.facts)


def is_adopted(folder: Path, parent: Path) -> bool:
    """Whether the checkpoints of a run came after this one of another run, which need not be there any more."""
    if folder.parent.resolve() == parent.resolve():
        return False
    try:
        record = json.loads((parent / ADOPTED).read_text())
        with contextlib.suppress(OSError):
            return record["sha256"] == sha256(folder / MANIFEST)
        return record["folder"] == str(folder.resolve())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def prune(parent: Path, keep: int, say: Say, in_use: Collection[Path] = ()) -> None:
    """Removes all but the newest `keep` checkpoints and the one of the lowest WER, and what was left unfinished.

    Nothing is removed unless the newest is valid: the last valid one may be any of the others. One that is `in_use`
    stays until a later call.
    """
    try:
        folders = names(parent)
        doomed = [folder for folder in folders[keep:] if folder not in (*by_wer(parent)[:1], *in_use)]
        leftovers = [path for prefix in (UNFINISHED, SET_ASIDE) for path in parent.glob(f"{prefix}*")]
        if not doomed and not leftovers:
            return
        verify(folders[0])
    except UnreadableCheckpoint as problem:
        say(f"warning: no older checkpoint is removed: {problem}")
        return
    except InvalidCheckpoint as problem:
        say(f"warning: checkpoint {folders[0].name} is damaged ({problem}); no older one is removed")
        return
    for folder in doomed:
        leftovers.append(set_aside(folder))  # half of one removed would look like a damaged one
    for folder in leftovers:
        shutil.rmtree(folder, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    hidden = folder.with_name(f"{SET_ASIDE}{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    return folder.rename(hidden)


def set_aside_after(parent: Path, step: int) -> None:
    """Hides the checkpoints of later steps, which training is about to make anew; the next prune removes them."""
    for folder in names(parent):
        if number_of(folder) > step:
            set_aside(folder)


def write_status(folder: Path, state: str, **facts: Any) -> None:
    """Says in status.json how the run stands; a full disk does not end the run over it, and it never says another."""
    file, now = folder / "status.json", time.strftime("%Y-%m-%dT%H:%M:%S%z")
    content = json.dumps({"state": state, "at": now, **facts}, indent=1)
    with STATUS_LOCK, contextlib.suppress(OSError):
        try:
            put(file, content)
        except OSError:
            try:
                with open(file, "r+") as there:  # in the blocks that it has already
                    there.write(content)
                    there.truncate()
            except OSError:
                file.unlink()


def update_status(folder: Path, **facts: Any) -> None:
    """Adds to what status.json says, or replaces it; from any thread."""
    with STATUS_LOCK:
        status = read_status(folder) | facts
        status.pop("at", None)
        write_status(folder, status.pop("state"), **status)


def read_status(folder: Path) -> dict[str, Any]:
    """What status.json says, with a `state` in any case."""
    try:
        status = json.loads((folder / "status.json").read_text())
    except (OSError, ValueError):
        status = None
    return {"state": "unknown"} | (status if isinstance(status, dict) else {})


def flat(settings: Any, name: str = "") -> dict[str, Any]:
    """Nested settings under dotted names: stages.0.learning_rates.projector."""
    if isinstance(settings, dict):
        items = settings.items()
    elif isinstance(settings, (list, tuple)) and settings:
        items = enumerate(settings)
    else:
        return {name: settings}
    return {n: v for key, value in items for n, v in flat(value, f"{name}.{key}" if name else str(key)).items()}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two nested settings, a line for each field; one that is not there is as good as null."""
    old, new = flat(json.loads(json.dumps(old))), flat(json.loads(json.dumps(new)))
    return [
        f"{name}: {old.get(name, '(none)')} → {new.get(name, '(none)')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def fingerprint(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
