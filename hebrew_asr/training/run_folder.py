"""The folder of a run: opened, locked, compared with the settings, resumed."""

import contextlib
import dataclasses
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed
from accelerate.utils import broadcast_object_list

from hebrew_asr.checkpoints import store
from hebrew_asr.checkpoints.final import CARD
from hebrew_asr.checkpoints.hub import fetch_checkpoints, upload
from hebrew_asr.checkpoints.model_card import renamed
from hebrew_asr.checkpoints.store import Checkpoint
from hebrew_asr.errors import InputError
from hebrew_asr.files import put
from hebrew_asr.model.stages import ever_trained
from hebrew_asr.processes import fail_together
from hebrew_asr.start import say_last
from hebrew_asr.training.run_log import RunLog
from hebrew_asr.training.settings import Settings
from hebrew_asr.training.watch import ends_at_a_signal, take_lock

PATH = re.compile(r"(train|eval)_sources\.\d+\.path: ")  # of `changes`: data that moved are the same data

# What a run writes anew in its folder, and the folders it replaces
WRITTEN = (
    *("config.yaml", "status.json", "metrics.jsonl", "curves.png", "skipped-steps.txt", "dropped-0.txt"),
    *("corpus.html", "corpus.md", "corpus.json", "corpus-dropped.tsv"),
)
MODELS = ("final_model", "final_model.unfinished", "moving_average", "moving_average.unfinished")

ONCE = ("inspect_data", "prepare", "accept_changed_data")  # switches of one start

BEFORE = {"no_system_prob": 0.0}  # what runs did before there was the setting
LATER = {"optimizer": "adamw"}  # settings that came later: with these the folder's name is what it was


def folder_of(config: Settings) -> Path:
    """Where a run of these settings is; with `resume` never another one each second."""
    settings = {key: value for key, value in config.identity().items() if key not in LATER or value != LATER[key]}
    name = f"hebrew-asr-{store.fingerprint(settings)}"
    if config.resume == "never":
        name += time.strftime("-%Y%m%d-%H%M%S")
    return Path(config.output_dir or f"runs/{name}")


def open_run_folder(config: Settings, state: accelerate.PartialState) -> tuple[Path, Any]:
    """Creates the run's folder, or finds the run in it; returns it on all ranks, with the lock the first one holds.

    Raises InputError for a folder that holds another run, or that another process works in.
    """
    (folder,) = broadcast_object_list([folder_of(config)])
    lock = None
    with fail_together():
        if state.is_main_process:
            try:
                if folder.is_file():
                    raise InputError(f"{folder} is a file: choose another --output_dir")
                check_same_run(config, folder)
                note_others(folder)
                folder.mkdir(parents=True, exist_ok=True)
                if not config.inspect_data and (lock := take_lock(folder)) is None:
                    raise InputError(f"another process trains in {folder}: wait for it, or choose another --output_dir")
                only_reads = config.inspect_data or config.prepare
                if not (only_reads and settings_there(folder)):  # those of a run, which may be training
                    put(folder / "config.yaml", json.dumps(settings_to_keep(config, folder), indent=2))
            except OSError as error:
                raise InputError(f"cannot write to {folder}: {error.strerror}") from error
    with fail_together():
        if not (folder / "config.yaml").exists():
            raise InputError(f"{folder} is not seen by every machine: give an --output_dir on a shared file system")
    return folder, lock


def settings_to_keep(config: Settings, folder: Path) -> dict[str, Any]:
    """What config.yaml holds: with it a run goes on, wherever its command once began it."""
    kept = dataclasses.asdict(config) | {"resume": "auto"} | dict.fromkeys(ONCE, False)
    return kept | {"output_dir": str(folder)} if config.resume == "never" else kept


def way_on(config: Settings, folder: Path) -> str:
    """Which command goes on with a run: the same one, unless it asks for a new run, or to go back in this one."""
    asked = Path(config.resume)
    if config.resume == "never" or asked.parent.resolve() == (folder / "checkpoints").resolve():
        return f"the same command with --resume auto --output_dir {folder}"
    return "the same command"


def what_is_left(config: Settings, folder: Path) -> str:
    """Of a run that stops: its newest checkpoint, and the command that goes on from there."""
    last, way = store.newest_name(folder / "checkpoints"), way_on(config, folder)
    return f"checkpoint {last}; {way} goes on from there" if last else f"no checkpoint yet; {way} begins again"


def check_same_run(config: Settings, folder: Path) -> None:
    """Raises InputError when the folder holds what these settings do not continue.

    A run that left no checkpoint has not begun: whatever it was, this one takes its folder.
    """
    if not folder.is_dir():
        return
    old, is_finished = settings_there(folder), store.read_status(folder)["state"] == "finished"
    has_begun = is_finished or bool(store.names(folder / "checkpoints"))
    if old is None or not has_begun:
        for name in MODELS if old else (*WRITTEN, *MODELS, "checkpoints"):
            path = folder / name
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise InputError(
                    f"{path} is there, and is of no run in this folder: choose another --output_dir, or move it away"
                )
        return
    if config.resume == "never":
        raise InputError(
            f"{folder} holds a run already: leave --resume never out to go on with it, or choose another --output_dir"
        )
    differing = changes(old, config)
    if knows_its_data(folder / "checkpoints"):
        differing = [line for line in differing if not PATH.match(line)]  # the data themselves are compared later
    if differing:
        raise InputError(
            f"{folder} holds a run already, with other settings:\n  "
            + "\n  ".join(differing)
            + "\nGive those to go on with it, or choose another --output_dir for a new run"
        )


def settings_there(folder: Path) -> dict[str, Any] | None:
    """The settings in a folder's config.yaml; None where there is none, or one that no run has written."""
    try:
        found = json.loads((folder / "config.yaml").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return (
        found if isinstance(found, dict) and {"model_name_or_path", "train_sources", "stages"} <= set(found) else None
    )


def knows_its_data(place: Path) -> bool:
    """Whether the newest checkpoint that has a manifest says which data it was trained with."""
    for checkpoint in store.names(place):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a damaged one is not used later either
            return "data" in store.read_manifest(checkpoint)["run"]
    return True


def note_others(folder: Path) -> None:
    """Says that a folder which holds no run holds other files; a job's own log there is no mistake."""
    others = [] if not folder.is_dir() or (folder / "config.yaml").exists() else sorted(folder.iterdir())
    if names := [path.name for path in others if not path.name.startswith(".")]:
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        line = f"note: {folder} holds other files already ({shown}); to keep the run apart, choose a new --output_dir"
        print(line, file=sys.stderr, flush=True)


def changes(old: dict[str, Any], config: Settings) -> list[str]:
    """The settings that mean another run, a line each; one that was not known then had its default, or see BEFORE."""
    defaults, new = type(config)().identity() | BEFORE, config.identity()
    return store.differences({name: old.get(name, defaults[name]) for name in new}, new)


def find_checkpoint(place: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest valid checkpoint of a run, as the first process finds it; InputError where one cannot be read."""
    found = None
    with fail_together():
        if is_first():
            found = store.newest_valid(place, say)
    (found,) = broadcast_object_list([found])
    return found


def settle(found: Checkpoint | None, place: Path) -> Checkpoint | None:
    """Makes a checkpoint the newest of the run's own; the last thing before training, when all else is checked."""
    with fail_together():
        if is_first():
            found = store.settle(found, place)
    (found,) = broadcast_object_list([found])
    return found


def is_first() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def checkpoint_to_resume(config: Settings, folder: Path, run_log: RunLog) -> Checkpoint | None:
    """The checkpoint that `resume` asks for, or None for a run that begins; InputError for one that cannot be used.

    One of another run is where this run begins: once it has checkpoints of its own, it goes on from those.
    """
    place = folder / "checkpoints"
    if config.resume == "hub":
        with fail_together():
            if run_log.is_main:
                fetch_checkpoints(config, folder, run_log.say)
    if config.resume in ("auto", "never", "hub"):
        there = bool(store.names(place))
        found = find_checkpoint(place, run_log.say)
        if there and found is None:
            run_log.say(f"warning: no checkpoint in {place} is valid: the run begins anew")
        return found
    found = None
    with fail_together():
        if run_log.is_main:
            asked = Path(config.resume)
            try:
                if store.is_adopted(asked, place) and (found := store.newest_valid(place, run_log.say)):
                    run_log.say(f"the run in {folder} began at {asked}, and goes on from its own {found.folder.name}")
                found = found or store.verify(asked)
            except store.InvalidCheckpoint as problem:
                hint = what_resume_takes(asked)
                raise InputError(f"--resume {config.resume} is no valid checkpoint: {problem}{hint}") from problem
    (found,) = broadcast_object_list([found])
    return found


def what_resume_takes(given: Path) -> str:
    """What `resume` may have meant where it names no checkpoint."""
    takes = "; it takes auto, never, hub, or a checkpoint: runs/NAME/checkpoints/step-00000500"
    if not given.exists():
        return f", there is no such folder{takes}"
    newest = store.newest_name(given / "checkpoints")
    return f"; it is the folder of a run, whose newest is {given / 'checkpoints' / newest}" if newest else takes


def first_line(error: BaseException | str) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def failures_noted(config: Settings, folder: Path):
    """Says in status.json why a run failed, or which signal ended it before or after training, which hears its own."""

    def stopped(why: str) -> None:
        note_failure(folder, why, "preempted")
        say_last(f"stopped ({why}), {what_is_left(config, folder)}")

    try:
        with ends_at_a_signal(stopped):
            yield
    except Exception as error:
        note_failure(folder, first_line(error))
        raise


def publish(config: Settings, folder: Path, run_log: RunLog) -> None:
    """Uploads the final model of a finished run; a signal that ends the upload is said, also in status.json."""
    model = folder / "final_model"

    def stopped(why: str) -> None:
        store.update_status(folder, why=f"{why} during the upload")
        way = way_on(config, folder)
        say_last(f"stopped ({why}) during the upload to {config.hf_repo_id}: the model is in {model}, {way} uploads it")

    with ends_at_a_signal(stopped):
        name_in_card(model / CARD, config.hf_repo_id or "", run_log.say)
        address = upload(config, model, run_log.say)
    store.update_status(folder, uploaded=address, why=None)


def name_in_card(file: Path, repo_id: str, say: Callable[[str], None]) -> None:
    """Writes the repository into a card that was written for another one, or before one was named."""
    try:
        card = file.read_text(encoding="utf-8") if file.exists() else ""
        if (changed := renamed(card, repo_id)) != card:
            put(file, changed)
    except (OSError, UnicodeDecodeError) as error:
        say(f"warning: {file} may name another repository than {repo_id}: {error}")


def note_failure(folder: Path, reason: str, state: str = "failed") -> None:
    """The first process to fail knows best; the others then fail because it is gone."""
    if store.read_status(folder)["state"] == "running":
        last = store.newest_name(folder / "checkpoints")
        store.update_status(folder, state=state, why=reason, checkpoint=last)


def checkpoint_bytes(model: torch.nn.Module, config: Settings) -> int:
    """Of one checkpoint: the weights, Adam's moments of what trains, and the moving average."""
    copies = 2 if config.ema_decay is None else 3
    trained = ever_trained(model, config.stages).values()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return weights + copies * sum(parameter.nbytes for parameter in trained)


def check_disk(folder: Path, model: torch.nn.Module, config: Settings, disk: Path | None = None) -> None:
    """Raises InputError when the disk has no place for the checkpoints that are kept and the final model.

    `disk`: a folder that is on it, where the run's own is not there yet.
    """
    weights = sum(parameter.nbytes for parameter in model.parameters())
    there = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    kept = config.save_total_limit + 2  # the best, and one in the making
    if config.uploads and config.hub_checkpoints:
        kept += 1  # one that is being uploaded
    needed = kept * checkpoint_bytes(model, config) + 2 * weights - there
    free = shutil.disk_usage(disk or folder).free
    if free < needed:
        raise InputError(f"{folder}: {free / 1e9:.1f} GB free on its disk, the run needs {needed / 1e9:.1f} GB")
