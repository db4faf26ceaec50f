"""Kills, stops, damages and starves demo runs, lets the same command go on, and compares how they end.

    uv run python benchmarks/drill.py --json drill.json --faults 113

Each fault hits a run of 12 steps with a checkpoint after every second one, in 1 or 2 processes; then the same settings
run again until the run is finished, and its weights and moments are compared with those of a run that nothing hit. The
processes are forked from one that has imported everything, under a launcher that does what torchrun does: it passes
signals on, and ends the others when one dies. What is done is in --work, and is not done again. As a control, kills
while saving hit a system that writes in place and believes what it finds: some of those runs must end wrong. So must
those of further kinds from which the mend was taken.

A fault is survived when the run ends finished and in the same bits, with no more steps lost than since the last
checkpoint that its kind leaves: the last on the disk; the last but one where the last was damaged; the last on the Hub
where the machine is gone; the last step after a signal. Beyond that:

- What a run must outlive (a full disk, NaN, a dead worker of its loader, the Hub's faults) is not to end it.
- A full disk meets a checkpoint without an evaluation: where the one of the lowest WER cannot be written, the final
  model is another one.
- A full log is written when there is room again; without shared memory the workers' batches come by a pipe.
- A final model that was damaged is made anew. Data that only moved are the same data.
- INJECTED (drill_kinds.py) says of each further kind how the run must end that it hits, and with which message.
- What else may happen to a run's folder between two commands (CHANGES) costs no step beyond those of the kill.
- A NaN in the audio: the utterance is named as dropped in both epochs, and the bits are those of a run in whose corpus
  that clip is silent. A NaN in one process's loss leaves a step out on all, so that bits are not compared.
- The Hub's faults last for seconds from a step on, and until they met a request. Then the model must be on the Hub file
  by file, at the latest by the same command again, and each exit status must have said whether it was.

The Hub is tests/hub_server.py; pauses after failed uploads are a tenth of the real ones.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent))

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile
import torch
from drill_kinds import HOSTILE, INJECTED, OTHER_DATA, Kind, Place, clip_in, put_other_data, steps_done
from hub_server import HubServer, Repo

from hebrew_asr import files as files_module
from hebrew_asr.checkpoints import hub as hub_upload
from hebrew_asr.checkpoints import store
from hebrew_asr.checkpoints.final import damage_of
from hebrew_asr.data import shared_memory
from hebrew_asr.data.audio import SAMPLE_RATE, decode_audio
from hebrew_asr.data.sources import Source
from hebrew_asr.model.stages import Stage
from hebrew_asr.processes import launch
from hebrew_asr.training import watch
from train_hebrew_asr_enhanced import GradualUnfreezeTrainer, TrainingConfig, main

DEMO = Path(__file__).parent.parent / "demo"
STEPS, SAVE_STEPS = 12, 2
GRACE_SECONDS, STALL_MINUTES = 20.0, 0.2
LAUNCHER_SECONDS = 30.0  # from passing a signal on to kill -9
LIMIT_SECONDS = 120.0  # of one run, before it counts as hanging
NEXT_ATTEMPT = "---- the same command again ----\n"
FLUSHES = 16  # of one checkpoint: its files, its manifest, its folder, and the folder it is in
UTTERANCES = 41  # for training: steps of 8, the last one of an epoch has one
REPO, BRANCH, TOKEN = "OzLabs/drill", "checkpoints-run", "hf_token_of_the_drill"
HUB_FAULTS = {  # of all requests, or of those that carry a file's content
    "500": ("*", "", {"status": 500}),
    "503": ("*", "", {"status": 503}),
    "429 with Retry-After": ("*", "", {"status": 429, "headers": {"Retry-After": "1"}}),
    "401": ("*", "", {"status": 401}),
    "connections cut": ("PUT", "/storage/", {"cut_request": 100_000}),
    "no answer": ("*", "", {"delay_s": 3.0, "hang_up": True}),
    "1 kB/s": ("PUT", "/storage/", {"bytes_per_s": 1000}),
    "wrong hash": None,  # it keeps another content than it was sent
}


def put_text(name: str, text: str) -> Callable[[Path, TrainingConfig], None]:
    """Has a file of the run's folder hold something else."""

    def put(run: Path, config: TrainingConfig) -> None:
        (run / name).write_text(text)

    return put


def cut_text(name: str) -> Callable[[Path, TrainingConfig], None]:
    """Ends a file of the run's folder in the middle of its last line."""

    def cut(run: Path, config: TrainingConfig) -> None:
        content = (run / name).read_bytes() if (run / name).exists() else b""
        (run / name).write_bytes(content[:-9])

    return cut


def add_text(name: str, text: str) -> Callable[[Path, TrainingConfig], None]:
    def add(run: Path, config: TrainingConfig) -> None:
        with open(run / name, "a") as file:
            file.write(text)

    return add


def add_file(name: str) -> Callable[[Path, TrainingConfig], None]:
    """Adds a file, in a folder of its own where its name says so, to the run's folder."""

    def add(run: Path, config: TrainingConfig) -> None:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(b"x" * 1000)

    return add


def move_run(run: Path, config: TrainingConfig) -> None:
    config.output_dir = str(run.rename(run.with_name("moved")))


def copy_run(run: Path, config: TrainingConfig) -> None:
    """As `cp -r` does it: new files, with new times."""
    shutil.copytree(run, run.with_name("copied"), copy_function=shutil.copy)
    shutil.rmtree(run)
    move_run(run.with_name("copied"), config)


def age(run: Path, config: TrainingConfig) -> None:
    """Gives all files of the run one time, years ago."""
    for path in run.rglob("*"):
        os.utime(path, (1e9, 1e9))


def write_corpus(change: Callable[[pyarrow.Table], pyarrow.Table]) -> Callable[[Path, TrainingConfig], None]:
    """The same recordings, in a file written anew."""

    def write(run: Path, config: TrainingConfig) -> None:
        folder = run.with_name("corpus-again")
        shutil.copytree(config.train_sources[0].path, folder, copy_function=shutil.copy)
        table = change(pyarrow.parquet.read_table(folder / "train.parquet"))
        pyarrow.parquet.write_table(table, folder / "train.parquet", compression="zstd", row_group_size=7)
        config.train_sources = [Source(str(folder))]

    return write


def name_checkpoint(run: Path, config: TrainingConfig) -> None:
    if newest := store.names(run / "checkpoints"):
        config.resume = str(newest[0])


def more_workers(run: Path, config: TrainingConfig) -> None:
    config.dataloader_num_workers = 2


CHANGES = {  # between the run that was killed and the same command again; none of it may cost a step
    "status {}": put_text("status.json", "{}"),
    "status null": put_text("status.json", "null"),
    "status []": put_text("status.json", "[]"),
    "status emptied": put_text("status.json", ""),
    "status cut": cut_text("status.json"),
    "metrics cut": cut_text("metrics.jsonl"),
    "metrics of another run": add_text("metrics.jsonl", '{"step": 99, "train/loss": 0.1}\n'),
    "list of dropped cut": add_text("dropped-0.txt", "step 1: not fi"),
    "list of dropped, a line break in a name": add_text("dropped-0.txt", "step 1: silent: a\nb.wav\n"),
    "list of skipped cut": add_text("skipped-steps.txt", "step"),
    "a save left unfinished": add_file("checkpoints/.unfinished-1-abc/model.safetensors"),
    "another file among the checkpoints": add_file("checkpoints/notes.txt"),
    "another folder among the checkpoints": add_file("checkpoints/step-old/model.safetensors"),
    "a checkpoint without a manifest": add_file("checkpoints/step-00000099/model.safetensors"),
    "a final model left unfinished": add_file(".unfinished-1-abc/model.safetensors"),
    "another file in the folder": add_file("notes.txt"),
    "the folder moved": move_run,
    "the folder copied": copy_run,
    "times set back": age,
    "the corpus written anew": write_corpus(lambda table: table),
    "a row of the corpus twice": write_corpus(lambda table: pyarrow.concat_tables([table, table.slice(0, 1)])),
    "the checkpoint named": name_checkpoint,
    "more workers": more_workers,
}
KINDS = [  # kind, who or what, processes: first one of each, and all in the first 32
    *(("kill -9", "all", 2), ("kill -9 while saving", "rank 0", 1), ("SIGTERM", "rank 1", 2), ("Hub", "503", 2)),
    *(("machine gone", "killed", 1), ("NaN audio", "", 2), ("kill -9", "worker", 1), ("SIGSTOP", "rank 1", 2)),
    *(("kill -9, then damage", "flipped byte", 1), ("full disk", "", 1), ("NaN loss", "rank 1", 2)),
    *(("SIGINT", "rank 0", 2), ("kill -9", "rank 0", 1), ("kill -9", "rank 1", 2), ("kill -9", "launcher", 2)),
    *(("kill -9 while saving", who, n) for who, n in (("all", 2), ("rank 0", 2), ("all", 1))),
    *(("Hub", what, 1 + i % 2) for i, what in enumerate(HUB_FAULTS) if what != "503"),
    *(("machine gone", how, 2) for how in ("killed, a wrong hash comes back", "SIGTERM")),
    *(("SIGTERM", "rank 0", 1), ("SIGTERM", "launcher", 2), ("SIGTERM", "all", 2)),
    *(("kill -9, then damage", what, 1) for what in ("torn file", "missing file")),
    *(("kill -9 while saving", who, n) for who, n in (("rank 0", 1), ("all", 2), ("rank 0", 2), ("all", 1))),
    *(("full disk", "", 2), ("NaN audio", "", 1), ("machine gone", "killed", 2)),
    *(("full log", "", 1), ("no shared memory", "", 1), ("kill -9, then data moved", "all", 1)),
    *(("final model damaged", what, 1) for what in ("emptied", "cut")),
    *(("kill -9, then damage", what, 1) for what in ("manifest emptied", "manifest null", "manifest of {}")),
    *(("kill -9, then change", what, 1 + i % 2) for i, what in enumerate(CHANGES)),
    *(("SIGHUP", "all", 2), ("SIGQUIT", "rank 0", 1), ("NaN audio", "a hostile name", 1)),
    *((kind, who, injected.processes) for (kind, who), injected in INJECTED.items()),
]
OUTLIVED = ("full disk", "full log", "no shared memory", "NaN loss", "NaN audio", "Hub")  # and the death of a worker
INSIDE = (*OUTLIVED, "final model damaged")  # nothing hits them from outside


@dataclass
class Fault:
    number: int
    kind: str
    who: str  # rank 0, rank 1, all, launcher; or what is damaged
    processes: int
    step: int  # the fault hits when this many steps are done,
    delay: float  # so many seconds later; while saving, at this flush; of the Hub, for so many seconds
    control: bool = False

    @property
    def has_hub(self) -> bool:
        return self.kind in ("Hub", "machine gone", "upload asked for later")

    @property
    def injected(self) -> Kind | None:
        return INJECTED.get((self.kind, self.who))

    @property
    def is_outlived(self) -> bool:
        return self.kind in OUTLIVED or self.who == "worker"

    @property
    def title(self) -> str:
        return f"{self.kind}, {self.who}" if self.who else self.kind


def faults(count: int) -> list[Fault]:
    """A fixed list: one pass over all kinds after the other, moments drawn by number."""
    found = []
    for number in range(count):
        kind, who, processes = KINDS[number % len(KINDS)]
        draw = random.Random(number)
        delay, step = round(draw.uniform(0, 0.5), 3), draw.randrange(1, STEPS)
        if "saving" in kind:
            delay = draw.randrange(1, FLUSHES + 1)
        if kind == "Hub":
            delay = round(draw.uniform(1, 6), 3)
        if kind == "machine gone":
            step = draw.randrange(4, STEPS)
        if kind == "full log":
            step = draw.choice([4, 9])  # before a line of the log
        if kind == "full disk":
            step = draw.choice([1, 2, 3, 4, 7, 8, 9, 10])
        if who == "worker":
            delay, step = 0.0, draw.choice([1, 2, 3, 7, 8, 9])  # not at the end of an epoch, when it has done its work
        if injected := INJECTED.get((kind, who)):
            step = draw.choice(injected.steps)
        found.append(Fault(number, kind, who, processes, step, delay))
    controls = [fault for fault in found if "saving" in fault.kind][:6]
    without = {fault.kind: fault for fault in reversed(found) if fault.injected and fault.injected.without}
    controls += reversed(without.values())
    return found + [Fault(**(asdict(f) | {"number": count + i, "control": True})) for i, f in enumerate(controls)]


def settings(work: Path, folder: Path) -> TrainingConfig:
    """Two stages of one epoch of six steps, with everything random switched on."""
    return TrainingConfig(
        model_name_or_path=str(DEMO / "base"),
        train_sources=[Source(str(work / "corpus"))],
        eval_sources=[Source(str(work / "heldout"))],
        output_dir=str(folder),
        stages=[
            Stage("B", 1, {"projector": 4e-3, "llm_top": 1e-3, "lm_head": 2e-3}, 1, 1),
            Stage("A", 2, {"projector": 2e-3, "audio_top": 6e-4, "llm_top": 6e-4, "lm_head": 2e-3}, 1, 1),
        ],
        num_epochs=2,
        target_effective_batch=8,
        batch_size=2,
        use_waveform_augmentation=True,
        dataloader_num_workers=0,
        generation_max_new_tokens=20,
        eval_steps=6,
        logging_steps=5,
        save_steps=SAVE_STEPS,
        save_total_limit=3,
        preemption_grace_seconds=GRACE_SECONDS,
        stall_timeout_minutes=STALL_MINUTES,
        tracker="none",
        final_dtype="float32",
    )


def settings_for(fault: Fault, work: Path, folder: Path) -> TrainingConfig:
    config = settings(work, folder / "run")
    if fault.has_hub:
        config = dataclasses.replace(config, hf_repo_id=REPO, skip_hf_upload=False)
    if fault.who == "worker" or fault.kind == "no shared memory":
        config.dataloader_num_workers = 1
    if fault.kind == "NaN audio":
        config.train_sources = [Source(str(corpus_with_nan(fault, work, folder / "corpus")))]
    if fault.who in OTHER_DATA:
        shutil.copytree(work / "corpus", folder / "corpus"), shutil.copytree(work / "heldout", folder / "heldout")
        config.train_sources, config.eval_sources = [Source(str(folder / "corpus"))], [Source(str(folder / "heldout"))]
    return dataclasses.replace(config, **dict(fault.injected.settings)) if fault.injected else config


def clip_of(fault: Fault) -> int:
    """Which utterance has the NaN."""
    return random.Random(fault.number).randrange(UTTERANCES)


def corpus_with_nan(fault: Fault, work: Path, folder: Path) -> Path:
    """The corpus with one NaN, or nothing but NaN, in one clip, by the fault's number."""
    samples = corpus_clip(work, clip_of(fault))
    samples[8000 : 8001 if fault.number % 2 else None] = np.nan
    return corpus_with(work, folder, clip_of(fault), samples, HOSTILE if fault.who else "a.wav")


def corpus_clip(work: Path, number: int) -> np.ndarray:
    return decode_audio(pyarrow.parquet.read_table(work / "corpus" / "train.parquet")["audio"][number].as_py())


def corpus_with(work: Path, folder: Path, number: int, samples: np.ndarray, name: str = "a.wav") -> Path:
    """The corpus with other samples in one clip, as floats."""
    table = pyarrow.parquet.read_table(work / "corpus" / "train.parquet")
    rows, wav = table.to_pylist(), io.BytesIO()
    soundfile.write(wav, samples, SAMPLE_RATE, format="WAV", subtype="FLOAT")
    rows[number]["audio"] = {"bytes": wav.getvalue(), "path": name}
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, table.schema), folder / "train.parquet")
    return folder


# --------------------------------------------------------------------------------------------------------------- Hub


def hub_process(fault: Fault, folder: Path) -> None:
    """A Hub that has the fault from its step on; writes down what it holds; until its parent is gone or stops it."""
    parent, over, begun, seen = os.getppid(), False, 0.0, None
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    with HubServer(users={TOKEN: ("OzLabs", "write")}) as hub:
        if fault.kind != "upload asked for later":
            hub.add_repo(REPO, private=True)
        tampered: list[str] = []
        broken, at_step = None, None
        files_module.put(folder / "hub-url", hub.url)
        while os.getppid() == parent:
            if not begun and (steps_done(folder) >= fault.step if fault.kind == "Hub" else (folder / "gone").exists()):
                begun, at_step = time.monotonic(), steps_done(folder)
                broken = bring_about(fault, hub, tampered)
            met = len(tampered) if broken is None else 10**9 - broken.times
            if broken and not over and time.monotonic() - begun > fault.delay and met:
                over, broken.path = True, "no request has this"
            over = over or bool(tampered)
            with hub.lock:
                branches = dict(hub.repos[REPO].branches) if REPO in hub.repos else {}
                now = met, over, at_step, branches
                main, branch = ({**hub.repos[REPO][name]} if name in branches else {} for name in ("main", BRANCH))
            if now != seen:
                names = {path.split("/")[0] for path in branch if store.NAME.fullmatch(path.split("/")[0])}
                state = {"met": met, "over": over, "step": at_step, "main": hashes(main), "checkpoints": sorted(names)}
                files_module.put(folder / "hub.json", json.dumps(state))
                seen = now
            time.sleep(0.02)
    os._exit(0)


def bring_about(fault: Fault, hub: HubServer, tampered: list[str]):
    if fault.kind == "machine gone":
        return hub.fail("GET", "/storage/", corrupt=True, times=1) if "wrong hash" in fault.who else None
    if how := HUB_FAULTS[fault.who]:
        return hub.fail(how[0], how[1], times=10**9, **how[2])
    commit = Repo.commit

    def tampering(self, branch, files, *rest):
        if not tampered:
            tampered.extend(path for path in files if path.endswith(".safetensors"))
            files = files | {path: files[path][:-1] + b"?" for path in tampered}
        return commit(self, branch, files, *rest)

    Repo.commit = tampering


def hashes(files: dict[str, bytes]) -> dict[str, str]:
    return {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}


def hub_state(folder: Path) -> dict:
    return json.loads((folder / "hub.json").read_text())


def use_hub(folder: Path) -> None:
    """Has the client of this process take the drill's Hub for the real one."""
    url, constants = (folder / "hub-url").read_text(), huggingface_hub.constants
    constants.ENDPOINT = url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    constants.HF_HUB_CACHE = str(folder / "cache")
    os.environ["HF_TOKEN"] = TOKEN
    hub_upload.FIRST_WAIT_SECONDS, hub_upload.LONGEST_WAIT_SECONDS, hub_upload.SILENT_SECONDS = 0.5, 30.0, 2.0


def is_uploaded(folder: Path) -> bool:
    """Whether the Hub has the final model, file by file."""
    model = {path.name: path.read_bytes() for path in (folder / "run" / "final_model").glob("*")}
    return bool(model) and hashes(model).items() <= hub_state(folder)["main"].items()


# --------------------------------------------------------------------------------------------------- Inside of a run


def instrument(folder: Path, rank: int, fault: Fault | None) -> None:
    """Has the run write down where it is, and, where the fault comes from inside, bring it about."""
    mark, write_one = watch.Watch.mark, store.Writer._write

    def noted_mark(self, where):
        (folder / f"where-{rank}").write_text(where)
        if fault and fault.kind == "full log" and rank == 0 and where.startswith("step "):
            fill_log(folder, 0 <= int(where.split()[1]) - fault.step < 2)
        mark(self, where)

    def noted_write(self, step, *args):
        (folder / f"saving-{rank}").write_text(str(step))
        if fault and fault.kind == "full disk" and step >= fault.step and not (folder / "was-full").exists():
            (folder / "was-full").write_text(str(step))
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
            write_one(self, step, *args)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        else:
            write_one(self, step, *args)
        (folder / f"saving-{rank}").unlink()

    watch.Watch.mark, store.Writer._write = noted_mark, noted_write
    if fault is None:
        return
    if "saving" in fault.kind:
        flush, calls = store.flush, [0]

        def deadly_flush(path):
            if "step-" in str(path) or path.name == "checkpoints":
                saving = folder / f"saving-{rank}"
                if saving.exists() and int(saving.read_text()) >= fault.step:
                    calls[0] += 1
                    if calls[0] == fault.delay:
                        os.killpg(0, signal.SIGKILL) if fault.who == "all" else os.kill(os.getpid(), signal.SIGKILL)
            flush(path)

        store.flush = deadly_flush
    if fault.kind == "no shared memory":
        shared_memory.PLACE = folder / "there is none"
    if fault.kind == "NaN loss" and rank == fault.processes - 1:
        loss_of = GradualUnfreezeTrainer.scaled_loss

        def broken_loss(self, model, batch, scale):
            return loss_of(self, model, batch, float("nan") if self.state.global_step + 1 == fault.step else scale)

        GradualUnfreezeTrainer.scaled_loss = broken_loss
    if injected := fault.injected:
        clips = [clip_in(folder.parent, name, fault.number) for name in ("corpus", "heldout")]
        injected.bring_about(Place(folder, rank, rank == fault.processes - 1, fault.step, *clips))
    if fault.control:
        injected.without() if injected and injected.without else believe_everything()


def fill_log(folder: Path, is_full: bool) -> None:
    """Has metrics.jsonl be on a full disk, or no longer."""
    log, kept = folder / "run" / "metrics.jsonl", folder / "metrics-kept.jsonl"
    if is_full and not kept.exists():
        log.rename(kept)
        log.symlink_to("/dev/full")
    elif not is_full and kept.exists():
        kept.replace(log)


def believe_everything() -> None:
    """The control: checkpoints are written where they are looked for, and what is there is believed."""
    store.UNFINISHED = ""

    def believed(folder: Path) -> store.Checkpoint:
        facts = {"step": store.number_of(folder), "wer": None}
        with contextlib.suppress(OSError, ValueError):
            facts |= json.loads((folder / store.MANIFEST).read_text())
        return store.Checkpoint(folder, facts)

    store.verify = believed


def rank_process(config: TrainingConfig, rank: int, processes: int, port: int, fault: Fault | None, log: Path) -> None:
    """The body of one process of a run; does not return."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    folder = Path(config.output_dir).parent
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    if processes > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in ranks.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "drill"}
    instrument(folder, rank, fault)
    if (folder / "hub-url").exists():
        use_hub(folder)
    sys.argv = ["drill"]
    status = 0
    try:
        launch(lambda _: main(config))
    except SystemExit as end:
        status = end.code
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    os._exit(status)


def launcher_process(config: TrainingConfig, processes: int, fault: Fault | None, log: Path) -> None:
    """Starts the processes, passes signals on, and ends all when one fails, as torchrun does; does not return."""
    os.setpgid(0, 0)
    for number in (signal.SIGHUP, signal.SIGQUIT):  # which nohup, or a shell's background, has ignored
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(processes):
        if not (pid := os.fork()):
            rank_process(config, rank, processes, port, fault, log)
        pids.append(pid)
    told, failed, deadline = [], 0, float("inf")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: told.append(number))
    while pids:
        for pid in list(pids):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                pids.remove(pid)
                failed |= status
                told += [signal.SIGTERM] if status else []
        if told and deadline == float("inf"):
            deadline = time.monotonic() + LAUNCHER_SECONDS
            for pid in pids:
                os.kill(pid, told[0])
        if time.monotonic() > deadline:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    os._exit(1 if failed else 0)


def is_finished(config: TrainingConfig) -> bool:
    return store.read_status(Path(config.output_dir))["state"] == "finished"


# ------------------------------------------------------------------------------------------------------ Outside of it


def start(config: TrainingConfig, processes: int, fault: Fault | None, log: Path) -> int:
    """Starts a run and returns its launcher's process id."""
    for name in ("where-0", "where-1", "saving-0", "pid-0", "pid-1"):
        (Path(config.output_dir).parent / name).unlink(missing_ok=True)
    if not (launcher := os.fork()):
        launcher_process(config, processes, fault, log)
    return launcher


def wait_for(launcher: int, folder: Path) -> int | None:
    """Waits until a run and all its processes are gone, for its exit status; None, and kills them, if it takes long."""
    end = time.monotonic() + LIMIT_SECONDS
    ended = status = 0
    while time.monotonic() < end:
        if not ended:
            ended, status = os.waitpid(launcher, os.WNOHANG)
        if ended and not any(map(alive, pids_of(folder))):
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    with contextlib.suppress(OSError):
        os.killpg(launcher, signal.SIGKILL)
    if not ended:
        os.waitpid(launcher, 0)
    return None


def pids_of(folder: Path) -> list[int]:
    return [int(path.read_text() or 0) for path in sorted(folder.glob("pid-*"))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def strike(fault: Fault, launcher: int, folder: Path) -> None:
    """Waits for the fault's moment and brings it about, if it comes from outside."""
    if "saving" in fault.kind or fault.kind in INSIDE or (fault.injected and fault.injected.ends != "refused"):
        return
    end = time.monotonic() + LIMIT_SECONDS
    while steps_done(folder) < fault.step and time.monotonic() < end:
        time.sleep(0.005)
    while fault.injected and not store.names(folder / "run" / "checkpoints") and any(map(alive, pids_of(folder))):
        time.sleep(0.005)
    while fault.has_hub and not hub_state(folder)["checkpoints"] and any(map(alive, pids_of(folder))):
        time.sleep(0.005)
    time.sleep(fault.delay)
    name = fault.who.split(",")[0] if fault.has_hub else fault.kind.split(",")[0]
    number = getattr(signal, name) if name.startswith("SIG") else signal.SIGKILL
    with contextlib.suppress(OSError, IndexError):
        if fault.who == "worker":
            os.kill(children(pids_of(folder)[0])[0], number)
        elif fault.who == "launcher" or (name == "SIGTERM" and fault.has_hub):
            os.kill(launcher, number)
        elif fault.who == "all" or fault.has_hub:
            os.killpg(launcher, number)
        else:
            os.kill(pids_of(folder)[int(fault.who[-1]) if fault.who.startswith("rank") else 0], number)


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return sorted(found)


def damage(fault: Fault, run: Path) -> None:
    """Damages the newest checkpoint's weights, moments or state, or the final model."""
    if fault.kind == "final model damaged":
        model = run / "final_model"
        file = random.Random(fault.number).choice([model / "model.safetensors", model / "config.json"])
        file.write_bytes(b"" if fault.who == "emptied" else file.read_bytes()[:-7])
        return
    newest = store.names(run / "checkpoints")
    if "damage" not in fault.kind or not newest:
        return
    file = newest[0] / random.Random(fault.number).choice(["model.safetensors", "optimizer.safetensors", "state.json"])
    content = bytearray(file.read_bytes())
    if fault.who == "missing file":
        file.unlink()
    elif fault.who.startswith("manifest"):
        text = {"manifest emptied": "", "manifest null": "null", "manifest of {}": "{}"}[fault.who]
        (newest[0] / "manifest.json").write_text(text)
    elif fault.who == "torn file":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def final_hash(run: Path) -> str:
    """Of the weights and moments of the last checkpoint, and of the final model."""
    last, digest = store.names(run / "checkpoints")[0], hashlib.sha256()
    for file in (last / "model.safetensors", last / "optimizer.safetensors", run / "final_model" / "model.safetensors"):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def hit(fault: Fault, work: Path, reference: str) -> dict:
    """One fault: the run that it hits, the runs that go on, and how it ended."""
    folder = work / f"fault-{fault.number:03d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    hub = os.fork() if fault.has_hub else None
    if hub == 0:
        hub_process(fault, folder)
    try:
        while hub and not (folder / "hub.json").exists():
            time.sleep(0.01)
        result = hit_and_resume(fault, settings_for(fault, work, folder), folder, reference)
    finally:
        if hub:
            os.kill(hub, signal.SIGTERM)
            os.waitpid(hub, 0)
    if result["survived"]:
        shutil.rmtree(folder)
    return result


def hit_and_resume(fault: Fault, config: TrainingConfig, folder: Path, reference: str) -> dict:
    log, run, injected = folder / "log.txt", Path(config.output_dir), fault.injected

    def is_done() -> bool:
        is_whole = is_finished(config) and damage_of(Path(config.output_dir) / "final_model") is None
        return is_whole and (not fault.has_hub or is_uploaded(folder))

    launcher = start(config, fault.processes, fault, log)
    result = asdict(fault) | {"hit_phase": None}
    strike(fault, launcher, folder)
    with contextlib.suppress(OSError):
        result["hit_phase"] = "saving" if (folder / "saving-0").exists() else (folder / "where-0").read_text()
    exits = [wait_for(launcher, folder)]
    told = [(exits[0] == 0) == is_done()]
    result["hit_step"] = steps_done(folder)
    if (folder / "saving-0").exists():
        result["hit_phase"] = "saving"
    result |= met_by_the_run(fault, folder)
    result["status"] = store.read_status(run)["state"]
    damage(fault, run)
    lasting = hub_state(folder)["checkpoints"] if fault.kind == "machine gone" else []
    if fault.kind == "machine gone":
        shutil.rmtree(run)
        (folder / "gone").touch()
        config = dataclasses.replace(config, resume="hub" if lasting else "auto")
    if "data moved" in fault.kind:
        config.train_sources = [Source(str(shutil.copytree(config.train_sources[0].path, folder / "elsewhere")))]
    if fault.kind == "kill -9, then change" and not is_done():
        config = dataclasses.replace(config)
        CHANGES[fault.who](run, config)
        run = Path(config.output_dir)
    if fault.kind == "upload asked for later":
        config = dataclasses.replace(config, skip_hf_upload=False)
    is_refused = injected is not None and injected.ends == "refused"
    while not is_done() and len(exits) < 4:
        end = time.monotonic() + LIMIT_SECONDS
        while fault.kind == "Hub" and not hub_state(folder)["over"] and time.monotonic() < end:
            time.sleep(0.05)
        with open(log, "a") as file:
            file.write(NEXT_ATTEMPT)
        (folder / "again").touch()
        echo = None
        if injected and (injected.lasts or (is_refused and len(exits) == 1)):
            echo = fault
        elif fault.control and not injected:
            echo = Fault(**(asdict(fault) | {"kind": "none"}))
        if fault.who in OTHER_DATA:
            put_other_data(fault.who if len(exits) == 1 else None, folder.parent, folder)
        exits.append(wait_for(start(config, fault.processes, echo, log), folder))
        told.append((exits[-1] == 0) == is_done())
    result |= {"attempts": len(exits), "exits": exits, "hung": None in exits, "steps_lost": 0}
    if len(exits) > 1 and not (fault.has_hub and result["status"] == "finished"):
        second = log.read_text().split(NEXT_ATTEMPT)[min(1 + is_refused, len(exits) - 1)]
        resumed = [int(line.split()[3]) for line in second.splitlines() if line.startswith("resumed at step")]
        result["steps_lost"] = max(0, result["hit_step"] - (resumed[0] if resumed else 0))
    try:
        result["hash"] = final_hash(run)
    except (OSError, IndexError):
        result["hash"] = None
    result["identical"] = result["hash"] == reference if has_same_bits(fault) else None
    survived = is_done() and not result["hung"] and result["identical"] is not False
    survived &= result["steps_lost"] <= allowed_loss(fault, result, lasting)
    survived &= not fault.is_outlived or (result["status"] == "finished" and result["hit_phase"] is not None)
    survived &= fault.kind not in ("Hub", "saves fail") or all(told)
    survived &= injected is None or ended_as_it_must(injected, exits, result["status"], log.read_text())
    survived &= fault.kind != "final model damaged" or len(exits) == 2
    return result | {"survived": bool(survived)}


def has_same_bits(fault: Fault) -> bool:
    return fault.injected.has_same_bits if fault.injected else fault.kind != "NaN loss"


def ended_as_it_must(injected: Kind, exits: list[int | None], status: str, log: str) -> bool:
    """Whether the run that was hit ended as its kind of fault must end it, and with the message."""
    if injected.ends == "refused":
        return exits[1:] == [1, 0] and injected.said in log.split(NEXT_ATTEMPT)[1]
    is_right = injected.ends == "killed" or (status == injected.ends and (exits[0] == 0) == (status == "finished"))
    return is_right and injected.said in log


def met_by_the_run(fault: Fault, folder: Path) -> dict:
    """Where a fault was met that the run goes on from; a phase of None: nowhere."""
    if fault.kind == "full disk":
        full = folder / "was-full"
        return {"hit_step": int(full.read_text()), "hit_phase": "saving"} if full.exists() else {"hit_phase": None}
    if fault.kind in ("full log", "no shared memory"):
        said = {"full log": "metrics.jsonl cannot be written", "no shared memory": "is too small for"}[fault.kind]
        rows = [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        is_whole = rows == sorted(rows) and {5, 6, 10, 12} <= set(rows)
        is_met = said in (folder / "log.txt").read_text() and is_whole
        return {"hit_step": fault.step, "hit_phase": f"step {fault.step}" if is_met else None}
    if fault.kind == "NaN loss":
        skipped = (folder / "run" / "skipped-steps.txt").exists()
        return {"hit_step": fault.step, "hit_phase": f"step {fault.step}" if skipped else None}
    if fault.kind == "NaN audio":
        lines = [line for file in (folder / "run").glob("dropped-*.txt") for line in file.read_text().splitlines()]
        steps = sorted(int(line.split(":")[0].split()[1]) for line in lines if ": not finite: " in line)
        twice = len(lines) == len(steps) == 2 and all_finite(folder / "run")
        return {"hit_step": min(steps, default=0), "hit_phase": "loading" if twice else None}
    if fault.kind == "Hub":
        hub = hub_state(folder)
        return {"hit_step": hub["step"], "hit_phase": f"{hub['met']} requests met it" if hub["met"] else None}
    if fault.who == "worker":
        noted = re.search(r"process 0, after step (\d+): (?:a )?DataLoader worker ", (folder / "log.txt").read_text())
        return {"hit_step": int(noted[1]), "hit_phase": "loading"} if noted else {"hit_phase": None}
    return {}


def all_finite(run: Path) -> bool:
    last = store.verify(store.names(run / "checkpoints")[0])
    files = ("model.safetensors", "optimizer.safetensors")
    return all(torch.isfinite(tensor).all() for file in files for _, tensor in last.tensors(file))


def allowed_loss(fault: Fault, result: dict, on_hub: list[str]) -> int:
    """So many steps may be lost."""
    if fault.kind == "machine gone":
        newest = max((store.number_of(Path(name)) for name in on_hub), default=0)
        return 0 if fault.who == "SIGTERM" else result["hit_step"] - newest
    if fault.is_outlived or fault.kind in ("SIGTERM", "SIGINT", "SIGHUP", "final model damaged"):
        return 0
    if fault.injected and fault.injected.loses_nothing:
        return 0
    if fault.kind == "saves fail":
        return STEPS - fault.step + SAVE_STEPS
    since_last = SAVE_STEPS + (SAVE_STEPS - 1) * (result["hit_phase"] == "saving")  # one in the making is none yet
    return since_last + SAVE_STEPS * ("damage" in fault.kind)


def prepare(work: Path) -> None:
    """The small corpus: 41 utterances for training, 11 for evaluation."""
    for part, name, count in (("corpus", "corpus", UTTERANCES), ("heldout", "heldout", 11)):
        (file,) = (DEMO / part).glob("*.parquet")
        if not (work / name).exists():
            (work / name).mkdir(parents=True)
            pyarrow.parquet.write_table(pyarrow.parquet.read_table(file).slice(0, count), work / name / "train.parquet")


def table(results: list[dict]) -> str:
    groups = defaultdict(list)
    for result in results:
        groups[("control: " if result["control"] else "") + Fault(**{k: result[k] for k in FIELDS}).title].append(
            result
        )
    lines = [
        "| fault | faults | survived | steps lost at most | final weights identical | steps hit | seconds each |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, group in groups.items():
        compared = [result for result in group if result["identical"] is not None]
        hits = sorted(result["hit_step"] for result in group)
        lines.append(
            f"| {title} | {len(group)} | {sum(r['survived'] for r in group)} | {max(r['steps_lost'] for r in group)} |"
            f" {sum(r['identical'] for r in compared)} of {len(compared)} | {hits[0]}–{hits[-1]} |"
            f" {sum(r['seconds'] for r in group) / len(group):.0f} |"
        )
    return "\n".join(lines)


FIELDS = tuple(Fault.__dataclass_fields__)


def drill(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--begin", type=int, default=0, help="the first fault's number")
    parser.add_argument("--only", default="", help="only the faults whose kind holds this text")
    parser.add_argument("--json", type=Path, help="all results, as JSON")
    parser.add_argument("--work", type=Path, default=Path("runs/drill"), help="what is done, and the runs that failed")
    given = parser.parse_args(arguments)
    work = given.work.resolve()
    prepare(work)
    done_file = work / "done.jsonl"
    done = [json.loads(line) for line in done_file.read_text().splitlines()] if done_file.exists() else []
    references = {r["name"]: r["hash"] for r in done if r["kind"] == "reference"}

    def reference_for(fault: Fault) -> str:
        """The final hash of a run that nothing hits; for a NaN in the audio, of one where that clip is silent."""
        name = f"processes-{fault.processes}" + (f"-silent-{clip_of(fault)}" if fault.kind == "NaN audio" else "")
        if name not in references:
            folder = work / f"reference-{name}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            config, log = settings(work, folder / "run"), folder / "log.txt"
            if fault.kind == "NaN audio":
                silence = np.zeros_like(corpus_clip(work, clip_of(fault)))
                config.train_sources = [Source(str(corpus_with(work, folder / "corpus", clip_of(fault), silence)))]
            assert wait_for(start(config, fault.processes, None, log), folder) == 0, log.read_text()
            references[name] = final_hash(folder / "run")
            with open(done_file, "a") as file:
                file.write(json.dumps({"kind": "reference", "name": name, "hash": references[name]}) + "\n")
        return references[name]

    results = {r["number"]: r for r in done if r["kind"] != "reference"}
    wanted = [fault for fault in faults(given.faults) if given.only in fault.title and fault.number >= given.begin]
    for fault in wanted:
        if fault.number in results and asdict(fault).items() <= results[fault.number].items():
            continue
        started = time.monotonic()
        results[fault.number] = result = hit(fault, work, reference_for(fault))
        result["seconds"] = round(time.monotonic() - started, 1)
        with open(done_file, "a") as file:
            file.write(json.dumps(result) + "\n")
        print(
            f"{fault.number}: {'control: ' * fault.control}{fault.title},"
            f" {fault.processes} process(es): at step {result['hit_step']} ({result['hit_phase']}),"
            f" {result['steps_lost']} steps lost,"
            f" {'survived' if result['survived'] else 'NOT SURVIVED'}, {result['seconds']:.0f} s",
            flush=True,
        )
    wanted = [results[fault.number] for fault in wanted]
    print(table(wanted))
    if given.json:
        given.json.write_text(json.dumps({"references": references, "faults": wanted}, indent=1))
    failed = [r["number"] for r in wanted if not r["control"] and not r["survived"]]
    controls = [r for r in wanted if r["control"]]
    seen: dict[str, bool] = defaultdict(bool)  # of each kind of control, whether one did not survive
    for control in controls:
        seen[control["kind"]] |= not control["survived"]
    blind = [kind for kind, is_seen in seen.items() if not is_seen]
    print(f"{len(wanted) - len(controls) - len(failed)} of {len(wanted) - len(controls)} survived")
    if blind:
        print(f"controls survived too, so this drill would not see what is mended: {', '.join(blind)}")
    return 1 if failed or blind else 0


if __name__ == "__main__":
    sys.exit(drill(sys.argv[1:]))
