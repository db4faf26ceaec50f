"""Averages are those of the checkpoints, what is measured is what is kept, and a resumed run has the same average."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import DEMO, small_config
from safetensors.torch import load_file

from hebrew_asr.checkpoints import averages, store
from hebrew_asr.errors import InputError
from hebrew_asr.files import sha256
from hebrew_asr.training import final_model
from scripts import average_checkpoints
from train_hebrew_asr_enhanced import main

DECAY = 0.8
TIED = "model.language_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus, heldout) -> Path:
    """12 steps in two stages with a checkpoint of each, and a moving average."""
    folder = tmp_path_factory.mktemp("averaging") / "run"
    config = small_config(corpus, heldout, folder)
    main(dataclasses.replace(config, ema_decay=DECAY, save_steps=1, save_total_limit=100, eval_steps=3))
    return folder


@pytest.fixture
def copied(run, tmp_path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.yaml").read_text()) | {"output_dir": str(tmp_path / "run")}
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(config))
    return tmp_path / "run"


def weights(run: Path, step: int, name: str = "model.safetensors") -> dict[str, np.ndarray]:
    tensors = load_file(run / "checkpoints" / f"step-{step:08d}" / name)
    return {key: tensor.double().numpy() for key, tensor in tensors.items()}


def test_a_mean_is_that_of_numpy_in_double_precision(tmp_path):
    random, found = torch.Generator().manual_seed(1), []
    for step in (1, 2, 3):
        tensors = {n: torch.randn(50, 7, generator=random) * 10**e for n, e in (("a", 3), ("b", -6))}
        tensors["frozen"] = torch.full((9,), 0.1, dtype=torch.bfloat16)
        found.append(store.write(tmp_path, step, {"model.safetensors": tensors}, {}, {"wer": None}))
    mean = dict(averages.mean_of(found))
    for name in ("a", "b", "frozen"):
        alone = np.mean([weights_of(c)[name] for c in found], axis=0)
        assert mean[name].dtype == torch.float32 and np.array_equal(mean[name].numpy(), alone.astype(np.float32))
    assert torch.equal(mean["frozen"].bfloat16(), torch.full((9,), 0.1, dtype=torch.bfloat16)), "the same bits again"


def weights_of(checkpoint) -> dict[str, np.ndarray]:
    return {n: t.double().numpy() for n, t in load_file(checkpoint.folder / "model.safetensors").items()}


@pytest.mark.parametrize("last", [4, 12])
def test_the_moving_average_is_the_closed_form_of_every_step_in_both_stages(run, last):
    """Step 6 is the last of stage B, in which the encoder rests."""
    start = {n: t.double().numpy() for n, t in load_file(DEMO / "base" / "model.safetensors").items()}
    average, of_steps = weights(run, last, "moving_average.safetensors"), [weights(run, n) for n in range(1, last + 1)]
    names = set(average)
    assert TIED in names and any("audio_tower.layers" in name for name in names) and "lm_head.weight" not in names
    moved = {name for name in names if not np.array_equal(of_steps[-1][name], start[name])}
    assert moved == (names if last == 12 else {n for n in names if "audio_tower.layers" not in n})
    for name in names:
        expected = DECAY**last * start[name]
        for n, step in enumerate(of_steps, start=1):
            expected = expected + (1 - DECAY) * DECAY ** (last - n) * step[name]
        assert np.allclose(average[name], expected, rtol=1e-5, atol=1e-6), name
        assert name not in moved or not np.allclose(average[name], of_steps[-1][name], rtol=1e-6, atol=1e-8)


def test_a_resumed_run_has_the_same_average_and_final_model(run, corpus, heldout, tmp_path):
    config = small_config(corpus, heldout, tmp_path / "again")
    config = dataclasses.replace(config, ema_decay=DECAY, save_steps=1, save_total_limit=100, eval_steps=3)
    main(dataclasses.replace(config, resume=str(run / "checkpoints" / "step-00000005")))
    for name in ("model.safetensors", "moving_average.safetensors", "optimizer.safetensors"):
        mine, other = (folder / "checkpoints" / "step-00000012" / name for folder in (tmp_path / "again", run))
        assert mine.read_bytes() == other.read_bytes(), name
    assert sha256(tmp_path / "again/final_model/model.safetensors") == sha256(run / "final_model/model.safetensors")
    with pytest.raises(InputError, match=r"ema_decay: 0.8 → \(none\)|ema_decay: 0.8 → None"):
        main(dataclasses.replace(config, ema_decay=None, output_dir=str(tmp_path / "again")))


@pytest.mark.parametrize("average_wer", [10.0, 99.0])
def test_the_final_model_is_the_one_measured_with_the_lower_error_rate(copied, monkeypatch, capsys, average_wer):
    (copied / "status.json").unlink()
    measured, evaluate = {}, final_model.evaluate_stored

    def remember(trainer, folder, prefix):
        measured[prefix] = sha256(folder / "model.safetensors")
        numbers = evaluate(trainer, folder, prefix)
        return numbers | {f"{prefix}/wer": average_wer if prefix == "moving_average" else 50.0}

    monkeypatch.setattr(final_model, "evaluate_stored", remember)
    settings = json.loads((copied / "config.yaml").read_text())
    main(average_checkpoints.settings_of(copied))
    chosen = "moving_average" if average_wer < 50 else "best_checkpoint"
    assert measured["moving_average"] != measured["best_checkpoint"]
    assert sha256(copied / "final_model" / "model.safetensors") == measured[chosen]
    average = load_file(copied / "checkpoints" / "step-00000012" / "moving_average.safetensors")
    final = load_file(copied / "final_model" / "model.safetensors")
    assert all(torch.equal(final[n], t) for n, t in average.items()) == (chosen == "moving_average")
    assert not (copied / "moving_average").exists() and settings["final_dtype"] == "float32"
    rows = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    assert [row["final/wer"] for row in rows if "final/wer" in row][-1] == min(average_wer, 50.0)
    assert f"final_model is the {chosen.replace('_', ' ')}" in capsys.readouterr().out
    card = (copied / "final_model" / "README.md").read_text()
    assert ("moving average" in card) == (chosen == "moving_average")


def test_averages_of_a_run_are_measured_and_the_best_is_its_final_model(copied, monkeypatch, capsys):
    measured, transcribe = {}, average_checkpoints.transcribe_shares

    def remember(model, *args):
        measured[len(measured)] = {n: p.detach().clone() for n, p in model.model.named_parameters()}
        return transcribe(model, *args)

    monkeypatch.setattr(average_checkpoints, "transcribe_shares", remember)
    average_checkpoints.command(["--run_dir", str(copied), "--last", "4", "--best", "2"])
    out = capsys.readouterr().out
    results = {one["name"]: one for one in json.loads((copied / "averages" / "results.json").read_text())}
    assert list(results) == ["best-1", "last-4", "best-2", "moving"]
    lowest = min(results.values(), key=lambda one: one["wer"]["value"])
    assert f"final_model is {lowest['name']}" in out
    kept = load_file(copied / "final_model" / "model.safetensors")
    number = list(results).index(lowest["name"])
    assert all(torch.equal(measured[number][name], tensor) for name, tensor in kept.items())
    assert lowest["origin"] in (copied / "final_model" / "README.md").read_text()
    of_last = load_file(copied / "averages" / "last-4" / "model.safetensors")
    for name, tensor in of_last.items():
        expected = np.mean([weights(copied, step)[name] for step in (9, 10, 11, 12)], axis=0)
        assert np.array_equal(tensor.numpy(), expected.astype(np.float32)), name
    model = transformers.Qwen3ASRForConditionalGeneration.from_pretrained(copied / "averages" / "last-4")
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, of_last[TIED])
    before = (copied / "averages" / "last-4" / "model.safetensors").stat().st_mtime_ns
    average_checkpoints.command(["--run_dir", str(copied), "--last", "4", "--best", "2"])
    assert (copied / "averages" / "last-4" / "model.safetensors").stat().st_mtime_ns == before, "made once"


def test_fewer_checkpoints_than_asked_for_are_said(copied, capsys):
    for step in range(1, 11):
        shutil.rmtree(copied / "checkpoints" / f"step-{step:08d}")
    average_checkpoints.command(["--run_dir", str(copied), "--last", "5", "--best", "0"])
    assert "last-5: only 2 of them are there, more are kept with a larger save_total_limit" in capsys.readouterr().out
    average = load_file(copied / "averages" / "last-2" / "model.safetensors")[TIED]
    expected = np.mean([weights(copied, step)[TIED] for step in (11, 12)], axis=0)
    assert np.array_equal(average.numpy(), expected.astype(np.float32))
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(InputError, match="no valid checkpoint is in"):
        average_checkpoints.command(["--run_dir", str(copied)])


def test_a_decay_that_is_none_is_refused(config):
    for decay in (0.0, 1.0):
        with pytest.raises(InputError, match="ema_decay must be between 0 and 1"):
            dataclasses.replace(config, ema_decay=decay).check(1)
