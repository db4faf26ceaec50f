"""Corpora of Hebrew speech: from a Hub id or a folder to pieces of audio, each with exactly the text spoken in it.

At the start only texts and audio headers are read. What decoding alone can show (silence, clipping, truncation) is
found by the workers that decode, or beforehand by `--prepare`. Imports nothing of the training scripts.
"""

import ast
import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from huggingface_hub.constants import HF_HUB_CACHE

from hebrew_asr.data import audio as hebrew_audio
from hebrew_asr.data import decoding, loading, tables
from hebrew_asr.data.audio import check_blocks, check_waveform
from hebrew_asr.data.decoding import BROKEN_AUDIO, CUT, AudioError, audio_blocks, inspect_audio
from hebrew_asr.data.loading import content_of, load_source, text_column
from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.errors import InputError
from hebrew_asr.files import digest
from hebrew_asr.text import targets
from hebrew_asr.text.targets import (
    SPOKEN,
    TextRules,
    clean_previous,
    cut_into_pieces,
    has_hebrew,
    normalize_target,
    read_segments,
    without_prefix,
)

MODULES = (decoding, hebrew_audio, loading, tables, targets)
CODE = (__file__, *(module.__file__ for module in MODULES))  # what an index depends on
INDEX = datasets.Features(
    {
        "row": datasets.Value("int64"),  # in its source
        "start": datasets.Value("float64"),  # seconds, where the piece begins in the row's audio
        "end": datasets.Value("float64"),  # seconds; null: the audio's end
        "seconds": datasets.Value("float64"),
        "text": datasets.Value("string"),  # the target
        "reference": datasets.Value("string"),  # the transcript as it stands, without timestamps: for scoring
        "previous": datasets.Value("string"),  # the text before it, written like a target
        "recording": datasets.Value("string"),
        "group": datasets.Value("string"),  # what a split must not divide: the recording, or the best that is known
        "digest": datasets.Value("string"),  # of the audio's bytes, or its path, and where in it the piece begins
        "words": datasets.Value("string"),  # digest of the words alone, to find the same sentence elsewhere
        "word_count": datasets.Value("int32"),
        "language": datasets.Value("string"),  # as its source has it; null: the run's
        "channel": datasets.Value("int32"),  # of the row's audio, from 0; null: the average of all
        "dropped": datasets.Value("string"),  # why it cannot be used, or ""
    }
)
SEGMENT = ("segment_start", "segment_end")  # seconds
KEPT_COLUMNS = (*tables.GROUP_COLUMNS, *SEGMENT, "segment_channel", "metadata", "extra_data", "prev_transcript")
PAST_THE_END = "segment past the end of the audio"
NO_TIME = "segment without a time in seconds"
OUTSIDE = "a file outside of the corpus's folder"
BROKEN = BROKEN_AUDIO | {  # reasons that count for max_broken_share
    "timestamps go backwards",
    "text outside of the segments",
    "text is not a string",
    PAST_THE_END,
    NO_TIME,
    OUTSIDE,
    "not finite",  # only where the audio was listened to, see hebrew_asr/data/prepare.py
}


def is_broken(reason: str | None) -> bool:
    """Whether a reason counts for max_broken_share."""
    return reason in BROKEN or (bool(reason) and reason.startswith((targets.CONTROL_REASON, decoding.UNREAD)))


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
    channel: int | Literal["each"] | None
    kept_flags: tuple[str, ...]
    roots: tuple[str, ...] | None
    """Folders that rows may name files in; None: any."""

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
        channel=source.channel,
        kept_flags=tuple(config.keep_flags),
        roots=roots_of(source),
    )


def roots_of(source: Source) -> tuple[str, ...] | None:
    """Where files of a corpus that others wrote may lie; None of what its user wrote: tables, which are checked as they
    are read, a saved dataset, one Parquet file."""
    if Path(source.path).is_dir():
        return None if source.is_table or source.is_saved else (source.path,)
    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
    return None if os.path.exists(source.path) else tuple(map(str, caches))


def describe_rows(rows: dict[str, list], numbers: list[int], settings: RowSettings) -> dict[str, list]:
    """Columns of INDEX for a batch of rows: one or more pieces each, and what is dropped of them with its reason."""
    described = []
    for i, number in enumerate(numbers):
        row = {name: values[i] for name, values in rows.items()}
        pieces = describe_row(row, settings)
        if pieces and pieces[0]["dropped"].startswith(decoding.UNREAD):  # not to be remembered
            raise InputError(
                f"{row['audio']['path']}: {pieces[0]['dropped']}. Mend that and give the same command again"
            )
        described += [{"row": number} | piece for piece in pieces]
    return {name: [piece.get(name) for piece in described] for name in INDEX}


def describe_row(row: dict[str, Any], settings: RowSettings) -> list[dict[str, Any]]:
    """Reads one row's text and the structure of its audio; evaluation audio is decoded once too, so that it cannot fail
    later."""
    known = {"start": 0.0, "text": "", "previous": "", "seconds": 0.0, "dropped": "", "language": settings.language}
    audio = row["audio"] or {"bytes": None, "path": None}
    transcript = "" if settings.column is None else row[settings.column]
    metadata = read_metadata(row.get("metadata"))
    known["recording"] = str(metadata.get("entry_id") or audio["path"] or "")
    known["group"] = group_of(row, metadata) or known["recording"]
    try:
        if is_foreign(audio, settings.roots):
            raise ValueError(OUTSIDE)
        sound = inspect_audio(audio)
        begin, end = segment_of(row, sound.seconds)
        known |= {"start": begin, "seconds": end - begin}
        if sound.is_cut:
            raise AudioError(CUT)
        flags = read_metadata(row.get("extra_data"))
        if flagged := [name for name, value in flags.items() if value is True and name not in settings.kept_flags]:
            raise ValueError(f"flagged as {flagged[0]}")
        own = row.get("segment_channel")
        own = tables.channel_of(own) if isinstance(own, str) else own
        spoken = by_channel(transcript, settings, own, sound.channels)
    except ValueError as error:  # AudioError is one
        return [known | {"dropped": str(error)}]
    content, is_whole = content_of(audio), begin == 0 and end == sound.seconds
    pieces = []
    for channel, text in spoken:
        place = known | {"channel": channel}
        try:
            heard = (audio | {"channel": channel}, begin, None if is_whole else end)
            if not settings.for_training and (problem := check_blocks(audio_blocks(*heard), end - begin)) in BROKEN:
                raise AudioError(problem)
            pieces += describe_text(text, row, place, content, is_whole, settings)
        except ValueError as error:
            pieces.append(place | {"dropped": str(error)})
    return pieces


def group_of(row: dict[str, Any], metadata: dict[str, Any]) -> str:
    """The session or transcriber of a row whose recording has no id: `transcriber 12`; "" where neither is known."""
    if metadata.get("entry_id"):
        return ""
    given = ((name, where.get(name)) for name in tables.GROUP_COLUMNS for where in (row, metadata))
    known = (
        f"{name.removesuffix('_id')} {value}" for name, value in given if value not in (None, "") and value == value
    )
    return next(known, "")


def segment_of(row: dict[str, Any], seconds: float) -> tuple[float, float]:
    """Start and end of the part of its recording that a row is about; raises ValueError where there is no such part."""
    try:
        begin, end = (
            None if (value := row.get(name)) is None else float(value) for name in ("segment_start", "segment_end")
        )
    except (TypeError, ValueError) as error:
        raise ValueError(NO_TIME) from error
    begin = begin or 0.0
    if end is None:
        end = seconds
    if begin >= seconds or end > seconds + max(targets.PAST_THE_END, decoding.tolerated(end - begin)) or end <= begin:
        raise ValueError(PAST_THE_END)
    return begin, min(end, seconds)


def is_foreign(audio: dict[str, Any], roots: tuple[str, ...] | None) -> bool:
    """Whether a row names a file of this machine outside of the folders where its corpus lies."""
    path = audio["path"] if audio["bytes"] is None else None
    return (
        bool(path) and roots is not None and os.path.isfile(path) and not any(tables.is_inside(path, r) for r in roots)
    )


def by_channel(transcript: Any, settings: RowSettings, own: int | None, channels: int) -> list[tuple[int | None, Any]]:
    """Each channel of a row that is used (None: their average), with its transcript; raises ValueError."""
    channel = settings.channel if own in (None, tables.NO_CHANNEL) else own
    if channel is None and own is not None and channels > 1:
        raise ValueError(decoding.NO_NUMBER)
    if channel == "each" and channels > 1:
        if settings.column is None or not transcript:
            return [(number, transcript) for number in range(channels)]
        if not isinstance(transcript, list) or len(transcript) != channels:
            raise ValueError(f"one transcript for {channels} channels")
        return list(enumerate(transcript))
    if channel == "each":
        return [(None, transcript)]
    if channel is not None and channel >= channels:
        raise AudioError(decoding.no_channel(channel, channels))
    return [(channel, transcript)]


def describe_text(
    transcript: Any, row: dict[str, Any], known: dict[str, Any], content: str, is_whole: bool, settings: RowSettings
) -> list[dict[str, Any]]:
    """The pieces of a recording (or of a segment of one, which `known` places); raises ValueError."""
    begin, seconds = known["start"], known["seconds"]
    if not settings.has_speech:
        transcript = transcript or ""
    if not isinstance(transcript, str):
        raise ValueError("empty text" if transcript is None else "text is not a string")
    pieces, gaps = cut_into_pieces(read_segments(without_prefix(transcript)), seconds, settings.longest)
    quality = read_metadata(row.get("metadata")).get("quality_score")
    is_poor = settings.min_quality is not None and isinstance(quality, int | float) and quality < settings.min_quality
    described = [known | {"start": begin + g.start, "seconds": g.end - g.start, "dropped": g.reason} for g in gaps]
    previous = row.get("prev_transcript")
    previous = clean_previous(previous, settings.text_rules) if isinstance(previous, str) else ""
    channel = "" if known["channel"] is None else f" {known['channel']}"
    for piece in pieces:
        text = normalize_target(piece.text, settings.text_rules)
        targets.refuse_control_tokens(text)
        words = [spoken for word in text.split() if (spoken := "".join(SPOKEN.findall(word)).lower())]
        length = (seconds if piece.end is None else piece.end) - piece.start
        start, end = begin + piece.start, piece.end if is_whole else begin + piece.start + length
        dropped = "quality score too low" if is_poor else why_unusable(text, length, settings)
        described.append(
            known
            | {"start": start, "end": end, "seconds": length, "text": text, "previous": previous}
            | {"reference": piece.text, "dropped": dropped}
            | {"digest": f"{content} {start:.2f}{channel}", "words": digest(" ".join(words).encode())}
            | {"word_count": len(words)}
        )
        previous = text
    return described


def read_metadata(metadata: Any) -> dict[str, Any]:
    """A row's metadata, which some corpora write as a text; {} where it is neither that nor a struct."""
    if isinstance(metadata, str):
        for read in (json.loads, ast.literal_eval):  # pandas writes Python's form
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                metadata = read(metadata)
                break
    return metadata if isinstance(metadata, dict) else {}


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
    if seconds > settings.longest + targets.PAST_THE_END:
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
    code = [Path(file).read_text(encoding="utf-8") for file in CODE]
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
    places: np.ndarray = field(default_factory=lambda: np.zeros(0, int))  # of the pieces in the rows' index


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
        self.identity: np.ndarray | None = None  # where another one's rows are stood in for, see identity.py
        self.set_aside: SpeechRows | None = None  # of an evaluation set: what chooses nothing, see `confirm_share`
        self.seconds = index["seconds"].to_numpy()[used] if seconds is None else seconds  # (pieces,)
        self.source_numbers = index["source"].to_numpy()[used]  # (pieces,)

    def __len__(self) -> int:
        return len(self.used)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One piece: the columns of INDEX, and `audio` with its compressed bytes."""
        (piece,) = self.index.slice(int(self.used[number]), 1).to_pylist()
        piece["seconds"] = float(self.seconds[number])
        audio = self.sources[piece["source"]][piece["row"]]["audio"] or {"bytes": None, "path": None}
        return piece | {"audio": audio | {"channel": piece["channel"]}}

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
    loaded, described_rows, dropped, notes = [], [], [], []
    for number, source in enumerate(sources):
        rows = load_source(source)
        settings = row_settings(source, rows.column_names, config, for_training)
        wanted = {"audio", settings.column, *KEPT_COLUMNS}
        rows = rows.select_columns([name for name in rows.column_names if name in wanted])
        table = described(rows, source, settings, config.preprocessing_num_workers).with_format("arrow")[:]
        found = list(tally(table, str(source), sum(map(len, described_rows))).values())
        if sum(drop.utterances for drop in found) == len(table):
            raise InputError(f"{source}: none of its {len(rows)} rows can be used: {counts(found)}{remedy(found)}")
        check_broken(source, found, len(rows), config.max_broken_share)
        if for_training:
            total = pyarrow.compute.sum(table["seconds"]).as_py() / 3600
            check_lost(source, found, total, config.max_dropped_share)
        if source.is_table:
            notes += [note for note in rows.info.description.splitlines() if note]
        loaded.append(rows.select_columns(["audio"]))
        described_rows.append(table.append_column("source", pyarrow.array(np.full(len(table), number, np.int32))))
        dropped += found
    index = pyarrow.concat_tables(described_rows)
    used = np.flatnonzero(pyarrow.compute.equal(index["dropped"], "").to_numpy())
    rows = SpeechRows(loaded, index, used, dropped)
    rows.notes += notes
    return without_duplicates(rows, sources) if for_training and config.drop_duplicates else rows


def total_dropped(rows: SpeechRows, source: Source) -> int:
    return sum(drop.utterances for drop in rows.dropped if drop.source == str(source))


def counts(dropped: list[Dropped]) -> dict[str, int]:
    return {drop.reason: drop.utterances for drop in dropped}


def check_broken(source: Source, dropped: list[Dropped], rows: int, share: float) -> None:
    """Raises InputError, with names, when more than `share` of a source's rows are broken."""
    broken = [drop for drop in dropped if drop.source == str(source) and is_broken(drop.reason)]
    if sum(drop.utterances for drop in broken) > share * rows:
        names = [name for drop in broken for name in drop.examples]
        raise InputError(
            f"{source}: {sum(drop.utterances for drop in broken)} of its {rows} rows are broken, more than"
            f" max_broken_share ({share:g}): {counts(broken)}, among them {', '.join(names[:5])}{remedy(broken)}"
        )


REMEDIES = {  # by the words that a reason begins with
    "longer than": "`uv run scripts/align_recordings.py` cuts long recordings where their transcripts say",
    "segment longer": "`uv run scripts/align_recordings.py` cuts long recordings where their transcripts say",
    decoding.NO_AUDIO: "`ffmpeg -i FILE out.wav` may read what is in no format known here",
    CUT: "copy or fetch the files again: they end before their own header says",
    decoding.NO_FILE: "the table names files that are not beside it",
    PAST_THE_END: "the table's times are not of these files",
    NO_TIME: "segment_start and segment_end are seconds",
    OUTSIDE: "copy it there, or take the rows out: a corpus of others may not name files of this machine",
    decoding.NO_NUMBER: "where the column is no channel, give it another name; `channel: 0` takes one of all rows",
    "silent": "listen to one; a call may have its speech in one channel (`channel`)",
    "clipped": "they were recorded or amplified too loudly",
    targets.CONTROL_REASON: "take the token out of the transcripts",
}
LOST = ("longer than", "segment longer", "silent", "clipped", decoding.CANCELLED)  # reasons for max_dropped_share


def remedy(dropped: list[Dropped]) -> str:
    """What to do about the reason that costs most."""
    worst = sorted(dropped, key=lambda drop: (-drop.utterances, drop.reason))
    found = (text for drop in worst for reason, text in REMEDIES.items() if drop.reason.startswith(reason))
    return "".join(f". {text[0].upper() if text[0] != '`' else '`'}{text[1:]}" for text in itertools.islice(found, 1))


def check_lost(source: Source, dropped: list[Dropped], hours: float, share: float) -> None:
    """Raises InputError when more than `share` of a source's hours are of no use for their length or sound."""
    lost = [drop for drop in dropped if drop.source == str(source) and drop.reason.startswith(LOST)]
    if (total := sum(drop.hours for drop in lost)) > share * hours:
        names = [name for drop in lost for name in drop.examples]
        raise InputError(
            f"{source}: {sum(drop.utterances for drop in lost)} utterances, {total:.2f} of its {hours:.2f} hours,"
            f" would be dropped, more than max_dropped_share ({share:g}): {counts(lost)}, among them"
            f" {', '.join(names[:5])}{remedy(lost)}"
        )


def tally(table: pyarrow.Table, source: str, first: int = 0) -> dict[str, Dropped]:
    """The dropped pieces of a described source, by reason; it begins at the place `first` of the rows' index."""
    lost = np.flatnonzero(pyarrow.compute.not_equal(table["dropped"], "").to_numpy())
    reasons = table["dropped"].take(pyarrow.array(lost)).combine_chunks().dictionary_encode()
    numbers, found = reasons.indices.to_numpy(), {}
    for number, reason in enumerate(reasons.dictionary.to_pylist()):
        mine = lost[numbers == number]
        hours = pyarrow.compute.sum(table["seconds"].take(pyarrow.array(mine))).as_py() / 3600
        names = table["recording"].take(pyarrow.array(mine[:5])).to_pylist()
        found[reason] = Dropped(source, reason, len(mine), hours, names, first + mine)
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
            rows.dropped.append(Dropped(str(source), reason, len(lost), lost.hours, names, lost.used))
    return rows.keep(~is_dropped) if is_dropped.any() else rows


def without_duplicates(rows: SpeechRows, sources: list[Source]) -> SpeechRows:
    digests = rows.arrow("digest").combine_chunks().dictionary_encode().indices.to_numpy()
    is_first = np.zeros(len(rows), bool)
    is_first[np.unique(digests, return_index=True)[1]] = True
    return drop(rows, sources, ~is_first, "duplicate audio")
