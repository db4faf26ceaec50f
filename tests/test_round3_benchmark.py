"""The comparison of Round 3 with further cross-entropy: its table, and what its runs are named by."""

import pytest
from conftest import DEMO

from benchmarks.round3 import Arm, Setup, folder_of, table


def result(objective: str, scale: float, seed: int, noisy: list[int]) -> dict:
    clean = [{"errors": 1, "words": 4, "loop": False}] * 3
    return {
        "arm": {"objective": objective, "scale": scale, "seed": seed, "epochs": 1, "options": ""},
        "cpu_seconds": 10.0,
        "clean": clean,
        "noisy": [{"errors": errors, "words": 5, "loop": errors > 4} for errors in noisy],
    }


def test_the_table_is_of_all_seeds_and_against_the_best_rate_of_cross_entropy():
    start = {part: result("ce", 1, 1, [2, 2, 2])[part] for part in ("clean", "noisy")}
    results = [
        *(result("gspo", 1, seed, noisy) for seed, noisy in ((1, [0, 1, 2]), (2, [2, 1, 0]))),
        *(result("ce", 1, seed, [2, 2, 1]) for seed in (1, 2)),
        *(result("ce", 3, seed, [5, 5, 5]) for seed in (1, 2)),
    ]
    rows = table(start, results)
    gspo = rows["gspo ×1, 1 epochs"]
    assert (rows["start"]["wer_noisy"], gspo["wer_noisy"]) == (pytest.approx(40), pytest.approx(20))
    assert gspo["wer_noisy_of_seeds"] == [20, 20] and gspo["seeds"] == 2
    assert gspo["noisy, less the start"]["value"] == pytest.approx(-20)
    assert gspo["clean, less the start"]["value"] == 0
    assert gspo["noisy, less ce ×1, 1 epochs"]["value"] == pytest.approx(20 - 100 / 3), "the better of the two rates"
    assert rows["ce ×3, 1 epochs"]["loops"] == 3


def test_a_run_is_named_by_all_that_it_depends_on(tmp_path):
    def name(arm: Arm, **others) -> str:
        setup = {"work": tmp_path, "start": DEMO / "tuned", "utterances": 100, "measure": "dev"} | others
        return folder_of(arm, Setup(**setup)).name

    arm = Arm("gspo", 1.0, 1)
    names = [
        name(arm),
        name(Arm("mwer", 1.0, 1)),
        name(Arm("gspo", 3.0, 1)),
        name(Arm("gspo", 1.0, 2)),
        name(Arm("gspo", 1.0, 1, epochs=2)),
        name(Arm("gspo", 1.0, 1, options='{"temperature": 1.0}')),
        name(arm, utterances=50),
        name(arm, start=DEMO / "base"),
    ]
    assert len(set(names)) == len(names)
    assert name(arm, measure="test") == names[0], "a run is measured on each set, and not run again"
