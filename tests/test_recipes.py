"""The benchmark of recipes: what a run is, and what its table says."""

import argparse
import dataclasses
import json
import re
import sys
from unittest import mock

import numpy as np
import pytest

from benchmarks import recipes, recipes_data, recipes_lora, recipes_real
from benchmarks.recipes import RECIPES, Run
from hebrew_asr.errors import InputError
from hebrew_asr.files import DEMO


def test_every_recipe_is_a_run_that_can_be_and_a_changed_one_is_run_anew(tmp_path, monkeypatch):
    for name in RECIPES:
        config = recipes.settings(tmp_path, Run(name, 175, 3))
        config.check(processes=1)
        assert config.stages[-1].last_epoch == config.num_epochs == round(20 * RECIPES[name].epochs)
    drawn = {seed: recipes.sources(tmp_path, Run("all", 175, seed))[0].path for seed in (3, 4)}
    assert drawn[3] == config.train_sources[0].path != drawn[4]
    before = Run("all", 175, 3).folder(tmp_path)
    monkeypatch.setitem(RECIPES, "all", dataclasses.replace(RECIPES["all"], settings={"weight_decay": 0.1}))
    assert Run("all", 175, 3).folder(tmp_path) != before


def test_a_factor_in_a_name_is_one_of_all_rates_and_another_run(tmp_path):
    rates, twice = (recipes.recipe_of(name).stages[-1][1] for name in ("b_then_a", "b_then_a@2"))
    assert twice == {component: pytest.approx(2 * rate) for component, rate in rates.items()}
    assert Run("b_then_a@2", 175, 3).folder(tmp_path) != Run("b_then_a", 175, 3).folder(tmp_path)
    for name in ("nothing@2", "all@much"):
        with pytest.raises(argparse.ArgumentTypeError, match="is none of b_then_a"):
            recipes.known_recipe(name)


def test_new_sentences_are_none_of_the_demos_and_those_to_choose_by_stay_as_they_are(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", mock.MagicMock())  # nothing is spoken here
    make = recipes_data.speech()
    few, many = (recipes_data.new_sentences(make, count) for count in (600, 1_000))
    assert many[:600] == few and len(set(many)) == 1_000
    stamp = re.compile(r"<\|[\d.]+\|>")
    texts = [text for part in ("corpus", "heldout") for text in recipes_data.texts_of(DEMO / part)]
    known = {part.replace(",", "").rstrip(".").strip() for text in texts for part in stamp.split(text)}
    overlap = known & set(many)
    assert not overlap
    assert not set(recipes_data.DEV_VOICES) & {*make.BASE_VOICES, *make.CORPUS_VOICES, *make.HELDOUT_VOICES}


def test_what_is_not_installed_is_said_with_the_command_that_has_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "speech", None)
    with pytest.raises(InputError, match="uv run --with peft"), recipes_lora.adapters(8, tmp_path):
        pass
    with pytest.raises(InputError, match="uv run --group demo"):
        recipes_data.speech()


def test_what_is_replayed_has_its_share(tmp_path):
    sources = recipes.sources(tmp_path, Run("all_with_replay", 175, 0))
    assert [source.probability for source in sources] == [pytest.approx(0.82), 0.16, 0.02]
    assert [source.replay for source in sources] == [None, True, True]
    sources = recipes.sources(tmp_path, Run("all_0_2", 175, 0))
    assert [source.probability for source in sources] == [pytest.approx(0.98), 0.02], "no English is no source"


def test_the_table_has_means_over_the_seeds_and_changes_against_the_same_seeds():
    def run(name: str, seed: int, errors: int) -> dict:
        one = {"errors": [errors, 1, 2, 3] * 10, "words": [10] * 40, "recordings": None}
        sets = dict.fromkeys(recipes.SPEECH, one)
        return {"name": name, "rows": 175, "seed": seed, "steps": 5, "seconds": 2.0, "empty": 50.0, "sets": sets}

    runs = [run("b_then_a", 0, 4), run("b_then_a", 1, 6), run("all", 0, 1), run("all", 1, 1)]
    frozen, free = recipes.table_of(runs, "b_then_a")
    assert frozen["wer"]["heldout"] == pytest.approx((25 + 30) / 2) and free["wer"]["heldout"] == pytest.approx(17.5)
    assert not frozen["change"] and free["change"]["heldout"]["value"] == pytest.approx(100 * (35 / 55 - 1))
    assert "| 175 | all | 2 | 5 | 2 | 17.50 | -36 (" in recipes.lines_of([frozen, free], "b_then_a")[3]
    assert not recipes.table_of(runs[:3], "b_then_a")[1]["change"], "of one seed there is no interval"


def test_the_real_runs_are_commands_that_run_at_the_hours_of_their_plans(monkeypatch):
    for number, question in enumerate(recipes_real.QUESTIONS, 1):
        recipes_real.recipe(list(question.options)).check(processes=8)
        assert question.against is None or question.against != number
    monkeypatch.setattr(recipes_real, "QUESTIONS", recipes_real.QUESTIONS[:2])
    lines = recipes_real.lines_of_real(8, "A100-40GB", 350.0, 2.0, 20_000, 10.0)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:] if line.startswith("|")]
    commands = [line.partition("train_round2_gradual.py ")[2].split() for line in lines if "train_round2" in line]
    assert len(rows) == len(commands) == 2
    for number, (row, command) in enumerate(zip(rows, commands, strict=True), 1):
        plan = recipes_real.make_plan(recipes_real.recipe(command))  # 8 A100s of 40 GB and 350 hours are its defaults
        assert all(stage.fits for stage in plan.stages) and ("--fsdp" in command) == (command[1] != "b_then_a")
        assert row[0] == str(number) and row[2] in ("", *map(str, range(1, number)))
        assert row[3] == f"{min(plan.hours):.1f}–{max(plan.hours):.1f}"
        assert row[5] == f"{16 * min(plan.hours):,.0f}–{16 * max(plan.hours):,.0f}"


def test_a_change_that_can_be_detected_is_found_in_four_cases_of_five():
    """Drawn anew: the errors of two models on as many utterances, as independent as the demo's recipes are."""
    random, utterances, found = np.random.default_rng(0), 2000, []
    change = recipes_real.detectable(errors=1000)
    for _ in range(400):
        ours, theirs = (random.poisson(mean, utterances) for mean in (0.5 * (1 + change / 100), 0.5))
        differences = ours - ours.sum() / theirs.sum() * theirs
        # PER_ERROR is that of the demo's sets; a Poisson's is the square root of two
        error = recipes_real.PER_ERROR / np.sqrt(2) * np.sqrt((differences**2).sum()) / ours.sum()
        found.append(np.log(ours.sum() / theirs.sum()) / error > 1.96)
    assert np.mean(found) == pytest.approx(0.8, abs=0.06)


def test_a_run_of_which_nothing_could_be_measured_is_not_done(tmp_path):
    folder = recipes.TEST.folder(tmp_path)
    folder.mkdir(parents=True)
    for files, reasons, is_done in (
        (["results.json"], [None], False),
        (["results.json", "utterances.parquet"], [None], False),
        (["results.json", "utterances.parquet", "table.md"], ["cannot be loaded", None], False),
        (["results.json", "utterances.parquet", "table.md"], [None, None], True),
    ):
        for file in files:
            (folder / file).touch()
        (folder / "results.json").write_text(json.dumps({"results": [{"reason": reason} for reason in reasons]}))
        assert recipes.TEST.is_done(tmp_path) is is_done, (files, reasons)
