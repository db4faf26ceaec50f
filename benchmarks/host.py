"""CPU time of Python and dispatch for one micro-batch of the 1.7B: what the host must do to feed a GPU.

    uv run python benchmarks/host.py [--rounds 40] [--compiled]

A model of the 1.7B's depth (24 and 28 layers) and tiny widths runs a GPU's way on a CPU, in stage B of Round 2, where a
kernel on so small tensors takes microseconds: what is left is the host's. Attention is a stand-in of one operator. The
fused functions (hebrew_asr/model/fused.py) are an operator for each tensor they return. With --compiled they are called
as on a GPU, and these operators stand in for the kernels. `before` has neither the fused functions, nor places found
beforehand, nor weights' copies that stay for all micro-batches of a step, nor the head's few passes. Both take turns.
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import transformers
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from hebrew_asr.files import DEMO
from hebrew_asr.model import attention, fused, loss
from hebrew_asr.model.loss import SpeechModel
from hebrew_asr.model.roofline import as_on_cuda, made_up_batch
from hebrew_asr.model.stages import ever_trained, freeze_for
from train_round2_gradual import round2

TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 28, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 16}
AUDIO = {"d_model": 64, "encoder_ffn_dim": 128, "encoder_layers": 24, "encoder_attention_heads": 4}
AUDIO |= {"downsample_hidden_size": 8, "output_dim": 64}
MICRO_BATCHES = 3  # of a step
PLACES = ("encoder_places", "audio_places", "label_places")


@torch.library.custom_op("host::attend", mutates_args={})
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return query.clone()


@torch.library.custom_op("host::attend_backward", mutates_args={})
def attend_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return gradient.clone(), key.clone(), value.clone()


attend.register_autograd(
    lambda ctx, gradient: attend_backward(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def tiny_model(is_fused: bool) -> SpeechModel:
    config = transformers.AutoConfig.from_pretrained(DEMO / "base")
    for part, sizes in ((config.text_config, TEXT), (config.audio_config, AUDIO)):
        for name, value in sizes.items():
            setattr(part, name, value)
    config.text_config.layer_types = ["full_attention"] * config.text_config.num_hidden_layers
    torch.manual_seed(0)
    model = SpeechModel(config).train()
    stages = round2().stages
    trained = ever_trained(model, stages)
    for name, parameter in model.named_parameters():
        if name not in trained:
            parameter.data = parameter.data.bfloat16()
    attention.register()
    for part in (model.config.text_config, model.config.audio_config):
        part._attn_implementation_internal = attention.VARLEN
    if is_fused:
        fused.fuse(model)
    freeze_for(model, stages[0])
    return model


KNOWN: dict[tuple, tuple[list, bool]] = {}  # shapes and types of what a function returned, and whether in a tuple


def stand_in(function: Callable, *args: Any) -> Any:
    """What a function returns, of which only shapes count, in one operator for each tensor."""
    shapes = KNOWN.get((function, *(getattr(a, "shape", a) for a in args)))
    if shapes is None:
        out = function(*args)
        outs = out if isinstance(out, tuple) else (out,)
        shapes = [(one.shape, one.dtype) for one in outs], isinstance(out, tuple)
        KNOWN[(function, *(getattr(a, "shape", a) for a in args))] = shapes
    made = tuple(torch.zeros(shape, dtype=dtype) for shape, dtype in shapes[0])
    return made if shapes[1] else made[0]


def as_operators(*calls: fused.Call) -> list[torch.Tensor]:
    """What `fused.run` returns, of which only shapes count."""
    return fused.as_they_stand(*((stand_in, (function, *args)) for function, args in calls))


def without_kernels(_: str) -> Callable:
    """A compiler of all that is done at a call but its kernels, for which there are stand-ins."""

    def stand_in_for_kernels(graph: torch.fx.GraphModule, inputs: Any) -> Callable:
        return make_boxed_func(lambda *args: stand_in(graph, *args))

    return aot_autograd(fw_compiler=stand_in_for_kernels)


@contextlib.contextmanager
def before() -> Iterator[None]:
    with mock.patch.object(loss, "spares_passes", lambda _: False):
        yield


def seconds(model: SpeechModel, batch: dict[str, torch.Tensor], keeps_copies: bool) -> float:
    """CPU time of a micro-batch in a step of MICRO_BATCHES."""
    model.zero_grad()
    began = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=keeps_copies), torch.autocast("cpu", enabled=False):
        for _ in range(MICRO_BATCHES):
            with torch.autocast("cpu", torch.bfloat16):
                total = model(**batch, root_scale=1.0).loss
            total.backward()
    return (time.process_time() - began) / MICRO_BATCHES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--compiled", action="store_true", help="with what is done to call a kernel")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = {"before": tiny_model(is_fused=False), "now": tiny_model(is_fused=True)}
    batch = made_up_batch(np.array([3.0, 5.0]), np.array([15, 25]), models["now"].config.audio_token_id)
    found: dict[str, list[float]] = {"before": [], "now": []}
    with (
        mock.patch.object(attention, "varlen_attn", lambda q, k, v, *_, **__: attend(q, k, v)),
        mock.patch.object(fused, "run", fused.launch if options.compiled else as_operators),
        mock.patch.object(torch._dynamo, "lookup_backend", without_kernels),
        as_on_cuda(),
        mock.patch.object(loss, "has_wide_products", lambda _: False),  # a kernel that a CPU has not
    ):
        for number in range(options.rounds + 3):
            with before():
                old = {name: tensor for name, tensor in batch.items() if name not in PLACES}
                first = seconds(models["before"], old, keeps_copies=False)
            second = seconds(models["now"], batch, keeps_copies=True)
            if number >= 3:
                found["before"].append(first)
                found["now"].append(second)
    for name, values in found.items():
        print(f"{name}: {1e3 * min(values):.1f} ms at the least, median {1e3 * statistics.median(values):.1f}")
    ratios = [now / then for then, now in zip(found["before"], found["now"], strict=True)]
    print(f"now / before: {min(found['now']) / min(found['before']):.2f}, median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
