"""Where rows come from: folders, manifests, the Hub."""

import contextlib
import errno
import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from hebrew_asr.data import tables
from hebrew_asr.data.decoding import AUDIO_SUFFIXES
from hebrew_asr.data.sources import Source
from hebrew_asr.errors import InputError
from hebrew_asr.files import DIGEST, digest
from hebrew_asr.names import check_name

STREAM_SHARDS = 64  # of a local dataset that is not in parquet files, when it is streamed


def load_source(source: Source, streaming: bool = False) -> datasets.Dataset | datasets.IterableDataset:
    """Loads one dataset with its audio left as compressed bytes; raises InputError with the remedy."""
    folder, how = Path(source.path), {"split": source.split, "streaming": streaming}
    try:
        if source.is_saved:
            rows = saved_rows(source)
        elif folder.suffix == ".parquet":
            rows = datasets.load_dataset("parquet", data_files=source.path, **how, **parquet_form([source.path]))
        elif source.is_table:
            rows = table_rows(source)
        elif any(folder.glob("**/*.parquet")):
            given = datasets.load_dataset_builder(source.path, source.config_name).config.data_files or {}
            files = given.get(source.split.partition("[")[0], [])
            rows = datasets.load_dataset(source.path, source.config_name, **how, **parquet_form(files))
        else:
            cached = Path(datasets.config.HF_DATASETS_CACHE) / source.path.replace("/", "___")
            if not cached.exists():
                check_name(source.path, "dataset", (*tables.TABLE_SUFFIXES, *AUDIO_SUFFIXES))
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
        remedy = ""
        if isinstance(cause, OSError) and cause.errno == errno.ENOLCK:
            remedy = f" in {datasets.config.HF_DATASETS_CACHE}: set HF_DATASETS_CACHE to a folder on a local disk"
        raise InputError(f"{source.path}: {(str(cause).splitlines() or ['it has no rows'])[0]}{remedy}") from error
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


PARQUET_ROWS = 100  # read at once; `datasets` takes the first row group's size, which is 0 in an empty file


def parquet_form(files: list[str]) -> dict[str, Any]:
    """One form for files whose columns differ (more of them, null in one, fields first seen late), as `load_dataset`
    takes it, and a cache by their sizes and times; raises InputError with the file."""
    kinds: dict[str, list[pyarrow.DataType]] = {}
    for file in files:
        try:
            for column in pyarrow.parquet.read_schema(file):
                kinds.setdefault(column.name, []).append(column.type)
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(
                f"{file}: no Parquet file that can be read ({error}). Fetch it again, or remove it"
            ) from error
    schema = pyarrow.schema([(name, one_kind(types, name, files)) for name, types in kinds.items()])
    if not files:
        return {}
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "local" / digest("\n".join(map(file_state, files)).encode())
    features = datasets.Features.from_arrow_schema(schema)
    return {"features": features, "batch_size": PARQUET_ROWS, "cache_dir": str(cache)}


def one_kind(types: list[pyarrow.DataType], name: str, files: list[str]) -> pyarrow.DataType:
    """The type of a column of all files: a text where some have numbers; raises InputError where there is none."""
    known = [one for one in dict.fromkeys(types) if not pyarrow.types.is_null(one)]
    if len(known) < 2:
        return known[0] if known else pyarrow.string()
    try:
        schemas = [pyarrow.schema([(name, one)]) for one in known]
        return pyarrow.unify_schemas(schemas, promote_options="permissive").field(name).type
    except pyarrow.ArrowException as error:
        if any(pyarrow.types.is_nested(one) for one in known):
            raise InputError(
                f"{Path(files[0]).parent}: the column {name} is {known[0]} in one file and {known[1]} in another. Write"
                " them alike, or remove the column"
            ) from error
        return pyarrow.string()


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


def table_rows(source: Source) -> datasets.Dataset:
    """Rows of a table, or of a folder with tables; without any, the folder's audio files if `text_column` is empty.

    They are kept in the cache of `datasets`, by their content and the files' sizes and times: what is mended is read
    again. What is to be said of them is in the dataset's `info.description`.
    """
    path, (name, bracket, part) = Path(source.path), source.split.partition("[")
    further = ("prev_transcript", "metadata", "extra_data", *tables.GROUP_COLUMNS)
    wanted = list(dict.fromkeys([*filter(None, [source.text_column]), *tables.TEXT_COLUMNS, *further]))
    is_file = path.is_file()
    if is_file and name not in ("train", path.stem):
        raise InputError(f"{path}: no split {name!r}: a table is one split")
    folder = path / name if (path / name).is_dir() else path
    files = [path] if is_file else tables.tables_of(path, name)
    if not files and folder == path and name != "train":
        raise InputError(
            f"{path}: no split {name!r}: a folder of audio has its splits in subfolders, or a table of each"
        )
    if files:
        table = tables.read_tables(files, None if is_file else path, name, wanted, source.channel == "each")
        if not table.rows:
            raise InputError(f"{path}: it has no rows")
        column = text_column(source, [*table.columns, *(["text"] if "messages" in table.columns else [])], files[0])
    elif source.text_column != "" and source.has_speech:
        raise InputError(
            f"{folder}: no parquet files, no saved dataset, no table (metadata.csv, .tsv or .jsonl). Without"
            ' transcripts the audio itself can be transcribed: scripts/pseudo_label.py, or `text_column: ""`'
        )
    else:
        column, rows = None, [{"audio": file} for file in tables.audio_files(folder)]
        if not rows:
            raise InputError(f"{folder}: no audio files in it")
        table = tables.Table(rows, [])
    features = {
        "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        "segment_start": datasets.Value("float64"),
        "segment_end": datasets.Value("float64"),
        "segment_channel": datasets.Value("int32"),
        **dict.fromkeys(further, datasets.Value("string")),
    }
    if column:
        features[column] = (
            datasets.List(datasets.Value("string")) if source.channel == "each" else datasets.Value("string")
        )
    columns = {name: [row.get(name) for row in table.rows] for name in features}
    states = [file_state(file) for file in columns["audio"]]
    columns["audio"] = [{"bytes": None, "path": file} for file in columns["audio"]]
    key = datasets.fingerprint.Hasher.hash([columns, states])
    kept = Path(datasets.config.HF_DATASETS_CACHE) / "tables" / key
    if not kept.exists():
        rows = datasets.Dataset.from_dict(columns, datasets.Features(features))
        rows._fingerprint = key
        unfinished = kept.with_name(f"{key}.{os.getpid()}")
        rows.save_to_disk(unfinished)
        with contextlib.suppress(OSError):  # another process was first
            unfinished.rename(kept)
    rows = datasets.load_from_disk(kept)
    if bracket:
        (span,) = datasets.ReadInstruction.from_spec(f"train[{part}").to_absolute({"train": len(rows)})
        rows = rows.select(range(span.from_, span.to))
    rows.info.description = "\n".join(table.notes)
    return rows


@lru_cache(maxsize=4096)
def file_digest(path: str, _: str) -> str:
    """A digest of a file's bytes; the second argument is its state, under which this is remembered."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST // 2)).hexdigest()


def file_state(path: str | None) -> str:
    """A file's path, size and times; that of its change cannot be set back, as a copy sets that of its content."""
    if path is None:
        return ""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    return path


def content_of(audio: dict[str, Any]) -> str:
    """A digest of the audio's bytes, its file's if it has none itself: copies under another name are equal."""
    if audio["bytes"]:
        return digest(audio["bytes"])
    path = str(audio["path"])
    return file_digest(path, file_state(path)) if os.path.isfile(path) else digest(path.encode())


def text_column(source: Source, columns: list[str], file: Path | None = None) -> str | None:
    if source.text_column == "":
        return None
    wanted = [source.text_column] if source.text_column else tables.TEXT_COLUMNS
    found = [name for name in wanted if name in columns]
    if not found and not source.has_speech:
        return None
    if not found:
        raise InputError(
            f"{file or source.path}: no column {' or '.join(wanted)}, there are {', '.join(columns)}. Name the"
            " transcript's with `text_column`"
        )
    return found[0]
