"""Attention in one call is attention under a mask and window by window: kernels are told the right ends.

A GPU's kernels are stood in for by a loop over the stretches they are told of.
"""

import inspect

import numpy as np
import pytest
import torch
from transformers import modeling_flash_attention_utils as flash_utils

from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.errors import InputError
from hebrew_asr.model import attention
from hebrew_asr.model.attention import PADDED, VARLEN, set_attention
from hebrew_asr.model.costs import work_of
from hebrew_asr.model.loading import load_to_train
from hebrew_asr.model.packing import useful_tokens
from hebrew_asr.model.stages import freeze_for
from train_hebrew_asr_enhanced import DataCollatorSpeechSeq2SeqWithPadding

REAL_KERNEL = inspect.signature(attention.varlen_attn)


def loop(query, key, value, ends, longest, scale, is_causal):
    """Attention of (tokens, heads, width) in each stretch alone; keys may have fewer heads."""
    assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == len(query) and ends.diff().max() <= longest
    outputs = []
    for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        q, k, v = (t[begin:end].transpose(0, 1).float() for t in (query, key, value))
        k, v = (t.repeat_interleave(len(q) // len(t), dim=0) for t in (k, v))
        scores = q @ k.transpose(1, 2) * scale
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=bool).triu(1), -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype))
    return torch.cat(outputs)


def stand_in(*args, **kwargs):
    given = REAL_KERNEL.bind(*args, **kwargs).arguments
    assert given["query"].dtype == given["key"].dtype == given["value"].dtype
    assert given.get("enable_gqa", False) or given["query"].shape == given["key"].shape, "heads must be as many"
    is_causal = {(-1, 0): True, (-1, -1): False}[given["window_size"]]
    tensors = (given[name] for name in ("query", "key", "value", "cu_seq_q", "max_q"))
    return loop(*tensors, given["scale"], is_causal)


def package_stand_in(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    assert cu_seqlens_q is cu_seqlens_k and not dropout_p
    return loop(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal)


def never(*args, **kwargs):
    raise AssertionError("a packed row is no single utterance")


def attend_with(model, kernel, monkeypatch):
    """Has a model on a CPU attend as it would on a GPU, as far as to the kernel."""
    name = {"package": "flash_attention_2", "varlen": VARLEN, "padded": PADDED}[kernel]
    attention.register()
    for config in (model.config.text_config, model.config.audio_config):
        config._attn_implementation_internal = name
    if kernel == "varlen":
        monkeypatch.setattr(attention, "FLASH_TYPES", (torch.bfloat16, torch.float32))
        monkeypatch.setattr(attention, "varlen_attn", stand_in)
    elif kernel == "package":
        process = flash_utils._lazy_define_process_function(package_stand_in)
        functions = (never, package_stand_in, None, flash_utils._pad_input, flash_utils._unpad_input), (process, None)
        monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *args, **kwargs: functions)


@pytest.fixture
def batches(config, processor, train_rows):
    """Real utterances and noise of other lengths, in several rows and in one: up to several windows of 8 s."""
    config.use_specaugment = False
    dataset = SpeechDataset(train_rows, processor, config, training=True)
    random = np.random.default_rng(0)
    utterances = [dataset[(1, row)] for row in range(3)]
    for frames in (57, 100, 2033, 1600, 801):
        features = random.normal(0, 0.5, (128, frames)).astype(np.float32)
        utterances.append(utterances[0] | {"features": features, "text": "שלום " * (frames // 80)})
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    found = [collator.packed(utterances)]
    collator.in_one_row = True
    return [*found, collator.packed(utterances)]


@pytest.mark.parametrize(
    ("kernel", "stage", "rows"),
    [
        *((kernel, None, rows) for kernel in ("padded", "varlen", "package") for rows in ("several", "one")),
        *(("varlen", stage, "one") for stage in (0, 1)),
    ],
)
def test_one_call_gives_the_gradients_of_a_mask(config, model, batches, monkeypatch, kernel, stage, rows):
    masked = load_to_train(config, use_bf16=False)
    attend_with(model, kernel, monkeypatch)
    if stage is not None:
        for either in (model, masked):
            freeze_for(either, config.stages[stage])
    several, one = batches
    assert len(several["input_ids"]) > 1 and useful_tokens(several) < several["input_ids"].numel()
    expected = masked(**several).loss
    expected.backward()
    loss = model(**(several if rows == "several" else one)).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), masked.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and not name.endswith("k_proj.bias"):  # of the encoder: nothing but rounding
            assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm(), name


def test_one_row_has_no_padding(batches):
    several, one = batches
    assert one["input_ids"].shape == (1, useful_tokens(several))


@pytest.mark.parametrize("kernel", ["varlen", "package"])
def test_kernels_get_bf16_from_a_mixed_model(config, batches, monkeypatch, kernel):
    """Norms whose weights are fp32 leave queries and keys in fp32, which the kernels refuse."""
    mixed, masked = (load_to_train(config, use_bf16=True) for _ in range(2))
    attend_with(mixed, kernel, monkeypatch)
    types = set()
    monkeypatch.setitem(globals(), "loop", lambda *a, loop=loop: types.update(t.dtype for t in a[:3]) or loop(*a))
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = (model(**batches[1]).loss for model in (mixed, masked))
    loss.backward()
    assert types == {torch.bfloat16}
    assert loss.item() == pytest.approx(expected.item(), rel=3e-3)


def test_the_encoder_attends_once_a_layer(model, batches, monkeypatch):
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: calls.append(args[0].shape) or real(*args, **kwargs),
    )
    inputs = {name: batches[1][name] for name in ("input_features", "input_features_mask")}
    windows = batches[1]["window_ends"]
    layers = model.config.audio_config.num_hidden_layers
    outputs = []
    for expected in (layers * (len(windows) - 1), layers):
        calls.clear()
        outputs.append(model.get_audio_features(**inputs, cu_seqlens=windows).pooler_output)
        assert len(calls) == expected
        attend_with(model, "padded", monkeypatch)
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-5 * outputs[0].abs().max()


def test_one_utterance_to_a_row_and_generation_are_as_before(config, model, processor, eval_rows, monkeypatch):
    dataset = SpeechDataset(eval_rows, processor, config, training=False)
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    batch = collator([dataset[(0, row)] for row in range(6)], training=False)
    prompts = {"input_ids": batch.pop("prompt_input_ids"), "attention_mask": batch.pop("prompt_attention_mask")}
    prompts |= {name: batch[name] for name in ("input_features", "input_features_mask")}
    found = []
    for _ in range(2):
        found.append((model(**batch).loss.item(), model.generate(**prompts, max_new_tokens=12, do_sample=False)))
        attend_with(model, "varlen", monkeypatch)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.equal(found[0][1], found[1][1])


def test_only_what_attention_computes_is_counted(config, model, batches, monkeypatch):
    several, _ = batches
    shape = several["input_ids"].shape
    assert work_of(several, model.config).token_pairs == shape[0] * shape[1] ** 2
    attend_with(model, "padded", monkeypatch)
    lengths = several["utterance_ends"].diff()
    assert work_of(several, model.config).token_pairs == (lengths**2).sum() < shape[0] * shape[1] ** 2


def implementations(model):
    return model.config.text_config._attn_implementation, model.config.audio_config._attn_implementation


@pytest.mark.parametrize(
    ("wanted", "gpu", "flash", "bf16", "expected"),
    [
        ("auto", False, False, False, ("sdpa", "sdpa")),
        ("auto", True, True, True, (VARLEN, VARLEN)),
        ("auto", True, True, False, ("sdpa", PADDED)),
        ("auto", True, False, False, ("sdpa", PADDED)),
        ("varlen", True, True, True, (VARLEN, VARLEN)),
        ("sdpa", True, True, True, ("sdpa", "sdpa")),
    ],
)
def test_the_fastest_there_is_is_taken(model, monkeypatch, wanted, gpu, flash, bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(attention, "has_flash", lambda: flash)
    set_attention(model, wanted, bf16)
    assert implementations(model) == expected


@pytest.mark.parametrize("wanted", ["varlen", "flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("bf16", [True, False])
def test_what_is_asked_for_and_not_there_is_one_message(model, wanted, bf16):
    with pytest.raises(InputError, match=f"attention {wanted} .*eave it at auto"):
        set_attention(model, wanted, bf16)


def test_a_kernel_that_is_wrong_on_this_device_is_found_out():
    """The example is small enough for each start on a GPU; bf16 alone is far from the tolerance."""

    def ahead(*args):
        return loop(*args[:-1], False)

    def one_stretch_off(query, key, value, ends, *args):
        return loop(query, key, value, ends.clone().index_fill_(0, torch.tensor([2]), 39), *args)

    def missing(*_):
        raise RuntimeError("no kernel image is available")

    cpu = torch.device("cpu")
    assert attention.kernel_error(loop, cpu, torch.bfloat16) is None
    assert "off by" in attention.kernel_error(ahead, cpu, torch.bfloat16)
    assert "off by" in attention.kernel_error(one_stretch_off, cpu, torch.bfloat16)
    assert attention.kernel_error(missing, cpu, torch.bfloat16) == "no kernel image is available"
