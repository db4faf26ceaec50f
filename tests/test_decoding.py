"""Recordings in every container and codec that people have: their length, their samples, slices, and what is missing.

The files are made here from speech whose waveform is known; small ones from elsewhere are in tests/data.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import soxr
from conftest import DEMO, ROOT

from hebrew_asr.data import decoding
from hebrew_asr.data.decoding import CUT, SAMPLE_RATE, AudioError, decode_audio, inspect_audio
from hebrew_asr.data.rows import load_rows
from hebrew_asr.data.selection import check_sound
from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.errors import InputError

DATA = Path(__file__).parent / "data"


# name: (container, codec, Hz, bit rate, has pictures, seconds that may be too many: an encoder's delay and last frame)
FORMATS = {
    "m4a": ("ipod", "aac", 44_100, 96_000, False, 0.02),
    "alac": ("ipod", "alac", 48_000, None, False, 0.02),
    "mp4": ("mp4", "aac", 48_000, 96_000, True, 0.02),
    "mov": ("mov", "pcm_s16le", 48_000, None, True, 0.02),
    "3gp": ("3gp", "libopencore_amrnb", 8_000, 12_200, False, 0.02),
    "amr": ("amr", "libopencore_amrnb", 8_000, 12_200, False, 0.04),
    "webm": ("webm", "libopus", 48_000, None, False, 0.02),
    "mkv": ("matroska", "aac", 48_000, 96_000, True, 0.05),
    "wma": ("asf", "wmav2", 44_100, 64_000, False, 0.1),
    "mp2": ("mp2", "mp2", 44_100, 128_000, False, 0.03),
    "aac": ("adts", "aac", 44_100, 96_000, False, 0.05),
    "g722": ("wav", "g722", 16_000, None, False, 0.02),
    "flv": ("flv", "aac", 44_100, 96_000, False, 0.05),
    "wav": ("wav", "pcm_s16le", 44_100, None, False, 0.001),
    "mulaw": ("wav", "pcm_mulaw", 8_000, None, False, 0.001),
    "adpcm": ("wav", "adpcm_ms", 16_000, None, False, 0.13),
    "flac": ("flac", "flac", 16_000, None, False, 0.001),
    "mp3": ("mp3", "libmp3lame", 44_100, 64_000, False, 0.02),
    "mp3 without Xing": ("mp3", "libmp3lame", 44_100, 64_000, False, 0.1),
    "opus": ("ogg", "libopus", 48_000, None, False, 0.02),
    "aiff": ("aiff", "pcm_s16be", 44_100, None, False, 0.001),
}
CODEC_FRAMES = {"aac": 1024, "libopencore_amrnb": 160, "libopus": 960, "wmav2": 2048, "mp2": 1152, "libmp3lame": 1152}
CODEC_FRAMES |= {"alac": 4096, "flac": 4608, "g722": 320, "adpcm_ms": 2036}  # samples
ELSEWHERE = {"chained.opus", "clip.mp4", "gsm.wav", "piped.flac", "vbr_without_length.mp3", "voice_note.m4a"}
PAST_THE_INDEX = {"m4a", "alac", "mp4", "mov", "3gp"}  # their index stands last: a part of one cannot be read at all


@pytest.fixture(scope="module")
def files(speech):
    made = {}
    for name, (container, codec, rate, bit_rate, video, _) in FORMATS.items():
        options = {"write_xing": "0"} if "without" in name else {}
        made[name] = encode(speech, container, codec, rate, bit_rate, video, options)
    return made


@pytest.fixture(scope="module")
def speech():
    """7 s of speech at 16 kHz, (samples,) float32 at a peak of 0.5."""
    (file,) = (DEMO / "corpus").glob("*.parquet")
    clips = pyarrow.parquet.read_table(file, columns=["audio"])["audio"].slice(0, 8).to_pylist()
    waves = [soundfile.read(io.BytesIO(clip["bytes"]), dtype="float32")[0] for clip in clips]
    joined = np.concatenate(waves)[: 7 * SAMPLE_RATE]
    return joined * 0.5 / np.abs(joined).max()


def encode(waveform, container, codec, rate=16_000, bit_rate=None, video=False, options=None) -> bytes:
    """A file of a waveform (samples,) or (samples, channels) at 16 kHz, by FFmpeg; `video`: grey pictures beside it."""
    waveform = waveform if rate == SAMPLE_RATE else soxr.resample(waveform, SAMPLE_RATE, rate)
    layout = "mono" if waveform.ndim == 1 else "stereo"
    samples = np.ascontiguousarray(np.atleast_2d(waveform.T), np.float32)
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options or {}) as output:
        sound = output.add_stream(codec, rate=rate, layout=layout) if codec else None
        if bit_rate:
            sound.bit_rate = bit_rate
        picture = output.add_stream("mpeg4", rate=25, width=64, height=64, pix_fmt="yuv420p") if video else None
        for number in range(len(waveform) * 25 // rate if video else 0):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 128, np.uint8))
            frame.pts = number
            output.mux(picture.encode(frame))
        if sound:
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            kind, size = sound.codec_context.codec.audio_formats[0].name, CODEC_FRAMES.get(codec, 1024)
            converter = av.AudioResampler(kind, layout, rate, size)
            for converted in [*converter.resample(frame), *converter.resample(None)]:
                output.mux(sound.encode(converted))
        for track in filter(None, (sound, picture)):
            output.mux(track.encode())
    return file.getvalue()


def audio(content: bytes, name=None):
    return {"bytes": content, "path": name}


def lag_and_likeness(waveform, truth, most=0.15):
    """Samples by which a waveform is late, and its correlation with the truth there."""
    length = min(len(waveform), len(truth)) - round(2 * most * SAMPLE_RATE)
    middle = truth[round(most * SAMPLE_RATE) :][:length]
    scores = np.correlate(waveform[: length + round(2 * most * SAMPLE_RATE)], middle)
    lag = int(scores.argmax())
    part = waveform[lag : lag + length]
    return lag - round(most * SAMPLE_RATE), float(np.corrcoef(part, middle)[0, 1])


@pytest.mark.parametrize("name", FORMATS)
def test_a_recording_has_its_length_and_its_samples(name, files, speech):
    *_, extra = FORMATS[name]
    sound, waveform = inspect_audio(audio(files[name])), decode_audio(audio(files[name]))
    assert sound.seconds == pytest.approx(len(waveform) / SAMPLE_RATE, abs=0.005) and not sound.is_cut
    assert -0.04 <= sound.seconds - len(speech) / SAMPLE_RATE <= extra
    lag, likeness = lag_and_likeness(waveform, speech)
    assert abs(lag) <= 16 + SAMPLE_RATE * extra and likeness > (0.75 if "amr" in str(FORMATS[name]) else 0.97)


@pytest.mark.parametrize("name", FORMATS)
def test_a_slice_is_that_part_of_the_whole(name, files):
    whole = decode_audio(audio(files[name]))
    for start in (0.1, 2.3, 5.5):
        part = decode_audio(audio(files[name]), start, start + 1)
        assert len(part) == pytest.approx(SAMPLE_RATE, abs=1)
        difference = part - whole[round(start * SAMPLE_RATE) :][: len(part)]
        assert np.abs(difference[100:-100]).max() < 0.01  # resampling rings at the cuts
    assert not len(decode_audio(audio(files[name]), 100.0, 101.0))


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_end_is_noticed(name, files):
    content = files[name][: len(files[name]) * 6 // 10]
    if name in PAST_THE_INDEX:
        with pytest.raises(AudioError, match=CUT):
            inspect_audio(audio(content))
        return
    sound = inspect_audio(audio(content))
    assert sound.is_cut and sound.seconds == pytest.approx(len(decode_audio(audio(content))) / SAMPLE_RATE, abs=0.04)


def test_libsndfile_and_ffmpeg_hear_the_same(files):
    for name in ("wav", "flac", "mp3", "opus", "mp2", "aiff", "mulaw"):
        with decoding.SoundfileReader(files[name], "") as one, decoding.FFmpegReader(files[name], "") as other:
            blocks = [np.concatenate([block for _, block in reader.blocks(0.0, None)]) for reader in (one, other)]
        assert len(blocks[0]) == pytest.approx(len(blocks[1]), abs=1200), name
        length = min(map(len, blocks))
        assert np.abs(blocks[0][:length] - blocks[1][:length]).max() < 0.01, name


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the ffmpeg command is not installed")
def test_what_decodes_is_what_the_ffmpeg_command_decodes(files, tmp_path):
    """But for up to a frame of AAC (1,024 samples at 44.1 or 48 kHz) that it leaves at the ends as padding."""
    for name, content in files.items():
        (tmp_path / "file").write_bytes(content)
        command = ["ffmpeg", "-v", "error", "-nostdin", "-i", str(tmp_path / "file"), "-vn", "-ac", "1", "-ar", "16000"]
        raw = subprocess.run([*command, "-f", "f32le", "-"], capture_output=True, check=True).stdout
        reference, waveform = np.frombuffer(raw, np.float32), decode_audio(audio(content))
        lag, likeness = lag_and_likeness(waveform, reference)
        has_padding = FORMATS[name][1] == "aac" or name == "3gp"
        assert 0 <= len(reference) - len(waveform) + 16 <= 16 + (372 if has_padding else 16), name
        assert abs(lag) <= (372 if name == "mkv" else 0) and likeness > 0.99, name


def test_files_from_elsewhere_have_their_whole_speech(speech):
    expected = json.loads((DATA / "formats.json").read_text())["seconds of speech in each file"]
    assert set(expected) == ELSEWHERE
    unpadded = {"gsm.wav": 0.04, "vbr_without_length.mp3": 0.1}  # they do not say how much of their frames is padding
    for name, seconds in expected.items():
        for one in (audio((DATA / name).read_bytes()), {"path": str(DATA / name)}):
            assert inspect_audio(one).seconds == pytest.approx(seconds, abs=unpadded.get(name, 0.02)), name
        reference = decode_audio({"path": str(DATA / "piped.flac")})
        lag, likeness = lag_and_likeness(decode_audio({"path": str(DATA / name)})[: len(reference) + 1600], reference)
        assert abs(lag) < 1600 and likeness > 0.95, name


def flac_with_length(content: bytes, samples: int) -> bytes:
    fixed = int.from_bytes(content[18:26], "big") >> 36 << 36
    return content[:18] + (fixed | samples).to_bytes(8, "big") + content[26:]


def xing_with_length(content: bytes, frames: int) -> bytes:
    place = max(content.find(b"Xing"), content.find(b"Info")) + 8
    return content[:place] + frames.to_bytes(4, "big") + content[place + 4 :]


def wav_with_length(content: bytes, size: int) -> bytes:
    place = content.index(b"data") + 4
    return content[:place] + size.to_bytes(4, "little") + content[place + 4 :]


def test_a_header_that_claims_another_length_is_not_believed(files):
    wrong = {
        "FLAC from a pipe": flac_with_length(files["flac"], 0),
        "FLAC too short": flac_with_length(files["flac"], 1000),
        "FLAC too long": flac_with_length(files["flac"], 2**36 - 1),
        "MP3 too short": xing_with_length(files["mp3"], 10),
        "MP3 too long": xing_with_length(files["mp3"], 10**6),
        "WAV from a pipe": wav_with_length(files["wav"], 0),
        "WAV from a stream": wav_with_length(files["wav"], 0xFFFF_FFFF),
        "WAV from a crash": wav_with_length(files["wav"], 1000),
        "WAV too long": wav_with_length(files["wav"], 0x7000_0000),
    }
    for name, content in wrong.items():
        sound = inspect_audio(audio(content))
        assert sound.seconds == pytest.approx(7.0, abs=0.05), name
        assert len(decode_audio(audio(content))) == pytest.approx(sound.seconds * SAMPLE_RATE, abs=500), name
        assert sound.is_cut == ("too long" in name), name


def test_joined_files_are_heard_to_the_end(files):
    for name in ("mp3", "mp3 without Xing", "flac", "aac", "opus"):
        joined = audio(files[name] * 2)
        assert inspect_audio(joined).seconds == pytest.approx(2 * inspect_audio(audio(files[name])).seconds, abs=0.1)
        assert len(decode_audio(joined)) / SAMPLE_RATE == pytest.approx(inspect_audio(joined).seconds, abs=0.005)
    other = audio(files["mp3"] + (DATA / "vbr_without_length.mp3").read_bytes())  # at another rate
    assert inspect_audio(other).seconds == pytest.approx(7.0 + 6.7, abs=0.1)


def test_what_is_no_recording_gets_a_sentence(tmp_path, speech):
    random = np.random.default_rng(0)
    picture = encode(speech[:8000], "mp4", None, video=True)
    playlist = f"#EXTM3U\n#EXTINF:7,\n{tmp_path / 'a.wav'}\n#EXT-X-ENDLIST\n".encode()
    soundfile.write(tmp_path / "a.wav", speech, SAMPLE_RATE)
    cases = [
        (audio(picture), "video without sound"),
        (audio(random.normal(0, 3000, 9000).astype("<i2").tobytes(), "call.raw"), "headerless audio"),
        (audio(random.bytes(50_000)), "unreadable audio"),
        (audio(bytes(50_000)), "unreadable audio"),
        (audio(b"<!DOCTYPE html><html>not found</html>" * 50, "a.mp3"), "unreadable audio"),
        (audio(playlist, "a.m3u8"), "unreadable audio"),  # it names another file, which is not opened
        ({"path": str(tmp_path)}, "no such audio file"),
        (audio(b""), "zero bytes"),
    ]
    for one, reason in cases:
        with pytest.raises(AudioError, match=reason):
            decode_audio(one)


def test_an_amr_wideband_file_is_read():
    silent = b"#!AMR-WB\n" + b"\x7c" * 150  # 150 frames of 20 ms in which nothing is sent
    assert inspect_audio(audio(silent)).seconds == pytest.approx(3.0, abs=0.02)


def test_channels(speech):
    left, right = speech, np.roll(speech, 30_000)
    call = encode(np.stack([left, right], 1), "flac", "flac")
    assert inspect_audio(audio(call)).channels == 2
    for channel, truth in ((0, left), (1, right), (None, (left + right) / 2)):
        assert np.abs(decode_audio(audio(call), channel=channel) - truth).max() < 1e-3
        assert np.abs(decode_audio(audio(call) | {"channel": channel}, 1.0, 2.0) - truth[16_000:32_000]).max() < 1e-3
    with pytest.raises(AudioError, match="no channel 2: it has 2"):
        decode_audio(audio(call), channel=2)
    opposed = encode(np.stack([left, -left], 1), "wav", "pcm_s16le")
    with pytest.raises(AudioError, match="antiphase"):
        decode_audio(audio(opposed))
    assert len(decode_audio(audio(opposed), may_cancel=True)) == len(left)  # a part of a recording that is heard
    assert np.abs(decode_audio(audio(opposed), channel=1) + left).max() < 1e-3


def test_hours_in_a_small_file_take_little_memory(tmp_path):
    """A slice and a check of three hours; as a waveform they would be 691 MB, and three times that at 48 kHz."""
    with soundfile.SoundFile(tmp_path / "long.flac", "w", 16_000, 1) as file:
        for _ in range(3 * 6):
            file.write(np.zeros(600 * 16_000, np.int16))
    code = r"""
        import re, sys
        from hebrew_asr.data.audio import audio_blocks, check_blocks
        from hebrew_asr.data.decoding import decode_audio, inspect_audio
        long = {"path": sys.argv[1]}
        assert inspect_audio(long).seconds == 10800 and len(decode_audio(long, 10000, 10010)) == 160000
        assert check_blocks(audio_blocks(long), 10800) == "silent"
        print(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "long.flac")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 300_000, "kB"


def outcome(row, tmp_path, for_training):
    """What happens to a corpus of one clip: the seconds that are used, or why they are not."""
    data = pyarrow.Table.from_pylist([{"audio": row, "text": "שלום עולם, מה שלומך היום"}])
    folder = tmp_path / f"corpus-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    pyarrow.parquet.write_table(data, folder / "train-00000.parquet")
    config = DataConfig(train_sources=[Source(str(folder))])
    try:
        used = load_rows(config.train_sources, config, for_training)
        if for_training:
            check_sound(used, config)
    except InputError as error:
        return re.search(r"\{'(.*?)[:;'].*\}", str(error))[1]
    return f"{used.seconds[0]:.1f} s"


def transcribed(row):
    try:
        return f"{len(decode_audio(row)) / SAMPLE_RATE:.1f} s"
    except AudioError as error:
        return re.split("[:;]", str(error))[0]


def test_the_table_in_the_documentation(files, speech, tmp_path):
    """Format by use, as measured here; `WRITE_DOCS=1` writes it."""
    cut = {name: content[: len(content) * 6 // 10] for name, content in files.items()}
    opposed = encode(np.stack([speech, -speech], 1), "wav", "pcm_s16le")
    cases = {f"{name} ({codec} in {kind})": files[name] for name, (kind, codec, *_) in FORMATS.items()}
    cases |= {f"from elsewhere: {name}": (DATA / name).read_bytes() for name in sorted(ELSEWHERE)}
    cases |= {f"{name}, its end missing": cut[name] for name in ("m4a", "webm", "aac", "wav", "flac", "mp3", "opus")}
    cases |= {
        "FLAC from a pipe (no length)": flac_with_length(files["flac"], 0),
        "WAV from a pipe (length 0)": wav_with_length(files["wav"], 0),
        "two MP3s joined": files["mp3"] * 2,
        "two Ogg files joined": files["opus"] * 2,
        "stereo in antiphase": opposed,
        "video without sound": encode(speech[:8000], "mp4", None, video=True),
        "raw samples (.raw)": np.zeros(9000, "<i2").tobytes(),
        "no audio": b"<html>not found</html>" * 99,
    }
    lines = ["| Recording | Training | Evaluation | Transcription |", "| --- | --- | --- | --- |"]
    for name, content in cases.items():
        row = audio(content, "a.raw" if ".raw" in name else None)
        found = [outcome(row, tmp_path, True), outcome(row, tmp_path, False), transcribed(row)]
        lines.append(f"| {name} | {' | '.join(found)} |")
    document = ROOT / "docs" / "data.md"
    text = document.read_text(encoding="utf-8")
    before, marker, rest = text.partition("<!-- formats -->\n")
    after = rest[rest.index("<!-- end -->") :]
    if os.environ.get("WRITE_DOCS"):
        document.write_text(before + marker + "\n".join(lines) + "\n" + after, encoding="utf-8")
    else:
        assert rest.removesuffix(after).splitlines() == lines


def test_more_hours_than_fit_are_refused(monkeypatch, files):
    monkeypatch.setattr(decoding, "MOST_HOURS", 0.001)
    with pytest.raises(AudioError, match="hours in one piece"):
        decode_audio(audio(files["wav"]))
    assert len(decode_audio(audio(files["wav"]), 1.0, 2.0)) == SAMPLE_RATE
