"""What a checkpoint agrees with itself on becomes a corpus that training reads; the rest is counted by its reason."""

import dataclasses
import io
import json
from pathlib import Path

import jiwer
import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import torch
from conftest import DEMO, first_rows
from test_corpora import parquet, wav

from hebrew_asr.data.audio import decode_audio, inspect_audio
from hebrew_asr.data.rows import load_rows
from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation import transcription
from hebrew_asr.evaluation.settings import Decoding
from hebrew_asr.evaluation.transcription import Transcript, load_speech_model
from scripts import pseudo_label
from scripts.pseudo_label import Labelling, confidence, distance, fate


@pytest.fixture(scope="module")
def hidden(tmp_path_factory) -> Path:
    """30 utterances whose transcripts say what nobody said, three rows that are broken, and one that is long."""
    folder = tmp_path_factory.mktemp("hidden") / "hidden"
    first_rows("corpus", 30, folder)
    (file,) = folder.glob("*.parquet")
    rows = pyarrow.parquet.read_table(file).to_pylist()
    for row in rows:
        row["transcript"] = "לא נאמר"
    rows += [rows[0] | {"audio": {"bytes": b"no audio", "path": f"broken-{i}"}} for i in range(3)]
    long = np.concatenate([decode_audio(row["audio"]) for row in rows[:16]])
    content = io.BytesIO()
    soundfile.write(content, long, 16_000, format="WAV")
    audio = {"bytes": content.getvalue(), "path": "long.wav"}
    rows.append(rows[0] | {"audio": audio, "metadata": rows[0]["metadata"] | {"entry_id": "long"}})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return folder


def labelling(hidden: Path, output: Path, **changed) -> Labelling:
    source = Source(str(hidden), text_column="")
    given = {"samples": 2, "min_confidence": 0.7, "num_workers": 0, "preprocessing_num_workers": 1}
    given |= {"max_broken_share": 0.2, "max_audio_length_seconds": 5.0}
    return Labelling(model=str(DEMO / "tuned"), source=source, output=str(output), **given | changed)


@pytest.fixture(scope="module")
def made(hidden, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("made") / "corpus"
    pseudo_label.main(labelling(hidden, output))
    return output


def test_confidence_is_one_less_the_mean_distance_of_all_pairs():
    texts = ["הילד אכל", "הילד אכל תפוח", "הכלב אכל"]
    pairs = [(0, 1), (0, 2), (1, 2)]
    edits = [jiwer.process_characters(texts[a], texts[b]) for a, b in pairs]
    rates = [
        (e.substitutions + e.deletions + e.insertions) / max(len(texts[a]), len(texts[b]))
        for e, (a, b) in zip(edits, pairs, strict=True)
    ]
    assert confidence(texts) == pytest.approx(1 - np.mean(rates))
    assert confidence(["הילד, אכל.", "הילד אכל"]) == 1.0, "compared as the leaderboard does"
    assert distance("", "") == 0.0 and distance("", "אב") == distance("אב", "") == 1.0
    assert distance("אבג", "אב") == distance("אב", "אבג") == pytest.approx(1 / 3)


def test_what_is_kept_is_a_corpus_in_the_training_schema_with_its_confidence(made, hidden):
    table = pyarrow.parquet.read_table(next(made.glob("*.parquet")))
    (demo,) = (DEMO / "corpus").glob("*.parquet")
    assert table.column_names == pyarrow.parquet.read_schema(demo).names
    kept = table.to_pylist()
    labels = pyarrow.parquet.read_table(made.with_name("corpus.labels") / "labels.parquet").to_pylist()
    assert len(labels) > 32 and 5 < len(kept) < len(labels), "the long recording is several utterances"
    chosen = [one for one in labels if not one["dropped"]]
    assert [row["transcript"] for row in kept] == [one["text"] for one in chosen] and "לא נאמר" not in str(kept)
    for row, one in zip(kept, chosen, strict=True):
        assert row["metadata"]["quality_score"] == one["confidence"] >= 0.7
        assert row["metadata"]["source"] == str(hidden) and row["metadata"]["entry_id"] == one["recording"]
        assert inspect_audio(row["audio"]).seconds == pytest.approx(one["seconds"], abs=0.05)
    for one in labels:
        assert confidence([one["text"], *one["samples"]]) == pytest.approx(one["confidence"], abs=0.05)
    report = json.loads((made.with_name("corpus.labels") / "report.json").read_text())["utterances"]
    assert report["kept"] == len(kept) and report["unreadable audio"] == 3 and report["confidence below 0.7"] > 0
    assert sum(report.values()) == len(labels) + 3
    rows = load_rows([Source(str(made)), Source(str(DEMO / "corpus"))], DataConfig(), for_training=True)
    assert np.bincount(rows.source_numbers)[0] == len(kept), "training drops none of it"
    strict = load_rows([Source(str(made))], DataConfig(min_quality_score=0.9), for_training=True)
    assert len(strict) == sum(one["confidence"] >= 0.9 for one in chosen)


def test_an_interrupted_labelling_goes_on_and_ends_the_same(made, hidden, tmp_path, monkeypatch):
    monkeypatch.setattr(transcription, "MOST_AT_ONCE", 8)
    calls, transcribe = [], transcription.QwenModel.transcribe

    def counted(self, features, seconds):
        calls.append(self.decoding.seed)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return transcribe(self, features, seconds)

    monkeypatch.setattr(transcription.QwenModel, "transcribe", counted)
    with pytest.raises(KeyboardInterrupt):
        pseudo_label.main(labelling(hidden, tmp_path / "corpus"))
    assert not (tmp_path / "corpus").exists()
    pseudo_label.main(labelling(hidden, tmp_path / "corpus"))
    again = len(calls)
    pseudo_label.main(labelling(hidden, tmp_path / "whole"))
    assert again == len(calls) - again + 1, "only the batch that was cut off was done twice"
    mine, other = (pyarrow.parquet.read_table(next((tmp_path / n).glob("*.parquet"))) for n in ("corpus", "whole"))
    assert mine.equals(other)
    with pytest.raises(InputError, match="exists already"):
        pseudo_label.main(labelling(hidden, tmp_path / "corpus"))


def test_every_reason_to_drop_has_its_name(hidden, tmp_path):
    given = labelling(hidden, tmp_path)
    settings = dataclasses.replace(
        pseudo_label.row_settings(given.source, [], given, for_training=True), language="Hebrew"
    )
    text = "הילד אכל תפוח"

    def reason(text=text, language="Hebrew", truncated=False, certainty=0.9, seconds=2.0) -> str:
        return fate(Transcript(text, language, truncated), certainty, seconds, given, settings)

    assert reason() == ""
    assert reason(language="English") == "named as English" and reason(language="None") == "named as None"
    assert reason(truncated=True) == "cut off by the limit of tokens"
    assert reason(text="כן כן כן כן כן כן") == "repeats itself"
    assert reason(certainty=0.69) == "confidence below 0.7"
    assert reason(text="") == "empty text" and reason(text="hello there") == "no Hebrew in the text"
    assert reason(seconds=0.2) == "shorter than 0.3 s" and reason(seconds=6.0) == "longer than 5 s"
    assert reason(seconds=0.31) == "not 1–40 characters a second"


def test_samples_differ_by_seed_and_are_the_same_again():
    clips = [
        decode_audio(row["audio"])
        for row in load_rows([Source(str(DEMO / "heldout"), split="test[:6]")], DataConfig(), False)
    ]
    model = load_speech_model(str(DEMO / "tuned"), Decoding(), torch.device("cpu"))
    features, seconds = [model.features(clip) for clip in clips], [len(clip) / 16_000 for clip in clips]

    def texts(**how) -> list[str]:
        model.decoding = Decoding(**how)
        return [transcript.text for transcript in model.transcribe(features, seconds)]

    state = torch.random.get_rng_state()
    first, other = texts(temperature=1.0, seed=1), texts(temperature=1.0, seed=2)
    assert first != other and first == texts(temperature=1.0, seed=1)
    assert texts() == texts(seed=5) == texts(temperature=0.001), "as cold as that, it is greedy"
    assert torch.equal(torch.random.get_rng_state(), state), "nothing else is drawn differently"


def test_what_cannot_be_meant_is_refused(tmp_path):
    needed = ["--model", str(DEMO / "tuned"), "--source", "x", "--output", str(tmp_path / "out")]
    for extra, message in (
        (["--temperature", "0"], "temperature must be at least 0.01"),
        (["--samples", "0"], "samples must be at least 1"),
        (["--min_confidence", "1.5"], "min_confidence must be 0 to 1"),
        (["--config", str(tmp_path / "none.yaml")], "none.yaml cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            pseudo_label.parse([*needed, *extra])
    with pytest.raises(InputError, match=r"--source: Source (has no|needs)"):
        pseudo_label.parse([*needed[:3], '{"pth": "x"}', *needed[4:]])
    given = pseudo_label.parse([*needed[:3], '{"path": "x", "split": "test"}', *needed[4:]])
    assert given.source == Source("x", split="test", text_column="")
    silent = parquet(tmp_path / "noise", [{"audio": wav(tmp_path / "a.wav"), "other": 1}])
    rows = load_rows([Source(str(silent), text_column="", language="None")], DataConfig(), for_training=True)
    assert rows.column("text") == [""], "recordings without speech need no transcripts"
