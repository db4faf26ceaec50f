"""Makes training clips of long recordings that have a plain transcript each.

    uv run torchrun --nproc_per_node=8 scripts/align_recordings.py --model runs/NAME/final_model --source DATA \\
        --output_dir data/aligned
    uv run scripts/align_recordings.py --demo

DATA is a folder, a table or a Hub id of any form that training reads, or a source as JSON: a row is a recording of any
length with its whole transcript. A checkpoint transcribes it; even one that gets most words wrong will do. Its text is
aligned with the transcript, which may lack sentences and have ones that nobody says. What is kept is cut at pauses and
written to OUTPUT with the columns of ivrit.ai's training sets, the confidence as `quality_score`: name the folder in
`train_sources`. OUTPUT.alignment/report.json has the hours in, kept and refused by reason; refused.jsonl beside it has
every refused stretch with its seconds, its reason, what was heard and the transcript's words, to be listened to. The
same command goes on where it was interrupted: a recording that is done is not done again.
"""

if __name__ == "__main__":  # the imports take seconds
    from hebrew_asr.start import begin

    begin()

import dataclasses
import json
import tempfile
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import soundfile
from accelerate.utils import broadcast_object_list

from hebrew_asr.command_line import Range, parse_config
from hebrew_asr.console import Bar
from hebrew_asr.data import alignment, voice
from hebrew_asr.data.alignment import ANOTHER, Heard, Kept, Likelihood, Refused, align
from hebrew_asr.data.audio import SAMPLE_RATE, check_waveform, decode_audio
from hebrew_asr.data.corpus import corpus_row, piece_of_audio, write_corpus
from hebrew_asr.data.rows import RowSettings, SpeechRows, load_rows, row_settings, why_unusable
from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.data.voice import Span
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation.settings import Decoding
from hebrew_asr.evaluation.transcription import QwenModel, Transcriber, key, load_speech_model, transcription_problems
from hebrew_asr.files import digest, put
from hebrew_asr.processes import fail_together, join_processes, launch, leave_process_group, load_in_turn
from hebrew_asr.text.targets import normalize_target

TAIL = 0.05  # seconds that the model hears after a stretch of speech
NEAR = 0.5  # seconds between stretches that may be one sentence
LONGEST_DOUBT = 120.0  # seconds; where more is refused in a row, it is the transcript that lacks it
MOST_PARTS = 6  # of a stretch that is put together anew
CODE = (__file__, alignment.__file__, voice.__file__)


@dataclass
class Aligning(DataConfig):
    """What is aligned, and what is kept of it."""

    # Alignment
    model: str = ""
    """The checkpoint that transcribes: a folder or a Hub id."""
    source: Source = field(default_factory=lambda: Source(""))
    """A path or Hub id, or a source as JSON."""
    output_dir: str = ""
    """The corpus's folder, which is not there yet."""
    language: str = "Hebrew"
    min_confidence: Annotated[float, Range(0.5, 1)] = 0.85
    """Of a piece: the probability that its words are exactly those spoken in it."""
    stretch_seconds: Annotated[float, Range(2, 30)] = 10.0
    """Speech without a pause is transcribed in stretches of at most so many seconds; a piece has one or more."""
    asks_model: bool = True
    """Also weighs how likely the model finds the transcript's words, which takes as long again as transcribing."""
    batch_seconds: float = 240.0
    """Of audio that the model hears at once, padding included."""
    process_timeout_minutes: int = 600


# ------------------------------------------------------------------------------------------------------ One recording
def batches_by_length(seconds: list[float], batch_seconds: float) -> Iterator[list[int]]:
    """Numbers of clips, shortest first, in batches of at most `batch_seconds` with padding, or of one."""
    batch: list[int] = []
    for number in np.argsort(seconds, kind="stable").tolist():
        if batch and (len(batch) + 1) * seconds[number] > batch_seconds:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


@dataclass
class Hearing:
    """What a model writes for stretches of a recording, and how likely it finds other texts for them."""

    model: Transcriber
    waveform: np.ndarray  # (samples,) at 16 kHz
    given: Aligning
    stretches: list[Heard] = field(default_factory=list)  # by start and end
    features: dict[Span, Any] = field(default_factory=dict)
    answers: dict[tuple[Span, tuple[str, ...]], Likelihood] = field(default_factory=dict)

    def hear(self, spans: list[Span]) -> None:
        """Adds stretches."""
        seconds, batch_seconds = [b - a for a, b in spans], self.given.batch_seconds
        for a, b in spans:
            sound = self.waveform[round(a * SAMPLE_RATE) : round((b + TAIL) * SAMPLE_RATE)]
            self.features[a, b] = self.model.features(sound)
        for batch in batches_by_length(seconds, batch_seconds):
            clips = [self.features[spans[n]] for n in batch]
            written = self.model.transcribe(clips, [seconds[n] for n in batch])
            self.stretches += [Heard(*spans[n], w.text) for n, w in zip(batch, written, strict=True)]
        self.stretches.sort()

    def align(self, transcript: str) -> tuple[list[Kept], list[Refused]]:
        asks = self.given.asks_model and isinstance(self.model, QwenModel)  # others cannot be asked
        longest, least = self.given.max_audio_length_seconds, self.given.min_confidence
        return align(self.stretches, transcript, longest, least, self.ask if asks else None)

    def ask(self, asked: list[tuple[int, list[str]]]) -> list[Likelihood]:
        """Of each (number of a stretch, words), in batches of stretches of like length."""
        assert isinstance(self.model, QwenModel)
        keys = [(self.stretches[number][:2], tuple(words)) for number, words in asked]
        new = [key for key in dict.fromkeys(keys) if key not in self.answers]
        for batch in batches_by_length([end - start for (start, end), _ in new], self.given.batch_seconds):
            clips, words = [self.features[new[i][0]] for i in batch], [list(new[i][1]) for i in batch]
            found = self.model.likelihoods(clips, words, self.given.language)
            self.answers |= dict(zip([new[i] for i in batch], found, strict=True))
        return [self.answers[key] for key in keys]


def align_recording(
    model: Transcriber, waveform: np.ndarray, transcript: str, given: Aligning
) -> tuple[list[Kept], list[Refused]]:
    """The pieces of a recording, and what is refused.

    Where words are left over, the speech there is cut in all ways that there are, heard again, and all is weighed anew.
    """
    hearing = Hearing(model, waveform, given)
    hearing.hear(voice.utterances(waveform, given.stretch_seconds))
    kept, refused = hearing.align(transcript)
    spans = [span for region in doubtful(hearing.stretches, refused) for span in other_cuts(hearing, *region)]
    if not spans:
        return kept, refused
    hearing.hear(spans)
    return hearing.align(transcript)


def doubtful(heard: list[Heard], refused: list[Refused]) -> list[tuple[int, int]]:
    """Numbers of the first and after the last stretch of each region with words that are in no piece.

    A neighbour that is near belongs to it: a sentence may be cut in two between them. Long ones are left out.
    """
    found: list[tuple[int, int]] = []
    starts = [stretch.start for stretch in heard]
    for one in refused:
        if one.text and one.reason != ANOTHER:
            first, after = bisect_left(starts, one.start), bisect_left(starts, max(one.end, one.start + 1e-6))
            if 0 < first < len(heard) and heard[first].start - heard[first - 1].end < NEAR:
                first -= 1
            if 0 < after < len(heard) and heard[after].start - heard[after - 1].end < NEAR:
                after += 1
            if found and first <= found[-1][1]:
                first, after = found[-1][0], max(after, found[-1][1])
                found.pop()
            found.append((first, after))
    return [(a, b) for a, b in found if a == b or heard[b - 1].end - heard[a].start <= LONGEST_DOUBT]


def other_cuts(hearing: Hearing, first: int, after: int) -> list[Span]:
    """The other stretches that the speech from one stretch to another may be made of.

    It is divided at every moment that may be a pause; faint speech beside it may belong to it.
    """
    heard, waveform = hearing.stretches, hearing.waveform
    begin = heard[first - 1].end if first else 0.0
    end = heard[after].start if after < len(heard) else len(waveform) / SAMPLE_RATE
    edges = [begin, *(time for stretch in heard[first:after] for time in stretch[:2]), end]
    parts = [part for stretch in heard[first:after] for part in voice.atoms(waveform, stretch[:2])]
    for a, b in zip(edges[::2], edges[1::2], strict=True):
        pause = waveform[round(a * SAMPLE_RATE) : round(b * SAMPLE_RATE)]
        faint = voice.utterances(pause, hearing.given.stretch_seconds, voice.FAINT)
        parts += [(a + x, a + y) for x, y in faint if y - x > voice.LEAST_ATOM]
    parts.sort()
    found = []
    for i in range(len(parts)):
        for j in range(i, min(i + MOST_PARTS, len(parts))):
            if parts[j][1] - parts[i][0] > hearing.given.stretch_seconds or (
                j > i and parts[j][0] - parts[j - 1][1] > 1.0
            ):
                break
            found.append((parts[i][0], parts[j][1]))
    return [span for span in found if span not in hearing.features]


def fit_to_train_on(kept: list[Kept], waveform: np.ndarray, settings: RowSettings) -> tuple[list[Kept], list[Refused]]:
    """The pieces that the filters of training leave, their text as it writes targets; and the others."""
    fit, refused = [], []
    for piece in kept:
        text = normalize_target(piece.text, settings.text_rules)
        seconds = piece.end - piece.start
        sound = waveform[round(piece.start * SAMPLE_RATE) : round(piece.end * SAMPLE_RATE)]
        if problem := why_unusable(text, seconds, settings) or check_waveform(sound, len(sound) / SAMPLE_RATE):
            refused.append(Refused(piece.start, piece.end, problem, "", text))
        else:
            fit.append(dataclasses.replace(piece, text=text))
    return fit, refused


# --------------------------------------------------------------------------------------------------------- The report
def report_of(done: list[dict[str, Any]], rows: SpeechRows, given: Aligning) -> dict[str, Any]:
    """Hours in, kept, refused by reason, and without speech; words that nobody says by their number."""
    hours: dict[str, float] = defaultdict(float)
    counts, words = Counter[str](), Counter[str]()
    for one in done:
        for refused in one["refused"]:
            counts[refused["reason"]] += 1
            hours[refused["reason"]] += (refused["end"] - refused["start"]) / 3600
            words[refused["reason"]] += len(refused["text"].split())
    for drop in rows.dropped:
        counts[drop.reason] += drop.utterances
        hours[drop.reason] += drop.hours
    kept = sum(piece["end"] - piece["start"] for one in done for piece in one["kept"]) / 3600
    total = rows.hours + sum(drop.hours for drop in rows.dropped)
    return {
        "model": given.model,
        "source": str(given.source),
        "min_confidence": given.min_confidence,
        "recordings": len(done),
        "hours_in": total,
        "hours_kept": kept,
        "pieces_kept": sum(len(one["kept"]) for one in done),
        "hours_without_speech": max(0.0, total - kept - sum(hours.values())),
        "refused": {
            reason: {"hours": hours[reason], "places": counts[reason], "words": words[reason]} for reason in counts
        },
    }


def corpus_rows(rows: SpeechRows, done: list[dict[str, Any]], source: Source) -> Iterator[dict[str, Any]]:
    for number, one in enumerate(done):
        row = rows[number] if one["kept"] else {}
        for piece in one["kept"]:
            start = row["start"] + piece["start"]
            audio = piece_of_audio(row, start, row["start"] + piece["end"])
            yield corpus_row(audio, piece["text"], start, piece["confidence"], str(source), row["recording"])


# --------------------------------------------------------------------------------------------------------------- Main
def main(given: Aligning) -> None:
    """Transcribes, aligns and writes; InputError on every rank when it cannot."""
    # 1. Processes and folder
    state = join_processes(given.process_timeout_minutes)
    rank, processes = state.process_index, state.num_processes
    output = Path(given.output_dir)
    if output.exists():
        raise InputError(f"{output} exists already: remove it, or choose another --output_dir")
    beside = output.with_name(f"{output.name}.alignment")

    # 2. Recordings, and the model
    rows = load_in_turn(state, lambda: load_rows([given.source], given, for_training=False))
    with fail_together():
        model = load_speech_model(given.model, Decoding(), state.device)
    filters = row_settings(dataclasses.replace(given.source, text_column=""), [], given, for_training=True)

    # 3. Align: a recording at a time, each in the process of its turn
    decides = [key(model, Decoding(), rows), rows.column("reference"), dataclasses.asdict(given)]
    decides += [Path(file).read_text(encoding="utf-8") for file in CODE]
    (name,) = broadcast_object_list([digest(json.dumps(decides, default=str).encode())])
    parts = beside / "recordings" / name
    parts.mkdir(parents=True, exist_ok=True)
    with fail_together(), transcription_problems():
        mine = [number for number in range(rank, len(rows), processes) if not (parts / f"{number}.json").exists()]
        for number in Bar(mine, desc="aligning", unit="recording", disable=rank > 0 or not mine):
            row = rows[number]
            waveform = decode_audio(row["audio"], row["start"], row["end"])
            kept, refused = align_recording(model, waveform, row["reference"], given)
            kept, unfit = fit_to_train_on(kept, waveform, filters)
            result = {"kept": kept, "refused": sorted([*refused, *unfit], key=lambda one: one.start)}
            found = {name: [dataclasses.asdict(one) for one in many] for name, many in result.items()}
            put(parts / f"{number}.json", json.dumps(found | {"recording": row["recording"]}, ensure_ascii=False))
    state.wait_for_everyone()

    # 4. Write: the first process
    with fail_together():
        if state.is_main_process:
            done = [json.loads((parts / f"{number}.json").read_text("utf-8")) for number in range(len(rows))]
            report = report_of(done, rows, given)
            lines = [{"recording": one["recording"]} | refused for one in done for refused in one["refused"]]
            put(beside / "refused.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            put(beside / "report.json", json.dumps(report, ensure_ascii=False, indent=1))
            hours = {name: report[f"hours_{name}"] for name in ("in", "kept", "without_speech")}
            print(
                f"{hours['in']:.3f} h of recordings, {hours['without_speech']:.3f} h of them without speech", flush=True
            )
            print(f"kept: {hours['kept']:.3f} h in {report['pieces_kept']} pieces", flush=True)
            for reason, lost in report["refused"].items():
                print(f"{reason}: {lost['hours']:.3f} h, {lost['words']} words, {lost['places']} places", flush=True)
            if not report["pieces_kept"]:
                raise InputError(f"nothing is kept; {beside}/refused.jsonl says why, stretch by stretch")
            write_corpus(output, corpus_rows(rows, done, given.source), report["pieces_kept"])
            print(f"corpus: {output}; its report and what was refused: {beside}", flush=True)
    leave_process_group()


def demo() -> Aligning:
    """Two recordings of two minutes, joined from held-out clips of the demo, and the checkpoint with 60 % WER."""
    from demo.recordings import DEMO, clips, join

    folder = Path(tempfile.mkdtemp(prefix="align-demo-"))
    lines = []
    for seed in (0, 1):
        recording = join(clips("heldout"), 120.0, seed)
        soundfile.write(folder / f"call-{seed}.flac", recording.waveform, SAMPLE_RATE)
        lines.append(json.dumps({"file_name": f"call-{seed}.flac", "text": recording.transcript}, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Aligning(
        model=str(DEMO / "base"),
        source=Source(str(folder)),
        output_dir=str(folder / "aligned"),
        stretch_seconds=3.5,  # the demo's checkpoints know sentences of 1 to 3 s
        preprocessing_num_workers=1,
    )


def parse(argv: list[str]) -> Aligning:
    """Reads the command line; raises InputError."""
    given = parse_config(argv, Aligning(), demo=demo, about=__doc__, of_another=True)
    for name in ("model", "source", "output_dir"):
        if getattr(given, name) in ("", Source("")):
            raise InputError(f"give --{name}: see --help")
    return given


if __name__ == "__main__":
    launch(lambda arguments: main(parse(arguments)))
