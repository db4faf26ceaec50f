"""How far the word starts of a transcript are from the true ones, on speech whose word starts are known.

    uv run --group demo python -m benchmarks.word_times
    uv run --group demo python -m benchmarks.word_times --model demo/base --clips 60

espeak-ng says at which sample each word begins. Sentences are of the demo's words, in voices that the checkpoint has
not heard. Measured are all words of a piece but the first, which begins with the piece; once with the true text, and
once with what the checkpoint wrote, of which the right words count. Beside the attention's times stand those of
spreading the text over the clip by its characters. At the end, what cutting a recording by voice activity costs in WER.
"""

import argparse
import ctypes
import random
import sys
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import soxr
import torch

from hebrew_asr.data.utterances import log_mel
from hebrew_asr.evaluation.recordings import pieces_of
from hebrew_asr.evaluation.settings import Decoding
from hebrew_asr.evaluation.transcription import QwenModel
from hebrew_asr.model.word_times import align, within_speech
from hebrew_asr.text.scoring import score
from hebrew_asr.text.subtitles import spread

DEMO = Path(__file__).parent.parent / "demo"
sys.path.insert(0, str(DEMO))
from speech import (  # noqa: E402 - found in demo/
    ENGLISH_VOICES,
    HELDOUT_VOICES,
    RATE,
    Espeak,
    add_noise,
    delivery,
    english_sentence,
    hebrew_sentence,
)

SEED = 7
PAUSE_SECONDS = 0.5  # between two sentences of a piece
RECORDING_PAUSE_SECONDS = 3.0  # between those of a recording
Spoken = tuple[np.ndarray, str, list[float], list[tuple[float, float]]]  # wave, text, word starts, stretches of speech


class Event(ctypes.Structure):
    """espeak_EVENT of espeak-ng's speak_lib.h."""

    WORD = 1
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


class TimedEspeak(Espeak):
    """espeak-ng that also says when each word begins."""

    def collect(self, samples, count, events) -> int:
        event = ctypes.cast(events, ctypes.POINTER(Event))
        number = 0
        while event[number].type:
            if event[number].type == Event.WORD:
                self.starts.append(event[number].sample / self.rate)
            number += 1
        return super().collect(samples, count, events)

    def timed(self, text: str, voice: str, **manner) -> tuple[np.ndarray, list[float]]:
        """The wave, and when each word begins in it, in seconds."""
        self.starts: list[float] = []
        wave = self(text, voice, **manner)
        whole = soxr.resample(np.concatenate(self.blocks).astype(np.float32), self.rate, RATE)
        first = np.flatnonzero(np.abs(whole) * manner["peak"] / np.abs(whole).max() > 0.01)[0]
        cut = max(0, first - int(0.08 * RATE)) / RATE  # as Espeak cuts it
        return wave, [max(0.0, start - cut) for start in self.starts]


def sentences(espeak: TimedEspeak, count: int, language: str, rng: random.Random) -> Iterator[Spoken]:
    """Sentences in voices of their language; those in which espeak-ng counts other words than we do are left out."""
    while count:
        text = hebrew_sentence(rng, (0, 1)) if language == "Hebrew" else english_sentence(rng)
        voice = "he+" + rng.choice(HELDOUT_VOICES) if language == "Hebrew" else rng.choice(ENGLISH_VOICES)
        wave, starts = espeak.timed(text, voice, **delivery(rng))
        if len(starts) == len(text.split()) > 1:
            yield wave, text, starts, [(0.0, len(wave) / RATE)]
            count -= 1


def pairs(clips: list[Spoken]) -> Iterator[Spoken]:
    """Two sentences in one piece, with a pause between them."""
    for (wave, text, starts, _), (wave2, text2, starts2, _) in zip(clips[::2], clips[1::2], strict=True):
        second = len(wave) / RATE + PAUSE_SECONDS
        joined = np.concatenate([wave, np.zeros(int(PAUSE_SECONDS * RATE), np.float32), wave2])
        spans = [(0.0, len(wave) / RATE), (second, len(joined) / RATE)]
        yield joined, f"{text} {text2}", starts + [second + start for start in starts2], spans


def errors(model: QwenModel, clips: list[Spoken], language: str, text_of: str) -> dict[str, list[float]]:
    """Estimated minus true word starts, in seconds, of each method."""
    found: dict[str, list[float]] = {"attention": [], "characters": [], "share of words right": []}
    for wave, reference, truth, spans in clips:
        seconds, features = len(wave) / RATE, log_mel(model.processor.feature_extractor, wave)
        text = reference if text_of == "true" else " ".join(model.transcribe([features], [seconds])[0].text.split())
        if not text:
            continue
        right = SequenceMatcher(None, reference.split(), text.split(), autojunk=False).get_matching_blocks()
        same = [(block.a + i, block.b + i) for block in right for i in range(block.size)]
        found["share of words right"].append(len(same) / len(truth))
        starts = align(model.model, model.prompts, features, "", language, text)
        estimated = {"characters": [word.start for word in spread(text, 0.0, seconds)]}
        if starts is not None:
            estimated["attention"] = [start for start, _ in within_speech(starts, seconds, spans)]
        for method, times in estimated.items():
            found[method] += [times[b] - truth[a] for a, b in same if a]
    return found


def transcribed(model: QwenModel, waves: list[np.ndarray]) -> list[str]:
    return [model.transcribe([model.features(wave)], [len(wave) / RATE])[0].text for wave in waves]


def cutting(model: QwenModel, clips: list[Spoken], noise: np.random.Generator) -> None:
    """Prints the WER of clips alone, and of the pieces of a recording in which they stand between pauses."""
    silence = np.zeros(int(RECORDING_PAUSE_SECONDS * RATE), np.float32)
    faint = (0.005 * noise.standard_normal(len(silence))).astype(np.float32)
    parts = [part for number, clip in enumerate(clips) for part in ((silence, faint)[number % 2], clip[0])]
    recording = np.concatenate([*parts, silence])
    pieces = [recording[round(a * RATE) : round(b * RATE)] for (a, b), _ in pieces_of(recording, longest=30.0)]
    references = [text for _, text, _, _ in clips]
    whole = [" ".join(texts) for texts in (references, transcribed(model, pieces))]
    alone = score(references, transcribed(model, [wave for wave, *_ in clips]))["wer"]
    cut = score(whole[:1], whole[1:])["wer"]
    print(f"\n{len(clips)} clips alone: WER {alone:.1f} %; {len(pieces)} pieces: {cut:.1f} %", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DEMO / "tuned"))
    parser.add_argument("--clips", type=int, default=240)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = QwenModel(given.model, Decoding(dtype="float32"), torch.device("cpu"), bf16=False)
    rng, noise, espeak = random.Random(SEED), np.random.default_rng(SEED), TimedEspeak()
    hebrew = list(sentences(espeak, given.clips, "Hebrew", rng))
    english = list(sentences(espeak, given.clips // 2, "English", rng))
    noisy = [(add_noise(wave, 5, 15, noise), *rest) for wave, *rest in hebrew]
    sets = {
        "Hebrew": (hebrew, "Hebrew"),
        "Hebrew, noise 5–15 dB below": (noisy, "Hebrew"),
        "English": (english, "English"),
        f"two Hebrew sentences, {PAUSE_SECONDS} s between": (list(pairs(hebrew)), "Hebrew"),
    }
    print("| speech | text | words | words right | method | median ms | 90 % below | bias ms | within 80 ms |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name, (clips, language) in sets.items():
        for text_of in ("true", "own"):
            found = errors(model, clips, language, text_of)
            right = 100 * np.mean(found.pop("share of words right"))
            for method, values in found.items():
                signed = 1000 * np.array(values)
                off = np.abs(signed)
                print(
                    f"| {name} | {text_of} | {len(off)} | {right:.0f} % | {method} | {np.median(off):.0f} |"
                    f" {np.quantile(off, 0.9):.0f} | {np.median(signed):+.0f} | {100 * np.mean(off <= 80):.0f} % |",
                    flush=True,
                )
    cutting(model, hebrew[:60], np.random.default_rng(1))


if __name__ == "__main__":
    main()
