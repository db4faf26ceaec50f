"""Norms, rotary positions and gated products in few kernels are transformers' own: loss, gradients, ten steps."""

import re
import warnings
from types import SimpleNamespace

import gpu_stand_ins
import numpy as np
import pytest
import torch
import torch._inductor.config
from torch._inductor.graph import GraphLowering

from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.model import attention, fused
from hebrew_asr.model.loading import load_to_train
from hebrew_asr.model.stages import freeze_for
from train_hebrew_asr_enhanced import DataCollatorSpeechSeq2SeqWithPadding

ONLY_ROUNDING = "k_proj.bias"  # of the encoder: its gradient is zero but for that


@pytest.fixture
def batches(config, processor, train_rows):
    config.use_specaugment = False
    dataset = SpeechDataset(train_rows, processor, config, training=True)
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    several = collator.packed([dataset[(1, row)] for row in range(6)])
    collator.in_one_row = True
    return [several, *(collator.packed([dataset[(1, row)] for row in rows]) for rows in np.split(np.arange(20), 10))]


@pytest.fixture
def load(config, monkeypatch):
    """Loads the demo's model, attending as on a GPU up to the kernel."""

    monkeypatch.setattr(attention, "varlen_attn", gpu_stand_ins.varlen_attn)
    monkeypatch.setattr(attention, "FLASH_TYPES", (torch.float32, torch.bfloat16))
    attention.register()

    def load_model(is_fused, stage, use_bf16=False):
        model = load_to_train(config, use_bf16)
        for part in (model.config.text_config, model.config.audio_config):
            part._attn_implementation_internal = attention.VARLEN
        if is_fused:
            fused.fuse(model)
        freeze_for(model, config.stages[stage])
        return model.train()

    return load_model


def gradients(model, batch, use_bf16):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):
        loss = model(**batch).loss
    loss.backward()
    return loss.item(), {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not name.endswith(ONLY_ROUNDING)
    }


@pytest.mark.parametrize("stage", [0, 1])
def test_fp32_is_the_same_to_rounding(load, batches, stage):
    plain, few = load(False, stage), load(True, stage)
    assert [*few.state_dict()] == [*plain.state_dict()]
    for batch in batches[:2]:
        expected, of_plain = gradients(plain, batch, False)
        found, of_few = gradients(few, batch, False)
        assert found == pytest.approx(expected, rel=5e-6)
        assert of_few.keys() == of_plain.keys()
        for name, gradient in of_plain.items():
            assert (of_few[name] - gradient).norm() <= 3e-5 * gradient.norm(), name


@pytest.mark.parametrize("stage", [0, 1])
def test_bf16_is_no_further_from_fp32(load, batches, stage):
    exact_loss, exact = gradients(load(False, stage), batches[1], False)
    errors = {}
    for is_fused in (False, True):
        loss, found = gradients(load(is_fused, stage, use_bf16=True), batches[1], True)
        assert loss == pytest.approx(exact_loss, rel=2e-2)
        errors[is_fused] = {name: ((found[name] - g).norm() / g.norm()).item() for name, g in exact.items()}
    assert np.mean([*errors[True].values()]) <= 1.05 * np.mean([*errors[False].values()])
    assert all(errors[True][name] <= 1.5 * error + 2e-3 for name, error in errors[False].items())


@pytest.mark.parametrize("use_bf16", [False, True])
def test_ten_steps_end_at_the_same_weights(load, batches, use_bf16):
    """To a small part of the way that they went."""
    ends = []
    for is_fused in (False, True):
        model = load(is_fused, 1, use_bf16)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad and not n.endswith(ONLY_ROUNDING)}
        began = {name: parameter.detach().clone() for name, parameter in trained.items()}
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-4)
        for batch in batches[1:]:
            gradients(model, batch, use_bf16)
            optimizer.step()
        ends.append({name: parameter.detach() - began[name] for name, parameter in trained.items()})
    plain, few = (torch.cat([way.flatten() for way in ways.values()]) for ways in ends)
    assert (few - plain).norm() <= (0.3 if use_bf16 else 0.01) * plain.norm()


def test_generation_and_rows_of_one_utterance_are_transformers_own(load, batches, processor, config, eval_rows):
    dataset = SpeechDataset(eval_rows, processor, config, training=False)
    batch = DataCollatorSpeechSeq2SeqWithPadding(processor, config)([dataset[(0, row)] for row in range(3)], False)
    prompts = {name.removeprefix("prompt_"): batch.pop(name) for name in ("prompt_input_ids", "prompt_attention_mask")}
    prompts |= {name: batch[name] for name in ("input_features", "input_features_mask")}
    plain, few = (load(is_fused, 0).eval() for is_fused in (False, True))
    assert few(**batch).loss.item() == pytest.approx(plain(**batch).loss.item(), rel=5e-6)
    written = [model.generate(**prompts, max_new_tokens=12, do_sample=False) for model in (plain, few)]
    assert torch.equal(*written)


@pytest.fixture
def graphs(monkeypatch):
    """Has the fused functions run as on a GPU up to the kernels; the graphs that are compiled."""
    found = []

    def take(graph, _):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(fused, "run", fused.launch)
    monkeypatch.setattr(fused, "KERNELS", {})
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda _: take)
    return found


def test_kernels_are_taken_for_what_they_were_made_for(graphs):
    def calls(tokens, width=8, dtype=torch.float32, eps=1e-6):
        x, g = torch.randn(2, tokens, width).to(dtype)
        weight = torch.rand(width)
        return (fused.norm_gradient, (g, x, x, weight, eps)), (fused.norm_weight_gradient, (g, x, eps))

    def transposed(call):
        function, (first, *others) = call
        return function, (first.t().contiguous().t(), *others)

    def check(kinds, *calls):
        torch.testing.assert_close(fused.run(*calls), fused.as_they_stand(*calls))
        assert len(graphs) == kinds

    for tokens in (1, 5, 3000):
        check(1, *calls(tokens))
    check(1, *map(transposed, calls(7)))
    check(2, *calls(5, dtype=torch.bfloat16))
    check(3, *calls(5, width=6))
    check(4, *calls(5, eps=1e-3))
    check(5, *reversed(calls(5)))
    for number, function in enumerate((torch.add, torch.mul)):
        check(6 + number, (function, tuple(torch.randn(2, 5, 8))))
    check(7, *calls(9))


def test_a_tensor_that_kernels_cannot_count_is_computed_without_them(graphs, monkeypatch):
    monkeypatch.setattr(fused, "INDEXED", 40)
    for rows in (6, 5):
        gate, up = torch.randn(2, rows, 8)
        assert torch.equal(*fused.run((fused.gated, (gate, up))), fused.gated(gate, up))
        assert len(graphs) == (rows == 5)


@pytest.mark.parametrize("stage", [0, 1])
def test_kernels_give_the_gradients_of_the_functions(load, batches, graphs, monkeypatch, stage):
    model, calls = load(True, stage, use_bf16=True), []
    found = [gradients(model, batches[0], True)]
    kinds = len(graphs)
    found += [gradients(model, batch, True) for batch in batches[1:3]]
    assert len(graphs) == kinds, "whatever the number of tokens"
    monkeypatch.setattr(fused, "run", lambda *several: calls.append(several) or fused.as_they_stand(*several))
    for batch, (loss, ours) in zip(batches, found, strict=False):
        calls.clear()
        expected, theirs = gradients(model, batch, True)
        assert len(calls) == 8 * len(model.model.language_model.layers), "what the host pays for"
        assert loss == expected and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], gradient) for name, gradient in theirs.items())


@pytest.mark.slow
def test_compiled_functions_compute_the_same(load, batches, monkeypatch):
    model = load(True, 1)
    expected = [gradients(model, batch, False) for batch in batches[:3]]
    monkeypatch.setattr(fused, "run", fused.launch)
    monkeypatch.setattr(fused, "KERNELS", {})
    assert fused.kernel_error(torch.device("cpu")) is None
    for batch, (loss, theirs) in zip(batches, expected, strict=False):
        found, ours = gradients(model, batch, False)
        assert found == pytest.approx(loss, rel=5e-6)
        for name, gradient in theirs.items():
            assert (ours[name] - gradient).norm() <= 3e-5 * gradient.norm(), name


def test_a_kernel_that_cannot_be_made_during_a_run_does_not_end_it(monkeypatch):
    """The first one says whether there is a compiler at all."""
    gate, up = torch.randn(2, 5, 64)

    def broken(calls):
        raise RuntimeError("out of resources")

    monkeypatch.setattr(fused, "compiled", broken)
    monkeypatch.setattr(fused, "KERNELS", {})
    with pytest.raises(RuntimeError, match="out of resources"):
        fused.launch((fused.gated, (gate, up)))
    monkeypatch.setattr(fused, "KERNELS", {"another": None})
    with pytest.warns(UserWarning, match="gated: runs unfused, which is slower: out of resources"):
        [found] = fused.launch((fused.gated, (gate, up)))
    assert torch.equal(found, fused.gated(gate, up))
    with warnings.catch_warnings():  # it is said once
        warnings.simplefilter("error")
        assert torch.equal(fused.launch((fused.gated, (up, gate)))[0], fused.gated(up, gate))
    monkeypatch.setattr(fused, "KERNELS", {"another": None})
    monkeypatch.setattr(fused, "compiled", lambda calls: (_ for _ in ()).throw(torch.OutOfMemoryError("at once")))
    with pytest.raises(torch.OutOfMemoryError):
        fused.launch((fused.gated, (gate, up)))


def test_each_function_is_one_kernel_of_a_gpu(monkeypatch):
    """The compiler writes the code for a GPU where there is none; a sum over all tokens is two kernels."""
    triton = pytest.importorskip("triton")
    target = triton.backends.compiler.GPUTarget("cuda", 80, 32)
    driver = SimpleNamespace(get_current_target=lambda: target, get_active_torch_device=lambda: torch.device("cpu"))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(torch._inductor.config, "cpu_backend", "triton")
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    torch.compiler.reset()  # what an earlier test compiled would be taken from its cache
    code: list[str] = []

    def stop_at(written):
        code.append(written)
        raise NotImplementedError("it cannot run here")

    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(stop_at))
    kernels = {}

    def count(call):
        with pytest.raises(Exception, match="it cannot run here"):
            fused.launch(call)
        kernels[call[0].__name__] = len(re.findall(r"^@triton\.jit$", code.pop(), re.MULTILINE))
        return fused.as_they_stand(call)

    monkeypatch.setattr(fused, "KERNELS", {})
    monkeypatch.setattr(fused, "run", count)
    assert fused.kernel_error(torch.device("cpu")) is None
    assert len(kernels) == 10
    assert kernels == {name: 1 + name.endswith("weight_gradient") for name in kernels}


def test_a_kernel_that_is_wrong_on_this_device_is_found_out(monkeypatch):
    cpu = torch.device("cpu")
    assert fused.kernel_error(cpu) is None
    plain = fused.run
    for wrong, change in ((fused.gated, lambda out: 1.1 * out), (fused.turned, lambda out: out.roll(1, 0))):

        def run(call, wrong=wrong, change=change):
            return [change(out) if call[0] is wrong else out for out in plain(call)]

        monkeypatch.setattr(fused, "run", run)
        assert fused.kernel_error(cpu).startswith(f"{wrong.__name__} is off by")

    def no_compiler(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(fused, "run", no_compiler)
    assert "C compiler" in fused.kernel_error(cpu)
