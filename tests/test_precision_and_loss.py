"""The loss is nats per target token, in evaluation too, and transcription works whatever types the weights have."""

import math

import numpy as np
import pytest
import torch
import transformers

from hebrew_asr.data.audio import AudioError
from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.evaluation.settings import Decoding
from hebrew_asr.evaluation.transcription import load_speech_model, read_transcripts, transcribe_set
from hebrew_asr.model.loading import load_to_train
from hebrew_asr.model.stages import trains_in
from hebrew_asr.text.scoring import score
from hebrew_asr.training.batches import collate_evaluation
from hebrew_asr.training.resuming import training_arguments
from hebrew_asr.training.run_log import RunLog
from train_hebrew_asr_enhanced import GradualUnfreezeTrainer


@pytest.fixture
def make_trainer(config, processor, train_rows, eval_rows, tmp_path):
    def make(model, use_bf16=False) -> GradualUnfreezeTrainer:
        args = training_arguments(config, tmp_path, cpu=True)
        log = RunLog(tmp_path, rank=0)
        return GradualUnfreezeTrainer(config, args, model, processor, train_rows, eval_rows, log, use_bf16)

    return make


def nats(model, batch) -> tuple[float, int]:
    """Sum of −log p of each supervised token, and their number, by hand: position t predicts token t + 1."""
    inputs = {k: v for k, v in batch.items() if k != "labels" and not k.startswith("prompt_")}
    with torch.no_grad():
        log_p = model(**inputs).logits.double().log_softmax(-1)
    total, count = 0.0, 0
    for row, labels in enumerate(batch["labels"].tolist()):
        for position, label in enumerate(labels):
            if label != -100:
                total -= log_p[row, position - 1, label].item()
                count += 1
    return total, count


def test_logged_train_loss_is_nats_per_token_of_the_global_batch(config, model, make_trainer):
    config.use_specaugment, config.max_steps, config.eval_steps = False, 1, 1000
    trainer = make_trainer(model)
    micro_batches = next(iter(trainer.feed.sampler))
    assert len(micro_batches) == 2 and sum(map(len, micro_batches)) == 8
    utterances = [trainer.feed.dataset[draw] for micro_batch in micro_batches for draw in micro_batch]
    pairs = [nats(model, trainer.collator([utterance], training=True)) for utterance in utterances]
    expected = sum(total for total, _ in pairs) / sum(count for _, count in pairs)
    trainer.train()
    (logged,) = [row["train/loss"] for row in trainer.run_log.rows if "train/loss" in row]
    assert logged == pytest.approx(expected, rel=1e-6)


def test_eval_loss_is_nats_per_token_and_every_utterance_counts_once(config, model, eval_rows, make_trainer):
    trainer = make_trainer(model)
    metrics = trainer.evaluate()
    totals, counts, rows = 0.0, 0, []
    for indices, batch in trainer.get_eval_dataloader():
        total, count = nats(model, batch)
        totals, counts, rows = totals + total, counts + count, rows + indices
    assert sorted(rows) == list(range(len(eval_rows)))
    assert metrics["eval/loss"] == pytest.approx(totals / counts, rel=1e-6)
    assert math.exp(-metrics["eval/loss"]) > 0.02, "the demo's base knows this prompt"


def memory_for(monkeypatch, fits) -> None:
    """Has the device run out of memory in every evaluation batch that does not `fit`."""
    prediction_step = GradualUnfreezeTrainer.prediction_step

    def step(self, model, inputs, **options):
        if not fits(inputs):
            raise torch.OutOfMemoryError("CUDA out of memory, as injected by the test")
        return prediction_step(self, model, inputs, **options)

    monkeypatch.setattr(GradualUnfreezeTrainer, "prediction_step", step)


def test_an_evaluation_batch_that_does_not_fit_is_halved_and_gives_the_same(model, make_trainer, monkeypatch, capsys):
    trainer = make_trainer(model)
    expected = trainer.evaluate()
    memory_for(monkeypatch, lambda inputs: len(inputs["labels"]) <= 2)
    assert trainer.evaluate() == pytest.approx(expected, rel=1e-5)
    assert expected["eval/out_of_memory"] == 0
    assert "warning: out of memory in the evaluation, 6 times a batch was halved" in capsys.readouterr().out


def test_an_utterance_that_does_not_fit_alone_is_counted_as_not_heard(model, make_trainer, monkeypatch, capsys):
    trainer = make_trainer(model)
    expected, row = trainer.evaluate(), 4
    wanted = collate_evaluation(trainer.collator, [[trainer.eval_dataset[(0, row)]]])[1]["labels"]
    target = wanted[wanted != -100].tolist()
    memory_for(
        monkeypatch, lambda inputs: all(labels[labels != -100].tolist() != target for labels in inputs["labels"])
    )
    capsys.readouterr()
    metrics = trainer.evaluate()
    assert metrics["eval/out_of_memory"] == 1
    assert metrics["eval/empty_predictions"] == expected["eval/empty_predictions"] + 1
    assert metrics["eval/wer"] != expected["eval/wer"] and math.isfinite(metrics["eval/loss"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "out of memory" in line)
    assert trainer.eval_dataset.rows[row]["recording"] in line
    memory_for(monkeypatch, lambda inputs: False)
    assert trainer.evaluate()["eval/out_of_memory"] == 11, "and the run goes on"


def evaluation_batch(trainer):
    """Four utterances of different lengths, features in fp32 as the loader makes them."""
    order = trainer.eval_dataset.rows.seconds.argsort()[:4]
    return collate_evaluation(trainer.collator, [[trainer.eval_dataset[(0, row)] for row in order]])[1]


def mixed(config):
    return load_to_train(config, use_bf16=True)


def all_bf16(config):
    return load_to_train(config, use_bf16=False).to(torch.bfloat16)


def test_a_mixed_model_has_fp32_where_it_ever_trains_and_bf16_elsewhere(config):
    model = mixed(config)
    for name, parameter in model.named_parameters():
        ever = any(trains_in(name, stage, model.config) for stage in config.stages)
        assert parameter.dtype == (torch.float32 if ever else torch.bfloat16), name


def test_the_plain_trainer_fails_on_bf16_weights(config, make_trainer, tmp_path):
    ours = make_trainer(all_bf16(config))
    batch = evaluation_batch(ours)
    args = transformers.Seq2SeqTrainingArguments(
        output_dir=tmp_path, predict_with_generate=True, use_cpu=True, report_to="none"
    )
    plain = transformers.Seq2SeqTrainer(model=ours.model, args=args)
    inputs = {k: v for k, v in batch.items() if not k.startswith("prompt_")}
    with pytest.raises(RuntimeError, match=r"Input type \(float\) and bias type \(c10::BFloat16\) should be the same"):
        plain.prediction_step(ours.model, inputs, prediction_loss_only=False)
    loss, generated, _ = ours.prediction_step(ours.model, batch, prediction_loss_only=False)
    assert torch.isfinite(loss) and generated.shape[0] == 4


@pytest.mark.parametrize("load", [all_bf16, mixed])
def test_prediction_step_agrees_with_fp32(config, model, make_trainer, processor, load):
    trainer = make_trainer(model)
    batch = evaluation_batch(trainer)
    reference_loss, reference, _ = trainer.prediction_step(model, batch, prediction_loss_only=False)
    loss, generated, labels = trainer.prediction_step(load(config).eval(), batch, prediction_loss_only=False)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference_loss.item(), rel=0.03)
    assert torch.equal(labels, batch["labels"])
    texts, expected = (processor.decode(g, return_format="transcription_only") for g in (generated, reference))
    assert sum(a == b for a, b in zip(texts, expected, strict=True)) >= 3, (texts, expected)


def test_prediction_step_transcribes_as_the_model_alone_does(config, model, make_trainer, processor, eval_rows):
    """Against stock generation of one clip at a time: batching and left padding change nothing."""
    from hebrew_asr.data.audio import decode_audio

    trainer = make_trainer(model.eval())
    order = eval_rows.seconds.argsort()[:4]
    _, generated, _ = trainer.prediction_step(model, evaluation_batch(trainer), prediction_loss_only=False)
    batched = processor.decode(generated, return_format="parsed")
    for row, output in zip(order, batched, strict=True):
        waveform = decode_audio(eval_rows[int(row)]["audio"])
        inputs = processor.apply_transcription_request(audio=waveform, sampling_rate=16_000)
        tokens = model.generate(**inputs, max_new_tokens=30)[:, inputs["input_ids"].shape[1] :]
        assert processor.decode(tokens[0], return_format="parsed") == output


def test_training_under_bf16_autocast_keeps_fp32_weights_and_moments(config, make_trainer):
    config.max_steps = 8  # six of stage B, two of stage A
    trainer = make_trainer(mixed(config), use_bf16=True)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.stage.name == "A"
    moments = trainer.optimizer.optimizer.state
    for name, parameter in trainer.model.named_parameters():
        if trains_in(name, trainer.stage, trainer.model.config):
            assert parameter.dtype == torch.float32 and moments[parameter]["exp_avg"].dtype == torch.float32, name
            assert not torch.equal(parameter, before[name]), name
        else:
            assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, before[name]), name
    losses = [row["train/loss"] for row in trainer.run_log.rows if "train/loss" in row]
    assert losses[-1] < losses[0]


def test_hypotheses_are_scored_against_the_transcripts_as_they_stand(config, model, make_trainer, monkeypatch):
    """A reference with gershayim stays one: the leaderboard's rules see another word in its form with ASCII quotes."""
    trainer = make_trainer(model)
    rows = trainer.eval_dataset.rows
    monkeypatch.setattr(rows, "column", lambda name: ["חיילי צה״ל יצאו"] * len(rows))
    outputs = ['language Hebrew<asr_text>חיילי צה"ל יצאו'] * 16
    monkeypatch.setattr(type(trainer.processor), "decode", lambda self, tokens, **_: outputs[: len(tokens)])
    assert trainer.evaluate()["eval/wer"] == pytest.approx(50.0), "צה ל against צהל: two of four words"


@pytest.mark.parametrize("count", [19, 20, 21, 50])
def test_a_loop_is_scored_as_the_model_wrote_it(config, model, make_trainer, processor, monkeypatch, count):
    """In training and in the evaluation alike; transformers' own parsing shows 20 and more repetitions as one."""
    from hebrew_asr.evaluation import transcription

    loop = " ".join(["שלום"] * count)
    tokens = torch.tensor([processor.tokenizer(f"language Hebrew<asr_text>{loop}<|im_end|>")["input_ids"]] * 4)
    trainer = make_trainer(model)
    monkeypatch.setattr("train_hebrew_asr_enhanced.generate", lambda *_, **__: tokens)
    monkeypatch.setattr(transcription, "generate", lambda *_, **__: tokens)
    heard = trainer.transcribe(model, evaluation_batch(trainer))
    assert [(text, language) for text, language, _, _ in heard] == [(loop, "Hebrew")] * 4

    decoding = Decoding(max_new_tokens=1000, dtype="float32")
    user = transcription.QwenModel(config.model_name_or_path, decoding, torch.device("cpu"), bf16=False)
    written = user.transcribe([np.zeros((128, 100), np.float32)] * 4, [1.0] * 4)
    assert [(one.text, one.language, one.truncated) for one in written] == [(loop, "Hebrew", False)] * 4


def test_the_model_kept_is_the_best_and_the_one_reported(config, monkeypatch, tmp_path):
    """WER falls and rises again: what is on disk, reloaded and described is the middle one."""
    from safetensors.torch import load_file

    from train_hebrew_asr_enhanced import main

    config.max_steps, config.eval_steps = 6, 2
    for stage in config.stages:
        stage.last_epoch += 5
    wers = iter([50.0, 40.0, 20.0, 30.0, 20.0])  # steps 0, 2, 4, 6, and the reloaded model
    weights = {}
    evaluate = GradualUnfreezeTrainer.evaluate

    def remember(self, *args, **kwargs):
        model = kwargs.get("model") or self.model
        key = "final" if "model" in kwargs else self.state.global_step
        weights[key] = {name: p.detach().clone() for name, p in model.named_parameters()}
        return evaluate(self, *args, **kwargs)

    def score(references, hypotheses, recordings):
        counts = {"utterances": 11, "empty_predictions": 0, "cer": 1.0, "wer_raw": 1.0}
        return {"wer": next(wers), **counts}

    monkeypatch.setattr(GradualUnfreezeTrainer, "evaluate", remember)
    monkeypatch.setattr("hebrew_asr.training.measuring.score", score)
    main(config)
    assert list(weights) == [0, 2, 4, 6, "final"]
    on_disk = load_file(tmp_path / "run" / "final_model" / "model.safetensors")
    assert all(torch.equal(weights["final"][name], weights[4][name]) for name in weights[4])
    assert all(torch.equal(on_disk[name], weights[4][name]) for name in on_disk)
    moved = [name for name in weights[4] if not torch.equal(weights[4][name], weights[6][name])]
    assert moved, "the last model is another one"
    assert "at step 4" in (tmp_path / "run" / "final_model" / "README.md").read_text()


def test_gradients_that_are_not_finite_are_never_applied(config, model, make_trainer):
    from hebrew_asr.training.resuming import BadSteps

    trainer = make_trainer(model)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight[0, 0] = float("nan")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.args.eval_on_start = False
    with pytest.raises(BadSteps, match=r"3 steps in a row up to step 3 had no finite gradient \(its norm is nan\)"):
        trainer.train()
    assert all(torch.equal(before[n].nan_to_num(), p.nan_to_num()) for n, p in model.named_parameters())


def test_a_step_of_which_nothing_decodes_is_skipped_and_named(config, model, make_trainer, monkeypatch):
    config.max_steps, config.eval_steps, config.logging_steps = 6, 1000, 2
    trainer = make_trainer(model)
    (alone,) = [draw for micro_batch in list(trainer.feed.sampler)[-1] for draw in micro_batch]
    heard = SpeechDataset.waveform

    def waveform(self, row, epoch, number):
        if self.training and (epoch, number) == alone:
            raise AudioError("damaged audio")
        return heard(self, row, epoch, number)

    monkeypatch.setattr(SpeechDataset, "waveform", waveform)
    trainer.train()
    assert (trainer.state.global_step, trainer.skipped_steps, trainer.dropped_utterances) == (6, 1, 1)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    losses = [row["train/loss"] for row in trainer.run_log.rows if "train/loss" in row]
    assert losses[2] == pytest.approx(losses[1], rel=0.3), "the mean of the one step that was applied"
    assert len((trainer.run_log.folder / "skipped-steps.txt").read_text().splitlines()) == 1


def test_an_untrained_model_is_told_to_be_guessing(config, model, make_trainer, capsys):
    config.max_steps = 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    make_trainer(model).train()
    assert "the model is guessing, so the prompt or the labels are wrong" in capsys.readouterr().out


def test_the_final_model_is_written_in_one_type_and_tied(config, model, processor, tmp_path):
    from hebrew_asr.checkpoints.final import save_for_use

    save_for_use(model, processor, tmp_path / "final_model", torch.bfloat16)
    again = transformers.Qwen3ASRForConditionalGeneration.from_pretrained(tmp_path / "final_model", dtype="auto")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert again.lm_head.weight.data_ptr() == again.model.language_model.embed_tokens.weight.data_ptr()
    expected = dict(model.named_parameters())
    assert all(torch.equal(p, expected[n].to(torch.bfloat16)) for n, p in again.named_parameters())
    assert not list(tmp_path.glob("**/*.bin")) and not list(tmp_path.glob("*.unfinished"))
    (tmp_path / "new").touch()
    assert {f.stat().st_mode for f in (tmp_path / "final_model").iterdir()} == {(tmp_path / "new").stat().st_mode}


@pytest.mark.parametrize("endless", [False, True])
def test_one_checkpoint_has_one_error_rate_while_training_and_in_the_evaluation(
    config, model, make_trainer, eval_rows, tmp_path, endless
):
    """Also where the model does not end by itself, so that the limit of tokens decides what is scored."""
    config.generation_max_new_tokens, decoding = None, Decoding()
    engine = load_speech_model(config.model_name_or_path, decoding, torch.device("cpu"))
    if endless:
        for each in (model, engine.model):
            each.generation_config.suppress_tokens = list(engine.ends)
    while_training = make_trainer(model).evaluate()["eval/wer"]
    parts = tmp_path / "parts"
    parts.mkdir()
    transcribe_set(engine, eval_rows, decoding, parts, rank=0, processes=1, workers=0, hides_progress=True)
    written = [transcript.text for transcript in read_transcripts(parts, len(eval_rows)).transcripts]
    assert score(eval_rows.column("reference"), written)["wer"] == while_training
    assert (while_training > 150) == endless
