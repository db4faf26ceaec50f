"""A domain is learned with the general mix replayed, and what was forgotten shuts the gate."""

import json

import pyarrow.parquet
import pytest
from conftest import DEMO, first_rows
from forked import forked
from test_languages import sentences

from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation import measuring
from hebrew_asr.evaluation.settings import EvaluationSet, read_set
from scripts import train_domain
from scripts.train_domain import ENGLISH, demo, domain, mixed, recipe
from train_round2_gradual import round2


def test_the_recipe_replays_the_general_mix_by_its_shares_at_low_rates():
    general, test = DataConfig().train_sources, Source("calls", split="test")
    config = domain(mixed(Source("calls"), general, ENGLISH, Source("noise")), test)
    shares = [(source.path, source.language, source.probability) for source in config.train_sources]
    assert [share[:2] for share in shares] == [
        ("calls", None),
        ("ivrit-ai/crowd-transcribe-v5", None),
        ("ivrit-ai/crowd-recital-whisper-training", None),
        ("google/fleurs", "English"),
        ("noise", "None"),
    ]
    assert [share[2] for share in shares] == pytest.approx([0.25, 0.5 * 0.97, 0.5 * 0.03, 0.2, 0.05])
    without = mixed(Source("calls"), general, ENGLISH, None)
    assert sum(source.probability for source in without) == pytest.approx(1) and without[0].probability > 0.26
    for stage in config.stages:
        for component, rate in stage.learning_rates.items():
            assert rate <= min(s.learning_rates.get(component, 1) for s in round2().stages) / 2
    config.check(processes=8)
    demo().check(processes=1)


def test_the_gates_are_the_general_set_english_and_silence():
    config, arguments = recipe(["--demo"])
    sets = [read_set(text, {}) for text in arguments[1 : arguments.index("--max_wer_rise")]]
    assert [(one.name, one.language, one.guarded) for one in sets] == [
        ("domain-1", "Hebrew", False),
        ("heldout", "Hebrew", True),
        ("english", "English", False),
        ("non-speech", "None", False),
    ]
    assert sets[0].source.path == config.eval_sources[0].path and config.output_dir.startswith("runs/domain-")
    with pytest.raises(InputError, match="give --domain and --domain_test, or --demo"):
        recipe(["--domain", "calls"])
    with pytest.raises(InputError, match="give --model_name_or_path"):
        recipe(["--domain", "calls", "--domain_test", "calls"])
    with pytest.raises(InputError, match=r"--domain: Source (has no|needs)"):
        recipe(["--domain", '{"pth": "calls"}', "--domain_test", "x", "--model_name_or_path", "m"])


def test_local_data_need_no_hub(tmp_path):
    folders = {name: str(tmp_path / name) for name in ("calls", "test", "hebrew")}
    options = ["--model_name_or_path", "m", "--domain", folders["calls"], "--domain_test", folders["test"]]
    config, arguments = recipe([*options, "--general", folders["hebrew"], "--english", "none", "--gates", "none"])
    shares = {source.path: source.probability for source in config.train_sources}
    assert shares == pytest.approx({folders["calls"]: 1 / 3, folders["hebrew"]: 2 / 3})
    (one,) = [json.loads(word) for word in arguments[1 : arguments.index("--max_wer_rise")]]
    assert one["path"] == folders["test"] and config.target_wer is None and arguments[-1] == "null"
    config.check(processes=1)
    with pytest.raises(InputError, match='"guarded": true'):  # before the training, not after it
        recipe([*options, "--gates", '{"name": "hebrew", "path": "x"}'])


def test_a_hebrew_set_is_a_gate_only_where_it_is_guarded():
    def gates(guarded: bool) -> list[dict]:
        one = EvaluationSet("heldout", Source("x"), guarded=guarded)
        results = [
            {"model": model, "set": "heldout", "reason": None, "wer": {"value": wer}}
            | {"language_accuracy": 100.0, "none_accuracy": None}
            for model, wer in (("after", 30.0), ("before", 20.0))
        ]
        return measuring.forgetting_gates(results, ["after", "before"], [one], 5.0)

    assert gates(False) == []
    assert [gate["passed"] for gate in gates(True)] == [False, True]


def test_the_domain_of_the_demo_is_new_to_the_corpus_and_not_what_is_tested():
    texts = {
        split: [row["transcript"] for row in pyarrow.parquet.read_table(file).to_pylist()]
        for split in ("train", "test")
        for file in (DEMO / "domain").glob(f"{split}-*.parquet")
    }
    assert [len(set(texts[split])) for split in ("train", "test")] == [240, 120]
    assert not set(texts["train"]) & set(texts["test"])
    known = {word for sentence in sentences(DEMO / "corpus") for word in sentence.split()}
    assert not known & {word for sentence in texts["test"] for word in sentence.split()}


@pytest.mark.parametrize("rate", [1e-9, 1.0])
def test_the_exit_status_says_whether_something_was_forgotten(tmp_path, rate, monkeypatch):
    """Two steps from the base checkpoint, which knows English, at a rate that changes nothing or everything."""
    monkeypatch.chdir(tmp_path)
    test, english, train = (
        {"path": str(first_rows(part, rows, tmp_path / part))}
        for part, rows in (("heldout_noisy", 4), ("english", 8), ("corpus", 32))
    )
    stage = {"name": "domain", "last_epoch": 4, "learning_rates": {"llm_top": rate}, "llm_top_layers": 1}
    options = [
        *("--demo", "--model_name_or_path", str(DEMO / "base"), "--train_sources", json.dumps([train])),
        *("--eval_sources", json.dumps([test]), "--stages", json.dumps([stage]), "--max_steps", "2"),
        *("--lr_scheduler_type", "constant", "--generation_max_new_tokens", "30", "--tracker", "none"),
        *("--output_dir", "run", "--gates", json.dumps(english | {"name": "english", "language": "English"})),
    ]
    if rate < 1:
        train_domain.command(options)
    else:
        done = forked("scripts/train_domain.py", *options, processes=1, timeout=600)
        text = done.stdout + done.stderr
        assert done.returncode == 1 and "forgotten: english: WER" in text and "did not pass the gate" in text, text
    results = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())
    assert next(gate["passed"] for gate in results["gates"]) == (rate < 1)
    assert [model["path"] for model in results["models"]] == ["run/final_model", str(DEMO / "base")]
