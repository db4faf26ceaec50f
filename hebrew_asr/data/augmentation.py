"""Augmentation of waveforms: speed, noise, reverberation, gain."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torchaudio.functional

from hebrew_asr.data.decoding import AUDIO_SUFFIXES, SAMPLE_RATE, AudioError, decode_audio, inspect_audio

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
def audio_files(folder: str) -> dict[str, float]:
    """A folder's audio files, each with its seconds; raises a ValueError that names the first that cannot be read."""
    files = sorted(str(file) for file in Path(folder).rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES)
    if not files:
        raise ValueError(f"{folder}: no audio files ({', '.join(sorted(AUDIO_SUFFIXES))}) in it")
    seconds = {}
    for file in files:
        try:
            seconds[file] = inspect_audio({"path": file}).seconds
        except AudioError as error:
            raise ValueError(f"{file}: {error}") from error
    return seconds


@lru_cache(maxsize=256)
def room_response(file: str) -> torch.Tensor:
    """Returns an impulse response (samples,) from its strongest sample, the direct sound, onwards."""
    response = decode_audio({"path": file})
    return torch.from_numpy(response[np.abs(response).argmax() :].copy())


def draw_noise(samples: int, folder: str | None, random: np.random.Generator) -> np.ndarray:
    """Returns (samples,) of a random place of a random file, or generated; pink noise has power 1 / frequency."""
    if folder:
        files, seconds = audio_files(folder), samples / SAMPLE_RATE
        file = str(random.choice(list(files)))
        start = random.random() * max(0.0, files[file] - seconds)
        return np.resize(decode_audio({"path": file}, start, start + seconds + 0.01), samples)
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
        response = room_response(str(random.choice(list(audio_files(settings.rir_folder)))))
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
