"""The report's numbers are those of a count by hand, and its page shows and plays what is in the corpus, no more."""

import html.parser
import io
import json
import re

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
from chromium import look
from conftest import first_rows

from hebrew_asr.data.report import dropped_samples, playable, summarize, table, write_page, write_report
from hebrew_asr.data.selection import load_train_and_eval
from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.text.html import bidi_parts, one_line

HOSTILE = "<script>alert(1)</script> שלום <img src=x onerror=alert(1)> \"' & עולם"
MIXED = "קניתי iPhone 15 Pro, ואז C++ (ב-2024)."


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report, and what it is about: 60 rows, one English, one too fast, one broken, and two of them held out."""
    folder = tmp_path_factory.mktemp("report")
    rows = pyarrow.parquet.read_table(first_rows("corpus", 60, folder / "demo")).to_pylist()
    for number, row in enumerate(rows):
        row["transcript"] = re.sub(r"<\|[\d.]+\|>", " ", row["transcript"])
        if number >= 10 and number % 4:
            row["transcript"] = MIXED if number % 4 == 1 else HOSTILE
    rows[3]["transcript"] = "hello there"
    rows[5]["transcript"] = "שלום " * 100
    rows[7]["audio"]["bytes"] = b"not audio"
    for part, chosen in (("שיחות/אימון", rows), ("heldout", rows[20:22])):
        (folder / part).mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chosen), folder / part / "train.parquet")
    train, heldout = [Source(str(folder / "שיחות" / "אימון"))], [Source(str(folder / "heldout"))]
    config = DataConfig(train, heldout, leak_min_words=99, max_characters_per_second=110.0)  # the texts repeat
    train_rows, eval_rows = load_train_and_eval(config, seed=1)
    return folder, write_report(folder, train_rows, eval_rows, config), train_rows, config, rows


def test_the_numbers_are_those_counted_by_hand(report):
    rows, (summary, _) = report[-1], json.loads((report[0] / "corpus.json").read_text())
    used = [row for i, row in enumerate(rows) if i not in (3, 5, 7, 20, 21)]
    seconds = np.array([soundfile.info(io.BytesIO(row["audio"]["bytes"])).duration for row in used])
    texts = [" ".join(row["transcript"].split()) for row in used]
    assert summary["in"]["utterances"] == 60 and summary["kept"]["utterances"] == len(used) == 55
    assert summary["kept"]["hours"] == pytest.approx(seconds.sum() / 3600)
    assert summary["recordings"] == len({row["metadata"]["entry_id"] for row in used})
    assert {drop["reason"]: drop["utterances"] for drop in summary["dropped_by_reason"]} == {
        "no Hebrew in the text": 1,
        "not 1–110 characters a second": 1,
        "unreadable audio": 1,
        "audio of an evaluation set": 2,
    }
    assert [leak["utterances"] for leak in summary["leaks"]] == [2]
    for key, values in (("seconds", seconds), ("characters_per_second", np.array(list(map(len, texts))) / seconds)):
        found = summary[key]
        assert list(found["percentiles"].values()) == pytest.approx(np.percentile(values, [1, 5, 50, 95, 99]).tolist())
        bins = [*range(len(found["counts_in_bins_of_1"])), np.inf]
        assert found["counts_in_bins_of_1"] == np.histogram(values, bins)[0].tolist()
    words = {re.sub(r"[\W_]", "", word).lower() for text in texts for word in text.split()} - {""}
    assert summary["vocabulary_words"] == len(words)
    letters = re.findall(r"[^\W_]", "".join(texts))
    hebrew, digits = (sum(bool(re.match(kind, c)) for c in letters) / len(letters) for kind in ("[א-ת]", r"\d"))
    assert list(summary["script_shares_of_sample"].values()) == pytest.approx([hebrew, 1 - hebrew - digits, digits])
    places = [sample["number"] for sample in summary["samples"]]
    assert len(places) == 10 and all(1 <= step <= 11 for step in np.diff(places)), "spread over the source"
    assert [sample["text"] for sample in summary["samples"]] == [texts[place] for place in places]


def test_what_is_empty_is_told(report, tmp_path):
    _, _, train, config, _ = report
    nothing = train.keep(np.zeros(len(train), bool))
    summaries = summarize("training", nothing, config.train_sources)
    assert summaries[0]["kept"] == {"utterances": 0, "hours": 0} and summaries[0]["samples"] == []
    assert table(summaries) and json.dumps(summaries, allow_nan=False)
    write_page(summaries, {"training": nothing}, tmp_path / "page.html")
    piece = {"audio": {"bytes": b"", "path": "a"}, "start": 0.0, "end": None, "seconds": 1.0}
    assert playable({"number": 0}, [piece])["problem"] == "zero bytes of audio"


def test_the_lines_name_each_reason_and_cannot_steer_a_terminal(report):
    folder, lines, *_ = report
    assert "\n".join(lines[:-4]) in (folder / "corpus.md").read_text()
    assert all(said in "\n".join(lines) for said in ("no Hebrew in the text", "unreadable audio", "removed: 2 of"))
    assert one_line("a\nb\x1b[2J\u202e") == "a b[2J"


def test_all_that_was_dropped_is_listed_and_a_few_of_each_reason_are_played(report):
    folder, lines, train, config, _ = report
    header, *listed = [line.split("\t") for line in (folder / "corpus-dropped.tsv").read_text().splitlines()]
    found = [dict(zip(header, line, strict=True)) for line in listed]
    assert {one["row"]: one["reason"] for one in found if one["set"] == "training"} == {
        "3": "no Hebrew in the text",
        "5": "not 1–110 characters a second",
        "7": "unreadable audio",
        "20": "audio of an evaluation set",
        "21": "audio of an evaluation set",
    }
    assert found[0]["text"] == "hello there" and any("each of the 5 dropped: " in line for line in lines)
    source = str(config.train_sources[0])
    (broken,) = dropped_samples(train, source, "unreadable audio")
    assert broken["problem"] == "unreadable audio" and not broken["audio"] and broken["row"] == 7
    heard = dropped_samples(train, source, "audio of an evaluation set")
    assert [one["row"] for one in heard] == [20, 21] and all(one["audio"] and one["whole"] for one in heard)


def test_runs_from_left_to_right():
    assert bidi_parts("למדתי C++.") == ["למדתי ", "C++", "."]
    assert bidi_parts("ה-API של Google Cloud (GCP) נפל") == ["ה-", "API", " של ", "Google Cloud (GCP)", " נפל"]
    assert bidi_parts("ירד ב-3% או -2%, ב-2024: 1 2 3") == ["ירד ב-3% או ", "-2%", ", ב-2024: 1 2 3"]
    assert bidi_parts("hello, world!") == ["hello, world!"]


def test_the_page_holds_everything_and_runs_nothing(report):
    text, tags, attributes, shown = (report[0] / "corpus.html").read_text(), set(), [], []
    page = html.parser.HTMLParser()
    page.handle_starttag = lambda tag, given: (tags.add(tag), attributes.extend(given))
    page.handle_data = shown.append
    page.feed(text)
    assert HOSTILE in "".join(shown) and MIXED in "".join(shown)
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "form", "base"}
    assert all(value.startswith(("data:audio/ogg;base64,", "#")) for n, value in attributes if n in ("src", "href"))
    assert not re.search(r"https?:|url\(|@import", text)
    assert "default-src 'none'" in text and "script-src" not in text


PROBE = """
  const place = node => [node.textContent, node.getBoundingClientRect().left];
  const players = all(".kept audio"), texts = all(".kept .text");
  const mixed = texts.find(node => node.innerText.includes("iPhone"));
  players[0].muted = true;
  await players[0].play();
  await new Promise(resolve => players[0].addEventListener("ended", resolve));
  await Promise.all(players.map(p => p.readyState || new Promise(resolve => p.addEventListener("canplay", resolve))));
  return {
    played: players[0].currentTime, durations: players.map(player => player.duration),
    texts: texts.map(node => node.textContent), directions: texts.map(node => getComputedStyle(node).direction),
    runs: all("bdi", mixed).map(place),
    lost: all(".lost audio").length, names: all(".names bdi[dir=ltr]").map(node => node.textContent),
    path: all("bdi", document.querySelector("td.name a")).slice(1).map(place),
    overflow: document.documentElement.scrollWidth - innerWidth };"""


def test_a_browser_plays_the_audio_and_reads_hebrew_from_the_right(report, tmp_path):
    samples = [s for one in json.loads((report[0] / "corpus.json").read_text()) for s in one["samples"]]
    seen = look(report[0] / "corpus.html", PROBE, tmp_path)
    assert seen["texts"] == [sample["text"] for sample in samples] and HOSTILE in seen["texts"]
    assert seen["durations"] == pytest.approx([sample["seconds"] for sample in samples], abs=0.02)
    assert seen["played"] == pytest.approx(samples[0]["seconds"], abs=0.02)
    assert set(seen["directions"]) == {"rtl"}
    (first, right), (second, left) = seen["runs"]
    assert (first, second) == ("iPhone 15 Pro", "C++") and left < right
    names, lefts = zip(*seen["path"], strict=True)
    assert names[-2:] == ("שיחות", "אימון") and list(lefts) == sorted(lefts), "a path reads from left to right"
    assert seen["lost"] == 4 and "demo-0017" in seen["names"], "of five that were dropped one cannot be played"
    assert seen["overflow"] <= 0, "a phone scrolls only down"
