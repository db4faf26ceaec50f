"""Corpora of Hebrew speech: from a Hub id or a folder to rows whose text is what is spoken in their audio.

Imports nothing of this project.
"""

import io
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000  # Hz, what Qwen3ASRFeatureExtractor was trained with


class InputError(Exception):
    """A problem with input or settings that its user can mend; shown as one message, without a traceback."""


@dataclass
class Source:
    """One dataset of recordings with transcripts."""

    path: str
    """Hub id, a parquet file, or a folder: of parquet files, of `save_to_disk`, or of audio with a metadata.csv or
    .jsonl that has a column `file_name`."""
    config_name: str | None = None
    split: str = "train"
    """A split, or a slice of one as `datasets` writes it (`train[:1000]`); folders name theirs in the file names."""
    text_column: str | None = None
    """The transcript's column; None takes the first of transcript, text, sentence, transcription."""


@dataclass
class DataConfig:
    """What is trained and evaluated on; TrainingConfig adds the rest of the settings."""

    train_sources: list[Source] = field(
        default_factory=lambda: [
            Source("ivrit-ai/crowd-transcribe-v5"),
            Source("ivrit-ai/crowd-recital-whisper-training"),
        ]
    )
    eval_sources: list[Source] = field(default_factory=list)
    """Evaluated while training and at the end; empty: whole recordings are held out of the training sources."""
    eval_fraction: float = 0.02
    """Share of recordings held out when there is no evaluation source."""
    max_eval_utterances: int | None = 2000
    """At most so many utterances are evaluated, spread evenly over the set; None: all."""
    min_audio_length_seconds: float = 0.3
    """Shorter training utterances are dropped; evaluation sets keep every length."""
    max_audio_length_seconds: float = 30.0
    """Longer training utterances are dropped."""
    quote_style: str = "ascii"
    """Geresh and gershayim in targets: `ascii` writes ' and ", which the leaderboard's rules delete; `keep` leaves
    them (they turn ׳ and ״ into spaces, so the two forms are different words to the metric)."""
    preprocessing_num_workers: int = 8
    """Processes that read headers and transcripts at the start."""


TIMESTAMP = re.compile(r"<\|(\d+\.\d+)\|>")
INVISIBLE = re.compile("[\u061c\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
ASCII_QUOTES = str.maketrans({"׳": "'", "״": '"', "’": "'", "‘": "'", "“": '"', "”": '"', "„": '"'})


def clean_transcript(text: str, quote_style: str) -> str:
    """Returns a target: NFC, without invisible marks, with single spaces, and with quotes in one style."""
    text = INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    if quote_style == "ascii":
        text = text.translate(ASCII_QUOTES)
    return " ".join(text.split())


def read_timestamps(transcript: str) -> tuple[str, float | None]:
    """Splits a transcript into its words and the time in seconds until which they hold.

    The corpora write `<|0.00|>text<|2.40|><|2.40|>more<|5.00|>`. A segment that goes on after the slice's end leaves
    a start without text: its speech is in the audio and not in the text, so the audio holds only until the last
    closed segment. Without such an open segment, and without timestamps, the end is None: all of the audio counts.

    Raises:
        ValueError: timestamps that go backwards, or text outside of any segment.
    """
    parts = TIMESTAMP.split(transcript)  # text, time, text, time, …, text
    if len(parts) == 1:
        return transcript, None
    texts, times = parts[0::2], [float(t) for t in parts[1::2]]
    if times != sorted(times):
        raise ValueError("timestamps go backwards")
    between = texts[2:-1:2]  # between one segment's end and the next one's start
    if texts[0].strip() or any(text.strip() for text in between):
        raise ValueError("text outside of the timestamps")
    is_open = len(times) % 2 == 1
    if not is_open:
        if texts[-1].strip():
            raise ValueError("text outside of the timestamps")
        return " ".join(texts[1::2]), None
    if texts[-1].strip():  # the last segment's words are there, only its end is not
        return " ".join(texts[1::2]), None
    return " ".join(texts[1:-1:2]), times[-2] if len(times) > 1 else 0.0


TEXT_COLUMNS = ("transcript", "text", "sentence", "transcription")


def load_source(source: Source) -> datasets.Dataset:
    """Loads one dataset with its audio left as compressed bytes; raises InputError with the remedy."""
    folder = Path(source.path)
    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            rows = saved_rows(source)
        elif folder.suffix == ".parquet":
            rows = datasets.load_dataset("parquet", data_files=source.path, split=source.split)
        elif any(folder.glob("**/*.parquet")):
            rows = datasets.load_dataset(source.path, source.config_name, split=source.split)
        elif folder.is_dir():
            rows = manifest_rows(source)
        elif source.path.startswith((".", "/", "~")):
            raise InputError(f"{source.path}: no such folder")
        else:
            rows = datasets.load_dataset(source.path, source.config_name, split=source.split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise InputError(
            f"{source.path}: {error}. If it is gated, accept its terms on its page and log in with `uv run hf auth"
            " login` or HF_TOKEN; if it is a folder, the path is wrong"
        ) from error
    except RuntimeError as error:
        raise InputError(f"{source.path}: {error}. Use the dataset's parquet revision or a local copy") from error
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise InputError(f"{source.path}: {str(cause).splitlines()[0]}") from error
    if "audio" not in rows.column_names:
        raise InputError(f"{source.path}: no column `audio`, there are {', '.join(rows.column_names)}")
    is_audio = isinstance(rows.features["audio"], datasets.Audio)
    return rows.cast_column("audio", datasets.Audio(decode=False)) if is_audio else rows


def saved_rows(source: Source) -> datasets.Dataset:
    """What `save_to_disk` wrote: one split, or a dictionary of them."""
    saved = datasets.load_from_disk(source.path)
    if isinstance(saved, datasets.DatasetDict):
        if source.split not in saved:
            raise InputError(f"{source.path}: no split {source.split!r}, there are {', '.join(saved)}")
        return saved[source.split]
    if source.split not in ("train", str(saved.split)):
        raise InputError(f"{source.path} is one saved split: leave `split` out, got {source.split!r}")
    return saved


def manifest_rows(source: Source) -> datasets.Dataset:
    """A folder of audio files with a metadata.csv or metadata.jsonl, in it or in its subfolder `split`.

    `datasets`' own audiofolder gives the same rows, but needs torchcodec and FFmpeg to build them.
    """
    inside = Path(source.path) / source.split
    folder = inside if inside.is_dir() else Path(source.path)
    manifests = {folder / "metadata.csv": "csv", folder / "metadata.jsonl": "json"}
    found = [(file, kind) for file, kind in manifests.items() if file.exists()]
    if not found:
        raise InputError(f"{folder}: no parquet files, no saved dataset, no metadata.csv or metadata.jsonl")
    file, kind = found[0]
    table = datasets.load_dataset(kind, data_files=str(file), split="train")
    if "file_name" not in table.column_names:
        raise InputError(f"{file}: no column `file_name`, there are {', '.join(table.column_names)}")
    audio = [{"bytes": None, "path": str(folder / name)} for name in table["file_name"]]
    feature = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    return table.add_column("audio", audio, feature=feature)


def text_column(source: Source, columns: list[str]) -> str:
    wanted = [source.text_column] if source.text_column else TEXT_COLUMNS
    found = [name for name in wanted if name in columns]
    if not found:
        raise InputError(f"{source.path}: no column {' or '.join(wanted)}, there are {', '.join(columns)}")
    return found[0]


def describe_row(
    row: dict[str, Any], column: str, quote_style: str, shortest: float, longest: float, decode: bool
) -> dict[str, Any]:
    """Reads one row's text and audio header; `decode` also decodes the audio, so that nothing can fail later.

    Returns:
        `text` (the target), `reference` (the transcript as it stands, without timestamps), `seconds` (of audio they
        stand for), `ends_at` (seconds, where the audio is cut, or None), `recording` (what a split must not divide),
        and `dropped` (the reason why the row cannot be used, or "").
    """
    described = {"text": "", "reference": "", "seconds": 0.0, "ends_at": None, "recording": "", "dropped": ""}
    try:
        info = soundfile.info(open_audio(row["audio"]))
        described["seconds"] = info.frames / info.samplerate
        if decode:
            decode_audio(row["audio"], None)
    except (soundfile.LibsndfileError, OSError, TypeError):
        return described | {"dropped": "unreadable audio"}
    described["recording"] = recording_of(row)
    try:
        described["reference"], described["ends_at"] = read_timestamps(row[column] or "")
    except ValueError as error:
        return described | {"dropped": str(error)}
    if described["ends_at"] is not None:
        described["seconds"] = min(described["seconds"], described["ends_at"])
    described["text"] = clean_transcript(described["reference"], quote_style)
    if not described["text"]:
        described["dropped"] = "empty text"
    elif described["seconds"] < shortest:
        described["dropped"] = f"shorter than {shortest:g} s"
    elif described["seconds"] > longest:
        described["dropped"] = f"longer than {longest:g} s"
    return described


def recording_of(row: dict[str, Any]) -> str:
    metadata = row.get("metadata") or {}
    entry = metadata.get("entry_id") if isinstance(metadata, dict) else None
    return str(entry or row["audio"].get("path") or "")


def open_audio(audio: dict[str, Any]) -> io.BytesIO | str:
    """What soundfile opens for an undecoded Audio value: its bytes, or else its path; TypeError if there is neither."""
    return io.BytesIO(audio["bytes"]) if audio["bytes"] is not None else audio["path"]


def decode_audio(audio: dict[str, Any], ends_at: float | None) -> np.ndarray:
    """Decodes to a mono waveform at 16 kHz, float32 (samples,), cut at `ends_at` seconds."""
    waveform, rate = soundfile.read(open_audio(audio), dtype="float32", always_2d=True)
    waveform = waveform.mean(axis=1)
    if ends_at is not None:
        waveform = waveform[: round(ends_at * rate)]
    return waveform if rate == SAMPLE_RATE else soxr.resample(waveform, rate, SAMPLE_RATE)


@dataclass
class SpeechRows:
    """Rows of several sources that will be used, their targets beside them, and what was dropped."""

    audio: datasets.Dataset  # one column `audio`: {bytes, path}
    texts: list[str]  # targets
    references: list[str]  # transcripts as they stand, without timestamps: what hypotheses are scored against
    seconds: np.ndarray  # (rows,)
    ends_at: list[float | None]
    recordings: list[str]
    dropped: dict[str, tuple[int, float]]  # reason → utterances, hours

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: list[int]) -> "SpeechRows":
        return SpeechRows(
            self.audio.select(indices),
            [self.texts[i] for i in indices],
            [self.references[i] for i in indices],
            self.seconds[indices],
            [self.ends_at[i] for i in indices],
            [self.recordings[i] for i in indices],
            self.dropped,
        )

    @property
    def hours(self) -> float:
        return float(self.seconds.sum()) / 3600


def load_rows(sources: list[Source], config: DataConfig, for_training: bool) -> SpeechRows:
    """Loads and concatenates sources; raises InputError when one cannot be read or nothing of it is left.

    The length limits hold for training. Evaluation rows are decoded once, here, so that none can fail later.
    """
    settings = {
        "quote_style": config.quote_style,
        "shortest": config.min_audio_length_seconds if for_training else 0.0,
        "longest": config.max_audio_length_seconds if for_training else float("inf"),
        "decode": not for_training,
    }
    kept_audio, described = [], []
    dropped: Counter[str] = Counter()
    dropped_hours: Counter[str] = Counter()
    for source in sources:
        rows = load_source(source)
        table = described_rows(rows, settings | {"column": text_column(source, rows.column_names)}, source, config)
        reasons = table["dropped"][:]
        for reason, seconds in zip(reasons, table["seconds"][:], strict=True):
            if reason:
                dropped[reason] += 1
                dropped_hours[reason] += seconds / 3600
        kept = [i for i, reason in enumerate(reasons) if not reason]
        if not kept:
            raise InputError(f"{source.path}: none of its {len(rows)} rows can be used: {dict(Counter(reasons))}")
        kept_audio.append(rows.select_columns(["audio"]).select(kept))
        described.append(table.select(kept))
    table = datasets.concatenate_datasets(described)
    return SpeechRows(
        datasets.concatenate_datasets(kept_audio),
        table["text"][:],
        table["reference"][:],
        np.array(table["seconds"][:]),
        table["ends_at"][:],
        table["recording"][:],
        {reason: (count, dropped_hours[reason]) for reason, count in dropped.items()},
    )


def described_rows(
    rows: datasets.Dataset, settings: dict[str, Any], source: Source, config: DataConfig
) -> datasets.Dataset:
    """`describe_row` of every row, cached on disk by rows, settings and the text of this module.

    `datasets` would key the cache by the function's name, and give back the texts of an older version of it.
    """
    key = [rows._fingerprint, settings, Path(__file__).read_text(encoding="utf-8")]
    return rows.map(
        describe_row,
        fn_kwargs=settings,
        remove_columns=rows.column_names,
        features=datasets.Features(
            {name: datasets.Value("string") for name in ("text", "reference", "recording", "dropped")}
            | {name: datasets.Value("float64") for name in ("seconds", "ends_at")}
        ),
        num_proc=config.preprocessing_num_workers if len(rows) > 10_000 else None,
        new_fingerprint=datasets.fingerprint.Hasher.hash(key),
        desc=f"reading {source.path}",
    )


def load_train_and_eval(config: DataConfig, seed: int) -> tuple[SpeechRows, SpeechRows]:
    train = load_rows(config.train_sources, config, for_training=True)
    if config.eval_sources:
        heldout = load_rows(config.eval_sources, config, for_training=False)
    else:
        recordings = sorted(set(train.recordings))
        if len(recordings) < 2:
            raise InputError("eval_sources is empty and the training data is one recording: name an evaluation set")
        count = max(1, round(config.eval_fraction * len(recordings)))
        chosen = set(np.random.default_rng(seed).choice(recordings, count, replace=False).tolist())
        heldout = train.select([i for i, name in enumerate(train.recordings) if name in chosen])
        train = train.select([i for i, name in enumerate(train.recordings) if name not in chosen])
    if config.max_eval_utterances and len(heldout) > config.max_eval_utterances:
        heldout = heldout.select(np.linspace(0, len(heldout) - 1, config.max_eval_utterances).astype(int).tolist())
    return train, heldout
