"""What a step of the real models would take on GPUs, kernel by kernel, computed on a CPU.

    uv run python benchmarks/roofline.py [--models 1.7B] [--devices H100] [--ranks 1 8] [--fsdp] [--bf16_exchange]
        [--kernels] [--json FILE]

The training's own step, of 64 utterances with log-normal durations (6 s on average) dealt to the ranks as in training,
runs on fake tensors (hebrew_asr/model/roofline.py). The rank with the most tokens is shown. `ms` has matrix products at
65 % of the data sheet, memory at 85 %, 4 µs for the smallest kernel, and the exchange after the backward pass; the
range goes from 75 %, 90 %, 3 µs and an overlapped exchange to 50 %, 75 %, 5 µs. The host is assumed never to delay.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from hebrew_asr.model.costs import flops, real_config, small_config
from hebrew_asr.model.packing import deal_step
from hebrew_asr.model.roofline import (
    DEVICES,
    OPTIMISTIC,
    PARTS,
    PESSIMISTIC,
    Efficiency,
    Trace,
    Trained,
    made_up_batch,
    step,
    trace,
)
from hebrew_asr.model.stages import Stage, trains_in
from hebrew_asr.training.plan import LABELS_AROUND, TEXT_TOKENS_PER_SECOND, Weights, assumed_durations, tokens_of
from train_round2_gradual import round2

MODELS = {"1.7B": real_config, "0.6B": small_config}
STEP = 64  # utterances


def trains_by(config: Any, *stages: Stage) -> Callable[[str], bool]:
    """Whether a parameter, given by its name, trains in one of the stages."""
    return lambda name: any(trains_in(name, stage, config) for stage in stages)


def traces_of(config: Any, stages: list[Stage], stage: Stage, ranks: int, budget: int, sharded: bool) -> list[Trace]:
    """The micro-batches of the rank with the most tokens."""
    seconds = assumed_durations(6.0, 30.0)[:STEP]
    tokens = tokens_of(seconds)
    dealt = deal_step(tokens, ranks, budget)
    mine = max(dealt, key=lambda batches: sum(tokens[places].sum() for places in batches))
    found = []
    for places in mine:
        labels = np.round(LABELS_AROUND + TEXT_TOKENS_PER_SECOND * seconds[places]).astype(int)
        batch = made_up_batch(seconds[places], labels, config.audio_token_id)
        trains, ever_trains = trains_by(config, stage), trains_by(config, *stages)
        found.append(trace(config, batch, trains, ever_trains, sharded=sharded))
    return found


def row(
    model: str, device: str, ranks: int, stage: str, traces: list[Trace], trained: Trained, bf16_exchange: bool
) -> dict[str, Any]:
    likely, best, worst = (
        step(traces, trained, ranks, DEVICES[device], efficiency, bf16_exchange)
        for efficiency in (Efficiency(), OPTIMISTIC, PESSIMISTIC)
    )
    return {
        "model": model,
        "device": device,
        "ranks": ranks,
        "stage": stage,
        "micro-batches": len(traces),
        "tokens": sum(t.work.tokens for t in traces),
        "TFLOP": sum(t.operations for t in traces) / 1e12,
        "GB": sum(t.bytes for t in traces) / 1e9,
        "kernels": likely.launches,
        "waits": sum(sum(t.synchronisations.values()) for t in traces),
        **{f"{part}, ms": 1e3 * seconds for part, seconds in likely.parts.items()},
        "ms": 1e3 * likely.seconds,
        "from": 1e3 * best.seconds,
        "to": 1e3 * worst.seconds,
        "MFU, %": 100 * likely.mfu(DEVICES[device]),
    }


def shown(value: Any) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else str(value)


def kernels_of(traces: list[Trace], device: str) -> list[str]:
    """The operators that take longest, by part."""
    seconds: Counter[tuple[str, str]] = Counter()
    launches: Counter[tuple[str, str]] = Counter()
    gigabytes: Counter[tuple[str, str]] = Counter()
    for kernel in (kernel for t in traces for kernel in t.kernels):
        key = kernel.part, kernel.name
        seconds[key] += kernel.seconds(DEVICES[device], Efficiency())
        launches[key] += kernel.times
        gigabytes[key] += kernel.times * kernel.bytes / 1e9
    return [
        f"  {part:<20} {name:<32} {1e3 * total:7.2f} ms {launches[part, name]:6d} × {gigabytes[part, name]:7.2f} GB"
        for (part, name), total in seconds.most_common(25)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--devices", nargs="+", default=list(DEVICES), choices=list(DEVICES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--budget", type=int, default=round2().tokens_per_micro_batch)
    parser.add_argument("--bf16_exchange", action="store_true", help="as the training's option of this name")
    parser.add_argument("--fsdp", action="store_true", help="likewise; nothing is sharded over one rank")
    parser.add_argument("--kernels", action="store_true", help="also the operators that take longest")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stages = round2().stages
    rows = []
    for model in options.models:
        config = MODELS[model]()
        config.audio_token_id = 151_676
        shapes = Weights.of(config).shapes
        for stage in stages:
            trains = trains_by(config, stage)
            trained = Trained.of(config, shapes, trains, trains_by(config, *stages))
            for ranks in options.ranks:
                traces = traces_of(config, stages, stage, ranks, options.budget, options.fsdp and ranks > 1)
                counted = sum(sum(flops(config, t.work, trains).values()) for t in traces)
                print(
                    f"{model}, stage {stage.name}, {ranks} ranks: {sum(t.operations for t in traces) / 1e12:.2f} TFLOP"
                    f" run, {counted / 1e12:.2f} counted from the configuration | a micro-batch waits at:"
                    f" {dict(traces[0].synchronisations)}"
                )
                for device in options.devices:
                    rows.append(row(model, device, ranks, stage.name, traces, trained, options.bf16_exchange))
                    if options.kernels:
                        print(*kernels_of(traces, device), sep="\n")
    names = [name for name in rows[0] if name.removesuffix(", ms") not in PARTS]
    print("\n| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for each in rows:
        print("| " + " | ".join(shown(each[name]) for name in names) + " |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
