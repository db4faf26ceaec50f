"""Corpora of every form become the same rows, what is dropped is counted, and nothing is remembered wrongly."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import torch
from conftest import DEMO, first_rows

from hebrew_asr.data import rows as hebrew_corpora
from hebrew_asr.data import selection
from hebrew_asr.data.audio import decode_audio
from hebrew_asr.data.loading import load_source
from hebrew_asr.data.mixture import Mixture
from hebrew_asr.data.rows import load_rows
from hebrew_asr.data.selection import load_train_and_eval
from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.errors import InputError
from hebrew_asr.training.resuming import training_arguments
from hebrew_asr.training.run_folder import folder_of
from hebrew_asr.training.run_log import RunLog
from train_hebrew_asr_enhanced import DataCollatorSpeechSeq2SeqWithPadding, GradualUnfreezeTrainer, main


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
    for name, seconds in (("a", 1.0), ("b", 1.5)):
        wav(tmp_path / "audio" / f"{name}.wav", seconds)
    (tmp_path / "audio" / "metadata.csv").write_text("file_name,transcription\na.wav,שלום\nb.wav,עולם\n")
    rows = load_rows([Source(str(tmp_path / "audio"))], DataConfig(), for_training=True)
    assert rows.column("text") == ["שלום", "עולם"] and rows.seconds.tolist() == [1.0, 1.5]
    (tmp_path / "audio" / "metadata.csv").unlink()
    (tmp_path / "audio" / "metadata.jsonl").write_text('{"file_name": "b.wav", "text": "עולם"}\n')
    assert load_rows([Source(str(tmp_path / "audio"))], DataConfig(), for_training=True).column("text") == ["עולם"]


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
    config = DataConfig(
        max_audio_length_seconds=2.0, max_broken_share=0.5, max_dropped_share=1.0, drop_duplicates=False
    )
    kept = load_rows([Source(str(folder))], config, for_training=True)
    assert kept.column("text") == ["שלום"]
    assert {drop.reason: drop.utterances for drop in kept.dropped} == {
        "empty text": 1,
        "timestamps go backwards": 1,
        "shorter than 0.3 s": 1,
        "longer than 2 s, without timestamps": 1,
        "unreadable audio": 1,
        "zero bytes of audio": 1,
    }
    (too_long,) = [drop for drop in kept.dropped if "longer" in drop.reason]
    assert too_long.hours == pytest.approx(3 / 3600)
    assert len(load_rows([Source(str(folder))], config, for_training=False)) == 3, "evaluation keeps every length"


def test_a_row_without_audio_is_dropped(tmp_path):
    data = datasets.Dataset.from_list(
        [
            {"audio": {"bytes": wav(tmp_path / "a.wav").read_bytes(), "path": "a"}, "text": "א"},
            {"audio": None, "text": "ב"},
        ]
    )
    data.save_to_disk(tmp_path / "data")
    rows = load_rows([Source(str(tmp_path / "data"))], DataConfig(max_broken_share=0.5), for_training=True)
    assert rows.column("text") == ["א"]
    assert [(drop.reason, drop.utterances) for drop in rows.dropped] == [("zero bytes of audio", 1)]


def test_the_cache_does_not_outlive_the_code(tmp_path, monkeypatch):
    folder = parquet(tmp_path / "data", [{"audio": wav(tmp_path / "a.wav"), "transcript": "שלום"}])
    module = tmp_path / "rows.py"
    shutil.copy(hebrew_corpora.__file__, module)
    monkeypatch.setattr(hebrew_corpora, "CODE", (module, *hebrew_corpora.CODE[1:]))
    assert load_rows([Source(str(folder))], DataConfig(), for_training=True).column("text") == ["שלום"]
    monkeypatch.setattr(hebrew_corpora, "normalize_target", lambda text, _: f"שונה {text}")
    module.write_text(module.read_text() + "\n# changed\n")
    assert load_rows([Source(str(folder))], DataConfig(), for_training=True).column("text") == ["שונה שלום"]


def test_without_an_evaluation_set_whole_recordings_are_held_out(corpus, tmp_path):
    config = DataConfig(train_sources=[Source(str(first_rows("corpus", 200, tmp_path / "c")))], eval_fraction=0.2)
    train, heldout = load_train_and_eval(config, seed=1)
    assert len(train) + len(heldout) == len(load_rows(config.train_sources, config, for_training=True))
    recordings = set(train.column("recording")) | set(heldout.column("recording"))
    assert 1 < len(set(heldout.column("recording"))) < len(recordings)
    assert 0.15 < heldout.hours / (train.hours + heldout.hours) < 0.3
    assert not set(train.column("recording")) & set(heldout.column("recording"))
    assert not [note for note in train.notes if "held out" in note]
    config.max_eval_utterances = 5
    thinned = load_train_and_eval(config, seed=1)[1]
    assert len(thinned) == 5
    assert [(drop.reason, drop.utterances) for drop in thinned.dropped] == [
        ("more than max_eval_utterances (5)", len(heldout) - 5)
    ]


def test_what_is_set_aside_is_measured_at_the_end_alone(tmp_path, config):
    """Whole recordings, neither trained on nor evaluated before; the model's card has both rates."""
    config.train_sources = [Source(str(first_rows("corpus", 300, tmp_path / "c")))]
    config.eval_sources, config.eval_fraction, config.confirm_share = [], 0.3, 0.5
    train, chooses = load_train_and_eval(config, config.seed)
    aside = chooses.set_aside
    groups = [set(rows.column("recording")) for rows in (train, chooses, aside)]
    assert all(groups) and sum(map(len, groups)) == len(set.union(*groups))
    assert 0.25 < aside.hours / (chooses.hours + aside.hours) < 0.75
    assert [drop.utterances for drop in chooses.dropped if drop.reason.startswith("set aside")] == [len(aside)]
    whole = dataclasses.replace(config, confirm_share=0.0)
    assert sorted(chooses.column("text") + aside.column("text")) == sorted(
        load_train_and_eval(whole, config.seed)[1].column("text")
    )
    unnamed = dataclasses.replace(config, output_dir=None)
    assert folder_of(unnamed) == folder_of(dataclasses.replace(unnamed, confirm_share=0.0)), "a run of before is found"
    config.max_steps, config.eval_steps = 2, 1
    main(config)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    utterances = [row[name] for row in logged for name in row if name.endswith("/utterances")]
    assert utterances == [len(chooses)] * 4 + [len(aside)]  # steps 0, 1, 2, the final model; and what was set aside
    (confirmed,) = [row for row in logged if "confirm/wer" in row]
    card = (tmp_path / "run" / "final_model" / "README.md").read_text()
    assert f"set aside: it chose nothing | {len(aside)} | {confirmed['confirm/wer']:.2f} (" in card
    (tmp_path / "run" / "status.json").write_text('{"state": "preempted"}')
    with pytest.raises(InputError, match="evaluation"):  # of another division the lowest WER is another
        main(dataclasses.replace(config, confirm_share=0.0))
    (tmp_path / "one").mkdir()
    rows = pyarrow.parquet.read_table(next((DEMO / "heldout").glob("*.parquet"))).slice(0, 40).to_pylist()
    rows = [row | {"metadata": row["metadata"] | {"entry_id": "one"}} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "one" / "test.parquet")
    with pytest.raises(InputError, match="the evaluation set is one recording"):
        load_train_and_eval(dataclasses.replace(config, eval_sources=[Source(str(tmp_path / "one"), split="test")]), 1)


def test_where_recordings_have_no_ids_whole_sessions_or_transcribers_are_held_out(tmp_path):
    """The columns of crowd-transcribe-v5; the largest transcriber has half of the audio, and is not held out."""
    rows = pyarrow.parquet.read_table(next((DEMO / "corpus").glob("*.parquet"))).slice(0, 120).to_pylist()
    table = [
        {"uuid": str(i), "audio": row["audio"], "sentence": row["transcript"], "is_retranscribe": False}
        | {"transcriber": "most" if i % 2 else f"t{i % 20}", "extra_data": {"skipped": False, "noisy": False}}
        for i, row in enumerate(rows)
    ]

    def halves(name: str, table: list[dict], fraction: float):
        (tmp_path / name).mkdir()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / name / "train.parquet")
        config = DataConfig([Source(str(tmp_path / name))], eval_fraction=fraction)
        return selection.split(config, seed=1)

    train, heldout = halves("transcribers", table, 0.1)
    groups = set(heldout.column("group"))
    assert groups and not groups & set(train.column("group")) and "transcriber most" not in groups
    assert all(name.startswith("transcriber t") for name in groups)
    assert 0.03 < heldout.hours / (train.hours + heldout.hours) < 0.16
    (note, few) = [note for note in train.notes if "held out" in note]
    assert "whole transcribers" in note and f"{len(heldout)} utterances are held out, so few" in few
    train, heldout = halves("sessions", [row | {"session": f"s{i % 9}"} for i, row in enumerate(table)], 0.5)
    assert {name.split()[0] for name in heldout.column("group")} == {"session"} and len(heldout) >= 30
    assert [note for note in train.notes if "whole sessions" in note] and "so few" not in " ".join(train.notes)


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
    config.max_steps, config.max_dropped_share = 2, 1.0  # of two different clips
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
        trainer.feed.sampler.epoch = 2
        return list(trainer.get_train_dataloader())

    for (alone, _), (worked, _) in zip(batches(0), batches(2), strict=True):
        for a, b in zip(alone, worked, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_evaluation_batches_are_of_about_as_many_seconds(config, model, processor, train_rows, eval_rows, tmp_path):
    args, log = training_arguments(config, tmp_path, cpu=True), RunLog(tmp_path, rank=0)
    trainer = GradualUnfreezeTrainer(config, args, model, processor, train_rows, eval_rows, log, False)
    config.eval_batch_size = 2
    eval_rows.seconds = np.array([300.0, 35.0, 20.0, 20.0, 20.0, *[5.0] * 6])
    sizes = [len(batch[0]) for batch in trainer.get_eval_dataloader().batch_sampler]
    assert sizes == [1, 1, 3, 6], "2 utterances of 30 s are 60 padded seconds; 12 of 5 s would be, 8 are the most"


# Timestamps: each word is a tone of its own, so that what is spoken in a piece can be heard

TONES = {"אלף": 400, "בית": 700, "גימל": 1000, "דלת": 1300, "הא": 1600}  # Hz


def spoken(timeline: list[tuple[str, float, float]], seconds: float, file):
    """A recording in which each word sounds from its start to its end."""
    time = np.arange(int(seconds * 16_000)) / 16_000
    wave = np.zeros(len(time))
    for word, start, end in timeline:
        sounding = (time >= start) & (time < end)
        wave[sounding] = 0.3 * np.sin(2 * np.pi * TONES[word] * time[sounding])
    soundfile.write(file, wave, 16_000)
    return file


def words_heard(waveform: np.ndarray) -> list[str]:
    """The words in order, by the loudest tone of each tenth of a second."""
    heard = []
    for begin in range(0, len(waveform) - 1599, 1600):
        spectrum = np.abs(np.fft.rfft(waveform[begin : begin + 1600]))
        if spectrum.max() > 20:
            frequency = 10 * spectrum.argmax()
            heard.append(min(TONES, key=lambda word: abs(TONES[word] - frequency)))
    return [word for i, word in enumerate(heard) if i == 0 or heard[i - 1] != word]


def test_every_piece_has_exactly_the_words_spoken_in_it(tmp_path):
    timeline = [("אלף", 0.0, 4.0), ("בית", 5.0, 9.0), ("גימל", 9.0, 13.0), ("דלת", 14.0, 19.0), ("הא", 19.0, 29.0)]
    closed = "".join(f"<|{start:.2f}|>{word}<|{end:.2f}|>" for word, start, end in timeline[:4])
    crossing = closed + "<|19.00|>"  # the last word is in the audio and not in the text
    whole = closed + "<|19.00|>הא<|29.00|>"
    file = spoken(timeline, 29.0, tmp_path / "a.wav")
    rows = [{"audio": file, "transcript": text} for text in (crossing, whole, "אלף בית גימל דלת הא")]
    settings = {"drop_duplicates": False, "min_characters_per_second": 0.1, "max_dropped_share": 1.0}
    for longest in (30.0, 19.0, 10.0, 4.5):
        config = DataConfig(max_audio_length_seconds=longest, **settings)
        pieces = load_rows([Source(str(parquet(tmp_path / f"{longest}", rows)))], config, for_training=True)
        assert len(pieces) >= 3
        for piece in (pieces[i] for i in range(len(pieces))):
            assert piece["seconds"] <= longest + 1e-6
            assert words_heard(decode_audio(piece["audio"], piece["start"], piece["end"])) == piece["text"].split()
        of_rows = [
            [p["text"] for p in map(pieces.__getitem__, range(len(pieces))) if p["row"] == row] for row in range(3)
        ]
        assert " ".join(of_rows[0]) == "אלף בית גימל דלת".removesuffix(" דלת" if longest < 5 else "")
        if longest == 10.0:
            assert of_rows[1] == ["אלף בית", "גימל דלת", "הא"]
            assert pieces[1]["previous"] == "אלף בית", "the piece before it"
        reasons = {drop.reason for drop in pieces.dropped}
        assert "last segment without an end timestamp" in reasons
        assert ("longer than 10 s, without timestamps" in reasons) == (longest == 10.0)


# Duplicates, leaks, broken rows, mixtures, context


def test_duplicates_and_leaks_are_removed_and_listed(tmp_path):
    clips = [wav(tmp_path / f"{i}.wav", 1.0 + 0.1 * i) for i in range(4)]
    sentence = "המורה קנה ספר חדש"
    train = [
        {"audio": clips[0], "transcript": "הילד אכל תפוח"},
        {"audio": clips[0], "transcript": "הילד אכל תפוח"},
        {"audio": clips[1], "transcript": f"{sentence}!"},
        {"audio": clips[2], "transcript": "כן"},
        {"audio": clips[3], "transcript": "משהו אחר לגמרי כאן"},
    ]
    heldout = [{"audio": wav(tmp_path / "e.wav", 2.0), "transcript": sentence}]
    heldout += [
        {"audio": wav(tmp_path / "f.wav", 2.1), "transcript": "כן"},
        {"audio": clips[3], "transcript": "אין מילים כאלה"},
    ]
    config = DataConfig(
        train_sources=[Source(str(parquet(tmp_path / "train", train)))],
        eval_sources=[Source(str(parquet(tmp_path / "heldout", heldout)))],
    )
    rows, _ = load_train_and_eval(config, seed=1)
    assert rows.column("text") == ["הילד אכל תפוח", "כן"], "short answers are no leak"
    assert {drop.reason: drop.utterances for drop in rows.dropped} == {
        "duplicate audio": 1,
        "audio of an evaluation set": 1,
        "text of an evaluation set": 1,
    }
    config.drop_duplicates = False
    assert len(load_train_and_eval(config, seed=1)[0]) == 3


def test_every_piece_of_an_evaluation_recording_is_a_leak(tmp_path):
    """The training corpus has the same recording, cut into pieces: not only its beginning is removed."""
    file = spoken([("אלף", 0.0, 9.0), ("בית", 10.0, 19.0), ("גימל", 20.0, 29.0)], 30.0, tmp_path / "a.wav")
    text = "<|0.00|>אלף<|9.00|><|10.00|>בית<|19.00|><|20.00|>גימל<|29.00|>"
    other = {"audio": wav(tmp_path / "b.wav", 2.0), "transcript": "משהו אחר"}
    config = DataConfig(
        train_sources=[Source(str(parquet(tmp_path / "train", [{"audio": file, "transcript": text}, other])))],
        eval_sources=[Source(str(parquet(tmp_path / "heldout", [{"audio": file, "transcript": "שונה לגמרי"}])))],
        max_audio_length_seconds=10.0,
        min_characters_per_second=0.1,
    )
    rows, _ = load_train_and_eval(config, seed=1)
    assert rows.column("text") == ["משהו אחר"]
    assert [(drop.reason, drop.utterances) for drop in rows.dropped] == [("audio of an evaluation set", 3)]


def test_too_many_broken_rows_end_the_run_with_their_names(tmp_path):
    (tmp_path / "noise.wav").write_bytes(b"nothing")
    rows = [{"audio": wav(tmp_path / "a.wav"), "transcript": "שלום"}] * 9
    rows += [{"audio": tmp_path / "noise.wav", "transcript": "שלום"}]
    folder = parquet(tmp_path / "data", rows)
    with pytest.raises(InputError, match=r"1 of its 10 rows are broken, more than max_broken_share.*noise.wav"):
        load_rows([Source(str(folder))], DataConfig(), for_training=True)
    assert len(load_rows([Source(str(folder))], DataConfig(max_broken_share=0.1, drop_duplicates=False), True)) == 9


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"transcript": "hello there"}, "no Hebrew in the text"),
        ({"transcript": "...!?"}, "empty text"),
        ({"transcript": "שלום " * 30}, "not 1–40 characters a second"),
        ({"transcript": "שלום", "metadata": {"quality_score": 0.2, "entry_id": "x"}}, "quality score too low"),
        ({"transcript": None}, "empty text"),
    ],
)
def test_filters(tmp_path, row, reason):
    good = {"audio": wav(tmp_path / "a.wav"), "transcript": "שלום", "metadata": {"quality_score": 0.9, "entry_id": "y"}}
    folder = parquet(
        tmp_path / "data", [good, {"metadata": good["metadata"]} | row | {"audio": wav(tmp_path / "b.wav")}]
    )
    config = DataConfig(min_quality_score=0.5, drop_duplicates=False)
    rows = load_rows([Source(str(folder))], config, for_training=True)
    assert [(drop.reason, drop.utterances) for drop in rows.dropped] == [(reason, 1)]
    assert rows.column("recording") == ["y"]


def test_a_mixture_has_its_shares_repeats_nobody_too_soon_and_hears_everybody():
    rows = SimpleNamespace(source_numbers=np.repeat([0, 1], [90, 400]))
    sources = [Source("a", probability=0.9), Source("b", probability=0.1)]
    mixture = Mixture(rows, sources, seed=3)
    assert mixture.counts.tolist() == [90, 10] and len(mixture) == 100
    heard = [mixture.order(epoch) for epoch in range(1, 41)]
    assert all(sorted(order[order < 90].tolist()) == list(range(90)) for order in heard)
    assert sorted(np.concatenate([order[order >= 90] for order in heard]).tolist()) == list(range(90, 490))
    assert heard[4].tolist() == Mixture(rows, sources, seed=3).order(5).tolist(), "no state"
    assert heard[0].tolist() != heard[1].tolist()


def test_what_is_replayed_does_not_end_an_epoch_and_is_heard_as_often_as_its_share_asks():
    rows = SimpleNamespace(source_numbers=np.repeat([0, 1], [180, 5]))
    mixture = Mixture(rows, [Source("a", probability=0.9), Source("b", probability=0.1, replay=True)], seed=3)
    assert mixture.counts.tolist() == [180, 20]
    order = mixture.order(1)
    assert sorted(order[order < 180].tolist()) == list(range(180))
    assert np.bincount(order[order >= 180] - 180).tolist() == [4] * 5


@pytest.mark.parametrize(
    ("share", "replays", "said"), [(None, (False, True), "needs a share"), (0.5, (True, True), "every source")]
)
def test_a_replay_that_cannot_be_is_refused(share, replays, said):
    sources = [Source("x", probability=share, replay=replay) for replay in replays]
    with pytest.raises(InputError, match=said):
        DataConfig(train_sources=sources).check_sources()


@pytest.mark.parametrize("shares", [(0.5, 0.6), (0.5, None), (1.5, -0.5), (1.0, 0.0)])
def test_probabilities_that_are_none_are_refused(shares):
    with pytest.raises(InputError, match="sum to 1"):
        DataConfig(train_sources=[Source("x", probability=share) for share in shares]).check_sources()


def test_system_turns_are_drawn_as_often_as_asked_and_not_supervised(config, processor, tmp_path):
    """The text before, another's where there is none, a list of words, no turn, or an empty one: by the draw alone."""
    config.train_sources = [Source(str(first_rows("corpus", 400, tmp_path / "c")))]
    rows = load_rows(config.train_sources, config, for_training=True)
    before, texts = rows.column("previous"), rows.column("text")
    config.no_system_prob, config.prev_context_prob = 0.25, 0.5
    dataset = SpeechDataset(rows, processor, config, training=True)
    first = [dataset[(1, i)] for i in range(len(rows))]
    contexts = [u["context"] for u in first]
    assert contexts == [dataset[(1, i)]["context"] for i in range(len(rows))], "the same draw"
    assert contexts != [dataset[(2, i)]["context"] for i in range(len(rows))]
    shares = [np.mean([test(context) for context in contexts]) for test in (bool, lambda c: c is None)]
    assert np.allclose(shares, (0.5, 0.25), atol=0.1)
    filled = [i for i, context in enumerate(contexts) if context]
    listed = [i for i in filled if ", " in contexts[i] and contexts[i] not in [*texts, *before]]
    assert np.isclose(len(listed) / len(filled), 0.5, atol=0.15)
    bags = {tuple(sorted(text.split())) for text in texts}
    spoken = 0
    for i in listed:
        words = contexts[i].split(", ")
        less = [tuple(sorted([*words[:n], *words[n + 1 :]])) for n in range(len(words)) if words[n] in texts[i].split()]
        assert tuple(sorted(words)) in bags or bags & set(less), "another's words, and at most one of its own"
        spoken += tuple(sorted(words)) not in bags
    assert np.isclose(spoken / len(listed), 0.5, atol=0.2)
    given = [i for i in filled if i not in listed]
    assert sum(bool(before[i]) for i in given) > 5
    assert all(contexts[i] == before[i] if before[i] else contexts[i] in texts for i in given)
    assert sum(contexts[i] != texts[i] for i in given) > 0.95 * len(given), "the own text is no context"
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    for number, start in (
        (given[0], f"<|im_start|>system\n{contexts[given[0]]}<|im_end|>\n<|im_start|>user\n<|audio_start|>"),
        (contexts.index(None), "<|im_start|>user\n<|audio_start|>"),
        (contexts.index(""), "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|audio_start|>"),
    ):
        batch = collator([first[number]], training=True)
        assert processor.tokenizer.decode(batch["input_ids"][0]).startswith(start)
        supervised = batch["input_ids"][0][batch["labels"][0] != -100]
        target = f"language Hebrew<asr_text>{texts[number]}<|im_end|>"
        assert processor.tokenizer.decode(supervised) == target
    assert not any(SpeechDataset(rows, processor, config, training=False)[(1, i)]["context"] for i in given[:20])


def test_waveforms_are_augmented_in_training_only_and_by_the_draw_alone(config, processor, train_rows):
    def features(epoch: int, training: bool = True):
        return SpeechDataset(train_rows, processor, config, training)[(epoch, 3)]["features"]

    plain = features(1)
    config.use_waveform_augmentation = True
    assert np.array_equal(features(1), features(1)) and not np.array_equal(features(1), plain)
    assert not np.array_equal(features(1), features(2))
    assert np.array_equal(features(1, training=False), plain)
