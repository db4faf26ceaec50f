"""The report on the corpora of a run: what was kept, what was dropped and why, and how it reads and sounds.

corpus.md and the console have the tables, corpus.json every number, corpus.html also histograms and samples to hear, of
what was dropped too, and corpus-dropped.tsv all that was.
Imports nothing of the training scripts.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow.compute import count_distinct, utf8_length, utf8_split_whitespace

from hebrew_asr.data.audio import SAMPLE_SECONDS, AudioError, decode_audio, encode_audio
from hebrew_asr.data.rows import SpeechRows, why_unheard
from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.text.html import one_line, render_page
from hebrew_asr.text.targets import SPOKEN, script_shares

PERCENTILES = (1, 5, 50, 95, 99)
SECONDS_BINS, RATE_BINS = 30, 40  # bins of 1 s and of 1 character a second; one more takes what lies above
SCRIPT_SAMPLE = 20_000  # texts whose scripts are counted; Python reads them letter by letter
BATCH = 100_000  # texts split into words at once
SAMPLES = 10  # utterances of each source on the page
DROPPED_SAMPLES, DROPPED_SECONDS = 3, 15  # of each reason; of each of them no more is embedded
LISTED = ("recording", "row", "start", "seconds", "text")  # columns of the index in the list of what was dropped
LEAK = "of an evaluation set"  # how the reasons of leaks end
# A summary is a dict that JSON can hold; its keys are those of `summarize_source`.
Summary = dict[str, Any]


def summarize(name: str, rows: SpeechRows, sources: list[Source]) -> list[Summary]:
    """Describes what each source gives to one set of rows; `name` is the set's, such as "training"."""
    return [summarize_source(name, rows, sources, number) for number in range(len(sources))]


def summarize_source(name: str, rows: SpeechRows, sources: list[Source], number: int) -> Summary:
    """Lengths and texts are those of the pieces kept; vectorised, since a source can have millions."""
    is_mine = rows.source_numbers == number
    mine, seconds = np.flatnonzero(is_mine), rows.seconds[is_mine]
    characters, vocabulary = read_texts(rows, mine)
    rates = characters / np.maximum(seconds, 1e-3)  # evaluation keeps pieces of any length
    dropped = dropped_of(rows, sources, number)
    kept, lost = {"utterances": len(mine), "hours": float(seconds.sum()) / 3600}, total(dropped)
    spread_out = rows.used[mine[np.linspace(0, len(mine) - 1, min(SCRIPT_SAMPLE, len(mine))).astype(int)]].tolist()
    return {
        "set": name,
        "source": label(sources[number]),
        "in": {unit: kept[unit] + lost[unit] for unit in kept},
        "dropped": lost,
        "kept": kept,
        "recordings": count_distinct(take(rows, "recording", mine)).as_py(),
        "seconds": distribution(seconds, SECONDS_BINS),
        "characters_per_second": distribution(rates, RATE_BINS),
        "vocabulary_words": vocabulary,
        "script_shares_of_sample": script_shares("\n".join(rows.index["text"][i].as_py() for i in spread_out)),
        "script_sample_texts": len(spread_out),
        "dropped_by_reason": dropped,
        "leaks": [drop for drop in dropped if drop["reason"].endswith(LEAK)],
        "samples": samples(rows, mine),
    }


def label(source: Source) -> str:
    return one_line(str(source))


def take(rows: SpeechRows, column: str, numbers: np.ndarray) -> pyarrow.ChunkedArray:
    """A column of the pieces `numbers`, which lie near one another: only that stretch of the index is read."""
    places = rows.used[numbers]
    first = int(places.min()) if len(places) else 0
    return rows.index[column].slice(first).take(places - first)


def read_texts(rows: SpeechRows, mine: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns the characters of each text and the number of different words, without case and punctuation."""
    words, characters = pyarrow.array([], pyarrow.string()), [np.zeros(0)]
    for begin in range(0, len(mine), BATCH):
        texts = take(rows, "text", mine[begin : begin + BATCH]).combine_chunks()
        characters.append(utf8_length(texts).to_numpy())
        words = pyarrow.concat_arrays([words, utf8_split_whitespace(texts).flatten().unique()]).unique()
    plain = {"".join(SPOKEN.findall(word)).lower() for word in words.to_pylist()}
    return np.concatenate(characters), len(plain - {""})


def distribution(values: np.ndarray, bins: int) -> dict[str, Any]:
    """Percentiles, and counts in bins of 1; the last bin has everything from `bins` on."""
    percentiles = np.percentile(values, PERCENTILES).tolist() if len(values) else [None] * len(PERCENTILES)
    counts = np.bincount(np.minimum(values, bins).astype(int), minlength=bins + 1)
    return {
        "percentiles": dict(zip(map(str, PERCENTILES), percentiles, strict=True)),
        "counts_in_bins_of_1": counts.tolist(),
    }


def dropped_of(rows: SpeechRows, sources: list[Source], number: int) -> list[dict[str, Any]]:
    """What was dropped of a source, most first; of two that are the same, the first is given everything."""
    name, by_reason = str(sources[number]), {}
    if name in map(str, sources[:number]):
        return []
    for drop in (drop for drop in rows.dropped if drop.source == name):
        nothing = {"source": name, "reason": drop.reason, "utterances": 0, "hours": 0.0, "examples": []}
        entry = by_reason.setdefault(drop.reason, nothing)
        entry["utterances"] += drop.utterances
        entry["hours"] += drop.hours
        entry["examples"] += drop.examples
    return sorted(by_reason.values(), key=lambda entry: -entry["utterances"])


def total(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"utterances": sum(p["utterances"] for p in parts), "hours": float(sum(p["hours"] for p in parts))}


def samples(rows: SpeechRows, mine: np.ndarray) -> list[dict[str, Any]]:
    """One utterance from each tenth of a source, always the same; `number` is its place in `rows`."""
    random, edges = np.random.default_rng(0), np.linspace(0, len(mine), min(SAMPLES, len(mine)) + 1).astype(int)
    numbers = [int(mine[random.integers(*tenth)]) for tenth in itertools.pairwise(edges)]
    return [described(rows, n) for n in numbers]


# ------------------------------------------------------------------------------------------------------------ As lines
def table(summaries: list[Summary]) -> list[str]:
    """The report as lines of text: counts, what is kept, what was dropped, leaks."""
    counts, kept, dropped, leaks = [], [], [], []
    for one in summaries:
        names = [one["set"], one["source"]]
        hours = [f"{one[part]['hours']:,.2f}" for part in ("in", "dropped", "kept")]
        utterances = [f"{one[part]['utterances']:,}" for part in ("in", "dropped", "kept")]
        counts.append([*names, *utterances, *hours, f"{one['recordings']:,}"])
        spreads = [one[key]["percentiles"].values() for key in ("seconds", "characters_per_second")]
        shares = [f"{100 * share:.1f} %" for share in one["script_shares_of_sample"].values()]
        spreads = ["  ".join("-" if v is None else f"{v:4.1f}" for v in values) for values in spreads]
        kept.append([*names, *spreads, f"{one['vocabulary_words']:,}", *shares])
        for drop in one["dropped_by_reason"]:
            dropped.append([*names, drop["reason"], f"{drop['utterances']:,}", f"{drop['hours']:,.2f}"])
        for leak in one["leaks"]:
            shown = ", ".join(map(one_line, leak["examples"][:3]))
            leaks.append(f"leak, removed: {leak['utterances']:,} of {one['source']} have the {leak['reason']}: {shown}")
    units = ["utterances in", "dropped", "kept", "hours in", "dropped", "kept", "recordings"]
    percentiles = "  ".join(f"{p:2} %" for p in PERCENTILES)
    tails = [f"seconds: {percentiles}", f"characters a second: {percentiles}"]
    lines = aligned([["set", "source", *units], *counts], left=2)
    lines += ["", *aligned([["kept of", "source", *tails, "words", "Hebrew", "Latin", "digits"], *kept], left=2)]
    if dropped:
        lines += ["", *aligned([["dropped of", "source", "because", "utterances", "hours"], *dropped], left=3)]
    return lines + (["", *leaks] if leaks else [])


def aligned(cells: list[list[str]], left: int) -> list[str]:
    """Rows of cells as lines; the first `left` columns begin at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = ["<"] * left + [">"] * (len(widths) - left)
    formats = list(zip(sides, widths, strict=True))
    return ["  ".join(f"{c:{s}{w}}" for c, (s, w) in zip(row, formats, strict=True)).rstrip() for row in cells]


def playable(sample: dict[str, Any], rows: SpeechRows, longest: float = SAMPLE_SECONDS) -> dict[str, Any]:
    """A sample with its piece of audio, at most `longest` s, as base64 of Ogg, its size, and what is wrong with it."""
    piece = rows[sample["number"]]
    whole = 0 < piece["seconds"] <= longest
    end = piece["end"] if whole else piece["start"] + longest
    try:
        waveform = decode_audio(piece["audio"], piece["start"], end)
    except AudioError as error:
        return sample | {"problem": str(error), "audio": ""}
    problem = why_unheard(waveform, min(piece["seconds"], longest), piece["language"])
    audio = encode_audio(waveform)
    return sample | {"problem": problem, "audio": audio, "kilobytes": len(audio) / 1e3, "whole": whole}


def dropped_samples(rows: SpeechRows, source: str, reason: str) -> list[dict[str, Any]]:
    """A few pieces of a source that were dropped for a reason, from its beginning, middle and end, to hear."""
    places = np.concatenate([drop.places for drop in rows.dropped if (drop.source, drop.reason) == (source, reason)])
    chosen = places[np.linspace(0, len(places) - 1, min(DROPPED_SAMPLES, len(places))).astype(int)]
    lost = SpeechRows(rows.sources, rows.index, chosen, [])
    return [playable(described(lost, number), lost, DROPPED_SECONDS) for number in range(len(lost))]


def described(rows: SpeechRows, number: int) -> dict[str, Any]:
    """What the page says of the utterance `number` of `rows`."""
    columns = ("text", "previous", "recording", "row", "start", "seconds")
    return {"number": number} | {name: rows.index[name][int(rows.used[number])].as_py() for name in columns}


def write_dropped(file: Path, rows: dict[str, SpeechRows]) -> int:
    """Writes a line for each piece that was dropped, of each set, as TSV; returns how many there are."""
    count = 0
    with open(file, "w", encoding="utf-8") as written:
        print("set", "source", "reason", *LISTED, sep="\t", file=written)
        for name, each in rows.items():
            for drop in each.dropped:
                pieces = each.index.select(LISTED).take(pyarrow.array(drop.places))
                for piece in itertools.chain.from_iterable(batch.to_pylist() for batch in pieces.to_batches(BATCH)):
                    cells = [one_line(str("" if piece[column] is None else piece[column])) for column in LISTED]
                    print(name, one_line(drop.source), one_line(drop.reason), *cells, sep="\t", file=written)
                count += len(drop.places)
    return count


def write_page(summaries: list[Summary], rows: dict[str, SpeechRows], file: Path) -> None:
    """Writes one HTML file that needs no other: tables, histograms, and samples to read and hear.

    `rows` has each set's rows by its name in the summaries. Everything from the corpora is escaped, and the page may
    neither run scripts nor fetch anything.
    """
    shown = [
        summary
        | {"samples": [playable(sample, rows[summary["set"]]) for sample in summary["samples"]]}
        | {
            "lost": [
                dropped_samples(rows[summary["set"]], one["source"], one["reason"])
                for one in summary["dropped_by_reason"]
            ]
        }
        for summary in summaries
    ]
    page = render_page("data/report.html.jinja", summaries=shown, percentiles=PERCENTILES)
    file.write_text(page, encoding="utf-8")


def write_report(folder: Path, train_rows: SpeechRows | None, eval_rows: SpeechRows, config: DataConfig) -> list[str]:
    """Writes corpus.json, corpus.md and corpus.html into `folder`; returns what the console is to show.

    `train_rows` is None where training data is streamed: nobody knows yet what is in it.
    """
    rows = {"training": train_rows, "evaluation": eval_rows}
    summaries = summarize("training", train_rows, config.train_sources) if train_rows else []
    summaries += summarize("evaluation", eval_rows, config.eval_sources or config.train_sources)
    content = json.dumps(summaries, ensure_ascii=False, indent=1, allow_nan=False)
    (folder / "corpus.json").write_text(content + "\n", encoding="utf-8")
    lines = table(summaries)
    (folder / "corpus.md").write_text("\n".join(["# Corpora", "", "```text", *lines, "```", ""]), encoding="utf-8")
    there = {name: each for name, each in rows.items() if each is not None}
    dropped, page = folder / "corpus-dropped.tsv", folder / "corpus.html"
    count = write_dropped(dropped, there)
    write_page(summaries, there, page)
    lines += ["", *train_rows.notes] if train_rows and train_rows.notes else []
    lines += ["", f"each of the {count:,} dropped: {dropped}"] if count else []
    return [*lines, "", f"histograms and samples to hear: {page} ({page.stat().st_size / 1e6:.1f} MB)"]
