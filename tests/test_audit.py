"""The audit scores each transcript by itself, goes on where it stopped, and finds the wrong ones."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch
from conftest import DEMO, first_rows
from forked import forked

from hebrew_asr.data.rows import load_rows
from hebrew_asr.data.selection import load_train_and_eval, worst
from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.errors import InputError
from hebrew_asr.model.loading import load_to_train
from scripts import audit_corpus
from train_hebrew_asr_enhanced import DataCollatorSpeechSeq2SeqWithPadding
from train_round2_gradual import demo

SILENT = 5  # the row of the small corpus that does not decode to speech


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Path:
    """22 rows of the demo corpus, one of them with its sound taken away."""
    folder = first_rows("corpus", 22, tmp_path_factory.mktemp("audit") / "corpus")
    table = pyarrow.parquet.read_table(folder / "train.parquet")
    rows, silence = table.to_pylist(), io.BytesIO()
    soundfile.write(silence, np.zeros(32_000), 16_000, format="WAV")
    rows[SILENT]["audio"] = {"bytes": silence.getvalue(), "path": "silence.wav"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, table.schema), folder / "train.parquet")
    return folder


def options(corpus: Path, output: Path, model: Path = DEMO / "base") -> list[str]:
    return [
        *("--demo", "--model", str(model), "--train_sources", json.dumps([{"path": str(corpus)}])),
        *("--audit_output", str(output), "--eval_batch_size", "1", "--generation_max_new_tokens", "40"),
    ]


def audit(corpus: Path, output: Path) -> list[dict]:
    audit_corpus.main(options(corpus, output))
    return pyarrow.parquet.read_table(output).to_pylist()


@pytest.fixture(scope="module")
def scores(spoken, tmp_path_factory) -> list[dict]:
    return audit(spoken, tmp_path_factory.mktemp("scores") / "audit.parquet")


def test_every_utterance_is_in_the_scores_and_what_does_not_decode_is_named(scores, spoken):
    config, _ = audit_corpus.settings(options(spoken, spoken))
    rows = load_rows(config.train_sources, config, for_training=True)
    assert sorted(row["digest"] for row in scores) == sorted(rows.column("digest"))
    (silent,) = [row for row in scores if row["rank"] is None]
    assert silent["row"] == SILENT and silent["skipped"].startswith("silent")
    assert silent["cer"] is None and silent["nats_per_token"] is None
    heard = [row for row in scores if row["rank"] is not None]
    assert [row["rank"] for row in heard] == list(range(1, len(rows)))
    suspicion = [row["nats_per_token"] * min(row["cer"], 100) for row in heard]
    assert suspicion == sorted(suspicion, reverse=True)


def test_nats_are_those_of_each_transcript_alone(scores, processor, spoken):
    """A forward pass for each utterance by itself, its tokens counted one by one."""
    config, _ = audit_corpus.settings(options(spoken, spoken))
    model = load_to_train(demo(), use_bf16=False).eval()
    rows = load_rows(config.train_sources, config, for_training=True)
    dataset = SpeechDataset(rows, processor, config, training=False)
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    nats = {row["digest"]: row["nats_per_token"] for row in scores}
    for number in (0, 1, 7, 19):
        utterance = dataset[(0, number)]
        target = processor.tokenizer(utterance["text"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        batch = collator([utterance], training=False)
        tokens = batch["input_ids"][0].tolist()
        assert tokens[-len(target) :] == target
        names = ("input_ids", "attention_mask", "input_features", "input_features_mask")
        with torch.no_grad():
            logits = model(**{name: batch[name] for name in names}).logits[0].double()
        expected = 0.0
        for place in range(len(tokens) - len(target), len(tokens)):
            expected -= math.log(torch.softmax(logits[place - 1], dim=0)[tokens[place]].item())
        assert nats[rows[number]["digest"]] == pytest.approx(expected / len(target), rel=1e-4)


def test_an_interrupted_audit_goes_on_and_ends_the_same(scores, spoken, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(audit_corpus, "BATCHES_PER_PART", 2)
    batches, of_one_batch = [], audit_corpus.nats_per_token

    def counted(trainer, batch, languages):
        batches.append(batch)
        if len(batches) == 4:
            raise RuntimeError("power cut")
        return of_one_batch(trainer, batch, languages)

    monkeypatch.setattr(audit_corpus, "nats_per_token", counted)
    with pytest.raises(RuntimeError, match="power cut"):
        audit(spoken, tmp_path / "audit.parquet")
    assert not (tmp_path / "audit.parquet").exists()
    assert audit(spoken, tmp_path / "audit.parquet") == scores
    assert len(batches) == 4 + (6 - 2), "of six batches, two were in the part on disk"
    assert "21 utterances scored, 1 skipped (8 of all at an earlier start)" in capsys.readouterr().out


def test_two_processes_give_the_scores_of_one(scores, spoken, tmp_path):
    done = forked("scripts/audit_corpus.py", *options(spoken, tmp_path / "audit.parquet"), processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "21 utterances scored, 1 skipped" in done.stdout and "skipped in" in done.stdout
    two = pyarrow.parquet.read_table(tmp_path / "audit.parquet").to_pylist()
    for one, other in zip(map(dict, scores), two, strict=True):
        nats = one.pop("nats_per_token"), other.pop("nats_per_token")
        assert one == other and (nats == (None, None) or nats[0] == pytest.approx(nats[1], rel=1e-5))


def test_the_worst_are_a_share_of_what_was_scored():
    table = pyarrow.table(
        {
            "number": range(6),
            "nats_per_token": [0.5, 2.0, 2.0, None, 1.0, 3.0],
            "cer": [0.0, 80.0, 400.0, None, 100.0, 0.0],
        }
    )
    ranked = audit_corpus.ranked(table)
    assert ranked["number"].to_pylist() == [2, 1, 4, 5, 0, 3]
    assert ranked["rank"].to_pylist() == [1, 2, 3, 4, 5, None]
    assert worst(ranked, 0.4)["number"].to_pylist() == [2, 1]
    assert worst(ranked, 1.0)["number"].to_pylist() == [2, 1, 4, 5, 0]


def shuffled_corpus(folder: Path, rows: int, share: float, seed: int) -> tuple[Path, set[int]]:
    """Rows of the demo corpus, the transcripts of a share of them dealt to one another; and which rows those are."""
    (file,) = (DEMO / "corpus").glob("*.parquet")
    table = pyarrow.parquet.read_table(file).slice(0, rows)
    transcripts = np.array(table["transcript"].to_pylist(), object)
    plain = np.flatnonzero(~table["has_timestamps"].to_numpy())
    chosen = np.random.default_rng(seed).choice(plain, round(share * len(table)), replace=False)
    transcripts[chosen] = transcripts[np.roll(chosen, 1)]
    place = table.schema.get_field_index("transcript")
    folder.mkdir()
    table = table.set_column(place, table.schema.field(place), pyarrow.array(transcripts.tolist()))
    pyarrow.parquet.write_table(table, folder / "train.parquet")
    return folder, set(chosen.tolist())


@pytest.mark.slow
def test_the_audit_finds_shuffled_transcripts_with_a_checkpoint_trained_on_them(tmp_path):
    corpus, wrong = shuffled_corpus(tmp_path / "corpus", rows=800, share=0.05, seed=2)
    sources = ("--train_sources", json.dumps([{"path": str(corpus)}]))
    folder = tmp_path / "run"
    train = ("--output_dir", folder, "--max_eval_utterances", 40, "--eval_steps", 100_000, "--tracker", "none")
    train += ("--model_name_or_path", DEMO / "tuned", "--num_epochs", 1)
    done = forked("train_round2_gradual.py", "--demo", *sources, *train, processes=2, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    model = folder / "final_model"
    done = forked("scripts/audit_corpus.py", "--demo", "--model", model, *sources, processes=2, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    scores = pyarrow.parquet.read_table(folder / "audit.parquet")
    audited = wrong & set(scores["row"].to_pylist())
    found = wrong & set(worst(scores, 0.07)["row"].to_pylist())
    assert len(audited) >= 0.95 * len(wrong), "the filters before the audit leave nearly all of them to it"
    assert len(found) >= 0.9 * len(audited)


def test_training_drops_what_an_audit_ranks_worst(tmp_path, corpus, heldout):
    rows = load_rows([Source(str(corpus))], DataConfig(), for_training=True)
    columns = {name: rows.column(name) for name in ("digest", "words")}
    scores = pyarrow.table(columns | {"rank": list(range(1, len(rows) + 1))})
    pyarrow.parquet.write_table(scores, tmp_path / "audit.parquet")
    config = DataConfig([Source(str(corpus))], [Source(str(heldout))], audit_scores=str(tmp_path / "audit.parquet"))
    config.drop_worst_share = 0.1
    train, _ = load_train_and_eval(config, seed=1)
    assert train.column("digest") == rows.column("digest")[4:], "4 of 41 are 10 %"
    assert [(drop.reason, drop.utterances) for drop in train.dropped][-1] == ("among the audit's worst 10%", 4)
    (tmp_path / "audit.parquet").write_bytes(b"no table")
    with pytest.raises(InputError, match="is no table of"):
        load_train_and_eval(config, seed=1)
    with pytest.raises(InputError, match="give both or neither"):
        DataConfig([Source("x")], drop_worst_share=0.1).check_sources()
