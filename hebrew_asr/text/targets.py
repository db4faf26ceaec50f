"""Hebrew transcripts as training targets: how their text is written, and which words belong to which seconds.

Imports nothing of this project. The rules here are for what the model learns to write; error rates are computed
under the leaderboard's own rules, in hebrew_asr/text/scoring.py.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args


def replacer(table: dict[str, str]) -> Callable[[str], str]:
    """Returns a function that replaces single characters; where they are rare it is faster than str.translate."""
    characters = re.compile(f"[{re.escape(''.join(table))}]")
    return lambda text: characters.sub(lambda found: table[found[0]], text)


# ——— Characters ———
# letters, with Yiddish digraphs and ready-made forms
HEBREW = "\u05d0-\u05ea\u05ef-\u05f2\ufb1d\ufb1f-\ufb28\ufb2a-\ufb4f"
LATIN = "A-Za-zªº\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff\ufb00-\ufb06"
POINTS = "\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\ufb1e"  # cantillation and niqqud, meteg and rafe included
SPOKEN = re.compile(r"[^\W_]")  # a letter or digit; a text in which it finds nothing is only punctuation
POINT = re.compile(f"[{POINTS}]")
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f"  # controls, but those that are whitespace
    "\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]"  # soft hyphen, joiners, bidi
)
plain_forms = replacer({chr(code): unicodedata.normalize("NFKC", chr(code)) for code in range(0xFB00, 0xFB50)})
plain_digraphs = replacer({"װ": "וו", "ױ": "וי", "ײ": "יי"})
plain_verse_marks = replacer({"׃": ".", "׀": " ", "׆": " "})  # sof pasuq, paseq, nun hafukha
ascii_quotes = replacer(dict.fromkeys("׳‘’‚‛′´`ʼ＇", "'") | dict.fromkeys("״“”„‟″«»＂", '"'))
ascii_hyphens = replacer(dict.fromkeys("־‐‑⁃﹣－", "-"))  # maqaf and its look-alikes
plain_dashes = replacer(dict.fromkeys("‒–−", "-") | dict.fromkeys("—―﹘⸺", " - ") | {"…": "...", "‥": "..."})
DOUBLED_QUOTE = re.compile("''+")  # צה''ל
GERSHAYIM_PLACE = re.compile(f'(?<=[{HEBREW}{POINTS}])"(?=[{HEBREW}])')
GERESH_PLACE = re.compile(f"(?<=[{HEBREW}{POINTS}])'")
MAQAF_PLACE = re.compile(rf"(?<=[{HEBREW}{POINTS}])-(?=\w)")
SPACE_BEFORE_PUNCTUATION = re.compile(r"\s+(?=[,.!?;:]++(?![\w()]))")  # but not before .NET or :)
# ——— Targets ———
QuoteStyle = Literal["ascii", "hebrew", "keep"]
MaqafStyle = Literal["hyphen", "space", "keep"]


@dataclass
class TextRules:
    """How a training target is written; the defaults are for ivrit.ai's corpora and leaderboard."""

    unicode_form: bool = True
    """NFC, ready-made forms (U+FB00–FB4F: שׁ, ﭏ, ﬁ) and Yiddish digraphs as plain letters; ½, ² and ™ stay."""
    niqqud: bool = True
    """Niqqud and cantillation are removed; of the marks of verses, ׃ becomes a full stop, ׀ and ׆ a space."""
    invisible_marks: bool = True
    """Bidi and zero-width marks, soft hyphens, variation selectors and control characters are removed."""
    quote_style: QuoteStyle = "ascii"
    """`ascii`: all as ' and ", which the leaderboard deletes (it makes ׳ and ״ spaces); `hebrew`: צה״ל, ג׳; `keep`."""
    maqaf_style: MaqafStyle = "hyphen"
    """Maqaf and its look-alikes: `hyphen` writes -; `space` also parts Hebrew words joined by -; `keep`."""
    dashes: bool = True
    """En dash and minus become -, an em dash a - between spaces, and … three dots."""
    repeated_punctuation: bool = True
    """!!! becomes !, ?!?! becomes ?!, ,,, becomes , and two or more dots the ellipsis ... (not a full stop)."""
    whitespace: bool = True
    """Every run of whitespace becomes one space, none at the ends and none before , . ! ? ; :"""

    def __post_init__(self) -> None:
        for name, styles in (("quote_style", get_args(QuoteStyle)), ("maqaf_style", get_args(MaqafStyle))):
            if getattr(self, name) not in styles:
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be one of {', '.join(styles)}")


def normalize_target(text: str, rules: TextRules) -> str:
    """Returns `text` as the model is to write it; words, digits and symbols all stay. Idempotent.

    The order matters: marks go before what they stand between is looked at, and everything is one kind of quote and
    one kind of hyphen before runs of them are shortened.
    """
    if rules.unicode_form:
        text = plain_digraphs(plain_forms(unicodedata.normalize("NFC", text)))
    if rules.invisible_marks:
        text = INVISIBLE.sub("", text)
    if rules.niqqud:
        text = plain_verse_marks(POINT.sub("", text))
    if rules.unicode_form:
        text = unicodedata.normalize("NFC", text)  # a removed mark may have stood between a letter and its accent
    if rules.quote_style != "keep":
        text = DOUBLED_QUOTE.sub('"', ascii_quotes(text))
    if rules.maqaf_style != "keep":
        text = ascii_hyphens(text)
    if rules.dashes:
        text = plain_dashes(text)
    if rules.whitespace:
        text = SPACE_BEFORE_PUNCTUATION.sub("", " ".join(text.split()))
    if rules.repeated_punctuation:
        text = shorten_runs(text)
    if rules.maqaf_style == "space":
        text = MAQAF_PLACE.sub(" ", text)
    if rules.quote_style == "hebrew":
        text = GERESH_PLACE.sub("׳", GERSHAYIM_PLACE.sub("״", text))
    return text


def shorten_runs(text: str) -> str:
    text = re.sub(r"\.{2,}", "...", text)
    text = re.sub(r"[!?]{2,}", lambda run: "".join(dict.fromkeys(run[0])), text)
    return re.sub(r'([,;:"-])\1+', r"\1", text)


def clean_previous(prev_transcript: str, rules: TextRules) -> str:
    """Returns the previous slice's transcript as context: without timestamps, written like a target."""
    return normalize_target(CONTROL_TOKEN.sub(" ", without_prefix(prev_transcript)), rules)


def has_hebrew(text: str) -> bool:
    return re.search(f"[{HEBREW}]", text) is not None


def script_shares(text: str) -> dict[str, float]:
    """Shares of `hebrew`, `latin` and `digit` among the letters and digits of `text`; all 0 when it has none."""
    total = len(SPOKEN.findall(text)) or 1
    scripts = {"hebrew": f"[{HEBREW}]", "latin": f"[{LATIN}]", "digit": r"\d"}
    return {script: len(re.findall(pattern, text)) / total for script, pattern in scripts.items()}


# ——— Timestamps ———
TIMESTAMP = re.compile(r"<\|(\d+\.\d+)\|>")  # seconds from the slice's start, in the corpora on a grid of 0.02
CONTROL_REASON = "control token in the text:"
PAST_THE_END = 0.1  # seconds that a timestamp may lie behind the end of the audio: rounding, and padding of codecs


@dataclass(frozen=True)
class Segment:
    """Words and the seconds in which they are spoken."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Segments:
    """What a transcript says about its audio."""

    closed: list[Segment] | None  # in order, without overlap; None: the transcript has no timestamps
    open_tail: bool  # after the last closed segment comes speech that is not in `text`
    text: str  # the closed segments' words, or the transcript without timestamps; not normalised


@dataclass(frozen=True)
class Piece:
    """A stretch of audio and exactly the words spoken in it."""

    start: float  # seconds
    end: float | None  # seconds; None: to the end of the audio
    text: str


@dataclass(frozen=True)
class Dropped:
    """A stretch of audio that no piece covers because its text is missing or does not fit."""

    start: float  # seconds
    end: float
    reason: str


# The model's own output begins with it; files written from its outputs have it, with marks and spaces around it too
PREFIX = re.compile(rf"(?:[\s{INVISIBLE.pattern[1:-1]}]*language\s+[a-z]+\s*<asr_text>)+", re.IGNORECASE)
IN_BRACKETS = re.compile(r"<[^<>]*>")
CONTROL_TOKEN = re.compile(
    r"<\|[^<>]*?\|>|</?(?:asr_text|timestamp|think|tool_call|tool_response|unk|pad|bos|eos|mask|s)>", re.IGNORECASE
)  # of this model and of those that transcripts come from


def without_hidden(text: str) -> str:
    """The text with hidden characters and points taken out of what stands in <…>: a token that they hide is one."""
    if "<" not in text:
        return text
    return IN_BRACKETS.sub(lambda found: POINT.sub("", INVISIBLE.sub("", found[0])), text)


def without_prefix(transcript: str) -> str:
    """The transcript without `language Hebrew<asr_text>` before it, which is the model's own."""
    transcript = without_hidden(transcript)
    return transcript[found.end() :] if (found := PREFIX.match(transcript)) else transcript


def spoken_language(output: str) -> str | None:
    """The language that a model's raw output names before its transcript; None where it names none."""
    found = PREFIX.match(without_hidden(output))
    return re.findall(r"language\s+([a-z]+)", found[0], re.IGNORECASE)[-1].capitalize() if found else None


def refuse_control_tokens(text: str) -> None:
    """Raises ValueError, with its name, for a control token in a transcript or a target."""
    if found := CONTROL_TOKEN.search(without_hidden(text)):
        raise ValueError(f"{CONTROL_REASON} {found[0]}")


def read_segments(transcript: str) -> Segments:
    """Reads `<|0.00|>text<|2.40|><|2.40|>more<|5.00|>`, as the corpora write it.

    A segment that goes on after the slice's end leaves a start without an end: the open tail. Its speech is in the
    audio, so only the audio up to the last closed end has its text. ivrit.ai's preparation writes no text after such
    a start; where another one does, nothing says how much of that text is spoken before the slice ends, so it is left
    out all the same.

    Raises:
        ValueError: timestamps that go backwards, text outside of the segments, or a token that is no timestamp.
    """
    transcript = without_hidden(transcript)
    texts = TIMESTAMP.split(transcript)  # text, time, text, time, …, text
    times = [float(time) for time in texts[1::2]]
    texts = [text.strip() for text in texts[0::2]]
    for text in texts:
        refuse_control_tokens(text)
    if not times:
        return Segments(closed=None, open_tail=False, text=texts[0])
    if times != sorted(times):
        raise ValueError("timestamps go backwards")
    if any(texts[0::2]):  # before the first start, or between an end and the next start
        raise ValueError("text outside of the segments")
    closed = [Segment(*segment) for segment in zip(times[0::2], times[1::2], texts[1::2], strict=False)]
    return Segments(closed, open_tail=len(times) % 2 == 1, text=join_texts(closed))


def cut_into_pieces(segments: Segments, seconds: float, longest: float) -> tuple[list[Piece], list[Dropped]]:
    """Divides a row into pieces of at most `longest` seconds, only where segments begin and end.

    Args:
        segments: the row's transcript, from `read_segments`.
        seconds: of its audio.
        longest: seconds that a piece may last.

    Returns:
        The pieces, and what was dropped. A row that fits stays one piece from 0 to the end, or, when it has an open
        tail, to its last closed end. A longer one is packed greedily, in order; a segment that is too long by itself
        is dropped, and no piece reaches across it. Silence between pieces belongs to none and is not reported.
    """
    if segments.closed is None:
        if seconds <= longest:
            return [Piece(0.0, None, segments.text)], []
        return [], [Dropped(0.0, seconds, f"longer than {longest:g} s, without timestamps")]
    inside = [segment for segment in segments.closed if segment.end <= seconds + PAST_THE_END]
    past_the_end = len(inside) < len(segments.closed)
    valid_until, dropped = seconds, []
    if past_the_end or segments.open_tail:
        valid_until = min(inside[-1].end, seconds) if inside else 0.0
        if valid_until < seconds:
            reason = "timestamps past the end of the audio" if past_the_end else "last segment without an end timestamp"
            dropped.append(Dropped(valid_until, seconds, reason))
    if not inside:
        return [], dropped
    if valid_until <= longest:
        return [Piece(0.0, valid_until if valid_until < seconds else None, join_texts(inside))], dropped
    limit = longest + 1e-6  # seconds; sums of hundredths are not exact
    packs: list[list[Segment]] = [[]]
    for segment in inside:  # what follows a dropped segment ends too late for the pack before it
        if segment.end - segment.start > limit:
            dropped.append(Dropped(segment.start, segment.end, f"segment longer than {longest:g} s"))
        elif packs[-1] and segment.end - packs[-1][0].start > limit:
            packs.append([segment])
        else:
            packs[-1].append(segment)
    return [Piece(pack[0].start, pack[-1].end, join_texts(pack)) for pack in packs if pack], dropped


def join_texts(segments: list[Segment]) -> str:
    return " ".join(segment.text for segment in segments if segment.text)
