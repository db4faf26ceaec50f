"""Tables of audio files and transcripts as people write them: CSV, TSV and JSON lines, in any common encoding.

A row names a file, or a segment of one, and its text; the rest of its columns is not looked at. What cannot be read
rightly is an InputError with the file and the line, never a row that is quietly another one.
"""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any

from hebrew_asr.data.decoding import AUDIO_SUFFIXES
from hebrew_asr.errors import InputError

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".txt")
AUDIO_COLUMNS = tuple(
    "file_name audio audio_filepath audio_file audio_path path file filename wav wav_path wav_file wav_filename audios"
    " recording clip".split()
)
TEXT_COLUMNS = ("transcript", "text", "sentence", "transcription")
START_COLUMNS = tuple(
    "offset start start_time start_seconds segment_start begin begin_time"
    " offset_ms start_ms start_time_ms begin_ms".split()
)
END_COLUMNS = tuple("end end_time end_seconds segment_end end_ms end_time_ms".split())
DURATION_COLUMNS = ("duration", "duration_seconds", "duration_ms")
LIKE_A_TIME = re.compile(
    r"(?:(?:segment|clip|audio|utt|utterance)[_ ])?(?:start|begin|onset|offset|end|stop)"
    r"(?:[_ ]?(?:m|u|n)?(?:s|sec|secs|second|seconds|time|times|ts|timestamp|pos|position|samples?|frames?|point))?"
)
GROUP_COLUMNS = ("session", "session_id", "transcriber", "transcriber_id")  # better ones first
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")  # folders that hold one each
AUDIO_FOLDERS = ("clips", "audio", "wavs", "wav", "audios", "files")  # where a table's files may lie, beside it


@dataclass
class Table:
    """What one or more tables say."""

    rows: list[dict[str, Any]]
    """`audio` (a path, or None), `segment_start`, `segment_end` (seconds or None), `segment_channel` (or None), and the
    columns that were asked for."""
    columns: list[str]
    """Of the tables, as they are called there."""
    notes: list[str] = field(default_factory=list)
    """For the reader: which encoding was taken, what was left out."""


def is_table(file: Path) -> bool:
    return file.suffix.lower() in TABLE_SUFFIXES and file.is_file() and not file.name.startswith(".")


# -------------------------------------------------------------------------------------------------------- Finding them


def tables_of(folder: Path, split: str) -> list[Path]:
    """The tables that list a folder's split; none where there are none. Raises InputError where it is not clear.

    They are looked for in the subfolder of the split, in the folder, and in the subfolders of either, in this order.
    """
    inside = folder / split
    for place in (inside, folder):
        if place.is_dir() and (found := tables_in(place, split)):
            is_of_split = place == inside or inside.is_dir() or split == "train" or found[0].stem.lower() == split
            return found if is_of_split else []
    top = inside if inside.is_dir() else folder
    found = [file for place in sorted(top.iterdir()) if place.is_dir() for file in tables_in(place, split)]
    return [file for file in found if top == inside or split == "train" or file.stem.lower() == split]


def tables_in(folder: Path, split: str) -> list[Path]:
    """The table in one folder: `metadata`, else the split's own, else the only one."""
    files = sorted(file for file in folder.iterdir() if is_table(file))
    for stem in ("metadata", split):
        if named := [file for file in files if file.stem.lower() == stem]:
            return named[:1]
    files = [file for file in files if file.suffix.lower() in (".csv", ".tsv", ".jsonl")]
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise InputError(f"{folder} has several tables ({names}): give one of them as the source's path")
    return files


class Folder:
    """Where the files of a table lie."""

    def __init__(self, table: Path, root: Path | None, split: str):
        """`root`: the corpus's folder, which a file may not be outside of; None: the table may name any file."""
        self.table, self.root, self.split = table, root, split
        self.base = table.parent

    def locate(self, name: str) -> str:
        """The path of a file by its name in the table; where there is none, the path where it should be.

        Backslashes, a missing extension and other capitals are understood. Raises InputError for a file outside.
        """
        plain = name.strip().replace("\\", "/").removeprefix("file://").removeprefix("./")
        is_absolute = plain.startswith("/") or bool(PureWindowsPath(plain).drive)
        path = os.path.normpath(plain if is_absolute else self.base / plain)
        if self.root is not None and not is_inside(path, self.root):
            raise InputError(
                f"{self.table}: it names {name!r}, a file outside of its folder. Copy it there, or, if you wrote the"
                " table, give it as the source's path"
            )
        if os.path.isfile(path):
            return path
        if not is_absolute:
            for place in (self.split, *AUDIO_FOLDERS):
                if os.path.isfile(inside := os.path.normpath(self.base / place / plain)):
                    return inside
            key = os.path.normpath(plain).lower()
            for place in ("", self.split, *AUDIO_FOLDERS):
                if found := self.files.get(os.path.join(place.lower(), key)):
                    return found
        return path

    @cached_property
    def files(self) -> dict[str, str]:
        """Paths of the audio files by their lower-case path from the table, with and without the extension."""
        found: dict[str, str] = {}
        for path in sorted(audio_files(self.base)):
            name = os.path.relpath(path, self.base).lower()
            found.setdefault(name, path)
            found.setdefault(os.path.splitext(name)[0], path)
        return found


def is_inside(path: str, root: Path | str) -> bool:
    """Whether a path leads into a folder as it is written; or where its links lead."""
    return any(Path(of(path)).is_relative_to(of(root)) for of in (os.path.abspath, os.path.realpath))


def audio_files(folder: Path) -> list[str]:
    """All audio files in a folder and its subfolders, by their extension; a folder that links lead to twice, once."""
    found: list[str] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        names = [name for name in names if os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES]
        found += [os.path.join(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


# -------------------------------------------------------------------------------------------------------- Reading them


def read_text(file: Path) -> tuple[str, str | None]:
    """A table's text, and the encoding if it is not UTF-8."""
    content = file.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif content[1:2] == b"\0" or content[:1] == b"\0":
        encoding = "utf-16-le" if content[1:2] == b"\0" else "utf-16-be"
    else:
        try:
            return content.decode("utf-8-sig"), None
        except UnicodeDecodeError as error:
            encoding, place = "cp1255", content.count(b"\n", 0, error.start) + 1
            if not any(0xE0 <= byte <= 0xFA for byte in content):
                raise InputError(
                    f"{file}, line {place}: neither UTF-8 nor Hebrew in cp1255. Save it as UTF-8"
                ) from error
    try:
        return content.decode(encoding), encoding
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: neither UTF-8 nor {encoding} ({error.reason}). Save it as UTF-8") from error


csv.field_size_limit(2**31 - 1)  # the transcript of hours is one cell
Cells = tuple[int, dict[str, Any]]  # a row's line, from 1, and its values by column


def delimiter_of(header: str, file: Path) -> str:
    if file.suffix.lower() == ".tsv":
        return "\t"
    return max(",;\t|", key=header.count)


def delimited_rows(text: str, file: Path, is_audio: Callable[[str], bool]) -> Iterator[Cells]:
    """Rows of a table with a header; raises InputError for an open quote and for a row with another number of cells."""
    lines = list(io.StringIO(text, newline=""))  # cut at \n, \r\n and \r alone: texts may hold other separators
    header = next((line for line in lines if line.strip()), "")
    delimiter = delimiter_of(header, file)
    names: list[str] = []
    for line, cells in tabbed(lines, file) if delimiter == "\t" else quoted(lines, delimiter, file, is_audio):
        if not names:
            names = [cell.strip() for cell in cells]
            continue
        if any(cell.strip() for cell in cells[len(names) :]) or 0 < len([c for c in cells if c.strip()]) > len(names):
            raise InputError(
                f"{file}, line {line}: {len(cells)} cells in a table of {len(names)} columns. A text that holds"
                f" {delimiter!r} needs quotes around it"
            )
        yield line, dict(zip(names, [*cells, *[""] * len(names)], strict=False))


def tabbed(lines: list[str], file: Path) -> Iterator[tuple[int, list[str]]]:
    """Cells between tabs. A cell that is quoted as in CSV loses its quotes, any other keeps them.

    A line is a row, but where a quote is open at its end and lines with another number of cells follow, which close it.
    Raises InputError where these do not.
    """
    rows = [line.rstrip("\r\n").split("\t") for line in lines]
    width = next((len(cells) for cells in rows if any(cells)), 0)
    number = 0
    while number < len(rows):
        begin, cells, number = number + 1, rows[number], number + 1
        if is_open(cells[-1]):
            whole, end = cells, number
            while end < len(rows) and is_open(whole[-1]) and len(rows[end]) != width:
                first, *others = rows[end]
                whole, end = [*whole[:-1], f"{whole[-1]}\n{first}", *others], end + 1
            if not is_open(whole[-1]):
                cells, number = whole, end
            elif any(map(any, rows[number:end])):
                raise InputError(open_quote(file, begin, "no line before the next row closes it"))
        yield begin, [unquoted(cell) for cell in cells]


def is_open(cell: str) -> bool:
    return cell.startswith('"') and cell.count('"') % 2 == 1


def unquoted(cell: str) -> str:
    inner = cell[1:-1]
    is_quoted = len(cell) >= 2 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if is_quoted else cell


def quoted(
    lines: list[str], delimiter: str, file: Path, is_audio: Callable[[str], bool]
) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    before = 0
    while True:
        begin = before + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(open_quote(file, begin, str(error))) from error
        if cells is None:
            return
        before = reader.line_num
        swallowed = [line for cell in cells if "\n" in cell for line in cell.splitlines()[1:]]
        if any(is_audio(part) for line in swallowed for part in line.split(delimiter)):
            raise InputError(open_quote(file, begin, "the next rows are inside of it"))
        yield begin, cells


def open_quote(file: Path, line: int, what: str) -> str:
    return (
        f'{file}, line {line}: a quote (") is open there: {what}. Close it, or write a quote that is part of a text'
        ' twice and put quotes around that text: "צה""ל"'
    )


def json_rows(text: str, file: Path) -> Iterator[Cells]:
    """Rows of JSON lines, or of a JSON list."""
    if text.lstrip().startswith("["):
        try:
            found = list(enumerate(json.loads(text), 1))
        except ValueError as error:
            raise InputError(f"{file}: no JSON: {error}") from error
    else:
        found = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                found.append((number, json.loads(line) if line.strip() else {}))
            except ValueError as error:
                raise InputError(f"{file}, line {number}: no JSON: {error}") from error
    for number, row in found:
        if not isinstance(row, dict):
            raise InputError(f"{file}, line {number}: no JSON object but {type(row).__name__}")
        yield number, row


def read_tables(
    files: Iterable[Path], root: Path | None, split: str, wanted: Iterable[str], many: bool = False
) -> Table:
    """Reads tables into one; raises InputError.

    Args:
        files: the tables.
        root: the corpus's folder, which they may not point out of; None: they may name any file.
        split: rows of a table above folders of splits that lie in another one are left out.
        wanted: columns to keep, where they are.
        many: a text may be a list of them, one for each channel.
    """
    table = Table([], [])
    for file in files:
        text, encoding = read_text(file)
        if encoding:
            table.notes.append(f"{file}: read as {encoding}")
        folder = Folder(file, root, split)
        is_json = file.suffix.lower() in (".jsonl", ".json") or text.lstrip()[:1] == "{"
        is_audio = lambda cell, folder=folder: looks_like_audio(cell, folder)  # noqa: E731
        rows = list(json_rows(text, file) if is_json else delimited_rows(text, file, is_audio))
        names = list(dict.fromkeys(name for _, row in rows for name in row))
        table.columns += [name for name in names if name not in table.columns]
        full = [(line, row) for line, row in rows if any(is_filled(value) for value in row.values())]
        if empty := len(rows) - len(full):
            table.notes.append(f"{file}: {empty} empty rows left out")
        if full:
            table.rows += rows_of(full, names, folder, list(wanted), many, table.notes)
    return table


def looks_like_audio(cell: str, folder: Folder) -> bool:
    cell = cell.strip().strip('"').replace("\\", "/")
    if os.path.splitext(cell)[1].lower() in AUDIO_SUFFIXES:
        return True
    return bool(cell) and "\n" not in cell and len(cell) < 200 and os.path.normpath(cell).lower() in folder.files


def is_filled(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else value not in (None, [], {})


def rows_of(
    rows: list[Cells], names: list[str], folder: Folder, wanted: list[str], many: bool, notes: list[str]
) -> list[dict[str, Any]]:
    """The rows of one table that belong to its split, as `Table.rows` has them; adds to the notes what is left out."""
    plain = {name.strip().lower(): name for name in reversed(names)}
    audio = [plain[name] for name in AUDIO_COLUMNS if name in plain]
    if not audio:
        raise InputError(
            f"{folder.table}: no column that names the audio files ({', '.join(AUDIO_COLUMNS[:8])}, …), there are"
            f" {', '.join(names)}. Is its first line a header?"
        )
    mine = folder.base / folder.split
    is_above = mine.is_dir() and folder.table.stem != folder.split  # of the files in folders of splits, one split's
    check_times(rows, plain, folder.table)
    found, elsewhere = [], []
    for line, row in rows:
        where = f"{folder.table}, line {line}"
        name = next((value for column in audio if (value := file_name(row.get(column), where, column))), None)
        path = folder.locate(name) if name else None
        if is_above and path and not Path(path).is_relative_to(mine):
            place = Path(os.path.relpath(path, folder.base)).parts[0]
            if place.lower() in SPLITS:
                continue
            if os.path.isfile(path):
                elsewhere.append(name)
                continue  # one that is missing is kept, so that it is counted
        start, end = segment_of(row, plain, where)
        one = {"audio": path, "segment_start": start, "segment_end": end}
        one["segment_channel"] = channel_of(row.get(plain.get("channel", "")))
        for column in wanted:
            if column in row or column in plain:
                one[column] = text_of(row.get(plain.get(column, column), row.get(column)), where, column, many)
        if messages := row.get("messages"):  # ms-swift
            one["text"] = answer_of(messages, where)
        found.append(one)
    channels = {one["segment_channel"] for one in found} - {None, NO_CHANNEL}
    if len(channels) > 1 and min(channels) == 1:
        raise InputError(
            f"{folder.table}: its channels are {', '.join(map(str, sorted(channels)))}. They are counted from 0 here:"
            " write 0 for the first"
        )
    if elsewhere:
        notes.append(
            f"{folder.table}: {len(elsewhere)} rows left out, whose files are in no split's folder, among them"
            f" {', '.join(elsewhere[:5])}"
        )
    return found


def check_times(rows: list[Cells], plain: dict[str, str], table: Path) -> None:
    """Raises InputError for columns that seem to be the times of segments by another name: all would be left out."""
    known = {*START_COLUMNS, *END_COLUMNS, *DURATION_COLUMNS}
    others = [column for name, column in reversed(plain.items()) if name not in known and LIKE_A_TIME.fullmatch(name)]
    if found := [column for column in others if any(is_time(row.get(column)) for _, row in rows)]:
        raise InputError(
            f"{table}: {', '.join(found)} may say which part of its file a row is about, by a name that is not known."
            f" Call it offset, start, end or duration where it is seconds, start_ms or end_ms where it is milliseconds;"
            " else rename it or take it out"
        )


def is_time(value: Any) -> bool:
    try:
        return seconds_of(value, "", "") is not None
    except InputError:
        return False


def file_name(value: Any, where: str, column: str) -> str | None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = value.get("path")
    if value is None or isinstance(value, str):
        return (value or "").strip() or None
    raise InputError(f"{where}: {column} is {value!r}, no name of a file")


def text_of(value: Any, where: str, column: str, many: bool) -> Any:
    if column in ("metadata", "extra_data"):
        return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if column in GROUP_COLUMNS:
        return None if value is None else str(value)
    if many:
        value = [value] if isinstance(value, str) else value
        if value is None or (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            return value
    elif value is None or isinstance(value, str):
        return value
    raise InputError(f"{where}: {column} is {value!r}, no text")


def answer_of(messages: Any, where: str) -> str:
    """The transcript of ms-swift's messages: what the assistant says, a text or parts of which some are texts."""
    try:
        content = next(turn["content"] for turn in reversed(messages) if turn["role"] == "assistant")
        parts = [{"text": content}] if isinstance(content, str) else content
        return "".join([part["text"] for part in parts if part.get("type", "text") == "text"])
    except (AttributeError, TypeError, KeyError, StopIteration) as error:
        raise InputError(f"{where}: messages without an assistant's answer, which is the transcript") from error


CHANNELS = {"left": 0, "l": 0, "right": 1, "r": 1} | dict.fromkeys(("", "none", "nan", "mono", "mix", "both"))
NO_CHANNEL = -1  # it is not known which is meant, which matters where there are several


def channel_of(value: Any) -> int | None:
    """Which channel a cell means, from 0; None: it leaves it open."""
    text = str("" if value is None else value).strip().lower()
    if text in CHANNELS:
        return CHANNELS[text]
    return int(float(text)) if re.fullmatch(r"[0-9]{1,3}([.]0*)?", text) else NO_CHANNEL


CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:[.,]\d+)?)")


def seconds_of(value: Any, where: str, column: str) -> float | None:
    """Seconds, of a number or of 1:02:03.5."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if clock := CLOCK.fullmatch(str(value).strip()):
        return int(clock[1] or 0) * 3600 + int(clock[2]) * 60 + float(clock[3].replace(",", "."))
    try:
        seconds = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {column} is {value!r}, no time in seconds") from error
    if not 0 <= seconds < float("inf"):
        raise InputError(f"{where}: {column} is {value!r}, no time in seconds")
    return seconds


def segment_of(row: dict[str, Any], plain: dict[str, str], where: str) -> tuple[float | None, float | None]:
    """(start, end) in seconds of the part of the file that a row is about; None: the file's own start, or end.

    A `duration` without a start is taken as the length of the whole file, and not looked at.
    """

    def first(columns: tuple[str, ...]) -> float | None:
        given = ((name, seconds_of(row.get(plain[name]), where, name)) for name in columns if name in plain)
        known = (value / 1000 if name.endswith("_ms") else value for name, value in given if value is not None)
        return next(known, None)

    start, end = first(START_COLUMNS), first(END_COLUMNS)
    if start is None:
        if end is not None:
            raise InputError(f"{where}: a segment that ends at {end:g} s, without a start. Write 0 where there is none")
        return None, None
    if end is None and (length := first(DURATION_COLUMNS)) is not None:
        end = start + length
    if end is not None and end <= start:
        raise InputError(f"{where}: a segment from {start:g} to {end:g} s")
    return start, end
