"""Augmentation of waveforms: speed, noise, reverberation, gain."""

from functools import lru_cache

import numpy as np
import torch
import torchaudio.functional

from hebrew_asr.data.decoding import SAMPLE_RATE, decode_audio
from hebrew_asr.data.sources import WaveformAugmentation, audio_files

FFT_MULTIPLE = 4096  # samples; a convolution whose length is a multiple of it is 5 times as fast as one of any length


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
