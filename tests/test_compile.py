"""Compiled layers compute what the others do, in few graphs, whatever trains and however long the utterances are."""

import functools

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.model.attention import ONE_CALL
from hebrew_asr.model.loading import load_to_train
from hebrew_asr.model.stages import freeze_for
from hebrew_asr.training.resuming import training_arguments
from hebrew_asr.training.run_log import RunLog
from train_hebrew_asr_enhanced import DataCollatorSpeechSeq2SeqWithPadding, GradualUnfreezeTrainer


def test_compiled_layers_give_the_same_gradients_in_every_stage(
    config, model, processor, train_rows, eval_rows, monkeypatch, tmp_path
):
    """As on a GPU: one row, attention told where utterances end. No code is generated, only graphs are made."""
    counter = CompileCounterWithBackend("aot_eager")
    compile_in_place = functools.partialmethod(torch.nn.Module.compile, backend=counter)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_in_place)
    config.torch_compile, config.use_specaugment = True, False
    compiled = load_to_train(config, use_bf16=False)
    assert list(compiled.state_dict()) == list(model.state_dict())
    for either in (model, compiled):
        either.config.text_config._attn_implementation_internal = ONE_CALL
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    collator.in_one_row = True
    dataset = SpeechDataset(train_rows, processor, config, training=True)
    batches = [collator.packed([dataset[(1, row)] for row in rows]) for rows in ((0, 1, 2), (3,), (4, 5))]
    for stage in config.stages:
        for either in (model, compiled):
            freeze_for(either, stage)
            either.zero_grad()
            for batch in batches:
                either(**batch).loss.backward()
        for (name, ours), (_, theirs) in zip(compiled.named_parameters(), model.named_parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None), name
            if ours.grad is not None and not name.endswith("k_proj.bias"):  # of the encoder: nothing but rounding
                assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm(), name
    graphs = counter.frame_count
    limit = torch._dynamo.config.recompile_limit
    assert 1 <= graphs < limit, "trained and frozen, one utterance and several; beyond the limit nothing is compiled"
    arguments = training_arguments(config, tmp_path, cpu=True)
    log = RunLog(tmp_path, rank=0)
    trainer = GradualUnfreezeTrainer(config, arguments, compiled, processor, train_rows, eval_rows, log, use_bf16=False)
    trainer.evaluate()
    assert counter.frame_count == graphs
