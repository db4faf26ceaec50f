"""Which words of a plain transcript are spoken in which seconds of a long recording.

The recording comes as stretches of speech between pauses, each with what a model wrote for it, which may be wrong in
most of its words; the transcript may lack sentences that are spoken and have ones that are not. Every way to give the
words to the stretches in order is weighed: a stretch may have no word, and a word no stretch. Where speech is cut in
several ways, each way to put it together is weighed too. What weighs is how the letters match, how long the words take
to say, and, where the model is at hand, how likely it finds the words. The confidence of a piece is the share of all
ways, by weight, that give exactly these words to exactly these seconds; so a piece is refused wherever another reading
is possible.
"""

import itertools
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein

from hebrew_asr.text.scoring import leaderboard_normalize

NEIGHBOURHOOD = 60  # words on both sides of the alignment of fewest edits that are considered
MOST_WORDS = 40  # of one stretch
LETTERS = 24  # of an alphabet; unrelated ones agree in one of so many
DEFECT = 4.0  # nats that a stretch without words costs, or words without a stretch
SKIPPED_WORD = 0.2  # nats of each of these words
CANDIDATES = 16  # places in the transcript at which the model is asked about a stretch
UNLIKELY = 12.0  # nats below the likeliest at which it is not asked
LIKELIHOOD = 0.15  # weight of a nat that the model gives, to one of the letters, which come of the same hearing
ENDING = 0.5  # weight of a nat of the text's end, to one of its words
MOST_NATS = 12.0  # of one word: a model that never saw it is too sure that it was not said
USUAL = 0.1  # quantile of a word's nats where it was asked about that is taken for where it is not spoken
FEW = 20  # answers below which that is drawn to the quantile of all words
LEAST_SPREAD = 0.15  # of speaking rates, as a standard deviation of the logarithm
LEAST_SHARE = 0.2  # of the speech, or of the words, that must be kept: less agrees by chance
MARGIN = 0.15  # seconds of a pause that a piece has at each end, or half of the pause
NO_WAY = 1e9  # nats of what cannot be


class Heard(NamedTuple):
    """A stretch of speech between pauses, and what a model wrote for it."""

    start: float  # seconds
    end: float
    text: str


class Cuts:
    """How stretches of speech, which may overlap where they are cut in several ways, lie between pauses.

    Pauses are numbered from 0, before the first stretch, to `count`, after the last. From each there is a stretch that
    ends at the next.
    """

    def __init__(self, heard: list[Heard]):
        self.starts = sorted({stretch.start for stretch in heard})
        """Seconds at which each pause ends, (count,)."""
        self.count = len(self.starts)
        self.first = [bisect_left(self.starts, stretch.start) for stretch in heard]
        """The pause before each stretch."""
        self.after = [bisect_left(self.starts, stretch.end) for stretch in heard]
        """The pause after each stretch."""
        self.ends = [0.0] * self.count
        """Seconds at which the speech from each pause to the next ends, (count,)."""
        for stretch, first, after in zip(heard, self.first, self.after, strict=True):
            if after == first + 1:
                self.ends[first] = stretch.end
        self.before: list[list[int]] = [[] for _ in range(self.count + 1)]
        """The stretches that end at each pause."""
        self.behind: list[list[int]] = [[] for _ in range(self.count + 1)]
        """The stretches that begin at each pause, the longest last."""
        for number in sorted(range(len(heard)), key=lambda number: self.after[number]):
            self.before[self.after[number]].append(number)
            self.behind[self.first[number]].append(number)

    def path(self, first: int, end: int) -> list[int]:
        """Stretches from one pause to another, the longest that fit one after the other."""
        found = []
        while first < end:
            found.append([number for number in self.behind[first] if self.after[number] <= end][-1])
            first = self.after[found[-1]]
        return found


class Likelihood(NamedTuple):
    """How likely a model finds the first 0, 1, … words of a text for a stretch: nats, (words + 1,) each."""

    words: np.ndarray  # of the words
    end: np.ndarray  # of the text ending there


Ask = Callable[[list[tuple[int, list[str]]]], list[Likelihood]]
"""Answers (number of a stretch, words) for each of a list."""


@dataclass(frozen=True)
class Kept:
    """A stretch of audio and the words spoken in it."""

    start: float  # seconds
    end: float
    text: str
    confidence: float  # probability that these are exactly its words


@dataclass(frozen=True)
class Refused:
    """Speech that is in no piece, with what was heard and the words around which it is; or words without speech."""

    start: float  # seconds
    end: float  # start, where words have no speech
    reason: str
    heard: str
    text: str


NOT_IN_TRANSCRIPT = "spoken, not in the transcript"
NOT_SPOKEN = "in the transcript, not spoken"
UNCERTAIN = "which words belong to it is not certain"
ANOTHER = "hardly anything agrees with the transcript, which may be of another recording"
NOTHING_HEARD = "the model wrote nothing"


REMARK = re.compile(r"(?<!\S)[(\[{<‹]([^()\[\]{}<>‹›\n]{1,80})[)\]}>›](?=[\s.,:;!?]|$)")
SAID = 0.6  # share of a remark's letters that were heard in their place, from which on it was said


def letters(text: str) -> str:
    return leaderboard_normalize(text).replace(" ", "")


class Words:
    """A transcript as it is compared: its words, and the letters of all of them in a row."""

    def __init__(self, text: str):
        self.surface: list[str] = []
        forms: list[str] = []
        for word in text.split():
            form = letters(word) or letters(word.strip("()[]{}<>‹›"))  # scoring leaves out what is in brackets
            if form:
                self.surface.append(word)
                forms.append(form)
            elif forms:  # a dash or another mark between spaces stays with the word before it
                self.surface[-1] += f" {word}"
        self.row = "".join(forms)
        self.codes = np.array([ord(letter) for letter in self.row], np.int32)
        self.starts = np.concatenate([[0], np.cumsum([len(form) for form in forms], dtype=np.int64)])
        _, self.kinds, counts = np.unique(np.array(forms, dtype=str), return_inverse=True, return_counts=True)
        self.surprise = -np.log((counts[self.kinds] + 1) / (len(forms) + len(counts) + 1))
        """Nats of each word by its frequency alone."""

    def __len__(self) -> int:
        return len(self.surface)

    def text(self, first: int, last: int) -> str:
        return " ".join(self.surface[first:last])


def without_unsaid_remarks(transcript: str, said: str) -> str:
    """A transcript without its remarks in brackets (`(calls from the hall)`), but for those that were said.

    Args:
        said: the letters that a model wrote for the whole recording, in a row.
    """
    if not REMARK.search(transcript):
        return transcript
    parts = REMARK.split(transcript)  # what stands between remarks, and what stands in them, by turns
    rows = [letters(part) for part in parts]
    ends = np.cumsum([len(row) for row in rows])
    heard = np.zeros(ends[-1] + 1)
    for edit in Levenshtein.opcodes(said, "".join(rows)):
        heard[edit.dest_start : edit.dest_end] = edit.tag == "equal"
    kept = parts[:1]
    for i, remark in zip(range(1, len(parts), 2), REMARK.finditer(transcript), strict=True):
        is_said = len(rows[i]) and heard[ends[i - 1] : ends[i]].mean() >= SAID
        kept += [remark[0] if is_said else "", parts[i + 1]]
    return "".join(kept)


# ----------------------------------------------------------------------------------------------------------- Evidence
@dataclass
class Fits:
    """How well words fit a stretch: nats[a, d] of the d + 1 words from place first + a on, the lower the better.

    0 is how well unrelated words fit.
    """

    first: int
    nats: np.ndarray
    wordless: float
    """Nats of no words at all."""

    def ends(self, words: Words) -> np.ndarray:
        """The place after the last word, (places, counts), at most the transcript's end."""
        places = self.first + np.arange(len(self.nats))
        return np.minimum(places[:, None] + 1 + np.arange(self.nats.shape[1]), len(words))

    def lengths(self, words: Words) -> np.ndarray:
        """Letters, (places, counts)."""
        places = self.first + np.arange(len(self.nats))
        return words.starts[self.ends(words)] - words.starts[places][:, None]

    def plus(self, nats: np.ndarray | float) -> "Fits":
        return replace(self, nats=np.where(self.nats < NO_WAY, self.nats + nats, NO_WAY))

    def of_one_way(self, ways: int) -> "Fits":
        """As the stretch is one of so many that begin there, each as likely as another."""
        return replace(self.plus(np.log(ways)), wordless=self.wordless + float(np.log(ways)))


def windows(heard: list[Heard], cuts: Cuts, words: Words) -> tuple[np.ndarray, np.ndarray, float]:
    """The lowest and highest place in the transcript of each pause, (pauses,).

    They surround the alignment of fewest edits of all letters; also returns its edits as a share of the letters.
    """
    path = cuts.path(0, cuts.count)
    rows = [letters(heard[number].text) for number in path]
    said = "".join(rows)
    edits = Levenshtein.opcodes(said, words.row)
    knots = np.array([(edit.src_start, edit.dest_start) for edit in edits] + [(len(said), len(words.row))])
    ends = np.cumsum([0, *map(len, rows)])
    middle = np.interp(ends, *knots.T)
    # Where letters are skipped at a boundary, it may be before or after them.
    first = knots[np.minimum(np.searchsorted(knots[:, 0], ends, side="left"), len(knots) - 1)]
    last = knots[np.searchsorted(knots[:, 0], ends, side="right") - 1]
    before = np.where(first[:, 0] == ends, np.minimum(first[:, 1], middle), middle)
    after = np.where(last[:, 0] == ends, np.maximum(last[:, 1], middle), middle)
    low = np.clip(np.searchsorted(words.starts, before) - NEIGHBOURHOOD, 0, len(words))
    high = np.clip(np.searchsorted(words.starts, after) + NEIGHBOURHOOD, 0, len(words))
    low[0], high[-1] = 0, len(words)
    passed = [0, *(cuts.after[number] for number in path)]
    low = low[np.searchsorted(passed, range(cuts.count + 1), side="right") - 1]  # of a pause that is inside of one
    high = high[np.searchsorted(passed, range(cuts.count + 1))]
    distance = sum(
        max(edit.src_end - edit.src_start, edit.dest_end - edit.dest_start) for edit in edits if edit.tag != "equal"
    )
    return low, high, distance / max(len(said), len(words.row), 1)


def fits_by_letters(text: str, words: Words, low: int, high: int, misheard: float) -> Fits:
    """Fits of what was written for a stretch to the words from each place `low` … `high` on, letter by letter."""
    row = [ord(letter) for letter in letters(text)]
    places = np.arange(low, min(high + 1, len(words)))
    if not row or not len(places):
        return Fits(low, np.zeros((0, 1)), DEFECT if row else 0.0)
    width = 2 * len(row) + 20
    most = np.searchsorted(words.starts, words.starts[places] + width, side="right") - 1 - places
    fits = Fits(low, np.zeros((len(places), int(np.clip(most.max(), 1, MOST_WORDS)))), DEFECT)
    index = words.starts[places][:, None] + np.arange(width)
    reference = words.codes[np.minimum(index, len(words.codes) - 1)]
    share, chance = np.clip(misheard, 0.2, 0.6), np.log(LETTERS)
    match, edit = -np.log(1 - share) - chance, -np.log(share / 3)
    ramp = np.arange(width + 1) * edit
    costs = np.tile(ramp, (len(places), 1))
    for letter in row:
        new = costs + edit
        np.minimum(new[:, 1:], costs[:, :-1] + np.where(reference == letter, match, edit), out=new[:, 1:])
        costs = np.minimum.accumulate(new - ramp, axis=1) + ramp
    lengths = fits.lengths(words)
    found = np.take_along_axis(costs, np.minimum(lengths, width), axis=1)
    fits.nats = np.where(lengths <= width, found, NO_WAY)
    fits.nats[places[:, None] + 1 + np.arange(fits.nats.shape[1]) > len(words)] = NO_WAY
    # A letter in its place is worth less than one of 24: a language has few words.
    worth = words.surprise.sum() / len(words.codes) / chance
    fits.nats = np.where(fits.nats < NO_WAY, fits.nats * worth, NO_WAY)
    return fits


def misheard_share(lattice: "Lattice", heard: list[Heard], words: Words) -> float:
    """Edits as a share of the letters, of the stretches that have the same words in most ways."""
    edits, total = 1, 2  # a half, where there are none
    for number, stretch in enumerate(heard):
        likely = lattice.probabilities(number)
        if likely.max(initial=0.0) > 0.5:
            place, more = np.unravel_index(int(likely.argmax()), likely.shape)
            first = lattice.fits[number].first + int(place)
            said = words.row[words.starts[first] : words.starts[first + int(more) + 1]]
            edits += Levenshtein.distance(letters(stretch.text), said)
            total += max(len(said), len(letters(stretch.text)))
    return edits / total


def by_duration(lattice: "Lattice", heard: list[Heard], words: Words) -> list[np.ndarray]:
    """Nats of each stretch's duration for each count of letters, to be added to the fits.

    How many seconds a letter takes, and how much that varies, is learnt from the likely ways.
    """
    lengths, seconds, weights = [], [], []
    for number, stretch in enumerate(heard):
        likely = lattice.probabilities(number)
        chosen = likely > 0.05
        lengths += lattice.fits[number].lengths(words)[chosen].tolist()
        weights += likely[chosen].tolist()
        seconds += [stretch.end - stretch.start] * int(chosen.sum())
    if len(set(lengths)) < 3:
        return [np.zeros_like(fit.nats) for fit in lattice.fits]
    x, y, weight = np.stack([np.ones(len(lengths)), lengths], axis=1), np.array(seconds), np.array(weights)
    robust = weight
    for _ in range(10):
        line = np.linalg.lstsq(x * np.sqrt(robust)[:, None], y * np.sqrt(robust), rcond=None)[0]
        off = np.log(y / np.maximum(x @ line, 0.1))
        spread = max(float(np.sqrt(np.average(off**2, weights=robust))), 1e-3)
        robust = weight / (1 + (off / (1.5 * spread)) ** 2)
    spread = max(spread, LEAST_SPREAD)
    logs = np.log([stretch.end - stretch.start for stretch in heard])
    usual, varied = logs.mean(), max(logs.std(), spread)
    found = []
    for log, fit in zip(logs, lattice.fits, strict=True):
        off = (log - np.log(np.maximum(line[0] + line[1] * fit.lengths(words), 0.05))) / spread
        density = 0.95 * np.exp(-np.square(off) / 2) / spread + 0.05 * np.exp(-np.minimum(off**2, 18) / 18) / spread / 3
        found.append(-np.log(density) - ((log - usual) / varied) ** 2 / 2 - np.log(varied))
    return found


def by_likelihood(lattice: "Lattice", words: Words, ask: Ask) -> list[np.ndarray]:
    """Nats of how likely the model finds the words, to be added to the fits; NO_WAY where it was not asked.

    Each word's are counted from what it usually has where it is not spoken: a word new to the model is unlikely
    everywhere.
    """
    asked = []
    for number, (fit, first) in enumerate(zip(lattice.fits, lattice.cuts.first, strict=True)):
        chance = (lattice.begun[first] + lattice.after_begun[first])[fit.first - lattice.low[first] :]
        chance = chance[: len(fit.nats)]
        best = np.argsort(-chance)[:CANDIDATES]
        asked += [(number, int(a)) for a in sorted(best) if chance[a] - lattice.total > -UNLIKELY]
    places = [lattice.fits[number].first + a for number, a in asked]
    spans = [
        range(place, min(place + lattice.fits[number].nats.shape[1], len(words)))
        for (number, _), place in zip(asked, places, strict=True)
    ]
    answers = ask([(number, [words.surface[i] for i in span]) for (number, _), span in zip(asked, spans, strict=True)])
    found = [np.full_like(fit.nats, NO_WAY) for fit in lattice.fits]
    if not asked:
        return found
    each = [np.minimum(np.diff(answer.words), MOST_NATS) for answer in answers]
    kinds = [words.kinds[span.start : span.stop] for span in spans]
    usual = usual_nats(np.concatenate(kinds), np.concatenate(each), int(words.kinds.max()) + 1)
    for (number, a), span, nats, answer in zip(asked, spans, each, answers, strict=True):
        total = np.cumsum(nats - usual[words.kinds[list(span)][: len(nats)]]) + ENDING * np.minimum(
            answer.end[1:], MOST_NATS
        )
        found[number][a, : len(nats)] = LIKELIHOOD * total
    return found


def usual_nats(kinds: np.ndarray, nats: np.ndarray, count: int) -> np.ndarray:
    """The quantile USUAL of each kind's values, (count,), drawn to that of all where there are few."""
    general = np.quantile(nats, USUAL)
    usual = np.full(count, general)
    order = np.argsort(kinds, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(kinds[order])) + 1):
        own = np.quantile(nats[part], USUAL)
        usual[kinds[part[0]]] = (own * len(part) + general * FEW) / (len(part) + FEW)
    return usual


# ------------------------------------------------------------------------------------------------------------ Lattice
class Lattice:
    """All ways to give words to stretches in order, and their weights.

    A pause has a place in the transcript before words are skipped at it (`ended`) and one after (`begun`): logarithms
    of the summed weights of all ways to there, and from there on (`after_…`), each (places,) from `low` of the pause
    on.
    """

    def __init__(self, fits: list[Fits], cuts: Cuts, low: np.ndarray, high: np.ndarray):
        self.fits, self.cuts, self.low, self.high = fits, cuts, low, high
        nowhere = [np.full(size, -NO_WAY) for size in high - low + 1]
        self.ended, self.begun, self.after_ended, self.after_begun = (
            [weights.copy() for weights in nowhere] for _ in range(4)
        )
        self.ended[0][0] = self.after_begun[-1][-1] = 0.0
        for i in range(cuts.count + 1):
            for number in cuts.before[i]:
                first = cuts.first[number]
                self.speak(number, self.begun[first], self.ended[i])
                self.move(self.begun[first] - self.fits[number].wordless, low[first], self.ended[i], low[i])
            self.begun[i] = np.logaddexp(self.ended[i], skipped(self.ended[i]))
        for i in reversed(range(cuts.count + 1)):
            for number in cuts.behind[i]:
                after = cuts.after[number]
                self.speak_backwards(number, self.after_ended[after], self.after_begun[i])
                self.move(self.after_ended[after] - self.fits[number].wordless, low[after], self.after_begun[i], low[i])
            back = skipped(self.after_begun[i][::-1])[::-1]
            self.after_ended[i] = np.logaddexp(self.after_begun[i], back)
        self.total = float(self.begun[-1][-1])

    @staticmethod
    def move(source: np.ndarray, source_low: int, target: np.ndarray, target_low: int) -> None:
        """Adds weights to those of the same places."""
        first, last = max(source_low, target_low), min(source_low + len(source), target_low + len(target))
        if first < last:
            part = target[first - target_low : last - target_low]
            np.logaddexp(part, source[first - source_low : last - source_low], out=part)

    def speak(self, number: int, begun: np.ndarray, ended: np.ndarray) -> None:
        """Adds the weights at the end of a stretch that has one word or more, from those at its begin."""
        fit, low = self.fits[number], self.low[self.cuts.after[number]]
        source = begun[fit.first - self.low[self.cuts.first[number]] :][: len(fit.nats)]
        for d in range(fit.nats.shape[1]):
            self.move(source - fit.nats[:, d], fit.first + d + 1, ended, low)

    def speak_backwards(self, number: int, ended: np.ndarray, begun: np.ndarray) -> None:
        """Adds the weights from the begin of a stretch on, from those from its end on."""
        fit, low = self.fits[number], self.low[self.cuts.first[number]]
        target = begun[fit.first - low :][: len(fit.nats)]
        for d in range(fit.nats.shape[1]):
            first = fit.first + d + 1 - self.low[self.cuts.after[number]]  # in `ended`, of the first place of the fit
            a, b = max(0, -first), min(len(fit.nats), len(ended) - first)
            if a < b:
                np.logaddexp(target[a:b], ended[first + a : first + b] - fit.nats[a:b, d], out=target[a:b])

    def probabilities(self, number: int) -> np.ndarray:
        """Of each place and count of words of a stretch, as in its fits."""
        fit, first, after = self.fits[number], self.cuts.first[number], self.cuts.after[number]
        before = self.begun[first][fit.first - self.low[first] :][: len(fit.nats)]
        index = fit.first + np.arange(len(fit.nats))[:, None] + 1 + np.arange(fit.nats.shape[1]) - self.low[after]
        inside = (index >= 0) & (index < len(self.after_ended[after]))
        behind = self.after_ended[after][np.clip(index, 0, len(self.after_ended[after]) - 1)]
        found = np.exp(np.minimum(before[:, None] - fit.nats + behind - self.total, 0.0))
        return np.where(inside & (fit.nats < NO_WAY), found, 0.0)

    def with_words(self) -> np.ndarray:
        """The probability that the speech from each pause to the next has words, (pauses - 1,)."""
        found = np.zeros(self.cuts.count)
        for number, (first, after) in enumerate(zip(self.cuts.first, self.cuts.after, strict=True)):
            found[first:after] += self.probabilities(number).sum()
        return found

    def pieces_from(self, first: int, fewest: float) -> Iterator[tuple[int, int, int, float]]:
        """Yields what a piece from a pause on can be: (pause at its end, words from, to, probability).

        Each is the likeliest from the likeliest place; ends once none is as likely as `fewest`.
        """
        place = int(np.argmax(self.begun[first] + self.after_begun[first]))
        weights = {first: np.full(len(self.begun[first]), -NO_WAY)}  # of the ways from there to each pause
        weights[first][place] = self.begun[first][place]
        for end in range(first + 1, self.cuts.count + 1):
            spoken, passed = (np.full(len(self.ended[end]), -NO_WAY) for _ in range(2))
            for number in self.cuts.before[end]:
                start = self.cuts.first[number]
                if start in weights:
                    self.speak(number, weights[start], spoken)
                    if not len(self.fits[number].nats) and start > first:
                        self.move(weights[start], self.low[start], passed, self.low[end])
            weights[end] = np.logaddexp(spoken, passed)
            shares = np.exp(np.minimum(spoken + self.after_ended[end] - self.total, 0.0))
            if shares.sum() >= fewest:
                best = int(np.argmax(shares))
                yield end, int(self.low[first]) + place, int(self.low[end]) + best, float(shares[best])
            elif not self.may_go_on(weights, end, fewest):
                return

    def may_go_on(self, weights: dict[int, np.ndarray], end: int, fewest: float) -> bool:
        """Whether ways of the probability `fewest` in all pass a pause or are inside of a stretch at it."""
        reach = {start: max((self.cuts.after[n] for n in self.cuts.behind[start]), default=end) for start in weights}
        on = [start for start in weights if start == end or reach[start] > end]
        going = [np.logaddexp.reduce(weights[start] + self.after_begun[start]) - self.total for start in on]
        return bool(np.exp(np.minimum(going, 0.0)).sum() >= fewest)


def skipped(weights: np.ndarray) -> np.ndarray:
    """Weights at the places after one word or more that are spoken in no stretch."""
    ramp = SKIPPED_WORD * np.arange(len(weights))
    return np.concatenate([[-NO_WAY], (np.logaddexp.accumulate(weights + ramp) - ramp)[:-1] - DEFECT])


# ------------------------------------------------------------------------------------------------------------- Pieces
def align(
    heard: list[Heard],
    transcript: str,
    longest: float,
    min_confidence: float,
    ask: Ask | None = None,
) -> tuple[list[Kept], list[Refused]]:
    """Divides a recording into pieces of at most `longest` seconds with their words, and what is refused.

    `heard` is ordered by start; stretches overlap only where speech is cut in several ways, and wherever one starts or
    ends inside of another, so does the shortest one there (`Cuts`). `ask` numbers them. All speech is in one of the
    two lists, and so is each word, but for remarks in brackets that nobody said. A piece ends in the pauses around its
    stretches.
    """
    cuts = Cuts(heard)
    said = "".join(letters(heard[number].text) for number in cuts.path(0, cuts.count))
    words = Words(without_unsaid_remarks(transcript, said))
    chosen: list[Choice] = []
    is_another, with_words = False, np.zeros(cuts.count)
    if len(words) and any(letters(stretch.text) for stretch in heard):
        lattice = weigh(heard, cuts, words, ask)
        chosen, with_words = choose(lattice, longest, min_confidence), lattice.with_words()
        agreeing = sum(piece.until - piece.word for piece in chosen) / len(words)
        agreed = sum(piece.end - piece.first for piece in chosen) / cuts.count
        is_another = max(agreeing, agreed) < LEAST_SHARE
        chosen = [] if is_another else chosen

    def reason(number: int) -> str:
        if not letters(heard[number].text):
            return NOTHING_HEARD
        likely = with_words[cuts.first[number] : cuts.after[number]].max() > 0.5
        return ANOTHER if is_another else UNCERTAIN if likely else NOT_IN_TRANSCRIPT

    starts, ends = edges(cuts)
    kept = [
        Kept(starts[piece.first], ends[piece.end - 1], words.text(piece.word, piece.until), piece.confidence)
        for piece in chosen
    ]
    return kept, between(chosen, heard, cuts, reason, words)


def weigh(heard: list[Heard], cuts: Cuts, words: Words, ask: Ask | None) -> Lattice:
    """All ways, weighed by letters and durations, then by the model's likelihoods."""
    low, high, misheard = windows(heard, cuts, words)
    for _ in range(2):  # where much has no counterpart, the edits of all say little about how well the model hears
        fits = [
            fits_by_letters(stretch.text, words, int(low[first]), int(high[first]), misheard).of_one_way(
                len(cuts.behind[first])
            )
            for stretch, first in zip(heard, cuts.first, strict=True)
        ]
        lattice = Lattice(fits, cuts, low, high)
        misheard = misheard_share(lattice, heard, words)
    durations = by_duration(lattice, heard, words)
    fits = [fit.plus(nats) for fit, nats in zip(fits, durations, strict=True)]
    if ask is not None:
        likelihoods = by_likelihood(Lattice(fits, cuts, low, high), words, ask)
        fits = [fit.plus(nats) for fit, nats in zip(fits, likelihoods, strict=True)]
    return Lattice(fits, cuts, low, high)


class Choice(NamedTuple):
    """A piece: the pauses around it and the places of its words in the transcript."""

    first: int
    end: int
    word: int
    until: int
    confidence: float


def choose(lattice: Lattice, longest: float, min_confidence: float) -> list[Choice]:
    """The pieces that hold most speech, weighed by their confidence."""
    cuts = lattice.cuts
    speech = np.concatenate([[0.0], np.cumsum(np.subtract(cuts.ends, cuts.starts))])
    best = np.zeros(cuts.count + 1)
    choice: list[Choice | None] = [None] * cuts.count
    for first in reversed(range(cuts.count)):
        best[first] = best[first + 1]
        for end, word, until, chance in lattice.pieces_from(first, min_confidence):
            if cuts.ends[end - 1] - cuts.starts[first] > longest - 2 * MARGIN:
                break
            value = (speech[end] - speech[first]) * chance - 0.01 + best[end]  # of two equal ones that of fewer pieces
            if chance >= min_confidence and value > best[first]:
                best[first], choice[first] = value, Choice(first, end, word, until, chance)
    found, first = [], 0
    while first < cuts.count:
        piece = choice[first]
        found += [piece] if piece else []
        first = piece.end if piece else first + 1
    return found


def edges(cuts: Cuts) -> tuple[list[float], list[float]]:
    """Where a piece that begins at each pause does so, and one that ends after the speech from each pause on."""
    gaps = [start - end for start, end in zip(cuts.starts[1:], cuts.ends, strict=False)]
    before, after = [2 * cuts.starts[0], *gaps] if cuts.count else [], [*gaps, 0.0]
    starts = [start - min(MARGIN, gap / 2) for start, gap in zip(cuts.starts, before, strict=True)]
    return starts, [end + min(MARGIN, gap / 2) for end, gap in zip(cuts.ends, after, strict=False)]


def between(
    chosen: list[Choice], heard: list[Heard], cuts: Cuts, reason: Callable[[int], str], words: Words
) -> list[Refused]:
    """What lies between the pieces, neighbours of one reason together; each has all words that are left there."""
    found = []
    nothing, rest = Choice(0, 0, 0, 0, 1.0), Choice(cuts.count, cuts.count, len(words), len(words), 1.0)
    for before, after in itertools.pairwise([nothing, *chosen, rest]):
        text, reasons = words.text(before.until, after.word), []
        for why, run in itertools.groupby(cuts.path(before.end, after.first), key=reason):
            reasons.append(why)
            stretches = [heard[number] for number in run]
            said = " ".join(stretch.text for stretch in stretches).strip()
            found.append(Refused(stretches[0].start, stretches[-1].end, why, said, text))
        if text and UNCERTAIN not in reasons:
            time = cuts.ends[before.end - 1] if before.end else 0.0
            found.append(Refused(time, time, NOT_SPOKEN, "", text))
    return found
