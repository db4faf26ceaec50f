"""Targets are written as the rules say, and every piece of a recording carries the words that are spoken in it."""

import itertools
import random
import re

import pytest

from hebrew_asr.text.scoring import leaderboard_normalize
from hebrew_asr.text.targets import (
    SPOKEN,
    Segment,
    TextRules,
    clean_previous,
    cut_into_pieces,
    has_hebrew,
    normalize_target,
    read_segments,
    script_shares,
    spoken_language,
    without_prefix,
)

SWITCHES = ("unicode_form", "niqqud", "invisible_marks", "dashes", "repeated_punctuation", "whitespace")
STYLES = list(itertools.product(("ascii", "hebrew", "keep"), ("hyphen", "space", "keep")))
NOTHING = dict.fromkeys(SWITCHES, False) | {"quote_style": "keep", "maqaf_style": "keep"}

ONE_RULE = [  # rule, its value, text, target when only this rule is on
    ("unicode_form", True, "\ufb2aלום e\u0301 \ufb01lm", "ש\u05c1לום \u00e9 film"),
    ("unicode_form", True, "\ufb28ו\ufb4fף \ufb29 ½ m² ™", "תואלף + ½ m² ™"),
    ("unicode_form", True, "התפת\u05f0ת \u05f1ם \u05f2ן", "התפתוות וים יין"),
    ("niqqud", True, "שָׁלוֹם עוֹלָם, חׇכְמָה", "שלום עולם, חכמה"),
    ("niqqud", True, "בְּרֵאשִׁ֖ית בָּרָ֣א אֱלֹהִ֑ים׃", "בראשית ברא אלהים."),
    ("niqqud", True, "בית־ספר e\u0301", "בית־ספר e\u0301"),
    ("invisible_marks", True, "\u200fשלום\u200e \u202bעולם\u202c \u2067א\u2069\ufeff", "שלום עולם א"),
    ("invisible_marks", True, "מח\u00adשב\u200b\u200d\x00\n", "מחשב\n"),
    ("quote_style", "ascii", "צה״ל ארה\"ב ד״ר דו''ח", 'צה"ל ארה"ב ד"ר דו"ח'),
    ("quote_style", "ascii", "ג׳ירפה צ'יפס רח’ „כן“ «לא» don’t", "ג'ירפה צ'יפס רח' \"כן\" \"לא\" don't"),
    ("quote_style", "hebrew", "צה״ל בארה\"ב ד”ר דו''חות", "צה״ל בארה״ב ד״ר דו״חות"),
    ("quote_style", "hebrew", "ג'ירפה וצ’יפס ברח'", "ג׳ירפה וצ׳יפס ברח׳"),
    ("quote_style", "hebrew", 'הוא אמר ״כן״, "צה״ל" don’t 5"', 'הוא אמר "כן", "צה״ל" don\'t 5"'),
    ("quote_style", "hebrew", 'צַהַ"ל', "צַהַ״ל"),
    ("maqaf_style", "hyphen", "בית־ספר תל‑אביב ה־20 e-mail", "בית-ספר תל-אביב ה-20 e-mail"),
    ("maqaf_style", "space", "בית־ספר תל-אביב ה־20 e-mail 20-30", "בית ספר תל אביב ה 20 e-mail 20-30"),
    ("dashes", True, "1948–1967 כן—לא −5 רגע…", "1948-1967 כן - לא -5 רגע..."),
    ("repeated_punctuation", True, 'די!!! מה?!?! כן,,, טוב.... אה.. לא -- ""', 'די! מה?! כן, טוב... אה... לא - "'),
    ("whitespace", True, " שלום\u00a0\u202fעולם\t,\n מה  נשמע ?", "שלום עולם, מה נשמע?"),
    ("whitespace", True, "פיתוח .NET בשעה :30 :)", "פיתוח .NET בשעה :30 :)"),
]


@pytest.mark.parametrize(("rule", "value", "text", "target"), ONE_RULE)
def test_each_rule_does_its_own_work_and_none_when_it_is_off(rule, value, text, target):
    assert normalize_target(text, TextRules(**NOTHING | {rule: value})) == target
    assert normalize_target(text, TextRules(**NOTHING)) == text


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("הַמִּכְתָּב נִשְׁלַח ל־צה״ל !!!", 'המכתב נשלח ל-צה"ל!'),
        ("המחיר 3.5% יותר, ₪50 או 1,250 ₪.", "המחיר 3.5% יותר, ₪50 או 1,250 ₪."),
        ("ב־20:30 ב-12/05/2024 או 12.5.24", "ב-20:30 ב-12/05/2024 או 12.5.24"),
        ("שלחתי ל-WhatsApp של Google‏ ב-iPhone", "שלחתי ל-WhatsApp של Google ב-iPhone"),
        ("dana.levi@walla.co.il או https://he.wikipedia.org/wiki/?q=a_b&c=1",) * 2,
        ("C++ ו-C# ב-$5, 20°, a/b, 50+", "C++ ו-C# ב-$5, 20°, a/b, 50+"),
        ("רגע …  אני\u200f -- לא יודע ?!?!", "רגע... אני - לא יודע?!"),
        ("\u202bסעיף ב׳, תשפ״ד\u202c", "סעיף ב', תשפ\"ד"),
        ("\u200f \ufeff", ""),
    ],
)
def test_targets_with_the_default_rules(text, target):
    assert normalize_target(text, TextRules()) == target


def test_both_spellings_of_an_acronym_are_the_same_word_to_the_leaderboard():
    written = [normalize_target(text, TextRules()) for text in ("צה״ל וג׳ירפה", "צה\"ל וג'ירפה", "צה''ל וג’ירפה")]
    assert {leaderboard_normalize(text) for text in written} == {"צהל וגירפה"}


def test_normalising_a_target_again_changes_nothing():
    alphabet = (
        list("אבשםן") + "שׁ \ufb2a \ufb4f \ufb1f \u05f2 \ufb01 ½".split() + list("\u05b0\u05b8\u05c1\u0596\u0301\ufb1e")
        + list("׳״'\"’“‚«`") + list("־‐‑-–—−…") + list("..!?,;:׃׀") + list("  \n\u00a0\u2000")
        + list("\u200f\u200d\u202b\u00ad\ufe0f\x00") + list("aeZ5_₪%()\u212b=\u0338")
    )  # fmt: skip
    draw = random.Random(7)
    for _ in range(2000):
        text = "".join(draw.choices(alphabet, k=draw.randrange(1, 16)))
        some = {name: draw.random() < 0.7 for name in SWITCHES}
        for quote_style, maqaf_style in STYLES:
            for switches in ({}, some):
                rules = TextRules(quote_style=quote_style, maqaf_style=maqaf_style, **switches)
                once = normalize_target(text, rules)
                assert normalize_target(once, rules) == once, (text, rules)


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match="quote_style is 'latin', must be one of ascii, hebrew, keep"):
        TextRules(quote_style="latin")
    with pytest.raises(ValueError, match="maqaf_style"):
        TextRules(maqaf_style="dash")


def test_scripts_are_counted_among_letters_and_digits():
    assert script_shares("שָׁלוֹם, Tel 12!") == {"hebrew": 4 / 9, "latin": 3 / 9, "digit": 2 / 9}
    assert script_shares("שלום мир") == {"hebrew": 4 / 7, "latin": 0, "digit": 0}
    assert script_shares("...") == {"hebrew": 0, "latin": 0, "digit": 0}
    assert has_hebrew("OK, כן") and not has_hebrew("OK 5 ־ \u05b8")
    assert SPOKEN.search("5") and SPOKEN.search("- א") and not SPOKEN.search('?! ... "_" ־ ״ \u05b8 ₪')


@pytest.mark.parametrize(
    ("transcript", "closed", "open_tail", "text"),
    [
        ("שלום עולם", None, False, "שלום עולם"),
        ("", None, False, ""),
        ("<|0.00|> שלום<|2.40|><|2.40|> עולם<|5.00|>", [(0, 2.4, "שלום"), (2.4, 5, "עולם")], False, "שלום עולם"),
        ("<|0.00|>א<|2.40|>\n<|26.10|>", [(0, 2.4, "א")], True, "א"),
        ("<|0.00|>א<|2.40|><|3.00|> חצי משפט", [(0, 2.4, "א")], True, "א"),
        ("<|0.00|>א<|1.00|><|1.00|><|2.00|>", [(0, 1, "א"), (1, 2, "")], False, "א"),
        ("<|0.00|>", [], True, ""),
    ],
)
def test_transcripts_are_read_along_their_timestamps(transcript, closed, open_tail, text):
    segments = read_segments(transcript)
    assert segments.closed == (None if closed is None else [Segment(*segment) for segment in closed])
    assert (segments.open_tail, segments.text) == (open_tail, text)


@pytest.mark.parametrize(
    ("transcript", "reason"),
    [
        ("<|2.00|>א<|1.00|>", "timestamps go backwards"),
        ("<|0.00|>א<|2.00|><|1.98|>ב<|3.00|>", "timestamps go backwards"),
        ("א<|0.00|>ב<|1.00|>", "text outside of the segments"),
        ("<|0.00|>א<|1.00|>ב<|2.00|>ג<|3.00|>", "text outside of the segments"),
        ("<|0.00|>א<|1.00|>ב", "text outside of the segments"),
        ("<|he|><|0.00|>א<|1.00|>", "control token in the text: <|he|>"),
        ("שלום<|im_end|>", "control token in the text: <|im_end|>"),
    ],
)
def test_broken_transcripts_are_refused_with_the_reason(transcript, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_segments(transcript)


def test_a_raw_output_is_its_language_and_its_text():
    for raw in (
        "language Hebrew<asr_text>שלום",
        "\u200elanguage hebrew<asr_text>שלום",
        " Language Hebrew<asr_text>שלום",
    ):
        assert (spoken_language(raw), without_prefix(raw)) == ("Hebrew", "שלום")
    assert (spoken_language("שלום"), without_prefix("שלום")) == (None, "שלום")


def test_previous_transcripts_lose_their_timestamps_and_are_written_like_targets():
    previous = "<|0.00|> אמר הַשָּׂר<|2.40|><|2.40|>בצה״ל.<|5.00|><|26.00|>"
    assert clean_previous(previous, TextRules()) == 'אמר השר בצה"ל.'


THREE = "<|1.00|>א<|8.00|><|9.00|>ב<|18.00|><|18.00|>ג<|29.00|>"


@pytest.mark.parametrize(
    ("transcript", "seconds", "longest", "pieces", "dropped"),
    [
        (THREE, 30, 30, [(0, None, "א ב ג")], []),
        (THREE, 30.02, 30, [(1, 29, "א ב ג")], []),
        (THREE, 30, 20, [(1, 18, "א ב"), (18, 29, "ג")], []),
        (THREE, 30, 17, [(1, 18, "א ב"), (18, 29, "ג")], []),
        (THREE, 30, 10, [(1, 8, "א"), (9, 18, "ב")], [(18, 29, "segment longer than 10 s")]),
        (THREE + "<|29.50|>", 30.5, 30, [(0, 29, "א ב ג")], [(29, 30.5, "last segment without an end timestamp")]),
        (THREE + "<|29.50|>", 28.95, 28.95, [(0, None, "א ב ג")], []),
        (THREE, 12, 30, [(0, 8, "א")], [(8, 12, "timestamps past the end of the audio")]),
        ("<|0.00|>", 30, 30, [], [(0, 30, "last segment without an end timestamp")]),
        ("שלום", 9, 10, [(0, None, "שלום")], []),
        ("שלום", 11, 10, [], [(0, 11, "longer than 10 s, without timestamps")]),
    ],
)
def test_rows_are_cut_only_where_segments_begin_and_end(transcript, seconds, longest, pieces, dropped):
    found, lost = cut_into_pieces(read_segments(transcript), seconds, longest)
    assert [(piece.start, piece.end, piece.text) for piece in found] == pieces
    assert [(span.start, span.end, span.reason) for span in lost] == dropped


def test_every_piece_holds_exactly_the_words_spoken_between_its_start_and_end():
    draw = random.Random(11)
    for row in range(500):
        now, words, transcript = 0, [], ""  # times in hundredths of a second, on the corpora's grid
        for _ in range(draw.randrange(1, 12)):  # segments of 1–12 words of 0.2–2 s, silence between them
            now += draw.randrange(0, 100, 2)
            start, spoken = now, []
            for _ in range(draw.randrange(1, 13)):
                now += (length := draw.randrange(20, 200, 2))
                spoken.append((f"מילה{row}_{len(words) + len(spoken)}", now - length, now))
            transcript += f"<|{start / 100:.2f}|> {' '.join(word for word, _, _ in spoken)}<|{now / 100:.2f}|>"
            words += spoken
        if draw.random() < 0.4:  # the slice ends within a last segment
            transcript += f"<|{now / 100:.2f}|>" + draw.choice(["", " תחילת משפט"])
            words.append(("נקטע", now, now := now + 150))
        elif draw.random() < 0.2:  # a file that lost its end
            now = round(now * draw.uniform(0.3, 0.9))
        longest = draw.choice([4, 10, 30])
        pieces, dropped = cut_into_pieces(read_segments(transcript), now / 100, longest)
        spans = [(round(100 * p.start), now if p.end is None else round(100 * p.end)) for p in pieces]
        lost = [(round(100 * span.start), round(100 * span.end)) for span in dropped]
        for piece, (start, end) in zip(pieces, spans, strict=True):
            heard = [word for word, begins, ends in words if begins < end and ends > start]  # also if only partly
            assert piece.text.split() == heard and end - start <= 100 * longest
        for word, begins, ends in words:  # nothing disappears in silence
            assert any(start < ends and begins < end for start, end in spans + lost) or begins >= now, word
