"""What `--prepare` hears is used by later starts, found again after an interruption, and finds leaks by their sound."""

import hashlib
import inspect

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import soxr
from conftest import DEMO, ROOT
from test_corpora import parquet

from hebrew_asr.data import audio, fingerprints
from hebrew_asr.data import prepare as prepare_corpora
from hebrew_asr.data.audio import decode_audio
from hebrew_asr.data.decoding import ReadError
from hebrew_asr.data.fingerprints import FingerprintIndex
from hebrew_asr.data.prepare import prepare
from hebrew_asr.data.selection import load_train_and_eval, prepared_folder
from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.errors import InputError
from train_round2_gradual import recipe


def sentences(part: str, count: int) -> list[dict]:
    (file,) = (DEMO / part).glob("*.parquet")
    rows = pyarrow.parquet.read_table(file).slice(0, count).to_pylist()
    return [{"waveform": decode_audio(row["audio"]), "transcript": row["transcript"]} for row in rows]


def written(folder, rows: list[dict], encode) -> str:
    folder.mkdir()
    files = [encode(row["waveform"], folder / str(i)) for i, row in enumerate(rows)]
    texts = [{"audio": file, "transcript": row["transcript"]} for file, row in zip(files, rows, strict=True)]
    return str(parquet(folder / "data", texts))


def as_wav(waveform: np.ndarray, file):
    soundfile.write(file.with_suffix(".wav"), waveform, 16_000, subtype="FLOAT")
    return file.with_suffix(".wav")


def as_mp3(waveform: np.ndarray, file):
    """Another codec, another rate, a quarter of the power."""
    soundfile.write(file.with_suffix(".mp3"), 0.5 * soxr.resample(waveform, 16_000, 22_050), 22_050)
    return file.with_suffix(".mp3")


def dropped(rows) -> dict[str, int]:
    return {drop.reason: drop.utterances for drop in rows.dropped}


@pytest.fixture
def leaking(tmp_path) -> DataConfig:
    """40 training utterances; the last 10 are evaluation utterances under another codec, rate, level and text."""
    heldout, train = sentences("heldout", 40), sentences("corpus", 30)
    heldout = [row for row in heldout if len(row["waveform"]) > 0.8 * 16_000][:30]  # under 0.7 s nothing matches
    leaks = [{"waveform": row["waveform"], "transcript": f"מילה {i}"} for i, row in enumerate(heldout[:10])]
    return DataConfig(
        train_sources=[Source(written(tmp_path / "train", train + leaks, as_mp3))],
        eval_sources=[Source(written(tmp_path / "heldout", heldout, as_wav))],
        preprocessing_num_workers=0,
    )


def test_the_same_clip_as_mp3_and_as_wav_is_a_leak(leaking):
    unprepared, _ = load_train_and_eval(leaking, seed=1)
    before = len(unprepared)
    assert "sound of an evaluation set" not in dropped(unprepared)
    prepare(leaking, 1, print)
    train, heldout = load_train_and_eval(leaking, seed=1)
    assert before - len(train) == dropped(train)["sound of an evaluation set"] == 10 and len(heldout) == 30
    (leak,) = [drop for drop in train.dropped if drop.reason == "sound of an evaluation set"]
    assert leak.examples == [f"{i}.mp3" for i in range(30, 40)], "all of them are listed"
    assert "listened to before: 100.0%" in train.notes[0] and len(train.notes) == 1


def test_another_evaluation_set_is_compared_without_listening_again(leaking, tmp_path, monkeypatch):
    prepare(leaking, 1, print)
    leaking.eval_sources = [Source(written(tmp_path / "other", sentences("corpus", 5), as_wav))]
    leaking.leak_min_words = 100
    train, _ = load_train_and_eval(leaking, seed=1)
    assert "run --prepare again" in train.notes[1] and "sound of an evaluation set" not in dropped(train)
    heard = prepare_corpora.listen
    evaluation = iter(range(5))
    monkeypatch.setattr(prepare_corpora, "listen", lambda piece: (next(evaluation), heard(piece))[1])
    prepare(leaking, 1, print)
    assert dropped(load_train_and_eval(leaking, seed=1)[0])["sound of an evaluation set"] == 5


def test_exact_lengths_and_what_only_decoding_shows(tmp_path):
    rows = sentences("corpus", 12)
    whole = [len(row["waveform"]) / 16_000 for row in rows]
    rows[1]["waveform"] = np.zeros(20_000, np.float32)
    rows[2]["waveform"][500] = np.nan
    rows[3]["waveform"] = np.sign(np.sin(np.arange(30_000) / 20)).astype(np.float32)
    train = written(tmp_path / "train", rows, as_wav)
    config = DataConfig(
        train_sources=[Source(train)],
        eval_sources=[Source(written(tmp_path / "heldout", sentences("heldout", 3), as_wav))],
        preprocessing_num_workers=2,
        max_broken_share=0.1,
        max_dropped_share=0.5,
        min_characters_per_second=5.0,
    )
    assert not dropped(load_train_and_eval(config, seed=1)[0])
    prepare(config, 1, print)
    kept, _ = load_train_and_eval(config, seed=1)
    assert dropped(kept) == {"silent": 1, "not finite": 1, "clipped": 1}
    assert kept.seconds == pytest.approx([whole[0], *whole[4:]])
    assert [kept[i]["seconds"] for i in range(len(kept))] == kept.seconds.tolist()
    config.max_broken_share = 0.05
    with pytest.raises(InputError, match=r"1 of its 12 rows are broken, more than max_broken_share.*not finite"):
        load_train_and_eval(config, seed=1)


def test_an_interrupted_pass_goes_on_where_it_stopped(leaking, monkeypatch):
    monkeypatch.setattr(prepare_corpora, "PART", 8)
    monkeypatch.setattr(prepare_corpora, "AT_ONCE", 8)
    folder = prepared_folder(leaking.train_sources[0], leaking)
    write, listened = prepare_corpora.write_part, []

    def interrupted(table, file):
        if file.name == f"heard-{audio.SOUND_VERSION}-000003.parquet":
            raise KeyboardInterrupt
        write(table, file)

    hear = prepare_corpora.listen
    monkeypatch.setattr(prepare_corpora, "listen", lambda piece: (listened.append(piece), hear(piece))[1])
    monkeypatch.setattr(prepare_corpora, "write_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(leaking, 1, print)
    names = [f"heard-{audio.SOUND_VERSION}-00000{part}.parquet" for part in (1, 2)]
    assert sorted(file.name for file in folder.glob("*")) == names
    assert "listened to before: 40.0%" in load_train_and_eval(leaking, seed=1)[0].notes[0]
    monkeypatch.setattr(prepare_corpora, "write_part", write)
    listened.clear()
    prepare(leaking, 1, print)
    assert len(listened) == 24, "what two parts do not hold of 40"
    assert dropped(load_train_and_eval(leaking, seed=1)[0])["sound of an evaluation set"] == 10


def test_the_flag_takes_no_value():
    config = recipe(["--demo", "--prepare", "--num_epochs", "1"])
    assert config.prepare and not config.inspect_data and config.num_epochs == 1
    assert str(ROOT) in config.train_sources[0].path


HEARING = (audio.decode_audio, audio.audio_blocks, audio.check_blocks, fingerprints.fingerprint)


def test_what_was_heard_is_of_the_functions_that_hear():
    """A change of one of these that changes what it returns needs another SOUND_VERSION; then renew this."""
    sources = [inspect.getsource(one) for one in HEARING]
    known = {2: "2a7df5574ed1"}
    assert hashlib.sha256("".join(sources).encode()).hexdigest()[:12] == known[audio.SOUND_VERSION]


def test_a_clip_that_is_held_out_and_cannot_be_heard_does_not_end_the_pass(tmp_path):
    rows = sentences("corpus", 12)
    for row in rows[::2]:
        row["waveform"] = np.stack([row["waveform"], -row["waveform"]], axis=1)
    train = Source(written(tmp_path / "train", rows, as_wav))
    config = DataConfig(
        [train], eval_fraction=0.5, preprocessing_num_workers=1, max_dropped_share=1, max_broken_share=1
    )
    prepare(config, 1, print)
    _, heldout = load_train_and_eval(config, seed=1)
    assert 0 < len(heldout) <= 6  # those that are heard


def test_an_error_of_reading_is_not_kept(tmp_path, monkeypatch):
    config = DataConfig([Source(written(tmp_path / "train", sentences("corpus", 12), as_wav))], eval_fraction=0.5)
    config.preprocessing_num_workers = 1
    with monkeypatch.context() as patched:

        def refuse(*_):
            raise ReadError("cannot be read now: Input/output error")

        patched.setattr(prepare_corpora, "decode_audio", refuse)
        with pytest.raises(InputError, match="cannot be read now: Input/output error"):  # of what is held out
            prepare(config, 1, print)
        patched.setattr(prepare_corpora, "evaluation_sounds", lambda *_: FingerprintIndex())
        with pytest.raises(InputError, match="cannot be read now: Input/output error"):
            prepare(config, 1, print)
    prepare(config, 1, print)
    assert set(dropped(load_train_and_eval(config, seed=1)[0])) == {"held out for evaluation"}
