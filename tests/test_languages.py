"""A source may be in another language, or without speech: its rows stay, and their targets name it."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet
import pytest
from conftest import DEMO, first_rows
from test_corpora import parquet, wav

from hebrew_asr.checkpoints.store import differences
from hebrew_asr.command_line import parse_config
from hebrew_asr.data.audio import decode_audio
from hebrew_asr.data.prepare import prepare
from hebrew_asr.data.rows import load_rows
from hebrew_asr.data.selection import load_train_and_eval, split
from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.data.stream import EndlessPieces, load_streams_and_eval
from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.errors import InputError
from hebrew_asr.text.scoring import leaderboard_normalize
from train_hebrew_asr_enhanced import DataCollatorSpeechSeq2SeqWithPadding, TrainingConfig

ENGLISH = Source(str(DEMO / "replay" / "english"), language="English")
NO_SPEECH = Source(str(DEMO / "replay" / "nonspeech"), language="None")


def sentences(folder) -> list[str]:
    texts = [
        row["transcript"] for file in folder.glob("*.parquet") for row in pyarrow.parquet.read_table(file).to_pylist()
    ]
    return [leaderboard_normalize(text) for text in texts]


def test_what_is_replayed_is_not_what_is_tested():
    for name, count in (("english", 250), ("english_900", 900)):
        replayed = sentences(DEMO / "replay" / name)
        assert len(set(replayed)) == count and not set(replayed) & set(sentences(DEMO / "english"))
    digests = [
        set(load_rows([Source(str(DEMO / f), split=s, language="None")], DataConfig(), False).column("digest"))
        for f, s in (("replay/nonspeech", "train"), ("nonspeech", "test"))
    ]
    assert len(digests[0]) == 60 and not digests[0] & digests[1]


def test_every_row_of_another_language_or_without_speech_is_trained_on(corpus, config, processor):
    config.train_sources = [Source(str(corpus)), ENGLISH, NO_SPEECH]
    rows = load_rows(config.train_sources, config, for_training=True)
    assert np.bincount(rows.source_numbers).tolist() == [41, 250, 60]
    dataset = SpeechDataset(rows, processor, config, training=True)
    first = [0, 41, *range(291, 351)]
    utterances = [dataset[(1, number)] for number in first]
    assert not [u for u in utterances if "dropped" in u], "silence is heard too"
    loudness = [np.sqrt(np.mean(np.square(decode_audio(rows[number]["audio"])))) for number in first]
    assert min(loudness) < 1e-3 < max(loudness)
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    for batch in (collator(utterances, training=True), collator.packed(utterances)):
        targets = set()
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            targets.update(processor.tokenizer.decode(ids[labels != -100]).split("<|im_end|>"))
        spoken = [f"language {u['language']}<asr_text>{u['text']}" for u in utterances[:2]]
        assert targets - {""} == {*spoken, "language None<asr_text>"}
        assert spoken[0].startswith("language Hebrew<asr_text>") and spoken[1].startswith("language English<asr_text>")


def test_a_stream_carries_the_language_too(corpus, heldout):
    sources = [dataclasses.replace(one, probability=0.5) for one in (ENGLISH, NO_SPEECH)]
    config = DataConfig(sources, [Source(str(heldout))], streaming=True, steps_per_epoch=1)
    streams, _ = load_streams_and_eval(config, seed=1)
    for stream in streams:
        pieces = [piece for piece, _ in zip(EndlessPieces(stream, (1,)), range(50), strict=False)]
        assert {(piece["language"], piece["dropped"]) for piece in pieces} == {(stream.source.language, "")}


def test_what_a_language_or_no_speech_does_not_excuse_is_dropped(tmp_path):
    second, short = wav(tmp_path / "second.wav"), wav(tmp_path / "short.wav", 0.1)

    def dropped(language: str | None, text: str, audio=second) -> list[str]:
        rows = [{"audio": audio, "transcript": text}, {"audio": wav(tmp_path / "b.wav", 2.0), "transcript": ""}]
        rows[1]["transcript"] = "" if language == "None" else "hello there שלום"
        source = Source(str(parquet(tmp_path / f"{language}{text}{audio.stem}", rows)), language=language)
        return [drop.reason for drop in load_rows([source], DataConfig(), for_training=True).dropped]

    assert dropped("English", "hello there") == [] == dropped("None", "")
    assert dropped(None, "hello there") == dropped("Hebrew", "hello there") == ["no Hebrew in the text"]
    assert dropped("English", "") == ["empty text"]
    assert dropped("English", "hello there " * 9) == ["not 1–40 characters a second"]
    assert dropped("None", "hello") == ["text where nobody speaks"]
    assert dropped("None", "", short) == ["shorter than 0.3 s"]


def test_what_was_listened_to_before_keeps_silence_where_nobody_speaks(heldout, tmp_path):
    folder = first_rows("replay/nonspeech", 60, tmp_path / "nonspeech")
    source = Source(str(folder), language="None")
    config = DataConfig([source], [Source(str(heldout))], preprocessing_num_workers=1)
    prepare(config, 1, lambda line: None)
    train, _ = load_train_and_eval(config, seed=1)
    assert len(train) == 60 and "listened to before: 100.0%" in train.notes[0]
    config.train_sources = [dataclasses.replace(source, language=None)]
    with pytest.raises(InputError, match="none of its 60 rows can be used"):
        load_train_and_eval(config, seed=1)


def test_utterances_are_held_out_in_the_language_of_the_run(tmp_path):
    folder = first_rows("corpus", 200, tmp_path / "corpus")
    train, heldout = split(DataConfig([Source(str(folder)), ENGLISH, NO_SPEECH], eval_fraction=0.3), seed=1)
    assert set(heldout.column("language")) == {None} and len(heldout) > 20
    assert np.bincount(train.source_numbers).tolist()[1:] == [250, 60]
    with pytest.raises(InputError, match="in the run's language has 0 recordings"):
        split(DataConfig([ENGLISH, NO_SPEECH]), seed=1)


def test_a_language_that_is_none_is_refused_and_the_settings_come_back_as_they_were():
    for language in ("english", "", "None."):
        with pytest.raises(InputError, match="must be a name like English, or None"):
            DataConfig([Source("x", language=language)]).check_sources()
    with pytest.raises(InputError, match="nobody speaks in eval_sources"):
        DataConfig([ENGLISH], [NO_SPEECH]).check_sources()
    given = TrainingConfig(train_sources=[Source("x"), ENGLISH, NO_SPEECH])
    sources = json.dumps([dataclasses.asdict(source) for source in given.train_sources])
    config = parse_config(["--train_sources", sources], TrainingConfig())
    assert [source.language for source in config.train_sources] == [None, "English", "None"]
    before = given.identity()
    del before["train_sources"][0]["language"]
    assert differences(before, given.identity()) == [], "a run that began before there was this field goes on"
