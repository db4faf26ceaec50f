"""Subtitles and transcript formats: what must hold for any timed words, and the cases that break such code."""

import itertools
import json
import random
import re

import pytest

from hebrew_asr.text.subtitles import (
    Segment,
    Word,
    as_json,
    clock,
    is_right_to_left,
    lines_of,
    make_cues,
    plain_text,
    segments_of,
    spread,
    srt,
    tsv,
    vtt,
    with_marks,
    words_of,
)

LETTERS = "אבגדהוזחטיכלמנסעפצקרשת"


def random_words(rng: random.Random, count: int, latin: float = 0.1) -> list[Word]:
    """Words with pauses, punctuation, Latin, digits, now and then very long, very close together, or of no length."""
    words, now = [], rng.choice([0.0, rng.uniform(0, 4000)])
    pace = rng.choice([0.0, 0.02, 0.1, 0.35, 0.8])
    for _ in range(count):
        length = rng.choice([1, 2, 3, 4, 5, 6, 7, 12, rng.choice([12, 41, 42, 43, 90, 300])])
        alphabet = rng.choice(["abcXYZ", "0123456789", "<&>-"]) if rng.random() < latin else LETTERS
        text = "".join(rng.choice(alphabet) for _ in range(length)) + rng.choice(["", "", "", "", ",", ".", "?", '."'])
        end = now + rng.uniform(0, 2) * pace
        words.append(Word(text, now, end))
        now = end + rng.choice([0, 0, 0, 0.1, rng.uniform(0, 1), rng.uniform(0, 12)])
    return words


def check(cues, words) -> None:
    assert "".join(line.replace(" ", "") for cue in cues for line in cue.lines) == "".join(w.text for w in words)
    for cue in cues:
        assert 1 <= len(cue.lines) <= 2
        assert all(0 < len(line) <= 42 for line in cue.lines)
        assert 1000 <= cue.end - cue.start <= 7000
    assert all(a.end <= b.start for a, b in itertools.pairwise(cues))


@pytest.mark.parametrize("seed", range(60))
def test_any_words_become_cues_within_the_limits_and_nothing_is_lost(seed):
    rng = random.Random(seed)
    words = random_words(rng, rng.choice([1, 2, 5, 20, 150]))
    cues = make_cues(words)
    check(cues, words)
    assert all(cue.start >= 1000 * words[0].start - 1 for cue in cues)


def partitions(count: int):
    for cuts in itertools.product([False, True], repeat=count - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), count]
        yield list(itertools.pairwise(edges))


@pytest.mark.parametrize("seed", range(60))
def test_no_cue_is_late_where_some_partition_has_none_late(seed):
    rng = random.Random(seed)
    pace, now, words = rng.choice([0.1, 0.3, 0.6]), 0.0, []
    for _ in range(8):
        end = now + rng.uniform(0.5, 1.5) * pace
        words.append(Word("א" * rng.randint(2, 30), now, end))
        now = end + rng.choice([0, 0, 0.3, 1.5])

    def punctual(parts) -> bool:
        for i, j in parts:
            if not lines_of([w.text for w in words[i:j]]):
                return False
            if j - i > 1 and round(1000 * words[j - 1].end) - round(1000 * words[i].start) > 7000:
                return False
            if j < len(words) and round(1000 * words[j].start) - round(1000 * words[i].start) < 1000:
                return False
        return True

    starts = {round(1000 * word.start) for word in words}
    is_possible = any(punctual(parts) for parts in partitions(len(words)))
    assert all(cue.start in starts for cue in make_cues(words)) or not is_possible


def test_cues_end_at_sentences_and_pauses():
    first = spread("הילד אכל תפוח ירוק בבית.", 0.0, 2.0)
    second = spread("המורה קנה ספר חדש", 2.1, 4.0)
    third = spread("השכן מכר שולחן", 6.0, 8.0)
    cues = make_cues(first + second + third)
    assert [" ".join(cue.lines) for cue in cues] == [
        "הילד אכל תפוח ירוק בבית.",
        "המורה קנה ספר חדש",
        "השכן מכר שולחן",
    ]
    assert [cue.start for cue in cues] == [0, 2100, 6000]


def test_a_word_of_300_characters_is_divided():
    words = [Word("א", 0.0, 0.2), Word("ב" * 300, 0.2, 9.0), Word("ג.", 9.1, 9.3)]
    cues = make_cues(words)
    check(cues, words)
    assert cues[-1].start <= 9100


def test_words_a_tenth_of_a_second_apart_are_delayed_no_more_than_they_must():
    words = [Word("אבגדה", i / 10, i / 10 + 0.1) for i in range(100)]  # 60 characters a second: 84 need 1.4 s
    cues = make_cues(words)
    check(cues, words)
    assert {cue.start for cue in cues} <= {100 * i for i in range(100)}


def test_an_hour_of_silence():
    assert make_cues([]) == []
    assert (srt([]), vtt([]), tsv([]), plain_text([])) == ("", "WEBVTT\n", "start\tend\ttext\n", "")
    cues = make_cues([Word("שלום", 1.0, 1.3), Word("להתראות", 3601.0, 3601.5)])
    assert [(cue.start, cue.end) for cue in cues] == [(1000, 2000), (3_601_000, 3_602_000)]
    assert "01:00:01,000 --> 01:00:02,000" in srt([Segment(3601.0, 3601.5, "להתראות")])


def test_a_single_word_may_last_longer_than_a_cue():
    (cue,) = make_cues([Word("אההה", 2.0, 30.0)])
    assert (cue.start, cue.end) == (2000, 9000)


def test_two_lines_are_balanced_and_break_at_punctuation():
    assert lines_of("הילד אכל תפוח".split()) == ("הילד אכל תפוח",)
    first, second = lines_of("הילד הקטן אכל תפוח ירוק, והמורה קנה ספר חדש בחנות".split())
    assert (first, second) == ("הילד הקטן אכל תפוח ירוק,", "והמורה קנה ספר חדש בחנות")
    assert lines_of(["א" * 42, "ב" * 42, "ג"]) == ()


@pytest.mark.parametrize(
    "line, marked",
    [
        ("שלום לכולם", False),
        ("שָׁלוֹם", False),  # niqqud has no direction of its own
        ("שלום.", True),  # the full stop would stand at the right
        ("ב-2024 היה", True),
        ("GPT הוא מודל", True),  # begins with Latin: the line would be taken for English
        ("hello there.", False),
        ("The word שלום means peace.", False),
    ],
)
def test_marks_stand_where_players_need_them(line, marked):
    (written,) = with_marks((line,))
    assert written == (f"\u202b{line}\u202c" if marked else line)


def test_a_latin_line_of_a_hebrew_cue_is_right_to_left_too():
    assert with_marks(("הם השתמשו במודל החדש של", "OpenAI GPT-4.")) == [
        "הם השתמשו במודל החדש של",
        "\u202bOpenAI GPT-4.\u202c",
    ]
    assert not is_right_to_left("123 …")


def test_formats():
    segments = [Segment(0.5, 2.0, "שלום <b> & עולם"), Segment(61.2344, 63.0, "hello", [Word("hello", 61.2344, 62.0)])]
    assert srt(segments) == (
        "1\n00:00:00,500 --> 00:00:02,000\n\u202bשלום <b> & עולם\u202c\n\n2\n00:01:01,234 --> 00:01:02,234\nhello\n"
    )
    assert vtt(segments) == (
        "WEBVTT\n\n00:00:00.500 --> 00:00:02.000\n\u202bשלום &lt;b&gt; &amp; עולם\u202c\n\n"
        "00:01:01.234 --> 00:01:02.234\nhello\n"
    )
    assert tsv(segments) == "start\tend\ttext\n500\t2000\tשלום <b> & עולם\n61234\t63000\thello\n"
    assert plain_text([Segment(0, 1, "א\tב\nג")]) == "א ב ג\n"


@pytest.mark.parametrize("seed", range(5))
def test_json_holds_everything_and_is_read_back(seed):
    rng = random.Random(seed)
    words = [Word(w.text, round(w.start, 3), round(w.end, 3)) for w in random_words(rng, 30)]
    segments = [
        Segment(words[0].start, words[-1].end, " ".join(w.text for w in words), words),
        Segment(words[-1].end + 1, words[-1].end + 2, "בלי זמנים"),
    ]
    text = as_json(segments, {"file": "א.wav"})
    content = json.loads(text)
    assert content["file"] == "א.wav"
    assert segments_of(content) == [Segment(round(s.start, 3), round(s.end, 3), s.text, s.words) for s in segments]
    assert srt(segments_of(content)) == srt(segments)


def test_subtitle_clocks_and_blocks_are_well_formed():
    segments = [Segment(0, 0, "", random_words(random.Random(3), 80, latin=0.5))]
    stamp = r"\d\d+:[0-5]\d:[0-5]\d[,.]\d{3}"
    for text, separator in ((srt(segments), ","), (vtt(segments).removeprefix("WEBVTT\n\n"), ".")):
        for block in text.split("\n\n"):
            lines = block.strip("\n").split("\n")
            times = lines[1] if separator == "," else lines[0]
            assert re.fullmatch(f"{stamp} --> {stamp}", times)
            assert len(lines) <= 4 and all(lines)
    assert clock(3_600_000 * 100 + 1, ",") == "100:00:00,001"


def test_times_that_are_spread_follow_the_characters():
    words = spread("אב אבגדה", 10.0, 19.0)
    assert [word.text for word in words] == ["אב", "אבגדה"]
    assert (words[0].start, words[0].end, words[1].end) == (10.0, 13.0, 19.0)
    assert words_of([Segment(0, 1, "  ")]) == []
