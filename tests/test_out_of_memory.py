"""A micro-batch that memory does not hold is done in smaller ones with the same gradient; what cannot be is said."""

import pytest
import torch

import evaluate_hebrew_asr
import train_hebrew_asr_enhanced
import train_round2_gradual
from hebrew_asr import processes
from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.errors import InputError
from hebrew_asr.files import DEMO
from hebrew_asr.model.loading import load_to_train
from hebrew_asr.model.packing import halves
from hebrew_asr.training.resuming import training_arguments
from hebrew_asr.training.run_log import RunLog
from scripts import align_recordings, audit_corpus, pseudo_label
from train_hebrew_asr_enhanced import DataCollatorSpeechSeq2SeqWithPadding, GradualUnfreezeTrainer


class Full:
    """A device that holds so many tokens at once, in the forward pass or in the backward one."""

    def __init__(self, tokens, when):
        self.tokens, self.when, self.failures = tokens, when, 0

    def __call__(self, trainer, model, batch, scale, compute=GradualUnfreezeTrainer.scaled_loss):
        is_full = batch["input_ids"].numel() > self.tokens
        if is_full and self.when == "forward":
            self.fail()
        loss = compute(trainer, model, batch, scale)
        if is_full:
            weight = model.model.language_model.layers[1].mlp.up_proj.weight
            self.hook = weight.register_hook(lambda _: self.fail())
        return loss

    def fail(self):
        self.failures += 1
        if self.when == "backward":
            self.hook.remove()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.16 GiB.")


@pytest.fixture
def train(config, processor, train_rows, eval_rows, monkeypatch, tmp_path):
    """Trains three steps; returns the trainer."""
    config.use_specaugment, config.max_steps, config.tokens_per_micro_batch = True, 3, 400
    for stage in config.stages:
        stage.llm_top_layers = 2

    def run(full=None, packed_rows=True):
        if full:
            monkeypatch.setattr(GradualUnfreezeTrainer, "scaled_loss", lambda self, *args: full(self, *args))
        config.tokens_per_micro_batch = 400 if packed_rows else None
        arguments = training_arguments(config, tmp_path, cpu=True)
        arguments.eval_on_start = False
        model = load_to_train(config, use_bf16=False)
        log = RunLog(tmp_path, rank=0)
        trainer = GradualUnfreezeTrainer(config, arguments, model, processor, train_rows, eval_rows, log, False)
        monkeypatch.setattr(trainer, "evaluate", lambda **_: {})
        trainer.train()
        return trainer

    return run


@pytest.mark.parametrize("packed_rows", [True, False])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_the_step_is_done_in_smaller_parts_with_the_same_gradient(train, capsys, when, packed_rows):
    whole = train(packed_rows=packed_rows)
    sizes = 200 if packed_rows else 150
    full = Full(sizes, when)
    cut = train(full, packed_rows)
    assert 0 < full.failures == cut.split_micro_batches
    for (name, ours), (_, theirs) in zip(cut.model.named_parameters(), whole.model.named_parameters(), strict=True):
        if not name.endswith("k_proj.bias"):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=2e-5), name
    logged = [[row for row in trainer.run_log.rows if "train/loss" in row] for trainer in (cut, whole)]
    assert [row["train/loss"] for row in logged[0]] == pytest.approx([row["train/loss"] for row in logged[1]], rel=1e-5)
    assert logged[0][-1]["train/split_micro_batches"] == full.failures
    assert "do not fit the device's memory" in capsys.readouterr().err


def test_an_utterance_that_does_not_fit_names_the_remedies(train):
    with pytest.raises(InputError, match=r"step 1: an utterance of \d+ tokens .*--gradient_checkpointing true"):
        train(Full(20, "forward"))


@pytest.mark.parametrize("in_one_row", [True, False])
def test_halves_are_the_utterances_of_the_whole(config, model, processor, train_rows, in_one_row):
    config.use_specaugment = False
    dataset = SpeechDataset(train_rows, processor, config, training=True)
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    collator.in_one_row = in_one_row
    batch = collator.packed([dataset[(1, row)] for row in range(7)])
    parts = halves(batch, model.config.audio_token_id)
    assert [part["input_ids"].numel() < 0.7 * batch["input_ids"].numel() for part in parts] == [True, True]
    whole = model(**batch, root_scale=1.0).loss
    assert sum(model(**part, root_scale=1.0).loss for part in parts).item() == pytest.approx(whole.item(), rel=1e-5)
    alone = collator.packed([dataset[(1, 0)]])
    assert halves(alone, model.config.audio_token_id) == []


def test_a_gpu_that_torch_cannot_use_is_refused(monkeypatch, tmp_path):
    driver = tmp_path / "version"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not processes.has_gpu(driver), "no driver: a machine without a GPU"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02")

    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    with pytest.raises(InputError, match=r"too old \(found version 11040\)\.+ Update the driver"):
        processes.has_gpu(driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert not processes.has_gpu(driver), "the CPU is chosen"


def test_every_command_with_processes_refuses_it(monkeypatch, tmp_path):
    def unusable():
        raise InputError("the driver is too old")

    monkeypatch.setattr(processes, "has_gpu", unusable)
    model, output = str(DEMO / "tuned"), str(tmp_path / "output")
    corpus = ["--model", model, "--source", str(DEMO / "corpus")]
    commands = [
        lambda: evaluate_hebrew_asr.command(["--demo", "--output_dir", output]),
        lambda: audit_corpus.main(["--demo", "--model", model, "--output_dir", output]),
        lambda: pseudo_label.main(pseudo_label.parse([*corpus, "--output", output])),
        lambda: align_recordings.main(align_recordings.parse([*corpus, "--output_dir", output])),
        lambda: train_hebrew_asr_enhanced.main(train_round2_gradual.recipe(["--demo", "--output_dir", output])),
    ]
    for run in commands:
        with pytest.raises(InputError, match="the driver is too old"):
            run()
    assert not list(tmp_path.iterdir()), "nothing was begun"
