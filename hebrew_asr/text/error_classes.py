"""Which errors a Hebrew transcript holds: every edit of the plain WER in exactly one class. It excuses none of them.

Without vowel points a Hebrew spelling often stands for several words (ספר: book, barber, he counted), and a ו or י
more may be the same word written fuller (תכנית, תוכנית) or another one (שר minister, שיר song; הוא he, היא she).
Letters alone do not tell the two apart, so a difference is taken for spelling only where a rule or a listed word
vouches for it, and for another word everywhere else. What this cannot see:

- A full or short spelling of the same word that is not listed (דבר meant as דיבר, he spoke) is counted as `word`.
- A listed spelling that also is a rare other word (מיד: at once, or from a hand) is counted as `spelling`.
- `joined` looks at letters only: בלילה (at night) against בלי לה (without her) is counted there.
- `gershayim` looks at letters only: a lone last letter that no ״ left behind (של ו for שלו) is counted there.
- `prefix` looks at letters only: שחור (black) against בחור (lad), מדבר (desert) against דבר (thing) are counted there.
- `number` leaves out what is no whole number below a million: 3.5 and 8:30 (two words each after normalisation),
  fractions, ordinals, millions.

The spellings are those of the Academy of the Hebrew Language's rules of ktiv male (2017) and of the rules and habits
they replaced. Imports nothing of this project.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import jiwer

CLASSES = {
    "spelling": "The same word in another accepted or common spelling: a vav, yod or alef written or left out, or alef "
    "for a final he, in a listed word, or a yod doubled after a vav (מצוין, מצויין).",
    "joined": "The same letters with the words divided at other places: a prefix (ו ה ב כ ל מ ש, וכש and so on) split "
    "off or attached, or up to four words written as one; a final letter counts as its ordinary form.",
    "gershayim": "The same letters with a word split where an abbreviation has ״ or a foreign sound has ׳ (צה ל for "
    "צהל, צ יפס for ציפס): normalisation deletes the ASCII quotes and turns the Hebrew ones into spaces.",
    "final_letter": "The same word but for ך ם ן ף ץ in place of כ מ נ פ צ or the other way round.",
    "number": "The same whole number below a million in digits and in words, or in digits grouped in another way, with "
    "the same prefix if there is one.",
    "prefix": "The same word with one prefix letter (ו ה ב כ ל מ ש) more, less or exchanged: one small unstressed "
    "syllable, but a changed meaning (בית, הבית), so it is kept apart from spelling.",
    "latin": "A word in Latin letters against one without; whether they sound alike is not looked at.",
    "word": "Everything else: another word, a missing word, an added word.",
}
Kind = Literal["equal", "substitute", "delete", "insert"]
Words = tuple[str, ...]


class Chunk(NamedTuple):
    """Words of the reference and the words of the hypothesis that stand for them."""

    kind: Kind
    reference: Words
    hypothesis: Words
    error_class: str | None
    """A key of CLASSES; None where the words are equal."""

    @property
    def edits(self) -> int:
        """What the chunk adds to the substitutions, deletions and insertions of the plain WER together."""
        return 0 if self.error_class is None else max(len(self.reference), len(self.hypothesis))


# ——— Letters ———
ordinary_letters = str.maketrans("ךםןףץ", "כמנפצ")
LATIN = re.compile("[a-z\u00df-\u00f6\u00f8-\u024f]")  # normalised text is in lower case
PREFIX_LETTERS = "והבכלמש"
PREFIXES = re.compile("ו?(?:לכש|מש|כש|ש)?[בכלמ]?ה?")  # in the order in which they may follow one another
LONGEST_PREFIX = 6  # letters: ו, לכש, מ, ה
# ——— Spelling ———
# What is in brackets may be left out, or is one of the letters between slashes; + stands for the word's forms (plural,
# construct, possessive). A word is missing here where its other spelling is another common word: עלייה (עליה, on her),
# ראייה (ראיה, proof), חייל (חיל, corps), עדיין (עדין, gentle), שניים (שנים, years), פעמיים (פעמים, times), שיער (שער,
# gate), חוכמה (חכמה, wise), עוצמה (עצמה, herself), פירות (פרות, cows), בריכה (ברכה, blessing), סיפור (ספור, counted),
# אתכם (you) and איתכם (with you), רווח (רוח, wind), מכוון (מכון, institute), השוואה (השואה, the Holocaust), and -יים
# of adjectives (כלליים, general) against -ים of nouns (כללים, rules). Of verbs only forms that no other stem shares.
LISTED = """
ת[ו]כנית+ צ[ו]הר[י]ים ק[ו]רבן ק[ו]רבנות א[ו]מנם א[ו]נ[י]יה+ ח[ו]פשית ח[ו]פשיים ח[ו]פשיות א[ו]פנתי+ ש[ו]רשים הכ[ו]ל
כ[ו]לם כ[ו]לנו כ[ו]לכם כ[ו]לן ש[ו]לחן+ א[ו]זנ[י]ים א[ו]זניות א[ו]הל א[ו]הלים א[ו]כלוס[י]יה+ ק[ו]מקום+ מ[ו]חרת
מ[ו]חרת[י]ים א[ו]בדן כ[ו]תל ר[ו]טב+ של[ו]ש של[ו]שה של[ו]שת של[ו]שים אל[ו]הים אל[ו]קים כ[ו]ח כ[ו]חות אהר[ו]ן יהוש[ו]ע

א[י]מא א[י]שה א[י]שתו א[י]שתי א[י]שתך א[י]תו א[י]תי א[י]תך א[י]תנו ל[י]בי ל[י]בו ל[י]בך לצ[י]דו לצ[י]דה לצ[י]דם לצ[י]דך
לצ[י]דנו אמ[י]תי+ ע[י]תים ע[י]נב ל[י]צן+ בר[י]רה נ[י]סיון+ ז[י]כרון+ ר[י]שיון+ ח[י]סרון+ פ[י]תרון+ ע[י]קרון+ ג[י]ליון+
ב[י]טחון+ נ[י]צחון+ ש[י]לטון+ כ[י]שרון+ ד[י]כאון+ י[י]תרון+ ד[י]מיון+ ע[י]תון+ מ[י]ליון+ ש[י]געון+ פ[י]קדון+ ה[י]גיון
ה[י]גיוני+ מ[י]לה מ[י]לת מ[י]לים מ[י]לות כ[י]תה כ[י]תת ת[י]קח ת[י]קחי ת[י]קחו י[י]קח י[י]קחו נ[י]קח ת[י]תן ת[י]תני
ת[י]תנו י[י]תן י[י]תנו י[י]תכן ת[י]שאר ת[י]שארו י[י]שאר י[י]שארו ת[י]כנס ת[י]כנסו י[י]כנס י[י]כנסו ת[י]פול י[י]פול
י[י]פלו נ[י]פול ת[י]סע ת[י]סעו י[י]סע י[י]סעו ד[י]ברתי ד[י]ברנו ק[י]בלתי ק[י]בלנו ח[י]פשתי ח[י]פשנו נ[י]סיתי נ[י]סינו
ח[י]כיתי ח[י]כינו ש[י]חקתי ש[י]חקנו ש[י]למתי ט[י]פול+ ב[י]קורת ב[י]קורים ח[י]בורים ש[י]עור+ ש[י]רותים נ[י]תוח+ צ[י]בורי
צ[י]בורית צ[י]בוריים צ[י]בוריות ת[י]קון+ ק[י]בוץ+ ר[י]קודים ל[י]מודים ל[י]מודי ע[י]כוב+ ס[י]כוי+ ש[י]תוף א[י]רוע+
א[י]זור+ ז[י]הוי+ ת[י]אור ת[י]אורים ת[י]אורי ת[י]אטרון+ ת[י]אוריה+ ה[י]כרות ג[י]רס[ה/א]+ ס[י]דרה ס[י]דרות פ[י]סגה+
ש[י]מלה+ ע[י]סקה+ ד[י]מעה+ א[י]כפת ת[י]כף עכש[י]ו סת[י]ו תה[י]לים תפ[י]לה+ רב[י]נו ר[י]אלי+ איד[י]אלי+ מוז[י]און+

ה[י]יתה ה[י]יתי ה[י]יתם שנ[י]יה קר[י]ית בנ[י]ין+ ענ[י]ין+ קנ[י]ין+ מעונ[י]ין+ שמ[י]ים יד[י]ים רגל[י]ים עינ[י]ים
ברכ[י]ים שינ[י]ים כתפ[י]ים כנפ[י]ים שפת[י]ים מכנס[י]ים מאזנ[י]ים ירושל[י]ים שת[י]ים מאת[י]ים שבוע[י]ים שעת[י]ים
יומ[י]ים שנת[י]ים בינת[י]ים מ[י]יד י[י]שוב+ י[י]צוג י[י]צוא י[י]עוץ י[י]חוד י[י]חודי+ י[י]שום+ י[י]אוש ח[י]יב ח[י]יבים
ת[י]יר+ תעש[י]יה+ כנס[י]יה+ ספר[י]יה+ עיר[י]יה חנ[י]יה שת[י]יה צפ[י]יה יר[י]יה נט[י]יה דח[י]יה כפ[י]יה תל[י]יה סט[י]יה
בכ[י]יה טר[י]יה נק[י]יה עש[י]יה יהוד[י]יה ערב[י]יה שליש[י]יה שערור[י]יה+ חול[י]יה סוג[י]יה+ בע[י]יה+ יפהפ[י]יה

תקו[ו]ה תקו[ו]תי תקו[ו]תו או[ו]יר או[ו]ירה או[ו]ירון+ כיו[ו]ן+ דו[ו]קא לו[ו]אי טלו[ו]יזיה+ מצו[ו]ה מקו[ו]ה זו[ו]ית+
קו[ו]ים לו[ו]יתן הלו[ו]אה+ שו[ו]ה שו[ו]ים צו[ו]אר+ סיו[ו]ן חשו[ו]ן שלו[ו]ה חדו[ו]ה עו[ו]ית+ גאו[ו]ה תאו[ו]ה ענו[ו]ה
הו[ו]יה גו[ו]יה חו[ו]יה+ ציו[ו]ה מהו[ו]ה מלו[ו]ה ליו[ו]ה תו[ו]ית+ רו[ו]יה מזו[ו]דה+ נו[ו]ה פרו[ו]ה ערו[ו]ה עו[ו]ן
שו[ו]יון או[ו]ז או[ו]זים ניו[ו]ט חיו[ו]ר+ לוו[י]ין+ מרו[ו]יח+ הרו[ו]יח+ דיו[ו]ח+ שיו[ו]ק מגו[ו]ן [ו]ועדה+ [ו]ועד
[ו]ויכוח+ [ו]וידאו [ו]ועידה+ [ו]ותיק+ [ו]ודאי [ו]ודאות [ו]וירוס+ [ו]וילון+ [ו]וידוי+ [ו]ורוד+ [ו]ויטמין+ [ו]וילה
[ו]וטרינר+ [ו]ויזה [ו]ויתור+

בל[א]גן+ אהל[א]ן סב[א]בה פ[א]דיחה+ דוגמ[ה/א]+ קופס[ה/א]+ סיסמ[ה/א]+ סדנ[ה/א]+ משכנת[ה/א]+ אסמכת[ה/א]+ טיוט[ה/א]+
נוסח[ה/א]
"""
FEMININE = "ה ת ות תי תו תה תך תם תנו ותיו ותיה ותיהם ותינו".split()
OTHERS = "ים ות י ו ה ך נו ם כם יו יה יהם יכם ינו ת ותיו ותיה ותיהם ותינו".split()


def spellings_of(entry: str) -> Iterator[tuple[str, str]]:
    """Yields each spelling that an entry of LISTED stands for, with the first spelling of the same form."""
    takes_suffixes = entry.endswith("+")
    parts = re.split(r"\[(.*?)\]", entry.rstrip("+"))  # fixed, optional, fixed, …
    choices = [[part] if i % 2 == 0 else part.split("/") if "/" in part else [part, ""] for i, part in enumerate(parts)]
    for form, *others in zip(*(forms_of("".join(c), takes_suffixes) for c in itertools.product(*choices)), strict=True):
        yield from ((spelling, form) for spelling in (form, *others))


def forms_of(word: str, takes_suffixes: bool) -> list[str]:
    """The word, and its regular forms, some of which may not be in use."""
    if not takes_suffixes:
        return [word]
    if word[-1] in "הא" and len(word) > 2:
        return [word] + [word[:-1] + suffix for suffix in FEMININE[1:]]
    if word.endswith("ית"):
        return [word] + [word[:-1] + suffix for suffix in FEMININE[1:]]
    return [word] + [word.translate(ordinary_letters) + suffix for suffix in OTHERS]


FULL_SPELLING = dict(pair for entry in LISTED.split() for pair in spellings_of(entry))
# Common words whose letters are also a prefix and a short spelling: שכח (he forgot) is not ש + כח.
NOT_LISTED = set("שכח התיר ועד מועד מועדת מועדות מעון מעשיה מאהל מאוזנים שמלה מתירים מתירות".split())
YOD_DOUBLED_AFTER_VAV = re.compile("(?<=[א-הז-ת]ו)יי(?=[א-הז-ת])")  # but not סיכויו, סיכוייו: one chance or several


@lru_cache(maxsize=100_000)
def readings(word: str) -> frozenset[str]:
    """The word in the one spelling that stands for all accepted ones, by every way to take prefixes off."""
    found = {YOD_DOUBLED_AFTER_VAV.sub("י", word)}
    for length in range(min(LONGEST_PREFIX, len(word) - 1) + 1):
        full = FULL_SPELLING.get(word[length:])
        if full and word not in NOT_LISTED and PREFIXES.fullmatch(word[:length]):
            found.add(f"{word[:length]}|{full}")
    return frozenset(found)


def is_spelling_variant(one: str, other: str) -> bool:
    return not readings(one).isdisjoint(readings(other))


# ——— Prefixes ———
# Common words that are no prefix and another word, though their letters look so: שלי is not ש + לי, כמה not כ + מה.
UNPREFIXED = set(
    "שלי שלך שלו שלה שלנו שלכם שלהם שלהן כמה למה במה בלי כבר מלא האם הוא היא הם הן בין שיר שים שמע שנה שתי מאוד משהו "
    "מישהו מילה הרבה היום לבד להם לכם לנו בוא בואי בואו".split()
)


def differs_in_prefix(one: str, other: str) -> bool:
    """Whether one letter of ו ה ב כ ל מ ש at the start is all that differs, besides spelling.

    A letter more or less needs two further letters, an exchanged one three (ב and ה in בוא, הוא leave no word).
    """
    if one in UNPREFIXED or other in UNPREFIXED:
        return False
    one_rest, other_rest = (word[1:] if word[0] in PREFIX_LETTERS else "" for word in (one, other))
    return (
        (len(one_rest) >= 2 and is_spelling_variant(one_rest, other))
        or (len(other_rest) >= 2 and is_spelling_variant(one, other_rest))
        or (min(len(one_rest), len(other_rest)) >= 3 and is_spelling_variant(one_rest, other_rest))
    )


# ——— Numbers ———
def numerals(text: str) -> dict[str, int]:
    """Reads `1 אחת אחד, 2 …`: a value and the words for it."""
    entries = (entry.split() for entry in text.split(","))
    return {word: int(value) for value, *words in entries for word in words}


# Feminine, masculine and construct forms. שנים is 2 in שנים עשר only, elsewhere it is years.
UNITS = numerals(
    "1 אחת אחד, 2 שתיים שתים שניים שתי שני, 3 שלוש שלש שלושה שלשה שלושת שלשת, 4 ארבע ארבעה ארבעת, "
    "5 חמש חמישה חמשה חמשת חמישת, 6 שש שישה ששה ששת שישת, 7 שבע שבעה שבעת, 8 שמונה שמונת, 9 תשע תשעה תשעת"
)
TEN = numerals("10 עשר עשרה עשרת")
TENS = numerals("20 עשרים, 30 שלושים שלשים, 40 ארבעים, 50 חמישים חמשים, 60 שישים ששים, 70 שבעים, 80 שמונים, 90 תשעים")
HUNDREDS = numerals("100 מאה, 200 מאתיים מאתים")
THOUSANDS = {"אלף", "אלפים"}
NUMERALS = {"אפס", "שנים", "מאות", "אלפיים", *UNITS, *TEN, *TENS, *HUNDREDS, *THOUSANDS}
DIGITS = re.compile(r"(?P<prefix>[והבכלמש]*) ?(?P<number>0|[1-9]\d{0,5}|[1-9]\d{0,2} \d{3})")
MOST_NUMBER_WORDS = 10  # תשע מאות תשעים ותשעה אלף תשע מאות תשעים ותשע, and a prefix apart
HAS_DIGIT = re.compile(r"\d")


def below_thousand(words: Sequence[str]) -> int | None:
    """The value of numerals without their ו, such as שלוש מאות עשרים חמש; 0 for none at all, None for no number."""
    hundreds = 0
    if len(words) >= 2 and words[1] == "מאות" and UNITS.get(words[0], 0) >= 3:
        hundreds, words = 100 * UNITS[words[0]], words[2:]
    elif words and words[0] in HUNDREDS:
        hundreds, words = HUNDREDS[words[0]], words[1:]
    match words:
        case []:
            return hundreds
        case [one] if one in UNITS | TEN | TENS:
            return hundreds + (UNITS | TEN | TENS)[one]
        case [tens, unit] if tens in TENS and unit in UNITS:
            return hundreds + TENS[tens] + UNITS[unit]
        case [unit, "עשר" | "עשרה"] if unit in UNITS or unit == "שנים":
            return hundreds + 10 + UNITS.get(unit, 2)
    return None


def value_of_words(words: Sequence[str]) -> int | None:
    """The value of numerals; any after the first may begin with ו, but not those that only multiply or end a teen."""
    bare = [words[0]]
    for word in words[1:]:
        joined_on = word[0] == "ו" and word[1:] in NUMERALS and word[1:] not in THOUSANDS | {"מאות", "אפס"}
        if joined_on and word[1:] in TEN and bare[-1] in UNITS:  # חמש ועשר are two numbers
            return None
        bare.append(word[1:] if joined_on else word)
    if bare == ["אפס"]:
        return 0
    thousands = 0
    for i, word in enumerate(bare):
        if word == "אלפיים" and i == 0:
            thousands, bare = 2000, bare[1:]
            break
        if word in THOUSANDS:
            factor = below_thousand(bare[:i]) if i else 1
            if not factor or (i == 0 and word != "אלף"):
                return None
            thousands, bare = 1000 * factor, bare[i + 1 :]
            break
    rest = below_thousand(bare)
    return None if rest is None else thousands + rest


def read_number(words: Words) -> tuple[str, int] | None:
    """The prefix and value of words that together are one whole number from 0 to 999,999, in digits or in words."""
    if found := DIGITS.fullmatch(" ".join(words)):
        return (found["prefix"], int(found["number"].replace(" ", ""))) if PREFIXES.fullmatch(found["prefix"]) else None
    first = words[0]
    for length in range(min(LONGEST_PREFIX, len(first) - 1) + 1):
        if first[length:] in NUMERALS and PREFIXES.fullmatch(first[:length]):
            value = value_of_words((first[length:], *words[1:]))
            return None if value is None else (first[:length], value)
    return None


def numbers_in(words: Words) -> dict[tuple[int, int], tuple[str, int]]:
    """Every number among the words, by the places where it begins and ends."""
    spans = itertools.combinations(range(len(words) + 1), 2)
    found = {(i, k): read_number(words[i:k]) for i, k in spans if k - i <= MOST_NUMBER_WORDS}
    return {span: number for span, number in found.items() if number}


# ——— Classes ———
MOST_JOINED = 4  # words written as one
MOST_COMPARED = 40_000  # pairs of words, in a block without a word in common


@lru_cache(maxsize=100_000)
def class_of_substitution(reference: str, hypothesis: str) -> str:
    """The class of one word written for another."""
    if reference.translate(ordinary_letters) == hypothesis.translate(ordinary_letters):
        return "final_letter"
    if is_spelling_variant(reference, hypothesis):
        return "spelling"
    if bool(LATIN.search(reference)) != bool(LATIN.search(hypothesis)):
        return "latin"
    if HAS_DIGIT.search(reference) or HAS_DIGIT.search(hypothesis):
        is_number = (number := read_number((reference,))) and number == read_number((hypothesis,))
        return "number" if is_number else "word"
    return "prefix" if differs_in_prefix(reference, hypothesis) else "word"


def class_of_division(reference: Words, hypothesis: Words) -> str:
    """`gershayim` or `joined`, of words that hold the same letters.

    Normalisation leaves a space where ״ stood before an abbreviation's last letter, or ׳ after a letter. What comes
    before it shows that no Hebrew word ends there: it is a single letter that is no prefix, or ends in a form of
    כ מ נ צ that stands inside words only (מנכ לית, סנדוויצ ים); or a single letter comes last.
    """
    parts = reference if len(reference) > len(hypothesis) else hypothesis
    if min(len(reference), len(hypothesis)) == 1 and "".join(reference) == "".join(hypothesis):
        first, last = parts[0], parts[-1]
        inside_only = len(first) > 1 and first[-1] in "כמנצ"
        if len(last) == 1 or inside_only or (len(first) == 1 and first not in PREFIX_LETTERS):
            return "gershayim"
    return "joined"


PENALTY = dict.fromkeys(CLASSES, 0) | {"prefix": 1, "latin": 1, "word": 3}  # of an edit: the others explain it better
ONE_EDIT = 1_000_000  # outweighs all penalties


def read_block(reference: Words, hypothesis: Words) -> list[Chunk]:
    """Divides words none of which are aligned as equal so that the classes explain most, at no more edits."""
    has_digits = any(HAS_DIGIT.search(word) for word in reference + hypothesis)
    numbers = (numbers_in(reference), numbers_in(hypothesis)) if has_digits else ({}, {})
    ordinary = [[word.translate(ordinary_letters) for word in words] for words in (reference, hypothesis)]

    def chunks_from(i: int, j: int) -> Iterator[Chunk]:
        """Every chunk that can begin with the i-th word of the reference and the j-th of the hypothesis."""
        if i < len(reference) and j < len(hypothesis):
            words = reference[i], hypothesis[j]
            yield Chunk("substitute", words[:1], words[1:], class_of_substitution(*words))
            if ends := same_letters(ordinary[0], i, ordinary[1], j):
                parts = reference[i : ends[0]], hypothesis[j : ends[1]]
                yield Chunk("substitute", *parts, class_of_division(*parts))
            for (start, end), number in numbers[0].items():
                for (other_start, other_end), other in numbers[1].items():
                    if (start, other_start) == (i, j) and number == other:
                        parts = reference[i:end], hypothesis[j:other_end]
                        if any(HAS_DIGIT.search(word) for words in parts for word in words):
                            yield Chunk("substitute", *parts, "number")
        if i < len(reference):
            yield Chunk("delete", reference[i : i + 1], (), "word")
        if j < len(hypothesis):
            yield Chunk("insert", (), hypothesis[j : j + 1], "word")

    best: dict[tuple[int, int], tuple[int, Chunk | None]] = {(len(reference), len(hypothesis)): (0, None)}
    for i in range(len(reference), -1, -1):
        for j in range(len(hypothesis), -1, -1):
            ways = [
                (chunk.edits * (ONE_EDIT + PENALTY[str(chunk.error_class)]) + best[after][0], chunk)
                for chunk in chunks_from(i, j)
                if (after := (i + len(chunk.reference), j + len(chunk.hypothesis)))
            ]
            if ways:
                best[i, j] = min(ways, key=lambda way: way[0])
    chunks, place = [], (0, 0)
    while chunk := best[place][1]:
        chunks.append(chunk)
        place = place[0] + len(chunk.reference), place[1] + len(chunk.hypothesis)
    return chunks


def plain_chunks(steps: Sequence[jiwer.AlignmentChunk], reference: Words, hypothesis: Words) -> Iterator[Chunk]:
    """Words as the plain WER pairs them: texts that have nothing in common need not be read any closer."""
    for step in steps:
        parts = reference[step.ref_start_idx : step.ref_end_idx], hypothesis[step.hyp_start_idx : step.hyp_end_idx]
        for one, other in itertools.zip_longest(*parts):
            if one is None:
                yield Chunk("insert", (), (other,), "word")
            elif other is None:
                yield Chunk("delete", (one,), (), "word")
            else:
                yield Chunk("substitute", (one,), (other,), class_of_substitution(one, other))


def same_letters(one: Sequence[str], i: int, other: Sequence[str], j: int) -> tuple[int, int] | None:
    """Where words from i and from j first end together with the same letters, if not at once or too late; no digits."""
    end, other_end, left, right = i + 1, j + 1, one[i], other[j]
    while left != right:
        if len(left) <= len(right):
            if end == len(one) or end == i + MOST_JOINED or not right.startswith(left):
                return None
            left, end = left + one[end], end + 1
        else:
            if other_end == len(other) or other_end == j + MOST_JOINED or not left.startswith(right):
                return None
            right, other_end = right + other[other_end], other_end + 1
    is_one_word = (end, other_end) == (i + 1, j + 1)
    return None if is_one_word or HAS_DIGIT.search(left) else (end, other_end)


def read_errors(reference: str, hypothesis: str) -> tuple[dict[str, int], list[Chunk]]:
    """Assigns every edit between two normalised texts to a class, and returns the alignment to draw.

    Args:
        reference: normalised, with at least one word.
        hypothesis: normalised; may be empty.

    Returns:
        Edits by class, each class of CLASSES among them, which sum to the substitutions, deletions and insertions of
        the plain WER; and the words of both texts in order, in chunks. Neighbouring equal, deleted or inserted words
        are one chunk, as are words that only together are a class (joined words, numbers). Two words that the plain
        WER counts as substituted may be paired otherwise here, never at another number of edits.
    """
    output = jiwer.process_words(reference, hypothesis)
    words, hypothesis_words = tuple(output.references[0]), tuple(output.hypotheses[0])
    chunks: list[Chunk] = []
    for is_equal, steps in itertools.groupby(output.alignments[0], lambda step: step.type == "equal"):
        steps = list(steps)
        pair = (
            words[steps[0].ref_start_idx : steps[-1].ref_end_idx],
            hypothesis_words[steps[0].hyp_start_idx : steps[-1].hyp_end_idx],
        )
        if is_equal:
            chunks.append(Chunk("equal", *pair, None))
            continue
        is_short = len(pair[0]) * len(pair[1]) <= MOST_COMPARED
        block = read_block(*pair) if is_short else list(plain_chunks(steps, words, hypothesis_words))
        for kind, group in itertools.groupby(block, lambda chunk: chunk.kind):
            group = list(group)
            if kind != "substitute":
                group = [Chunk(kind, *(sum(side, ()) for side in list(zip(*group, strict=True))[1:3]), "word")]
            chunks += group
    counts = dict.fromkeys(CLASSES, 0)
    for chunk in chunks:
        if chunk.error_class:
            counts[chunk.error_class] += chunk.edits
    return counts, chunks


def class_shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Each class's share of all edits in percent; zeros where there is no edit."""
    total = sum(counts.values())
    return {name: 100 * count / total if total else 0.0 for name, count in counts.items()}
