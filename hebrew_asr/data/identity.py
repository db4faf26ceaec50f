"""Which data a run has: whether they are those of a checkpoint, wherever they lie, and what differs."""

import hashlib

import numpy as np
import pyarrow.compute

from hebrew_asr.data.decoding import NO_FILE
from hebrew_asr.data.rows import SpeechRows
from hebrew_asr.files import DIGEST

COLUMNS = ("digest", "end", "text", "previous", "reference", "language", "source")  # `digest` is of the audio's bytes


def identity_of(rows: SpeechRows) -> np.ndarray:
    """A number (int64) for each utterance, of its audio and texts, in their order: (utterances,)."""
    if rows.identity is not None:
        return rows.identity
    columns = [rows.column(name) for name in COLUMNS]
    texts = (repr(values).encode() for values in zip(*columns, strict=True))
    numbers = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return np.frombuffer(numbers, np.int64)


def digest_of(identity: np.ndarray) -> str:
    return hashlib.blake2b(identity.tobytes(), digest_size=DIGEST // 2).hexdigest()


def differences(name: str, old: np.ndarray, new: np.ndarray) -> list[str]:
    """What became of a set of utterances, as one line, or none."""
    if np.array_equal(old, new):
        return []
    lost, added = int((~np.isin(old, new)).sum()), int((~np.isin(new, old)).sum())
    if not lost and not added:
        return [f"{name}: its {len(new)} utterances are in another order"]
    return [f"{name}: of {len(old)} utterances {lost} are gone or changed, and {added} of the {len(new)} now are new"]


def with_lost(rows: SpeechRows, old: np.ndarray) -> SpeechRows:
    """The rows in the order of `old` where all that differs is that audio files are gone; else the rows as they are.

    In the place of what is lost stands a row without a file: it is dropped and counted when it is its turn, as one that
    is lost while training.
    """
    new = identity_of(rows)
    is_there = np.isin(old, new)
    gone = np.flatnonzero(pyarrow.compute.starts_with(rows.index["dropped"], NO_FILE).to_numpy())
    if is_there.all() or not len(gone) or not np.array_equal(old[is_there], new):
        return rows
    used, seconds = np.resize(gone, len(old)), np.full(len(old), rows.seconds.mean())
    used[is_there], seconds[is_there] = rows.used, rows.seconds
    used[~is_there] = np.resize(gone, int((~is_there).sum()))
    whole = SpeechRows(rows.sources, rows.index, used, rows.dropped, seconds)
    whole.notes, whole.identity = rows.notes, old
    return whole
