"""Recordings in, transcripts and subtitles out: any format, any length, any number.

Recordings are cut by voice activity, so that what nobody says is not heard, and their pieces transcribed in batches
over files, longest first. A recording's JSON holds everything that is known of it; the other formats are made from it.
What is done is not done again: a JSON's key names the audio's content, the model's, and the settings.
"""

import contextlib
import dataclasses
import errno
import json
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from hebrew_asr.console import Bar
from hebrew_asr.data import decoding as decoding_module
from hebrew_asr.data import voice
from hebrew_asr.data.decoding import (
    AUDIO_SUFFIXES,
    CUT,
    MANY_HOURS,
    MOST_HOURS,
    SAMPLE_RATE,
    AudioError,
    audio_blocks,
)
from hebrew_asr.data.sources import check_language
from hebrew_asr.data.voice import Span
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation import engines, transcription
from hebrew_asr.evaluation.engines import ClipsRefused, is_endpoint, open_engine
from hebrew_asr.evaluation.settings import FORMATS, Format, TranscribeConfig
from hebrew_asr.evaluation.transcription import Piece, Transcriber, Transcript, batches_of, transcribe_as_it_fits
from hebrew_asr.files import UNFINISHED, digest, put, sha256
from hebrew_asr.model import word_times
from hebrew_asr.processes import in_processes
from hebrew_asr.text.subtitles import WRITERS, Segment, Word, as_json, segments_of

LEAD_SECONDS = 0.03  # kept before speech
EDGE_SECONDS = 0.3  # before the first and after the last speech of a recording, which are kept
# of a config, on what the model writes
WITHOUT_EFFECT = {"paths", "model", "formats", "output_dir", "overwrite", "num_workers", "batch_seconds"}
BATCHES_AT_ONCE = 8  # collected before the longest of them is transcribed
PROGRESS = "transcribing: {percentage:3.0f}% {bar} {elapsed} so far, {remaining} left{postfix}"
CODE = (__file__, voice.__file__, decoding_module.__file__, word_times.__file__, engines.__file__, *transcription.CODE)


@dataclass
class Recording:
    """One recording's transcript, or why it has none."""

    file: Path
    segments: list[Segment] = field(default_factory=list)
    seconds: float = 0.0
    language: str | None = None
    """As the model named it for most of the audio; None: it names none, or nobody speaks."""
    truncated: int = 0
    """Pieces that the limit of tokens ended: loops, as a rule."""
    is_cut: bool = False
    """The file's end is missing; what is there was transcribed."""
    problem: str | None = None

    @property
    def text(self) -> str:
        return " ".join(segment.text for segment in self.segments)


@dataclass(frozen=True)
class Job:
    """A recording to transcribe, and the path of its transcripts without their suffix."""

    file: Path
    target: Path
    size: int

    def path(self, kind: str) -> Path:
        return self.target.with_name(f"{self.target.name}.{WRITERS[kind][0] if kind in WRITERS else kind}")

    @property
    def unfinished(self) -> Path:
        """The pieces of a long recording that are done."""
        return self.target.with_name(f".{UNFINISHED}{digest(self.target.name.encode())}.jsonl")


# ------------------------------------------------------------------------------------------------------- What is there


def find_jobs(paths: Sequence[str | Path], output_dir: str | None) -> tuple[list[Job], list[Recording]]:
    """The recordings, largest first, and the paths that are none; nothing is opened.

    A transcript has its recording's name with another suffix. Where two recordings of a folder differ in their suffix
    alone, it is added to the whole name.
    """
    found: dict[Path, Path | None] = {}  # the file, and the folder that was given
    problems = []
    for path in map(Path, paths):
        if os.path.isdir(path):
            inside, unread = recordings_in(path)
            problems += unread
            if not inside and not unread:
                problems.append(Recording(path, problem="no recordings in this folder"))
            found |= {file: path for file in sorted(inside) if file not in found}
        elif os.path.lexists(path):
            found.setdefault(path, None)
        else:
            problems.append(Recording(path, problem="no such file or folder"))

    sizes = {}
    for file in list(found):
        try:
            status = file.stat()
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "it is no regular file, but a pipe or a device")
            sizes[file] = status.st_size
        except OSError as error:
            problems.append(Recording(file, problem=f"cannot be read: {error.strerror}"))
            del found[file]
    stems = {folder: Counter(stems_in(folder)) for folder in {file.parent for file in found}}
    jobs: dict[Path, Job] = {}
    for file, folder in found.items():
        name = file.name if stems[file.parent][file.stem] > 1 else file.stem
        place = file.parent
        if output_dir is not None:
            place = Path(output_dir) / (file.parent.relative_to(folder) if folder else ".")
        job = Job(file, place / name, sizes[file])
        if job.target in jobs:
            other = jobs[job.target].file
            problems.append(Recording(file, problem=f"its transcript would have the name of {other}'s: rename one"))
            continue
        jobs[job.target] = job
    return sorted(jobs.values(), key=lambda job: -job.size), problems


def recordings_in(top: Path) -> tuple[list[Path], list[Recording]]:
    """The recordings in a folder and its subfolders, and the folders that cannot be read.

    Links to folders are followed, after the folders that are none; where a folder is met again, it is left out.
    """
    inside: list[Path] = []
    unread: list[Recording] = []
    seen = set()

    def note(error: OSError) -> None:
        unread.append(Recording(Path(error.filename), problem=f"cannot be read: {error.strerror}"))

    for folder, subfolders, names in os.walk(top, onerror=note, followlinks=True):
        if (place := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(place)
        subfolders.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        for name in names:
            if Path(name).suffix.lower() in AUDIO_SUFFIXES and not name.startswith("."):
                inside.append(Path(folder, name))
    return inside, unread


def stems_in(folder: Path) -> Iterator[str]:
    """Of a folder's recordings; none where it may not be listed."""
    with contextlib.suppress(PermissionError), os.scandir(folder) as entries:
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if suffix.lower() in AUDIO_SUFFIXES:
                yield stem


def model_key(name: str, dtype: str, config: TranscribeConfig) -> str:
    """Names what transcripts depend on beside the audio: the model's content, the settings, and the code."""
    files = [(name, "")]  # an endpoint has none to show
    if not is_endpoint(name):
        folder = Path(transformers.utils.cached_file(name, "config.json")).parent
        files = [(f.name, sha256(f)) for f in sorted(folder.iterdir()) if f.is_file() and f.name != "README.md"]
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in WITHOUT_EFFECT}
    code = [version("transformers"), version("silero-vad"), *(Path(file).read_text(encoding="utf-8") for file in CODE)]
    return digest(json.dumps([files, dtype, settings, code]).encode())


def read_record(file: Path) -> dict[str, Any] | None:
    """What `write` left in a JSON; None for another's, or none."""
    try:
        content = json.loads(file.read_bytes()) if file.is_file() else None
    except (OSError, ValueError):
        return None
    is_ours = isinstance(content, dict) and {"key", "files", "segments"} <= content.keys()
    return content if is_ours and isinstance(content["files"], dict) else None


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or the folder itself."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place.is_dir() and os.access(place, os.W_OK)


def digest_there(file: Path) -> str | None:
    """Of a file's content; None: there is no such file."""
    return digest(file.read_bytes()) if file.is_file() else None


def digest_of(record: dict[str, Any]) -> str:
    """Of all that a JSON says, but for the digests in it."""
    said = {name: value for name, value in record.items() if name != "files"}
    return digest(json.dumps(said, sort_keys=True).encode())


def in_the_way(job: Job, kinds: Iterable[str], record: dict[str, Any] | None) -> Path | None:
    """A file where a transcript is to be written that this command did not write as it is now."""
    for file in map(job.path, kinds):
        is_json = record is not None and file == job.path("json")
        now = digest_of(record) if is_json else digest_there(file)
        if file.exists() and now not in (record["files"].get(file.name, ()) if record else ()):
            return file
    return None


def rendered(segments: list[Segment], kinds: Iterable[str]) -> dict[str, str]:
    """The contents of transcripts, but for the JSON, by their kind."""
    return {kind: WRITERS[kind][1](segments) for kind in sorted(set(kinds) & WRITERS.keys())}


def not_as_recorded(job: Job, record: dict[str, Any], config: TranscribeConfig) -> list[str]:
    """The kinds of transcripts that are missing, or are others than a JSON makes.

    One that was made from it and corrected since is as it should be, unless files are to be replaced.
    """
    kinds = []
    for kind, content in rendered(segments_of(record), config.formats).items():
        file, made = job.path(kind), digest(content.encode())
        now, known = digest_there(file), record["files"].get(file.name, [])
        is_corrected = file.is_file() and now not in known and known[-1:] == [made]
        if now != made and (config.overwrite or not is_corrected):
            kinds.append(kind)
    return kinds


# -------------------------------------------------------------------------------------------------- Hearing recordings


@dataclass
class Heard:
    """What a worker process found in a recording."""

    key: str = ""
    seconds: float = 0.0
    is_cut: bool = False
    problem: str | None = None
    record: dict[str, Any] | None = None
    """The transcript, where it is on the disk already."""
    kinds: list[str] = field(default_factory=list)
    """Of transcripts, those to write."""
    files: dict[str, list[str]] = field(default_factory=dict)
    """Digests of what this command wrote before, by the files' names."""
    pieces: list[Span] = field(default_factory=list)
    spans: list[list[Span]] = field(default_factory=list)
    """Of each piece, the stretches of speech, from the piece's start."""
    features: list[Any] = field(default_factory=list)
    done: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Pieces that were transcribed before an interruption."""


def decoded(file: Path, channel: int | None, before: os.stat_result) -> tuple[np.ndarray, bool]:
    """A recording's waveform (samples,) at 16 kHz, of a file that is as it was, and whether its end is missing.

    Raises AudioError, also for samples that are no numbers.
    """
    waveform, is_cut, problem = bytearray(), False, None

    def blocks() -> Generator[np.ndarray]:
        nonlocal is_cut
        is_cut = yield from audio_blocks({"path": str(file)}, channel=channel)

    try:
        for block in blocks():
            waveform += block.tobytes()
            if not np.isfinite(block).all():
                raise AudioError("not finite: it holds samples that are no numbers")
            if len(waveform) > MOST_HOURS * 3600 * SAMPLE_RATE * 4:
                raise AudioError(MANY_HOURS)
        if is_cut and not waveform:
            raise AudioError(CUT)
    except AudioError as error:
        problem = error
    after = file.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise AudioError("is still being written: transcribe it when it is whole")
    if problem:
        raise problem
    return np.frombuffer(waveform, np.float32), is_cut


def hear(job: Job, model: Transcriber, settings_key: str, config: TranscribeConfig) -> Heard:
    """Decodes a recording and cuts it, unless its transcript is there."""
    heard = Heard()
    try:
        before = job.file.stat()
        if config.formats:
            heard.key = digest(f"{sha256(job.file)} {settings_key}".encode())
            record = read_record(job.path("json"))
            heard.files = record["files"] if record else {}
            heard.kinds = sorted({*config.formats, "json"})
            is_kept = not (config.overwrite and in_the_way(job, ["json"], record))
            if record and record["key"] == heard.key and is_kept:
                try:
                    _ = from_record(job, record).text
                    heard.record, heard.kinds = record, not_as_recorded(job, record, config)
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    what = f"no {error}" if isinstance(error, KeyError) else f"a wrong value: {error}"
                    heard.problem = f"{job.path('json')} was changed and has {what}; mend it, or --overwrite"
                    return heard
            if not config.overwrite and (file := in_the_way(job, heard.kinds, record)):
                heard.problem = f"{file} was not written by this command, or was changed since: move it, or --overwrite"
                return heard
            if heard.kinds and not is_writable(job.target.parent):
                heard.problem = f"{job.target.parent} cannot be written to: give an --output_dir that can"
                return heard
            if heard.record:
                return heard
            heard.done = {line["place"]: line for line in read_unfinished(job.unfinished, heard.key)}
        waveform, heard.is_cut = decoded(job.file, config.channel, before)
    except AudioError as error:
        heard.problem = str(error)
        return heard
    except OSError as error:
        heard.problem = f"cannot be read: {error.strerror}"
        return heard
    heard.seconds = len(waveform) / SAMPLE_RATE
    for place, (piece, spans) in enumerate(pieces_of(waveform, config.longest_seconds)):
        heard.pieces.append(piece)
        heard.spans.append(spans)
        samples = None if place in heard.done else stretch(waveform, *piece)
        heard.features.append(None if samples is None else model.features(samples))
    return heard


def stretch(waveform: np.ndarray, start: float, end: float) -> np.ndarray:
    return waveform[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]


def pieces_of(waveform: np.ndarray, longest: float) -> Iterator[tuple[Span, list[Span]]]:
    """What is transcribed of a waveform (samples,), and the stretches of speech in each piece, from its start.

    A piece begins and ends with its speech: a model may mishear a first word after a pause that it was not trained on.
    Near the recording's own ends it goes to them, so that a clip of one utterance is heard as it is.
    """
    seconds = len(waveform) / SAMPLE_RATE
    spans = voice.utterances(waveform, longest)
    for start, end in voice.gathered(spans, longest):
        within = [span for span in spans if start <= span[0] < end]
        first, last = max(0.0, start - LEAD_SECONDS), end
        first = 0.0 if first < EDGE_SECONDS else first
        last = seconds if last > seconds - EDGE_SECONDS else last
        if last - first <= longest:
            start, end = first, last
        yield (start, end), [(a - start, b - start) for a, b in within]


def read_unfinished(file: Path, key: str) -> Iterator[dict[str, Any]]:
    """Lines of this key; one that an interruption tore is left out."""
    lines = file.read_bytes().splitlines() if file.exists() else []
    for line in lines:
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if content["key"] == key:
            yield content


# --------------------------------------------------------------------------------------------------------- Transcribing


def words_at(
    model: Transcriber, features: Any, transcript: Transcript, seconds: float, spans: list[Span]
) -> list[Word] | None:
    """A piece's words with their times from its start; None where the model does not tell them."""
    starts = model.word_starts(features, transcript)
    if starts is None:
        return None
    times = word_times.within_speech(starts, seconds, spans)
    return [Word(text, *span) for text, span in zip(transcript.text.split(), times, strict=True)]


def transcribe_pieces(
    model: Transcriber, heard: dict[int, Heard], config: TranscribeConfig
) -> Iterator[tuple[Piece, dict[str, Any] | str]]:
    """Transcribes those pieces of recordings that are not done, longest first.

    Yields:
        Each piece, and what is known of it: the recording's key, the piece's place, its transcript and words; or why
        it has none.
    """
    pieces = [
        Piece(number, place, start, end, end - start)
        for number, one in heard.items()
        for place, (start, end) in enumerate(one.pieces)
        if place not in one.done
    ]
    for batch in batches_of(pieces, config.batch_seconds):
        features = [heard[piece.number].features[piece.place] for piece in batch]
        transcripts: Sequence[Transcript | str | None]
        try:
            transcripts = transcribe_as_it_fits(model, features, [piece.seconds for piece in batch])
        except ClipsRefused as refused:
            transcripts = refused.found
        for piece, clip, transcript in zip(batch, features, transcripts, strict=True):
            one, words = heard[piece.number], None
            if transcript is None:
                transcript = f"{piece.seconds:.0f} s of it do not fit the memory at once: lower longest_seconds"
            if isinstance(transcript, str):
                yield piece, transcript
                continue
            if config.word_times and transcript.text.strip():
                words = words_at(model, clip, transcript, piece.seconds, one.spans[piece.place])
            one.features[piece.place] = None
            known = {"key": one.key, "place": piece.place}
            yield piece, known | {"transcript": dataclasses.astuple(transcript), "words": words}


def append(file: Path, line: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write("\n" + json.dumps(line, ensure_ascii=False))  # after a line that an interruption tore


def whole(job: Job, heard: Heard, language: str | None) -> Recording:
    """A recording whose pieces are all done."""
    recording = Recording(job.file, seconds=heard.seconds, is_cut=heard.is_cut)
    languages: dict[str | None, float] = {}  # seconds of each
    for place, (start, end) in enumerate(heard.pieces):
        transcript = Transcript(*heard.done[place]["transcript"])
        recording.truncated += bool(transcript.truncated)
        text = " ".join(transcript.text.split())
        if not text:
            continue
        named = transcript.language or None
        languages[named] = languages.get(named, 0.0) + end - start
        words = heard.done[place]["words"]
        if words is not None:
            words = [Word(word, start + a, start + b) for word, a, b in words]
        recording.segments.append(Segment(start, end, text, words))
    if languages:
        recording.language = language or max(languages, key=lambda named: languages[named])
    return recording


def write(job: Job, recording: Recording, heard: Heard) -> None:
    """Writes a recording's JSON and the other transcripts of `heard.kinds`.

    The JSON is first, and holds digests of those that follow and of those that they replace: after an interruption
    the one and the other are known for this command's. A JSON that is there keeps all else that it says.
    """
    files, content = dict(heard.files), heard.record
    if content is None:
        about = {
            "file": recording.file.name,
            "seconds": round(recording.seconds, 3),
            "language": recording.language,
            "truncated": recording.truncated,
            "is_cut": recording.is_cut,
            "key": heard.key,
            "files": {},
        }
        content = json.loads(as_json(recording.segments, about))
        files[job.path("json").name] = [digest_of(content)]
    contents = {job.path(kind): text for kind, text in rendered(recording.segments, heard.kinds).items()}
    for file, text in contents.items():
        files[file.name] = [*filter(None, [digest_there(file)]), digest(text.encode())]
    job.target.parent.mkdir(parents=True, exist_ok=True)
    put(job.path("json"), json.dumps(content | {"files": files}, ensure_ascii=False, indent=1) + "\n")
    for file, text in contents.items():
        put(file, text)
    job.unfinished.unlink(missing_ok=True)


def from_record(job: Job, record: dict[str, Any]) -> Recording:
    known = {name: record[name] for name in ("seconds", "language", "truncated", "is_cut")}
    return Recording(job.file, segments_of(record), **known)


class Run:
    """The recordings of one call, as they become transcripts."""

    def __init__(self, jobs: list[Job], model: Transcriber, config: TranscribeConfig, bar: Bar):
        self.jobs, self.model, self.config, self.bar = jobs, model, config, bar
        self.recordings: dict[int, Recording] = {}
        self.waiting: dict[int, Heard] = {}
        self.seconds = 0.0  # of audio transcribed by this call
        self.total = sum(job.size for job in jobs)  # bytes that the bar counts

    def add(self, number: int, heard: Heard) -> None:
        """Takes a recording that was heard; transcribes those that wait once they are enough."""
        job = self.jobs[number]
        if heard.problem:
            self.end(number, Recording(job.file, problem=heard.problem))
        elif heard.record:
            self.end(number, from_record(job, heard.record), heard)
        else:
            self.waiting[number] = heard
            waits = sum(end - start for one in self.waiting.values() for start, end in one.pieces)
            if waits >= BATCHES_AT_ONCE * self.config.batch_seconds:
                self.transcribe()

    def transcribe(self) -> None:
        """Transcribes all that wait."""
        for number in self.waiting:
            self.end_if_done(number)
        for piece, line in transcribe_pieces(self.model, self.waiting, self.config):
            job, heard = self.jobs[piece.number], self.waiting[piece.number]
            if isinstance(line, str):
                self.recordings[piece.number] = Recording(job.file, problem=line)
                continue
            heard.done[piece.place] = line
            if self.config.formats and len(heard.done) < len(heard.pieces):
                self.on_disk(piece.number, lambda job=job, line=line: append(job.unfinished, line))
            self.seconds += piece.seconds
            self.bar.update(job.size * piece.seconds / sum(end - start for start, end in heard.pieces))
            self.end_if_done(piece.number)
        self.waiting = {}

    def end_if_done(self, number: int) -> None:
        job, heard = self.jobs[number], self.waiting[number]
        if len(heard.done) == len(heard.pieces) and number not in self.recordings:
            self.end(number, whole(job, heard, self.config.language), heard)

    def end(self, number: int, recording: Recording, heard: Heard | None = None) -> None:
        """Notes a recording's end, and writes its transcripts."""
        job = self.jobs[number]
        self.recordings[number] = recording
        if heard and heard.kinds:
            self.on_disk(number, lambda: write(job, recording, heard))
        if not heard or heard.record or not heard.pieces:
            self.total -= job.size  # nothing was to be transcribed: it says nothing of the time left
            self.bar.total = self.total
            self.bar.refresh()
        self.bar.set_postfix_str(f"{len(self.recordings)}/{len(self.jobs)} recordings")

    def on_disk(self, number: int, action: Callable[[], None]) -> None:
        """Writes; what goes wrong is the recording's problem, but for a full disk, which is everyone's."""
        job = self.jobs[number]
        try:
            action()
        except OSError as error:
            place = job.target.parent
            if error.errno == errno.ENOSPC:
                raise InputError(
                    f"{place}: no space left on the disk; make space and give the same command again: what is done is"
                    " kept"
                ) from error
            self.recordings[number] = Recording(job.file, problem=f"{place} cannot be written to: {error.strerror}")


def run(config: TranscribeConfig, shows_progress: bool = True) -> tuple[list[Recording], float, float]:
    """Transcribes what `config` names.

    Returns:
        The recordings, first those that are there, in the order of their paths; seconds of audio that were
        transcribed, and seconds that took.

    Raises:
        InputError: nothing can be transcribed: no model, an unknown format, a full disk. One recording's problem is in
            its `problem`.
    """
    if unknown := [kind for kind in config.formats if kind not in FORMATS]:
        raise InputError(f"format {unknown[0]!r} is not known: give some of {', '.join(FORMATS)}")
    if not config.paths:
        raise InputError("give files or folders to transcribe")
    if config.model is None:
        raise InputError("give the checkpoint: --model FOLDER, a Hub id, or --demo")
    if config.language == "None":
        raise InputError("language is 'None', which says that nobody speaks: leave it out, and the model names it")
    if config.language is not None:
        check_language(config.language)
    jobs, problems = find_jobs(config.paths, config.output_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = open_engine(config.model, config, device)
    settings_key = model_key(config.model, model.dtype, config) if config.formats else ""

    began = time.perf_counter()
    with Bar(total=sum(job.size for job in jobs), bar_format=PROGRESS, disable=not (shows_progress and jobs)) as bar:
        state = Run(jobs, model, config, bar)
        all_heard = in_processes(jobs, lambda job: hear(job, model, settings_key, config), config.num_workers)
        for number, heard in enumerate(all_heard):
            state.add(number, heard)
        state.transcribe()
    recordings = sorted(state.recordings.values(), key=lambda recording: recording.file)
    return recordings + problems, state.seconds, time.perf_counter() - began


def transcribe(
    paths: str | Path | Sequence[str | Path],
    model: str,
    formats: Sequence[Format] = (),
    output_dir: str | Path | None = None,
    language: str | None = None,
    context: str = "",
    channel: int | None = None,
    word_times: bool = True,
    num_workers: int = 0,
    **decoding: Any,
) -> list[Recording]:
    """Transcribes recordings: files, and folders with all that is in them.

    Args:
        model: a folder, a Hub id, or the URL of an endpoint.
        formats: transcripts to write, of `text`, `json`, `srt`, `vtt` and `tsv`; none: nothing is written.
        output_dir: for them; None: beside each recording.
        language: of the speech, as Qwen3-ASR names it (`Hebrew`); None: the model names it.
        context: hot words, for Qwen3-ASR.
        channel: of recordings with several, from 0; None: their average.
        decoding: other fields of `Decoding`.

    Returns:
        Each recording with its `text`, `segments` (with `words` and their times) and `language`, or its `problem`.

    Raises:
        InputError: nothing can be transcribed.
    """
    given = [paths] if isinstance(paths, str | Path) else paths
    config = TranscribeConfig(
        paths=[str(path) for path in given],
        model=str(model),
        formats=list(formats),
        output_dir=None if output_dir is None else str(output_dir),
        channel=channel,
        word_times=word_times,
        num_workers=num_workers,
        language=language,
        context=context,
        **decoding,
    )
    return run(config, shows_progress=False)[0]
