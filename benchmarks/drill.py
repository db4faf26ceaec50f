"""Kills, stops, damages and starves demo runs, lets the same command go on, and compares how they end.

    uv run python benchmarks/drill.py --json drill.json --faults 100

Each fault hits a run of 12 steps with a checkpoint after every second one, in 1 or 2 processes; then the same settings
run again until the run is finished, and its weights and moments are compared with those of a run that nothing hit. The
processes are forked from one that has imported everything, under a launcher that does what torchrun does: it passes
signals on, and ends the others when one dies. What is done is in --work, and is not done again. As a control, kills
while saving hit a system that writes in place and believes what it finds: some of those runs must end wrong.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).parent.parent))

import pyarrow.parquet

import checkpoints
import run_watch
from hebrew_corpora import Source
from resuming import ResumableTrainer
from train_hebrew_asr_enhanced import Stage, TrainingConfig, launch, main

DEMO = Path(__file__).parent.parent / "demo"
STEPS, SAVE_STEPS = 12, 2
GRACE_SECONDS, STALL_MINUTES = 20.0, 0.2
LAUNCHER_SECONDS = 30.0  # from passing a signal on to kill -9
LIMIT_SECONDS = 120.0  # of one run, before it counts as hanging
NEXT_ATTEMPT = "---- the same command again ----\n"
FLUSHES = 15  # of one checkpoint: its files, its manifest, its folder, and the folder it is in


@dataclass
class Fault:
    number: int
    kind: str
    who: str  # rank 0, rank 1, all, launcher; or what is damaged
    processes: int
    step: int  # the fault hits when this many steps are done,
    delay: float  # so many seconds later; or, while saving, at this flush
    control: bool = False

    @property
    def title(self) -> str:
        return f"{self.kind}, {self.who}" if self.who else self.kind


def faults(count: int) -> list[Fault]:
    """A fixed list: one pass over all kinds after the other, moments drawn by number."""
    kinds = [
        *(
            ("kill -9", who, processes)
            for who, processes in (("rank 0", 1), ("rank 1", 2), ("all", 2), ("launcher", 2))
        ),
        *(("kill -9 while saving", who, n) for who, n in (("rank 0", 1), ("all", 2), ("rank 0", 1), ("all", 1))),
        *(
            ("SIGTERM", who, processes)
            for who, processes in (("rank 0", 1), ("rank 1", 2), ("all", 2), ("launcher", 2))
        ),
        *(("kill -9, then damage", what, 1) for what in ("torn file", "missing file", "flipped byte")),
        *(("full disk", "", processes) for processes in (1, 2)),
        *(("SIGSTOP", "rank 1", 2), ("SIGINT", "rank 0", 2), ("NaN gradient", "", 1)),
    ]
    found = []
    for number in range(count):
        kind, who, processes = kinds[number % len(kinds)]
        draw = random.Random(number)
        delay = draw.randrange(1, FLUSHES + 1) if "saving" in kind else round(draw.uniform(0, 0.5), 3)
        found.append(Fault(number, kind, who, processes, draw.randrange(1, STEPS), delay))
    controls = [f for f in faults_of_saving(found)][:6]
    return found + [Fault(**(asdict(f) | {"number": count + i, "control": True})) for i, f in enumerate(controls)]


def faults_of_saving(found: list[Fault]) -> list[Fault]:
    return [fault for fault in found if "saving" in fault.kind]


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


# --------------------------------------------------------------------------------------------------- Inside of a run


def instrument(folder: Path, rank: int, fault: Fault | None) -> None:
    """Has the run write down where it is, and, where the fault comes from inside, bring it about."""
    mark, write_one = run_watch.Watch.mark, checkpoints.Writer._write

    def noted_mark(self, where):
        (folder / f"where-{rank}").write_text(where)
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

    run_watch.Watch.mark, checkpoints.Writer._write = noted_mark, noted_write
    if fault is None:
        return
    if "saving" in fault.kind:
        flush, calls = checkpoints.flush, [0]

        def deadly_flush(path):
            if "step-" in str(path) or path.name == "checkpoints":
                saving = folder / f"saving-{rank}"
                if saving.exists() and int(saving.read_text()) >= fault.step:
                    calls[0] += 1
                    if calls[0] == fault.delay:
                        os.killpg(0, signal.SIGKILL) if fault.who == "all" else os.kill(os.getpid(), signal.SIGKILL)
            flush(path)

        checkpoints.flush = deadly_flush
    if fault.kind == "NaN gradient":
        clip = ResumableTrainer._clip_grad_norm

        def broken_clip(self, model):
            if self.state.global_step + 1 == fault.step:
                next(p for p in model.parameters() if p.grad is not None).grad[0] = float("nan")
            return clip(self, model)

        ResumableTrainer._clip_grad_norm = broken_clip
    if fault.control:
        believe_everything()


def believe_everything() -> None:
    """The control: checkpoints are written where they are looked for, and what is there is believed."""
    checkpoints.UNFINISHED = ""

    def believed(folder: Path) -> checkpoints.Checkpoint:
        facts = {"step": checkpoints.number_of(folder), "wer": None}
        with contextlib.suppress(OSError, ValueError):
            facts |= json.loads((folder / checkpoints.MANIFEST).read_text())
        return checkpoints.Checkpoint(folder, facts)

    checkpoints.verify = believed


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
    return checkpoints.read_status(Path(config.output_dir))["state"] == "finished"


# ------------------------------------------------------------------------------------------------------ Outside of it


def start(config: TrainingConfig, processes: int, fault: Fault | None, log: Path) -> int:
    """Starts a run and returns its launcher's process id."""
    for name in ("where-0", "where-1", "saving-0", "pid-0", "pid-1"):
        (Path(config.output_dir).parent / name).unlink(missing_ok=True)
    if not (launcher := os.fork()):
        launcher_process(config, processes, fault, log)
    return launcher


def wait_for(launcher: int, folder: Path) -> bool:
    """Waits until a run and all its processes are gone; False, and kills them, if that takes too long."""
    end = time.monotonic() + LIMIT_SECONDS
    ended = False
    while time.monotonic() < end:
        ended = ended or bool(os.waitpid(launcher, os.WNOHANG)[0])
        if ended and not any(map(alive, pids_of(folder))):
            return True
        time.sleep(0.02)
    with contextlib.suppress(OSError):
        os.killpg(launcher, signal.SIGKILL)
    if not ended:
        os.waitpid(launcher, 0)
    return False


def pids_of(folder: Path) -> list[int]:
    return [int(path.read_text() or 0) for path in sorted(folder.glob("pid-*"))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def steps_done(folder: Path) -> int:
    """The last step that the first process has marked."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int((folder / "where-0").read_text().split()[-1])
    return -1


def strike(fault: Fault, launcher: int, folder: Path) -> None:
    """Waits for the fault's moment and brings it about, if it comes from outside."""
    if "saving" in fault.kind or fault.kind in ("full disk", "NaN gradient"):
        return
    end = time.monotonic() + LIMIT_SECONDS
    while steps_done(folder) < fault.step and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(fault.delay)
    name = fault.kind.split(",")[0]
    number = signal.SIGKILL if name == "kill -9" else getattr(signal, name)
    with contextlib.suppress(OSError):
        if fault.who == "all":
            os.killpg(launcher, number)
        elif fault.who == "launcher":
            os.kill(launcher, number)
        else:
            os.kill(pids_of(folder)[int(fault.who[-1]) if fault.who.startswith("rank") else 0], number)


def damage(fault: Fault, run: Path) -> None:
    """Damages the newest checkpoint's weights, moments or state."""
    newest = checkpoints.names(run / "checkpoints")
    if "damage" not in fault.kind or not newest:
        return
    file = newest[0] / random.Random(fault.number).choice(["model.safetensors", "optimizer.safetensors", "state.json"])
    content = bytearray(file.read_bytes())
    if fault.who == "missing file":
        file.unlink()
    elif fault.who == "torn file":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def final_hash(run: Path) -> str:
    """Of the weights and moments of the last checkpoint, and of the final model."""
    last, digest = checkpoints.names(run / "checkpoints")[0], hashlib.sha256()
    for file in (last / "model.safetensors", last / "optimizer.safetensors", run / "final_model" / "model.safetensors"):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def hit(fault: Fault, work: Path, references: dict[str, str]) -> dict:
    """One fault: the run that it hits, the runs that go on, and how it ended."""
    folder = work / f"fault-{fault.number:03d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config, log = settings(work, folder / "run"), folder / "log.txt"
    run = Path(config.output_dir)
    result = asdict(fault) | {"hit_step": None, "hit_phase": None, "attempts": 1, "hung": False}
    launcher = start(config, fault.processes, fault, log)
    strike(fault, launcher, folder)
    with contextlib.suppress(OSError):
        result["hit_phase"] = "saving" if (folder / "saving-0").exists() else (folder / "where-0").read_text()
    result["hung"] = not wait_for(launcher, folder)
    result["hit_step"] = steps_done(folder)
    if (folder / "saving-0").exists():
        result["hit_phase"] = "saving"
    if fault.kind in ("full disk", "NaN gradient"):  # the run went on from it
        full = folder / "was-full"
        result["hit_step"] = int(full.read_text()) if full.exists() else fault.step
        result["hit_phase"] = "saving" if full.exists() else f"step {fault.step}"
    result["status"] = checkpoints.read_status(run)["state"]
    damage(fault, run)
    while not is_finished(config) and result["attempts"] < 4:
        result["attempts"] += 1
        with open(log, "a") as file:
            file.write(NEXT_ATTEMPT)
        echo = Fault(**(asdict(fault) | {"kind": "none"})) if fault.control else None
        result["hung"] |= not wait_for(start(config, fault.processes, echo, log), folder)
    result["steps_lost"] = 0
    if result["attempts"] > 1:
        second = log.read_text().split(NEXT_ATTEMPT)[1]
        resumed = [int(line.split()[3]) for line in second.splitlines() if line.startswith("resumed at step")]
        result["steps_lost"] = max(0, result["hit_step"] - (resumed[0] if resumed else 0))
    try:
        result["hash"] = final_hash(run)
    except (OSError, IndexError):
        result["hash"] = None
    reference = references[f"{fault.processes}"]
    result["identical"] = result["hash"] == reference if fault.kind != "NaN gradient" else None
    finished = is_finished(config) and not result["hung"]
    allowed = 2 * SAVE_STEPS if "damage" in fault.kind else SAVE_STEPS  # a damaged one is the last but one
    allowed = 0 if fault.kind.startswith("SIG") and fault.kind != "SIGSTOP" else allowed
    result["survived"] = finished and result["identical"] is not False and result["steps_lost"] <= allowed
    if result["survived"]:
        shutil.rmtree(folder)
    return result


def prepare(work: Path) -> None:
    """The small corpus: 41 utterances for training, 11 for evaluation."""
    for part, name, count in (("corpus", "corpus", 41), ("heldout", "heldout", 11)):
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
        "| fault | faults | survived | steps lost at most | final weights identical | steps hit |",
        "|---|---|---|---|---|---|",
    ]
    for title, group in groups.items():
        compared = [result for result in group if result["identical"] is not None]
        hits = sorted(result["hit_step"] for result in group)
        lines.append(
            f"| {title} | {len(group)} | {sum(r['survived'] for r in group)} | {max(r['steps_lost'] for r in group)} |"
            f" {sum(r['identical'] for r in compared)} of {len(compared)} | {hits[0]}–{hits[-1]} |"
        )
    return "\n".join(lines)


FIELDS = tuple(Fault.__dataclass_fields__)


def drill(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--json", type=Path, help="all results, as JSON")
    parser.add_argument("--work", type=Path, default=Path("runs/drill"), help="what is done, and the runs that failed")
    given = parser.parse_args(arguments)
    work = given.work.resolve()
    prepare(work)
    done_file = work / "done.jsonl"
    done = [json.loads(line) for line in done_file.read_text().splitlines()] if done_file.exists() else []
    references = {str(r["processes"]): r["hash"] for r in done if r["kind"] == "reference"}
    for processes in (1, 2):
        if str(processes) not in references:
            config = settings(work, work / f"reference-{processes}" / "run")
            shutil.rmtree(Path(config.output_dir).parent, ignore_errors=True)
            Path(config.output_dir).parent.mkdir(parents=True)
            log = Path(config.output_dir).parent / "log.txt"
            assert wait_for(start(config, processes, None, log), Path(config.output_dir).parent), log.read_text()
            references[str(processes)] = final_hash(Path(config.output_dir))
            with open(done_file, "a") as file:
                line = {"kind": "reference", "processes": processes, "hash": references[str(processes)]}
                file.write(json.dumps(line) + "\n")
    results = {r["number"]: r for r in done if r["kind"] != "reference"}
    for fault in faults(given.faults):
        if fault.number in results and asdict(fault).items() <= results[fault.number].items():
            continue
        started = time.monotonic()
        results[fault.number] = result = hit(fault, work, references)
        with open(done_file, "a") as file:
            file.write(json.dumps(result) + "\n")
        print(
            f"{fault.number:3} {'control: ' * fault.control}{fault.title}, {fault.processes} process(es): at step"
            f" {result['hit_step']} ({result['hit_phase']}), {result['steps_lost']} steps lost,"
            f" {'survived' if result['survived'] else 'NOT SURVIVED'}, {time.monotonic() - started:.0f} s",
            flush=True,
        )
    wanted = [results[fault.number] for fault in faults(given.faults)]
    print(table(wanted))
    if given.json:
        given.json.write_text(json.dumps({"references": references, "faults": wanted}, indent=1))
    failed = [r["number"] for r in wanted if not r["control"] and not r["survived"]]
    controls = [r for r in wanted if r["control"]]
    blind = bool(controls) and all(r["survived"] for r in controls)
    print(f"{len(wanted) - len(controls) - len(failed)} of {len(wanted) - len(controls)} survived")
    if blind:
        print("the control survived too: this drill would not see a torn checkpoint")
    return 1 if failed or blind else 0


if __name__ == "__main__":
    sys.exit(drill(sys.argv[1:]))
