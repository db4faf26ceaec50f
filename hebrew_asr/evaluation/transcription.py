"""Transcribing recordings with a checkpoint: Qwen3-ASR, or any speech model that transformers has a pipeline for.

Recordings longer than a model hears are cut at their quietest moments and the texts joined. What is transcribed is on
disk at once, and is not transcribed again after an interruption.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import resource
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import accelerate
import numpy as np
import torch
import transformers
from accelerate.utils import broadcast_object_list
from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TASK_IDS

from hebrew_asr.console import Bar
from hebrew_asr.data import audio, utterances
from hebrew_asr.data import decoding as audio_decoding
from hebrew_asr.data.alignment import Likelihood
from hebrew_asr.data.audio import SAMPLE_RATE, AudioError, decode_audio
from hebrew_asr.data.rows import SpeechRows
from hebrew_asr.data.utterances import log_mel
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation.settings import Decoding
from hebrew_asr.files import digest
from hebrew_asr.model import frames, generation, layouts, packing, precision, prompts
from hebrew_asr.model.frames import FRAMES_PER_CHUNK
from hebrew_asr.model.generation import as_it_fits, generate, new_token_limit
from hebrew_asr.model.loading import check_whole, checkpoint_problems, load_model, load_processor
from hebrew_asr.model.loss import IGNORED_LABEL, label_states
from hebrew_asr.model.precision import mixed_precision, runs_bf16, to_encoder
from hebrew_asr.model.prompts import Prompts, pad, padded
from hebrew_asr.model.word_times import align
from hebrew_asr.processes import fail_together, in_processes

MODULES = (audio, audio_decoding, utterances, frames, packing, precision, prompts, generation, layouts)
CODE = [__file__, *(module.__file__ for module in MODULES)]
MOST_AT_ONCE = 256  # pieces of a batch, however short
PROGRESS = "{desc}: {percentage:3.0f}% {bar} {n:.0f}/{total:.0f} s of audio, {elapsed} so far, {remaining} left"
FRAME = 320  # samples in which loudness is measured: 20 ms
HEBREW = "Hebrew"  # where nobody says what is spoken
PAUSE_FRAMES = 15  # averaged: the quietest 0.3 s, not the quietest closure of a plosive


class Piece(NamedTuple):
    """A stretch of a recording, short enough for a model."""

    number: int  # of the recording in its set
    place: int  # of the piece in the recording
    start: float  # seconds
    end: float | None
    seconds: float


@dataclass(frozen=True)
class Transcript:
    """What a model wrote for a piece, or for a recording."""

    text: str
    language: str | None
    """As the model named it, "" where it named none; None for a model that names none, or was given one."""
    truncated: bool | None
    """The limit of tokens ended it; None where that cannot be told."""


class Transcriber(Protocol):
    """A model that transcribes; `features` runs in worker processes."""

    dtype: str
    decoding: Decoding
    """It may be another one for the next set."""
    files: str
    """What names the files that it was loaded from."""

    @property
    def needs_language(self) -> bool:
        """Whether it is told what is spoken; where not, it finds out."""
        ...

    def features(self, waveform: np.ndarray) -> Any: ...

    def transcribe(self, features: list[Any], seconds: list[float]) -> list[Transcript]: ...

    def word_starts(self, features: Any, transcript: Transcript) -> list[float] | None: ...


# --------------------------------------------------------------------------------------------------------------- Models
def load_speech_model(name: str, decoding: Decoding, device: torch.device) -> Transcriber:
    """Loads a checkpoint by its kind; raises InputError for one that is not whole or does not transcribe."""
    before = files_of(name)
    model = load_by_kind(name, decoding, device)
    after = files_of(name)
    if not before.items() <= after.items():  # the Hub's are fetched while loading
        raise InputError(f"{name} was replaced while it was loaded: start again")
    model.files = json.dumps(after)
    return model


def files_of(name: str) -> dict[str, Any]:
    """What tells a checkpoint's files from those that replace them: sizes, and times that nobody can set back."""
    with checkpoint_problems(name):
        folder = Path(transformers.utils.cached_file(name, "config.json")).parent
        there = {path: path.stat() for path in sorted(folder.iterdir()) if path.is_file() and path.name != "README.md"}
    return {str(path): [one.st_size, one.st_mtime_ns, one.st_ctime_ns] for path, one in there.items()}


def load_by_kind(name: str, decoding: Decoding, device: torch.device) -> "QwenModel | PipelineModel":
    bf16 = decoding.dtype == "bfloat16" or (decoding.dtype == "auto" and runs_bf16(device))
    with checkpoint_problems(name):
        folder = layouts.in_transformers_layout(name)
        kind = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
        if kind == "qwen3_asr":
            return QwenModel(name, decoding, device, bf16)
        if kind not in MODEL_FOR_CTC_MAPPING_NAMES and kind not in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES:
            raise InputError(f"{name} does not transcribe speech (its model_type is {kind})")
        return PipelineModel(name, decoding, device, bf16)


class QwenModel:
    """Qwen3-ASR under the prompts that training evaluates with."""

    decoding: Decoding
    files: str

    needs_language = False

    def __init__(self, name: str, decoding: Decoding, device: torch.device, bf16: bool):
        self.decoding, self.dtype = decoding, "bfloat16" if bf16 else "float32"
        self.processor = load_processor(name)
        self.model = load_model(name, use_bf16=bf16).to(device).eval()
        self.prompts = Prompts(self.processor)
        self.ends = set(self.model.generation_config.eos_token_id)

    def features(self, waveform: np.ndarray) -> np.ndarray:
        return log_mel(self.processor.feature_extractor, waveform)

    def transcribe(self, features: list[np.ndarray], seconds: list[float]) -> list[Transcript]:
        """Each piece has its own limit of tokens, so that no transcript depends on what else is in the batch."""
        limits = [self.decoding.max_new_tokens or new_token_limit(f.shape[1] / FRAMES_PER_CHUNK) for f in features]
        prefix = self.prompts.language_prefix(self.decoding.language) if self.decoding.language else []
        context = self.decoding.context if self.decoding.system_turn else None
        prompts = [self.prompts.prompt(f.shape[1], context) + prefix for f in features]
        batch = self.prompts.to_generate(features, prompts)
        with torch.random.fork_rng():  # of the CPU and of all GPUs
            torch.manual_seed(int(digest(f"{self.decoding.seed}".encode() + features[0].tobytes())[:12], 16))
            generated = generate(
                self.model, batch, limits, num_beams=self.decoding.num_beams, temperature=self.decoding.temperature
            )
        tokens = [row[:limit] for row, limit in zip(generated.tolist(), limits, strict=True)]
        truncated = [not self.ends.intersection(row) for row in tokens]
        prefilled = self.decoding.language
        return [
            Transcript(text, None if prefilled else language or "", cut)
            for (language, text), cut in zip(self.prompts.read(tokens), truncated, strict=True)
        ]

    def word_starts(self, features: np.ndarray, transcript: Transcript) -> list[float] | None:
        """When each word begins, in seconds from the clip's start; None where they are more than its audio tokens."""
        language = self.decoding.language or transcript.language or "Hebrew"
        text = " ".join(transcript.text.split())
        return align(self.model, self.prompts, features, self.decoding.context, language, text)

    @torch.no_grad()
    def likelihoods(self, features: list[np.ndarray], texts: list[list[str]], language: str) -> list[Likelihood]:
        """How likely the model finds each text, given as words, for the clip of its place: of all its beginnings."""
        end, rows, labels, counts = self.prompts.end_of_turn_id, [], [], []
        for feature, words in zip(features, texts, strict=True):
            prompt = self.prompts.prompt(feature.shape[1], self.decoding.context)
            prompt = prompt + self.prompts.language_prefix(language)
            tokens = [self.prompts.tokens(f" {word}" if number else word) for number, word in enumerate(words)]
            target = [*itertools.chain.from_iterable(tokens), end]
            rows.append(prompt + target)
            labels.append([IGNORED_LABEL] * len(prompt) + target)
            counts.append(np.cumsum([0, *map(len, tokens)]))
        clips, mask = padded(features)
        device = self.model.device
        with mixed_precision(self.model):
            hidden, targets = label_states(
                self.model,
                pad(rows, end).to(device),
                pad(labels, IGNORED_LABEL).to(device),
                to_encoder(self.model, clips),
                mask.to(device),
                attention_mask=pad([[1] * len(row) for row in rows], 0).to(device),
            )
        found, first = [], 0
        for places in counts:
            last = first + int(places[-1]) + 1
            nats = -(hidden[first:last].float() @ self.model.lm_head.weight.float().T).log_softmax(dim=1)
            words = nats.gather(1, targets[first:last, None])[:-1, 0].cumsum(0).cpu().numpy()
            found.append(Likelihood(np.concatenate([[0.0], words])[places], nats[places, end].cpu().numpy()))
            first = last
        return found


class PipelineModel:
    """Whisper and others, as transformers' own pipeline runs them."""

    decoding: Decoding
    files: str

    needs_language = True

    def __init__(self, name: str, decoding: Decoding, device: torch.device, bf16: bool):
        if decoding.context or decoding.temperature:
            raise InputError(f"{name}: only Qwen3-ASR takes a context, and is sampled from")
        self.decoding, self.dtype = decoding, "bfloat16" if bf16 else "float32"
        known = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
        is_ctc = known in MODEL_FOR_CTC_MAPPING_NAMES
        kind = transformers.AutoModelForCTC if is_ctc else transformers.AutoModelForSpeechSeq2Seq
        model, loaded = kind.from_pretrained(
            name, dtype=getattr(torch, self.dtype), output_loading_info=True, trust_remote_code=False
        )
        check_whole(name, loaded)
        self.pipeline = transformers.pipeline(
            "automatic-speech-recognition",
            model=model,
            tokenizer=transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False),
            feature_extractor=transformers.AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False),
            device=device,
        )
        self.takes_language = model.config.model_type == "whisper" and can_be_told_a_language(
            model.generation_config, self.pipeline.tokenizer
        )

    def settings(self) -> dict[str, Any]:
        """Of `generate`. Whisper gets task and language always: what it guesses of a short clip makes it loop."""
        if not self.pipeline.model.can_generate():
            return {}
        settings: dict[str, Any] = {"num_beams": self.decoding.num_beams}
        if self.takes_language:
            settings |= {"language": (self.decoding.language or HEBREW).lower(), "task": "transcribe"}
        if self.decoding.max_new_tokens:
            settings |= {"max_new_tokens": self.decoding.max_new_tokens}
        return {"generate_kwargs": settings}

    def features(self, waveform: np.ndarray) -> np.ndarray:
        return waveform

    def transcribe(self, features: list[np.ndarray], seconds: list[float]) -> list[Transcript]:
        heard = [{"raw": waveform, "sampling_rate": SAMPLE_RATE} for waveform in features]
        outputs = self.pipeline(heard, batch_size=len(heard), **self.settings())
        return [Transcript(output["text"].strip(), None, truncated=None) for output in outputs]

    def word_starts(self, features: np.ndarray, transcript: Transcript) -> None:
        return None


def transcribe_as_it_fits(model: Transcriber, features: list[Any], seconds: list[float]) -> list[Transcript | None]:
    """Transcribes a batch, in halves where it does not fit the device's memory; None: not even alone."""
    given = {"features": features, "seconds": seconds}
    parts = as_it_fits(lambda part: model.transcribe(**part), given)
    return [transcript for _, transcripts in parts for transcript in transcripts or [None]]


def can_be_told_a_language(config: transformers.GenerationConfig, tokenizer: Any) -> bool:
    """Whether a Whisper knows several languages; older checkpoints do not say where its tokens of them are."""
    known = tokenizer.get_vocab()
    if not getattr(config, "is_multilingual", "<|transcribe|>" in known):
        return False
    if not hasattr(config, "lang_to_id"):
        config.is_multilingual = True
        config.lang_to_id = {token: known[token] for code in LANGUAGES if (token := f"<|{code}|>") in known}
        config.task_to_id = {task: known[f"<|{task}|>"] for task in TASK_IDS if f"<|{task}|>" in known}
        config.no_timestamps_token_id = known["<|notimestamps|>"]
    return True


# --------------------------------------------------------------------------------------------------- Pieces and batches
def cut_at_pauses(waveform: np.ndarray, longest: float) -> list[tuple[float, float]]:
    """Divides a waveform (samples,) at 16 kHz into stretches of at most `longest` seconds.

    Each cut is at the quietest moment of the second half of what would still fit. Returns (start, end) in seconds.
    """
    frames = len(waveform) // FRAME
    power = np.square(waveform[: frames * FRAME], dtype=np.float64).reshape(frames, FRAME).mean(axis=1)
    loudness = np.convolve(power, np.ones(PAUSE_FRAMES) / PAUSE_FRAMES, mode="same")
    total, most, cuts = len(waveform) / SAMPLE_RATE, int(longest * SAMPLE_RATE / FRAME), [0]
    while total - cuts[-1] * FRAME / SAMPLE_RATE > longest:
        first = cuts[-1] + most // 2
        cuts.append(first + int(np.argmin(loudness[first : cuts[-1] + most])))
    edges = [cut * FRAME / SAMPLE_RATE for cut in cuts] + [total]
    return list(itertools.pairwise(edges))


def plan(rows: SpeechRows, longest: float, workers: int) -> list[Piece]:
    """The pieces of a set: whole recordings where they are short enough, and those between pauses of the others."""

    def cut(number: int) -> list[tuple[float, float]]:
        row = rows[number]
        return cut_at_pauses(decode_audio(row["audio"], row["start"], row["end"]), longest)

    is_long = rows.seconds > longest
    starts, ends = rows.column("start"), rows.column("end")
    pieces = [
        Piece(number, 0, starts[number], ends[number], float(rows.seconds[number]))
        for number in np.flatnonzero(~is_long).tolist()
    ]
    long = np.flatnonzero(is_long).tolist()
    for number, stretches in zip(long, in_processes(long, cut, workers), strict=True):
        start = starts[number]
        pieces += [Piece(number, i, start + a, start + b, b - a) for i, (a, b) in enumerate(stretches)]
    return pieces


def batches_of(pieces: list[Piece], batch_seconds: float) -> list[list[Piece]]:
    """Longest first, in batches of at most `batch_seconds` with padding; the same for every number of processes."""
    batches: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: (-piece.seconds, piece.number, piece.place)):
        fits = batches and (len(batches[-1]) + 1) * batches[-1][0].seconds <= batch_seconds
        if fits and len(batches[-1]) < MOST_AT_ONCE:
            batches[-1].append(piece)
        else:
            batches.append([piece])
    return batches


def estimated_snr(waveform: np.ndarray) -> float | None:
    """Power of the loudest tenth of the frames of 20 ms over that of the quietest, in dB; None where it is silent.

    An estimate from one clip: pauses shorter than a frame, and noise that comes and goes, are taken for speech.
    """
    frames = len(waveform) // FRAME
    if frames < 10:
        return None
    power = np.square(waveform[: frames * FRAME], dtype=np.float64).reshape(frames, FRAME).mean(axis=1)
    quiet, loud = np.percentile(power, [10, 90])
    return 10 * math.log10(loud / max(quiet, 1e-10)) if loud > 1e-10 else None


# --------------------------------------------------------------------------------------------------- Transcribing a set
def key(model: Transcriber, decoding: Decoding, rows: SpeechRows) -> str:
    """Names what transcripts depend on: the weights, the audio, how they are written, and the code between them.

    The weights are those that were loaded, whatever has become of their files since.
    """
    code = [transformers.__version__, *(Path(file).read_text(encoding="utf-8") for file in CODE)]
    audio = [rows.column("digest"), rows.column("end")]
    return digest(json.dumps([model.files, model.dtype, dataclasses.asdict(decoding), audio, code]).encode())


def read_lines(folder: Path) -> Iterator[dict[str, Any]]:
    """The batches on disk; a line that an interruption tore is left out, and its batch is done again."""
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_bytes().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue


def transcribe_set(
    model: Transcriber,
    rows: SpeechRows,
    decoding: Decoding,
    folder: Path,
    rank: int,
    processes: int,
    workers: int,
    hides_progress: bool,
) -> None:
    """Transcribes this process's share of the batches that are not in `folder` yet, and appends them to it.

    A batch that does not fit the device's memory is done in halves; raises OutOfMemoryError where a single piece is too
    much for it.
    """
    pieces = plan(rows, decoding.longest_seconds, workers)
    batches, counts = batches_of(pieces, decoding.batch_seconds), Counter(p.number for p in pieces)
    done = {tuple(piece) for line in read_lines(folder) for piece in line["pieces"]}
    left = [b for b in batches[rank::processes] if not all((p.number, p.place) in done for p in b)]

    def hear(batch: list[Piece]) -> list[tuple[Any, float | None]]:
        waveforms = [decode_audio(rows[p.number]["audio"], p.start, p.end, may_cancel=True) for p in batch]
        return [(model.features(waveform), estimated_snr(waveform)) for waveform in waveforms]

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    total, hides_progress = sum(p.seconds for batch in left for p in batch), hides_progress or not left
    began = time.perf_counter()
    with (
        (folder / f"{rank}.jsonl").open("a", encoding="utf-8") as file,
        Bar(total=total, desc="transcribing", disable=hides_progress, bar_format=PROGRESS) as bar,
    ):
        file.write("\n" if file.tell() else "")  # after a torn line
        for batch, heard in zip(left, in_processes(left, hear, workers), strict=True):
            found = transcribe_as_it_fits(model, [features for features, _ in heard], [p.seconds for p in batch])
            transcripts = [transcript for transcript in found if transcript is not None]
            if len(transcripts) < len(batch):
                raise torch.OutOfMemoryError(
                    f"{batch[0].seconds:.0f} s of audio do not fit the memory alone: lower longest_seconds"
                )
            now = time.perf_counter()
            line = {
                "pieces": [(p.number, p.place) for p in batch],
                "of": [counts[p.number] for p in batch],
                "transcripts": [dataclasses.astuple(transcript) for transcript in transcripts],
                "seconds": [p.seconds for p in batch],
                "snr_db": [snr for _, snr in heard],
                "took_seconds": now - began,
                "peak_memory_gb": peak_memory_gb(),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            began = now
            bar.update(sum(p.seconds for p in batch))


def transcribe_shares(
    model: Transcriber, rows: SpeechRows, place: Path, state: accelerate.PartialState, workers: int
) -> Path:
    """Transcribes a set as `model.decoding` says, each process its share, but for what `place` has of it already.

    Returns:
        The folder below `place` that `read_transcripts` reads; every process is done when the first one returns.

    Raises:
        InputError: on every process, when the model cannot transcribe the set.
    """
    (name,) = broadcast_object_list([key(model, model.decoding, rows)])
    parts = place / "transcripts" / name
    parts.mkdir(parents=True, exist_ok=True)
    state.wait_for_everyone()
    rank, processes = state.process_index, state.num_processes
    with fail_together(), transcription_problems():
        transcribe_set(model, rows, model.decoding, parts, rank, processes, workers, hides_progress=rank > 0)
    return parts


def peak_memory_gb() -> float:
    """Of the GPU, or of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@dataclass(frozen=True)
class Transcribed:
    """A set as a model wrote it."""

    transcripts: list[Transcript]
    snr_db: list[float | None]
    audio_seconds_per_second: float | None
    """Of one process; None where the transcripts were made elsewhere, and so is the memory."""
    peak_memory_gb: float | None


def read_transcripts(folder: Path, count: int) -> Transcribed:
    """Joins the pieces of each of `count` recordings; raises InputError when one is missing."""
    pieces: dict[tuple[int, int], tuple[Transcript, float, float | None]] = {}
    counts: dict[int, int] = {}  # pieces of each recording
    took = heard = peak = 0.0
    for line in read_lines(folder):
        found = [Transcript(*transcript) for transcript in line["transcripts"]]
        places = list(map(tuple, line["pieces"]))
        counts |= {number: of for (number, _), of in zip(places, line["of"], strict=True)}
        pieces |= dict(zip(places, zip(found, line["seconds"], line["snr_db"], strict=True), strict=True))
        took, heard = took + line["took_seconds"], heard + sum(line["seconds"])
        peak = max(peak, line["peak_memory_gb"])
    by_recording: dict[int, list] = {}
    for (number, _), piece in sorted(pieces.items()):
        by_recording.setdefault(number, []).append(piece)
    if missing := sum(len(by_recording.get(number, [])) != counts.get(number) for number in range(count)):
        raise InputError(f"{missing} transcripts are not in {folder}: is it on a file system that all machines share?")
    recordings = [by_recording[number] for number in range(count)]
    snrs = [[snr for *_, snr in mine if snr is not None] for mine in recordings]
    return Transcribed(
        transcripts=[joined(mine) for mine in recordings],
        snr_db=[float(np.median(mine)) if mine else None for mine in snrs],
        audio_seconds_per_second=heard / took if took else 0.0,
        peak_memory_gb=peak,
    )


def joined(pieces: list[tuple[Transcript, float, float | None]]) -> Transcript:
    """One transcript of a recording's pieces; its language is the one most of the audio was heard as."""
    seconds: defaultdict[str | None, float] = defaultdict(float)
    for transcript, length, _ in pieces:
        seconds[transcript.language] += length
    text = " ".join(transcript.text for transcript, *_ in pieces if transcript.text)
    known = [transcript.truncated for transcript, *_ in pieces if transcript.truncated is not None]
    truncated = any(known) if known else None
    return Transcript(text, max(seconds, key=lambda language: seconds[language]), truncated)


@contextlib.contextmanager
def transcription_problems():
    """Turns what one set can fail by, after it was loaded, into one message."""
    try:
        yield
    except (AudioError, ValueError, torch.OutOfMemoryError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"transcribing failed: {lines[-1]}") from error
