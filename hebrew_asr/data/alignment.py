"""Which words of a plain transcript are spoken in which seconds of a long recording.

The recording comes as stretches of speech between pauses, each with what a model wrote for it, which may be wrong in
most of its words; the transcript may lack sentences that are spoken and have ones that are not. Every way to give the
words to the stretches in order is weighed: a stretch may have no word, and a word no stretch. What weighs is how the
letters match, how long the words take to say, and, where the model is at hand, how likely it finds the words. The
confidence of a piece is the share of all ways, by weight, that give exactly these words to exactly these seconds; so a
piece is refused wherever another reading is possible.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


def letters(text: str) -> str:
    return leaderboard_normalize(text).replace(" ", "")


class Words:
    """A transcript as it is compared: its words, and the letters of all of them in a row."""

    def __init__(self, text: str):
        self.surface: list[str] = []
        forms: list[str] = []
        for word in text.split():
            form = letters(word)
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


# ----------------------------------------------------------------------------------------------------------- Evidence
@dataclass
class Fits:
    """How well words fit a stretch: nats[a, d] of the d + 1 words from place first + a on, the lower the better.

    0 is how well unrelated words fit.
    """

    first: int
    nats: np.ndarray

    def ends(self, words: Words) -> np.ndarray:
        """The place after the last word, (places, counts), at most the transcript's end."""
        places = self.first + np.arange(len(self.nats))
        return np.minimum(places[:, None] + 1 + np.arange(self.nats.shape[1]), len(words))

    def lengths(self, words: Words) -> np.ndarray:
        """Letters, (places, counts)."""
        places = self.first + np.arange(len(self.nats))
        return words.starts[self.ends(words)] - words.starts[places][:, None]

    def plus(self, nats: np.ndarray) -> "Fits":
        return Fits(self.first, np.where(self.nats < NO_WAY, self.nats + nats, NO_WAY))


def windows(heard: list[Heard], words: Words) -> tuple[np.ndarray, np.ndarray, float]:
    """The lowest and highest place in the transcript of each boundary between stretches, (stretches + 1,).

    They surround the alignment of fewest edits of all letters; also returns its edits as a share of the letters.
    """
    rows = [letters(stretch.text) for stretch in heard]
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
    distance = sum(
        max(edit.src_end - edit.src_start, edit.dest_end - edit.dest_start) for edit in edits if edit.tag != "equal"
    )
    return low, high, distance / max(len(said), len(words.row), 1)


def fits_by_letters(text: str, words: Words, low: int, high: int, misheard: float) -> Fits:
    """Fits of what was written for a stretch to the words from each place `low` … `high` on, letter by letter."""
    row = [ord(letter) for letter in letters(text)]
    places = np.arange(low, min(high + 1, len(words)))
    if not len(places):
        return Fits(low, np.zeros((0, 1)))
    width = 2 * len(row) + 20
    most = np.searchsorted(words.starts, words.starts[places] + width, side="right") - 1 - places
    fits = Fits(low, np.zeros((len(places), int(np.clip(most.max(), 1, MOST_WORDS)))))
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
        place, more = np.unravel_index(int(likely.argmax()), likely.shape)
        if likely[place, more] > 0.5:
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
    for number, fit in enumerate(lattice.fits):
        chance = (lattice.begun[number] + lattice.after_begun[number])[fit.first - lattice.low[number] :]
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

    A boundary between stretches has a place in the transcript before words are skipped at it (`ended`) and one after
    (`begun`): logarithms of the summed weights of all ways to there, and from there on (`after_…`), each (places,)
    from `low` of the boundary on.
    """

    def __init__(self, fits: list[Fits], low: np.ndarray, high: np.ndarray):
        self.fits, self.low, self.high = fits, low, high
        count, nowhere = len(fits), [np.full(size, -NO_WAY) for size in high - low + 1]
        self.ended, self.begun = list(nowhere), list(nowhere)
        self.after_ended, self.after_begun = list(nowhere), list(nowhere)
        self.ended[0] = nowhere[0].copy()
        self.ended[0][0] = 0.0
        for i in range(count + 1):
            if i:
                self.ended[i] = self.spoken(i - 1, self.begun[i - 1])
                self.move(self.begun[i - 1] - DEFECT, low[i - 1], self.ended[i], low[i])
            self.begun[i] = np.logaddexp(self.ended[i], skipped(self.ended[i]))
        self.after_begun[count] = nowhere[count].copy()
        self.after_begun[count][-1] = 0.0
        for i in reversed(range(count + 1)):
            if i < count:
                self.after_begun[i] = self.spoken_backwards(i)
                self.move(self.after_ended[i + 1] - DEFECT, low[i + 1], self.after_begun[i], low[i])
            back = skipped(self.after_begun[i][::-1])[::-1]
            self.after_ended[i] = np.logaddexp(self.after_begun[i], back)
        self.total = float(self.begun[count][-1])

    @staticmethod
    def move(source: np.ndarray, source_low: int, target: np.ndarray, target_low: int) -> None:
        """Adds weights to those of the same places."""
        first, last = max(source_low, target_low), min(source_low + len(source), target_low + len(target))
        if first < last:
            part = target[first - target_low : last - target_low]
            np.logaddexp(part, source[first - source_low : last - source_low], out=part)

    def spoken(self, number: int, begun: np.ndarray) -> np.ndarray:
        """Weights at the end of a stretch that has one word or more, from those at its begin."""
        fit, ended = self.fits[number], np.full(len(self.ended[number + 1]), -NO_WAY)
        source = begun[fit.first - self.low[number] :][: len(fit.nats)]
        for d in range(fit.nats.shape[1]):
            self.move(source - fit.nats[:, d], fit.first + d + 1, ended, self.low[number + 1])
        return ended

    def spoken_backwards(self, number: int) -> np.ndarray:
        fit, begun = self.fits[number], np.full(len(self.begun[number]), -NO_WAY)
        after, target = self.after_ended[number + 1], begun[fit.first - self.low[number] :][: len(fit.nats)]
        for d in range(fit.nats.shape[1]):
            first = fit.first + d + 1 - self.low[number + 1]  # in `after`, of the first place of the fit
            a, b = max(0, -first), min(len(fit.nats), len(after) - first)
            if a < b:
                np.logaddexp(target[a:b], after[first + a : first + b] - fit.nats[a:b, d], out=target[a:b])
        return begun

    def probabilities(self, number: int) -> np.ndarray:
        """Of each place and count of words of a stretch, as in its fits."""
        fit = self.fits[number]
        before = self.begun[number][fit.first - self.low[number] :][: len(fit.nats)]
        index = fit.first + np.arange(len(fit.nats))[:, None] + 1 + np.arange(fit.nats.shape[1]) - self.low[number + 1]
        inside = (index >= 0) & (index < len(self.after_ended[number + 1]))
        after = self.after_ended[number + 1][np.clip(index, 0, len(self.after_ended[number + 1]) - 1)]
        found = np.exp(np.minimum(before[:, None] - fit.nats + after - self.total, 0.0))
        return np.where(inside & (fit.nats < NO_WAY), found, 0.0)

    def pieces_from(self, number: int, fewest: float) -> Iterator[tuple[int, int, int, float]]:
        """Yields what a piece from a stretch on can be: (stretch after its last, words from, to, probability).

        Each is the likeliest from the likeliest place; ends once none is as likely as `fewest`.
        """
        place = int(np.argmax(self.begun[number] + self.after_begun[number]))
        weights = np.full(len(self.begun[number]), -NO_WAY)
        weights[place] = self.begun[number][place]
        for end in range(number + 1, len(self.fits) + 1):
            weights = self.spoken(end - 1, weights)
            shares = np.exp(np.minimum(weights + self.after_ended[end] - self.total, 0.0))
            if shares.sum() < fewest:
                return
            best = int(np.argmax(shares))
            yield end, int(self.low[number]) + place, int(self.low[end]) + best, float(shares[best])


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

    `heard` is in order, without overlap; `ask` numbers its stretches. Each stretch is in one of the two lists, and so
    is each word. A piece ends in the pauses around its stretches.
    """
    numbers = [number for number, stretch in enumerate(heard) if letters(stretch.text)]
    spoken, words = [heard[number] for number in numbers], Words(transcript)
    chosen: list[Choice] = []
    reasons = [NOT_IN_TRANSCRIPT if letters(stretch.text) else NOTHING_HEARD for stretch in heard]
    if spoken and len(words):
        lattice = weigh(spoken, words, ask and (lambda asked: ask([(numbers[n], text) for n, text in asked])))
        chosen = choose(lattice, spoken, longest, min_confidence)
        agreeing = sum(piece.until - piece.word for piece in chosen) / len(words)
        agreed = sum(piece.end - piece.first for piece in chosen) / len(spoken)
        is_another = max(agreeing, agreed) < LEAST_SHARE
        chosen = [] if is_another else chosen
        for n, number in enumerate(numbers):
            if is_another or lattice.probabilities(n).sum() > 0.5:
                reasons[number] = ANOTHER if is_another else UNCERTAIN
        chosen = [piece._replace(first=numbers[piece.first], end=numbers[piece.end - 1] + 1) for piece in chosen]
    starts, ends = edges(heard)
    kept = [
        Kept(starts[piece.first], ends[piece.end - 1], words.text(piece.word, piece.until), piece.confidence)
        for piece in chosen
    ]
    return kept, between(chosen, heard, reasons, words)


def weigh(heard: list[Heard], words: Words, ask: Ask | None) -> Lattice:
    """All ways, weighed by letters and durations, then by the model's likelihoods."""
    low, high, misheard = windows(heard, words)
    for _ in range(2):  # where much has no counterpart, the edits of all say little about how well the model hears
        fits = [
            fits_by_letters(stretch.text, words, int(a), int(b), misheard)
            for stretch, a, b in zip(heard, low[:-1], high[:-1], strict=True)
        ]
        lattice = Lattice(fits, low, high)
        misheard = misheard_share(lattice, heard, words)
    durations = by_duration(lattice, heard, words)
    fits = [fit.plus(nats) for fit, nats in zip(fits, durations, strict=True)]
    if ask is not None:
        likelihoods = by_likelihood(Lattice(fits, low, high), words, ask)
        fits = [fit.plus(nats) for fit, nats in zip(fits, likelihoods, strict=True)]
    return Lattice(fits, low, high)


class Choice(NamedTuple):
    """A piece: its stretches and its words, the ends not included."""

    first: int
    end: int
    word: int
    until: int
    confidence: float


def choose(lattice: Lattice, heard: list[Heard], longest: float, min_confidence: float) -> list[Choice]:
    """The pieces that hold most speech, weighed by their confidence."""
    best = np.zeros(len(heard) + 1)
    choice: list[Choice | None] = [None] * len(heard)
    for first in reversed(range(len(heard))):
        best[first] = best[first + 1]
        for end, word, until, chance in lattice.pieces_from(first, min_confidence):
            if heard[end - 1].end - heard[first].start > longest - 2 * MARGIN:
                break
            seconds = sum(stretch.end - stretch.start for stretch in heard[first:end])
            value = seconds * chance - 0.01 + best[end]  # of two equal choices the one with fewer pieces
            if chance >= min_confidence and value > best[first]:
                best[first], choice[first] = value, Choice(first, end, word, until, chance)
    found, first = [], 0
    while first < len(heard):
        piece = choice[first]
        found += [piece] if piece else []
        first = piece.end if piece else first + 1
    return found


def edges(heard: list[Heard]) -> tuple[list[float], list[float]]:
    """Where a piece that begins, or ends, with each stretch does so."""
    gaps = [b.start - a.end for a, b in itertools.pairwise(heard)]
    before, after = [2 * heard[0].start, *gaps] if heard else [], [*gaps, 0.0]
    starts = [stretch.start - min(MARGIN, gap / 2) for stretch, gap in zip(heard, before, strict=True)]
    return starts, [stretch.end + min(MARGIN, gap / 2) for stretch, gap in zip(heard, after, strict=False)]


def between(chosen: list[Choice], heard: list[Heard], reasons: list[str], words: Words) -> list[Refused]:
    """What lies between the pieces, neighbours of one reason together; each has all words that are left there."""
    found = []
    nothing, rest = Choice(0, 0, 0, 0, 1.0), Choice(len(heard), len(heard), len(words), len(words), 1.0)
    for before, after in itertools.pairwise([nothing, *chosen, rest]):
        left = range(before.end, after.first)
        text = words.text(before.until, after.word)
        for reason, run in itertools.groupby(left, key=lambda number: reasons[number]):
            stretches = [heard[number] for number in run]
            said = " ".join(stretch.text for stretch in stretches).strip()
            found.append(Refused(stretches[0].start, stretches[-1].end, reason, said, text))
        if text and not any(reasons[number] == UNCERTAIN for number in left):
            time = heard[before.end - 1].end if before.end else 0.0
            found.append(Refused(time, time, NOT_SPOKEN, "", text))
    return found
