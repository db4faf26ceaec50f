"""Where rows come from: folders, manifests, the Hub; and the settings of the data."""

import contextlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import datasets

from hebrew_asr.command_line import Range
from hebrew_asr.errors import InputError
from hebrew_asr.files import digest
from hebrew_asr.text.targets import TextRules


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
    eval_fraction: Annotated[float, Range(0, 1)] = 0.02
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


def content_of(audio: dict[str, Any]) -> str:
    """A digest of the audio's bytes; of a file its path, size and time of change, so that it need not be read."""
    if audio["bytes"]:
        return digest(audio["bytes"])
    path = os.path.abspath(str(audio["path"]))
    with contextlib.suppress(OSError):
        status = os.stat(path)
        path += f" {status.st_size} {status.st_mtime_ns}"
    return digest(path.encode())
