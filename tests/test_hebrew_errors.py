"""Every edit of the plain WER falls into one class, and the class is the one a reader of Hebrew would name."""

import random
import time

import jiwer
import pytest

from hebrew_asr.text.error_classes import CLASSES, LISTED, class_shares, read_errors, read_number, spellings_of
from hebrew_asr.text.scoring import leaderboard_normalize

CASES = {
    "spelling": """
        תוכנית / תכנית = listed
        התוכניות שלהם / התכניות שלהם = a listed word with a prefix and in the plural
        וכשהתוכנית / וכשהתכנית = four prefix letters
        צוהריים / צהרים = two letters left out
        אומנם / אמנם = qamats qatan, 2017
        קורבן / קרבן = qamats qatan, 2017
        אונייה / אניה = qamats qatan and the doubled yod
        אמיתי / אמתי = i of a word whose base has none, 2017
        לעיתים / לעתים = the same after a prefix
        לצידו / לצדו = the same
        איתך / אתך = the same
        אימא / אמא = hiriq
        אישה / אשה = hiriq
        ניסיון / נסיון = hiriq
        הזיכרונות / הזכרונות = hiriq, plural
        מילים / מלים = hiriq
        הכול / הכל = holam
        כולם / כלם = qubuts
        שלושה / שלשה = holam
        הייתה / היתה = doubled yod
        עניין / ענין = doubled yod
        בניין / בנין = doubled yod
        שמיים / שמים = -יים, 2017
        מייד / מיד = doubled yod, 2017
        ירושלים / ירושליים = -יים
        תעשייה / תעשיה = -ייה
        שנייה / שניה = -ייה
        מצוין / מצויין = a yod beside a vav that is a vowel is not doubled
        פרויקט / פרוייקט = the same in a loanword
        מדויקת / מדוייקת = the same in the feminine
        דווקא / דוקא = doubled vav
        תקווה / תקוה = doubled vav
        טלוויזיה / טלויזיה = doubled vav
        הוועדה / הועדה = an initial vav is doubled after a prefix
        דוגמה / דוגמא = alef for he
        בלגן / בלאגן = alef of a loanword
        עכשיו / עכשו = yod before a final vav
        תיקח / תקח = a future form
    """,
    "final_letter": """
        שלום / שלומ = mem
        ארץ / ארצ = tsadi
        כך / ככ = kaf
        הבן / הבנ = nun
        כף / כפ = pe
        מיקרוסקופ / מיקרוסקוף = the other way round
    """,
    "joined": """
        הבית / ה בית = an article split off
        ב ירושלים / בירושלים = a preposition attached
        וכשהלכנו / וכש הלכנו = a sequence of prefixes
        שה ילד / שהילד = two prefixes
        בית ספר / ביתספר = two words written as one
        בן אדם / בנאדם = a final letter turns ordinary inside
        אי אפשר / איאפשר = two words written as one
        אף על פי כן / אףעלפיכן = four words
        יושב ראש / יו שבראש = divided at another place
        כל כך / כלכך = two words written as one
        אתה ו אני / אתה ואני = among words that agree
    """,
    "gershayim": """
        צה״ל / צה"ל = an abbreviation
        ד״ר / דר = two letters
        מנכ״לית / מנכלית = an abbreviation with a suffix
        ח״כים / חכים = a single letter that is no prefix
        ג׳ירפה / ג'ירפה = geresh of a foreign sound
        צ׳יפס / ציפס = the same
        סנדוויצ׳ים / סנדוויצים = inside a word
        תשפ״ד / תשפד = a year
    """,
    "number": """
        25 / עשרים וחמש = feminine
        עשרים וחמישה / 25 = masculine
        5 / חמש = one digit
        2 / שתי = construct
        3000 / שלושת אלפים = construct of a thousand
        12 / שנים עשר = שנים in a teen
        ב 25 / בעשרים וחמש = a prefix on both sides
        ב2 / בשתיים = a prefix on the digits
        1,000 / 1000 = a separator
        1948 / אלף תשע מאות ארבעים ושמונה = a year
        350 / שלוש מאות וחמישים = hundreds
        0 / אפס = zero
        עוד 7 ימים / עוד שבעה ימים = among words that agree
    """,
    "prefix": """
        הבית / בית = an article more
        ילד / הילד = an article less
        ובית / בית = and
        בבית / לבית = another preposition
        שהלך / הלך = that
        היד / יד = two letters are left
        התוכנית / תכנית = besides another spelling
    """,
    "latin": """
        whatsapp / וואטסאפ = Latin against Hebrew
        פייסבוק / Facebook = the other way round
    """,
    "word": """
        עם / אם = other words that sound alike
        הוא / היא = ו and י exchanged
        קרא / קרה = other words that sound alike
        שר / שיר = minister, song
        ספר / סיפר = a short spelling of several words
        ספר / סופר = book, author
        דבר / דיבר = cannot be told from a short spelling
        אותו / אתו = him, with him
        אתכם / איתכם = you, with you
        אתה / איתה = you, with her
        אלו / אליו = these, to him
        שניים / שנים = two, years
        פעמיים / פעמים = twice, times
        חודשיים / חודשים = two months, months
        עדיין / עדין = still, gentle
        חייל / חיל = soldier, corps
        ראייה / ראיה = sight, proof
        כלליים / כללים = general, rules
        רווח / רוח = profit, wind
        מכוון / מכון = aimed, institute
        מוותר / מותר = gives up, allowed
        השוואה / השואה = comparison, the Holocaust
        מקווים / מקויים = hope, fulfilled: two rules do not add up
        סיכויו / סיכוייו = his chance, his chances
        לימוד / למוד = not listed
        שכוח / שכח = he forgot is not a prefix and a short spelling
        משהו / מישהו = something, someone
        כותבת / כתבת = writes, you wrote
        שלי / לי = no prefix
        כמה / מה = no prefix
        הוא / בוא = no word is left
        25 / עשרים ושש = another number
        25 / בעשרים וחמש = a prefix on one side only
        2 / שנים = years
        7 / שבוע = no numeral
        15 / חמש ועשר = two numbers
        2.5 / 25 = a decimal is not the same digits
        05 / חמש = no whole number
        חמש / חמישה = both in words: the gender is wrong
        hello / help = both Latin
        שלום / עולם = other words
    """,
}
TABLE = [
    pytest.param(*map(str.strip, pair.split("/")), name, id=f"{name}: {why.strip()}: {pair.strip()}")
    for name, lines in CASES.items()
    for pair, why in (line.split(" = ") for line in lines.strip().splitlines())
]


def plain_edits(reference: str, hypothesis: str) -> int:
    """Word edits by the recurrence itself."""
    row = list(range(len(hypothesis.split()) + 1))
    for i, r in enumerate(reference.split(), 1):
        previous, row[0] = row[0], i
        for j, h in enumerate(hypothesis.split(), 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (r != h))
    return row[-1]


@pytest.mark.parametrize(("reference", "hypothesis", "error_class"), TABLE)
def test_pairs_of_the_table_fall_into_their_class_whichever_is_the_reference(reference, hypothesis, error_class):
    for pair in ((reference, hypothesis), (hypothesis, reference)):
        pair = [leaderboard_normalize(text) for text in pair]
        counts, _ = read_errors(*pair)
        assert {name: count for name, count in counts.items() if count} == {error_class: plain_edits(*pair)}


def test_every_class_has_a_rule_and_pairs_that_show_it():
    assert set(CASES) == set(CLASSES)
    assert len(TABLE) > 100 and len({(p.values[0], p.values[1]) for p in TABLE}) == len(TABLE)


def random_pair(rng: random.Random) -> tuple[str, str]:
    """Words that meet many rules at once, and a hypothesis that is a garbled copy of them."""
    known = [p.values[side] for p in TABLE for side in (0, 1)]
    vocabulary = "ב ה ו ש 5 25 000 עשרים וחמש מאות אלף abc בית ספר לא לא צה ל".split() + known
    reference = leaderboard_normalize(" ".join(rng.choices(vocabulary, k=rng.randrange(1, 12))))
    words = reference.split()
    for _ in range(rng.randrange(8)):
        place = rng.randrange(len(words) + 1)
        words[place : place + rng.randrange(3)] = rng.choices(vocabulary, k=rng.randrange(3))
    text = leaderboard_normalize(" ".join(words))
    if rng.random() < 0.3 and text:  # divide the letters anew
        place = rng.randrange(len(text))
        text = text[:place] + rng.choice(["", " "]) + text[place + (text[place] == " ") :]
    return reference, leaderboard_normalize(text)


def test_classes_sum_to_the_edits_of_the_plain_wer_and_the_chunks_hold_every_word():
    rng = random.Random(3)
    seen = dict.fromkeys(CLASSES, 0)
    for _ in range(3000):
        reference, hypothesis = random_pair(rng)
        counts, chunks = read_errors(reference, hypothesis)
        output = jiwer.process_words(reference, hypothesis)
        assert sum(counts.values()) == output.substitutions + output.deletions + output.insertions
        assert sum(counts.values()) == plain_edits(reference, hypothesis) == sum(chunk.edits for chunk in chunks)
        assert [word for chunk in chunks for word in chunk.reference] == reference.split()
        assert [word for chunk in chunks for word in chunk.hypothesis] == hypothesis.split()
        for kind, left, right, error_class in chunks:
            assert {"equal": left == right, "substitute": left and right and left != right}.get(kind, True)
            assert {"delete": left and not right, "insert": right and not left}.get(kind, True)
            assert (error_class is None) == (kind == "equal")
        seen = {name: seen[name] + counts[name] for name in CLASSES}
    assert all(seen.values()), seen


def test_chunks_are_what_a_reader_would_draw():
    _, chunks = read_errors(
        "אתמול הלכנו ל בית ספר ב 25 מאי עם כל ה חברים", "אתמול הלכנו לבית ספר בעשרים וחמישה מאי עם חברים"
    )
    assert chunks == [
        ("equal", ("אתמול", "הלכנו"), ("אתמול", "הלכנו"), None),
        ("substitute", ("ל", "בית"), ("לבית",), "joined"),
        ("equal", ("ספר",), ("ספר",), None),
        ("substitute", ("ב", "25"), ("בעשרים", "וחמישה"), "number"),
        ("equal", ("מאי", "עם"), ("מאי", "עם"), None),
        ("delete", ("כל", "ה"), (), "word"),
        ("equal", ("חברים",), ("חברים",), None),
    ]


def test_an_explained_pair_is_found_beside_another_error():
    counts, chunks = read_errors("ראיתי את זה ספר", "ראיתי את הספר")
    assert chunks[1:] == [("delete", ("זה",), (), "word"), ("substitute", ("ספר",), ("הספר",), "prefix")]
    assert counts["prefix"] == counts["word"] == 1


def test_an_empty_hypothesis_is_one_deletion_and_equal_texts_are_no_error():
    assert read_errors("אחת שתיים", "")[1] == [("delete", ("אחת", "שתיים"), (), "word")]
    counts, chunks = read_errors("אחת שתיים", "אחת שתיים")
    assert sum(counts.values()) == 0 and [chunk.kind for chunk in chunks] == ["equal"]


def test_no_spelling_stands_for_two_words():
    forms = {}
    for entry in LISTED.split():
        for spelling, form in spellings_of(entry):
            assert forms.setdefault(spelling, form) == form, spelling


FEMININE = "אפס אחת שתיים שלוש ארבע חמש שש שבע שמונה תשע עשר".split()
MASCULINE = "אפס אחד שניים שלושה ארבעה חמישה שישה שבעה שמונה תשעה עשרה".split()
CONSTRUCT = "- - שני שלושת ארבעת חמשת ששת שבעת שמונת תשעת עשרת".split()
TENS = "- עשר עשרים שלושים ארבעים חמישים שישים שבעים שמונים תשעים".split()


def number_in_words(number: int, units: list[str]) -> str:
    """The number as it is read out, with ו before its last part: 1,225 is אלף מאתיים עשרים וחמש."""
    parts = []
    thousands, rest = divmod(number, 1000)
    if thousands == 1:
        parts.append("אלף")
    elif thousands == 2:
        parts.append("אלפיים")
    elif thousands in range(3, 11):
        parts.append(CONSTRUCT[thousands] + " אלפים")
    elif thousands:
        parts.append(number_in_words(thousands, MASCULINE) + " אלף")
    hundreds, rest = divmod(rest, 100)
    if hundreds:
        parts.append(["מאה", "מאתיים"][hundreds - 1] if hundreds < 3 else FEMININE[hundreds] + " מאות")
    if rest > 10 and rest < 20:
        two = {"שתיים": "שתים", "שניים": "שנים"}.get(units[rest - 10], units[rest - 10])
        parts.append(two + (" עשרה" if units is FEMININE else " עשר"))
    elif rest > 20 and rest % 10:
        parts += [TENS[rest // 10], units[rest % 10]]
    elif rest >= 20:
        parts.append(TENS[rest // 10])
    elif rest or not parts:
        parts.append(units[rest])
    return " ".join([*parts[:-1], "ו" * (len(parts) > 1) + parts[-1]])


@pytest.mark.parametrize("units", [FEMININE, MASCULINE], ids=["feminine", "masculine"])
def test_numbers_read_out_are_read_back(units):
    numbers = [*range(2200), *random.Random(1).sample(range(1_000_000), 3000), 999_999]
    for number in numbers:
        words = number_in_words(number, units)
        assert read_number(tuple(words.split())) == ("", number), words
        assert read_number(tuple(("וכשב" + words).split())) == ("וכשב", number), words
        assert read_number(tuple(f"{number:,}".replace(",", " ").split())) == ("", number)


@pytest.mark.parametrize(
    "text",
    "שנים;חמש ועשר;עשרים שלושים;חמש שש;מאה מאה;מאות;אלפים;אלף אלף;עשרים ואפס;שתי מאות;אחת מאות;2 5;1000 000;1000000;"
    "025;חמש ואלף;שלוש ומאות;שבת;בית;וב;ראשון".split(";"),
)
def test_what_is_no_whole_number_below_a_million_is_not_read_as_one(text):
    assert read_number(tuple(text.split())) is None


def test_shares_are_percent_of_all_edits():
    counts = dict.fromkeys(CLASSES, 0)
    assert set(class_shares(counts).values()) == {0.0}
    shares = class_shares(counts | {"word": 3, "spelling": 1})
    assert (shares["word"], shares["spelling"], sum(shares.values())) == (75.0, 25.0, 100.0)


def test_texts_without_a_word_in_common_take_no_time_that_grows_with_their_square():
    reference = " ".join(f"מילה{number}א" for number in range(3000))
    hypothesis = " ".join(f"word{number}" for number in range(2500))
    began = time.process_time()
    counts, chunks = read_errors(f"שלום {reference} שלום", f"שלום {hypothesis} שלום")
    assert time.process_time() - began < 20 and sum(counts.values()) == 3000 and counts["latin"] == 2500
    assert sum((chunk.reference for chunk in chunks), ()) == ("שלום", *reference.split(), "שלום")
    assert sum((chunk.hypothesis for chunk in chunks), ()) == ("שלום", *hypothesis.split(), "שלום")
