"""One pass over the audio of the training corpora, kept beside them: what only decoding shows, and how it sounds.

    uv run train_round2_gradual.py --prepare

Later starts know each utterance's exact length, leave out what cannot be heard before the first step, and what sounds
like an utterance of the evaluation set. A second start goes on where the first one stopped, and listens only to what is
new; another evaluation set is compared without listening again. Imports nothing of the training scripts.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from hebrew_asr.console import Bar
from hebrew_asr.data.audio import SAMPLE_RATE, AudioError, check_waveform, decode_audio
from hebrew_asr.data.decoding import ReadError
from hebrew_asr.data.fingerprints import FingerprintIndex, fingerprint
from hebrew_asr.data.rows import SpeechRows
from hebrew_asr.data.selection import (
    HEARD,
    LEAKED,
    PREPARED,
    evaluation_key,
    piece_names,
    prepared_folder,
    read_parts,
    split,
)
from hebrew_asr.data.sources import DataConfig
from hebrew_asr.errors import InputError
from hebrew_asr.files import whole_or_nothing
from hebrew_asr.processes import in_processes

AT_ONCE = 32  # pieces that a process listens to before it reports
PART = 2048  # pieces of one file; an interruption loses at most so many


def waveform_of(piece: dict[str, Any]) -> np.ndarray:
    """A piece of audio, decoded; raises AudioError, and InputError for a file whose state is not to be remembered."""
    try:
        return decode_audio(piece["audio"], piece["start"], piece["end"])
    except ReadError as error:
        raise InputError(f"{piece['recording']}: {error}. Mend that and give the same command again") from error


def listen(piece: dict[str, Any]) -> tuple[float, str, bytes]:
    """Seconds as decoded, the problem or "", and the fingerprint of a piece of audio."""
    try:
        waveform = waveform_of(piece)
    except AudioError as error:
        return piece["seconds"], str(error), b""
    seconds = len(waveform) / SAMPLE_RATE
    if problem := check_waveform(waveform, piece["seconds"]):
        return seconds, problem, b""
    return seconds, "", fingerprint(waveform).tobytes()


def write_part(table: pyarrow.Table, file: Path) -> None:
    """Writes a file that is there in whole or not at all."""
    try:
        with whole_or_nothing(file) as unfinished:
            pyarrow.parquet.write_table(table, unfinished)
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}. Another place: --prepared_dir") from error


def listen_to(rows: SpeechRows, folder: Path, workers: int, label: str) -> int:
    """Listens to those pieces of one source that no part in `folder` has; returns how many there were."""
    names = piece_names(rows).to_pylist()
    known = set(read_parts([folder], HEARD, pyarrow.schema([PREPARED.field("name")]))["name"].to_pylist())
    left = [number for number, name in enumerate(names) if name not in known]
    chunks = [left[begin : begin + AT_ONCE] for begin in range(0, len(left), AT_ONCE)]
    results = in_processes(chunks, lambda chunk: [listen(rows[number]) for number in chunk], workers)
    found: list[tuple] = []
    first = 1 + max((int(file.stem.split("-")[2]) for file in folder.glob(HEARD)), default=0)
    with Bar(total=len(left), desc=f"listening to {label}", unit=" utterances") as bar:
        for i, (chunk, heard) in enumerate(zip(chunks, results, strict=True), start=1):
            found += [(names[number], *one) for number, one in zip(chunk, heard, strict=True)]
            bar.update(len(chunk))
            if len(found) >= PART or i == len(chunks):
                columns = dict(zip(PREPARED.names, map(list, zip(*found, strict=True)), strict=True))
                write_part(pyarrow.table(columns, schema=PREPARED), folder / HEARD.replace("*", f"{first:06}"))
                found, first = [], first + 1
    return len(left)


def evaluation_sounds(heldout: SpeechRows, workers: int) -> FingerprintIndex:
    """The evaluation set's fingerprints, by the recordings' names; clipped or short, what decodes has one."""

    def sound(number: int) -> bytes:
        try:
            waveform = waveform_of(heldout[number])
        except AudioError:  # held out of training: whether it can be heard, the run's start finds
            return b""
        return fingerprint(np.nan_to_num(waveform)).tobytes()

    index = FingerprintIndex()
    results = in_processes(list(range(len(heldout))), sound, workers)
    recordings = heldout.column("recording")
    for recording, sound in zip(recordings, Bar(results, "evaluation set", len(heldout)), strict=True):
        index.add(recording, np.frombuffer(sound, np.uint32))
    index.build()
    return index


def compare_with(index: FingerprintIndex, folder: Path, key: str, workers: int, label: str) -> None:
    """Looks the fingerprints in `folder` up in the evaluation set's, where that was not done before."""

    def leaks(part: Path) -> pyarrow.Table:
        table = pyarrow.parquet.read_table(part, columns=["name", "fingerprint"])
        found = []
        for name, sound in zip(table["name"].to_pylist(), table["fingerprint"].to_pylist(), strict=True):
            if matches := index.matches(np.frombuffer(sound, np.uint32)):
                found.append({"name": name, "recording": matches[0][0], "bit_error_rate": matches[0][1]})
        return pyarrow.Table.from_pylist(found, LEAKED)

    parts = sorted(folder.glob(HEARD))
    left = [part for part in parts if not (folder / f"leaks-{key}" / part.name).exists()]
    results = in_processes(left, leaks, workers)
    for part, table in zip(left, Bar(results, f"comparing {label}", len(left), unit=" files"), strict=True):
        write_part(table, folder / f"leaks-{key}" / part.name)


def prepare(config: DataConfig, seed: int, say: Callable[[str], None]) -> None:
    """Listens to every training utterance, and compares each with the evaluation set; raises InputError."""
    train, heldout = split(config, seed)
    workers = config.preprocessing_num_workers
    index, key = evaluation_sounds(heldout, workers), evaluation_key(heldout)
    for number, source in enumerate(config.train_sources):
        mine, folder = train.keep(train.source_numbers == number), prepared_folder(source, config)
        new = listen_to(mine, folder, workers, str(source))
        compare_with(index, folder, key, workers, str(source))
        say(f"listened to {new} of the {len(mine)} utterances of {source}, the others were done: {folder}")
