"""Corpora that are broken in every way seen so far: what is dropped is counted, what is wrong is one message."""

import errno
import io
import json
import os
import subprocess
import sys
import textwrap

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import soundfile
from conftest import ROOT
from hub_server import HubServer
from test_corpora import parquet, wav

from hebrew_asr.data import decoding
from hebrew_asr.data.report import write_report
from hebrew_asr.data.rows import load_rows
from hebrew_asr.data.selection import load_train_and_eval
from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.errors import InputError


def load(*paths, **settings):
    return load_rows([Source(str(path)) for path in paths], DataConfig(**settings), for_training=True)


def test_every_rate_and_channel_count_is_read_and_an_hour_is_cut_or_dropped(tmp_path):
    hour = wav(tmp_path / "hour.wav", 3600, rate=8_000)
    segments = "".join(f"<|{start}.00|>שלום<|{start + 5}.00|>" for start in range(0, 3600, 600))
    rows = [
        {"audio": wav(tmp_path / "8k.wav", 1.0, 8_000), "transcript": "שלום"},
        {"audio": wav(tmp_path / "48k.wav", 1.5, 48_000, channels=3), "transcript": "שלום"},
        {"audio": hour, "transcript": "שלום"},
        {"audio": hour, "transcript": segments},
    ]
    found = load(
        parquet(tmp_path / "data", rows), drop_duplicates=False, min_characters_per_second=0.5, max_dropped_share=1.0
    )
    assert found.seconds.tolist() == pytest.approx([1.0, 1.5, *[5.0] * 6])
    assert [(drop.reason, drop.utterances) for drop in found.dropped] == [("longer than 30 s, without timestamps", 1)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"audio": "a.wav"}'], "no column .*text.*, there are audio"),
        (['{"audio": "a.wav", "text": "שלום", "text": '], "JSON"),
        (['{"audio": "a.wav", "text": "שלום"}', '{"audio": "a.wav", "text": ["שלום", 5]}'], "text"),
        ([], "no rows"),
    ],
)
def test_a_list_of_files_that_is_none(tmp_path, lines, message):
    wav(tmp_path / "a.wav")
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=f"list.jsonl.*{message}"):
        load(tmp_path / "list.jsonl")


def test_the_official_scripts_list(tmp_path):
    """Absolute and relative paths, with and without the language, and speech that is none."""
    for name, seconds in (("a", 1.0), ("b", 1.2), ("c", 1.4)):
        wav(tmp_path / "clips" / f"{name}.wav", seconds)
    lines = [
        {"audio": str(tmp_path / "clips" / "a.wav"), "text": "language Hebrew<asr_text>שלום עולם"},
        {"audio": "clips/b.wav", "text": "שלום"},
        {"audio": "clips/c.wav", "text": "language None<asr_text>"},
        {"audio": "clips/d.wav", "text": "language Hebrew<asr_text>שלום"},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    rows = load(tmp_path / "list.jsonl", max_broken_share=0.5)
    assert rows.column("text") == ["שלום עולם", "שלום"] and rows.seconds.tolist() == [1.0, 1.2]
    assert {drop.reason: drop.utterances for drop in rows.dropped} == {"empty text": 1, "no such audio file": 1}


def test_a_transcript_that_is_no_text_is_broken(tmp_path):
    clip = wav(tmp_path / "a.wav").read_bytes()
    data = [{"audio": {"bytes": clip, "path": "a"}, "transcript": 5}]
    datasets.Dataset.from_list(data).save_to_disk(tmp_path / "data")
    with pytest.raises(InputError, match=r"none of its 1 rows can be used.*text is not a string"):
        load(tmp_path / "data")


def test_an_unreadable_shard_is_named(tmp_path):
    folder = parquet(tmp_path / "data", [{"audio": wav(tmp_path / "a.wav"), "transcript": "שלום"}])
    (folder / "train-00001.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(InputError, match=f"{folder}.*[Pp]arquet"):
        load(folder)


def test_an_empty_source_beside_a_good_one_is_named(tmp_path):
    good = parquet(tmp_path / "good", [{"audio": wav(tmp_path / "a.wav"), "transcript": "שלום"}])
    empty = parquet(tmp_path / "empty", [{"audio": wav(tmp_path / "b.wav"), "transcript": "..."}])
    with pytest.raises(InputError, match=r"empty: none of its 1 rows can be used: \{'empty text': 1\}"):
        load(good, empty)
    config = DataConfig(train_sources=[Source(str(good))], eval_sources=[Source(str(empty))])
    with pytest.raises(InputError, match="none of its 1 rows"):
        load_train_and_eval(config, seed=1)


def test_odd_columns_are_read_or_refused(tmp_path):
    clip = {"bytes": wav(tmp_path / "a.wav").read_bytes(), "path": "a"}
    for metadata in ("null", "free text", '{"entry_id": "x"}', None):
        data = [{"audio": clip, "text": "שלום", "metadata": metadata}]
        datasets.Dataset.from_list(data).save_to_disk(tmp_path / f"m{metadata}"[:8])
        assert len(load(tmp_path / f"m{metadata}"[:8], min_quality_score=0.5)) == 1
    datasets.Dataset.from_list([{"audio": "a.wav", "text": "שלום"}]).save_to_disk(tmp_path / "paths")
    with pytest.raises(InputError, match=r"its column `audio` holds Value\('string'\), no audio"):
        load(tmp_path / "paths")


def test_a_slice_of_a_folder_of_audio_is_a_slice_and_a_split_that_is_not_there_is_none(tmp_path):
    for seconds, name in ((0.5, "a"), (0.6, "b"), (0.7, "c")):
        wav(tmp_path / "audio" / f"{name}.wav", seconds)
    (tmp_path / "audio" / "metadata.csv").write_text("file_name,text\na.wav,א\nb.wav,ב\nc.wav,ג\n")
    sliced = load_rows([Source(str(tmp_path / "audio"), split="train[1:]")], DataConfig(), for_training=True)
    assert sliced.column("text") == ["ב", "ג"]
    with pytest.raises(InputError, match="no split 'test'"):
        load_rows([Source(str(tmp_path / "audio"), split="test[:1]")], DataConfig(), for_training=True)


def test_a_file_that_was_mended_is_read_again(tmp_path):
    for name in "ab":
        wav(tmp_path / "audio" / f"{name}.wav", 2.0)
    (tmp_path / "audio" / "metadata.csv").write_text("file_name,text\na.wav,שלום\nb.wav,עולם\n")
    (tmp_path / "audio" / "b.wav").write_bytes(b"broken")
    assert load(tmp_path / "audio", max_broken_share=0.5).column("text") == ["שלום"]
    wav(tmp_path / "audio" / "b.wav", 1.0)
    assert load(tmp_path / "audio").seconds.tolist() == [2.0, 1.0]


def test_a_script_is_refused_with_the_way_around_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fleurs.py").write_text("raise SystemError('was run')")
    with pytest.raises(InputError, match=r"scripts are no longer supported.*refs/convert/parquet"):
        load("fleurs.py")


def test_the_hubs_parquet_copy_of_a_script(tmp_path):
    clip = io.BytesIO()
    soundfile.write(clip, 0.1 * np.sin(np.arange(16_000)), 16_000, format="WAV")
    table = datasets.Dataset.from_list([{"audio": {"bytes": clip.getvalue(), "path": "a"}, "transcription": "שלום"}])
    table.to_parquet(tmp_path / "0000.parquet")
    with HubServer(users={"hf_r": ("someone", "read")}) as hub:
        copies = {f"{name}/test/0000.parquet": (tmp_path / "0000.parquet").read_bytes() for name in ("he_il", "xx")}
        repo = hub.add_repo("google/fleurs", {"fleurs.py": b"raise SystemError", **copies}, repo_type="dataset")
        repo.commit("refs/convert/parquet", copies, "", "", "parquet-converter")
        code = """
            from hebrew_asr.data.rows import load_rows
            from hebrew_asr.data.sources import DataConfig, Source
            from hebrew_asr.data.loading import load_source
            from hebrew_asr.errors import InputError
            try:
                load_source(Source("google/fleurs", "he_il", split="test"))
            except InputError as error:
                print(error)
            copy = Source("google/fleurs", "he_il", revision="refs/convert/parquet", split="test")
            print(load_rows([copy], DataConfig(), False).column("text"))
        """
        environment = {**os.environ, **hub.env(home=tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True
        )
    assert "refs/convert/parquet" in done.stdout.splitlines()[0], done.stderr
    assert done.stdout.splitlines()[1:] == ["['שלום']"], done.stderr


def test_a_corpus_of_others_names_no_file_of_this_machine(tmp_path):
    """The guard that tables have, for Parquet files whose rows have paths in place of bytes."""
    mine, theirs = wav(tmp_path / "private" / "mine.wav", 1.2), wav(tmp_path / "data" / "clip.wav", 1.4)
    table = [{"audio": {"bytes": None, "path": str(file)}, "transcript": "שלום"} for file in (mine, theirs)]
    pyarrow.parquet.write_table(datasets.Dataset.from_list(table).data.table, tmp_path / "data" / "train.parquet")
    found = load(tmp_path / "data", max_broken_share=0.5)
    assert found.column("recording") == [str(theirs)]
    assert [(drop.reason, drop.examples) for drop in found.dropped] == [
        ("a file outside of the corpus's folder", [str(mine)])
    ]
    assert len(load(tmp_path / "data" / "train.parquet")) == 2  # its user's own file


def test_an_error_of_reading_stops_the_start_and_is_not_remembered(tmp_path, monkeypatch):
    for number in range(3):
        wav(tmp_path / "calls" / f"{number}.wav", 1 + number / 10)
    (tmp_path / "calls" / "metadata.csv").write_text("file,text\n" + "".join(f"{n}.wav,שלום\n" for n in range(3)))
    for code in (errno.EIO, errno.EMFILE, errno.EACCES):

        def refuse(name, *args, code=code, **kwargs):
            if str(name).endswith("1.wav"):
                raise OSError(code, os.strerror(code), name)
            return open(name, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(decoding, "open", refuse, raising=False)
            with pytest.raises(InputError, match=f"1.wav: cannot be read now: {os.strerror(code)}"):
                load(tmp_path / "calls")
    found = load(tmp_path / "calls")
    assert len(found) == 3 and not found.dropped


@pytest.mark.parametrize(
    ("column", "value", "dropped"),
    [
        ("segment_start", "0.5", None),
        ("segment_end", "half a second", "segment without a time in seconds"),
        ("segment_channel", "left", None),
        ("session", 0, None),
        ("metadata", "[" * 100_000, None),
        ("extra_data", "{'skipped': True}", "flagged as skipped"),
    ],
)
def test_columns_of_other_kinds_than_usual(tmp_path, column, value, dropped):
    rows = [{"audio": wav(tmp_path / f"{n}.wav", 1 + n / 10), "transcript": "שלום", column: value} for n in range(2)]
    rows[1][column] = None
    found = load(parquet(tmp_path / "data", rows), max_broken_share=1.0)
    assert [drop.reason for drop in found.dropped] == [reason for reason in [dropped] if reason]
    assert len(found) == 2 - len(found.dropped)
    assert column != "session" or found.column("group")[0] == "session 0"


def test_a_row_without_audio_is_dropped_and_the_report_is_made(tmp_path):
    folder = parquet(tmp_path / "data", [{"audio": wav(tmp_path / "a.wav"), "transcript": "שלום"}] * 30)
    table = pyarrow.parquet.read_table(folder / "train-00000.parquet")
    audio = pyarrow.array([*table["audio"].to_pylist()[1:], None], table["audio"].type)
    pyarrow.parquet.write_table(table.set_column(0, "audio", audio), folder / "train-00000.parquet")
    found = load(folder, drop_duplicates=False)
    assert [(drop.reason, drop.utterances) for drop in found.dropped] == [("zero bytes of audio", 1)]
    write_report(tmp_path, found, found, DataConfig([Source(str(folder))]))
    assert "zero bytes of audio" in (tmp_path / "corpus-dropped.tsv").read_text()


def test_segments_of_one_file_are_measured_once(tmp_path, monkeypatch):
    wav(tmp_path / "calls" / "hour.wav", 60)
    rows = "".join(f"hour.wav,{start},{start + 5},שלום עולם {start}\n" for start in range(0, 60, 5))
    (tmp_path / "calls" / "metadata.csv").write_text(f"file,start,end,text\n{rows}")
    opened = []
    monkeypatch.setattr(decoding, "reader_of", lambda audio, real=decoding.reader_of: opened.append(1) or real(audio))
    assert len(load(tmp_path / "calls")) == 12 and len(opened) == 1
