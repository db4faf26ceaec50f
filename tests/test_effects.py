"""The measurement of the recipe's parts: its intervals, its variants, its patches, and the command itself."""

import dataclasses
import functools
import json
import math
import shlex
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEMO
from forked import forked
from safetensors.torch import load_file

import train_hebrew_asr_enhanced as training
import train_round2_gradual as round2
from benchmarks import effects, effects_report
from benchmarks.effects import BY_NAME, VARIANTS, Options, Run
from benchmarks.effects_report import change
from hebrew_asr.checkpoints import store
from hebrew_asr.errors import InputError
from hebrew_asr.model import stages as stages_module
from hebrew_asr.model.loss import IGNORED_LABEL

SEEDS, UTTERANCES = 5, 340


# ----------------------------------------------------------------------------------------------------------- Intervals


def drawn(rng, ratio, by_seed, by_variant_and_seed, by_variant_and_utterance, seeds=SEEDS):
    """Errors of a variant and of another, where each seed and each utterance is drawn; their true ratio is `ratio`."""
    words = rng.integers(2, 7, UTTERANCES)
    difficulty = rng.beta(0.6, 2.4, UTTERANCES)[None, :] * np.exp(rng.normal(0, by_seed, (seeds, 1)))
    seed = rng.lognormal(-(by_variant_and_seed**2) / 2, by_variant_and_seed, (seeds, 1))
    utterance = rng.lognormal(-(by_variant_and_utterance**2) / 2, by_variant_and_utterance, (1, UTTERANCES))
    return rng.poisson(words * difficulty * ratio * seed * utterance), rng.poisson(words * difficulty + 0 * seed)


def coverage(worlds, *spread, seeds=SEEDS, interval=change):
    rng, held = np.random.default_rng(0), 0
    for _ in range(worlds):
        found = interval(*drawn(rng, 1.1, *spread, seeds=seeds))
        held += found.low <= 10 <= found.high
    return 100 * held / worlds


@pytest.mark.parametrize(
    "spread", [(0, 0, 0), (0.05, 0.03, 0.3), (0.05, 0.1, 0.3), (0.05, 0.1, 0), (0.05, 0, 0.8)], ids=str
)
def test_intervals_hold_as_often_as_they_say(spread):
    assert 93 <= coverage(1500, *spread) <= 97


def test_intervals_over_utterances_alone_or_over_seeds_alone_would_not_hold():
    def over_utterances(errors, others):
        parts = (errors - errors.sum() / others.sum() * others).sum(axis=0) / errors.sum()
        return around(errors, others, 1.97 * math.sqrt(parts @ parts))

    def over_seeds(errors, others):
        parts = (errors - errors.sum() / others.sum() * others).sum(axis=1) / errors.sum()
        return around(errors, others, 2.776 * math.sqrt(parts @ parts * SEEDS / (SEEDS - 1)))

    def around(errors, others, half):
        middle = math.log(errors.sum() / others.sum())
        return effects_report.Change(0, 100 * math.expm1(middle - half), 100 * math.expm1(middle + half), p=1)

    assert coverage(500, 0.05, 0.2, 0.3, interval=over_utterances) < 75
    assert coverage(500, 0.05, 0, 0.8, interval=over_seeds) < 80


def test_a_change_is_that_of_the_pooled_rates_and_turns_over_with_its_sides():
    errors, others = drawn(np.random.default_rng(1), 1.3, 0.05, 0.05, 0.3)
    one, back = change(errors, others), change(others, errors)
    assert one.value == pytest.approx(100 * (errors.sum() / others.sum() - 1))
    assert 1 + back.low / 100 == pytest.approx(1 / (1 + one.high / 100))
    assert one.low < one.value < one.high and one.p == pytest.approx(back.p)
    same = change(errors, errors)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_utterances_of_one_recording_count_together():
    errors, others = drawn(np.random.default_rng(2), 1.3, 0.05, 0, 0.8)
    alone, doubled = change(errors, others), change(np.tile(errors, 2), np.tile(others, 2))
    together = change(np.tile(errors, 2), np.tile(others, 2), [*range(UTTERANCES)] * 2)
    assert together.high - together.low == pytest.approx(alone.high - alone.low)
    assert doubled.high - doubled.low < 0.9 * (alone.high - alone.low)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="two or more seeds"):
        change(np.ones((1, 3)), np.ones((1, 3)))
    with pytest.raises(ValueError, match="same"):
        change(np.ones((2, 3)), np.ones((2, 4)))


def test_a_verdict_says_what_the_interval_says_and_how_it_stands_to_the_expectation():
    def said(low, high, expected, adds=False):
        row = {"part": "it", "adds": adds, "expected": expected}
        return effects_report.verdict({"low": low, "high": high, "certain": False}, row)

    assert said(1, 3, (5.3, 11.1)) == "it: helps, less than expected"
    assert said(-3, 2, (5.3, 11.1)) == "it: no help seen, less than expected"
    assert said(-3, 8, (5.3, 11.1)) == "it: no help seen, the expectation is not excluded"
    assert said(13, 20, (5.3, 11.1)) == "it: helps, more than expected"
    assert said(-20, -13, (-10, -5), adds=True) == "it: helps, more than expected"
    assert said(1, 20, (-10, -5), adds=True) == "it: harms, less than expected"
    assert said(-9, -1, None, adds=True) == "it: helps"
    assert said(-9, -1, None) == "it: harms"


def test_stars_are_holms_procedure():
    rows = [{"sets": {"a": {"change": {"p": p}}, "b": {"change": None}}} for p in (0.03, 0.001, 0.02, 0.5)]
    effects_report.mark_certain(rows)
    assert [row["sets"]["a"]["change"]["certain"] for row in rows] == [False, True, False, False]


# ------------------------------------------------------------------------------------------------------------ Variants


@pytest.fixture
def options(tmp_path):
    return Options(tmp_path / "work", rows=40, test_sentences=12)


def different(first, second):
    one, two = dataclasses.asdict(first), dataclasses.asdict(second)
    return {name for name in one if one[name] != two[name]}


def test_a_variant_changes_what_it_says_and_nothing_else(options):
    recipe = effects.settings(options, Run(BY_NAME["recipe"], 3))
    paced = {"output_dir", "eval_steps", "logging_steps", "save_steps"}
    for variant in VARIANTS:
        found = effects.settings(options, Run(variant, 3))
        expected = {name for name, value in variant.settings.items() if getattr(recipe, name) != value}
        expected |= {"stages"} if variant.stages or variant.rates != 1 else set()
        expected |= {"target_effective_batch"} if variant.batch != 1 else set()
        expected |= {"save_total_limit"} if variant.average > 1 else set()
        expected |= {"stages", "num_epochs"} if variant.epochs != 1 else set()
        assert different(recipe, found) - paced == expected, variant.name
        assert found.seed == 3 and found.train_sources == recipe.train_sources
        found.check(1)
    assert effects.settings(options, Run(BY_NAME["batch-256"], 0)).target_effective_batch == 64
    short = effects.settings(options, Run(BY_NAME["short"], 0))
    assert short.num_epochs == recipe.num_epochs / 4
    assert [s.last_epoch for s in short.stages] == [s.last_epoch / 4 for s in recipe.stages]
    real = dataclasses.replace(options, real=True, changes=("--model_name_or_path", str(DEMO / "base")))
    assert effects.settings(real, Run(BY_NAME["batch-256"], 0)).target_effective_batch == 256
    assert effects.settings(real, Run(BY_NAME["batch-16"], 0)).target_effective_batch == 16
    with pytest.raises(InputError, match="leave short out"):
        effects.settings(real, Run(BY_NAME["short"], 0))


def test_stages_are_what_the_variants_names_say():
    stages, layers = round2.round2().stages, (24, 28)
    one = effects.one_rate(stages, layers)
    assert list(one[0].learning_rates.values()) == pytest.approx([1e-4] * 3)
    assert list(one[1].learning_rates.values()) == pytest.approx([(1e-4 * 3e-5 * 3e-5 * 1e-4) ** 0.25] * 4)
    free = effects.nothing_frozen(stages, layers)
    assert [set(stage.learning_rates) for stage in free] == [set(stages_module.COMPONENTS)] * 2
    assert free[0].learning_rates["audio_top"] == 3e-5 and free[0].learning_rates["llm_top"] == 5e-5
    assert {(stage.audio_top_layers, stage.llm_top_layers) for stage in free} == {layers}
    (b,), (a,) = effects.only_first(stages, layers), effects.only_last(stages, layers)
    assert (b.name, b.last_epoch, a.name, a.last_epoch) == ("B", 5, "A", 5)


def test_each_expectation_is_the_specs_read_in_the_direction_of_its_row():
    assert BY_NAME["no-specaugment"].expected == pytest.approx((100 / 0.95 - 100, 100 / 0.9 - 100))
    assert BY_NAME["only-specaugment"].expected == (-10, -5)
    assert BY_NAME["plain"].expected == pytest.approx((100 / 0.85 - 100, 100 / 0.7 - 100))


def test_seeds_draw_other_utterances_and_sets_do_not_share_sentences(options):
    effects.write_data(options, [0, 1, 0])
    texts = {}
    for name, split in (("train-0", "train"), ("train-1", "train"), ("dev", "test"), ("clean", "test")):
        table = effects.pyarrow.parquet.read_table(options.work / "data" / name / f"{split}.parquet")
        texts[name] = table["transcript"].to_pylist()
    assert len(texts["train-0"]) == 40 and texts["train-0"] != texts["train-1"]
    assert len(texts["clean"]) == 12 and not set(texts["clean"]) & set(texts["dev"])


# ------------------------------------------------------------------------------------------------------------- Patches


def test_labels_on_the_prompt_are_all_tokens_but_the_audio(processor):
    collator = training.DataCollatorSpeechSeq2SeqWithPadding(processor, round2.demo())
    frames = np.zeros((128, 130), np.float32)
    utterances = [
        {"features": frames, "text": t, "language": "Hebrew", "context": "", "epoch": 1, "index": 0}
        for t in ("שלום", "היום בגן")
    ]
    usual = collator.packed(utterances)
    with effects.labels_on_prompt():
        batch = collator.packed(utterances)
        assert (collator.packed([])["labels"] == IGNORED_LABEL).all()
    assert (collator.packed(utterances)["labels"] == usual["labels"]).all(), "the patch is taken off again"
    tokens, labels = batch["input_ids"], batch["labels"]
    was = usual["labels"] != IGNORED_LABEL
    assert (labels[was] == usual["labels"][was]).all()
    begins = (batch["position_ids"] == 0).int()
    expected = (tokens != collator.audio_token_id) & (begins == 0)
    assert ((labels != IGNORED_LABEL) == expected).all()
    assert (labels != IGNORED_LABEL).sum() > was.sum() + 2 * 10
    assert len(batch["label_places"]) == (labels != IGNORED_LABEL).sum(), "they are what the loss is of"


def test_bf16_weights_are_numbers_of_bf16_after_every_step(options):
    effects.write_data(options, [0])
    options = dataclasses.replace(options, changes=("--max_steps", "2", "--generation_max_new_tokens", "20"))
    run = Run(BY_NAME["bf16-weights"], 0)
    with effects.PATCHES[run.variant.patch]():
        config = effects.settings(options, run)
        config.save_steps = 1
        training.main(config)
    last, first = store.names(run.folder(options) / "run" / "checkpoints")
    for file in (folder / name for folder in (first, last) for name in ("model.safetensors", "optimizer.safetensors")):
        tensors = load_file(file)
        assert tensors and all((t == t.bfloat16()).all() for t in tensors.values()), file
    start = load_file(DEMO / "base" / "model.safetensors")
    now = load_file(last / "model.safetensors")
    assert any((now[name] != start[name].bfloat16()).any() for name in now), "it trains"


# ------------------------------------------------------------------------------------------------------------- Command


SHORT = ("--rows", 40, "--test_sentences", 12, "--max_steps", 3, "--generation_max_new_tokens", 20)


def test_the_last_checkpoints_are_averaged(tmp_path):
    for step in (1, 2, 3):
        tensors = {"model.safetensors": {"w": torch.full((2,), float(step) ** 2)}}
        store.write(tmp_path / "run" / "checkpoints", step, tensors, {}, {"wer": None})
    effects.write_last(tmp_path, 2)
    assert load_file(tmp_path / "last" / "model.safetensors")["w"].tolist() == [6.5, 6.5]
    effects.write_last(tmp_path, 1)
    assert load_file(tmp_path / "last" / "model.safetensors")["w"].tolist() == [9, 9]
    with pytest.raises(InputError, match="3 checkpoints are there, 4 are to be averaged"):
        effects.write_last(tmp_path, 4)


def test_commands_are_printed_for_what_is_left(tmp_path, capsys):
    line = [*map(str, SHORT), "--work", str(tmp_path), "--variants", "linear", "--seeds", "2", "--print_commands"]
    effects.command(line)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4, "two seeds of linear and of the recipe"
    assert "--here" in lines[0] and "evaluate_hebrew_asr.py --model" in lines[0] and "--max_steps 3" in lines[0]
    with pytest.raises(InputError, match="of other settings"):
        effects.command([*line, "--weight_decay", "0.5"])


def test_an_interrupted_queue_ends_its_runs_and_what_they_started(tmp_path):
    seen = tmp_path / "pid"

    def body():
        subprocess.run(["bash", "-c", f"echo $$ > {seen}; exec sleep 600"], check=True)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(3)
    try:
        with pytest.raises(KeyboardInterrupt):
            effects.work_off([("one", body, tmp_path / "log.txt")], 1, str)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    pid, end = int(seen.read_text()), time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_what_failed_is_named_and_the_others_run(tmp_path, capsys):
    jobs = [(name, functools.partial(int, text), tmp_path / name) for name, text in (("a", "x"), ("b", "1"))]
    assert effects.work_off(jobs, 2, "job {} is done".format) == ["a"]
    said = capsys.readouterr().out
    assert f"a: FAILED, see {tmp_path / 'a'}" in said and "b: job 1 is done" in said and "[2/2]" in said


@pytest.mark.slow
def test_the_table_is_made_once_and_read_again(tmp_path):
    line = ["benchmarks/effects.py", "--quick", *SHORT, "--work", tmp_path / "work", "--json", tmp_path / "found.json"]
    done = forked(*line, "--plot", tmp_path / "plot.png", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[4/4]" in done.stdout and "min left" in done.stdout and "| without SpecAugment | 3 |" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(run["variant"], run["seed"]) for run in found["runs"]] == [
        ("recipe", 0), ("no-specaugment", 0), ("recipe", 1), ("no-specaugment", 1),
    ]  # fmt: skip
    assert all(run["curves"]["eval/wer"][0][0] == 0 and run["curves"]["eval/wer"][-1][0] == 3 for run in found["runs"])
    assert found["runs"][0]["sets"]["clean"]["words"] == found["runs"][3]["sets"]["clean"]["words"]
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    again = forked(*line, timeout=300)
    assert "4 of 4 runs are done" in again.stdout and "[1/" not in again.stdout
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == found["rows"]


@pytest.mark.slow
def test_printed_commands_do_what_the_queue_does(tmp_path):
    """Patched training in two processes, then the usual evaluation; then the queue finds nothing to do of that run."""
    line = ["benchmarks/effects.py", *SHORT, "--work", tmp_path, "--variants", "prompt-labels", "--seeds", 2]
    line += ["--processes", 2, "--print_commands"]
    printed = forked(*line).stdout.splitlines()
    assert len(printed) == 4, "two seeds of the recipe and of the variant"
    mine = printed[1]
    assert "prompt-labels" in mine
    for part in mine.split(" && "):
        _, *launcher, script, first = shlex.split(part)[:6]
        assert launcher == ["-m", "torch.distributed.run", "--nproc_per_node=2"]
        done = forked(script, first, *shlex.split(part)[6:], processes=2)
        assert done.returncode == 0, done.stdout + done.stderr
    assert forked(*line).stdout.splitlines() == [other for other in printed if other != mine]


@pytest.mark.slow
def test_a_search_gives_up_trials_and_confirms_what_it_found(tmp_path):
    pytest.importorskip("optuna")
    line = ["benchmarks/effects.py", "--search", "--trials", 6, "--seeds", 2, *SHORT, "--work", tmp_path / "work"]
    done = forked(*line, "--json", tmp_path / "found.json", timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["trials"]) == 6 and {trial["state"] for trial in found["trials"]} <= {"COMPLETE", "PRUNED"}
    assert found["trials"][0]["parameters"]["projector"] == 1.0, "the recipe itself is the first trial"
    complete = [len(trial["wers"]) for trial in found["trials"] if trial["state"] == "COMPLETE"]
    assert set(complete) == {max(len(trial["wers"]) for trial in found["trials"])}, "all are compared at the same steps"
    assert found["best"] in [trial["parameters"] for trial in found["trials"][1:]]
    assert [row["title"] for row in found["rows"]] == ["Round 2's recipe", "what the search found"]
    assert found["rows"][1]["sets"]["clean"]["change"]["low"] <= found["rows"][1]["sets"]["clean"]["change"]["high"]
    assert effects.SEARCH_SEED not in {run["seed"] for run in found["runs"]}
