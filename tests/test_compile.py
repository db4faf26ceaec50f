"""Compiled layers compute what the others do, in few graphs, whatever trains and however long the utterances are."""

import functools

import pytest
import torch
import torch.distributed
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.model import attention, fused
from hebrew_asr.model.attention import VARLEN
from hebrew_asr.model.loading import load_to_train
from hebrew_asr.model.stages import freeze_for
from hebrew_asr.training.resuming import training_arguments
from hebrew_asr.training.run_log import RunLog
from train_hebrew_asr_enhanced import DataCollatorSpeechSeq2SeqWithPadding, GradualUnfreezeTrainer


@torch.library.custom_op("tests::stand_in", mutates_args=())
def stand_in(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scale: float,
    is_causal: bool,
) -> torch.Tensor:
    """An operator that a compiler does not look into, as PyTorch's kernel is."""
    return attention.attend_padded(query, key, value, ends, longest, scale, is_causal)


@torch.library.custom_op("tests::stand_in_backward", mutates_args=())
def stand_in_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scale: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    place = torch.arange(len(query))
    utterance = torch.bucketize(place, ends, right=True)
    visible = (utterance[:, None] == utterance) & ((place[:, None] >= place) | (not is_causal))
    q, g = (t.unflatten(1, (heads, groups)).permute(1, 2, 0, 3) for t in (query, gradient))
    k, v = (t.transpose(0, 1)[:, None] for t in (key, value))
    p = (q @ k.mT * scale).masked_fill(~visible, -torch.inf).softmax(-1)
    of_p = g @ v.mT
    of_scores = p * (of_p - (of_p * p).sum(-1, keepdim=True)) * scale
    of_query = (of_scores @ k).permute(2, 0, 1, 3).flatten(1, 2)
    return of_query.contiguous(), *(
        (t @ u).sum(1).transpose(0, 1).contiguous() for t, u in ((of_scores.mT, q), (p.mT, g))
    )


stand_in.register_fake(lambda query, *_: torch.empty_like(query))
stand_in_backward.register_fake(lambda gradient, *inputs: tuple(map(torch.empty_like, inputs[:3])))


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.others = inputs[4:]


stand_in.register_autograd(
    lambda ctx, gradient: (*stand_in_backward(gradient, *ctx.saved_tensors, *ctx.others), *[None] * 4),
    setup_context=keep,
)


@pytest.fixture
def compiled(config, monkeypatch):
    """A model with compiled layers, as on a GPU up to the kernel. No code is generated, only graphs are made."""

    def kernel(query, key, value, ends, _, longest, __, *, scale, window_size, enable_gqa=False):
        return stand_in(query, key, value, ends, longest, scale, window_size == (-1, 0))

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "FLASH_TYPES", (torch.float32, torch.bfloat16))
    counter = CompileCounterWithBackend("aot_eager")
    compile_in_place = functools.partialmethod(torch.nn.Module.compile, backend=counter)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_in_place)
    torch._dynamo.reset()
    counters.clear()
    config.torch_compile, config.use_specaugment = True, False
    model = load_to_train(config, use_bf16=False)
    model.config.text_config._attn_implementation_internal = VARLEN
    fused.fuse(model)
    return model, counter


@pytest.fixture
def batches(config, processor, train_rows):
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    collator.in_one_row = True
    dataset = SpeechDataset(train_rows, processor, config, training=True)
    return [collator.packed([dataset[(1, row)] for row in rows]) for rows in ((0, 1, 2), (3,), (4, 5))]


def test_compiled_layers_give_the_same_gradients_in_every_stage(
    config, model, compiled, batches, processor, train_rows, eval_rows, tmp_path
):
    compiled, counter = compiled
    model.config.text_config._attn_implementation_internal = VARLEN
    assert list(compiled.state_dict()) == list(model.state_dict())
    for stage in config.stages:
        for either in (model, compiled):
            freeze_for(either, stage)
            either.zero_grad()
            for batch in batches:
                either(**batch).loss.backward()
        for (name, ours), (_, theirs) in zip(compiled.named_parameters(), model.named_parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None), name
            if ours.grad is not None and not name.endswith("k_proj.bias"):  # of the encoder: nothing but rounding
                assert (ours.grad - theirs.grad).norm() <= 3e-5 * theirs.grad.norm(), name
    graphs = counter.frame_count
    assert graphs <= 4, "layers that train and that rest, and few of their lengths"
    assert not counters["graph_break"]
    arguments = training_arguments(config, tmp_path, cpu=True)
    log = RunLog(tmp_path, rank=0)
    trainer = GradualUnfreezeTrainer(config, arguments, compiled, processor, train_rows, eval_rows, log, use_bf16=False)
    trainer.evaluate()
    assert counter.frame_count == graphs


def test_buckets_of_gradients_do_not_cut_layers(config, compiled, batches, monkeypatch, tmp_path):
    """A bucket of the 1.7B holds half a matrix; here they are as small for the demo's layers."""
    compiled, counter = compiled
    freeze_for(compiled, config.stages[0])
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 20_000)
        wrapped = torch.nn.parallel.DistributedDataParallel(compiled, bucket_cap_mb=0.02)
        for batch in batches:
            wrapped(**batch, num_items_in_batch=1).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert counter.frame_count <= 4 and not counters["graph_break"]
