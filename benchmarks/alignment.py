"""How much of long recordings `scripts/align_recordings.py` keeps, and how many words of it are wrong.

    uv run python -m benchmarks.alignment
    uv run python -m benchmarks.alignment --cutter

Recordings are joined from the demo's clips (demo/recordings.py): pauses of 0.1 to 2 s, music and noise between, 5 % of
the sentences missing from the transcript, 5 % added to it. What is really said in each stretch is known from how they
are made. `kept` is the share of the sentences that are in the transcript, in seconds, that pieces hold; `wrong` are the
word errors of the pieces' texts, of all words said in them. With `--cutter`: how silero-vad and
the quietest moment cut the same recordings; `cut in two` are sentences, `left out` is audio that no piece has.
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import torch

from demo.recordings import DEMO, Recording, clips, join
from hebrew_asr.data import voice
from hebrew_asr.data.alignment import Kept
from hebrew_asr.data.audio import SAMPLE_RATE
from hebrew_asr.evaluation.settings import Decoding
from hebrew_asr.evaluation.transcription import load_speech_model
from hebrew_asr.text.scoring import ErrorCounts, count_errors, leaderboard_normalize
from scripts.align_recordings import Aligning, align_recording

STRETCH_SECONDS = 3.5  # the demo's checkpoints know sentences of 1 to 3 s


def said_between(recording: Recording, start: float, end: float) -> str:
    """The words whose middle is there; inside of a sentence, time is divided by letters."""
    found = []
    for sentence in recording.sentences:
        words = sentence.text.split()
        lengths = np.array([len(word) + 1 for word in words])
        middles = (np.cumsum(lengths) - lengths / 2) / lengths.sum() * (sentence.end - sentence.start) + sentence.start
        found += [word for word, middle in zip(words, middles, strict=True) if start <= middle < end]
    return " ".join(found)


def judge(recording: Recording, kept: list[Kept]) -> tuple[float, float, int, int]:
    """Returns seconds kept and seconds there are of sentences with a transcript; wrong words and words said."""
    known = [s for s in recording.sentences if s.in_transcript]
    overlaps = [max(0.0, min(k.end, s.end) - max(k.start, s.start)) for k in kept for s in known]
    total = wrong = 0
    for piece in kept:
        said = leaderboard_normalize(said_between(recording, piece.start, piece.end))
        text = leaderboard_normalize(piece.text)
        counts = count_errors(said, text) if said else ErrorCounts(insertions=len(text.split()))
        total += counts.words
        wrong += counts.substitutions + counts.deletions + counts.insertions
    return sum(overlaps), sum(s.end - s.start for s in known), wrong, total


def quietest_cuts(waveform: np.ndarray, longest: float) -> list[tuple[float, float]]:
    """Cuts at the quietest 0.3 s of the second half of what still fits."""
    frame = SAMPLE_RATE // 50
    power = np.square(waveform[: len(waveform) // frame * frame], dtype=np.float64).reshape(-1, frame).mean(axis=1)
    loudness = np.convolve(power, np.ones(15) / 15, mode="same")
    edges, total = [0.0], len(waveform) / SAMPLE_RATE
    while total - edges[-1] > longest:
        first, last = (int((edges[-1] + length) * 50) for length in (longest / 2, longest))
        edges.append((first + int(np.argmin(loudness[first:last]))) / 50)
    return list(itertools.pairwise([*edges, total]))


def compare_cutters(seeds: list[int]) -> None:
    print("| clips | longest s | cutter | pieces | cut in two | speech lost % | left out % | s per hour |")
    print("|---|---|---|---|---|---|---|---|")
    for folder, longest in itertools.product(("corpus", "heldout"), (3.5, 10.0, 30.0)):
        recordings = [join(clips(folder), 600.0, seed) for seed in seeds]
        for name, cutter in (("quietest moment", quietest_cuts), ("silero-vad", voice.cut)):
            pieces = broken = 0
            lost, left_out, seconds = [], [], 0.0
            for recording in recordings:
                began = time.perf_counter()
                found = cutter(recording.waveform, longest)
                seconds += time.perf_counter() - began
                pieces += len(found)
                for s in recording.sentences:
                    inside = [max(0.0, min(b, s.end) - max(a, s.start)) for a, b in found]
                    broken += sum(part > 0.1 for part in inside) > 1
                    lost.append(1 - sum(inside) / (s.end - s.start))
                left_out.append(1 - sum(b - a for a, b in found) * SAMPLE_RATE / len(recording.waveform))
            hours = sum(len(r.waveform) for r in recordings) / SAMPLE_RATE / 3600
            shares = f"{100 * np.mean(lost):.2f} | {100 * np.mean(left_out):.1f}"
            print(
                f"| {folder} | {longest:g} | {name} | {pieces} | {broken} | {shares} | {seconds / hours:.0f} |",
                flush=True,
            )


def measure(models: list[str], sizes: list[float], seeds: list[int], asks: list[bool]) -> None:
    print("| checkpoint | clips | minutes | likelihoods | kept % | wrong % | each seed: kept, wrong | s per hour |")
    print("|---|---|---|---|---|---|---|---|")
    for name in models:
        model = load_speech_model(str(DEMO / name), Decoding(), torch.device("cpu"))
        for folder, seconds in itertools.product(("corpus", "heldout"), sizes):
            recordings = [join(clips(folder), seconds, seed) for seed in seeds]
            hours = sum(len(r.waveform) for r in recordings) / SAMPLE_RATE / 3600
            for asks_model in asks:
                given, began = Aligning(asks_model=asks_model, stretch_seconds=STRETCH_SECONDS), time.perf_counter()
                aligned = [align_recording(model, r.waveform, r.transcript, given) for r in recordings]
                took = (time.perf_counter() - began) / hours
                judged = [judge(r, kept) for r, (kept, _) in zip(recordings, aligned, strict=True)]
                each = ", ".join(f"{100 * k / of:.1f} {100 * w / n:.2f}" for k, of, w, n in judged)
                k, of, w, n = map(sum, zip(*judged, strict=True))
                shares = f"{100 * k / of:.1f} | {100 * w / n:.2f}"
                which = f"{name} | {folder} | {seconds / 60:g} | {'yes' if asks_model else 'no'}"
                print(f"| {which} | {shares} | {each} | {took:.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(Path(__file__).name, allow_abbrev=False)
    parser.add_argument("--cutter", action="store_true", help="compare where recordings are cut")
    parser.add_argument("--models", nargs="+", default=["base", "tuned"])
    parser.add_argument("--minutes", nargs="+", type=float, default=[2.0, 10.0, 20.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[11, 12, 13])
    parser.add_argument("--likelihoods", nargs="+", choices=["yes", "no"], default=["yes", "no"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.cutter:
        compare_cutters(options.seeds)
    else:
        asks = [one == "yes" for one in options.likelihoods]
        measure(options.models, [60 * minutes for minutes in options.minutes], options.seeds, asks)
