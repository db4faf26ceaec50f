"""Decoding, checks, augmentation and fingerprints, on tones whose truth is known and on the demo world's speech."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import soxr
import torch

from hebrew_asr.data import audio as ha
from hebrew_asr.data import fingerprints as fingerprints_module
from hebrew_asr.data.audio import SAMPLE_RATE, check_waveform, decode_audio
from hebrew_asr.data.augmentation import augment
from hebrew_asr.data.decoding import Sound, inspect_audio
from hebrew_asr.data.fingerprints import fingerprint
from hebrew_asr.data.sources import WaveformAugmentation

DEMO = Path(__file__).parent.parent / "demo"
WAV, FLAC = {"format": "WAV"}, {"format": "FLAC"}
MP3, OPUS = {"format": "MP3", "subtype": "MPEG_LAYER_III"}, {"format": "OGG", "subtype": "OPUS"}
OFF = {"speed_probability": 0.0, "gain_probability": 0.0, "noise_probability": 0.0, "rir_probability": 0.0}


def encoded(waveform, rate=SAMPLE_RATE, **format):
    soundfile.write(file := io.BytesIO(), waveform, rate, **(WAV | format))
    return {"bytes": file.getvalue(), "path": None}


def tone(frequency, seconds, rate=SAMPLE_RATE):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate, dtype=np.float32)


def strongest_frequency(waveform):
    return np.abs(np.fft.rfft(waveform * np.hanning(len(waveform)))).argmax() * SAMPLE_RATE / len(waveform)


def demo_audio(part, step=1):
    (file,) = (DEMO / part).glob("*.parquet")
    return pyarrow.parquet.read_table(file, columns=["audio"])["audio"].to_pylist()[::step]


def index_of(fingerprints):
    index = fingerprints_module.FingerprintIndex()
    [index.add(key, words) for key, words in enumerate(fingerprints)]
    return index


@pytest.fixture(scope="module")
def speech():
    """303 clips: 193 in 12 voices of the corpus and 110 in the 4 held-out ones, 0.5 to 5 s."""
    return [decode_audio(audio) for audio in demo_audio("corpus", 12) + demo_audio("heldout", 4)]


@pytest.fixture(scope="module")
def fingerprints(speech):
    return [fingerprint(waveform) for waveform in speech]


KINDS = [(WAV, 8_000, 1), (WAV, 44_100, 3), (FLAC, 48_000, 2), (MP3, 44_100, 2), (OPUS, 48_000, 2), (OPUS, 16_000, 1)]


@pytest.mark.parametrize(("format", "rate", "channels"), KINDS)
def test_every_format_becomes_16_khz_mono(format, rate, channels):
    levels = 2 * np.arange(1, channels + 1) / (channels + 1)  # 1 on average
    audio = encoded(tone(300, 2, rate)[:, None] * levels, rate, **format)
    assert inspect_audio(audio) == Sound(pytest.approx(2.0, abs=0.05), rate, channels, is_cut=False)
    waveform = decode_audio(audio)
    assert waveform.dtype == np.float32 and waveform.shape == (pytest.approx(2 * SAMPLE_RATE, abs=800),)
    assert strongest_frequency(waveform) == pytest.approx(300, abs=1)
    assert np.sqrt(np.mean(waveform**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.03)


@pytest.mark.parametrize(("format", "rate"), [(WAV, 16_000), (FLAC, 44_100), (MP3, 44_100), (OPUS, 16_000)])
def test_a_slice_is_that_part_of_the_whole(speech, format, rate):
    audio = encoded(soxr.resample(np.concatenate(speech[:8]), SAMPLE_RATE, rate), rate, **format)
    whole = decode_audio(audio)
    for start in (1.5, 3.25, 4.0, 6.5):
        part = decode_audio(audio, start, start + 2.5)
        assert len(part) == pytest.approx(2.5 * SAMPLE_RATE, abs=1)
        difference = part - whole[round(start * SAMPLE_RATE) :][: len(part)]
        assert np.abs(difference[100:-100]).max() < (0.01 if format == OPUS else 1e-3)  # resampling rings at the cuts
    assert len(decode_audio(audio, inspect_audio(audio).seconds - 0.5, 1e6)) == pytest.approx(0.5 * SAMPLE_RATE, abs=2)
    assert len(decode_audio(audio, 1e6)) == 0


def test_what_cannot_be_read_says_why(tmp_path):
    (tmp_path / "text.wav").write_text("no audio at all" * 50)
    flac = encoded(np.random.default_rng(0).normal(0, 0.1, 32_000), **FLAC)["bytes"]
    cases = [
        ({"bytes": b"", "path": "a.wav"}, "zero bytes"),
        ({"bytes": b"\0" * 999, "path": None}, "unreadable"),
        ({"path": str(tmp_path / "text.wav")}, "unreadable"),
        ({"path": str(tmp_path / "none.wav")}, "no such"),
        (encoded(np.zeros(0)), "no samples"),
    ]
    for audio, reason in cases:
        with pytest.raises(ha.AudioError, match=reason):
            inspect_audio(audio)
    with pytest.raises(ha.AudioError, match="damaged"):
        decode_audio({"bytes": flac[:20_000] + bytes(9_000) + flac[29_000:], "path": None})


@pytest.mark.parametrize("part", ["corpus", "heldout", "heldout_noisy", "english"])
def test_demo_speech_passes(part):
    assert {check_waveform(decode_audio(a), inspect_audio(a).seconds) for a in demo_audio(part, 9)} == {None}


def test_bad_clips_are_named(speech):
    clip, seconds = speech[0] / np.abs(speech[0]).max(), len(speech[0]) / SAMPLE_RATE
    loud = np.clip(10 * clip, -1, 1)
    assert check_waveform(clip, seconds) is check_waveform(clip, seconds + 0.05) is None
    assert check_waveform(np.where(np.arange(len(clip)) == 99, np.nan, clip), seconds) == "not finite"
    assert check_waveform(clip, seconds + 0.3) == check_waveform(clip[:0], 0.0) == "truncated"
    assert check_waveform(1e-3 * clip, seconds) == check_waveform(0 * clip, seconds) == "silent"
    for audio in (encoded(loud), encoded(loud, **MP3), encoded(loud, **OPUS)):
        assert check_waveform(decode_audio(audio), seconds) == "clipped"


def test_speed_changes_length_and_pitch():
    for speed in (0.9, 1.1, 1.13):
        settings = WaveformAugmentation(**OFF | {"speeds": (speed,), "speed_probability": 1.0})
        waveform = augment(tone(440, 3), settings, np.random.default_rng(0))
        assert len(waveform) == pytest.approx(3 * SAMPLE_RATE / speed, abs=1)
        assert strongest_frequency(waveform) == pytest.approx(440 * speed, abs=0.5)


@pytest.mark.parametrize("recorded", [False, True])
def test_noise_has_the_drawn_ratio(speech, tmp_path, recorded):
    soundfile.write(tmp_path / "noise.wav", np.random.default_rng(1).normal(0, 0.1, 9000), 22_050)
    noise = {"noise_probability": 1.0, "snr_db": (12, 12), "noise_folder": str(tmp_path) if recorded else None}
    clip = 0.1 * speech[0].astype(np.float64)
    for seed in range(12):
        added = augment(clip, WaveformAugmentation(**OFF | noise), np.random.default_rng(seed)) - clip
        assert 10 * np.log10(np.sum(clip**2) / np.sum(added**2)) == pytest.approx(12, abs=0.01)


def test_gain_is_in_db_and_overflow_lowers_it():
    settings = WaveformAugmentation(**OFF | {"gain_probability": 1.0, "gain_db": (6, 6)})
    quiet, loud = (augment(level * tone(440, 1), settings, np.random.default_rng(0)) for level in (0.1, 1.8))
    np.testing.assert_allclose(quiet, 0.1 * tone(440, 1) * 10**0.3, rtol=1e-5)
    np.testing.assert_allclose(loud, 2 * tone(440, 1), atol=1e-3)  # the shape stays, its peak is 1


def test_a_room_adds_its_echo_at_the_same_level(tmp_path):
    response, clip = np.zeros(4000, np.float32), np.random.default_rng(0).normal(0, 0.1, 20_000).astype(np.float32)
    response[[500, 2100]] = 0.8, 0.4  # direct sound, and an echo of half its strength 0.1 s later
    soundfile.write(tmp_path / "room.wav", response, SAMPLE_RATE, subtype="FLOAT")
    settings = WaveformAugmentation(**OFF | {"rir_probability": 1.0, "rir_folder": str(tmp_path)})
    expected = clip + 0.5 * np.pad(clip, (1600, 0))[: len(clip)]
    expected *= np.linalg.norm(clip) / np.linalg.norm(expected)
    np.testing.assert_allclose(augment(clip, settings, np.random.default_rng(0)), expected, atol=1e-5)


def test_augmentation_depends_on_its_generator_alone(speech):
    settings, before = WaveformAugmentation(noise_probability=1.0), (torch.get_rng_state(), repr(np.random.get_state()))
    one, same, other = (augment(speech[0], settings, np.random.default_rng([42, 3, row])) for row in (7, 7, 8))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == repr(np.random.get_state())
    silence = [augment(np.zeros(8000, np.float32), settings, np.random.default_rng(seed)) for seed in range(9)]
    assert not np.concatenate(silence).any()  # and no NaN
    original = augment(speech[0], WaveformAugmentation(**OFF), np.random.default_rng(0))
    assert np.array_equal(original, speech[0]) and not np.shares_memory(original, speech[0])


def test_wrong_settings_are_refused_at_once(tmp_path):
    for name, value in {
        "speeds": (9,),
        "gain_db": (3, -3),
        "noise_probability": 2,
        "rir_folder": str(tmp_path),
    }.items():
        with pytest.raises(ValueError, match=name + "|no audio files"):
            WaveformAugmentation(**{name: value})
    (tmp_path / "broken.wav").write_bytes(b"")
    with pytest.raises(ValueError, match=r"broken\.wav: zero bytes"):
        WaveformAugmentation(noise_folder=str(tmp_path))


REENCODED = {
    "flac, a quarter of the level": lambda w: encoded(w / 4, **FLAC),
    "8 kHz, 27.7 ms later": lambda w: encoded(soxr.resample(np.pad(w, (443, 0)), SAMPLE_RATE, 8000), 8000),
    "mp3, 39 kbit/s": lambda w: encoded(soxr.resample(w, SAMPLE_RATE, 44_100), 44_100, compression_level=0.9, **MP3),
    "opus, 24 kbit/s": lambda w: encoded(soxr.resample(w, SAMPLE_RATE, 48_000), 48_000, compression_level=0.95, **OPUS),
    "opus, 12 kbit/s, 50 ms cut": lambda w: encoded(w[800:], compression_level=0.99, **OPUS),
}


@pytest.mark.parametrize("change", REENCODED)
def test_a_clip_is_found_after_re_encoding(speech, fingerprints, change):
    index = index_of(fingerprints)
    asked = [i for i, words in enumerate(fingerprints) if len(words) >= 40][::15]  # clips of 0.9 s and more
    found = [index.matches(fingerprint(decode_audio(REENCODED[change](np.clip(speech[i], -1, 1))))) for i in asked]
    assert all(key == i for i, matches in zip(asked, found, strict=True) for key, _ in matches)
    assert np.mean([bool(matches) for matches in found]) >= (0.9 if "12 kbit" in change else 1.0)


def test_different_clips_do_not_match(fingerprints):
    index = index_of(fingerprints)
    for key, words in enumerate(fingerprints):
        assert [match for match, _ in index.matches(words)] in ([key], [])  # none: too short to tell
    others = [fingerprints_module.fingerprint_distance(fingerprints[i], fingerprints[i + 1]) for i in range(40)]
    assert min(others) > 0.3 and fingerprints_module.fingerprint_distance(fingerprints[5], fingerprints[5][6:]) == 0


def test_a_clip_inside_a_recording_is_found_both_ways(speech, fingerprints):
    long = fingerprint(decode_audio(encoded(np.clip(np.concatenate(speech[100:130]), -1, 1), **MP3)))
    index, reverse = index_of(fingerprints), index_of([long])
    inside = {key for key in range(100, 130) if len(fingerprints[key]) >= 40}
    assert inside <= {key for key, _ in index.matches(long)} <= set(range(100, 130))
    assert inside <= {i for i, words in enumerate(fingerprints) if reverse.matches(words)} <= set(range(100, 130))


def test_silence_and_nothing_match_nothing():
    nothing = [fingerprint(clip) for clip in (np.zeros(SAMPLE_RATE), np.zeros(0), tone(440, 0.2))]
    for query in (*nothing, fingerprint(tone(440, 1))):
        assert index_of(nothing).matches(query) == index_of([]).matches(query) == []
