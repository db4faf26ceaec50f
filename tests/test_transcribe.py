"""From recordings to transcripts: what is heard, when it is said, what is kept, and what cannot be transcribed."""

import io
import itertools
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import torch
import transformers

import transcribe_hebrew_asr as script
from hebrew_asr import files
from hebrew_asr.data.utterances import log_mel
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation import recordings
from hebrew_asr.evaluation.engines import open_engine
from hebrew_asr.evaluation.recordings import find_jobs, run, transcribe
from hebrew_asr.evaluation.settings import Decoding, TranscribeConfig
from hebrew_asr.evaluation.transcription import QwenModel, load_speech_model
from hebrew_asr.model import word_times

DEMO = files.DEMO
RATE = 16_000


@pytest.fixture(scope="module")
def spoken() -> list[dict]:
    """Clips of one sentence each: `wave` (samples,) at 16 kHz, `text`, `starts` of its words in seconds."""
    rows = pyarrow.parquet.read_table(Path(__file__).parent / "word_starts.parquet").to_pylist()
    return [row | {"wave": soundfile.read(io.BytesIO(row["audio"]), dtype="float32")[0]} for row in rows]


@pytest.fixture(scope="module")
def model() -> QwenModel:
    return load_speech_model(str(DEMO / "tuned"), Decoding(dtype="float32"), torch.device("cpu"))


@pytest.fixture(autouse=True)
def one_start(model, monkeypatch):
    """The model is loaded once; what it is asked is kept in `heard`."""

    def load(name, decoding, device):
        model.decoding = decoding
        return model

    monkeypatch.setattr(recordings, "open_engine", load)
    heard: list[float] = []
    transcribe_batch = QwenModel.transcribe

    def listen(self, features, seconds):
        heard.extend(seconds)
        return transcribe_batch(self, features, seconds)

    monkeypatch.setattr(QwenModel, "transcribe", listen)
    return heard


def settings(*paths: Path, **given) -> TranscribeConfig:
    given = {"num_workers": 0, "dtype": "float32", "model": str(DEMO / "tuned")} | given
    return TranscribeConfig(paths=[str(path) for path in paths], **given)


def save(folder: Path, clips: list[dict], count: int, suffix: str = "opus") -> list[Path]:
    """The first clips as they are, whatever their suffix says."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"clip-{number}.{suffix}" for number in range(count)]
    for path, clip in zip(paths, clips, strict=False):
        path.write_bytes(clip["audio"])
    return paths


def encode(path: Path, wave: np.ndarray, codec: str, rate: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        stream.bit_rate = 64_000
        frame = av.AudioFrame.from_ndarray((wave * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = RATE
        for packet in itertools.chain(stream.encode(frame), stream.encode(None)):
            container.mux(packet)


def video(path: Path, seconds: int = 1) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(5 * seconds):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


# -------------------------------------------------------------------------------------------------------- Word times


def test_word_starts_are_within_80_ms_of_the_true_ones_at_the_median(spoken, model):
    """In voices the checkpoint has not heard; the first word begins with the clip and does not count."""
    off = []
    for clip in spoken:
        features = log_mel(model.processor.feature_extractor, clip["wave"])
        starts = word_times.align(model.model, model.prompts, features, "", "Hebrew", clip["text"])
        assert starts == sorted(starts) and len(starts) == len(clip["text"].split())
        off += [abs(a - b) for a, b in zip(starts[1:], clip["starts"][1:], strict=True)]
    assert len(off) == 60
    assert np.median(off) <= 0.08, f"{1000 * np.median(off):.0f} ms"


def test_attention_is_what_transformers_computes(spoken, model):
    """Against stock attention over the whole sequence; afterwards the model attends as before."""
    features = log_mel(model.processor.feature_extractor, spoken[0]["wave"])
    tokens, owners = word_times.word_tokens(model.prompts, spoken[0]["text"])
    before = model.prompts.prompt(features.shape[1], "") + model.prompts.language_prefix("Hebrew")
    usual = model.model.model.language_model.config._attn_implementation
    found = word_times.attention_to_audio(model.model, model.prompts, features, before, tokens)
    assert model.model.model.language_model.config._attn_implementation == usual

    stock = transformers.Qwen3ASRForConditionalGeneration.from_pretrained(
        DEMO / "tuned", dtype=torch.float32, attn_implementation="eager"
    )
    padded = np.pad(features, ((0, 0), (0, -features.shape[1] % 100)))
    with torch.no_grad():
        layers = stock(
            input_ids=torch.tensor([before + tokens]),
            input_features=torch.from_numpy(padded)[None],
            input_features_mask=(torch.arange(padded.shape[1]) < features.shape[1]).long()[None],
            output_attentions=True,
        ).attentions
    audio = [place for place, token in enumerate(before) if token == stock.config.audio_token_id]
    expected = torch.cat(layers, dim=1)[0, :, len(before) - 1 : -1][:, :, audio]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    words = ["".join(model.prompts.tokenizer.convert_ids_to_tokens(np.array(tokens)[owners == i])) for i in range(3)]
    assert [word.strip() for word in words] == spoken[0]["text"].split()[:3]


@pytest.mark.parametrize("words, positions", [(1, 4), (2, 2), (3, 7), (4, 6)])
def test_paths_are_the_best_of_all(words, positions):
    scores = np.random.default_rng(words).normal(size=(5, words, positions))
    starts, sums = word_times.monotonic_paths(scores)
    for head in range(5):
        total = {}
        for cuts in itertools.combinations(range(1, positions), words - 1):
            edges = [0, *cuts, positions]
            total[edges[0], *cuts] = sum(
                scores[head, i, a:b].sum() for i, (a, b) in enumerate(itertools.pairwise(edges))
            )
        best = max(total, key=total.get)
        assert tuple(starts[head]) == best and sums[head] == pytest.approx(total[best])


def test_more_words_than_audio_have_no_times(model, spoken):
    features = log_mel(model.processor.feature_extractor, spoken[0]["wave"][:8000])
    assert word_times.align(model.model, model.prompts, features, "", "Hebrew", "אב " * 20 + "אב") is None


def test_words_leave_pauses_out():
    spans = [(0.2, 1.0), (2.0, 3.0)]
    assert word_times.within_speech([0.0, 0.5, 1.4, 2.5], 3.2, spans) == [
        (0.2, 0.5),
        (0.5, 1.0),
        (2.0, 2.5),
        (2.5, 3.0),
    ]
    assert word_times.within_speech([1.2, 1.4], 1.8, spans) == [(1.2, 1.4), (1.4, 1.8)], "in the pause altogether"


# ------------------------------------------------------------------------------------------------------- Transcripts


def test_a_long_recording_is_cut_where_nobody_speaks(tmp_path, spoken):
    """Sentences between silence, a tone and noise: nothing is heard there, and times are those of the recording."""
    rng, second = np.random.default_rng(0), np.arange(4 * RATE) / RATE
    silence = np.zeros(3 * RATE)
    sounds = [0.1 * np.sin(2 * np.pi * 440 * second), 0.02 * rng.standard_normal(4 * RATE), silence]
    parts, truth, now = [silence], [], 3.0
    for clip, sound in zip((spoken[2], spoken[11], spoken[14]), sounds, strict=True):
        truth.append((now, clip))
        parts += [clip["wave"], silence, sound, silence]
        now += sum(map(len, parts[-4:])) / RATE
    soundfile.write(tmp_path / "long.wav", np.concatenate(parts), RATE, subtype="FLOAT")
    (recording,) = transcribe(tmp_path / "long.wav", str(DEMO / "tuned"), dtype="float32")
    assert recording.seconds == pytest.approx(now, abs=0.01) and recording.language == "Hebrew"
    assert len(recording.segments) == 3
    off = []
    for segment, (start, clip) in zip(recording.segments, truth, strict=True):
        assert abs(segment.start - start) < 0.1 and abs(segment.end - start - len(clip["wave"]) / RATE) < 0.5
        assert " ".join(word.text for word in segment.words) == segment.text
        times = [time for word in segment.words for time in (word.start, word.end)]
        assert times == sorted(times) and times[0] >= segment.start and times[-1] <= segment.end + 0.001
        known = zip(segment.words, clip["text"].split(), clip["starts"], strict=False)
        off += [abs(word.start - start - true) for word, text, true in known if word.text == text]
    assert len(off) >= 6 and np.median(off) <= 0.08


def test_formats_of_sound_and_of_transcripts(tmp_path, spoken):
    clip = spoken[11]
    (opus,) = save(tmp_path / "in", [clip], 1)
    encode(tmp_path / "in" / "phone.m4a", clip["wave"], "aac", 48_000)
    encode(tmp_path / "in" / "old.wma", clip["wave"], "wmav2", 44_100)
    (tmp_path / "in" / "notes.txt").write_text("not a recording")
    found, seconds, took = run(
        settings(tmp_path / "in", formats=list(recordings.FORMATS), output_dir=str(tmp_path / "out"))
    )
    assert [one.file.name for one in found] == ["clip-0.opus", "old.wma", "phone.m4a"]
    assert [one.problem for one in found] == [None] * 3 and seconds > 2 and took > 0
    assert {one.text for one in found} == {clip["text"]}
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"{n}.{s}" for n in ("clip-0", "old", "phone") for s in ("txt", "json", "srt", "vtt", "tsv")}
    assert (tmp_path / "out" / "old.txt").read_text(encoding="utf-8") == clip["text"] + "\n"
    content = json.loads((tmp_path / "out" / "phone.json").read_text(encoding="utf-8"))
    assert content["text"] == clip["text"] and content["file"] == "phone.m4a"
    assert [word["text"] for word in content["segments"][0]["words"]] == clip["text"].split()
    assert sorted(path.name for path in opus.parent.iterdir()) == ["clip-0.opus", "notes.txt", "old.wma", "phone.m4a"]


def test_a_channel_of_two(tmp_path, spoken):
    waves = [spoken[11]["wave"], spoken[2]["wave"]]
    both = np.stack([np.pad(wave, (0, max(map(len, waves)) - len(wave))) for wave in waves], axis=1)
    soundfile.write(tmp_path / "call.wav", both, RATE, subtype="FLOAT")
    for channel, clip in enumerate((spoken[11], spoken[2])):
        (found,) = transcribe([tmp_path / "call.wav"], str(DEMO / "tuned"), channel=channel, dtype="float32")
        assert found.text.split()[:2] == clip["text"].split()[:2]
    (found,) = transcribe([tmp_path / "call.wav"], str(DEMO / "tuned"), channel=2, dtype="float32")
    assert "channel 2" in found.problem


def test_language_and_context_reach_the_model(tmp_path, spoken, model):
    (clip,) = save(tmp_path, spoken, 1)
    (found,) = transcribe(clip, str(DEMO / "tuned"), language="Hebrew", context="תפוח", dtype="float32")
    assert (model.decoding.language, model.decoding.context, found.language) == ("Hebrew", "תפוח", "Hebrew")


def test_subtitles_without_word_times_are_spread_over_segments(tmp_path, spoken):
    (clip,) = save(tmp_path, spoken, 1)
    ((found,), *_) = run(settings(clip, word_times=False, formats=["srt"]))
    assert found.segments[0].words is None
    assert spoken[0]["text"].split()[0] in clip.with_suffix(".srt").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- What is kept


def test_what_is_done_is_not_done_again(tmp_path, spoken, one_start):
    clips = save(tmp_path, spoken, 3)
    before, *_ = run(settings(tmp_path, formats=["text"]))
    assert len(one_start) == 3
    os.utime(clips[0])  # another time, the same content
    again, seconds, _ = run(settings(tmp_path, formats=["text", "vtt"]))
    assert len(one_start) == 3 and seconds == 0
    assert [one.text for one in again] == [one.text for one in before]
    assert "-->" in (tmp_path / "clip-1.vtt").read_text(encoding="utf-8"), "made from the JSON"

    clips[0].write_bytes(spoken[5]["audio"])
    changed, *_ = run(settings(tmp_path, formats=["text"]))
    assert len(one_start) == 4 and changed[0].text != before[0].text
    assert (tmp_path / "clip-0.txt").read_text(encoding="utf-8").strip() == changed[0].text
    run(settings(tmp_path, formats=["text"], num_beams=2))
    assert len(one_start) == 7, "another setting"


def test_another_models_transcripts_are_not_taken_for_its_own(tmp_path, spoken):
    def key(folder: Path) -> str:
        return recordings.model_key(str(folder), "float32", settings())

    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
    assert key(first) == key(second), "the same content in another place"
    (second / "model.safetensors").write_bytes(b"WEIGHTS")
    assert key(first) != key(second)


def test_a_recording_goes_on_where_it_was_interrupted(tmp_path, spoken, one_start, monkeypatch):
    pause = np.zeros(3 * RATE, np.float32)
    long = np.concatenate([part for clip in spoken[:5] for part in (clip["wave"], pause)])
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
        soundfile.write(tmp_path / folder / "long.flac", long, RATE)
    given = {"formats": ["srt"], "batch_seconds": 1.0}  # a piece at once
    run(settings(tmp_path / "whole", **given))

    heard, listen = len(one_start), QwenModel.transcribe

    def stop(self, features, seconds):
        if len(one_start) == heard + 3:
            raise KeyboardInterrupt
        return listen(self, features, seconds)

    monkeypatch.setattr(QwenModel, "transcribe", stop)
    with pytest.raises(KeyboardInterrupt):
        run(settings(tmp_path / "cut", **given))
    assert not list((tmp_path / "cut").glob("*.srt"))
    (unfinished,) = (tmp_path / "cut").glob(".*")
    unfinished.write_bytes(unfinished.read_bytes() + b'\n{"key": "torn')
    monkeypatch.setattr(QwenModel, "transcribe", listen)
    run(settings(tmp_path / "cut", **given))
    assert len(one_start) == heard + 5, "three pieces before, two after"
    for name in ("long.srt", "long.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "cut").glob(".*"))


def test_others_files_and_corrected_ones_are_left_alone(tmp_path, spoken, one_start):
    clips = save(tmp_path, spoken, 2)
    (tmp_path / "clip-0.srt").write_text("written by hand")
    found, *_ = run(settings(tmp_path))
    assert "clip-0.srt was not written by this command" in found[0].problem and found[1].problem is None
    assert (tmp_path / "clip-0.srt").read_text() == "written by hand" and len(one_start) == 1
    assert not (tmp_path / "clip-0.json").exists()

    (tmp_path / "clip-1.srt").write_text("corrected")
    found, *_ = run(settings(clips[1]))
    assert found[0].problem is None, "it is done, and nothing is to be written"
    clips[1].write_bytes(spoken[7]["audio"])
    found, *_ = run(settings(clips[1]))
    assert "clip-1.srt" in found[0].problem and (tmp_path / "clip-1.srt").read_text() == "corrected"
    found, *_ = run(settings(clips[1], overwrite=True))
    assert found[0].problem is None and "-->" in (tmp_path / "clip-1.srt").read_text(encoding="utf-8")


def test_files_of_an_earlier_transcript_are_made_anew_and_others_are_named(tmp_path, spoken, one_start):
    """Another setting stands for another model; a JSON makes its files without the model."""
    (clip,) = save(tmp_path, [spoken[11]], 1)

    def again(*formats: str, **given):
        (found,), *_ = run(settings(clip, formats=list(formats), **given))
        return found.problem, len(one_start)

    text, srt = clip.with_suffix(".txt"), clip.with_suffix(".srt")
    again("text", "srt", language="English")
    earlier = srt.read_bytes()
    assert again("text") == (None, 2) and srt.read_bytes() == earlier
    assert again("text", "srt") == (None, 2)
    right = srt.read_bytes()
    assert right != earlier and text.read_text(encoding="utf-8").strip() == spoken[11]["text"]

    srt.write_text("corrected")
    assert again("srt") == (None, 2) and srt.read_text() == "corrected"
    assert again("srt", overwrite=True) == (None, 2) and srt.read_bytes() == right

    clip.with_suffix(".vtt").write_text("another's")
    problem, _ = again("text", "vtt")
    assert "clip-0.vtt was not written by this command" in problem
    assert clip.with_suffix(".vtt").read_text() == "another's"
    assert again("vtt", overwrite=True) == (None, 2) and "-->" in clip.with_suffix(".vtt").read_text(encoding="utf-8")


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interruption_between_the_files_of_a_transcript_leaves_no_older_ones(
    tmp_path, spoken, monkeypatch, overwrite
):
    (clip,) = save(tmp_path, [spoken[11]], 1)
    run(settings(clip, language="English"))
    if overwrite:
        clip.with_suffix(".srt").write_text("another's")

    def stop(file, content):
        files.put(file, content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(recordings, "put", stop)
        run(settings(clip, overwrite=overwrite))
    (found,), *_ = run(settings(clip))
    assert found.problem is None and "-->" in clip.with_suffix(".srt").read_text(encoding="utf-8")
    assert clip.with_suffix(".txt").read_text(encoding="utf-8").strip() == spoken[11]["text"]


def test_a_json_that_was_corrected_makes_its_files_and_is_not_replaced(tmp_path, spoken, one_start):
    (clip,) = save(tmp_path, spoken, 1)
    run(settings(clip, formats=["text"]))
    file, text = clip.with_suffix(".json"), clip.with_suffix(".txt")
    content = json.loads(file.read_text(encoding="utf-8"))
    content["segments"][0] |= {"text": "מתוקן", "speaker": "first"}
    file.write_text(json.dumps(content))
    for _ in range(2):
        (found,), *_ = run(settings(clip, formats=["text", "tsv"]))
        assert found.text == "מתוקן" and text.read_text(encoding="utf-8") == "מתוקן\n" and len(one_start) == 1
        assert json.loads(file.read_text(encoding="utf-8"))["segments"] == content["segments"]
        (found,), *_ = run(settings(clip, formats=["text"], num_beams=2))
        assert "clip-0.json was not written by this command, or was changed" in found.problem and len(one_start) == 1
    (found,), *_ = run(settings(clip, formats=["text"], overwrite=True))
    assert len(one_start) == 2 and text.read_text(encoding="utf-8").strip() == found.text != "מתוקן"


def test_a_json_that_was_spoilt_is_its_recordings_problem(tmp_path, spoken, one_start):
    clips = save(tmp_path, spoken, 6)
    run(settings(tmp_path))
    spoil = (
        lambda content: content.pop("language"),
        lambda content: content["segments"][0].pop("start"),
        lambda content: content.update(segments=None),
        lambda content: content["segments"][0]["words"][0].update(start="0"),
        lambda content: content["segments"][0].update(text="\ud800", words=None),
    )
    for clip, change in zip(clips[1:], spoil, strict=True):
        content = json.loads(clip.with_suffix(".json").read_text(encoding="utf-8"))
        change(content)
        clip.with_suffix(".json").write_text(json.dumps(content))
    found, *_ = run(settings(tmp_path))
    assert [one.problem is None for one in found] == [True] + [False] * 5 and len(one_start) == 6
    assert "clip-1.json was changed and has no 'language'" in found[1].problem
    assert "clip-2.json was changed and has no 'start'" in found[2].problem
    found, *_ = run(settings(tmp_path, overwrite=True))
    assert not any(one.problem for one in found) and len(one_start) == 11


def test_names_and_transcripts_do_nothing_to_the_console(tmp_path, spoken, capsys):
    clip = tmp_path / "a\x1b]0;title\x07\n\u202e.opus"
    save(tmp_path, [spoken[11]], 1)[0].rename(clip)
    argv = [str(tmp_path), "--demo", "--num_workers", "0", "--formats", "text"]
    script.command(argv)
    file = clip.with_suffix(".json")
    file.write_text(file.read_text(encoding="utf-8").replace('"text": "', r'"text": "\u001b[31m'), encoding="utf-8")
    (tmp_path / "b\x1b.wav").touch()
    script.command([str(clip), *argv[1:]])
    with pytest.raises(InputError) as raised:
        script.command(argv)
    said = capsys.readouterr().out + str(raised.value)
    assert not {"\x1b", "\x07", "\u202e"} & set(said)
    assert r"a\x1b]0;title\x07\n\u202e.opus: \x1b[31m" in said and r"b\x1b.wav: zero bytes" in said


def test_names_that_would_meet_are_kept_apart(tmp_path, spoken):
    for folder in ("a", "b"):
        save(tmp_path / folder, spoken, 1)
    save(tmp_path / "a", spoken[1:], 1, "wav")
    jobs, problems = find_jobs([tmp_path / "a"], None)
    assert {job.path("srt").name for job in jobs} == {"clip-0.opus.srt", "clip-0.wav.srt"} and not problems
    jobs, problems = find_jobs([tmp_path], str(tmp_path / "out"))
    assert {str(job.target.relative_to(tmp_path / "out")) for job in jobs} == {
        "a/clip-0.opus",
        "a/clip-0.wav",
        "b/clip-0",
    }
    save(tmp_path / "c", spoken, 1)
    jobs, problems = find_jobs([tmp_path / "b" / "clip-0.opus", tmp_path / "c" / "clip-0.opus"], str(tmp_path / "out"))
    assert len(jobs) == 1 and "rename" in problems[0].problem


def test_all_of_a_folder_is_found_or_named(tmp_path, spoken, monkeypatch):
    top = tmp_path / "in"
    top.mkdir()
    for folder in (top / "calls", top / "locked", tmp_path / "elsewhere"):
        save(folder, spoken, 1)
    (top / "again").symlink_to(top)
    (top / "calls" / "up").symlink_to("..")
    (top / "all").symlink_to("calls")  # before the folder in their order
    (top / "linked").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(top / "pipe.wav")
    scandir = os.scandir

    def scan(folder):
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied", os.fspath(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scan)
    jobs, problems = find_jobs([top, tmp_path / "in" / "pipe.wav", top / "locked" / "clip-0.opus"], None)
    found = [job.file.relative_to(top) for job in jobs]
    assert sorted(map(str, found)) == ["calls/clip-0.opus", "linked/clip-0.opus", "locked/clip-0.opus"]
    assert {one.file.name: one.problem for one in problems} == {
        "locked": "cannot be read: Permission denied",
        "pipe.wav": "cannot be read: it is no regular file, but a pipe or a device",
    }
    assert len(problems) == 2


def test_files_are_whole_and_their_permissions_are_the_umasks(tmp_path, spoken, monkeypatch):
    save(tmp_path, spoken, 1)
    before = os.umask(0o027)
    try:
        run(settings(tmp_path))
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / f"clip-0.{s}").stat().st_mode) for s in ("json", "txt", "srt")} == {0o640}

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "flush", full)
    with pytest.raises(InputError, match="no space left on the disk"):
        run(settings(tmp_path, output_dir=str(tmp_path / "out")))
    assert not list((tmp_path / "out").iterdir())


# ------------------------------------------------------------------------------------------------------------ Bad input


def test_one_bad_recording_does_not_end_the_rest(tmp_path, spoken, capsys):
    good = save(tmp_path, spoken, 1)[0]
    soundfile.write(tmp_path / "silence.wav", np.zeros(60 * RATE, np.float32), RATE)
    (tmp_path / "empty.mp3").touch()
    (tmp_path / "letter.wav").write_text("not sound")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    video(tmp_path / "film.mp4")
    paths = [str(tmp_path), str(tmp_path / "nothing"), str(tmp_path / "missing.wav")]
    with pytest.raises(InputError) as raised:
        script.command([*paths, "--demo", "--num_workers", "0", "--dtype", "float32"])
    problems = dict(line.rsplit("/", 1)[1].split(": ", 1) for line in str(raised.value).splitlines()[1:])
    assert problems == {
        "empty.mp3": "zero bytes of audio",
        "film.mp4": "video without sound",
        "gone.wav": "cannot be read: No such file or directory",
        "letter.wav": "unreadable audio",
        "missing.wav": "no such file or folder",
        "nothing": "no recordings in this folder",
    }
    assert good.with_suffix(".srt").exists()
    assert (tmp_path / "silence.txt").read_text() == "" and (tmp_path / "silence.json").exists()
    out = capsys.readouterr().out
    assert "2 of 8 recordings have a transcript" in out and "no words in 1 of them: silence.wav" in out
    assert "times as fast as it was said" in out


def test_a_missing_end_is_named_and_what_is_there_transcribed(tmp_path, spoken, capsys):
    wave = np.concatenate([part for clip in spoken[:3] for part in (clip["wave"], np.zeros(RATE, np.float32))])
    for suffix, codec in (("flac", "flac"), ("wav", "pcm_s16le"), ("mkv", "aac"), ("aac", "aac")):
        file = tmp_path / f"cut.{suffix}.{suffix}"
        encode(file, wave, codec, RATE)
        (tmp_path / f"whole.{suffix}.{suffix}").write_bytes(file.read_bytes())
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    argv = [str(tmp_path), "--demo", "--num_workers", "0", "--dtype", "float32"]
    for _ in range(2):  # the second time from the JSON
        script.command(argv)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "end is missing" in line]
        names = sorted(line.removeprefix("the end is missing of ").split(": ")[0].split(", "))
        assert names == ["cut.aac.aac", "cut.flac.flac", "cut.mkv.mkv", "cut.wav.wav"]
    for file in tmp_path.glob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        assert content["is_cut"] == file.name.startswith("cut") and content["segments"], file.name


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_their_recordings_problem(tmp_path, spoken, wrong, one_start):
    wave = np.repeat(spoken[0]["wave"], 3)  # of another rate
    wave[RATE] = wrong
    soundfile.write(tmp_path / "broken.wav", wave, 3 * RATE, subtype="FLOAT")
    found = transcribe([*save(tmp_path, spoken, 1), tmp_path / "broken.wav"], str(DEMO / "tuned"), dtype="float32")
    assert [bool(one.text) for one in found] == [False, True] and len(one_start) == 1
    assert "not finite" in found[0].problem


def test_what_cannot_be_written_is_not_transcribed_first(tmp_path, spoken, one_start):
    (clip,) = save(tmp_path, spoken, 1)
    (tmp_path / "file").touch()
    ((found,), *_) = run(settings(clip, output_dir=str(tmp_path / "file" / "out")))
    assert "cannot be written to" in found.problem and not one_start


def test_a_piece_that_does_not_fit_the_memory_is_its_recordings_problem(tmp_path, spoken, monkeypatch):
    clips = save(tmp_path, [spoken[2], spoken[11]], 2)
    longest = len(spoken[2]["wave"]) / RATE
    transcribe_batch = QwenModel.transcribe

    def small(self, features, seconds):
        if max(seconds) > longest - 0.1:
            raise torch.OutOfMemoryError
        return transcribe_batch(self, features, seconds)

    monkeypatch.setattr(QwenModel, "transcribe", small)
    found = transcribe(clips, str(DEMO / "tuned"), dtype="float32")
    assert "do not fit the memory" in found[0].problem
    assert found[1].text == spoken[11]["text"], "of the same batch, in halves"


def test_a_file_that_is_being_written_is_named(tmp_path, spoken, monkeypatch):
    (clip,) = save(tmp_path, spoken, 1, "wav")
    decode = recordings.audio_blocks

    def grow(audio, **given):
        with open(audio["path"], "ab") as file:
            file.write(b"\0" * 1000)
        return decode(audio, **given)

    monkeypatch.setattr(recordings, "audio_blocks", grow)
    (found,) = transcribe(clip, str(DEMO / "tuned"), dtype="float32")
    assert "still being written" in found.problem


@pytest.mark.parametrize(
    "argv, message",
    [
        (["a.wav"], "give the checkpoint"),
        (["--model", "x"], "give files or folders"),
        (["a.wav", "--demo", "--formats", "doc"], "formats"),
        (["a.wav", "--demo", "--longest_seconds", "0"], "longest_seconds"),
        (["a.wav", "--demo", "--channel", "-1"], "channel"),
        (["a.wav", "--demo", "--chanel", "1"], "did you mean --channel"),
        (["a.wav", "--demo", "--language", "he"], "language is 'he', must be a name like English.*Hebrew"),
        (["a.wav", "--demo", "--language", "Heb"], "language is 'Heb', must be a name like English.*Hebrew"),
        (["a.wav", "--demo", "--language", "none"], "language is 'none', must be a name"),
        (["a.wav", "--demo", "--language", "None"], "nobody speaks: leave it out"),
    ],
)
def test_settings_that_cannot_mean_anything_are_refused(argv, message):
    with pytest.raises(InputError, match=message):
        script.command(argv)


@pytest.mark.parametrize(
    "words, expected",
    [
        ("new.wav b.wav --model m", {"paths": ["new.wav", "b.wav"], "model": "m"}),
        ("--model m a.wav b.wav", {"paths": ["a.wav", "b.wav"], "model": "m"}),
        ("a.wav --num_beams=4 b.wav --paths c.wav", {"paths": ["a.wav", "b.wav", "c.wav"], "num_beams": 4}),
        ("--overwrite a.wav --word_times false b.wav", {"paths": ["a.wav", "b.wav"], "overwrite": True}),
        ("--demo a.wav", {"paths": ["a.wav"], "num_workers": 0}),
        ("--formats vtt json a.wav --model m", {"paths": ["a.wav"], "formats": ["vtt", "json"], "model": "m"}),
        ("a.wav --formats json --seed -5 b.wav", {"paths": ["a.wav", "b.wav"], "formats": ["json"], "seed": -5}),
        ("--model m nothere.wav", "there is no file or folder 'nothere.wav', and --model takes no more"),
        ("a.wav --model m –formats srt", "there is no file or folder '–formats'.*two hyphens, not a dash"),
        ("a.wav --context hot words", "there is no file or folder 'words', and --context takes no more"),
        ("a.wav --overwrite maybe", "--overwrite takes true or false, got maybe"),
        ("a.wav --formats srt nothere.wav", "--formats takes a list of text, json, srt, vtt or tsv, got "),
        ("a.wav --channel -1 b.wav", "channel must be at least 0, got -1"),
    ],
)
def test_recordings_may_stand_before_and_after_options(tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    for name in ("a.wav", "b.wav", "c.wav"):
        (tmp_path / name).touch()
    (tmp_path / "json").mkdir()  # of earlier transcripts, and none that is meant
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            script.parse(words.split())
    else:
        config = script.parse(words.split())
        assert {name: getattr(config, name) for name in expected} == expected


def test_the_function_takes_languages_by_their_english_names(tmp_path, spoken, one_start):
    with pytest.raises(InputError, match=r"language is 'hebrew', must be a name like English.*Hebrew"):
        transcribe(save(tmp_path, spoken, 1), str(DEMO / "tuned"), language="hebrew")
    assert not one_start


def test_no_model_is_one_message(tmp_path, spoken, monkeypatch):
    monkeypatch.setattr(recordings, "open_engine", open_engine)
    (clip,) = save(tmp_path, spoken, 1)
    with pytest.raises(InputError, match="no such folder or file"):
        transcribe(clip, str(tmp_path / "nowhere"))


def test_ten_thousand_files_are_found_at_once(tmp_path):
    for number in range(10_000):
        (tmp_path / f"{number}.wav").touch()
    began = time.perf_counter()
    jobs, _ = find_jobs([tmp_path], None)
    assert len(jobs) == 10_000 and time.perf_counter() - began < 5


def test_the_package_is_imported_without_the_libraries():
    code = "import sys, hebrew_asr; hebrew_asr.transcribe; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
