"""Timed words to subtitles, and transcripts as text, SRT, WebVTT, TSV and JSON.

Pure functions. Times of words are seconds from the start of the recording; a cue's are whole milliseconds.
"""

import itertools
import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

LINE_CHARACTERS, LINES = 42, 2  # what subtitle guidelines allow
SHORTEST_MS, LONGEST_MS = 1000, 7000  # of a cue
READING_SPEED = 17  # characters a second; a cue stays as long where nothing follows
SENTENCE_ENDS, CLAUSE_ENDS = ".?!…׃", ",;:–—"
CLOSING = "\"'”’״׳)]}»"  # may follow a mark that ends a sentence
RIGHT_TO_LEFT_EMBEDDING, POP_DIRECTION = "\u202b", "\u202c"

# What a partition into cues costs. A delay outweighs all else: it is the one thing that a viewer cannot ignore.
DELAY_COST = 1000.0  # a second by which a cue has less than SHORTEST_MS before the next begins
CUE_COST = 1.0
BREAK_COST = {"sentence": 0.0, "clause": 0.6, "none": 2.0}  # of ending a cue after such a word
PAUSE_COST = 3.0  # a second of pause inside a cue, saved where a cue ends at it
SENTENCE_INSIDE_COST = 0.5  # a sentence that ends inside a cue


class Word(NamedTuple):
    """A word and when it is spoken, in seconds."""

    text: str
    start: float
    end: float


class Cue(NamedTuple):
    """What is shown at once: one or two lines, from `start` to `end` in milliseconds."""

    start: int
    end: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Segment:
    """A stretch of speech between two cuts; `words` is None where only the cuts are known."""

    start: float
    end: float
    text: str
    words: list[Word] | None = None


# ------------------------------------------------------------------------------------------------------ Words and cues


def spread(text: str, start: float, end: float) -> list[Word]:
    """Words of a text, each with the share of the time from `start` to `end` that its characters are."""
    words = text.split()
    places = [0]
    for word in words:
        places.append(places[-1] + len(word) + 1)
    moment = (end - start) / max(1, places[-1])
    return [Word(w, start + a * moment, start + b * moment) for w, a, b in zip(words, places, places[1:], strict=False)]


def words_of(segments: Iterable[Segment]) -> list[Word]:
    """All words; those of a segment without word times are spread over it."""
    return [
        word
        for segment in segments
        for word in (segment.words if segment.words is not None else spread(segment.text, segment.start, segment.end))
    ]


def short_enough(words: Iterable[Word]) -> list[Word]:
    """Words in order of time; one that is longer than a line becomes several, which share its time."""
    parts, latest = [], 0.0
    for text, start, end in words:
        start = max(start, latest)
        end = max(end, start)
        pieces = [text[i : i + LINE_CHARACTERS] for i in range(0, len(text), LINE_CHARACTERS)]
        moment = (end - start) / max(1, len(pieces))
        parts += [Word(piece, start + i * moment, start + (i + 1) * moment) for i, piece in enumerate(pieces)]
        latest = start
    return parts


def lines_of(words: list[str]) -> tuple[str, ...]:
    """One line, or two of about the same length, the first ending at punctuation where that is near; none: too long."""
    whole = " ".join(words)
    if len(whole) <= LINE_CHARACTERS:
        return (whole,)
    pairs = [(" ".join(words[:i]), " ".join(words[i:])) for i in range(1, len(words))]
    fitting = [pair for pair in pairs if max(map(len, pair)) <= LINE_CHARACTERS]
    if not fitting:
        return ()
    return min(fitting, key=lambda pair: abs(len(pair[0]) - len(pair[1])) - 10 * (ends(pair[0]) != "none"))


def ends(text: str) -> str:
    """What ends with a word: `sentence`, `clause` or `none`."""
    last = text.rstrip(CLOSING)[-1:]
    if last and last in SENTENCE_ENDS:
        return "sentence"
    return "clause" if last and last in CLAUSE_ENDS else "none"


def make_cues(words: Iterable[Word]) -> list[Cue]:
    """Cues of timed words: at most two lines of 42 characters, 1 to 7 s, in order, without overlap, nothing left out.

    Where they end is the cheapest of all ways: at the end of a sentence or clause, at a pause, and so that each has its
    second before the next one begins. Where words are too many for that, later cues are delayed until a pause.
    A word of more than 42 characters is divided.
    """
    timed = short_enough(words)
    if not timed:
        return []
    starts = [round(1000 * word.start) for word in timed]
    finishes = [round(1000 * word.end) for word in timed]
    texts, closes = [word.text for word in timed], [ends(word.text) for word in timed]
    pauses = [max(0, b - a) / 1000 for a, b in zip(finishes, starts[1:], strict=False)] + [0.0]

    # best[j]: the lowest cost of the first j words, and where the last of its cues begins
    best: list[tuple[float, int]] = [(0.0, 0)]
    for j in range(1, len(timed) + 1):
        ended = CUE_COST + (BREAK_COST[closes[j - 1]] - PAUSE_COST * pauses[j - 1] if j < len(timed) else 0.0)
        found, inside = [], 0.0
        for i in range(j - 1, -1, -1):
            alone = i == j - 1
            if not alone:
                inside += PAUSE_COST * pauses[i] + SENTENCE_INSIDE_COST * (closes[i] == "sentence")
                is_too_long = finishes[j - 1] - starts[i] > LONGEST_MS or not lines_of(texts[i:j])
                if is_too_long:
                    break
            room = starts[j] - starts[i] if j < len(timed) else SHORTEST_MS
            found.append((best[i][0] + ended + inside + DELAY_COST * max(0, SHORTEST_MS - room) / 1000, i))
        best.append(min(found))
    edges = [len(timed)]
    while edges[-1]:
        edges.append(best[edges[-1]][1])
    edges.reverse()

    cues, free = [], 0
    for i, j in itertools.pairwise(edges):
        start = max(starts[i], free)
        lines = lines_of(texts[i:j])
        to_read = 1000 * sum(map(len, lines)) // READING_SPEED
        shown = min(LONGEST_MS, max(SHORTEST_MS, finishes[j - 1] - start, to_read))
        free = start + shown
        if j < len(timed):
            free = max(start + SHORTEST_MS, min(free, starts[j]))
        cues.append(Cue(start, free, lines))
    return cues


# ------------------------------------------------------------------------------------------------------------- Writing


def is_right_to_left(text: str) -> bool:
    """Whether at least as many letters are written from right to left as from left to right."""
    kinds = [unicodedata.bidirectional(character) for character in text]
    right = sum(kind in ("R", "AL") for kind in kinds)
    return right > 0 and right >= kinds.count("L")


def with_marks(lines: tuple[str, ...]) -> list[str]:
    """Lines of a cue, embedded from right to left where a player would misplace punctuation, digits or Latin.

    Players take a line's direction from its first letter, or are from left to right whatever it holds; a line of
    Hebrew letters alone is right in both.
    """
    if not is_right_to_left(" ".join(lines)):
        return list(lines)
    plain = ("R", "AL", "NSM", "WS")
    return [
        line
        if all(unicodedata.bidirectional(character) in plain for character in line)
        else f"{RIGHT_TO_LEFT_EMBEDDING}{line}{POP_DIRECTION}"
        for line in lines
    ]


def clock(milliseconds: int, decimal: str) -> str:
    seconds, milliseconds = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{decimal}{milliseconds:03d}"


def srt(segments: Iterable[Segment]) -> str:
    """SubRip. A recording without speech gives an empty file."""
    blocks = [
        f"{number}\n{clock(cue.start, ',')} --> {clock(cue.end, ',')}\n" + "\n".join(with_marks(cue.lines)) + "\n"
        for number, cue in enumerate(make_cues(words_of(segments)), start=1)
    ]
    return "\n".join(blocks)


def vtt(segments: Iterable[Segment]) -> str:
    """WebVTT, its three special characters escaped."""
    escapes = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
    blocks = [
        f"{clock(cue.start, '.')} --> {clock(cue.end, '.')}\n"
        + "".join(line.translate(escapes) + "\n" for line in with_marks(cue.lines))
        for cue in make_cues(words_of(segments))
    ]
    return "\n".join(["WEBVTT\n", *blocks])


def tsv(segments: Iterable[Segment]) -> str:
    """A segment a line: start and end in whole milliseconds, text."""
    rows = [
        f"{round(1000 * segment.start)}\t{round(1000 * segment.end)}\t{' '.join(segment.text.split())}\n"
        for segment in segments
    ]
    return "start\tend\ttext\n" + "".join(rows)


def plain_text(segments: Iterable[Segment]) -> str:
    """A segment a line."""
    return "".join(f"{' '.join(segment.text.split())}\n" for segment in segments)


def as_json(segments: Iterable[Segment], about: dict[str, Any]) -> str:
    """`about`, the whole text, and the segments with their words; times in seconds, to the millisecond."""
    segments = list(segments)

    def timed(one: Segment | Word) -> dict[str, Any]:
        return {"start": round(one.start, 3), "end": round(one.end, 3), "text": one.text}

    content = about | {
        "text": " ".join(segment.text for segment in segments),
        "segments": [
            timed(segment) | ({} if segment.words is None else {"words": [timed(word) for word in segment.words]})
            for segment in segments
        ],
    }
    return json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def segments_of(content: dict[str, Any]) -> list[Segment]:
    """The segments of what `as_json` wrote."""
    return [
        Segment(
            one["start"],
            one["end"],
            one["text"],
            [Word(word["text"], word["start"], word["end"]) for word in one["words"]] if "words" in one else None,
        )
        for one in content["segments"]
    ]


WRITERS = {"text": ("txt", plain_text), "srt": ("srt", srt), "vtt": ("vtt", vtt), "tsv": ("tsv", tsv)}
