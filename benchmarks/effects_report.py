"""What the runs of effects.py say: error rates against one another with intervals, a table, a forest plot.

Runs of one variant differ in their seed, and all transcribe the same utterances. Both were drawn: another seed draws
other training utterances, another order and other masks, another test set holds other sentences. So the interval
of a change of WER is over seeds and over utterances (or recordings) at once, as crossed random effects: the variance of
the difference's logarithm between seeds, plus that between utterances, less that of what is left when both are taken
out, which each of the two holds. Quantiles are Student's, with Satterthwaite's degrees of freedom, and never fewer than
seeds - 1. What the test set has in common (its voices, its kinds of noise) is not drawn anew by this.

Coverage in percent of intervals meant to be 95 %, on made-up sets of 340 utterances with a change of 10 %, 1,500 sets a
figure, as in tests/test_effects.py. The rows are how much the change itself differs (standard deviation of its
logarithm) between seeds and between utterances. With 5 seeds, an interval over utterances alone covers 83.2 % in the
third row, one over seeds alone 71.7 % in the last.

| between seeds | between utterances | 2 seeds | 3 seeds | 5 seeds | 10 seeds |
|---------------|--------------------|---------|---------|---------|----------|
| 0             | 0                  | 94.7    | 93.9    | 95.0    | 96.2     |
| 0.03          | 0.3                | 92.9    | 95.1    | 93.6    | 95.8     |
| 0.1           | 0.3                | 91.7    | 91.6    | 94.9    | 94.7     |
| 0.1           | 0                  | 94.5    | 94.9    | 94.7    | 94.9     |
| 0             | 0.8                | 92.9    | 93.8    | 94.9    | 93.5     |
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hebrew_asr.text.intervals import student_probability, student_quantile

WIDEST = 100  # percent that the plot goes to


@dataclass(frozen=True)
class Change:
    """How a variant's WER differs from another's, in percent of the other's."""

    value: float
    low: float
    high: float
    p: float
    """Of so large a change, up or down, where there is none."""


def change(
    errors: np.ndarray, others: np.ndarray, clusters: Sequence | None = None, confidence: float = 0.95
) -> Change:
    """Compares two variants that ran with the same seeds and transcribed the same utterances.

    Args:
        errors, others: (seeds, utterances) word errors of the variant and of what it is compared with.
        clusters: the recording each utterance is from; without them utterances count as independent.
    """
    errors, others = np.asarray(errors, float), np.asarray(others, float)
    if errors.shape != others.shape or len(errors) < 2:
        raise ValueError(f"the same two or more seeds and utterances are needed: {errors.shape}, {others.shape}")
    if not errors.sum() or not others.sum():
        raise ValueError("without any error there is nothing to compare")
    if clusters is not None:
        _, unit = np.unique(np.asarray(clusters), return_inverse=True)
        sums = np.zeros((errors.shape[1], unit.max() + 1))
        sums[np.arange(len(unit)), unit] = 1
        errors, others = errors @ sums, others @ sums
    ratio = errors.sum() / others.sum()
    parts = (errors - ratio * others) / errors.sum()  # of the ratio's logarithm; they sum to 0
    seeds, units = parts.shape
    by_seed, by_unit = parts.sum(axis=1), parts.sum(axis=0)
    left = parts - by_seed[:, None] / units - by_unit[None, :] / seeds
    between_seeds = by_seed @ by_seed * seeds / (seeds - 1)
    between_units = by_unit @ by_unit * units / (units - 1)
    in_both = (left**2).sum() * seeds * units / ((seeds - 1) * (units - 1))
    variance = max(between_seeds + between_units - in_both, between_seeds)
    degrees = 1.0
    if variance:
        components = between_seeds**2 / (seeds - 1) + between_units**2 / (units - 1)
        degrees = min(max(variance**2 / components, seeds - 1), 10_000)
    t, error = math.log(ratio), math.sqrt(variance)
    half = student_quantile(degrees, (1 + confidence) / 2) * error
    p = 2 * student_probability(degrees, -abs(t) / error) if error else float(ratio == 1)
    low, high = (100 * math.expm1(min(limit, 50)) for limit in (t - half, t + half))
    return Change(100 * (ratio - 1), low, high, p)


# --------------------------------------------------------------------------------------------------------------- Table


def rows_of(variants: list[dict[str, Any]], runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each variant with its steps, seconds, rates, and changes against what it is compared with, set by set.

    Args:
        variants: the fields of Variant, and expected: the change in percent that the spec leads to, or None.
        runs: variant, seed, steps, seconds, and for each set the errors, words and recordings of its utterances.
    """
    names = [variant["name"] for variant in variants]
    mine = {name: sorted((r for r in runs if r["variant"] == name), key=lambda r: r["seed"]) for name in names}
    rows = []
    for variant in variants:
        of = mine[variant["name"]]
        seconds = [run["seconds"]["cpu"] for run in of if run["seconds"]["cpu"] is not None]
        row = variant | {"seeds": [run["seed"] for run in of], "steps": of[0]["steps"], "sets": {}}
        row["seconds"] = float(np.mean(seconds)) if seconds else None
        for name, one in of[0]["sets"].items():
            errors = np.array([run["sets"][name]["errors"] for run in of])
            wers = 100 * errors.sum(axis=1) / sum(one["words"])
            row["sets"][name] = {"wer": float(wers.mean()), "wers": wers.tolist(), "change": None}
            if others := mine.get(variant["against"]):
                others = np.array([run["sets"][name]["errors"] for run in others])
                row["sets"][name]["change"] = vars(change(errors, others, one["recordings"]))
        rows.append(row)
    mark_certain(rows)
    return rows


def mark_certain(rows: list[dict[str, Any]], level: float = 0.05) -> None:
    """Marks the changes that hold among all of the table's together (Holm's procedure)."""
    changes = [one["change"] for row in rows for one in row["sets"].values() if one["change"]]
    holds = True
    for rank, one in enumerate(sorted(changes, key=lambda c: c["p"])):
        holds = holds and one["p"] <= level / (len(changes) - rank)
        one["certain"] = holds


def verdict(change: dict[str, Any], row: dict[str, Any]) -> str:
    """Whether the part that is added or taken away helps, and how much beside what was expected."""
    sign = -1 if row["adds"] else 1  # from the change in errors to what the part brings
    least, most = sorted((sign * change["low"], sign * change["high"]))
    if least > 0:
        said = f"{row['part']}: helps"
    elif most < 0:
        said = f"{row['part']}: harms"
    else:
        said = f"{row['part']}: no help seen"
    said += "*" * change["certain"]
    if row["expected"] is None:
        return said
    low, high = sorted(sign * limit for limit in row["expected"])
    if most < low:
        return f"{said}, less than expected"
    if least > high:
        return f"{said}, more than expected"
    return f"{said}, the expectation is not excluded"


def lines_of(rows: list[dict[str, Any]]) -> list[str]:
    """The table in Markdown, and what is to be known to read it."""
    sets = list(rows[0]["sets"])
    head = ["variant", "steps", "training, CPU s", *(f"WER {name}, %" for name in sets)]
    head += [*(f"change {name}, % (interval)" for name in sets), "spec expects, %", *(f"so, {name}" for name in sets)]
    titles = {row["name"]: row["title"] for row in rows}
    lines, against = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)], None
    for row in rows:
        if row["against"] in titles and row["against"] != against:
            against = row["against"]
            lines.append(f"| *against: {titles[against]}* |" + " |" * (len(head) - 1))
        cells = [row["title"], str(row["steps"]), "" if row["seconds"] is None else f"{row['seconds']:.0f}"]
        cells += [f"{one['wer']:.2f}" for one in row["sets"].values()]
        changes = [one["change"] for one in row["sets"].values()]
        cells += [f"{c['value']:+.1f} ({c['low']:+.1f} to {c['high']:+.1f})" if c else "" for c in changes]
        expected = row["expected"] if any(changes) else None
        cells += [f"{expected[0]:+.1f} to {expected[1]:+.1f}" if expected else ""]
        cells += [verdict(c, row) if c else "" for c in changes]
        lines.append(f"| {' | '.join(cells)} |")
    count = sum(one["change"] is not None for row in rows for one in row["sets"].values())
    lines.append(
        f"change: of the WER of {len(rows[0]['seeds'])} seeds together, in percent of the WER of what it is compared"
        " with, with its 95 % interval over seeds and utterances; above 0 are more errors"
    )
    lines.append(
        f"{count} comparisons: about {count / 20:.1f} of these intervals exclude 0 where there is nothing; * marks what"
        " holds for all of them together at 95 % (Holm)"
    )
    return lines


# ---------------------------------------------------------------------------------------------------------------- Plot


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """The changes as a forest plot: a panel for each variant compared with, the spec's expectation behind them."""
    from matplotlib.figure import Figure

    titles = {row["name"]: row["title"] for row in rows}
    rows = [row for row in rows if any(one["change"] for one in row["sets"].values())]
    groups = {
        name: [row for row in rows if row["against"] == name] for name in dict.fromkeys(r["against"] for r in rows)
    }
    sizes = [len(group) + 1 for group in groups.values()]
    figure = Figure(figsize=(9, 1.2 + 0.42 * sum(sizes)), layout="constrained")
    panels = figure.subplots(len(groups), 1, sharex=True, height_ratios=sizes, squeeze=False)[:, 0]
    changes = [one["change"] for row in rows for one in row["sets"].values()]
    ranges = [row["expected"] for row in rows if row["expected"]]
    left = 1.08 * min(-5, *(c["low"] for c in changes), *(low for low, _ in ranges))
    right = 1.08 * max(5, *(min(c["high"], WIDEST) for c in changes), *(high for _, high in ranges))
    for axes, (name, group) in zip(panels, groups.items(), strict=True):
        for place, row in enumerate(group):
            if row["expected"]:
                low, high = row["expected"]
                label = (
                    "expected by the spec"
                    if axes is panels[0] and row is next(r for r in group if r["expected"])
                    else None
                )
                axes.barh(place, high - low, left=low, height=0.8, color="#f0d9a8", label=label)
            for number, (set_name, one) in enumerate(row["sets"].items()):
                found, height = one["change"], place + 0.3 * (number - (len(row["sets"]) - 1) / 2)
                error = [[found["value"] - found["low"]], [found["high"] - found["value"]]]
                axes.errorbar(
                    found["value"], height, xerr=error, fmt="os^Dv"[number % 5], color=f"C{number}", markersize=4,
                    capsize=2, label=set_name if axes is panels[0] and not place else None,
                )  # fmt: skip
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(group)), [row["title"] for row in group])
        axes.set_ylim(len(group) - 0.4, -0.6)
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(f"against: {titles[name]}", loc="left", fontsize=10)
        axes.set_xlim(left, right)
    panels[-1].set_xlabel("change of the WER in percent, with 95 % intervals: left fewer errors, right more")
    figure.legend(loc="outside upper right", ncols=3, fontsize=9)
    figure.savefig(file, dpi=110)
