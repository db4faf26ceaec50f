"""The page of an evaluation: which checkpoint is better, by how much, where its errors are, and what they sound like.

The page is one HTML file that needs no other and runs no script; the table is Markdown for a model card. Both only show
what the evaluation measured: they score nothing and decide nothing.
"""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow.compute import count_substring_regex

from hebrew_asr.data.audio import SAMPLE_RATE, SAMPLE_SECONDS, encode_audio
from hebrew_asr.text.html import one_line, render_page
from hebrew_asr.text.targets import has_hebrew

SECONDS_EDGES = (2, 5, 10, 20, 30)  # between the bins; the first and the last are open
SNR_EDGES = (0, 5, 10, 15, 20, 30)  # dB
FEWEST = 20  # utterances that a bin needs for a rate
WORST = 50  # utterances of each model and set
PAGE_BYTES = 19_500_000  # audio is embedded up to it, the worst first
WIDEST = 150  # % of WER that the plot with intervals goes to; what is worse is marked at its edge
WHOLE, CONTEXT = 12, 4  # right words in a row that are shown whole, and those kept at the ends of a longer run
CELLS, CELL_CHARACTERS = 120, 160  # of a transcript's difference; more is counted, not shown
# Okabe and Ito's colours on light and on dark, which the colour-blind can tell apart, and shapes, since colour alone is
# not enough
COLOURS = (
    ("#0072b2", "#4da3dc"),
    ("#d55e00", "#f08a45"),
    ("#009e73", "#2fc493"),
    ("#cc79a7", "#e3a1c6"),
    ("#7a5c00", "#d0b24a"),
    ("#3a9bd9", "#8fd0f7"),
    ("#222222", "#dddddd"),
)
SHAPES = (
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
    "M-4.5-4.5h9v9h-9z",
    "M0-6L5.5 4.5h-11z",
    "M0-6.5L6 0 0 6.5-6 0z",
    "M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
)
# What the evaluation wrote to results.json; the rows of its utterances, by column; waveforms by set and number
Results = dict[str, Any]
Columns = dict[str, np.ndarray]
Audio = Callable[[str, int], np.ndarray | None]


# --------------------------------------------------------------------------------------------------------- What is read
def cells_of(results: Results) -> dict[tuple[str, str], dict[str, Any]]:
    """What was measured by (model, set), each with a `reason`: None, or why there is nothing."""
    missing = {(m["name"], s["name"]): {"reason": "not run"} for m in results["models"] for s in results["sets"]}
    return missing | {(one["model"], one["set"]): one for one in results["results"]}


def speech_sets(results: Results) -> list[dict[str, Any]]:
    return [one for one in results["sets"] if one["kind"] == "speech"]


def read_columns(utterances: pyarrow.Table) -> Columns:
    """The columns that rates and ranks are made of; texts stay in the table.

    `errors` are word errors. Where the reference holds no word, they are the words of the hypothesis: what a model
    wrote though nothing was said.
    """
    names = ("model", "set", "number", "seconds", "snr_db", "words", "substitutions", "deletions", "insertions")
    columns = {name: utterances[name].to_numpy() for name in names}
    columns["snr_db"] = columns["snr_db"].astype(float)  # None becomes NaN
    written = count_substring_regex(utterances["hypothesis_normalized"], r"\S+").to_numpy()
    edits = columns["substitutions"] + columns["deletions"] + columns["insertions"]
    return columns | {"errors": np.where(columns["words"] > 0, edits, written)}


# ------------------------------------------------------------------------------------------------------ Rates and plots
def bin_labels(edges: tuple[int, ...]) -> list[str]:
    return [f"< {edges[0]}", *(f"{low}–{high}" for low, high in itertools.pairwise(edges)), f"≥ {edges[-1]}"]


def rates_in_bins(columns: Columns, chosen: np.ndarray, by: str, edges: tuple[int, ...]) -> list[dict[str, Any]]:
    """WER in percent in each bin of the column `by`: errors over words, pooled; None below `FEWEST` utterances."""
    chosen = chosen & (columns["words"] > 0) & ~np.isnan(columns[by])
    bins, size = np.digitize(columns[by][chosen], edges), len(edges) + 1
    counts = np.bincount(bins, minlength=size)
    words = np.bincount(bins, columns["words"][chosen], size)
    errors = np.bincount(bins, columns["errors"][chosen], size)
    return [
        {"utterances": int(n), "wer": float(100 * e / w) if n >= FEWEST else None}
        for n, w, e in zip(counts, words, errors, strict=True)
    ]


def axis_ticks(highest: float) -> list[float]:
    """Round numbers from 0 to at least `highest`, at most six."""
    sizes = (factor * 10.0**power for power in itertools.count(-1) for factor in (1, 2, 5))
    step = next(size for size in sizes if highest <= 5 * size)
    return [step * number for number in range(max(1, int(np.ceil(highest / step - 1e-9))) + 1)]


def line_plot(results: Results, columns: Columns, sets: list[str], by: str, edges: tuple[int, ...]) -> dict[str, Any]:
    """WER by bins of one column, pooled over `sets`, a line for each model that was measured on all of them."""
    measured, lines = cells_of(results), []
    inside = np.isin(columns["set"], sets)
    for index, model in enumerate(results["models"]):
        if any(measured[model["name"], name]["reason"] for name in sets):
            continue
        chosen = inside & (columns["model"] == model["name"])
        spoken = chosen & (columns["words"] > 0)
        lines.append(
            {
                "model": index,
                "bins": rates_in_bins(columns, chosen, by, edges),
                "without": int(np.isnan(columns[by][spoken]).sum()),
            }
        )
    rates = [one["wer"] for line in lines for one in line["bins"] if one["wer"] is not None]
    return {"labels": bin_labels(edges), "lines": lines, "ticks": axis_ticks(max(rates)) if rates else []}


def rate_plots(results: Results, columns: Columns) -> list[dict[str, Any]]:
    """Plots over the duration and the noise: for all sets of a language together, then for each set of speech.

    Sets are pooled only where every model that was measured in the language has them, so that the lines compare.
    """
    measured, names, groups = cells_of(results), [model["name"] for model in results["models"]], []
    for language in dict.fromkeys(one["language"] for one in speech_sets(results)):
        sets = [one["name"] for one in speech_sets(results) if one["language"] == language]
        models = [name for name in names if any(not measured[name, one]["reason"] for one in sets)]
        common = [one for one in sets if models and all(not measured[name, one]["reason"] for name in models)]
        if len(common) > 1:
            groups.append((language, common))
        groups += [(language, [one]) for one in sets]
    plots = []
    for language, sets in groups:
        seconds = line_plot(results, columns, sets, "seconds", SECONDS_EDGES)
        snr = line_plot(results, columns, sets, "snr_db", SNR_EDGES)
        plots.append({"language": language, "sets": sets, "seconds": seconds, "snr": snr})
    return plots


def forest_axis(results: Results) -> list[float]:
    measured = [one["wer"] for one in results["results"] if not one["reason"] and one.get("wer")]
    ends = [one["high"] for one in measured] + [one["wer"] for one in results["quoted"]]
    return axis_ticks(min(max(ends, default=0), WIDEST))


# ------------------------------------------------------------------------------------------------- The worst utterances
def shorten(words: list[str]) -> str:
    text = " ".join(words)
    return text if len(text) <= CELL_CHARACTERS else f"{text[:CELL_CHARACTERS]}…"


def difference(chunks: list[list[Any]]) -> dict[str, Any]:
    """The chunks of an alignment as cells, one above the other: long right runs cut, the rest beyond `CELLS` counted.

    A chunk is [kind, words of the reference, words of the hypothesis, error class].
    """
    cells: list[dict[str, Any]] = []
    for place, (kind, reference, hypothesis, error_class) in enumerate(chunks):
        if kind != "equal":
            shown = {"kind": kind, "reference": shorten(reference), "hypothesis": shorten(hypothesis)}
            cells.append(shown | {"words": max(len(reference), len(hypothesis)), "error_class": error_class})
            continue
        before, after = CONTEXT * (place > 0), CONTEXT * (place < len(chunks) - 1)
        skipped = len(reference) - before - after if len(reference) > WHOLE else 0
        cut = before if skipped else len(reference)
        cells += [{"kind": "equal", "reference": shorten([word])} for word in reference[:cut]]
        if skipped:
            cells.append({"kind": "gap", "words": skipped})
            cells += [{"kind": "equal", "reference": shorten([word])} for word in reference[cut + skipped :]]
    more = sum(cell["kind"] not in ("equal", "gap") for cell in cells[CELLS:])
    return {"cells": cells[:CELLS], "cut": len(cells) > CELLS, "more": more}


def worst_places(columns: Columns, chosen: np.ndarray, worst: int) -> np.ndarray:
    """Where the rows with the most word errors are, most first, of equal ones the one with the highest rate."""
    places = np.flatnonzero(chosen & (columns["errors"] > 0))
    rates = columns["errors"][places] / np.maximum(columns["words"][places], 1)
    return places[np.lexsort((columns["number"][places], -rates, -columns["errors"][places]))][:worst]


def worst_utterances(results: Results, utterances: pyarrow.Table, columns: Columns, worst: int) -> list[dict[str, Any]]:
    """The worst utterances of each set, each once, with what every model wrote and its rank for each model."""
    measured, groups = cells_of(results), []
    for one in results["sets"]:
        rows, ranks = {}, {}
        for index, model in enumerate(results["models"]):
            if measured[model["name"], one["name"]]["reason"]:
                continue
            chosen = (columns["set"] == one["name"]) & (columns["model"] == model["name"])
            rows[index] = dict(zip(columns["number"][chosen].tolist(), np.flatnonzero(chosen).tolist(), strict=True))
            if one["kind"] == "speech":
                chosen &= columns["words"] > 0  # what is left out of the rates
            for rank, place in enumerate(worst_places(columns, chosen, worst)):
                ranks.setdefault(int(columns["number"][place]), {})[index] = rank
        items = []
        for number in sorted(ranks, key=lambda number: min(ranks[number].values())):
            answers = [
                {"model": index, "errors": int(columns["errors"][places[number]])}
                | read_row(utterances, places[number])
                for index, places in rows.items()
                if number in places
            ]
            items.append({"set": one["name"], "number": number, "ranks": ranks[number], "answers": answers})
        shown = {index: sum(index in item["ranks"] for item in items) for index in rows}
        groups.append({"set": one, "items": items, "shown": shown})
    return groups


def read_row(utterances: pyarrow.Table, place: int) -> dict[str, Any]:
    row = {name: utterances[name][place].as_py() for name in utterances.column_names if name not in ("model", "set")}
    return row | {"difference": difference(json.loads(row["chunks"]))}


def embed_audio(groups: list[dict[str, Any]], audio: Audio, room: int) -> dict[tuple[str, int], str]:
    """Audio as base64 by set and number, the worst of every set and model first, until `room` bytes are full."""
    items = [item for group in groups for item in group["items"]]
    embedded: dict[tuple[str, int], str] = {}
    for item in sorted(items, key=lambda item: min(item["ranks"].values())):
        waveform = audio(item["set"], item["number"])
        if waveform is None:
            continue
        encoded = encode_audio(waveform[: SAMPLE_SECONDS * SAMPLE_RATE])
        room -= len(encoded) + 100  # the element around it
        if room < 0:
            break
        embedded[item["set"], item["number"]] = encoded
    return embedded


# -------------------------------------------------------------------------------------------------------------- As page
def write_page(file: Path, results: Results, utterances: pyarrow.Table, audio: Audio) -> None:
    """Writes one HTML file below 20 MB that needs no other.

    Args:
        results: what results.json holds.
        utterances: a row for each model and utterance, with counts of errors and the chunks of the alignment as JSON.
        audio: gives the waveform (samples,) at 16 kHz of a set's utterance by its number, or None.

    Everything from outside is escaped, invisible characters are written out, and the page may neither run scripts nor
    fetch anything. Where the texts of the worst utterances alone would fill the page, fewer are shown.
    """
    columns, worst = read_columns(utterances), WORST
    values: dict[str, Any] = {
        "results": results,
        "measured": cells_of(results),
        "plots": rate_plots(results, columns),
        "forest": forest_axis(results),
        "colours": COLOURS,
        "shapes": SHAPES,
        "fewest": FEWEST,
        "sample_seconds": SAMPLE_SECONDS,
        "settings": json.dumps([results["settings"], results["versions"]], ensure_ascii=False, indent=2),
    }
    while True:
        groups = worst_utterances(results, utterances, columns, worst)
        values |= {"groups": groups, "worst": worst, "audio": {}, "reading_order": reading_order}
        size = len(render_page("evaluation/page.html.jinja", **values).encode())
        if size < PAGE_BYTES / 2 or worst == 1:
            break
        worst //= 2
    values["audio"] = embed_audio(groups, audio, PAGE_BYTES - size)
    file.write_text(render_page("evaluation/page.html.jinja", **values), encoding="utf-8")


def reading_order(reference: str, hypothesis: str) -> str:
    """The side that the words of a difference begin at: the reference's, or where it is empty the hypothesis's."""
    return "rtl" if has_hebrew(reference or hypothesis) else "ltr"


# ---------------------------------------------------------------------------------------------------------- As Markdown
def markdown_table(results: Results) -> str:
    """The rates as Markdown for a model card; baselines that were quoted stand in a table of their own."""
    measured, lines = cells_of(results), []
    header = ["set", "model", "utterances", "WER % (interval)", "CER %", "WER % on raw text", "no text written %"]
    lines += [header, ["---"] * 2 + ["---:"] * 5]
    for one, model in itertools.product(results["sets"], results["models"]):
        found, names = measured[model["name"], one["name"]], [escape(one["name"]), escape(model["name"])]
        if found["reason"]:
            lines.append([*names, f"not measured: {escape(found['reason'])}", "", "", "", ""])
            continue
        wer = found.get("wer")
        over = f" over {found['recordings']:,} recordings" if wer and found["recordings"] else ""
        spread = f"{wer['value']:.2f} ({wer['low']:.2f}–{wer['high']:.2f}{over})" if wer else "–"
        rates = [found["cer"]["value"] if found.get("cer") else None, found.get("wer_raw"), found.get("none_accuracy")]
        shown = ["–" if rate is None else f"{rate:.2f}" for rate in rates]
        lines.append([*names, f"{found['utterances']:,}", spread, *shown])
    if results["comparisons"]:
        lines += [
            [],
            ["set", "model", "compared with", "difference in points of WER (interval)"],
            ["---"] * 3 + ["---:"],
        ]
        for one in results["comparisons"]:
            names = [escape(one[name]) for name in ("set", "first", "second")]
            value, low, high = (f"{one['difference'][name]:+.2f}" for name in ("value", "low", "high"))
            lines.append([*names, f"{value} ({low} to {high})".replace("-", "−")])
    if results["quoted"]:
        lines += [[], ["quoted, not measured here", "WER %", "source"], ["---", "---:", "---"]]
        lines += [[escape(one["name"]), f"{one['wer']:.2f}", escape(one["source"])] for one in results["quoted"]]
    return "\n".join("| " + " | ".join(line) + " |" if line else "" for line in lines) + "\n"


def escape(text: str) -> str:
    """`text` as the plain words of a Markdown cell."""
    return re.sub(r"([\\`*\[\]<>|&~])", r"\\\1", one_line(text))
