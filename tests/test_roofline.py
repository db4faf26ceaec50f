"""The roofline's kernels are those a model really runs, and its operations those the configuration gives."""

from collections import Counter

import gpu_stand_ins
import numpy as np
import pytest
import torch

from hebrew_asr.model import attention, fused, roofline
from hebrew_asr.model.costs import flops, real_config
from hebrew_asr.model.loading import load_model
from hebrew_asr.model.roofline import DEVICES, Efficiency, Recorder, Trained, as_on_cuda, made_up_batch, step, trace
from hebrew_asr.model.stages import freeze_for, trains_in
from train_round2_gradual import round2


@pytest.fixture
def mixed(config):
    """The demo's model as it trains on a GPU: frozen weights in bf16, attention told where utterances end."""
    model = load_model(config.model_name_or_path, use_bf16=True, stages=config.stages)
    attention.register()
    for part in (model.config.text_config, model.config.audio_config):
        part._attn_implementation_internal = attention.VARLEN
    fused.fuse(model)
    return model


def batch_for(config):
    return made_up_batch(np.array([1.3, 9.7, 0.6, 3.2]), np.array([8, 40, 5, 16]), config.audio_token_id)


@pytest.mark.parametrize(("number", "sharded"), [(0, False), (1, False), (0, True), (1, True)])
def test_what_runs_on_fakes_is_what_runs(config, mixed, monkeypatch, number, sharded):
    """Operator for operator, with its bytes and its place in the model, though fewer layers run on fakes."""
    monkeypatch.setattr(attention, "varlen_attn", gpu_stand_ins.varlen_attn)
    stages = config.stages
    freeze_for(mixed, stages[number])
    for parameter in mixed.parameters():
        parameter.data = parameter.data.bfloat16() if sharded else parameter.data
    batch = batch_for(mixed.config)
    with as_on_cuda(), Recorder(mixed, batch) as recorder:
        with torch.autocast("cpu", torch.bfloat16):
            loss = mixed(**batch, root_scale=1.0).loss
        loss.backward()
    really = Counter(
        (roofline.part_of(module), kernel.name, kernel.is_backward, kernel.operations, kernel.bytes)
        for module, kernel in recorder.notes
    )
    computed = trace(
        mixed.config,
        batch,
        lambda name: trains_in(name, stages[number], mixed.config),
        lambda name: any(trains_in(name, stage, mixed.config) for stage in stages),
        sharded=sharded,
    )
    assert sharded != any(kernel.is_copy_of_weight for kernel in computed.kernels), "nothing is left to be cast"
    fakes = Counter()
    for kernel in computed.kernels:
        fakes[kernel.part, kernel.name, kernel.is_backward, kernel.operations, kernel.bytes] += kernel.times
    assert fakes == really
    waits = Counter(f"{operator} in {roofline.part_of(module)}" for module, operator in recorder.waits)
    assert computed.synchronisations == waits


@pytest.mark.parametrize("number", [0, 1])
def test_the_real_model_has_the_operations_of_its_configuration(number):
    config, stages = real_config(), round2().stages
    config.audio_token_id = 151_676

    def trains(name):
        return trains_in(name, stages[number], config)

    computed = trace(config, batch_for(config), trains)
    assert computed.operations == pytest.approx(sum(flops(config, computed.work, trains).values()), rel=0.02)
    assert {kernel.part for kernel in computed.kernels} == set(roofline.PARTS)


def test_a_step_is_the_sum_of_what_its_kernels_and_its_gradients_take():
    """By hand: a kernel bound by operations, one by memory, one by its launch; and passes over 10⁹ gradients."""
    a100 = DEVICES["A100-40GB"]
    exact = Efficiency(1, 1, 1e-6)
    kernels = [
        roofline.Kernel("llm", "mm", False, 312e9, 10**6, in_bf16=True, times=2),
        roofline.Kernel("llm", "add", True, 0, 1_555_000_000, in_bf16=True),
        roofline.Kernel("encoder", "mul", False, 0, 8, in_bf16=False),
    ]
    micro_batch = roofline.Trace(roofline.Work(), kernels)
    alone = step([micro_batch], Trained(10**9, 0), 1, a100, exact)
    assert alone.parts["llm"] == pytest.approx(3e-3) and alone.parts["encoder"] == 1e-6
    assert alone.parts["AdamW"] == pytest.approx(8 * 4e9 / 1.555e12)
    assert alone.parts["exchange"] == 0
    assert alone.parts["adding up gradients"] == 0
    copied = roofline.Kernel("llm", "_to_copy", False, 0, 1_555_000_000, in_bf16=False, is_copy_of_weight=True)
    twice = step([roofline.Trace(roofline.Work(), [copied])] * 2, Trained(10**9, 0), 1, a100, exact)
    assert twice.parts["llm"] == pytest.approx(1e-3), "autocast copies a weight once a step"
    assert twice.parts["adding up gradients"] == pytest.approx(3 * 4e9 / 1.555e12)
    assert alone.mfu(a100) == pytest.approx(2 * 312e9 / 312e12 / alone.seconds)
    of_eight = step([micro_batch], Trained(10**9, 10**8), 8, a100, exact)
    exchange = 2 * 7 / 8 * 4e9 / 230e9
    assert of_eight.parts["exchange"] == pytest.approx(exchange)
    halved = step([micro_batch], Trained(10**9, 10**8), 8, a100, exact, bf16_exchange=True)
    assert halved.parts["exchange"] == pytest.approx(exchange / 2)
    overlapped = step([micro_batch], Trained(10**9, 10**8), 8, a100, Efficiency(1, 1, 1e-6, overlapped=True))
    assert overlapped.parts["exchange"] == pytest.approx(exchange - 1e-3), "behind a backward pass of 1 ms"


def test_a_sharded_step_exchanges_bf16_weights_and_updates_a_part():
    """By hand: 10⁹ numbers train, 2·10⁸ of them outside of layers; 10⁸ in layers are gathered and frozen; 8 ranks."""
    a100, way = DEVICES["A100-40GB"], 7 / 8 / 230e9
    kernels = [
        roofline.Kernel("llm", "mm", False, 312e9, 8, in_bf16=True),
        roofline.Kernel("llm", "mm", True, 2 * 312e9, 8, in_bf16=True),
    ]
    trained = Trained(10**9, 10**8, 2 * 10**8, 11 * 10**8)

    def parts(count=1, bf16_exchange=False, overlapped=False):
        traces = [roofline.Trace(roofline.Work(), kernels, sharded=True)] * count
        return step(traces, trained, 8, a100, Efficiency(1, 1, 1e-6, overlapped), bf16_exchange).parts

    once = parts()
    assert once["AdamW"] + once["clip"] == pytest.approx(10 * 4e9 / 8 / 1.555e12)
    assert once["adding up gradients"] == 0
    gathered = 1.1e9 + 0.8e9  # forward, and the layers that train again
    assert once["exchange"] == pytest.approx(way * (2 * gathered + 4e9))
    copied = gathered * (2 + 2) + gathered / 8 * (4 + 2) + 1e9 * (2 + 4) + 1e9 / 8 * (4 + 4)
    assert once["copies to exchange"] == pytest.approx(copied / 1.555e12)
    assert parts(bf16_exchange=True)["exchange"] == pytest.approx(way * (2 * gathered + 2e9))
    thrice = parts(3)
    assert thrice["exchange"] == pytest.approx(way * (3 * 2 * gathered + 4e9))
    assert thrice["adding up gradients"] == pytest.approx(1e9 * ((2 + 4) + 2 * (4 + 2 + 4)) / 1.555e12)
    hidden = way * 2 * 0.9e9 - 1e-3, way * 0.8e9 * (2 + 4) - 2e-3
    assert parts(overlapped=True)["exchange"] == pytest.approx(way * 0.2e9 * (2 + 4) + sum(hidden))
