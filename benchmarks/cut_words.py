"""What a model writes where speech is cut in the middle of its last word.

    uv run --group demo python -m benchmarks.cut_words --models CHECKPOINT OTHER

The sentences of the demo's test set are spoken once more by espeak-ng in the same voices, which says where each last
word begins. Each is transcribed whole, and cut in the middle of that word. Shares are of the sentences.
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jiwer
import numpy as np
import pyarrow.parquet
import torch

from benchmarks.word_times import SEED, TimedEspeak
from hebrew_asr.evaluation.settings import Decoding
from hebrew_asr.evaluation.transcription import QwenModel
from hebrew_asr.files import DEMO
from hebrew_asr.text.scoring import leaderboard_normalize

sys.path.insert(0, str(DEMO))
from speech import HELDOUT_VOICES, RATE, delivery

END_SECONDS = 0.08  # of silence behind the last word, as Espeak leaves it
BATCH = 16
ENDS = ("right", "beginning", "other", "more", "nothing")


def spoken(espeak: TimedEspeak, texts: list[str], rng: random.Random) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Text, wave, and the wave up to the middle of its last word; only where espeak-ng counts the words as we do."""
    for number, text in enumerate(texts):
        wave, starts = espeak.timed(text, "he+" + HELDOUT_VOICES[number % len(HELDOUT_VOICES)], **delivery(rng))
        if len(starts) == len(text.split()) > 1:
            middle = (starts[-1] + len(wave) / RATE - END_SECONDS) / 2
            yield text, wave, wave[: round(middle * RATE)]


def end_of(reference: str, hypothesis: str) -> str:
    """What stands at the place of the reference's last word; both texts normalised.

    right: that word; beginning: its first letters; other: another word; more: words beside what stands in its place;
    nothing.
    """
    last, word = len(reference.split()) - 1, reference.split()[-1]
    (chunks,) = jiwer.process_words(reference, hypothesis).alignments
    found = "nothing"
    for chunk in chunks:
        if chunk.type == "insert" and chunk.ref_start_idx >= last:
            return "more"
        if chunk.type in ("equal", "substitute") and chunk.ref_end_idx > last:
            written = hypothesis.split()[chunk.hyp_end_idx - 1]
            found = "right" if written == word else "beginning" if word.startswith(written) else "other"
    return found


def transcribed(model: QwenModel, waves: list[np.ndarray]) -> list[str]:
    """Normalised texts, in the waves' order; those of a batch are about as long."""
    order = sorted(range(len(waves)), key=lambda number: len(waves[number]))
    texts = {}
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        seconds = [len(waves[number]) / RATE for number in batch]
        made = model.transcribe([model.features(waves[number]) for number in batch], seconds)
        texts |= {number: leaderboard_normalize(one.text) for number, one in zip(batch, made, strict=True)}
    return [texts[number] for number in range(len(waves))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True, metavar="CHECKPOINT")
    parser.add_argument("--json", type=Path, help="how often each end was written, by checkpoint")
    given = parser.parse_args()
    torch.set_num_threads(1)
    (file,) = (DEMO / "heldout").glob("*.parquet")
    texts = pyarrow.parquet.read_table(file, columns=["transcript"])["transcript"].to_pylist()
    texts, whole, cut = zip(*spoken(TimedEspeak(), texts, random.Random(SEED)), strict=True)
    references = [leaderboard_normalize(text) for text in texts]
    print(f"{len(texts)} sentences; ends in percent of them")
    print(f"| checkpoint | speech | {' | '.join(ENDS)} |\n|---|---|{'---|' * len(ENDS)}")
    found = {}
    for name in given.models:
        model = QwenModel(name, Decoding(dtype="float32"), torch.device("cpu"), bf16=False)
        for speech, waves in (("whole", whole), ("cut", cut)):
            ends = Counter(map(end_of, references, transcribed(model, list(waves))))
            found[f"{name} {speech}"] = dict(ends)
            shares = " | ".join(f"{100 * ends[end] / len(texts):.1f}" for end in ENDS)
            print(f"| {name} | {speech} | {shares} |", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
