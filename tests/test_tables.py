"""Tables as people write them become the right rows, or one message with the file and the line."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
from conftest import DEMO
from test_corpora import parquet, wav

from hebrew_asr.data.decoding import decode_audio
from hebrew_asr.data.loading import load_source
from hebrew_asr.data.rows import load_rows
from hebrew_asr.data.selection import load_train_and_eval
from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.errors import InputError

DATA = Path(__file__).parent / "data"
TEXTS = ["שלום עולם", "מה שלומך היום", "תודה רבה", "להתראות"]


@pytest.fixture
def folder(tmp_path):
    """Four clips of different lengths, 000.wav to 003.wav."""
    for number in range(4):
        wav(tmp_path / "calls" / f"{number:03}.wav", 1.0 + number / 10)
    return tmp_path / "calls"


def load(path, **settings):
    source = {name: settings.pop(name) for name in ("split", "text_column", "channel") if name in settings}
    return load_rows([Source(str(path), **source)], DataConfig(**settings), for_training=True)


def table(file, rows, delimiter=",", encoding="utf-8", newline="\n"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes("".join(delimiter.join(row) + newline for row in rows).encode(encoding))
    return file


ROWS = [("file_name", "text"), *((f"{number:03}.wav", text) for number, text in enumerate(TEXTS))]


@pytest.mark.parametrize("name", ["metadata.csv", "Metadata.CSV", "metadata.tsv", "my words.csv", "train.tsv"])
@pytest.mark.parametrize(
    ("delimiter", "encoding"), [(",", "utf-8-sig"), (";", "cp1255"), ("\t", "utf-16"), (",", "utf-8")]
)
def test_names_delimiters_and_encodings(folder, name, delimiter, encoding):
    delimiter = "\t" if name.endswith("tsv") else delimiter
    table(folder / name, ROWS, delimiter, encoding, "\r\n")
    rows = load(folder)
    assert rows.column("text") == TEXTS and rows.seconds.tolist() == pytest.approx([1.0, 1.1, 1.2, 1.3])
    taken = [note for note in rows.notes if "read as" in note]
    assert len(taken) == (encoding in ("cp1255", "utf-16")) and all(encoding in note for note in taken)


@pytest.mark.parametrize("column", ["file", "path", "audio", "audio_filepath", "Wav", "filename"])
@pytest.mark.parametrize(
    "write", [str, lambda n: n.removesuffix(".wav"), lambda n: ".\\" + n.upper(), lambda n: "./" + n]
)
def test_columns_and_spellings_of_names(folder, column, write):
    table(folder / "metadata.csv", [(column, "sentence"), *((write(name), text) for name, text in ROWS[1:])])
    assert load(folder).column("text") == TEXTS


def test_where_tables_and_files_lie(tmp_path):
    for split, first in (("train", 0), ("test", 10)):
        for number in range(2):
            wav(tmp_path / "above" / split / f"{first + number}.wav", 1 + (first + number) / 10)
    above = tmp_path / "above"
    table(
        above / "metadata.csv",
        [("file", "text"), *((f"{s}/{n}.wav", s) for s, n in (("train", 0), ("train", 1), ("test", 10)))],
    )
    assert load(above, require_hebrew=False).column("text") == ["train", "train"]
    assert load(above, split="test", require_hebrew=False).column("text") == ["test"]
    (above / "metadata.csv").unlink()
    table(above / "train" / "day 1" / "words.csv", [("file", "text"), ("../0.wav", "שלום")])
    table(above / "train" / "day 2" / "words.csv", [("file", "text"), ("../1.wav", "עולם")])
    assert load(above).column("text") == ["שלום", "עולם"]
    with pytest.raises(InputError, match="no split 'dev'"):
        load(tmp_path / "above" / "test", split="dev")
    voice = tmp_path / "cv-corpus" / "he"
    for number in range(3):
        wav(voice / "clips" / f"c{number}.mp3.wav", 1 + number / 10)
    head = ("client_id", "path", "sentence", "up_votes")
    for split, number in (("train", 0), ("test", 1), ("validated", 2)):
        table(voice / f"{split}.tsv", [head, ("x", f"c{number}.mp3.wav", f'"{split}" שלום', "2")], "\t")
    for split in ("train", "test", "validated"):
        assert load(voice, split=split).column("text") == [f'"{split}" שלום']
    with pytest.raises(InputError, match="several tables"):
        shutil.copy(voice / "test.tsv", voice / "other.tsv")
        (voice / "train.tsv").unlink()
        load(voice)


def test_manifests_of_other_trainers(folder):
    lists = {
        "official": [{"audio": f"{n:03}.wav", "text": f"language Hebrew<asr_text>{t}"} for n, t in enumerate(TEXTS)],
        "NeMo": [{"audio_filepath": f"{n:03}.wav", "duration": 1 + n / 10, "text": t} for n, t in enumerate(TEXTS)],
        "ms-swift": [
            {
                "messages": [{"role": "user", "content": "<audio>"}, {"role": "assistant", "content": text}],
                "audios": [f"{number:03}.wav"],
            }
            for number, text in enumerate(TEXTS)
        ],
    }
    for name, lines in lists.items():
        file = folder / f"{name}.jsonl"
        file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
        assert load(file).column("text") == TEXTS, name


def speech_of(folder):
    (file,) = (DEMO / "corpus").glob("*.parquet")
    clips = pyarrow.parquet.read_table(file, columns=["audio"])["audio"].slice(0, 20).to_pylist()
    wave = np.concatenate([decode_audio(clip) for clip in clips])
    folder.mkdir(parents=True)
    soundfile.write(folder / "recording.wav", wave[: 16_000 * 9], 16_000)
    return wave


def test_segments_of_a_recording_are_slices_of_it(tmp_path):
    wave = speech_of(tmp_path / "long")
    shutil.copy(DATA / "tables" / "segments.jsonl", tmp_path / "long" / "metadata.jsonl")
    rows = load(tmp_path / "long")
    given = [json.loads(line) for line in (DATA / "tables" / "segments.jsonl").read_text().splitlines()]
    assert rows.column("text") == [line["text"] for line in given]
    for row, line in zip(rows, given, strict=True):
        heard = decode_audio(row["audio"], row["start"], row["end"])
        start = round(line["offset"] * 16_000)
        assert len(heard) == pytest.approx(line["duration"] * 16_000, abs=2)
        assert np.abs(heard[:8000] - wave[start:][:8000]).max() < 1e-3
    table(
        tmp_path / "long" / "metadata.csv",
        [
            ("file", "start", "end", "text"),
            ("recording.wav", "0:01.5", "0:02.5", "שלום"),
            ("recording.wav", "8", "8.5", "א"),
        ],
    )
    (tmp_path / "long" / "metadata.jsonl").unlink()
    assert load(tmp_path / "long", min_characters_per_second=0.5).seconds.tolist() == pytest.approx([1.0, 0.5])
    table(tmp_path / "long" / "metadata.csv", [("file", "start", "end", "text"), ("recording.wav", "60", "65", "שלום")])
    with pytest.raises(InputError, match="segment past the end of the audio"):
        load(tmp_path / "long")


@pytest.mark.parametrize("name", ["backslash.csv", "cp1255.csv", "semicolon.csv", "utf16.csv"])
def test_tables_from_elsewhere(tmp_path, name):
    for number in range(6):
        where = "calls/" if name == "backslash.csv" else ""
        wav(tmp_path / "corpus" / f"{where}{number:03}.{'WAV' if where else 'wav'}", 1 + number / 10)
    shutil.copy(DATA / "tables" / name, tmp_path / "corpus" / "metadata.csv")
    rows = load(tmp_path / "corpus")
    assert rows.column("text")[:2] == ["הרופא לקח בגן היום", "הילד קנה תפוח"] and len(rows) == 6


def test_an_open_quote_is_named_with_its_line(tmp_path, folder):
    shutil.copy(DATA / "tables" / "open_quote.csv", folder / "metadata.csv")
    with pytest.raises(InputError, match=r"metadata\.csv, line 6: a quote"):
        load(folder)
    for rows in (
        [ROWS[0], ("000.wav", '"שלום'), *ROWS[2:]],  # never closed
        [ROWS[0], ("000.wav", '"שלום'), ("001.wav", 'עולם"'), *ROWS[3:]],  # closed by another row's
        [ROWS[0], ("000", '"שלום'), ("001", 'עולם"'), *ROWS[3:]],
    ):
        table(folder / "metadata.csv", rows)
        with pytest.raises(InputError, match=r"metadata\.csv, line 2: a quote"):
            load(folder)


def test_quotes_that_are_right_are_read(folder):
    texts = ['צה"ל', "שלום, עולם", "שורה\nועוד", 'אמר "כן"']
    cells = ['צה"ל', '"שלום, עולם"', '"שורה\nועוד"', '"אמר ""כן"""']
    table(folder / "metadata.csv", [ROWS[0], *((f"{n:03}.wav", cell) for n, cell in enumerate(cells))])
    assert [text.replace("\n", " ") for text in texts] == load(folder).column("text")


def test_rows_that_are_no_rows(folder):
    table(folder / "metadata.csv", [*ROWS[:3], (" ", ""), ("", ""), *ROWS[3:]])
    rows = load(folder)
    assert rows.column("text") == TEXTS and any("2 empty rows left out" in note for note in rows.notes)
    table(folder / "metadata.csv", [*ROWS[:2], ("001.wav", "שלום", "עולם")])
    with pytest.raises(InputError, match=r"line 3: 3 cells in a table of 2 columns"):
        load(folder)
    table(folder / "metadata.csv", [("name", "text"), ("a", "b")])
    with pytest.raises(InputError, match=r"metadata\.csv: no column that names the audio files"):
        load(folder)
    table(folder / "metadata.csv", [("file", "words"), *ROWS[1:]])
    with pytest.raises(InputError, match=r"metadata\.csv: no column transcript.*text_column"):
        load(folder)
    assert load(folder, text_column="words").column("text") == TEXTS


@pytest.mark.parametrize(
    "name", ["../secret.wav", "/etc/secret.wav", "a/../../secret.wav", "..\\secret.wav", "C:\\secret.wav"]
)
def test_a_corpus_may_not_name_files_outside_of_its_folder(folder, name):
    wav(folder.parent / "secret.wav")
    table(folder / "metadata.csv", [*ROWS, (name, "סוד")])
    with pytest.raises(InputError, match="outside of its folder"):
        load(folder)


def test_a_folder_of_audio_without_a_table(folder):
    with pytest.raises(InputError, match=r"no table.*pseudo_label"):
        load(folder)
    rows = load_rows([Source(str(folder), text_column="")], DataConfig(), for_training=False)
    assert rows.seconds.tolist() == pytest.approx([1.0, 1.1, 1.2, 1.3])


def test_columns_that_are_not_needed_never_stop_a_corpus(tmp_path, folder):
    lines = [{"audio": f"{n:03}.wav", "text": t} | ({"late": {"x": n}} if n > 1 else {}) for n, t in enumerate(TEXTS)]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert load(folder).column("text") == TEXTS
    clips = [{"audio": folder / f"{n:03}.wav", "text": text} for n, text in enumerate(TEXTS)]
    first = [clips[0] | {"note": None, "n": 1, "metadata": {"a": 1}}]
    shards = [first, [clips[1] | {"note": "x", "n": "b", "metadata": {"a": 1, "entry_id": "z"}}], clips[2:]]
    for number, shard in enumerate(shards):
        parquet(tmp_path / "shards", shard, f"train-{number:05}.parquet")
    schema = pyarrow.parquet.read_schema(tmp_path / "shards" / "train-00000.parquet")
    pyarrow.parquet.write_table(schema.empty_table(), tmp_path / "shards" / "train-00009.parquet")
    rows = load(tmp_path / "shards")
    assert rows.column("text") == TEXTS and "z" in rows.column("recording")


def test_copies_under_another_name_are_duplicates_and_leaks(tmp_path, folder):
    shutil.copy(folder / "000.wav", folder / "copy.wav")
    table(folder / "metadata.csv", [*ROWS, ("copy.wav", "טקסט אחר לגמרי")])
    rows = load(folder)
    assert rows.column("text") == TEXTS and [drop.reason for drop in rows.dropped] == ["duplicate audio"]
    (tmp_path / "test").mkdir()
    shutil.copy(folder / "001.wav", tmp_path / "test" / "other name.wav")
    table(tmp_path / "test" / "metadata.csv", [ROWS[0], ("other name.wav", "שונה")])
    config = DataConfig(train_sources=[Source(str(folder))], eval_sources=[Source(str(tmp_path / "test"))])
    train, _ = load_train_and_eval(config, seed=1)
    assert TEXTS[1] not in train.column("text") and len(train) == 3


def test_each_channel_of_a_call_is_an_utterance(tmp_path):
    tones = [0.1 * np.sin(2 * np.pi * hz * np.arange(16_000) / 16_000) for hz in (300, 700)]
    (tmp_path / "calls").mkdir()
    soundfile.write(tmp_path / "calls" / "a.wav", np.stack(tones, 1), 16_000)
    (tmp_path / "calls" / "metadata.jsonl").write_text('{"audio": "a.wav", "text": ["שלום", "כן"]}\n')
    rows = load(tmp_path / "calls", channel="each")
    assert rows.column("text") == ["שלום", "כן"] and rows.column("channel") == [0, 1]
    for row, truth in zip(rows, tones, strict=True):
        assert np.abs(decode_audio(row["audio"], row["start"], row["end"]) - truth).max() < 1e-3
    table(
        tmp_path / "calls" / "metadata.csv",
        [("file", "channel", "text"), ("a.wav", "1", "כן"), ("a.wav", "left", "שלום")],
    )
    (tmp_path / "calls" / "metadata.jsonl").unlink()
    assert load(tmp_path / "calls").column("channel") == [1, 0]
    table(tmp_path / "calls" / "metadata.csv", [("file", "text"), ("a.wav", "שלום")])
    with pytest.raises(InputError, match="one transcript for 2 channels"):
        load(tmp_path / "calls", channel="each")


def test_control_tokens_never_become_targets(folder):
    cases = json.loads((DATA / "control_tokens.json").read_text()).popitem()[1]
    for number, case in enumerate(cases):
        (folder / "metadata.jsonl").write_text(json.dumps({"audio": "000.wav", "text": case}))
        if number in (1, 2, 4, 5):  # the model's own prefix
            assert set(load(folder).column("text")[0].split()) <= {"שלום", "עולם", "היום"}, case
        else:
            with pytest.raises(InputError, match=r"control token in the text: <"):
                load(folder)


def test_a_language_is_named_in_english():
    names = {"he": "Hebrew", "hebrew": "Hebrew", "he-IL": "Hebrew", "Heb": "Hebrew", "עברית": "None"}
    for wrong, meant in names.items():
        with pytest.raises(InputError, match=rf"language is '{wrong}'.*{meant}"):
            DataConfig(train_sources=[Source("x", language=wrong)]).check_sources()


def test_what_would_be_dropped_for_its_length_or_sound_is_said_before_training(tmp_path, folder):
    wav(folder / "call.wav", 60.0)
    table(folder / "metadata.csv", [*ROWS, ("call.wav", "שלום")])
    with pytest.raises(
        InputError, match=r"1 utterances, 0\.02 of its 0\.02 hours.*max_dropped_share.*align_recordings"
    ):
        load(folder)
    assert load(folder, max_dropped_share=1.0).column("text") == TEXTS
    for number in range(3):
        soundfile.write(folder / f"{number:03}.wav", np.zeros(16_000 + number), 16_000)
    table(folder / "metadata.csv", ROWS)
    config = DataConfig(train_sources=[Source(str(folder))], eval_sources=[Source(str(DEMO / "heldout"), split="test")])
    with pytest.raises(InputError, match=r"of 4 utterances that were listened to.*'silent': 3"):
        load_train_and_eval(config, seed=1)


def test_flagged_rows_are_dropped_by_their_flag(tmp_path, folder):
    flags = [{"noisy": False, "skipped": False}, {"noisy": True, "skipped": False}, {"noisy": False, "skipped": True}]
    rows = [{"audio": folder / f"{n:03}.wav", "sentence": TEXTS[n], "extra_data": flag} for n, flag in enumerate(flags)]
    found = load(parquet(tmp_path / "crowd", rows))
    assert found.column("text") == TEXTS[:1]
    assert {drop.reason for drop in found.dropped} == {"flagged as noisy", "flagged as skipped"}
    assert load(tmp_path / "crowd", keep_flags=["noisy"]).column("text") == TEXTS[:2]


def test_a_folder_that_is_not_there_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "calls").mkdir(parents=True)
    began = time.monotonic()
    for path in ("data/nothere", "./x", "/x", "a/b/c", "calls.csv"):
        with pytest.raises(InputError, match="no such folder or file"):
            load_source(Source(path))
    with pytest.raises(InputError, match="did you mean data/calls"):
        load_source(Source("data/call"))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
@pytest.mark.parametrize(("name", "delimiter"), [("metadata.csv", ","), ("metadata.tsv", "\t")])
def test_a_separator_inside_of_a_text_ends_no_row(folder, name, delimiter, separator):
    rows = [*ROWS[:-1], ("003.wav", f"להתראות{separator}מחר")]
    table(folder / name, rows, delimiter)
    assert load(folder).column("text") == [*TEXTS[:-1], "להתראות מחר"]


def test_a_quoted_cell_of_a_tab_table_goes_on_in_the_next_line(folder):
    header, *others = ("\t".join(row) for row in ROWS[:-1])
    whole = [header, '003.wav\t"להתראות', "", 'מחר ""בבוקר"""', *others]
    (folder / "metadata.tsv").write_text("\n".join(whole) + "\n")
    assert load(folder).column("text") == ['להתראות מחר "בבוקר"', *TEXTS[:-1]]
    (folder / "metadata.tsv").write_text("\n".join([header, '003.wav\t"לא" אמר', *others, '000.wav\t"שלום', "", ""]))
    assert load(folder, drop_duplicates=False).column("text") == ['"לא" אמר', *TEXTS[:-1], '"שלום']
    (folder / "metadata.tsv").write_text("\n".join([header, others[0], '003.wav\t"להתראות', "מחר", *others[1:]]))
    with pytest.raises(InputError, match=r"metadata.tsv, line 3: a quote .* is open there"):
        load(folder)


def test_the_transcript_of_hours_is_one_cell(folder):
    text = "שלום עולם " * 20_000
    (folder / "metadata.csv").write_text(f'file,text\n000.wav,"{text}"\n001.wav,שלום\n')
    rows = load_rows([Source(str(folder))], DataConfig(), for_training=False)
    assert rows.column("text") == [text.strip(), "שלום"]


@pytest.mark.parametrize(
    ("header", "cells", "expected"),
    [
        ("begin,end", "0.25,0.75", (0.25, 0.75)),
        ("Start_MS,End_MS", "250,750", (0.25, 0.75)),
        ("offset,duration_ms", "0.25,500", (0.25, 0.75)),
        ("start,end", ",", (0, None)),
        ("start,end", ",0.75", "line 2: a segment that ends at 0.75 s, without a start"),
        ("duration,end_time", "1,0.75", "without a start"),
        ("onset,speaker", "0.25,2", "onset may say which part of its file"),
        ("clip_start,clip_end", "0:00:01,0:00:02", "clip_start, clip_end may say"),
        ("start_sample,length", "4000,8000", "start_sample may say"),
        ("start_date,end_reason", "2024,5", (0, None)),
    ],
)
def test_times_of_segments_are_understood_or_refused(folder, header, cells, expected):
    (folder / "list.csv").write_text(f"file,{header},text\n000.wav,{cells},שלום\n")
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            load(folder / "list.csv")
    else:
        (row,) = load(folder / "list.csv")
        assert (row["start"], row["end"]) == expected


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (("0.0", "1.0"), [0, 1]),
        (("L", "Right"), [0, 1]),
        (("1", "2"), "its channels are 1, 2. They are counted from 0 here"),
        (("agent", "customer"), "its channel is no number.*another name"),
        (("-1", "1"), "its channel is no number"),
    ],
)
def test_channels_of_rows_are_understood_or_refused(tmp_path, cells, expected):
    wav(tmp_path / "calls" / "call.wav", 1.0, channels=2)
    wav(tmp_path / "calls" / "one.wav", 1.5)
    rows = "".join(f"call.wav,{cell},שלום עולם\n" for cell in cells)
    (tmp_path / "calls" / "metadata.csv").write_text(f"file,channel,text\n{rows}one.wav,כאן 11,תודה\n")
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            load(tmp_path / "calls")
    else:
        assert load(tmp_path / "calls").column("channel") == [*expected, None]


def test_what_an_assistant_says_in_parts_is_a_text(folder):
    parts = [{"type": "text", "text": "שלום "}, {"type": "audio", "audio": "x"}, {"type": "text", "text": "עולם"}]
    for content, expected in ((parts, "שלום עולם"), (["שלום"], None), (5, None), ([{"text": 5}], None)):
        row = {"audios": ["000.wav"], "messages": [{"role": "assistant", "content": content}]}
        (folder / "list.jsonl").write_text(json.dumps(row))
        if expected:
            assert load(folder / "list.jsonl").column("text") == [expected]
        else:
            with pytest.raises(InputError, match="line 1: messages without an assistant's answer"):
                load(folder / "list.jsonl")


def test_sessions_flags_and_quality_of_a_table_count_as_those_of_parquet(folder):
    rows = [
        {"audio": f"{number:03}.wav", "text": text, "session": number // 2, "extra_data": {"skipped": number == 3}}
        | {"metadata": str({"quality_score": number / 4})}
        for number, text in enumerate(TEXTS)
    ]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load(folder / "list.jsonl", min_quality_score=0.2)
    assert found.column("text") == TEXTS[1:3] and found.column("group") == ["session 0", "session 1"]
    assert {drop.reason: drop.utterances for drop in found.dropped} == {
        "quality score too low": 1,
        "flagged as skipped": 1,
    }


def test_of_a_table_above_its_splits_only_what_is_of_another_split_is_left_out_in_silence(tmp_path):
    for place, number in (("train", 0), ("train", 1), ("test", 2), ("more", 3)):
        wav(tmp_path / place / f"{number}.wav", 1 + number / 10)
    names = ["0.wav", "train/1.wav", "test/2.wav", "2.wav", "more/3.wav", "4.wav", "test/5.wav"]
    table(tmp_path / "metadata.csv", [("file", "text"), *((name, "שלום עולם") for name in names)])
    rows = load(tmp_path, max_broken_share=0.5)
    assert [Path(name).name for name in rows.column("recording")] == ["0.wav", "1.wav"]
    assert [(drop.reason, drop.utterances) for drop in rows.dropped] == [("no such audio file", 2)]  # 2.wav, 4.wav
    assert any("1 rows left out" in note and "more/3.wav" in note for note in rows.notes)


def test_links_that_lead_in_circles_and_names_from_another_place(folder, monkeypatch):
    for name in ("again", "back"):
        (folder / name).symlink_to(folder)
    (folder / "metadata.csv").write_text(f"file,text\n{folder}/000.wav,שלום\n1.wav,עולם\n")
    (folder / "1.wav").symlink_to(folder / "001.wav")
    linked = folder.with_name("linked")
    linked.symlink_to(folder)
    monkeypatch.chdir(folder.parent)
    for source in (folder, linked, Path(folder.name)):
        assert load(source).column("text") == ["שלום", "עולם"]
    (folder / "metadata.csv").unlink()
    (folder / "1.wav").unlink()
    rows = load_rows([Source(str(folder), text_column="")], DataConfig(), for_training=False)
    assert sorted(rows.column("recording")) == [str(folder / f"{number:03}.wav") for number in range(4)]
