"""What of this project only a GPU can show, on one GPU, in one command and eight minutes.

    uv run python benchmarks/gpu.py [--minutes 8] [--parts kernels step_B …] [--tiny] [--json FILE]

The model is the 1.7B with random weights, made on the device; the corpus is the demo's speech, clip after clip. Nothing
is downloaded. Each part runs in a process of its own, forked after the imports, with a deadline: one that fails, hangs
or runs out of memory costs its own time only. Parts come in the order of what one wants to know first, and the results
are written after each. `--tiny` has the real depth at small widths and runs on a CPU.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
WORK = Path(tempfile.mkdtemp(prefix="gpu-"))
os.environ |= {
    "HF_HOME": str(WORK / "hf"),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # to ask for a GPU must not start its driver before the forks
}

import numpy as np
import step as step_benchmark
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from hebrew_asr.checkpoints import store
from hebrew_asr.data.rows import load_rows
from hebrew_asr.data.sources import Source
from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.files import DEMO
from hebrew_asr.model import attention, fused, generation
from hebrew_asr.model import loss as loss_module
from hebrew_asr.model.costs import Work, flops, peak_flops, real_config
from hebrew_asr.model.frames import FRAMES_PER_CHUNK
from hebrew_asr.model.loading import load_model, load_processor, load_to_train
from hebrew_asr.model.loss import SpeechModel
from hebrew_asr.model.roofline import DEVICES, WAITING
from hebrew_asr.model.sharding import shard
from hebrew_asr.model.stages import ever_trained
from hebrew_asr.processes import quiet_libraries
from hebrew_asr.rl.rollouts import GenerateSampler, batches_of, prompt_of
from hebrew_asr.text.scoring import score
from hebrew_asr.training.plan import USABLE, make_plan
from hebrew_asr.training.resuming import training_arguments
from hebrew_asr.training.run_log import RunLog
from hebrew_asr.training.token_budget import search
from scripts.train_round3_gspo import round3
from train_hebrew_asr_enhanced import DataCollatorSpeechSeq2SeqWithPadding, GradualUnfreezeTrainer, TrainingConfig
from train_round2_gradual import round2

TINY = "--tiny" in sys.argv
SMALL_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL_TEXT |= {"head_dim": 16, "vocab_size": 4096, "num_hidden_layers": 16}
SMALL_AUDIO = {"d_model": 64, "encoder_ffn_dim": 128, "encoder_layers": 10, "num_hidden_layers": 10}
SMALL_AUDIO |= {"encoder_attention_heads": 4, "downsample_hidden_size": 8, "output_dim": 64}
STEP = 8 if TINY else 64  # utterances
STEPS_OF_CORPUS = 14
WARM, MEASURED, PROFILED = (1, 2, 1) if TINY else (3, 7, 2)
KINDS = {
    "matrix products": r"gemm|cutlass|xmma|nvjet|cublas|wgmma",
    "attention": r"flash|fmha|attention",
    "convolutions": r"conv|cudnn",
    "compiled": r"triton",
    "optimizer, clip": r"multi_tensor|foreach|adam",
    "copies": r"memcpy|memset|copy",
    "exchange": r"nccl",
    "reductions": r"reduce|softmax|norm",
    "element-wise": r"elementwise|vectorized|index|scatter|gather|cat",
}


def has_cuda() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cuda" if has_cuda() else "cpu")


def synchronize() -> None:
    if has_cuda():
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any], times: int = 20) -> float:
    """Of one call, after three."""
    for _ in range(3):
        run()
    synchronize()
    began = time.perf_counter()
    for _ in range(times):
        run()
    synchronize()
    return (time.perf_counter() - began) / times


# ----------------------------------------------------------------------------------------------------------- The world


def make_model_folder() -> None:
    """The demo's processor, and the real sizes."""
    config = transformers.AutoConfig.from_pretrained(ROOT / "demo" / "base")
    real = real_config()
    for part, like, small in (
        (config.text_config, real.text_config, SMALL_TEXT),
        (config.audio_config, real.audio_config, SMALL_AUDIO),
    ):
        for name, value in small.items():
            setattr(part, name, value if TINY else getattr(like, name))
    config.text_config.layer_types = ["full_attention"] * config.text_config.num_hidden_layers
    config.save_pretrained(WORK / "model")
    transformers.AutoProcessor.from_pretrained(ROOT / "demo" / "base").save_pretrained(WORK / "model")
    transformers.GenerationConfig.from_pretrained(ROOT / "demo" / "base").save_pretrained(WORK / "model")


def random_model(*_: Any, dtype: torch.dtype = torch.bfloat16, **__: Any) -> tuple[SpeechModel, dict[str, list]]:
    """Stands in for SpeechModel.from_pretrained."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # the same numbers, whatever type they are kept in
    try:
        with torch.device(device()):
            model = SpeechModel(transformers.AutoConfig.from_pretrained(WORK / "model"))
    finally:
        torch.set_default_dtype(torch.float32)
    model.tie_weights()
    model = model.to(dtype)
    model.generation_config = transformers.GenerationConfig.from_pretrained(WORK / "model")
    for module in model.modules():  # what is computed in fp32
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.float())
    return model, {"missing_keys": [], "mismatched_keys": []}


def settings(**changes: Any) -> TrainingConfig:
    corpus = [Source(str(WORK / "corpus"))]
    values: dict[str, Any] = {
        "model_name_or_path": str(WORK / "model"),
        "train_sources": corpus,
        "eval_sources": corpus,
    }
    values |= {"tracker": "none", "logging_steps": 10**6, "save_steps": 10**6, "check_ranks_steps": 10**6}
    values |= {"leak_min_words": 10**6, "drop_duplicates": False, "preprocessing_num_workers": 1}
    values |= {"max_characters_per_second": 1000.0, "min_characters_per_second": 0.0, "skip_hf_upload": True}
    values |= {"target_effective_batch": STEP, "dataloader_num_workers": 0 if TINY else 8, "eval_steps": 10**6}
    return dataclasses.replace(round2(), **values | changes)


def in_a_group_of_one() -> None:
    """Has the processes' library see one process, as torchrun starts it."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(29_500 + os.getpid() % 400)


def make_trainer(config: TrainingConfig, stage: int = 0, sharded: bool = False) -> GradualUnfreezeTrainer:
    config.stages = config.stages[stage : stage + 1]
    folder = Path(tempfile.mkdtemp(dir=WORK))
    SpeechModel.from_pretrained = staticmethod(random_model)
    rows = load_rows(config.train_sources, config, for_training=True)
    arguments = training_arguments(config, folder, cpu=not has_cuda())
    arguments.eval_on_start = False
    model, processor = load_to_train(config, use_bf16=True), load_processor(config.model_name_or_path)
    if sharded:  # over one process, which the trainer would not do
        shard(model, ever_trained(model, config.stages).keys(), arguments.device, True, config.bf16_exchange)
    trainer = GradualUnfreezeTrainer(config, arguments, model, processor, rows, rows, RunLog(folder, 0), use_bf16=True)
    trainer.evaluate = lambda **_: {}
    return trainer


# --------------------------------------------------------------------------------------------------------------- Parts


def machine() -> dict[str, Any]:
    """Versions, and what the device reaches at best."""
    names = ("torch", "transformers", "accelerate", "datasets", "huggingface_hub", "numpy")
    found: dict[str, Any] = {name: sys.modules[name].__version__ for name in names}
    found["python"] = sys.version.split()[0]
    if not has_cuda():
        return found
    found |= {"device": torch.cuda.get_device_name(), "capability": str(torch.cuda.get_device_capability())}
    found |= {"cuda": torch.version.cuda, "nccl": str(torch.cuda.nccl.version()), "known peak": peak_flops()}
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    big, one = torch.empty(2**29, device="cuda"), torch.zeros(1, device="cuda")
    pinned = torch.empty(2**28, pin_memory=True)
    found["matrix products, TFLOP/s"] = 2 * 8192**3 / seconds_of(lambda: left @ right) / 1e12
    found["copy, TB/s"] = 2 * big.nbytes / seconds_of(big.clone) / 1e12
    found["to pinned memory, GB/s"] = pinned.nbytes / seconds_of(lambda: pinned.copy_(big[: 2**28]), 3) / 1e9
    found["host, µs a launch"] = 1e6 * seconds_of(lambda: one.add_(1), 20_000)
    return found


def kernels() -> dict[str, Any]:
    """Whether the kernels that the training takes on a GPU are right, and what they take."""
    found: dict[str, Any] = {"wide products": loss_module.has_wide_products(device())}
    found["fused functions"] = fused.kernel_error(device()) or "right"
    if not has_cuda():
        return found
    found["attention"] = attention.kernel_error(attention.flash, device(), torch.bfloat16) or "right"
    lengths = np.maximum(20, np.random.default_rng(0).lognormal(math.log(100), 0.6, 25)).astype(int)
    for name, heads, keys, width, causal, longest in (
        ("llm", 16, 8, 128, True, 500),
        ("encoder", 16, 16, 64, False, 104),
    ):
        bounds = np.cumsum([0, *np.minimum(longest, lengths)])
        ends = torch.tensor(bounds, dtype=torch.int32, device="cuda")
        shapes = [(int(bounds[-1]), count, width) for count in (heads, keys, keys, heads)]
        query, key, value, gradient = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes)

        def run(
            kernel, dtype, inputs=(query, key, value), gradient=gradient, ends=ends, how=(longest, width**-0.5, causal)
        ):
            mine = [tensor.to(dtype).requires_grad_() for tensor in inputs]
            out = kernel(*mine, ends, *how)
            return [out.detach(), *torch.autograd.grad(out, mine, gradient.to(dtype))]

        exact, ours = run(attention.attend_padded, torch.float32), run(attention.flash, torch.bfloat16)
        found[f"{name}: error"] = max(
            ((a.float() - b).norm() / b.norm()).item() for a, b in zip(ours, exact, strict=True)
        )
        for label, kernel in (("flash", attention.flash), ("padded", attention.attend_padded)):
            found[f"{name}: {label}, ms"] = 1e3 * seconds_of(functools.partial(run, kernel, torch.bfloat16))
    return found


def profiled(profile: Any, steps: int) -> dict[str, Any]:
    seconds: Counter[str] = Counter()
    count = 0
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = event.name.lower()
            kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")
            seconds[kind] += (event.time_range.end - event.time_range.start) / 1e6
            count += 1
    by_kind = {f"{kind}, ms": 1e3 * total / steps for kind, total in seconds.most_common()}
    return {"busy, ms": 1e3 * sum(seconds.values()) / steps, "kernels": count // steps} | by_kind


def step_time(
    stage: int = 0,
    ddp: bool = False,
    sharded: bool = False,
    unfused: bool = False,
    expandable: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """The product's trainer for a few steps with its data in workers: medians, then two steps under the profiler."""
    if changes.get("torch_compile") and not has_cuda():
        return {"skipped": "no GPU; for a CPU the compiler takes minutes"}
    if expandable:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if unfused:
        mock.patch.object(fused, "has_fused", lambda: False).start()
    if ddp or sharded:
        in_a_group_of_one()
    trainer = make_trainer(settings(**changes), stage, sharded)
    activity = torch.profiler.ProfilerActivity.CUDA if has_cuda() else torch.profiler.ProfilerActivity.CPU
    profiler = torch.profiler.profile(activities=[activity])
    starts, ends, marks, found = [], [], [], {}

    class Mark(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            starts.append(time.perf_counter())
            if state.global_step == WARM and has_cuda():
                torch.cuda.reset_peak_memory_stats()
            if state.global_step == WARM + MEASURED:
                synchronize()
                profiler.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ends.append(time.perf_counter())
            window = trainer.window
            marks.append((window.audio_seconds, window.work, window.waited, window.computed[-1]))
            if state.global_step == WARM + MEASURED and has_cuda():
                found["peak, GB"] = torch.cuda.max_memory_allocated() / 1e9
                found["reserved, GB"] = torch.cuda.max_memory_reserved() / 1e9
            if state.global_step == WARM + MEASURED + PROFILED:
                synchronize()
                profiler.stop()
                control.should_training_stop = True

    trainer.add_callback(Mark())
    trainer.train()
    first, last = WARM - 1, WARM + MEASURED - 1
    walls = [end - before for before, end in zip(ends[first:last], ends[first + 1 : last + 1], strict=True)]
    work = Work(
        **{f.name: getattr(marks[last][1], f.name) - getattr(marks[first][1], f.name) for f in dataclasses.fields(Work)}
    )
    trains = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    operations = sum(flops(trainer.model.config, work, trains.__contains__).values())
    found |= {
        "ms": 1e3 * statistics.median(walls),
        "slowest, ms": 1e3 * max(walls),
        "first step, s": ends[0] - starts[0],
    }
    found["forward and backward, ms"] = 1e3 * statistics.median(mark[3] for mark in marks[first + 1 : last + 1])
    found["audio seconds a second"] = (marks[last][0] - marks[first][0]) / sum(walls)
    found["MFU"] = operations / sum(walls) / peak if (peak := peak_flops()) else None
    found["waited for data"] = (marks[last][2] - marks[first][2]) / sum(walls)
    found |= {
        "tokens a step": work.tokens / MEASURED,
        "layers": type(trainer.model.model.language_model.layers[0]).__name__,
    }
    found |= {"wrapped": type(trainer.model_wrapped).__name__, "split": trainer.split_micro_batches}
    found |= profiled(profiler, PROFILED)
    named = torch.cuda.get_device_name() if has_cuda() else "H100"
    known = next((name for name in DEVICES if name.split("-")[0] in named), None)
    if known:
        planned = make_plan(settings(plan_device=known, plan_devices=1, **changes)).stages[stage]
        found |= {
            "planned, ms": str([round(1e3 * s) for s in planned.step_seconds]),
            "planned, GB": planned.peak_bytes / 1e9,
        }
    return found


def out_of_memory() -> dict[str, Any]:
    """A device that holds half of what a step needs at once: the step is done in parts."""
    if not has_cuda():
        return {"skipped": "no GPU"}
    config = settings(tokens_per_micro_batch=16_384, max_steps=2, dataloader_num_workers=0)
    trainer = make_trainer(config)
    torch.cuda.set_per_process_memory_fraction(min(1.0, 36e9 / torch.cuda.get_device_properties(0).total_memory))
    trainer.train()
    return {"split": trainer.split_micro_batches, "steps": trainer.state.global_step}


def evaluation() -> dict[str, Any]:
    """Decoding as in training and as the final bf16 model; nothing ends a text."""
    found: dict[str, Any] = {}
    tokens = 4 if TINY else 24
    trainer = make_trainer(settings(dataloader_num_workers=0))
    rows = np.argsort(trainer.eval_dataset.rows.seconds)[len(trainer.eval_dataset) // 2 :][: 8 if TINY else 256]
    utterances = [trainer.eval_dataset[(0, row)] for row in rows.tolist()]
    final, _ = random_model()
    for name, model in (("in training", trainer.model), ("final, bf16", final.to(device()))):
        model.eval().generation_config.eos_token_id = None
        for size in (4, 8) if TINY else (32, 128, 256):
            batch = trainer.collator(utterances[:size], training=False)
            run = lambda most, model=model, batch=batch, size=size: generation.generate(model, batch, [most] * size)  # noqa: E731
            run(2)
            times = []
            for most in (2, tokens):
                synchronize()
                began = time.perf_counter()
                run(most)
                synchronize()
                times.append(time.perf_counter() - began)
            found[f"{name}, {size} rows: ms a token"] = 1e3 * (times[1] - times[0]) / (tokens - 2)
            found[f"{name}, {size} rows: ms for prompt and encoder"] = 1e3 * times[0]
    if has_cuda():
        found["peak, GB"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def same_texts() -> dict[str, Any]:
    """Whether the demo's trained model writes in bf16 what it writes in fp32, and what its errors are in both."""
    config = dataclasses.replace(settings(), model_name_or_path=str(DEMO / "tuned"))
    processor = load_processor(config.model_name_or_path)
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    rows = load_rows([Source(str(DEMO / "heldout"), split="test")], config, for_training=False)
    order = np.argsort(rows.seconds)[: 8 if TINY else None].tolist()
    dataset = SpeechDataset(rows, processor, config, training=False)
    utterances = [dataset[(0, row)] for row in order]
    references = [rows.column("reference")[row] for row in order]
    texts: dict[bool, list[str]] = {False: [], True: []}
    for use_bf16, mine in texts.items():
        model = load_model(config.model_name_or_path, use_bf16).to(device()).eval()
        for begin in range(0, len(utterances), 32):
            batch = collator(utterances[begin : begin + 32], training=False)
            limits = [
                generation.new_token_limit(count / FRAMES_PER_CHUNK)
                for count in batch["input_features_mask"].sum(dim=1).tolist()
            ]
            mine += [text for _, text in collator.read(generation.generate(model, batch, limits))]
    equal = sum(one == other for one, other in zip(*texts.values(), strict=True))
    wer = {use_bf16: score(references, mine)["wer"] for use_bf16, mine in texts.items()}
    return {"texts": len(references), "equal": equal, "WER fp32": wer[False], "WER bf16": wer[True]}


def rollouts() -> dict[str, Any]:
    """Round 3's samples, drawn by as many calls as its settings make, and by one; its log p in fp32 and in TF32."""
    found: dict[str, Any] = {}
    config = round3()
    limit, heard = (4, 2) if TINY else (24, 32)
    trainer = make_trainer(settings(dataloader_num_workers=0))
    trainer.model.eval()
    sampler = GenerateSampler(trainer.model, trainer.collator.end_of_turn_id, config.temperature, trainer.autocast)
    sampler.ends = set()  # nothing ends a text
    trainer.model.generation_config.eos_token_id = None
    utterances = [trainer.feed.dataset[(1, number)] for number in range(heard)]
    prompts = [prompt_of(utterance, trainer.collator, 0, config.group_size, limit) for utterance in utterances]
    for name, budget in (("by its settings", config.rollout_tokens_at_once), ("at once", 10**9)):
        batches = batches_of(prompts, budget)
        times = []
        for _ in range(2):
            synchronize()
            began = time.perf_counter()
            for places in batches:
                sampler.sample([prompts[place] for place in places])
            synchronize()
            times.append(time.perf_counter() - began)
        found |= {f"{name}: calls": len(batches), f"{name}: rows": max(map(len, batches)) * config.group_size}
        found[f"{name}: tokens a second"] = heard * config.group_size * limit / times[1]
    weight = trainer.model.lm_head.weight.detach()
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(64 if TINY else 4096, weight.shape[1], generator=random).to(device()).requires_grad_()
    targets = torch.randint(len(weight), (len(hidden),), generator=random).to(device())

    def log_p() -> torch.Tensor:
        value = loss_module.token_log_probs(hidden, weight, targets, 1.0)[0]
        value.sum().backward()
        return value.detach()

    values = {}
    for name, how in (("TF32", loss_module.in_tf32), ("fp32", contextlib.nullcontext)):
        with mock.patch.object(loss_module, "in_tf32", how):
            values[name] = log_p()
            found[f"log p, {name}: ms"] = 1e3 * seconds_of(log_p, 3)
    found["largest error of a log p by TF32"] = (values["TF32"] - values["fp32"]).abs().max().item()
    return found | ({"peak, GB": torch.cuda.max_memory_allocated() / 1e9} if has_cuda() else {})


class Waits(TorchDispatchMode):
    """Counts operators after which the host must know a number, and the line of this project that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in WAITING:
            mine = [frame for frame in traceback.extract_stack() if "torch/" not in frame.filename][-2]
            self.found[f"{Path(mine.filename).name}:{mine.lineno}"] += 1
        return func(*args, **(kwargs or {}))


def synchronisations() -> dict[str, Any]:
    """Where one step has the host wait for the device, as CUDA warns of it; on a CPU, where it asks for any number."""
    trainer = make_trainer(settings(dataloader_num_workers=0, max_steps=3))
    waits, caught = Waits(), warnings.catch_warnings(record=True)
    seen: list[Any] = []

    class Mark(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1 and has_cuda():
                seen.append(caught.__enter__())
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
            elif state.global_step == 1:
                waits.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2 and has_cuda():
                torch.cuda.set_sync_debug_mode("default")
                caught.__exit__(None, None, None)
            elif state.global_step == 2:
                waits.__exit__(None, None, None)

    trainer.add_callback(Mark())
    trainer.train()
    places = Counter(
        f"{Path(warning.filename).name}:{warning.lineno}"
        for found in seen
        for warning in found
        if "synchroniz" in str(warning.message)
    )
    counted = places or waits.found
    return {"a step": sum(counted.values()), "where": str(dict(counted.most_common(12)))}


def checkpoint() -> dict[str, Any]:
    """Two saves: how long training stands still, and how long writing and verifying take."""
    trainer = make_trainer(settings(max_steps=2, save_steps=1, save_total_limit=1, dataloader_num_workers=0), 1)
    lines: list[str] = []
    trainer.writer.say = lines.append
    trainer.train()
    trainer.writer.wait()
    folder = store.names(trainer.writer.parent)[0]
    began = time.perf_counter()
    store.verify(folder)
    found = {"verify, s": time.perf_counter() - began, "stalls, s": str([round(s, 3) for s in trainer.writer.stalls])}
    return found | {"GB": sum(file.stat().st_size for file in folder.iterdir()) / 1e9, "said": str(lines)}


def official() -> dict[str, Any]:
    """The published recipe on the same utterances: batches of 32 at random, all parameters in bf16, all logits."""
    model, _ = random_model()
    model = model.to(device()).train()
    forward = functools.partial(transformers.Qwen3ASRForConditionalGeneration.forward, model)
    processor = load_processor(str(WORK / "model"))
    rows = load_rows([Source(str(WORK / "corpus"))], settings(), for_training=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=has_cuda() or None)
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    at_once, walls = STEP // 2, []
    for begin in range(0, (2 if TINY else 5) * STEP, STEP):
        parts = []
        for start in range(begin, begin + STEP, at_once):
            batch = step_benchmark.official_batch(processor, [rows[i] for i in order[start : start + at_once]])
            parts.append(
                {n: t.to(device(), torch.bfloat16 if t.is_floating_point() else None) for n, t in batch.items()}
            )
        synchronize()
        began = time.perf_counter()
        for part in parts:
            (forward(**part).loss / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        walls.append(time.perf_counter() - began)
    return {"ms, its data not counted": 1e3 * statistics.median(walls[1:])}


def token_budget() -> dict[str, Any]:
    if not has_cuda():
        return {"skipped": "no GPU"}
    config = settings()
    collator = make_trainer(settings()).collator
    model = load_to_train(config, use_bf16=True)
    torch.cuda.set_per_process_memory_fraction(USABLE)
    budget, most = search(config, model, collator, device(), True, 1)
    return {"fits": budget, "a step at most": most}


def demo() -> dict[str, Any]:
    """The demo by torchrun with one process: the stage switch, a signal, the resumption."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command += [
        str(ROOT / "train_round2_gradual.py"),
        "--demo",
        "--tracker",
        "none",
        "--output_dir",
        str(WORK / "demo"),
    ]
    command += ["--save_steps", "50", "--eval_steps", "145", "--num_epochs", "3"]
    if TINY:
        command += [
            "--max_steps",
            "6",
            "--target_effective_batch",
            "4",
            "--max_eval_utterances",
            "8",
            "--save_steps",
            "2",
        ]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    signalled = False
    for line in first.stdout or ():
        if line.startswith("checkpoint step-") and not signalled:
            signalled = True
            first.send_signal(signal.SIGTERM)
    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    said = [line for line in second.stdout.splitlines() if re.match(r"attention|stage |resumed|WER ", line)]
    return {"stopped with": first.wait(), "went on with": second.returncode, "said": " | ".join(said[-6:])}


share_of_eight = max(1, STEP // 8)
PARTS: dict[str, tuple[float, Callable[[], dict[str, Any]]]] = {  # seconds at most, and what runs
    "machine": (40, machine),
    "kernels": (90, kernels),
    "step_B": (90, step_time),
    "step_A": (60, functools.partial(step_time, 1)),
    "step_B_share_of_8": (60, functools.partial(step_time, target_effective_batch=share_of_eight)),
    "same_texts": (60, same_texts),
    "step_B_unfused": (45, functools.partial(step_time, unfused=True)),
    "step_B_ddp": (60, functools.partial(step_time, ddp=True)),
    "step_B_share_of_8_sharded": (
        60,
        functools.partial(step_time, sharded=True, target_effective_batch=share_of_eight),
    ),
    "synchronisations": (45, synchronisations),
    "out_of_memory": (60, out_of_memory),
    "official": (60, official),
    "evaluation": (60, evaluation),
    "step_B_one_micro_batch": (60, functools.partial(step_time, tokens_per_micro_batch=16_384)),
    "checkpoint": (90, checkpoint),
    "rollouts": (60, rollouts),
    "step_A_share_of_8": (60, functools.partial(step_time, 1, target_effective_batch=share_of_eight)),
    "step_B_compiled": (150, functools.partial(step_time, torch_compile=True)),
    "step_B_share_of_8_compiled": (
        150,
        functools.partial(step_time, torch_compile=True, target_effective_batch=share_of_eight),
    ),
    "demo": (170, demo),
    "token_budget": (60, token_budget),
    "step_B_bf16_exchange": (60, functools.partial(step_time, ddp=True, bf16_exchange=True)),
    "step_B_muon": (60, functools.partial(step_time, optimizer="muon")),
    "step_B_sdpa": (45, functools.partial(step_time, attention="sdpa")),
    "step_B_checkpointing": (60, functools.partial(step_time, gradient_checkpointing=True)),
    "step_B_expandable_segments": (60, functools.partial(step_time, expandable=True)),
}


def in_child(name: str, function: Callable[[], dict[str, Any]], limit: float) -> dict[str, Any]:
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

    def run() -> None:
        os.setsid()
        log = (WORK / f"{name}.log").open("w")
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        torch.set_num_threads(1 if TINY else 4)
        try:
            sender.send(function())
        except BaseException as error:
            where = traceback.format_exc().splitlines()[-6:]
            sender.send({"failed": f"{type(error).__name__}: {str(error).strip()[:300]}", "at": " | ".join(where)})
        log.flush()
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=run)
    began = time.perf_counter()
    child.start()
    assert child.pid is not None
    sender.close()
    try:
        result = receiver.recv() if receiver.poll(limit) else {"failed": f"not done in {limit:.0f} s"}
    except EOFError:
        result = {"failed": "it died", "log": (WORK / f"{name}.log").read_text()[-600:]}
    if child.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    child.join(5)
    return result | {"took, s": time.perf_counter() - began}


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """The steps beside the plan."""
    columns = ("ms", "planned, ms", "MFU", "busy, ms", "kernels", "audio seconds a second", "peak, GB", "planned, GB")
    lines = [f"| | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    for name, result in results.items():
        if name.startswith("step_") and "ms" in result:
            lines.append(f"| {name} | {' | '.join(shown(result.get(column, '')) for column in columns)} |")
    return lines


def main() -> None:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="small widths, also without a GPU")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    quiet_libraries(False)
    make_model_folder()
    step_benchmark.make_corpus(WORK / "corpus", STEPS_OF_CORPUS * STEP)
    print(f"world made in {time.perf_counter() - started:.0f} s", flush=True)
    results: dict[str, dict[str, Any]] = {}
    for name in options.parts:
        limit, function = PARTS[name]
        left = 60 * options.minutes - (time.perf_counter() - started)
        if left < 10:
            results[name] = {"failed": "no time was left"}
        else:
            results[name] = in_child(name, function, min(limit, left))
        options.json.write_text(json.dumps(results, indent=1, default=str))
        print(f"{name}: " + "; ".join(f"{key} {shown(value)}" for key, value in results[name].items()), flush=True)
    print(*table(results), sep="\n")
    if any("failed" in result for result in results.values()):
        sys.exit(f"a part failed; what each part said is in {WORK}")
    shutil.rmtree(WORK)


if __name__ == "__main__":
    main()
