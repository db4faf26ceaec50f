"""Which words of a transcript belong to which seconds of a recording: by hypotheses with planted errors, no model."""

import itertools
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
from conftest import DEMO

from demo.recordings import clips, join
from hebrew_asr.data import alignment
from hebrew_asr.data.alignment import (
    ANOTHER,
    NOT_IN_TRANSCRIPT,
    NOT_SPOKEN,
    NOTHING_HEARD,
    Heard,
    Kept,
    Likelihood,
    Refused,
    align,
)
from hebrew_asr.data.audio import SAMPLE_RATE, decode_audio
from hebrew_asr.data.rows import load_rows
from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.errors import InputError
from hebrew_asr.text.scoring import count_errors
from scripts import align_recordings
from scripts.align_recordings import Aligning, batches_by_length

LETTERS = "אבגדהוזחטיכלמנסעפצקרשת"
LETTER_SECONDS = 0.08


@dataclass
class Call:
    """A made-up recording."""

    heard: list[Heard] = field(default_factory=list)
    sentences: list[tuple[float, float, str]] = field(default_factory=list)  # what is really said
    transcript: list[str] = field(default_factory=list)

    def said_between(self, start: float, end: float) -> str:
        return " ".join(text for a, b, text in self.sentences if start <= (a + b) / 2 < end)


def vocabulary(random: np.random.Generator, size: int = 400) -> list[str]:
    return ["".join(random.choice(list(LETTERS), random.integers(2, 8))) for _ in range(size)]


def misheard(text: str, errors: float, random: np.random.Generator) -> str:
    """`text` with a share of its letters replaced, left out or doubled."""
    written = []
    for letter in text:
        kind = random.choice(4) if random.random() < errors else 3
        written.append([str(random.choice(list(LETTERS))), "", letter * 2, letter][kind])
    return "".join(written)


def call(
    count: int, errors: float, seed: int, missing: float = 0.05, added: float = 0.05, words: list[str] | None = None
) -> Call:
    """Sentences of 2 to 8 words with pauses between, and what a poor model writes for each."""
    random = np.random.default_rng(seed)
    words, made, now = words or vocabulary(random), Call(), 0.0
    for _ in range(count):
        text = " ".join(random.choice(words, random.integers(2, 9)))
        now += random.uniform(0.1, 2.0)
        end = now + LETTER_SECONDS * len(text) * random.uniform(0.85, 1.15)
        made.sentences.append((now, end, text))
        made.heard.append(Heard(now, end, misheard(text, errors, random)))
        now = end
        made.transcript += [text] if random.random() >= missing else []
        made.transcript += [" ".join(random.choice(words, 4))] if random.random() < added else []
    return made


def judged(made: Call, kept: list[Kept]) -> tuple[float, float]:
    """The share of what is spoken and in the transcript that is kept, and the share of wrong words in it."""
    known = set(made.transcript)
    spoken = [(a, b) for a, b, text in made.sentences if text in known]
    inside = [(a, b) for a, b in spoken if any(k.start <= (a + b) / 2 < k.end for k in kept)]
    counts = [count_errors(made.said_between(k.start, k.end) or "-", k.text) for k in kept]
    wrong = sum(c.substitutions + c.deletions + c.insertions for c in counts)
    total = sum(b - a for a, b in spoken)
    return sum(b - a for a, b in inside) / total if total else 0.0, wrong / max(1, sum(c.words for c in counts))


@pytest.mark.parametrize(("errors", "least"), [(0.05, 0.98), (0.25, 0.97), (0.45, 0.9)])
def test_most_is_kept_and_next_to_nothing_of_it_is_wrong(errors, least):
    for seed in range(3):
        made = call(120, errors, seed)
        kept, refused = align(made.heard, " ".join(made.transcript), 30.0, 0.75)
        share, wrong = judged(made, kept)
        assert share >= least and wrong <= 0.01, f"kept {share:.3f}, wrong {wrong:.4f}"
        assert all(piece.end - piece.start <= 30 for piece in kept)
        assert all(a.end <= b.start for a, b in itertools.pairwise(kept)), "no second is in two pieces"
        assert {one.reason for one in refused} >= {NOT_IN_TRANSCRIPT, NOT_SPOKEN}


def test_every_stretch_and_every_word_is_kept_or_refused():
    made = call(80, 0.3, seed=5)
    kept, refused = align(made.heard, " ".join(made.transcript), 30.0, 0.75)
    for stretch in made.heard:
        middle = (stretch.start + stretch.end) / 2
        assert sum(one.start <= middle < one.end for one in [*kept, *refused]) == 1
    texts = {one.start: one.text for one in [*refused, *kept]}  # neighbours that are refused share their words
    words = sum(len(text.split()) for text in texts.values())
    assert words >= len(" ".join(made.transcript).split())


def test_missing_and_added_sentences_are_cut_out_and_named():
    random = np.random.default_rng(0)
    words = vocabulary(random)
    made = call(20, 0.1, seed=1, missing=0, added=0, words=words)
    extra = " ".join(random.choice(words, 5))
    transcript = [*made.transcript[:7], *made.transcript[8:12], extra, *made.transcript[12:]]
    kept, refused = align(made.heard, " ".join(transcript), 30.0, 0.75)
    by_reason = {one.reason: one for one in refused}
    assert set(by_reason) == {NOT_IN_TRANSCRIPT, NOT_SPOKEN}
    lost, unsaid = by_reason[NOT_IN_TRANSCRIPT], by_reason[NOT_SPOKEN]
    assert (lost.start, lost.end) == made.sentences[7][:2] and lost.heard == made.heard[7].text
    assert unsaid.text == extra and unsaid.start == unsaid.end
    assert " ".join(piece.text for piece in kept).split() == " ".join(transcript).replace(extra, "").split()


def test_a_remark_in_brackets_is_a_word_only_where_it_was_said():
    said = ["שלום לכולם וברוכים הבאים לישיבה", "היום נדבר על תקציב המדינה לשנה הבאה", "הצעת החוק התקבלה ברוב גדול"]
    heard = [Heard(4.0 * i, 4.0 * i + 3.2, text) for i, text in enumerate(said)]
    with_remarks = f"{said[0]} (קריאה) {said[1]} [מחיאות כפיים באולם]. ‹הצבעה› {said[2].replace('ברוב', '(ברוב)')}"
    kept, refused = align(heard, with_remarks, 5, 0.85)
    assert [piece.text for piece in kept] == [said[0], f"{said[1]} .", said[2].replace("ברוב", "(ברוב)")]
    assert not refused


def test_what_can_be_read_in_two_ways_is_refused():
    """A sentence that is said twice and written once is not given to either."""
    made = call(11, 0.0, seed=2, missing=0, added=0)
    twice = made.sentences[5]
    start, end = twice[1] + 0.5, 2 * twice[1] - twice[0] + 0.5
    later = [Heard(h.start + end, h.end + end, h.text) for h in made.heard[6:]]
    heard = [*made.heard[:6], Heard(start, end, twice[2]), *later]
    kept, refused = align(heard, " ".join(made.transcript), 30.0, 0.75)
    assert twice[2] not in " ".join(piece.text for piece in kept)
    assert sum(one.end - one.start for one in refused) == pytest.approx(2 * (twice[1] - twice[0]), abs=0.01)
    assert len(" ".join(piece.text for piece in kept).split()) == len(" ".join(made.transcript).split()) - len(
        twice[2].split()
    )


@pytest.mark.parametrize("errors", [0.0, 0.3])
def test_the_transcript_of_another_recording_gives_nothing(errors):
    words = vocabulary(np.random.default_rng(9), 80)
    made, other = call(60, errors, seed=3, words=words), call(60, errors, seed=4, words=words)
    kept, refused = align(made.heard, " ".join(other.transcript), 30.0, 0.75)
    assert not kept and {one.reason for one in refused} == {ANOTHER, NOT_SPOKEN}
    assert sum(one.end - one.start for one in refused) >= sum(b - a for a, b, _ in made.sentences)


def test_nothing_to_align_is_refused_by_its_reason():
    heard = [Heard(1.0, 2.0, "שלום"), Heard(3.0, 4.0, "")]
    kept, refused = align(heard, " – ", 30.0, 0.75)
    assert not kept and [one.reason for one in refused] == [NOT_IN_TRANSCRIPT, NOTHING_HEARD]
    kept, refused = align([], "שלום עולם", 30.0, 0.75)
    assert not kept and [(one.reason, one.text) for one in refused] == [(NOT_SPOKEN, "שלום עולם")]
    assert align([], "", 30.0, 0.75) == ([], [])


def test_a_transcript_of_a_small_part_is_found():
    made = call(150, 0.2, seed=11, missing=0, added=0)
    kept, _ = align(made.heard, " ".join(made.transcript[70:85]), 30.0, 0.75)
    made.transcript = made.transcript[70:85]
    share, wrong = judged(made, kept)
    assert share > 0.7 and wrong == 0


def test_minutes_without_transcript_do_not_lose_the_rest():
    made = call(300, 0.3, seed=6, missing=0, added=0)
    kept, _ = align(made.heard, " ".join([*made.transcript[:100], *made.transcript[220:]]), 30.0, 0.75)
    made.transcript[100:220] = []
    share, wrong = judged(made, kept)
    assert share > 0.95 and wrong <= 0.01


@pytest.mark.slow
def test_two_hours_take_less_than_real_time_by_far():
    made = call(2400, 0.35, seed=7)
    seconds = made.heard[-1].end
    assert seconds > 7200
    began = time.process_time()
    kept, _ = align(made.heard, " ".join(made.transcript), 30.0, 0.75)
    assert time.process_time() - began < seconds / 40
    share, wrong = judged(made, kept)
    assert share > 0.93 and wrong <= 0.01


def test_likelihoods_settle_what_letters_do_not():
    """A sentence that was heard as another one is kept with the right neighbours where the model finds it likely."""
    made = call(9, 0.0, seed=8, missing=0, added=0)
    made.heard[4] = made.heard[4]._replace(text=misheard(made.heard[4].text, 0.8, np.random.default_rng(0)))
    said = [set(text.split()) for _, _, text in made.sentences]

    def ask(asked: list[tuple[int, list[str]]]) -> list[Likelihood]:
        nats = [[0.1 if word in said[number] else 12.0 for word in words] for number, words in asked]
        return [Likelihood(np.cumsum([0.0, *each]), np.ones(len(each) + 1)) for each in nats]

    unsure, sure = (align(made.heard, " ".join(made.transcript), 30.0, 0.5, given)[0] for given in (None, ask))
    assert sum(np.log(piece.confidence) for piece in sure) > sum(np.log(piece.confidence) for piece in unsure)
    assert " ".join(piece.text for piece in sure) == " ".join(made.transcript)


def test_weights_forwards_and_backwards_agree():
    """The summed weight of all ways is the same wherever it is added up, and each stretch's probabilities are one."""
    made = call(30, 0.3, seed=10)
    words = alignment.Words(" ".join(made.transcript))
    cuts = alignment.Cuts(made.heard)
    low, high, misheard_share = alignment.windows(made.heard, cuts, words)
    fits = [
        alignment.fits_by_letters(h.text, words, int(a), int(b), misheard_share)
        for h, a, b in zip(made.heard, low[:-1], high[:-1], strict=True)
    ]
    lattice = alignment.Lattice(fits, cuts, low, high)
    for before, after in [*zip(lattice.begun, lattice.after_begun, strict=True)]:
        assert np.logaddexp.reduce(before + after) == pytest.approx(lattice.total, abs=1e-6)
    for number in range(len(fits)):
        first, last = max(low[number], low[number + 1]), min(high[number], high[number + 1]) + 1
        ways = lattice.begun[number][first - low[number] : last - low[number]] - alignment.DEFECT
        ways = ways + lattice.after_ended[number + 1][first - low[number + 1] : last - low[number + 1]]
        without = np.exp(np.logaddexp.reduce(ways) - lattice.total)
        assert lattice.probabilities(number).sum() + without == pytest.approx(1, abs=1e-6)


def cut_otherwise(made: Call) -> list[Heard]:
    """The third sentence's end was heard together with the fourth, as noise; and both as they should be cut."""
    third, fourth = made.heard[2:4]
    inside = (third.start + third.end) / 2
    garbage = misheard(third.text + fourth.text, 0.9, np.random.default_rng(0))
    wrong = [Heard(third.start, inside, garbage[:4]), Heard(inside, fourth.end, garbage)]
    parts = [Heard(inside, third.end, garbage[:6])]
    return sorted([*made.heard, *wrong, *parts])


def test_what_was_cut_in_the_wrong_place_is_kept_as_it_is_cut_in_the_right_one():
    random = np.random.default_rng(12)
    words = vocabulary(random)
    made = call(8, 0.1, seed=12, missing=0, added=0, words=words)
    extra = " ".join(random.choice(words, 6))
    transcript = " ".join([*made.transcript[:4], extra, *made.transcript[4:]])
    heard = cut_otherwise(made)
    alone = [stretch for stretch in heard if stretch not in made.heard[2:4] and stretch.end != made.heard[2].end]
    kept, _ = align(alone, transcript, 30.0, 0.75)
    assert judged(made, kept)[0] < 0.95
    kept, refused = align(heard, transcript, 30.0, 0.75)
    assert judged(made, kept) == (1, 0) and [(one.reason, one.text) for one in refused] == [(NOT_SPOKEN, extra)]


def test_of_all_ways_to_cut_each_second_is_in_one_stretch():
    made = call(8, 0.3, seed=12)
    heard, words = cut_otherwise(made), alignment.Words(" ".join(made.transcript))
    cuts = alignment.Cuts(heard)
    low, high, misheard_share = alignment.windows(heard, cuts, words)
    fits = [
        alignment.fits_by_letters(h.text, words, int(low[first]), int(high[first]), misheard_share)
        for h, first in zip(heard, cuts.first, strict=True)
    ]
    lattice = alignment.Lattice(fits, cuts, low, high)
    sums = np.zeros(cuts.count)
    for number, (first, after) in enumerate(zip(cuts.first, cuts.after, strict=True)):
        a, b = max(low[first], low[after]), min(high[first], high[after]) + 1
        ways = lattice.begun[first][a - low[first] : b - low[first]] - fits[number].wordless
        ways = ways + lattice.after_ended[after][a - low[after] : b - low[after]]
        without = np.exp(np.logaddexp.reduce(ways) - lattice.total)
        sums[first:after] += lattice.probabilities(number).sum() + without
    assert sums == pytest.approx(1, abs=1e-6)


def test_doubtful_is_where_words_are_left_over_with_what_is_near():
    heard = [Heard(a, a + 1, "אב") for a in (0.0, 1.2, 4.0, 8.0, 12.0)]
    refused = [
        Refused(1.2, 2.2, alignment.UNCERTAIN, "אב", "אחד"),
        Refused(5.0, 5.0, NOT_SPOKEN, "", "שתיים"),
        Refused(12.0, 13.0, NOT_IN_TRANSCRIPT, "אב", ""),
    ]
    assert align_recordings.doubtful(heard, refused) == [(0, 2), (3, 3)]
    assert align_recordings.doubtful(heard, [Refused(0.0, 13.0, ANOTHER, "אב", "אחד")]) == []
    hour = [Heard(2.0 * i, 2.0 * i + 1, "אב") for i in range(1800)]
    assert align_recordings.doubtful(hour, [Refused(100.0, 3500.0, NOT_IN_TRANSCRIPT, "אב", "אחד")]) == []


def test_letters_fit_as_an_edit_distance_says():
    """Against a Levenshtein distance computed one pair at a time."""
    words = alignment.Words("הילד אכל תפוח אדום בגן היום")
    fits = alignment.fits_by_letters("הילד אחל תפוח", words, 0, len(words), 0.3)
    worth = words.surprise.sum() / len(words.codes) / np.log(alignment.LETTERS)
    match, edit = -np.log(0.7) - np.log(alignment.LETTERS), -np.log(0.1)

    def cost(said: str, text: str) -> float:
        table = np.add.outer(np.arange(len(said) + 1) * edit, np.arange(len(text) + 1) * edit)
        for i, a in enumerate(said):
            for j, b in enumerate(text):
                change = table[i, j] + (match if a == b else edit)
                table[i + 1, j + 1] = min(change, table[i, j + 1] + edit, table[i + 1, j] + edit)
        return table[-1, -1]

    for place in range(len(words)):
        for count in range(1, len(words) - place + 1):
            text = alignment.letters(words.text(place, place + count))
            assert fits.nats[place, count - 1] == pytest.approx(worth * cost("הילדאחלתפוח", text), abs=1e-6)


def test_batches_hold_everything_once_and_are_short_enough():
    seconds = [3.0, 1.0, 2.0, 9.0, 0.5]
    batches = list(batches_by_length(seconds, 4.0))
    assert sorted(number for batch in batches for number in batch) == [0, 1, 2, 3, 4]
    assert all(len(b) == 1 or len(b) * max(seconds[n] for n in b) <= 4.0 for b in batches)


# -------------------------------------------------------------------------------------------------------- The command
@pytest.mark.slow
def test_a_recording_becomes_a_corpus_that_training_reads(tmp_path, monkeypatch, capsys):
    recording = join(clips("heldout"), 60.0, seed=1)
    folder = tmp_path / "calls"
    folder.mkdir()
    soundfile.write(folder / "call.flac", recording.waveform, SAMPLE_RATE)
    row = {"file_name": "call.flac", "text": recording.transcript}
    (folder / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    given = Aligning(
        model=str(DEMO / "tuned"),
        source=Source(str(folder)),
        output_dir=str(tmp_path / "aligned"),
        stretch_seconds=3.5,
        preprocessing_num_workers=1,
    )
    align_recordings.main(given)
    (file,) = (tmp_path / "aligned").glob("*.parquet")
    table = pyarrow.parquet.read_table(file)
    (demo,) = (DEMO / "corpus").glob("*.parquet")
    assert table.column_names == pyarrow.parquet.read_schema(demo).names
    report = json.loads((tmp_path / "aligned.alignment" / "report.json").read_text("utf-8"))
    seconds = sum(len(decode_audio(row["audio"])) / SAMPLE_RATE for row in table.to_pylist())
    assert report["pieces_kept"] == len(table) and report["hours_kept"] * 3600 == pytest.approx(seconds, abs=0.1)
    refused = sum(lost["hours"] for lost in report["refused"].values())
    parts = report["hours_kept"] + refused + report["hours_without_speech"]
    assert parts == pytest.approx(report["hours_in"]) == pytest.approx(len(recording.waveform) / SAMPLE_RATE / 3600)
    lines = Path(tmp_path / "aligned.alignment" / "refused.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == sum(lost["places"] for lost in report["refused"].values())
    assert all(0.75 <= row["metadata"]["quality_score"] <= 1 for row in table.to_pylist())
    assert len(load_rows([Source(str(tmp_path / "aligned"))], DataConfig(), for_training=True)) == len(table)
    with pytest.raises(InputError, match="exists already"):
        align_recordings.main(given)

    def fails(*_):
        raise AssertionError("a recording that is done is done again")

    monkeypatch.setattr(align_recordings, "align_recording", fails)
    Path(tmp_path / "aligned").rename(tmp_path / "first")
    align_recordings.main(given)
    assert pyarrow.parquet.read_table(next((tmp_path / "aligned").glob("*.parquet"))).equals(table)


def test_what_is_left_out_of_the_command_line_is_asked_for():
    with pytest.raises(InputError, match="--model"):
        align_recordings.parse(["--source", "data", "--output_dir", "out"])
