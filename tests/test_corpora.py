"""Corpora of every form become the same rows, what is dropped is counted, and nothing is remembered wrongly."""

import json
import shutil

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import torch
from conftest import ROOT, first_rows

import hebrew_corpora
from hebrew_corpora import DataConfig, InputError, Source, load_rows, load_source, load_train_and_eval
from run_log import RunLog
from train_hebrew_asr_enhanced import GradualUnfreezeTrainer, main, training_arguments


def wav(path, seconds=1.0, rate=16_000, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    tone = 0.1 * np.sin(2 * np.pi * 300 * np.arange(int(seconds * rate)) / rate)
    soundfile.write(path, np.stack([tone] * channels, axis=1), rate)
    return path


def parquet(folder, rows: list[dict], name="train-00000.parquet"):
    """Rows of {audio: file, transcript: …, …} with the audio's bytes, as the Hub's corpora have them."""
    folder.mkdir(parents=True, exist_ok=True)
    table = [row | {"audio": {"bytes": row["audio"].read_bytes(), "path": row["audio"].name}} for row in rows]
    data = datasets.Dataset.from_list(table)
    pyarrow.parquet.write_table(data.data.table, folder / name)
    return folder


def test_a_folder_of_audio_with_a_manifest(tmp_path):
    for name in ("a", "b"):
        wav(tmp_path / "audio" / f"{name}.wav")
    (tmp_path / "audio" / "metadata.csv").write_text("file_name,transcription\na.wav,שלום\nb.wav,עולם\n")
    rows = load_rows([Source(str(tmp_path / "audio"))], DataConfig(), for_training=True)
    assert rows.texts == ["שלום", "עולם"] and rows.seconds.tolist() == [1.0, 1.0]
    (tmp_path / "audio" / "metadata.csv").unlink()
    (tmp_path / "audio" / "metadata.jsonl").write_text('{"file_name": "b.wav", "text": "עולם"}\n')
    assert load_rows([Source(str(tmp_path / "audio"))], DataConfig(), for_training=True).texts == ["עולם"]


def test_splits_of_a_local_folder_are_kept_apart(tmp_path):
    clip = wav(tmp_path / "a.wav")
    for split, count in (("train", 4), ("test", 2)):
        parquet(tmp_path / "data", [{"audio": clip, "transcript": split}] * count, f"{split}-00000-of-00001.parquet")
    assert load_source(Source(str(tmp_path / "data")))["transcript"][:] == ["train"] * 4
    assert load_source(Source(str(tmp_path / "data"), split="test"))["transcript"][:] == ["test"] * 2
    assert len(load_source(Source(str(tmp_path / "data"), split="train[:3]"))) == 3
    with pytest.raises(InputError, match="Unknown split"):
        load_source(Source(str(tmp_path / "data"), split="validation"))


def test_what_save_to_disk_wrote(tmp_path):
    data = datasets.Dataset.from_list([{"audio": {"bytes": b"", "path": "a"}, "text": "א"}])
    data.save_to_disk(tmp_path / "one")
    assert len(load_source(Source(str(tmp_path / "one")))) == 1
    with pytest.raises(InputError, match="is one saved split"):
        load_source(Source(str(tmp_path / "one"), split="test"))
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "two")
    assert len(load_source(Source(str(tmp_path / "two"), split="test"))) == 1
    with pytest.raises(InputError, match="no split 'dev', there are train, test"):
        load_source(Source(str(tmp_path / "two"), split="dev"))


def test_what_cannot_be_used_is_dropped_with_its_reason(tmp_path):
    good, short, long = (wav(tmp_path / f"{s}.wav", s) for s in (1.0, 0.1, 3.0))
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"not audio")
    empty = tmp_path / "empty.wav"
    empty.write_bytes(b"")
    rows = [
        {"audio": good, "transcript": "שלום"},
        {"audio": good, "transcript": " \u200f "},
        {"audio": good, "transcript": "<|2.00|>א<|1.00|>"},
        {"audio": short, "transcript": "שלום"},
        {"audio": long, "transcript": "שלום"},
        {"audio": broken, "transcript": "שלום"},
        {"audio": empty, "transcript": "שלום"},
    ]
    folder = parquet(tmp_path / "data", rows)
    config = DataConfig(max_audio_length_seconds=2.0)
    kept = load_rows([Source(str(folder))], config, for_training=True)
    assert kept.texts == ["שלום"]
    assert {reason: count for reason, (count, _) in kept.dropped.items()} == {
        "empty text": 1,
        "timestamps go backwards": 1,
        "shorter than 0.3 s": 1,
        "longer than 2 s": 1,
        "unreadable audio": 2,
    }
    assert kept.dropped["longer than 2 s"][1] == pytest.approx(3 / 3600)
    assert len(load_rows([Source(str(folder))], config, for_training=False)) == 3, "evaluation keeps every length"


def test_a_row_without_audio_is_dropped(tmp_path):
    data = datasets.Dataset.from_list(
        [
            {"audio": {"bytes": wav(tmp_path / "a.wav").read_bytes(), "path": "a"}, "text": "א"},
            {"audio": None, "text": "ב"},
        ]
    )
    data.save_to_disk(tmp_path / "data")
    rows = load_rows([Source(str(tmp_path / "data"))], DataConfig(), for_training=True)
    assert rows.texts == ["א"] and rows.dropped["unreadable audio"][0] == 1


def test_the_cache_does_not_outlive_the_code(tmp_path, monkeypatch):
    folder = parquet(tmp_path / "data", [{"audio": wav(tmp_path / "a.wav"), "transcript": "שלום"}])
    module = tmp_path / "hebrew_corpora.py"
    shutil.copy(ROOT / "hebrew_corpora.py", module)
    monkeypatch.setattr(hebrew_corpora, "__file__", str(module))
    assert load_rows([Source(str(folder))], DataConfig(), for_training=True).texts == ["שלום"]
    monkeypatch.setattr(hebrew_corpora, "clean_transcript", lambda text, _: f"שונה {text}")
    module.write_text(module.read_text() + "\n# changed\n")
    assert load_rows([Source(str(folder))], DataConfig(), for_training=True).texts == ["שונה שלום"]


def test_without_an_evaluation_set_whole_recordings_are_held_out(corpus, tmp_path):
    config = DataConfig(train_sources=[Source(str(first_rows("corpus", 200, tmp_path / "c")))], eval_fraction=0.2)
    train, heldout = load_train_and_eval(config, seed=1)
    assert len(train) + len(heldout) == len(load_rows(config.train_sources, config, for_training=True))
    recordings = set(train.recordings) | set(heldout.recordings)
    assert len(set(heldout.recordings)) == round(0.2 * len(recordings)) > 1
    assert not set(train.recordings) & set(heldout.recordings)
    config.max_eval_utterances = 5
    assert len(load_train_and_eval(config, seed=1)[1]) == 5


def test_a_recording_that_does_not_decode_is_left_out_of_its_step_and_listed(config, tmp_path):
    """Its header is whole, so that only decoding shows it."""
    clip = wav(tmp_path / "good.wav", 1.5)
    damaged = tmp_path / "damaged.flac"
    soundfile.write(damaged, np.random.default_rng(0).normal(0, 0.1, 48_000), 16_000)
    data = bytearray(damaged.read_bytes())
    data[20_000:30_000] = bytes(10_000)
    damaged.write_bytes(data)
    rows = [{"audio": clip, "transcript": "שלום עולם"}] * 7 + [{"audio": damaged, "transcript": "שלום"}]
    config.train_sources = [Source(str(parquet(tmp_path / "data", rows)))]
    config.max_steps = 2
    main(config)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/dropped_utterances"] for row in logged if "train/loss" in row] == [1, 2]
    listed = (tmp_path / "run" / "dropped-0.txt").read_text().splitlines()
    assert len(listed) == 2 and all("damaged.flac" in line for line in listed)


def test_workers_change_nothing(config, model, processor, train_rows, eval_rows, tmp_path):
    def batches(workers: int):
        config.dataloader_num_workers = workers
        args, log = training_arguments(config, tmp_path, cpu=True), RunLog(tmp_path, rank=0)
        trainer = GradualUnfreezeTrainer(config, args, model, processor, train_rows, eval_rows, log, False)
        trainer.sampler.epoch = 2
        return list(trainer.get_train_dataloader())

    for (alone, _), (worked, _) in zip(batches(0), batches(2), strict=True):
        for a, b in zip(alone, worked, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_long_recordings_are_evaluated_in_smaller_batches(config, model, processor, train_rows, eval_rows, tmp_path):
    args, log = training_arguments(config, tmp_path, cpu=True), RunLog(tmp_path, rank=0)
    trainer = GradualUnfreezeTrainer(config, args, model, processor, train_rows, eval_rows, log, False)
    eval_rows.seconds[:] = [300.0, 55.0, *[5.0] * 9]
    sizes = [len(batch[0]) for batch in trainer.get_eval_dataloader().batch_sampler]
    assert sizes == [1, 2, 4, 4], "4 utterances of up to 30 s are 120 padded seconds"
