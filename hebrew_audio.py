"""Audio of speech corpora: decoding, a check of what was decoded, augmentation for training, fingerprints for leaks.

Imports nothing of this project and needs no library of the system.
"""

import io
import math
import re
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
import torchaudio.functional

SAMPLE_RATE = 16_000  # Hz, of every waveform here
SOUND_VERSION = 1  # what was heard of a corpus is kept under it: raise it when decode_audio, check_waveform or
# fingerprint returns something else than before

# ----------------------------------------------------------------------------------------------- Decoding and checking

PREROLL_SECONDS = 0.2  # decoded before a block and thrown away: an MP3 frame builds on earlier ones, and soundfile
# seeks after every read, which makes the decoder forget them
BLOCK_SECONDS = 30  # read at once, so that an hour of 48 kHz stereo is never held whole
UNKNOWN_WAV_BYTES = 0x7FFF_0000  # a recorder that cannot seek back writes a data size above it, or 0
WAV_DATA_CUT = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)  # libsndfile's log: declared, present


class AudioError(ValueError):
    """Audio that cannot be read; its message is a short reason to count by."""


def open_audio(audio: dict[str, Any]) -> io.BytesIO | str:
    """What soundfile opens for an undecoded `datasets` Audio value: its bytes, or else its path."""
    if audio.get("bytes") is None and audio.get("path"):
        if not Path(audio["path"]).is_file():
            raise AudioError("no such audio file")
        return str(audio["path"])
    if not audio.get("bytes"):
        raise AudioError("zero bytes of audio")
    return io.BytesIO(audio["bytes"])


def open_sound(audio: dict[str, Any]) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(open_audio(audio))
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise AudioError("unreadable audio") from error


def audio_header(audio: dict[str, Any]) -> tuple[float, int, int]:
    """Returns (seconds, rate in Hz, channels) as the header declares them; nothing is decoded.

    The seconds of a truncated file are the whole one's for WAV, FLAC, and MP3 with a Xing header, so `check_waveform`
    can tell. Ogg (Opus, Vorbis) declares no length: they are what is left. Raises AudioError.
    """
    with open_sound(audio) as sound:
        if not sound.frames or not sound.samplerate:
            raise AudioError("no samples of audio")
        seconds = sound.frames / sound.samplerate
        if (cut := WAV_DATA_CUT.search(sound.extra_info)) and 0 < int(cut[1]) < UNKNOWN_WAV_BYTES:
            seconds *= max(1.0, int(cut[1]) / max(1, int(cut[2])))
        return seconds, sound.samplerate, sound.channels


def decode_audio(audio: dict[str, Any], start: float = 0.0, end: float | None = None) -> np.ndarray:
    """Decodes from `start` to `end` seconds (None: to the end) into a mono waveform at 16 kHz, float32 (samples,).

    Channels are averaged. Only the slice is decoded. What lies past the end is missing from the result; libsndfile
    reads truncated WAV, MP3 and Opus as if they ended there. Raises AudioError.
    """
    with open_sound(audio) as sound:
        rate = sound.samplerate
        position, last = round(start * rate), math.inf if end is None else round(end * rate)
        blocks = [np.zeros(0, np.float32)]
        try:
            while (left := min(last, sound.frames) - position) > 0:
                preroll = min(position, round(PREROLL_SECONDS * rate))
                sound.seek(position - preroll)
                samples = preroll + min(left, BLOCK_SECONDS * rate)
                block = sound.read(samples, dtype="float32", always_2d=True)[preroll:]
                if not len(block):
                    break
                blocks.append(block.mean(axis=1))
                position += len(block)
        except soundfile.SoundFileError as error:
            raise AudioError("damaged audio") from error
    waveform = np.concatenate(blocks)
    return waveform if rate == SAMPLE_RATE or not len(waveform) else soxr.resample(waveform, rate, SAMPLE_RATE)


def check_waveform(
    waveform: np.ndarray,
    declared_seconds: float,
    missing_seconds: float = 0.1,
    missing_share: float = 0.01,
    silent_dbfs: float = -60.0,
    full_scale: float = 0.999,
    clipped_share: float = 0.01,
) -> str | None:
    """Says why a decoded waveform cannot be trained on, or None.

    `waveform` is (samples,) float32 at 16 kHz; `declared_seconds` is its length by the header or the corpus's index.
    The reasons, in this order: "not finite"; "truncated" when more than both `missing_seconds` and `missing_share` are
    missing (rounded durations stay below, a lost word does not); "silent" when the root mean square over the clip is
    below `silent_dbfs` (a constant of 1 has 0 dBFS, speech recorded far too quietly -50, a muted input -80); "clipped"
    when more than `clipped_share` of the samples reach `full_scale` (a clip normalised to its peak has a handful;
    what was attenuated after it was clipped is not seen).
    """
    if not np.isfinite(waveform).all():
        return "not finite"
    missing = declared_seconds - len(waveform) / SAMPLE_RATE
    if not len(waveform) or missing > max(missing_seconds, missing_share * declared_seconds):
        return "truncated"
    if np.sqrt(np.mean(np.square(waveform), dtype=np.float64)) < 10 ** (silent_dbfs / 20):
        return "silent"
    if np.mean(np.abs(waveform) >= full_scale) > clipped_share:
        return "clipped"
    return None


# ------------------------------------------------------------------------------------------------------ Augmentation

AUDIO_SUFFIXES = {".wav", ".flac", ".mp3", ".ogg", ".opus"}
FFT_MULTIPLE = 4096  # samples; a convolution whose length is a multiple of it is 5 times as fast as one of any length


@dataclass
class WaveformAugmentation:
    """What `augment` may do to a training utterance."""

    speeds: tuple[float, ...] = (0.9, 1.0, 1.1)
    """Factors of speed and pitch together, each as likely, in steps of 1 % (Ko et al. 2015, Audio Augmentation)."""
    speed_probability: float = 1.0
    gain_db: tuple[float, float] = (-6.0, 6.0)
    gain_probability: float = 0.5
    noise_folder: str | None = None
    """Recordings of noise, in subfolders too; None: white noise, pink noise and mains hum are generated."""
    snr_db: tuple[float, float] = (5.0, 25.0)
    """Power of the utterance over power of the noise, both over the whole clip; uniform like the gain."""
    noise_probability: float = 0.3
    rir_folder: str | None = None
    """Room impulse responses; None: no reverberation."""
    rir_probability: float = 0.3

    def __post_init__(self) -> None:
        for name in ("speed_probability", "gain_probability", "noise_probability", "rir_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be between 0 and 1")
        if not self.speeds or not all(0.5 <= speed <= 2 for speed in self.speeds):
            raise ValueError(f"speeds ({self.speeds}) must be one or more factors between 0.5 and 2")
        for name in ("gain_db", "snr_db"):
            if list(getattr(self, name)) != sorted(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)} must be its lower and its upper end")
        for folder in filter(None, (self.noise_folder, self.rir_folder)):
            audio_files(folder)


@lru_cache
def audio_files(folder: str) -> list[str]:
    """Lists a folder's audio files; raises a ValueError that names the first one without a readable header."""
    files = sorted(str(file) for file in Path(folder).rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES)
    if not files:
        raise ValueError(f"{folder}: no audio files ({', '.join(sorted(AUDIO_SUFFIXES))}) in it")
    for file in files:
        try:
            audio_header({"path": file})
        except AudioError as error:
            raise ValueError(f"{file}: {error}") from error
    return files


@lru_cache(maxsize=256)
def room_response(file: str) -> torch.Tensor:
    """Returns an impulse response (samples,) from its strongest sample, the direct sound, onwards."""
    response = decode_audio({"path": file})
    return torch.from_numpy(response[np.abs(response).argmax() :].copy())


def draw_noise(samples: int, folder: str | None, random: np.random.Generator) -> np.ndarray:
    """Returns (samples,) of a random place of a random file, or generated; pink noise has power 1 / frequency."""
    if folder:
        file, seconds = {"path": str(random.choice(audio_files(folder)))}, samples / SAMPLE_RATE
        start = random.random() * max(0.0, audio_header(file)[0] - seconds)
        return np.resize(decode_audio(file, start, start + seconds + 0.01), samples)
    colour = random.choice(["white", "pink", "hum"])
    if colour == "hum":
        harmonics = random.choice([50, 60]) * np.arange(1, 9)  # Hz; all of them repeat after 0.1 s
        strengths, phases = random.random(8) / np.arange(1, 9), random.random(8)
        time = np.arange(SAMPLE_RATE // 10)[:, None] / SAMPLE_RATE
        return np.resize(np.sin(2 * np.pi * (time * harmonics + phases)) @ strengths, samples)
    noise = random.standard_normal(samples, dtype=np.float32)
    if colour == "pink":
        spectrum = np.fft.rfft(noise)
        noise = np.fft.irfft(spectrum / np.sqrt(np.maximum(1, np.arange(len(spectrum)))), samples)
    return noise


def augment(waveform: np.ndarray, settings: WaveformAugmentation, random: np.random.Generator) -> np.ndarray:
    """Returns an augmented copy, (samples / speed,) float32: speed, then room, then noise, then gain.

    `waveform` is (samples,) at 16 kHz; `random` is the only source of randomness. Where the result would leave
    [-1, 1], all of it is scaled down to a peak of 1: the gain is then smaller than drawn, the signal-to-noise ratio
    as drawn, and nothing is clipped. Silence gets no noise, since no level of it has the ratio.
    """
    mixed = torch.from_numpy(np.asarray(waveform, dtype=np.float32).copy())
    if random.random() < settings.speed_probability:
        # What torchaudio.functional.speed calls, with the factor as whole percents: it truncates rate × factor, and
        # 18079 Hz of 16000 would take a filter bank of 16000 phases.
        mixed = torchaudio.functional.resample(mixed, round(100 * random.choice(settings.speeds)), 100)
    if settings.rir_folder and random.random() < settings.rir_probability:
        response = room_response(str(random.choice(audio_files(settings.rir_folder))))
        padded = torch.nn.functional.pad(mixed, (0, -(len(mixed) + len(response) - 1) % FFT_MULTIPLE))
        reverberant = torchaudio.functional.fftconvolve(padded, response)[: len(mixed)]
        mixed = reverberant * (mixed.norm() / reverberant.norm().clamp_min(1e-9))
    if random.random() < settings.noise_probability:
        noise = torch.from_numpy(draw_noise(len(mixed), settings.noise_folder, random).astype(np.float32))
        if mixed.norm() > 0 and noise.norm() > 0:
            mixed = torchaudio.functional.add_noise(mixed, noise, torch.tensor(random.uniform(*settings.snr_db)))
    if random.random() < settings.gain_probability:
        mixed = mixed * 10 ** (random.uniform(*settings.gain_db) / 20)
    return (mixed / mixed.abs().max().clamp_min(1.0)).numpy() if len(mixed) else mixed.numpy()


# ------------------------------------------------------------------------------------------------------ Fingerprints

FRAME, HOP = 1024, 256  # samples: 64 ms every 16 ms
SMOOTHED_FRAMES, LAG_FRAMES = 8, 5
QUIET = 1e-4  # of the clip's mean power: below it is the codec's noise, and the word is 0, "not compared"
BLOCK_WORDS, CANDIDATES = 256, 32  # the 32 likeliest alignments of every 4 s of a query are verified
FEWEST_WORDS = 25  # compared, 0.4 s of sound: shorter clips match nothing
OVERLAP_SHARE, ENOUGH_WORDS = 0.75, 188  # of the shorter clip must be in common, but never more than 3 s


def fingerprint(waveform: np.ndarray) -> np.ndarray:
    """Returns the fingerprint of a waveform (samples,) at 16 kHz: (words,) uint32, one word every 16 ms.

    A bit is the sign of the difference of neighbouring bands' power (33 between 300 and 3400 Hz, which telephone
    speech keeps), differenced again over time, as in Haitsma & Kalker 2002, A Highly Robust Audio Fingerprinting
    System. Gain cancels, re-encoding flips few bits. Less than 0.25 s gives no word.
    """
    edges, bins = np.geomspace(300, 3400, 35)[:, None], np.arange(FRAME // 2 + 1) * SAMPLE_RATE / FRAME
    slopes = (bins - edges[:-1]) / np.diff(edges, axis=0)  # 0 at a triangle's lower end, 1 at its peak
    filters = np.maximum(0, np.minimum(slopes[:-1], 1 - slopes[1:])).T.astype(np.float32)  # (bins, 33)
    window = np.hanning(FRAME).astype(np.float32)
    padded = np.pad(waveform, (0, max(0, FRAME + (SMOOTHED_FRAMES - 1) * HOP - len(waveform))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME)[::HOP]
    blocks = (frames[i : i + BLOCK_WORDS] * window for i in range(0, len(frames), BLOCK_WORDS))
    power = np.concatenate([np.abs(np.fft.rfft(block)) ** 2 @ filters for block in blocks])
    total = np.cumsum(np.pad(power, ((1, 0), (0, 0))), axis=0, dtype=np.float64)
    power = total[SMOOTHED_FRAMES:] - total[:-SMOOTHED_FRAMES]
    slope, level = np.diff(power, axis=1), power.sum(axis=1)
    words = np.packbits(slope[LAG_FRAMES:] > slope[:-LAG_FRAMES], axis=1).view(np.uint32)[:, 0]
    words[np.minimum(level[LAG_FRAMES:], level[:-LAG_FRAMES]) <= QUIET * level.mean()] = 0
    return words


def overlap_needed(a: np.ndarray, b: np.ndarray) -> float:
    """Words that two fingerprints must have in common for their bit error rate to mean something."""
    return max(FEWEST_WORDS, min(ENOUGH_WORDS, OVERLAP_SHARE * min(np.count_nonzero(a), np.count_nonzero(b))))


def bit_error_rate(a: np.ndarray, b: np.ndarray, offset: int) -> tuple[float, int]:
    """Returns (share of bits that differ, words compared) where word i of `a` meets word i + offset of `b`."""
    a, b = a[max(0, -offset) :], b[max(0, offset) :]
    a, b = a[: len(b)], b[: len(a)]
    compared = (a != 0) & (b != 0)
    words = int(np.count_nonzero(compared))
    return int(np.bitwise_count((a ^ b)[compared]).sum()) / max(1, 32 * words), words


def fingerprint_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the lowest bit error rate over all alignments with enough overlap; 1.0 when there is none."""
    rates = (bit_error_rate(a, b, offset) for offset in range(1 - len(a), len(b)))
    return min((rate for rate, words in rates if words >= overlap_needed(a, b)), default=1.0)


class FingerprintIndex:
    """Finds the clips that share sound with a query: add the evaluation clips, ask with each training clip.

    Each half of a word is looked up; the alignments on which most halves meet are verified by bit error rate.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[Hashable, np.ndarray]] = []
        self.lists: list[tuple[np.ndarray, np.ndarray]] = []  # of each half: places ordered by key, each key's first

    def add(self, key: Hashable, fingerprint: np.ndarray) -> None:
        self.entries.append((key, fingerprint))
        self.lists = []

    def build(self) -> None:
        words = np.concatenate([np.zeros(0, np.uint32), *(words for _, words in self.entries)])
        lengths = np.array([len(words) for _, words in self.entries], dtype=np.int64)
        self.clips, self.starts = np.repeat(np.arange(len(lengths)), lengths), np.cumsum(lengths) - lengths
        places = np.flatnonzero(words).astype(np.int32)
        for half in words.view(np.uint16).reshape(-1, 2).T:
            ordered = places[np.argsort(half[places], kind="stable")]
            self.lists.append((ordered, np.searchsorted(half[ordered], np.arange(2**16 + 1))))

    def matches(self, fingerprint: np.ndarray) -> list[tuple[Hashable, float]]:
        """Returns (key, bit error rate) of every clip that is in the query, holds it or overlaps it, best first."""
        if not self.lists:
            self.build()
        best: dict[int, float] = {}
        for start in range(0, len(fingerprint), BLOCK_WORDS):
            for clip, offset in self.candidates(fingerprint[start : start + BLOCK_WORDS], start):
                held = self.entries[clip][1]
                for near in (offset - 1, offset, offset + 1):
                    rate, words = bit_error_rate(fingerprint, held, near)
                    # Chance brings the rate of other sound lower in short overlaps (0.31 in 0.5 s, 0.40 in 2 s).
                    if words >= overlap_needed(fingerprint, held) and rate <= 0.32 - 0.6 / math.sqrt(words):
                        best[clip] = min(rate, best.get(clip, 1.0))
        return [(self.entries[clip][0], rate) for clip, rate in sorted(best.items(), key=lambda match: match[1])]

    def candidates(self, block: np.ndarray, start: int) -> np.ndarray:
        """Returns (alignments, 2) of clip and offset, for a block of a query from its word `start` on."""
        queried = np.flatnonzero(block)
        meetings = []
        for half, (places, first) in zip(block[queried].view(np.uint16).reshape(-1, 2).T, self.lists, strict=True):
            counts = first[half.astype(np.int64) + 1] - first[half]
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            found = places[np.repeat(first[half], counts) + within]
            offsets = found - self.starts[self.clips[found]] - np.repeat(queried + start, counts)
            meetings.append((self.clips[found] << 32) + (offsets + 2**31))
        alignments, votes = np.unique(np.concatenate(meetings), return_counts=True)
        most = alignments[np.argsort(-votes, kind="stable")[:CANDIDATES]]
        return np.stack([most >> 32, (most & 0xFFFFFFFF) - 2**31], axis=1)
