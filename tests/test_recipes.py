"""The benchmark of recipes: what a run is, and what its table says."""

import dataclasses

import pytest

from benchmarks import recipes
from benchmarks.recipes import RECIPES, Run


def test_every_recipe_is_a_run_that_can_be_and_a_changed_one_is_run_anew(tmp_path, monkeypatch):
    for name in RECIPES:
        config = recipes.settings(tmp_path, Run(name, 175, 3))
        config.check(processes=1)
        assert config.stages[-1].last_epoch == config.num_epochs == 20
    drawn = {seed: recipes.sources(tmp_path, Run("all", 175, seed))[0].path for seed in (3, 4)}
    assert drawn[3] == config.train_sources[0].path != drawn[4]
    before = Run("all", 175, 3).folder(tmp_path)
    monkeypatch.setitem(RECIPES, "all", dataclasses.replace(RECIPES["all"], settings={"weight_decay": 0.1}))
    assert Run("all", 175, 3).folder(tmp_path) != before


def test_what_is_replayed_has_its_share(tmp_path):
    sources = recipes.sources(tmp_path, Run("all_replay", 175, 0))
    assert [source.probability for source in sources] == [pytest.approx(0.88), 0.1, 0.02]
    assert [source.replay for source in sources] == [None, True, True]


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
