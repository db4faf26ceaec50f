"""Whether a machine is fit for a run, asked in a minute before it begins: a line each, `ok` or what to do.

Nothing is left behind but what the run would leave itself: the cache of the corpora, and the repository on the Hub.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import math
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import accelerate
import torch
import torch.distributed
import transformers
from accelerate.utils import gather_object

from hebrew_asr.checkpoints.hub import check_upload
from hebrew_asr.data import shared_memory
from hebrew_asr.data.audio import AudioError, decode_audio
from hebrew_asr.data.loading import load_source
from hebrew_asr.data.rows import load_rows
from hebrew_asr.data.sources import Source
from hebrew_asr.data.utterances import log_mel
from hebrew_asr.errors import InputError
from hebrew_asr.files import UNFINISHED
from hebrew_asr.model.layouts import in_transformers_layout
from hebrew_asr.model.loading import checkpoint_problems, load_processor
from hebrew_asr.model.loss import SpeechModel
from hebrew_asr.model.roofline import DEVICES
from hebrew_asr.model.stages import ever_trained
from hebrew_asr.processes import NVIDIA_DRIVER
from hebrew_asr.training.plan import Plan, make_plan, tokens_of, usable
from hebrew_asr.training.run_folder import check_disk, check_same_run, checkpoint_bytes, folder_of
from hebrew_asr.training.run_log import silenced_stdout, tracker_here
from hebrew_asr.training.settings import Settings

EXCHANGE_SECONDS = 60.0  # for the processes to add up a tensor, the first connection included
EXCHANGED = {"cuda": 2**28, "cpu": 2**22}  # bytes
WRITTEN = 2**29  # bytes at most, to know how fast a disk is
WRITE_SECONDS = 10.0
BLOCK = 2**24
TENSORS = 10  # of a packed micro-batch; each is an open file while it is shared with a worker
LOGIN_SECONDS = 20  # to W&B
FILES_OPEN = 256  # of libraries, caches and corpora; assumed
HEARD = 8  # utterances, to know how long one takes to read
SLOW_PARAMETERS = 10**8  # that nobody trains on a CPU


class Finding(NamedTuple):
    kind: Literal["ok", "note", "stop"]
    """note: the run goes on, but not as it might; stop: it would not begin, or end early."""
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind:<5}{self.what}: {self.text}"


def asked(what: str, question: Callable[[], Finding]) -> Finding:
    """What a question finds; an InputError is what would stop the run."""
    try:
        return question()
    except InputError as error:
        return Finding("stop", what, str(error))


# ------------------------------------------------------------------------------------------------ Devices and processes
def driver() -> str:
    """The version in /proc/driver/nvidia/version: `NVRM version: NVIDIA UNIX … Module  580.65.06  Sun …`."""
    words = NVIDIA_DRIVER.read_text().splitlines()[0].split() if NVIDIA_DRIVER.exists() else []
    return next((word for word in words if word[0].isdigit() and "." in word), "of an unknown version")


def of_devices(names: list[str], local_processes: int, parameters: int) -> Finding:
    """Whether there are as many GPUs as processes; `names` of those that torch sees."""
    torch_here = f"torch {torch.__version__}"
    if not names:
        if parameters > SLOW_PARAMETERS:
            return Finding(
                "note", "devices", f"{torch_here}, no GPU: {parameters / 1e6:,.0f} M parameters train for months here"
            )
        return Finding("ok", "devices", f"{torch_here}, no GPU: the run is on the CPU")
    here = f"{len(names)} × {' and '.join(sorted(set(names)))}"
    if local_processes > len(names):
        return Finding("stop", "devices", f"{local_processes} processes for {here}: give --nproc_per_node={len(names)}")
    if local_processes < len(names):
        return Finding(
            "note", "devices", f"{local_processes} of {here} are used: torchrun --nproc_per_node={len(names)} uses all"
        )
    return Finding("ok", "devices", f"{torch_here}, CUDA {torch.version.cuda}, driver {driver()}, {here}")


def kind_of(name: str, total: int) -> str:
    """The plan's device for a GPU's name and bytes: of those it is called by, the one nearest in size."""
    named = [kind for kind in DEVICES if kind.split("-")[0] in name] or list(DEVICES)
    return min(named, key=lambda kind: abs(DEVICES[kind].gigabytes * 1e9 - total))


def of_memory(plan: Plan, name: str, free: int, total: int) -> Finding:
    """One GPU's memory against the plan's peak; what others hold of it is missing."""
    peak = max(stage.peak_bytes for stage in plan.stages)
    there, needed = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB of {name} are free", f"{peak / 1e9:.1f} GB are planned"
    room = usable(kind_of(name, total)) / (DEVICES[kind_of(name, total)].gigabytes * 1e9)
    if peak <= room * free:
        return Finding("ok", "memory", f"{there}, {needed}")
    if peak <= room * total:
        return Finding("stop", "memory", f"{there}, {needed}: another process holds the rest, nvidia-smi names it")
    changes = dict.fromkeys(change for stage in plan.stages for change in stage.advice)
    remedy = "; ".join(changes) or "--gradient_checkpointing true"
    return Finding("stop", "memory", f"{there}, {needed}: give {remedy}; --find_token_budget tries what fits")


def of_exchange(state: accelerate.PartialState, seconds: float = EXCHANGE_SECONDS) -> Finding:
    """Whether the processes can add up a tensor, and how fast; one that hangs is given up after `seconds`."""
    if state.num_processes == 1:
        return Finding("ok", "exchange", "one process, nothing to exchange")
    backend = torch.distributed.get_backend()
    found: list[Finding] = []

    def exchange() -> None:
        try:
            numbers = torch.full((EXCHANGED[state.device.type] // 4,), 1.0 + state.process_index, device=state.device)
            torch.distributed.all_reduce(numbers)
            expected = state.num_processes * (state.num_processes + 1) / 2
            if not bool((numbers == expected).all()):
                found.append(Finding("stop", "exchange", f"{backend} adds up wrong: try NCCL_P2P_DISABLE=1"))
                return
            began = time.perf_counter()
            torch.distributed.all_reduce(numbers)
            numbers[0].item()
            rate = numbers.nbytes / (time.perf_counter() - began) / 1e9
            found.append(
                Finding(
                    "ok", "exchange", f"{state.num_processes} processes over {backend}, {rate:.2f} GB/s all-reduced"
                )
            )
        except RuntimeError as error:
            problem = str(error).strip().splitlines()[0]
            found.append(Finding("stop", "exchange", f"{backend} failed: {problem}. NCCL_DEBUG=INFO says more"))

    thread = threading.Thread(target=exchange, daemon=True)
    thread.start()
    thread.join(seconds)
    if found:
        return found[0]
    return Finding(
        "stop",
        "exchange",
        f"the processes did not add up a tensor over {backend} in {seconds:g} s: NCCL_DEBUG=INFO says where it waits."
        " Usual: the wrong network (NCCL_SOCKET_IFNAME), a firewall, GPUs that do not reach one another"
        " (NCCL_P2P_DISABLE=1), /dev/shm too small",
    )


# ----------------------------------------------------------------------------------------------------- Disk and limits
def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())


def rates(place: Path) -> tuple[float, float]:
    """Bytes a second that the disk of a folder takes, flushed, and that are hashed."""
    block = os.urandom(BLOCK)
    began = time.perf_counter()
    hashlib.sha256(block).digest()
    hashed = BLOCK / (time.perf_counter() - began)
    with tempfile.NamedTemporaryFile(dir=place, prefix=UNFINISHED) as file:
        began, size = time.perf_counter(), 0
        while size < WRITTEN and time.perf_counter() - began < WRITE_SECONDS:
            size += file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return size / (time.perf_counter() - began), hashed


def of_disk(folder: Path, model: torch.nn.Module, config: Settings) -> Finding:
    """Room for the run's checkpoints, and how long one takes; InputError where there is none."""
    check_same_run(config, folder)
    place = existing(folder)
    try:
        written, hashed = rates(place)
    except OSError as error:
        raise InputError(f"cannot write to {place}: {error.strerror}. Give another --output_dir") from error
    check_disk(folder, model, config, place)
    size = checkpoint_bytes(model, config)
    seconds = size / written + size / hashed
    text = (
        f"{place} takes {written / 1e6:,.0f} MB/s: a checkpoint of {size / 1e9:.3g} GB is written and hashed in"
        f" {seconds:.1f} s, while training goes on"
    )
    if seconds > config.preemption_grace_seconds:
        return Finding(
            "note",
            "disk",
            f"{text}. A stop by signal leaves {config.preemption_grace_seconds:g} s: if the machine gives more,"
            f" set --preemption_grace_seconds {math.ceil(1.2 * seconds)}, else use a faster disk, or lose up to"
            f" {config.save_steps} steps (--save_steps)",
        )
    return Finding("ok", "disk", text)


def of_shared_memory(workers: int, seconds_at_once: float) -> Finding:
    if line := shared_memory.advice(workers, seconds_at_once):
        return Finding("note", "shared memory", line.removeprefix("warning: "))
    megabytes = shared_memory.needed(workers, seconds_at_once) / 1e6
    return Finding("ok", "shared memory", f"{megabytes:.0f} MB of batches fit {shared_memory.PLACE}")


def of_open_files(workers: int, micro_batches: int, limit: int) -> Finding:
    """`limit`: of one process; the loader's batches are open files in it, a tensor each."""
    needed = FILES_OPEN + workers * shared_memory.AHEAD * micro_batches * TENSORS
    if limit < needed:
        return Finding("stop", "open files", f"at most {limit}, about {needed} are needed: `ulimit -n {2 * needed}`")
    return Finding("ok", "open files", f"at most {limit}, about {needed} are needed")


# ------------------------------------------------------------------------------------------------------------- Accounts
def of_hub(config: Settings, folder: Path) -> Finding:
    """The token and its right to write, as the run itself asks for them; InputError where it may not."""
    if not config.uploads:
        return Finding("ok", "Hub", "nothing is uploaded (hf_repo_id and skip_hf_upload decide)")
    lines: list[str] = []
    check_upload(config, folder, lines.append)
    if lines:
        return Finding("note", "Hub", lines[-1].removeprefix("warning: "))
    return Finding("ok", "Hub", f"this token may write to {config.hf_repo_id}")


def of_tracker(name: str) -> Finding:
    name = tracker_here(name)
    if name == "none":
        return Finding("ok", "tracking", "no tracker; metrics.jsonl is written")
    try:
        library = importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{name} cannot be imported ({error}): `uv sync`, or --tracker none") from error
    if name == "trackio":
        return Finding("ok", "tracking", "trackio, on this disk")
    mode = os.environ.get("WANDB_MODE", "").lower()
    if mode in ("offline", "dryrun"):
        return Finding("ok", "tracking", f"W&B, WANDB_MODE is {mode}")
    with silenced_stdout():
        try:
            has_key = library.login(prompt=False, timeout=LOGIN_SECONDS)
        except (library.errors.Error, OSError) as error:
            problem = str(error).splitlines()[0]
            return Finding("note", "tracking", f"W&B cannot be used ({problem}): the run would be tracked offline")
    if not has_key:
        return Finding(
            "note",
            "tracking",
            "W&B has no key, the run would be tracked offline: `uv run wandb login`, or WANDB_API_KEY",
        )
    return Finding("ok", "tracking", "W&B has a key")


# ------------------------------------------------------------------------------------------------- Model, corpora, time
def empty_model(config: Settings, use_bf16: bool) -> SpeechModel:
    """The model that will train, of its types and sizes, without its weights; InputError where it cannot be had."""
    name = config.model_name_or_path
    with checkpoint_problems(name):
        found = transformers.AutoConfig.from_pretrained(in_transformers_layout(name), trust_remote_code=False)
    if found.model_type != "qwen3_asr":
        raise InputError(f"{name} is not a Qwen3-ASR checkpoint (model_type {found.model_type})")
    with torch.device("meta"):
        model = SpeechModel(found)
    if use_bf16:
        trained = ever_trained(model, config.stages)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name not in trained:
                parameter.data = parameter.data.bfloat16()
    return model


def of_source(source: Source) -> Finding:
    """Whether a corpus can be opened and its first row read; nothing is downloaded but that."""
    what = f"corpus {source}"
    try:
        first = next(iter(load_source(source, streaming=True)), None)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"its first row cannot be read: {str(error).strip().splitlines()[0]}") from error
    if first is None:
        raise InputError("it has no rows")
    return Finding("ok", what, "its first row is there")


def first_step(config: Settings, weights: int, rank_share: float) -> Finding:
    """Seconds from the command to the first step, of what can be measured here, and what is not known.

    Args:
        weights: bytes of the model.
        rank_share: utterances of a process in a step.
    """
    parts, unknown = {}, []
    local = all(Path(source.path).exists() for source in [*config.train_sources, *config.eval_sources])
    if local and not config.streaming:
        began = time.perf_counter()
        rows = load_rows(config.train_sources, config, for_training=True)
        parts["reading the corpora"] = time.perf_counter() - began
        extractor = load_processor(config.model_name_or_path).feature_extractor
        began, heard = time.perf_counter(), range(min(HEARD, len(rows)))
        for number in heard:
            row = rows[number]
            with contextlib.suppress(AudioError):
                log_mel(extractor, decode_audio(row["audio"], row["start"], row["end"]))
        each = (time.perf_counter() - began) / max(1, len(heard))
        parts["the first batch"] = each * rank_share  # one worker makes it alone
    else:
        unknown.append("the corpora are fetched, or read from the cache")
    folder = Path(config.model_name_or_path)
    if folder.is_dir():
        began, size = time.perf_counter(), 0
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb") as opened:
                while size < WRITTEN and (block := opened.read(BLOCK)):
                    size += len(block)
        parts["reading the weights"] = weights * (time.perf_counter() - began) / max(1, size)
    else:
        unknown.append(f"{weights / 1e9:.1f} GB of weights are fetched, or read from the cache")
    text = f"about {sum(parts.values()):.0f} s" if parts else "not known"
    if parts:
        text += f" ({', '.join(f'{name} {seconds:.1f}' for name, seconds in parts.items())})"
    unknown.append("Python starts, the evaluation set is transcribed once before training")
    if config.torch_compile:
        unknown.append("layers are compiled")
    return Finding("ok", "first step", f"{text}; on top: {'; '.join(unknown)}")


# ------------------------------------------------------------------------------------------------------------ The whole
def plan_here(config: Settings, processes: int, device: str) -> Plan:
    return make_plan(dataclasses.replace(config, plan_devices=processes, plan_device=device))


def of_process(config: Settings, state: accelerate.PartialState, model: torch.nn.Module) -> Iterator[Finding]:
    """What each process asks of its own device."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if use_cuda(state) else []
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    yield of_devices(names, local, sum(parameter.numel() for parameter in model.parameters()))
    if not use_cuda(state):
        return
    free, total = torch.cuda.mem_get_info(state.device)
    name = torch.cuda.get_device_name(state.device)

    def memory() -> Finding:
        return of_memory(plan_here(config, state.num_processes, kind_of(name, total)), name, free, total)

    if config.tokens_per_micro_batch is None or config.bf16 is False:
        yield Finding("note", "memory", "not planned without tokens_per_micro_batch and bf16")
    else:
        yield asked("memory", memory)


def use_cuda(state: accelerate.PartialState) -> bool:
    return state.device.type == "cuda"


def of_machine(
    config: Settings, state: accelerate.PartialState, model: torch.nn.Module, folder: Path
) -> Iterator[Finding]:
    """What one process asks for all."""
    share = config.target_effective_batch / state.num_processes
    seconds, workers = config.plan_mean_seconds, config.dataloader_num_workers
    tokens = share * float(tokens_of(torch.tensor([seconds]).numpy())[0])
    budget = config.tokens_per_micro_batch
    micro_batches = math.ceil(tokens / budget if budget else share / config.batch_size)
    yield asked("disk", lambda: of_disk(folder, model, config))
    yield of_shared_memory(workers, share * seconds)
    yield of_open_files(workers, micro_batches, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield asked("Hub", lambda: of_hub(config, folder))
    yield asked("tracking", lambda: of_tracker(config.tracker))
    corpora = [asked(f"corpus {source}", lambda s=source: of_source(s)) for source in sources(config)]
    yield from corpora
    if all(found.kind == "ok" for found in corpora):
        weights = sum(parameter.nbytes for parameter in model.parameters())
        yield asked("first step", lambda: first_step(config, weights, share))


def sources(config: Settings) -> list[Source]:
    return [*config.train_sources, *config.eval_sources]


def check_machine(config: Settings, state: accelerate.PartialState, use_bf16: bool) -> None:
    """Prints a line for each question, on the first process; InputError on all where something would stop the run."""
    is_first, stops = state.process_index == 0, 0

    def tell(found: Finding, process: int = 0) -> None:
        nonlocal stops
        stops += found.kind == "stop"
        if is_first:
            print(found if not process else f"{found} (process {process})", flush=True)

    tell(found := of_exchange(state))
    if found.kind == "stop" and "did not add up" in found.text:  # a collective would wait behind that one
        os._exit(1)
    try:
        model = empty_model(config, use_bf16)
    except InputError as error:
        tell(Finding("stop", "model", str(error)))
        raise InputError(f"{stops} of these would stop the run") from error
    tell(Finding("ok", "model", config.model_name_or_path))
    mine = list(of_process(config, state, model))
    for process, findings in enumerate(gather_object([mine])):
        for number, found in enumerate(findings):
            if process == 0 or (found.kind != "ok" and found != mine[number]):
                tell(found, process)
    folder = folder_of(config)
    if is_first:
        for found in of_machine(config, state, model, folder):
            tell(found)
    if stops := max(gather_object([stops])):
        raise InputError(f"{stops} of these would stop the run")
    if is_first:
        print("nothing here would stop the run")
