"""Writing a corpus that training reads: parquet files with the columns of ivrit.ai's training sets."""

import io
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import soundfile

from hebrew_asr.data.audio import SAMPLE_RATE, decode_audio

ROWS_PER_FILE = 2000
SLICE_SECONDS = 30.0  # metadata.duration in ivrit.ai's sets, whatever the clip's own length
CORPUS = datasets.Features(
    {
        "audio": datasets.Audio(),
        "transcript": datasets.Value("string"),
        "metadata": {name: datasets.Value("float64") for name in ("seek", "duration", "quality_score")}
        | {name: datasets.Value("string") for name in ("source", "entry_id")},
        "has_prev": datasets.Value("bool"),
        "has_timestamps": datasets.Value("bool"),
        "prev_transcript": datasets.Value("string"),
    }
)


def whole_audio(audio: dict[str, Any]) -> dict[str, Any]:
    """A recording's bytes as they are."""
    content = audio["bytes"] or Path(audio["path"]).read_bytes()
    return {"bytes": content, "path": Path(str(audio["path"])).name}


def piece_of_audio(row: dict[str, Any], start: float, end: float | None) -> dict[str, Any]:
    """The seconds `start` to `end` of a row's recording, as FLAC."""
    file = io.BytesIO()
    soundfile.write(file, decode_audio(row["audio"], start, end), SAMPLE_RATE, format="FLAC")
    return {"bytes": file.getvalue(), "path": f"{row['recording']}-{start:.2f}.flac"}


def corpus_row(
    audio: dict[str, Any], text: str, start: float, confidence: float, source: str, recording: str
) -> dict[str, Any]:
    """A row of CORPUS; `start` is in seconds of the recording, the confidence becomes `quality_score`."""
    return {
        "audio": audio,
        "transcript": text,
        "metadata": {"seek": start, "duration": SLICE_SECONDS, "quality_score": confidence}
        | {"source": source, "entry_id": recording},
        "has_prev": False,
        "has_timestamps": False,
        "prev_transcript": "",
    }


def write_corpus(folder: Path, rows: Iterator[dict[str, Any]], count: int) -> None:
    """Parquet files in a folder that is there once all of them are."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    files = -(-count // ROWS_PER_FILE)
    for number in range(files):
        table = pyarrow.Table.from_pylist(list(itertools.islice(rows, ROWS_PER_FILE)), CORPUS.arrow_schema)
        name = f"train-{number:05}-of-{files:05}.parquet"
        pyarrow.parquet.write_table(table, unfinished / name, row_group_size=100)
    unfinished.rename(folder)
