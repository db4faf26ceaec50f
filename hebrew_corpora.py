"""Corpora of Hebrew speech: from a Hub id or a folder to pieces of audio, each with exactly the text spoken in it.

At the start only texts and audio headers are read. What decoding alone can show (silence, clipping, truncation) is
found by the workers that decode, or beforehand by prepare_corpora.py. Imports nothing of the training scripts.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

import hebrew_audio
import hebrew_text
from hebrew_audio import SOUND_VERSION, AudioError, audio_header, check_waveform, decode_audio
from hebrew_text import SPOKEN, TextRules, clean_previous, cut_into_pieces, has_hebrew, normalize_target, read_segments


class InputError(Exception):
    """A problem with input or settings that its user can mend; shown as one message, without a traceback."""


@dataclass
class Source:
    """One dataset of recordings with transcripts."""

    path: str
    """Hub id, a parquet file, a .jsonl file with `audio` (a path) and `text`, or a folder: of parquet files, of
    `save_to_disk`, or of audio with a metadata.csv or .jsonl that has a column `file_name`."""
    config_name: str | None = None
    revision: str | None = None
    """Branch, tag or commit on the Hub; where a dataset is a script, `refs/convert/parquet` is the Hub's copy of it."""
    split: str = "train"
    """A split, or a slice of one as `datasets` writes it (`train[:1000]`); folders name theirs in the file names."""
    text_column: str | None = None
    """The transcript's column; None takes the first of transcript, text, sentence, transcription. Empty: there is none,
    or it is not to be read, for pseudo_label.py and where nobody speaks."""
    probability: float | None = None
    """Share of an epoch's utterances; for all sources or for none, where an epoch is every utterance once."""
    language: str | None = None
    """What is spoken, as Qwen3-ASR names it (`English`); `None`, its name for no speech: nobody speaks, and the right
    transcript is empty. Left out (null): the language of the run."""

    @property
    def has_speech(self) -> bool:
        return self.language != "None"

    def __str__(self) -> str:
        """The path, with what else tells it from another source."""
        extra = ", ".join(filter(None, [self.config_name, self.split if self.split != "train" else None]))
        return f"{self.path} ({extra})" if extra else self.path


@dataclass
class DataConfig:
    """What is trained and evaluated on; TrainingConfig adds the rest of the settings."""

    train_sources: list[Source] = field(
        default_factory=lambda: [
            Source("ivrit-ai/crowd-transcribe-v5", probability=0.97),
            Source("ivrit-ai/crowd-recital-whisper-training", probability=0.03),
        ]
    )
    eval_sources: list[Source] = field(default_factory=list)
    """Evaluated while training and at the end; empty: whole recordings are held out of the training sources."""
    eval_fraction: float = 0.02
    """Share of recordings held out when there is no evaluation source."""
    max_eval_utterances: int | None = 2000
    """At most so many utterances are evaluated, spread evenly over the set; None: all."""
    text_rules: TextRules = field(default_factory=TextRules)
    """How targets are written; scoring has rules of its own."""
    prev_context_prob: float = 0.0
    """How often the text before an utterance is given in the system turn, where Qwen3-ASR takes context."""

    # Training utterances outside of these are dropped and counted; evaluation sets keep whatever has text and decodes
    min_audio_length_seconds: float = 0.3
    max_audio_length_seconds: float = 30.0
    """Longer rows are cut between their timestamps; without timestamps they are dropped."""
    min_characters_per_second: float = 1.0
    max_characters_per_second: float = 40.0
    min_quality_score: float | None = None
    """Of `metadata.quality_score`, where a row has one."""
    require_hebrew: bool = True
    drop_duplicates: bool = True
    """The same audio bytes a second time, in the same source or another."""
    leak_min_words: int = 4
    """A training utterance with the same words as an evaluation utterance of at least so many is removed."""
    audit_scores: str | None = None
    """Scores that audit_corpus.py wrote; with drop_worst_share, what is most likely a wrong transcript is dropped."""
    drop_worst_share: float = 0.0
    """Share of the audited utterances."""
    max_broken_share: float = 0.05
    """More unreadable rows than this share of a source end the run before it starts."""
    streaming: bool = False
    """Training data is read while it is trained on, for corpora that do not fit the disk: see corpus_stream.py."""
    steps_per_epoch: int | None = None
    """Steps that are called an epoch when streaming, where nobody knows how many there are."""
    preprocessing_num_workers: int = 8
    """Processes that read headers and transcripts at the start, and the audio in `--prepare`."""
    prepared_dir: str | None = None
    """Where `--prepare` keeps what it heard; None: beside a local corpus, in the cache of `datasets` for the Hub's."""

    def check_sources(self) -> None:
        """Raises InputError for a mixture that is none."""
        if not self.train_sources:
            raise InputError("train_sources is empty: name at least one dataset")
        for source in [*self.train_sources, *self.eval_sources]:
            if source.language is not None and not re.fullmatch("[A-Z][a-z]+", source.language):
                raise InputError(f"{source}: language is {source.language!r}, must be a name like English, or None")
        if self.eval_sources and not any(source.has_speech for source in self.eval_sources):
            raise InputError("nobody speaks in eval_sources, so there is no error rate: name a set with speech")
        if not 0 <= self.drop_worst_share < 1 or (self.audit_scores is None) != (self.drop_worst_share == 0):
            raise InputError("audit_scores and drop_worst_share (above 0, below 1) go together: give both or neither")
        if self.streaming:
            self._check_streaming()
        given = [source.probability for source in self.train_sources if source.probability is not None]
        if given and (len(given) < len(self.train_sources) or min(given) <= 0 or abs(sum(given) - 1) > 1e-6):
            raise InputError(
                f"the sources' probabilities must be above 0, given for all of them, and sum to 1: {given} for"
                f" {len(self.train_sources)} sources"
            )

    def _check_streaming(self) -> None:
        needed = {
            "eval_sources (nothing can be held out of a stream)": bool(self.eval_sources),
            "steps_per_epoch (at least 1)": (self.steps_per_epoch or 0) >= 1,
            "a probability for each of its sources": len(self.train_sources) == 1
            or all(source.probability for source in self.train_sources),
            "audit_scores left out": self.audit_scores is None,
        }
        if missing := [name for name, is_there in needed.items() if not is_there]:
            raise InputError(f"streaming needs {', and '.join(missing)}")


# -------------------------------------------------------------------------------------------------------- Loading rows

STREAM_SHARDS = 64  # of a local dataset that is not in parquet files, when it is streamed
TEXT_COLUMNS = ("transcript", "text", "sentence", "transcription")


def load_source(source: Source, streaming: bool = False) -> datasets.Dataset | datasets.IterableDataset:
    """Loads one dataset with its audio left as compressed bytes; raises InputError with the remedy."""
    folder, how = Path(source.path), {"split": source.split, "streaming": streaming}
    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            rows = saved_rows(source)
        elif folder.suffix == ".parquet":
            rows = datasets.load_dataset("parquet", data_files=source.path, **how)
        elif folder.suffix == ".jsonl":
            rows = listed_rows(source)
        elif any(folder.glob("**/*.parquet")):
            rows = datasets.load_dataset(source.path, source.config_name, **how)
        elif folder.is_dir():
            rows = manifest_rows(source)
        elif source.path.startswith((".", "/", "~")) and not folder.exists():
            raise InputError(f"{source.path}: no such folder")
        else:
            rows = datasets.load_dataset(**hub_arguments(source), **how)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise InputError(
            f"{source.path}: {error}. If it is gated, accept its terms on its page and log in with `uv run hf auth"
            " login` or HF_TOKEN; if it is a folder, the path is wrong"
        ) from error
    except RuntimeError as error:
        raise InputError(
            f"{source.path}: {error}. Give the source `revision: refs/convert/parquet`, the Hub's own copy as parquet,"
            " or the path of a local copy in one of the forms that the README names"
        ) from error
    except (ValueError, OSError, StopIteration, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise InputError(f"{source.path}: {(str(cause).splitlines() or ['it has no rows'])[0]}") from error
    if streaming and isinstance(rows, datasets.Dataset):
        rows = rows.to_iterable_dataset(num_shards=min(STREAM_SHARDS, max(1, len(rows))))
    if rows.features is None:
        rows = rows._resolve_features()
    if "audio" not in rows.column_names:
        raise InputError(f"{source.path}: no column `audio`, there are {', '.join(rows.column_names)}")
    is_audio = isinstance(rows.features["audio"], datasets.Audio)
    if not is_audio and not {"bytes", "path"} <= set(getattr(rows.features["audio"], "keys", tuple)()):
        raise InputError(f"{source.path}: its column `audio` holds {rows.features['audio']}, no audio")
    return rows.cast_column("audio", datasets.Audio(decode=False)) if is_audio else rows


def hub_arguments(source: Source) -> dict[str, Any]:
    """What `datasets.load_dataset` takes for a Hub id; in the Hub's parquet copies a config is a folder."""
    config = {"data_dir" if source.revision == "refs/convert/parquet" else "name": source.config_name}
    return {"path": source.path, "revision": source.revision} | config


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
    name, bracket, part = source.split.partition("[")
    inside = Path(source.path) / name
    folder = inside if inside.is_dir() else Path(source.path)
    if folder != inside and name != "train":
        raise InputError(f"{source.path}: no split {name!r}: a folder of audio has its splits in subfolders")
    manifests = {folder / "metadata.csv": "csv", folder / "metadata.jsonl": "json"}
    found = [(file, kind) for file, kind in manifests.items() if file.exists()]
    if not found:
        raise InputError(f"{folder}: no parquet files, no saved dataset, no metadata.csv or metadata.jsonl")
    file, kind = found[0]
    table = datasets.load_dataset(kind, data_files=str(file), split=f"train{bracket}{part}")
    if "file_name" not in table.column_names:
        raise InputError(f"{file}: no column `file_name`, there are {', '.join(table.column_names)}")
    return with_audio_files(table, folder, table["file_name"])


def listed_rows(source: Source) -> datasets.Dataset:
    """The official script's JSONL: `audio`, a path (a relative one begins beside the file), and `text`."""
    table = datasets.load_dataset("json", data_files=source.path, split=source.split)
    if missing := {"audio", source.text_column or "text"} - set(table.column_names):
        raise InputError(
            f"{source.path}: no column {' and '.join(sorted(missing))}, there are {', '.join(table.column_names)}"
        )
    return with_audio_files(table.remove_columns("audio"), Path(source.path).parent, table["audio"])


def with_audio_files(table: datasets.Dataset, folder: Path, names: Iterable[Any]) -> datasets.Dataset:
    """The files' sizes and times are part of the dataset's fingerprint: a file that was mended is read again."""
    audio = [{"bytes": None, "path": str(folder / str(name)) if name else None} for name in names]
    contents = [content_of(one) for one in audio]
    return table.add_column(
        "audio",
        audio,
        new_fingerprint=datasets.fingerprint.Hasher.hash([table._fingerprint, contents]),
        feature={"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
    )


def text_column(source: Source, columns: list[str]) -> str | None:
    if source.text_column == "":
        return None
    wanted = [source.text_column] if source.text_column else TEXT_COLUMNS
    found = [name for name in wanted if name in columns]
    if not found:
        raise InputError(f"{source.path}: no column {' or '.join(wanted)}, there are {', '.join(columns)}")
    return found[0]


# -------------------------------------------------------------------------------------------------- From rows to pieces

INDEX = datasets.Features(
    {
        "row": datasets.Value("int64"),  # in its source
        "start": datasets.Value("float64"),  # seconds, where the piece begins in the row's audio
        "end": datasets.Value("float64"),  # seconds; null: the audio's end
        "seconds": datasets.Value("float64"),
        "text": datasets.Value("string"),  # the target
        "reference": datasets.Value("string"),  # the transcript as it stands, without timestamps: for scoring
        "previous": datasets.Value("string"),  # the text before it, written like a target
        "recording": datasets.Value("string"),  # what a split must not divide
        "digest": datasets.Value("string"),  # of the audio's bytes, or its path, and where in it the piece begins
        "words": datasets.Value("string"),  # digest of the words alone, to find the same sentence elsewhere
        "word_count": datasets.Value("int32"),
        "language": datasets.Value("string"),  # as its source has it; null: the run's
        "dropped": datasets.Value("string"),  # why it cannot be used, or ""
    }
)
BROKEN = {  # reasons that count for max_broken_share
    "zero bytes of audio",
    "unreadable audio",
    "no samples of audio",
    "no such audio file",
    "damaged audio",
    "timestamps go backwards",
    "text outside of the segments",
    "unknown token in the text",
    "text is not a string",
    "truncated",  # these two only where the audio was listened to, see prepare_corpora.py
    "not finite",
}


@dataclass(frozen=True)
class RowSettings:
    """What decides how a row is read; part of the key of the cache."""

    column: str | None  # None: the transcript is not known
    text_rules: TextRules
    for_training: bool
    shortest: float  # seconds
    longest: float  # seconds
    slowest: float  # characters a second
    fastest: float  # characters a second
    min_quality: float | None
    require_hebrew: bool
    language: str | None

    @property
    def has_speech(self) -> bool:
        return self.language != "None"


def row_settings(source: Source, columns: list[str], config: DataConfig, for_training: bool) -> RowSettings:
    return RowSettings(
        column=text_column(source, columns),
        text_rules=config.text_rules,
        for_training=for_training,
        shortest=config.min_audio_length_seconds,
        longest=config.max_audio_length_seconds if for_training else float("inf"),
        slowest=config.min_characters_per_second,
        fastest=config.max_characters_per_second,
        min_quality=config.min_quality_score if for_training else None,
        require_hebrew=config.require_hebrew and source.language in (None, "Hebrew"),
        language=source.language,
    )


def describe_rows(rows: dict[str, list], numbers: list[int], settings: RowSettings) -> dict[str, list]:
    """Columns of INDEX for a batch of rows: one or more pieces each, and what is dropped of them with its reason."""
    described = []
    for i, number in enumerate(numbers):
        row = {name: values[i] for name, values in rows.items()}
        described += [{"row": number} | piece for piece in describe_row(row, settings)]
    return {name: [piece.get(name) for piece in described] for name in INDEX}


OFFICIAL_PREFIX = re.compile(r"^language [A-Za-z]+<asr_text>")  # of the targets in the official script's JSONL


def describe_row(row: dict[str, Any], settings: RowSettings) -> list[dict[str, Any]]:
    """Reads one row's text and audio header; evaluation audio is decoded once too, so that it cannot fail later."""
    known = {"start": 0.0, "text": "", "previous": "", "seconds": 0.0, "dropped": "", "language": settings.language}
    audio = row["audio"] or {"bytes": None, "path": None}
    transcript = "" if settings.column is None else row[settings.column]
    metadata = read_metadata(row.get("metadata"))
    known["recording"] = str(metadata.get("entry_id") or audio["path"] or "")
    content = content_of(audio)
    try:
        seconds, _, _ = audio_header(audio)
        known["seconds"] = seconds
        if not settings.for_training and (problem := check_waveform(decode_audio(audio), seconds)) in BROKEN:
            raise AudioError(problem)
        if not settings.has_speech:
            transcript = transcript or ""
        if not isinstance(transcript, str):
            raise ValueError("empty text" if transcript is None else "text is not a string")
        transcript = OFFICIAL_PREFIX.sub("", transcript)
        pieces, gaps = cut_into_pieces(read_segments(transcript), seconds, settings.longest)
    except ValueError as error:  # AudioError is one
        return [known | {"dropped": str(error)}]
    quality = metadata.get("quality_score")
    is_poor = settings.min_quality is not None and isinstance(quality, int | float) and quality < settings.min_quality
    described = [known | {"start": g.start, "seconds": g.end - g.start, "dropped": g.reason} for g in gaps]
    previous = row.get("prev_transcript")
    previous = clean_previous(previous, settings.text_rules) if isinstance(previous, str) else ""
    for piece in pieces:
        text = normalize_target(piece.text, settings.text_rules)
        words = [spoken for word in text.split() if (spoken := "".join(SPOKEN.findall(word)).lower())]
        length = (seconds if piece.end is None else piece.end) - piece.start
        dropped = "quality score too low" if is_poor else why_unusable(text, length, settings)
        described.append(
            known
            | {"start": piece.start, "end": piece.end, "seconds": length, "text": text, "previous": previous}
            | {"reference": piece.text, "dropped": dropped}
            | {"digest": f"{content} {piece.start:.2f}", "words": digest(" ".join(words).encode())}
            | {"word_count": len(words)}
        )
        previous = text
    return described


def read_metadata(metadata: Any) -> dict[str, Any]:
    """A row's metadata, which some corpora write as JSON; {} where it is neither that nor a struct."""
    if isinstance(metadata, str):
        with contextlib.suppress(ValueError):
            metadata = json.loads(metadata)
    return metadata if isinstance(metadata, dict) else {}


def content_of(audio: dict[str, Any]) -> str:
    """A digest of the audio's bytes; of a file its path, size and time of change, so that it need not be read."""
    if audio["bytes"]:
        return digest(audio["bytes"])
    path = os.path.abspath(str(audio["path"]))
    with contextlib.suppress(OSError):
        status = os.stat(path)
        path += f" {status.st_size} {status.st_mtime_ns}"
    return digest(path.encode())


DIGEST = 24  # characters of a digest


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=DIGEST // 2).hexdigest()


def why_unusable(text: str, seconds: float, settings: RowSettings) -> str:
    has_text = SPOKEN.search(text) is not None
    if settings.has_speech and not has_text and (settings.for_training or settings.column is not None):
        return "empty text"
    if not settings.for_training:
        return ""
    if has_text and not settings.has_speech:
        return "text where nobody speaks"
    if settings.require_hebrew and not has_hebrew(text):
        return "no Hebrew in the text"
    if seconds < settings.shortest or seconds <= 0:
        return f"shorter than {settings.shortest:g} s"
    if seconds > settings.longest + hebrew_text.PAST_THE_END:
        return f"longer than {settings.longest:g} s"
    if settings.has_speech and not settings.slowest <= len(text) / seconds <= settings.fastest:
        return f"not {settings.slowest:g}–{settings.fastest:g} characters a second"
    return ""


def why_unheard(waveform: np.ndarray, seconds: float, language: str | None) -> str | None:
    """`check_waveform`, for which silence is no problem where nobody speaks."""
    problem = check_waveform(waveform, seconds)
    return None if (problem, language) == ("silent", "None") else problem


def described(rows: datasets.Dataset, source: Source, settings: RowSettings, workers: int) -> datasets.Dataset:
    """`describe_rows` of a source, cached on disk by its rows, the settings and the text of these modules.

    `datasets` would key the cache by the function's name, and give back the texts of an older version of it.
    """
    code = [Path(file).read_text(encoding="utf-8") for file in (__file__, hebrew_text.__file__, hebrew_audio.__file__)]
    return rows.map(
        describe_rows,
        batched=True,
        batch_size=64,
        with_indices=True,
        fn_kwargs={"settings": settings},
        remove_columns=rows.column_names,
        features=INDEX,
        num_proc=workers if len(rows) > 10_000 else None,
        new_fingerprint=datasets.fingerprint.Hasher.hash([rows._fingerprint, repr(settings), code]),
        desc=f"reading {source.path}",
    )


@dataclass
class Dropped:
    """Pieces of one source left out for one reason."""

    source: str  # as `str(source)` has it
    reason: str
    utterances: int
    hours: float
    examples: list[str]  # recordings of the first few; of what leaks, of all


class SpeechRows:
    """Pieces of several sources that are used, by number, and what was dropped of the sources.

    The columns stay in the memory-mapped files of `datasets`; only which rows of them are used is held here.
    """

    def __init__(
        self,
        sources: list[datasets.Dataset],
        index: pyarrow.Table,
        used: np.ndarray,
        dropped: list[Dropped],
        seconds: np.ndarray | None = None,
    ):
        self.sources, self.index, self.used, self.dropped = sources, index, used, dropped
        self.notes: list[str] = []  # for the report's reader
        self.seconds = index["seconds"].to_numpy()[used] if seconds is None else seconds  # (pieces,)
        self.source_numbers = index["source"].to_numpy()[used]  # (pieces,)

    def __len__(self) -> int:
        return len(self.used)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One piece: the columns of INDEX, and `audio` with its compressed bytes."""
        (piece,) = self.index.slice(int(self.used[number]), 1).to_pylist()
        piece["seconds"] = float(self.seconds[number])
        return piece | {"audio": self.sources[piece["source"]][piece["row"]]["audio"]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))

    def arrow(self, name: str) -> pyarrow.ChunkedArray:
        return self.index[name].take(pyarrow.array(self.used))

    def column(self, name: str) -> list[Any]:
        return self.arrow(name).to_pylist()

    def keep(self, mask: np.ndarray) -> "SpeechRows":
        kept = SpeechRows(self.sources, self.index, self.used[mask], self.dropped, self.seconds[mask])
        kept.notes = self.notes
        return kept

    @property
    def hours(self) -> float:
        return float(self.seconds.sum()) / 3600


def load_rows(sources: list[Source], config: DataConfig, for_training: bool) -> SpeechRows:
    """Loads sources; raises InputError when one cannot be read, nothing of it is left, or too much of it is broken."""
    loaded, tables, dropped = [], [], []
    for number, source in enumerate(sources):
        rows = load_source(source)
        settings = row_settings(source, rows.column_names, config, for_training)
        wanted = {"audio", settings.column, "metadata", "prev_transcript"}
        rows = rows.select_columns([name for name in rows.column_names if name in wanted])
        table = described(rows, source, settings, config.preprocessing_num_workers).with_format("arrow")[:]
        found = list(tally(table, str(source)).values())
        if sum(drop.utterances for drop in found) == len(table):
            raise InputError(f"{source}: none of its {len(rows)} rows can be used: {counts(found)}")
        check_broken(source, found, len(rows), config.max_broken_share)
        loaded.append(rows.select_columns(["audio"]))
        tables.append(table.append_column("source", pyarrow.array(np.full(len(table), number, np.int32))))
        dropped += found
    index = pyarrow.concat_tables(tables)
    used = np.flatnonzero(pyarrow.compute.equal(index["dropped"], "").to_numpy())
    rows = SpeechRows(loaded, index, used, dropped)
    return without_duplicates(rows, sources) if for_training and config.drop_duplicates else rows


def total_dropped(rows: SpeechRows, source: Source) -> int:
    return sum(drop.utterances for drop in rows.dropped if drop.source == str(source))


def counts(dropped: list[Dropped]) -> dict[str, int]:
    return {drop.reason: drop.utterances for drop in dropped}


def check_broken(source: Source, dropped: list[Dropped], rows: int, share: float) -> None:
    """Raises InputError, with names, when more than `share` of a source's rows are broken."""
    broken = [drop for drop in dropped if drop.source == str(source) and drop.reason in BROKEN]
    if sum(drop.utterances for drop in broken) > share * rows:
        names = [name for drop in broken for name in drop.examples]
        raise InputError(
            f"{source}: {sum(drop.utterances for drop in broken)} of its {rows} rows are broken, more than"
            f" max_broken_share ({share:g}): {counts(broken)}, among them {', '.join(names[:5])}"
        )


def tally(table: pyarrow.Table, source: str) -> dict[str, Dropped]:
    """The dropped pieces of a described source, by reason."""
    found: dict[str, Dropped] = {}
    lost = table.filter(pyarrow.compute.not_equal(table["dropped"], "")).select(["dropped", "seconds", "recording"])
    for piece in lost.to_pylist():
        drop = found.setdefault(piece["dropped"], Dropped(source, piece["dropped"], 0, 0.0, []))
        drop.utterances += 1
        drop.hours += piece["seconds"] / 3600
        if len(drop.examples) < 5:
            drop.examples.append(piece["recording"])
    return found


def drop(
    rows: SpeechRows, sources: list[Source], is_dropped: np.ndarray, reason: str, named: int | None = 5
) -> SpeechRows:
    """Leaves pieces out, counted by source under `reason`, the recordings of the first `named` (None: all) listed."""
    for number, source in enumerate(sources):
        mine = is_dropped & (rows.source_numbers == number)
        if mine.any():
            lost = rows.keep(mine)
            names = SpeechRows(rows.sources, rows.index, lost.used[:named], []).column("recording")
            rows.dropped.append(Dropped(str(source), reason, len(lost), lost.hours, names))
    return rows.keep(~is_dropped) if is_dropped.any() else rows


def without_duplicates(rows: SpeechRows, sources: list[Source]) -> SpeechRows:
    digests = rows.arrow("digest").combine_chunks().dictionary_encode().indices.to_numpy()
    is_first = np.zeros(len(rows), bool)
    is_first[np.unique(digests, return_index=True)[1]] = True
    return drop(rows, sources, ~is_first, "duplicate audio")


# --------------------------------------------------------------------------------------------- What was heard before

PREPARED = pyarrow.schema(
    {
        "name": pyarrow.string(),  # of a piece of audio, see `piece_names`
        "seconds": pyarrow.float64(),  # as decoded
        "problem": pyarrow.string(),  # why it cannot be used, or ""
        "fingerprint": pyarrow.binary(),  # of its sound, one uint32 every 16 ms
    }
)
LEAKED = pyarrow.schema(
    {
        "name": pyarrow.string(),  # of a piece of training audio
        "recording": pyarrow.string(),  # of the evaluation utterance that sounds alike
        "bit_error_rate": pyarrow.float64(),
    }
)


HEARD = f"heard-{SOUND_VERSION}-*.parquet"


def prepared_folder(source: Source, config: DataConfig) -> Path:
    """Where prepare_corpora.py keeps what it heard of a source: heard-….parquet, leaks-<evaluation set>/….parquet."""
    local = Path(source.path).resolve()
    if config.prepared_dir is None and local.exists():  # beside a file it is hidden, or it would be data of its folder
        return local.with_name(f"{local.name}.prepared" if local.is_dir() else f".{local.name}.prepared")
    name = local.name if local.exists() else source.path.replace("/", "--")
    return Path(config.prepared_dir or Path(datasets.config.HF_DATASETS_CACHE) / "prepared") / f"{name}.prepared"


def piece_names(rows: SpeechRows) -> pyarrow.ChunkedArray:
    """A name for each piece of audio: the digest of its content and its start, and its end; no row or source."""
    ends = pyarrow.compute.round(rows.arrow("end"), 2).cast(pyarrow.string())
    return pyarrow.compute.binary_join_element_wise(rows.arrow("digest"), ends.fill_null("end"), " ")


def evaluation_key(heldout: SpeechRows) -> str:
    return digest("".join(sorted(heldout.column("digest"))).encode())


def read_parts(folders: list[Path], pattern: str, columns: pyarrow.Schema) -> pyarrow.Table:
    files = [file for folder in folders for file in sorted(folder.glob(pattern))]
    tables = [pyarrow.parquet.read_table(file, columns=columns.names) for file in files]
    return pyarrow.concat_tables([columns.empty_table(), *tables])


def with_prepared(train: SpeechRows, config: DataConfig) -> SpeechRows:
    """Uses what `--prepare` heard: exact durations, and what only decoding shows is dropped and counted.

    Pieces that were not listened to yet stay as their headers describe them.
    """
    folders = list(dict.fromkeys(prepared_folder(source, config) for source in config.train_sources))
    heard = read_parts(folders, HEARD, pyarrow.schema([PREPARED.field(i) for i in range(3)]))
    if not len(heard):
        return train
    places = pyarrow.compute.index_in(piece_names(train), heard["name"].combine_chunks())
    is_heard = pyarrow.compute.is_valid(places).to_numpy()
    places = places.fill_null(0).to_numpy()
    seconds = np.where(is_heard, heard["seconds"].to_numpy()[places], train.seconds)
    problems = np.where(is_heard, heard["problem"].to_numpy(zero_copy_only=False)[places], "")
    has_speech = np.array([source.has_speech for source in config.train_sources])[train.source_numbers]
    problems = np.where(~has_speech & (problems == "silent"), "", problems)
    sizes = np.bincount(train.source_numbers, minlength=len(config.train_sources)).tolist()
    sizes = [size + total_dropped(train, source) for size, source in zip(sizes, config.train_sources, strict=True)]
    train = SpeechRows(train.sources, train.index, train.used, train.dropped, seconds)
    train.notes.append(f"listened to before: {is_heard.mean():.1%} of the training utterances (--prepare)")
    characters = pyarrow.compute.utf8_length(train.arrow("text")).to_numpy()
    rate = characters / np.maximum(seconds, 1e-9)
    slowest, fastest = config.min_characters_per_second, config.max_characters_per_second
    reasons = {
        f"shorter than {config.min_audio_length_seconds:g} s": seconds < config.min_audio_length_seconds,
        f"longer than {config.max_audio_length_seconds:g} s": seconds
        > config.max_audio_length_seconds + hebrew_text.PAST_THE_END,
        f"not {slowest:g}–{fastest:g} characters a second": has_speech & ((rate < slowest) | (rate > fastest)),
    }
    for reason, is_so in reasons.items():
        problems = np.where(is_heard & is_so & (problems == ""), reason, problems)
    for reason in sorted(set(problems.tolist()) - {""}):
        mask = problems == reason
        train, problems = drop(train, config.train_sources, mask, reason), problems[~mask]
    for source, size in zip(config.train_sources, sizes, strict=True):
        check_broken(source, train.dropped, size, config.max_broken_share)
    return train


# --------------------------------------------------------------------------------------------- Split, leaks and mixture


def without_leaks(train: SpeechRows, heldout: SpeechRows, config: DataConfig) -> SpeechRows:
    """Removes training pieces with the words of an evaluation utterance, with its very bytes, or with its sound.

    The sound is compared by `--prepare`, so that it is found under another codec, rate or level.
    """
    contents = [pyarrow.compute.utf8_slice_codeunits(rows.arrow("digest"), 0, DIGEST) for rows in (train, heldout)]
    by_audio = pyarrow.compute.is_in(contents[0], contents[1].combine_chunks()).to_numpy()
    train = drop(train, config.train_sources, by_audio, "audio of an evaluation set", named=None)
    folders = list(dict.fromkeys(prepared_folder(source, config) for source in config.train_sources))
    compared = f"leaks-{evaluation_key(heldout)}"
    if leaks := sorted(read_parts(folders, f"{compared}/*.parquet", LEAKED)["name"].to_pylist()):
        by_sound = pyarrow.compute.is_in(piece_names(train), pyarrow.array(leaks)).to_numpy()
        train = drop(train, config.train_sources, by_sound, "sound of an evaluation set", named=None)
    parts = [part for folder in folders for part in folder.glob(HEARD)]
    if any(not (part.parent / compared / part.name).exists() for part in parts):
        train.notes.append("not all of it was compared by sound with this evaluation set: run --prepare again")
    is_long = pyarrow.compute.greater_equal(heldout.arrow("word_count"), config.leak_min_words)
    sentences = heldout.arrow("words").filter(is_long).combine_chunks()
    by_text = pyarrow.compute.is_in(train.arrow("words"), sentences).to_numpy()
    return drop(train, config.train_sources, by_text, "text of an evaluation set", named=None)


def worst(scores: pyarrow.Table, share: float) -> pyarrow.Table:
    """The utterances of an audit whose rank is within `share` of all that have one."""
    limit = round(share * (len(scores) - scores["rank"].null_count))
    return scores.filter(pyarrow.compute.less_equal(scores["rank"], limit))


def without_worst(train: SpeechRows, config: DataConfig) -> SpeechRows:
    """Drops what the audit ranks worst; a transcript that was corrected since has other words, and stays."""
    try:
        scores = pyarrow.parquet.read_table(config.audit_scores, columns=["digest", "words", "rank"])
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise InputError(f"{config.audit_scores} is no table of audit_corpus.py: {error}") from error

    def names(column: Callable[[str], pyarrow.ChunkedArray]) -> pyarrow.ChunkedArray:
        return pyarrow.compute.binary_join_element_wise(column("digest"), column("words"), " ")

    mine = names(train.arrow)
    if not pyarrow.compute.any(pyarrow.compute.is_in(mine, names(scores.column).combine_chunks())).as_py():
        raise InputError(f"{config.audit_scores}: none of its utterances is in train_sources")
    is_bad = pyarrow.compute.is_in(mine, names(worst(scores, config.drop_worst_share).column).combine_chunks())
    reason = f"among the audit's worst {config.drop_worst_share:.0%}"
    return drop(train, config.train_sources, is_bad.to_numpy(), reason)


def split(config: DataConfig, seed: int) -> tuple[SpeechRows, SpeechRows]:
    """Training and evaluation rows, as texts and headers describe them; leaks are still in."""
    train = load_rows(config.train_sources, config, for_training=True)
    if config.eval_sources:
        heldout = load_rows(config.eval_sources, config, for_training=False)
    else:
        is_own = pyarrow.compute.is_null(train.arrow("language"))  # an error rate is of one language
        recordings = sorted(train.arrow("recording").filter(is_own).unique().to_pylist())
        if len(recordings) < 2:
            raise InputError(
                f"eval_sources is empty, and the training data in the run's language has {len(recordings)} recordings:"
                " name an evaluation set"
            )
        count = max(1, round(config.eval_fraction * len(recordings)))
        chosen = set(np.random.default_rng(seed).choice(recordings, count, replace=False).tolist())
        is_heldout = pyarrow.compute.is_in(train.arrow("recording"), pyarrow.array(sorted(chosen)))
        is_heldout = pyarrow.compute.and_(is_heldout, is_own).to_numpy()
        heldout = SpeechRows(train.sources, train.index, train.used[is_heldout], [])
        train = drop(train, config.train_sources, is_heldout, "held out for evaluation")
    return train, heldout


def load_train_and_eval(config: DataConfig, seed: int) -> tuple[SpeechRows, SpeechRows]:
    train, heldout = split(config, seed)
    train = without_leaks(with_prepared(train, config), heldout, config)
    if config.audit_scores:
        train = without_worst(train, config)
    heldout = without_too_many(heldout, config)
    if not config.eval_sources:
        heldout = drop(heldout, config.train_sources, ~np.array([decodes(row) for row in heldout]), "does not decode")
    used = set(np.unique(train.source_numbers).tolist())
    if lost := [source.path for number, source in enumerate(config.train_sources) if number not in used]:
        raise InputError(f"nothing is left to train on of {', '.join(lost)}, after the split and the removal of leaks")
    return train, heldout


def without_too_many(heldout: SpeechRows, config: DataConfig) -> SpeechRows:
    """At most `max_eval_utterances`, spread over the set."""
    if not config.max_eval_utterances or len(heldout) <= config.max_eval_utterances:
        return heldout
    is_left_out = np.ones(len(heldout), bool)
    is_left_out[np.linspace(0, len(heldout) - 1, config.max_eval_utterances).astype(int)] = False
    reason = f"more than max_eval_utterances ({config.max_eval_utterances})"
    return drop(heldout, config.eval_sources or config.train_sources, is_left_out, reason)


def decodes(piece: dict[str, Any]) -> bool:
    try:
        return len(decode_audio(piece["audio"], piece["start"], piece["end"])) > 0
    except AudioError:
        return False


class Mixture:
    """Which utterances an epoch has, and in which order: a pure function of the epoch, the same on every process.

    Without probabilities an epoch is every utterance once. With them its sources have those shares, and it ends when
    the first source has been heard once; the others go on where they stopped in the next epoch.
    """

    def __init__(self, rows: SpeechRows, sources: list[Source], seed: int):
        self.seed = seed
        self.rows = [np.flatnonzero(rows.source_numbers == number) for number in range(len(sources))]
        sizes = np.array([len(mine) for mine in self.rows])
        self.counts = sizes  # utterances of each source in an epoch
        if sources[0].probability is not None:
            shares = np.array([source.probability for source in sources])
            self.counts = np.maximum(1, np.round(shares * np.min(sizes / shares))).astype(int)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def order(self, epoch: int) -> np.ndarray:
        """Numbers of the epoch's utterances (epochs from 1), shuffled."""
        chosen = [self.taken(number, (epoch - 1) * count, count) for number, count in enumerate(self.counts.tolist())]
        return np.random.default_rng([self.seed, epoch]).permutation(np.concatenate(chosen))

    def taken(self, number: int, begin: int, count: int) -> np.ndarray:
        """`count` utterances of a source from place `begin` of its endless passes, each pass another permutation."""
        mine, taken = self.rows[number], []
        while count:
            passed, place = divmod(begin, len(mine))
            here = np.random.default_rng([self.seed, number, passed, 1]).permutation(mine)[place : place + count]
            taken.append(here)
            begin, count = begin + len(here), count - len(here)
        return np.concatenate(taken)
