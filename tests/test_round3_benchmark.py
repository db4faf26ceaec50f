"""The comparison of Round 3 with further cross-entropy: its table, and what its runs are named by."""

import pytest
import torch
from conftest import DEMO

from benchmarks.gradient_signal import agreement, noise_scale, share_of_signal
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


def test_the_signal_in_steps_is_what_was_put_into_them():
    random = torch.Generator().manual_seed(1)
    size, steps = 20_000, 40
    signal = torch.randn(size, generator=random)

    def drawn(signal: torch.Tensor, noise: float) -> torch.Tensor:
        return signal + noise * torch.randn(steps, size, generator=random)

    strong = drawn(signal, 3.0)
    share, low, high = share_of_signal(strong)
    assert share == pytest.approx(1 / 10, abs=0.01) and low < share < high
    assert noise_scale(share) == pytest.approx(64 * 9, rel=0.15)
    share, low, high = share_of_signal(drawn(torch.zeros(size), 3.0))
    assert abs(share) < 0.002 and low < 0 < high

    common = torch.randn(steps, size, generator=random)  # the utterances that both see do not make them agree
    other = torch.randn(size, generator=random)
    assert agreement(drawn(signal, 3.0) + common, drawn(other, 3.0) + common) == pytest.approx(0, abs=0.1)
    assert agreement(strong + common, drawn(signal + other, 3.0) + common) == pytest.approx(2**-0.5, abs=0.1)
