import dataclasses
import json
import math
import time
import tracemalloc
from statistics import NormalDist

import numpy as np
import pytest

from hebrew_asr.text.intervals import (
    MIN_RECORDINGS,
    compare,
    error_rate_interval,
    student_probability,
    student_quantile,
    verdict,
)

# Made-up sets whose rate is known exactly. Utterances have 1-40 words; the share of wrong words in one is drawn from a
# wide beta distribution (most have none), and the second system is wrong at the same places, a little more often. A
# few utterances are wholly wrong and a few end in a loop of insertions. A recording multiplies all of it by a factor of
# mean 1, most of which both systems share.
LENGTHS = np.arange(1, 41)
LENGTH_SHARES = np.diff([0, *(NormalDist(2.2, 0.7).cdf(math.log(edge)) for edge in np.arange(1.5, 40)), 1])
ORDINARY = np.array([0.072, 0.080])  # share of wrong words, first and second system
WHOLLY_WRONG = np.array([0.012, 0.016])  # of the utterances
LOOPS, LOOP_WORDS = 0.003, 20  # of the utterances; words inserted on average
FACTOR = (1.0, 11.5)  # of the beta distribution, 0 to 1, that is scaled to the mean 1
SHARED = 0.7  # of a recording's factor; the rest is each system's own


def true_rates(clustered: bool) -> np.ndarray:
    """E[errors] / E[words] of both systems in percent."""
    a, b = FACTOR
    variance = b / (a * (a + b + 1)) if clustered else 0
    factor_squared = 1 + variance * (SHARED**2 + (1 - SHARED) ** 2)
    ordinary = ORDINARY * (1 - (WHOLLY_WRONG + LOOPS) * factor_squared)
    return 100 * (ordinary + WHOLLY_WRONG + LOOPS * (1 + LOOP_WORDS / (LENGTHS @ LENGTH_SHARES)))


def draw_set(rng, units: int, clustered: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors of both systems (2, utterances), words, and recordings, of which there are `units` if clustered."""
    sizes, factors = np.ones(units, int), np.ones((2, units))
    if clustered:
        sizes = np.clip(np.round(rng.lognormal(math.log(20), 0.8, units)), 2, 200).astype(int)
        shared, *own = rng.beta(*FACTOR, (3, units)) * sum(FACTOR) / FACTOR[0]
        factors = SHARED * shared + (1 - SHARED) * np.array(own)
    recordings = np.repeat(np.arange(units), sizes)
    factors, count = factors[:, recordings], len(recordings)
    words = rng.choice(LENGTHS, count, p=LENGTH_SHARES)
    ordinary = ORDINARY[:, None] * factors
    hardest = ordinary.max(0)
    difficulty = rng.beta(3 * hardest + 1e-12, 3 * (1 - hardest))
    luck, other_luck = rng.random((2, count))
    other_luck = np.where(rng.random(count) < 0.6, luck, other_luck)
    errors = []
    for system, draw in enumerate((luck, other_luck)):
        some = rng.binomial(words, difficulty * ordinary[system] / hardest)
        loops = words + rng.geometric(1 / (LOOP_WORDS + 1), count) - 1
        wholly_wrong, looping = draw < WHOLLY_WRONG[system] * factors[system], draw > 1 - LOOPS * factors[system]
        errors.append(np.where(wholly_wrong, words, np.where(looping, loops, some)))
    return np.array(errors), words, recordings


def coverage(units: int, clustered: bool, sets: int, confidence: float = 0.95, by_recording: bool = True):
    """Percent of sets whose interval holds the truth, of the rate and of the difference."""
    first, second = true_rates(clustered)
    rate_holds = difference_holds = 0
    for seed in range(sets):
        errors, words, recordings = draw_set(np.random.default_rng([units, seed]), units, clustered)
        result = compare(*errors, words, recordings if clustered and by_recording else None, confidence)
        rate_holds += result.first.low <= first <= result.first.high
        difference_holds += result.difference.low <= first - second <= result.difference.high
    return 100 * rate_holds / sets, 100 * difference_holds / sets


def test_the_made_up_world_has_the_rates_it_is_said_to_have():
    errors, words, _ = draw_set(np.random.default_rng(0), 1_000_000, clustered=False)
    assert 100 * errors.sum(1) / words.sum() == pytest.approx(true_rates(clustered=False), abs=0.06)
    errors, words, _ = draw_set(np.random.default_rng(0), 50_000, clustered=True)
    assert 100 * errors.sum(1) / words.sum() == pytest.approx(true_rates(clustered=True), abs=0.2)


@pytest.mark.parametrize(
    ("units", "clustered", "sets"),
    [(160, False, 2000), (2000, False, 1000), (MIN_RECORDINGS, True, 3000), (40, True, 2000), (200, True, 1000)],
)
def test_95_percent_intervals_hold_the_truth_93_to_97_times_of_100(units, clustered, sets):
    rate, difference = coverage(units, clustered, sets)
    assert 93 <= rate <= 97
    assert 93 <= difference <= 97


def test_the_measurement_tells_90_percent_intervals_from_95():
    rate, difference = coverage(40, clustered=True, sets=800, confidence=0.9)
    assert 86 <= rate <= 92
    assert 86 <= difference <= 92


def test_utterances_of_one_recording_taken_as_independent_promise_too_much():
    rate, difference = coverage(40, clustered=True, sets=500, by_recording=False)
    assert rate < 80
    assert difference < 88


def test_large_sets_agree_with_a_paired_bootstrap():
    rng = np.random.default_rng(3)
    errors, words, _ = draw_set(rng, 3000, clustered=False)
    counts = rng.multinomial(3000, np.full(3000, 1 / 3000), 2000)
    rates = 100 * (counts @ errors.T) / (counts @ words)[:, None]
    result = compare(*errors, words)
    for interval, resampled in ((result.first, rates[:, 0]), (result.difference, rates[:, 0] - rates[:, 1])):
        width = interval.high - interval.low
        assert [interval.low, interval.high] == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.08 * width)
    assert result.first_better == pytest.approx(np.mean(rates[:, 0] < rates[:, 1]), abs=0.03)
    assert result.first.value - result.second.value == pytest.approx(result.difference.value)


def test_students_distribution_is_that_of_the_tables():
    for degrees, quantile in ((1, 12.7062), (2, 4.3027), (5, 2.5706), (10, 2.2281), (30, 2.0423), (10_000, 1.9602)):
        assert student_quantile(degrees, 0.975) == pytest.approx(quantile, rel=5e-4)
        assert student_probability(degrees, -quantile) == pytest.approx(0.025, abs=2e-5)


def test_sets_without_an_error_leave_open_what_the_rule_of_three_does():
    interval = error_rate_interval(np.zeros(160), np.full(160, 9))
    assert (interval.value, interval.low) == (0, 0)
    assert (1 - interval.high / 100) ** 160 == pytest.approx(0.05)
    by_recording = error_rate_interval(np.zeros(160), np.full(160, 9), np.arange(160) % 8)
    assert (1 - by_recording.high / 100) ** 8 == pytest.approx(0.05)
    all_wrong = error_rate_interval(np.full(160, 9), np.full(160, 9))
    assert (all_wrong.value, all_wrong.high) == (100, 100)
    assert all_wrong.low == pytest.approx(100 - interval.high)


def test_one_utterance_or_one_recording_says_next_to_nothing():
    for arguments in (([1], [10]), ([2, 0], [10, 10], ["a", "a"])):
        interval = error_rate_interval(*arguments)
        assert interval.value == pytest.approx(10)
        assert interval.low < 1
        assert interval.high > 90
    result = compare([1], [9], [10])
    assert not result.more_than_noise
    assert 0.5 < result.first_better < 0.8


def test_systems_with_the_same_errors_cannot_be_told_apart():
    rng = np.random.default_rng(0)
    words = rng.integers(1, 30, 500)
    errors = rng.binomial(words, 0.1)
    result = compare(errors, errors, words)
    assert result.difference.value == 0
    assert result.difference.low < 0 < result.difference.high < 2
    assert result.first_better == 0.5
    assert not result.more_than_noise


def test_limits_are_finite_and_in_order_whatever_the_set():
    rng = np.random.default_rng(1)
    for units in (2, 2, 2, 3, 3, 4, 5, 8) * 40:
        words = np.ceil(rng.lognormal(2, 2, units))
        first, second = np.floor(words * rng.choice([0, 0, 0, 0.1, 0.5, 1, 4], (2, units)))
        result = compare(first, second, words)
        for interval in (result.first, result.second, result.difference):
            assert math.isfinite(interval.low) and math.isfinite(interval.high)
            assert interval.low <= interval.value <= interval.high
        assert result.first.low >= 0 and result.first.high <= 500
        sure = result.first_better > 0.975 or result.first_better < 0.025
        assert result.more_than_noise == sure
        assert compare(second, first, words).first_better == pytest.approx(1 - result.first_better, abs=1e-6)


def test_figures_are_plain_numbers_that_json_can_write():
    for errors in ([1, 0, 2], [0, 0, 0]):
        result = compare(errors, [0, 0, 1], [5, 6, 7], ["a", "b", "c"])
        written = json.dumps([dataclasses.asdict(result), result.more_than_noise])
        assert json.loads(written)[0]["difference"]["low"] == result.difference.low


def test_labels_are_only_labels():
    rng = np.random.default_rng(2)
    errors, words, recordings = draw_set(rng, 20, clustered=True)
    order = rng.permutation(len(words))
    names = np.array([f"recording {number}" for number in recordings])
    numbered = error_rate_interval(errors[0], words, recordings)
    named = error_rate_interval(errors[0][order], words[order], names[order].tolist())
    assert [named.low, named.high] == pytest.approx([numbered.low, numbered.high])
    alone = error_rate_interval(errors[0], words, np.arange(len(words)))
    assert alone == error_rate_interval(errors[0], words)
    assert numbered.high - numbered.low > 1.2 * (alone.high - alone.low)


def test_a_large_set_takes_a_moment_and_little_memory():
    errors, words, recordings = draw_set(np.random.default_rng(0), 700, clustered=True)
    assert len(words) > 15_000
    tracemalloc.start()
    started = time.perf_counter()
    compare(*errors, words, [f"recording {number}" for number in recordings])
    assert time.perf_counter() - started < 2
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_the_verdict_is_a_sentence_with_the_better_system_first():
    words = np.full(400, 10)
    rng = np.random.default_rng(4)
    base, tuned = rng.binomial(10, 0.3, 400), rng.binomial(10, 0.1, 400)
    sentence = verdict(compare(base, tuned, words), "base", "tuned")
    assert sentence.startswith("tuned is better than base by ")
    assert "(95 % interval " in sentence and sentence.endswith(", which is more than noise.")
    again = verdict(compare(tuned, rng.permutation(tuned), words, confidence=0.9), "tuned", "shuffled")
    assert again.startswith("tuned and shuffled cannot be told apart: they differ by ")
    assert "(90 % interval -" in again
    few = compare(base, tuned, words, np.arange(400) % (MIN_RECORDINGS - 1))
    assert f"{MIN_RECORDINGS - 1} recording(s) are too few" in verdict(few)
    enough = compare(base, tuned, words, np.arange(400) % MIN_RECORDINGS)
    assert "too few" not in verdict(enough)


def test_what_has_no_rate_is_refused():
    with pytest.raises(ValueError, match="leave out the utterances whose reference is empty"):
        error_rate_interval([0, 1], [3, 0])
    with pytest.raises(ValueError, match="leave out"):
        error_rate_interval([], [])
    with pytest.raises(ValueError, match="same utterances"):
        error_rate_interval([1], [3, 4])
    with pytest.raises(ValueError, match="same utterances"):
        compare([1, 2], [1], [3, 4])
    with pytest.raises(ValueError, match="same utterances"):
        error_rate_interval([1, 2], [3, 4], ["a"])
