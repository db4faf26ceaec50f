"""Two processes train what one trains: same losses, same weights, every rank bit for bit, over a stage switch."""

import dataclasses
import json
import statistics
from pathlib import Path

import pytest
import torch
from forked import forked
from safetensors.torch import load_file
from train_and_keep import keep_after_training

from hebrew_asr.data.mixture import Mixture
from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.model.packing import useful_tokens
from hebrew_asr.training.batches import GlobalBatchSampler, UtteranceTokens
from train_hebrew_asr_enhanced import DataCollatorSpeechSeq2SeqWithPadding, GradualUnfreezeTrainer, TrainingConfig, main

HERE = Path(__file__).parent
SPEEDS = {
    "train/audio_seconds_per_second",
    "train/waiting_for_data",
    "train/gigaflops_per_second",
    "train/useful_tokens",
    "train/balance",
    "train/rank_spread",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus, heldout):
    """The same training in two processes of which one is slow, in one, and in two with the DDP fix taken out."""
    from conftest import small_config

    folder = tmp_path_factory.mktemp("processes")

    def settings(name: str) -> TrainingConfig:
        config = small_config(corpus, heldout, folder / name / "run")
        config.tokens_per_micro_batch = 180  # about 3 or 4 micro-batches in one process, 2 in each of two
        for stage in config.stages:  # small steps: what is compared is arithmetic, not learning
            stage.learning_rates = {component: rate / 50 for component, rate in stage.learning_rates.items()}
        return config

    def two_processes(name: str, *flags: str) -> None:
        file = folder / f"{name}.json"
        file.write_text(json.dumps(dataclasses.asdict(settings(name))))
        done = forked("tests/train_and_keep.py", file, folder / name, *flags, processes=2)
        assert done.returncode == 0, done.stdout + done.stderr

    two_processes("two", "slow_rank")
    two_processes("broken", "without_rewrap")
    original, GradualUnfreezeTrainer.train = keep_after_training(folder / "one")
    try:
        main(settings("one"))
    finally:
        GradualUnfreezeTrainer.train = original
    return folder


def weights(runs: Path, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(runs / name / f"{rank}.safetensors")


def metrics(runs: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (runs / name / "run" / "metrics.jsonl").read_text().splitlines()]


def test_ranks_are_bit_identical_after_the_switch_and_the_encoder_moved(runs, model):
    zero, one = weights(runs, "two", 0), weights(runs, "two", 1)
    assert all(torch.equal(zero[name], one[name]) for name in zero)
    start = dict(model.named_parameters())
    top = model.config.audio_config.num_hidden_layers - 1
    moved = {name for name in zero if not torch.equal(zero[name], start[name].detach())}
    assert f"model.audio_tower.layers.{top}.fc1.weight" in moved
    assert not {name for name in moved if "audio_tower.layers.0." in name}, "frozen layers rest"


def test_without_wrapping_again_the_ranks_drift_apart(runs):
    zero, one = weights(runs, "broken", 0), weights(runs, "broken", 1)
    drifted = {name for name in zero if not torch.equal(zero[name], one[name])}
    assert any("audio_tower.layers" in name for name in drifted)


def test_one_process_ends_at_the_same_weights(runs):
    one, two = weights(runs, "one"), weights(runs, "two")
    for name in one:
        if "audio_tower" in name and name.endswith("k_proj.bias"):
            continue  # softmax does not see it: its gradient is rounding, which Adam amplifies
        assert torch.allclose(one[name], two[name], rtol=0, atol=1e-5), name


def test_one_process_logs_the_same_losses_and_evaluations(runs):
    pairs = list(zip(metrics(runs, "one"), metrics(runs, "two"), strict=True))
    assert len(pairs) == 12 + 4, "12 steps; before, at the switch, at the end, and the final model"
    for one, two in pairs:
        assert one.keys() == two.keys()
        for name in one:
            if one[name] is None or name in SPEEDS:
                continue
            assert one[name] == pytest.approx(two[name], rel=2e-5, abs=1e-6), (name, one["step"])
    evaluations = [one for one, _ in pairs if "eval/wer" in one]
    assert all(row["eval/utterances"] == 11 for row in evaluations)


def test_the_log_says_how_far_a_slow_process_is_behind(runs):
    """Although the other one waits for its gradients in the same backward pass."""
    spreads = {
        name: [row["train/rank_spread"] for row in metrics(runs, name) if "train/loss" in row]
        for name in ("one", "two")
    }
    assert set(spreads["one"]) == {0.0}
    assert statistics.median(spreads["two"]) > 0.15


def test_the_balance_is_that_of_the_dealt_positions(runs, config, processor, train_rows):
    config.tokens_per_micro_batch = 180
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    dataset = SpeechDataset(train_rows, processor, config, training=True)
    tokens = UtteranceTokens(train_rows, collator, config)
    mixture = Mixture(train_rows, config.train_sources, config.seed)
    shares = [iter(GlobalBatchSampler(mixture, tokens, config, rank, 2)) for rank in (0, 1)]
    for row in [row for row in metrics(runs, "two") if "train/loss" in row][:6]:
        batches = [
            [collator.packed(utterances) for utterances in dataset.__getitems__(next(share))] for share in shares
        ]
        positions = [sum(batch["input_ids"].numel() for batch in mine) for mine in batches]
        useful = sum(useful_tokens(batch) for mine in batches for batch in mine if (batch["labels"] >= 0).any())
        assert row["train/balance"] == pytest.approx(useful / (2 * max(positions)))
        assert row["train/useful_tokens"] == pytest.approx(useful / sum(positions))


def test_moments_go_on_over_the_switch_and_all_that_trains_is_fp32(runs):
    adam = json.loads((runs / "two" / "0.json").read_text())
    assert {entry["steps"] for name, entry in adam.items() if "projector" in name} == {12}
    assert {entry["steps"] for name, entry in adam.items() if "audio_tower.layers" in name} == {6}
    assert all(entry["types"] == ["torch.float32"] * 2 for entry in adam.values())
