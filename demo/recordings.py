"""Long recordings joined from the demo's clips, with a plain transcript each and what is really said in them.

Between the sentences there are pauses of 0.1 to 2 s, silent or with faint noise, and at every tenth a stretch of music
or noise as loud as the speech or a little softer. Some sentences are missing from the transcript, and it has some that
nobody says.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from hebrew_asr.data.audio import SAMPLE_RATE, decode_audio
from hebrew_asr.text.targets import read_segments

DEMO = Path(__file__).parent
PAUSE = (0.1, 2.0)  # seconds
BETWEEN = (1.0, 6.0)  # seconds of music or noise
BETWEEN_SHARE = 0.1  # of the sentences that it comes before
SILENT_SHARE = 0.3  # of the pauses; the others have noise
NOISE_DB = (25.0, 40.0)  # below the speech before it
SOFTER_DB = (0.0, 10.0)  # of music and loud noise, below the speech before it


@dataclass(frozen=True)
class Sentence:
    start: float  # seconds
    end: float
    text: str
    in_transcript: bool


@dataclass(frozen=True)
class Recording:
    waveform: np.ndarray  # (samples,) float32 at 16 kHz
    sentences: list[Sentence]
    transcript: str


def clips(folder: str) -> list[tuple[dict[str, Any], str]]:
    """Audio and text of a set of the demo, without the rows whose audio goes on after their text."""
    (file,) = (DEMO / folder).glob("*.parquet")
    rows = [(row["audio"], read_segments(row["transcript"])) for row in pyarrow.parquet.read_table(file).to_pylist()]
    return [(audio, segments.text) for audio, segments in rows if not segments.open_tail]


def noise(samples: int, random: np.random.Generator) -> np.ndarray:
    """White or pink."""
    sound = random.standard_normal(samples)
    if random.random() < 0.5:
        return sound
    spectrum = np.fft.rfft(sound)
    return np.fft.irfft(spectrum / np.sqrt(np.maximum(1, np.arange(len(spectrum)))), samples)


def music(samples: int, random: np.random.Generator) -> np.ndarray:
    """A plucked melody in a major key over its lower octave, four notes a second."""
    step, sound = SAMPLE_RATE // 4, np.zeros(samples)
    for first in range(0, samples, step):
        time = np.arange(min(step, samples - first)) / SAMPLE_RATE
        pitch = 2 * np.pi * 220 * 2 ** (random.choice([0, 2, 4, 5, 7, 9, 11, 12]) / 12) * time
        for harmonic in (1, 2, 3, 4):
            sound[first : first + len(time)] += np.sin(harmonic * pitch) / harmonic * np.exp(-3 * time)
        sound[first : first + len(time)] += np.sin(pitch / 2) / 2
    return sound


def scaled(sound: np.ndarray, power: float, decibels_below: float) -> np.ndarray:
    return sound * np.sqrt(power / np.mean(sound**2)) * 10 ** (-decibels_below / 20)


def join(
    pool: list[tuple[dict[str, Any], str]], seconds: float, seed: int, missing: float = 0.05, added: float = 0.05
) -> Recording:
    """At least `seconds` of sentences in a random order; shares of them are `missing` and `added` in the transcript."""
    random = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    sentences: list[Sentence] = []
    said: list[str] = []
    samples, power, order = 0, 0.0025, random.permutation(len(pool))

    def put(sound: np.ndarray) -> None:
        nonlocal samples
        parts.append(sound.astype(np.float32))
        samples += len(sound)

    def pause() -> None:
        length = int(random.uniform(*PAUSE) * SAMPLE_RATE)
        is_silent = random.random() < SILENT_SHARE
        put(np.zeros(length) if is_silent else scaled(noise(length, random), power, random.uniform(*NOISE_DB)))

    while samples < seconds * SAMPLE_RATE:
        pause()
        if random.random() < BETWEEN_SHARE:
            sound = (music if random.random() < 0.7 else noise)(int(random.uniform(*BETWEEN) * SAMPLE_RATE), random)
            put(scaled(sound, power, random.uniform(*SOFTER_DB)))
            pause()
        audio, text = pool[order[len(sentences) % len(pool)]]
        waveform = decode_audio(audio)
        power = float(np.mean(np.square(waveform, dtype=np.float64)))
        start, in_transcript = samples / SAMPLE_RATE, random.random() >= missing
        put(waveform)
        sentences.append(Sentence(start, samples / SAMPLE_RATE, text, in_transcript))
        said += [text] if in_transcript else []
        said += [pool[random.integers(len(pool))][1]] if random.random() < added else []
    return Recording(np.concatenate(parts), sentences, " ".join(said))
