"""A few hours of recordings are one command, whose settings follow from how much there is."""

import json

import pytest

from hebrew_asr.errors import InputError
from scripts.train_few_hours import command, preset, recipe


def test_the_less_there_is_the_more_often_it_is_heard_and_the_more_of_it_is_held_out():
    shares, epochs = [], []
    for hours in (0.3, 1, 3, 10, 50):
        config = preset(hours, round(600 * hours))
        config.check(processes=1)
        steps = 600 * hours * (1 - config.eval_fraction) / 16 * config.num_epochs
        assert config.stages[-1].last_epoch == config.num_epochs and 3 <= config.num_epochs <= 15
        assert config.eval_steps == config.save_steps and 4 <= steps / config.eval_steps <= 9
        shares.append(config.eval_fraction)
        epochs.append(config.num_epochs)
    assert shares == pytest.approx([0.2, 1 / 6, 1 / 18, 0.02, 0.02])
    assert epochs == sorted(epochs, reverse=True) and epochs[0] == 15 and epochs[-1] == 3


def test_an_option_replaces_what_the_preset_says():
    config = recipe(["--data", "calls", "--num_epochs", "4", "--model_name_or_path", "m"], 1.0, 600)
    assert config.num_epochs == 4 and config.train_sources[0].path == "calls"
    assert (config.target_wer, config.tracker, config.eval_sources) == (None, "trackio", [])
    with pytest.raises(InputError, match="give --data"):
        recipe([])


def test_the_demo_is_twenty_minutes_and_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command("--demo --max_steps 2 --tracker none --eval_batch_size 8 --max_eval_utterances 8 --output_dir run".split())
    said = capsys.readouterr().out
    assert "0.34 hours in " in said and "20% held out" in said and "NOT met: WER" not in said
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
