"""Transcribes audio without transcripts, and makes a training corpus of what a checkpoint agrees with itself on.

    uv run torchrun --nproc_per_node=8 scripts/pseudo_label.py --model runs/NAME/final_model \\
        --source DATA --output data/more

DATA is a path or Hub id of any form that training reads, or a source as JSON; its transcripts, if any, are not read. An
utterance is transcribed greedily and `--samples` times at a temperature; its confidence is 1 less the mean distance of
those transcripts from one another. What is confident enough and passes the filters of training (`--config` takes those
of a run) is written with the columns of ivrit.ai's training sets, the confidence as `quality_score`: name the folder in
`train_sources` with a probability. What is dropped is counted in OUTPUT.labels/report.json; every transcript with its
fate is in labels.parquet beside it. The same command goes on where it was interrupted.
"""

if __name__ == "__main__":  # the imports take seconds
    from hebrew_asr.start import begin

    begin()

import dataclasses
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow
import pyarrow.parquet

from hebrew_asr.command_line import Range, parse_config
from hebrew_asr.data.audio import AudioError, check_waveform, decode_audio
from hebrew_asr.data.corpus import corpus_row, piece_of_audio, whole_audio, write_corpus
from hebrew_asr.data.rows import RowSettings, SpeechRows, load_rows, row_settings, why_unusable
from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation.settings import Decoding
from hebrew_asr.evaluation.transcription import Transcript, load_speech_model, plan, read_transcripts, transcribe_shares
from hebrew_asr.files import put
from hebrew_asr.processes import fail_together, join_processes, launch, leave_process_group, load_in_turn
from hebrew_asr.text.scoring import count_errors, leaderboard_normalize, repeats
from hebrew_asr.text.targets import normalize_target


@dataclass
class Labelling(DataConfig):
    """What is transcribed, and what is kept of it."""

    # Pseudo-labels
    model: str = ""
    """The checkpoint that transcribes: a folder or a Hub id."""
    source: Source = field(default_factory=lambda: Source(""))
    """A path or Hub id, or a source as JSON."""
    output: str = ""
    """The corpus's folder, which is not there yet."""
    language: str = "Hebrew"
    samples: Annotated[int, Range(1)] = 4
    """Beside the greedy transcript."""
    temperature: Annotated[float, Range(0.01)] = 0.7
    min_confidence: Annotated[float, Range(0, 1)] = 0.8
    num_workers: Annotated[int, Range(0)] = 4
    process_timeout_minutes: int = 600


# ------------------------------------------------------------------------------------------------------- What is kept
def distance(a: str, b: str) -> float:
    """Character edits between two normalised texts over the longer one's length: 0 for equal ones, at most 1."""
    longer, shorter = sorted((a, b), key=len, reverse=True)
    if not shorter:
        return float(bool(longer))
    return count_errors(longer, shorter).character_edits / len(longer)


def confidence(texts: list[str]) -> float:
    """1 less the mean distance of all pairs."""
    texts = [leaderboard_normalize(text) for text in texts]
    return 1 - float(np.mean([distance(a, b) for a, b in itertools.combinations(texts, 2)]))


def fate(transcript: Transcript, certainty: float, seconds: float, given: Labelling, settings: RowSettings) -> str:
    """Why an utterance with this greedy transcript is not trained on, or ""."""
    text = normalize_target(transcript.text, given.text_rules)
    if transcript.language != given.language:
        return f"named as {transcript.language or 'no language'}"
    if transcript.truncated:
        return "cut off by the limit of tokens"
    if repeats(text):
        return "repeats itself"
    if certainty < given.min_confidence:
        return f"confidence below {given.min_confidence:g}"
    return why_unusable(text, seconds, settings)


# --------------------------------------------------------------------------------------------------------- The corpus
def utterances_of(rows: SpeechRows, longest: float, workers: int) -> SpeechRows:
    """The recordings, those longer than `longest` seconds cut at pauses, each piece a row of its own."""
    pieces = sorted(plan(rows, longest, workers))
    index = rows.index.take(pyarrow.array(rows.used[[piece.number for piece in pieces]]))
    contents = [name.split(" ")[0] for name in index["digest"].to_pylist()]
    changed = {
        "start": pyarrow.array([piece.start for piece in pieces], pyarrow.float64()),
        "end": pyarrow.array([piece.end for piece in pieces], pyarrow.float64()),
        "seconds": pyarrow.array([piece.seconds for piece in pieces], pyarrow.float64()),
        "digest": pyarrow.array([f"{c} {p.start:.2f}" for c, p in zip(contents, pieces, strict=True)]),
    }
    for name, column in changed.items():
        index = index.set_column(index.schema.get_field_index(name), name, column)
    return SpeechRows(rows.sources, index, np.arange(len(index)), rows.dropped)


def corpus_rows(rows: SpeechRows, kept: list[dict[str, Any]], source: Source) -> Iterator[dict[str, Any]]:
    for label in kept:
        row = rows[label["number"]]
        is_whole = row["end"] is None and not row["start"] and row["channel"] is None
        audio = whole_audio(row["audio"]) if is_whole else piece_of_audio(row, row["start"], row["end"])
        yield corpus_row(audio, label["text"], row["start"], label["confidence"], str(source), row["recording"])


# --------------------------------------------------------------------------------------------------------------- Main
def label(rows: SpeechRows, texts: list[list[Transcript]], given: Labelling) -> list[dict[str, Any]]:
    """A line for each utterance: its greedy transcript, confidence, and why it is dropped, or ""."""
    settings = dataclasses.replace(
        row_settings(given.source, [], given, for_training=True), min_quality=None, language=given.language
    )
    found = []
    for number, (greedy, *samples) in enumerate(zip(*texts, strict=True)):
        certainty = confidence([greedy.text, *(sample.text for sample in samples)])
        seconds = float(rows.seconds[number])
        row = rows[number]
        problem = fate(greedy, certainty, seconds, given, settings)
        if not problem:  # decoded last: most of what is dropped is dropped by its text
            try:
                problem = check_waveform(decode_audio(row["audio"], row["start"], row["end"]), seconds) or ""
            except AudioError as error:
                problem = str(error)
        found.append(
            {"number": number, "recording": row["recording"], "start": row["start"], "seconds": seconds}
            | {"text": normalize_target(greedy.text, given.text_rules), "confidence": certainty}
            | {"samples": [sample.text for sample in samples], "dropped": problem}
        )
    return found


def report_of(labels: list[dict[str, Any]], rows: SpeechRows, given: Labelling) -> dict[str, Any]:
    hours = defaultdict(float, kept=0.0)
    counts = Counter({"kept": 0})
    for one in labels:
        counts[one["dropped"] or "kept"] += 1
        hours[one["dropped"] or "kept"] += one["seconds"] / 3600
    for drop in rows.dropped:
        counts[drop.reason] += drop.utterances
        hours[drop.reason] += drop.hours
    return {
        "model": given.model,
        "source": str(given.source),
        "samples": given.samples,
        "temperature": given.temperature,
        "min_confidence": given.min_confidence,
        "utterances": dict(counts),
        "hours": dict(hours),
        "confidence_percentiles": {
            str(p): float(np.percentile([one["confidence"] for one in labels], p)) for p in (5, 25, 50, 75, 95)
        },
    }


def main(given: Labelling) -> None:
    """Transcribes, chooses and writes; InputError on every rank when it cannot."""
    # 1. Processes and folder
    state = join_processes(given.process_timeout_minutes)
    output = Path(given.output)
    if output.exists():
        raise InputError(f"{output} exists already: remove it, or choose another --output")
    beside = output.with_name(f"{output.name}.labels")

    # 2. Audio, and the model
    rows = load_in_turn(state, lambda: load_rows([given.source], given, for_training=False))
    rows = utterances_of(rows, given.max_audio_length_seconds, given.num_workers)
    sampled = [Decoding(temperature=given.temperature, seed=number) for number in range(1, given.samples + 1)]
    with fail_together():
        model = load_speech_model(given.model, sampled[0], state.device)

    # 3. Transcribe: greedily, then sampled
    texts: list[list[Transcript]] = []
    for decoding in (Decoding(), *sampled):
        model.decoding = decoding
        parts = transcribe_shares(model, rows, beside, state, given.num_workers)
        texts.append(read_transcripts(parts, len(rows)).transcripts if state.is_main_process else [])

    # 4. Choose and write: the first process
    with fail_together():
        if state.is_main_process:
            labels = label(rows, texts, given)
            kept = [one for one in labels if not one["dropped"]]
            report = report_of(labels, rows, given)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(labels), beside / "labels.parquet")
            put(beside / "report.json", json.dumps(report, ensure_ascii=False, indent=1))
            for reason, count in report["utterances"].items():
                print(f"{reason}: {count} utterances, {report['hours'][reason]:.2f} h", flush=True)
            if not kept:
                raise InputError(f"nothing is left to train on; {beside}/labels.parquet has the transcripts")
            write_corpus(output, corpus_rows(rows, kept, given.source), len(kept))
            print(f"corpus: {output}; its labels and what was dropped: {beside}", flush=True)
    leave_process_group()


def parse(argv: list[str]) -> Labelling:
    """Reads the command line; raises InputError."""
    given = parse_config(argv, Labelling(), about=__doc__, of_another=True)
    for name in ("model", "source", "output"):
        if getattr(given, name) in ("", Source("")):
            raise InputError(f"give --{name}: see --help")
    given.source = dataclasses.replace(given.source, text_column="", language=None)
    given.preprocessing_num_workers = max(1, given.num_workers)
    return given


if __name__ == "__main__":
    launch(lambda arguments: main(parse(arguments)))
