"""The evaluation page shows what was measured, says where nothing was, and survives hostile text in a browser."""

import html
import html.parser
import itertools
import json
import re
from collections import Counter

import jiwer
import numpy as np
import pyarrow
import pytest
from chromium import look

from hebrew_asr.evaluation import page as evaluation_page
from hebrew_asr.evaluation.page import difference, markdown_table, rate_plots, rates_in_bins, read_columns, write_page
from hebrew_asr.text.targets import INVISIBLE

HOSTILE = (
    '<script>alert(1)</script> </script></style><img src=x onerror=alert(1)> "\' onmouseover="alert(1) & {{ 7*7 }}'
)
WORDS = "הנהג צילם שולחן ישן בספריה היום אתמול בבוקר ליד הים הגדול של העיר".split()
RULES = {"spelling": "The same word written in another way.", "word": "Another word. " + HOSTILE}


def utterance(model: str, part: str, number: int, reference: str, hypothesis: str, **given) -> dict:
    """A row of the table, aligned by jiwer; every error that is no substitution is of the class `word`."""
    counts, chunks = Counter(), [["insert", [], hypothesis.split(), "word"]] if hypothesis and not reference else []
    if reference:
        found = jiwer.process_words(reference, hypothesis)
        counts |= Counter(words=len(reference.split()), substitutions=found.substitutions)
        counts |= Counter(deletions=found.deletions, insertions=found.insertions)
        classes = {"equal": None, "substitute": "spelling", "delete": "word", "insert": "word"}
        for one in found.alignments[0]:
            said = found.references[0][one.ref_start_idx : one.ref_end_idx]
            chunks.append([one.type, said, found.hypotheses[0][one.hyp_start_idx : one.hyp_end_idx], classes[one.type]])
    names = ("words", "substitutions", "deletions", "insertions")
    row = {"model": model, "set": part, "number": number, "language": "Hebrew", "recording": f"{part}-{number}"}
    row |= {"seconds": 4.0, "snr_db": 12.0, "reference": reference + ".", "hypothesis": hypothesis}
    row |= {"detected_language": "Hebrew", "reference_normalized": reference, "hypothesis_normalized": hypothesis}
    row |= {name: counts[name] for name in names} | {"characters": len(reference), "character_edits": 1}
    return row | {"repetition": False, "truncated": False, "chunks": json.dumps(chunks)} | given


def rows_of(count: int, seed: int = 0) -> list[dict]:
    """Two models on `count` utterances of `heldout`, with errors at random and silences between."""
    random, rows = np.random.default_rng(seed), []
    for number in range(count):
        said = random.choice(WORDS, random.integers(1, 20)).tolist()
        seconds, snr = float(random.uniform(0.5, 40)), None if number % 7 == 0 else float(random.normal(12, 9))
        for model, share in (("base", 0.4), ("tuned", 0.1)):
            fates = random.random(len(said)) / share
            heard = [[] if fate < 0.3 else [word, "עוד"] if fate < 0.5 else ["אחר"] if fate < 1 else [word]
                     for word, fate in zip(said, fates, strict=True)]  # fmt: skip
            text = " ".join(word for words in heard for word in words)
            rows.append(utterance(model, "heldout", number, " ".join(said), text, seconds=seconds, snr_db=snr))
    return rows


def results_of(**changed) -> dict:
    def one(model, part, **more):
        numbers = {"model": model, "set": part, "reason": None, "utterances": 1234, "empty_references": 5, "hours": 0.4}
        numbers |= {"failures": {"empty": 0, "repetition": 2, "other_language": 1, "truncated": 0}}
        return numbers | {"audio_seconds_per_second": 12.3, "peak_memory_gb": 1.25, "repetitions_per_1000": 4.5} | more

    def spread(value):
        return {"value": value, "low": value - 2, "high": value + 3}

    def speech(wer):
        counts = {"words": 1500, "substitutions": 91, "deletions": 32, "insertions": 23}
        rates = {"wer": spread(wer), "cer": spread(wer / 2), "recordings": None, "wer_raw": wer + 1, "wil": 15.25}
        return counts | rates | {"language_accuracy": 99.8, "error_classes": {"spelling": 12, "word": 36}}

    def part(name, kind="speech", language="Hebrew"):
        about = {"path": f"demo/{name}", "config_name": None, "split": "test", "fingerprint": "9f2c"}
        return about | {
            "name": name, "kind": kind, "language": language, "utterances": 1234, "hours": 0.4, "recordings": 44
        }  # fmt: skip

    models = [{"name": name, "path": f"runs/{name}", "language": "free", "decoding": "greedy", "dtype": "bfloat16"}
              for name in ("base", "tuned")]  # fmt: skip
    silence = {"none_accuracy": 97.04, "language_accuracy": None}
    return {
        "created": "2026-11-22",
        "settings": {"seed": 1, "max_wer_rise": 5.0},
        "versions": {"torch": "2.14.1"},
        "sets": [part("heldout"), part("english", language="English"), part("silence", kind="non-speech")],
        "models": models,
        "results": [
            one("base", "heldout", **speech(60.25)),
            one("tuned", "heldout", **speech(9.75)),
            one("base", "english", **speech(5.5)),
            {"model": "tuned", "set": "english", "reason": f"out of memory {HOSTILE}"},
            one("base", "silence", **silence),
        ],
        "comparisons": [
            {"first": "tuned", "second": "base", "set": "heldout", "verdict": "tuned is better than base.",
             "difference": {"value": -50.5, "low": -52.25, "high": -48.75}, "probability_first_better": 0.9999}
        ],
        "quoted": [{"name": "Round 1", "wer": 12.5, "source": "its README"}],
        "gates": [{"name": "Hebrew", "passed": True, "detail": "better"},
                  {"name": "forgetting: English", "passed": False, "detail": "WER 5.6 → 101.2"}],
        "error_class_rules": RULES,
    } | changed  # fmt: skip


def tone(part: str, number: int) -> np.ndarray | None:
    """Of a length that tells the utterance."""
    return (0.1 * np.sin(np.arange(16_000 + 1600 * number) / 5)).astype(np.float32)


class Page(html.parser.HTMLParser):
    """The tables of a page as lists of rows of cells, all text, tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables, self.texts, self.tags, self.attributes, self.inside = {}, [], set(), [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "table":
            self.inside = self.tables.setdefault(dict(attrs)["class"], [])
        elif tag == "tr" and self.inside is not None:
            self.inside.append([])
        elif tag in ("td", "th"):
            self.inside[-1].append("")

    def handle_endtag(self, tag):
        if tag == "table":
            self.inside = None

    def handle_data(self, data):
        self.texts.append(data)
        if self.inside and self.inside[-1]:
            self.inside[-1][-1] += data.strip("\n")


def page_of(folder, results=None, rows=None, audio=tone) -> str:
    table = pyarrow.Table.from_pylist(rows_of(40) if rows is None else rows)
    write_page(folder / "page.html", results or results_of(), table, audio)
    return (folder / "page.html").read_text()


def test_what_was_not_measured_says_why_and_is_never_0(tmp_path):
    page = Page(page_of(tmp_path))
    (head, heldout, english, silence) = page.tables["verdict"]
    assert [cell.strip() for cell in head] == ["WER % (interval)", "base", "tuned"]
    assert heldout[1:] == ["60.2558.2–63.2", "9.757.8–12.8"], "rate and interval"
    assert english[1].startswith("5.50") and english[2].strip() == f"not measured: out of memory {HOSTILE}"
    assert silence[1].strip() == "97.0 %" and silence[2].strip() == "not measured: not run"
    for name in ("errors", "rates", "speed"):
        missing = [row for row in page.tables[name] if row[0] == "english" and "tuned" in row[1]]
        assert len(missing) == 1 and len(missing[0]) == 3 and "not measured" in missing[0][2]
    lines = [[cell.strip() for cell in line.split(" | ")] for line in markdown_table(results_of()).splitlines()]
    assert lines[2] == ["| heldout", "base", "1,234", "60.25 (58.25–63.25)", "30.12", "61.25", "– |"]
    assert lines[5][2].startswith("not measured: out of memory") and not any(cell == "0" for cell in lines[5])
    assert lines[6][2:] == ["1,234", "–", "–", "–", "97.04 |"] and "not run" in lines[7][2]


def test_a_page_of_nothing_says_so(tmp_path):
    reasons = [one | {"reason": "no such folder"} for one in results_of()["results"]]
    results = results_of(results=reasons, comparisons=[], quoted=[], gates=[])
    nothing = pyarrow.Table.from_pylist(rows_of(1)).slice(0, 0)
    write_page(tmp_path / "page.html", results, nothing, tone)
    page = Page((tmp_path / "page.html").read_text())
    cells = [cell.strip() for row in page.tables["verdict"][1:] for cell in row[1:]]
    assert Counter(cells) == {"not measured: no such folder": 5, "not measured: not run": 1}
    assert not re.search(r"\d", "".join(cell for row in page.tables["rates"] for cell in row))


def test_the_verdict_comes_first_and_what_is_quoted_stays_apart(tmp_path):
    text = page_of(tmp_path)
    page, said = Page(text), html.unescape(" ".join(re.sub("<[^>]+>", "", text[text.index("<h2>Verdict") :]).split()))
    order = ("1 of 2 gates failed", "✗ failed · forgetting: English", "✓ passed · Hebrew", "tuned is better than base.")
    order += ("−50.50 points of WER (−52.25 to −48.75)", "> 99.9 %", "60.25", "Round 1", "Where the errors are")
    places = [said.index(part) for part in order]
    assert places == sorted(places)
    found = page_of(tmp_path, results_of(settings={"max_wer_rise": None}))
    text = html.unescape(" ".join(re.sub("<[^>]+>", "", found).split()))
    assert "1 of 2 figures beside the task forgotten" in text and "✗ forgotten · forgetting: English" in text
    assert [row[:3] for row in page.tables["quoted"][1:]] == [["Round 1", "12.50", "its README"]]
    assert not any("12.50" in cell for name in ("verdict", "rates") for row in page.tables[name] for cell in row)
    assert "| Round 1 | 12.50 | its README |" in markdown_table(results_of())
    assert markdown_table(results_of(quoted=[])).count("quoted") == 0


def test_marks_and_intervals_stand_where_their_numbers_are(tmp_path):
    forest = re.search('<table class="forest">(.*?)</table>', page_of(tmp_path), re.DOTALL)[1]
    ticks = [(float(x), float(v)) for x, v in re.findall(r'<text x="([\d.]+)%" y="14"[^>]*>([\d.]+)<', forest)]
    scale = ticks[-1][1] / 100
    assert all(x * scale == pytest.approx(value) for x, value in ticks)
    lines = re.findall(r'class="interval" x1="([\d.]+)%" x2="([\d.]+)%".*?<svg x="([\d.]+)%"', forest)
    found = [[float(x) * scale for x in line] for line in lines]
    expected = [[58.25, 63.25, 60.25], [7.75, 12.75, 9.75], [3.5, 8.5, 5.5]]
    assert found == [pytest.approx(one, abs=0.01) for one in expected]
    assert [float(x) * scale for x in re.findall(r'class="hollow" x="([\d.]+)%"', forest)] == pytest.approx(
        [12.5], abs=0.01
    )


@pytest.mark.parametrize(("by", "edges"), [("seconds", (2, 5, 10, 20, 30)), ("snr_db", (0, 5, 10, 15, 20, 30))])
def test_rates_in_bins_are_those_of_jiwer_on_the_bin(by, edges):
    rows = [*rows_of(300), utterance("base", "heldout", 900, "", "עוד", seconds=6.0)]
    columns = read_columns(pyarrow.Table.from_pylist(rows))
    found = rates_in_bins(columns, columns["model"] == "base", by, edges)
    assert len(found) == len(edges) + 1
    for one, low, high in zip(found, (-np.inf, *edges), (*edges, np.inf), strict=True):
        mine = [row for row in rows if row["model"] == "base" and row["reference_normalized"]]
        mine = [row for row in mine if row[by] is not None and low <= row[by] < high]
        assert one["utterances"] == len(mine)
        if len(mine) < 20:
            assert one["wer"] is None
        else:
            texts = [[row[f"{kind}_normalized"] for row in mine] for kind in ("reference", "hypothesis")]
            assert one["wer"] == pytest.approx(100 * jiwer.wer(*texts))
    assert {one["wer"] is None for one in found} == {True, False}


def test_sets_are_pooled_only_where_every_model_has_them_and_drawn_where_their_rates_are(tmp_path):
    results = results_of()
    about = results["sets"][0]
    results["sets"] = [about | {"name": name} for name in ("heldout", "noisy", "partly")]
    measured = [one for one in results["results"] if one["set"] == "heldout"]
    results["results"] = [one | {"set": name} for name in ("heldout", "noisy") for one in measured]
    results["results"].append(measured[0] | {"set": "partly"})
    rows = rows_of(200) + [row | {"set": "noisy", "number": row["number"] + 500} for row in rows_of(200, seed=1)]
    rows += [row | {"set": "partly"} for row in rows_of(40, seed=2) if row["model"] == "base"]
    (pooled, *apart) = rate_plots(results, read_columns(pyarrow.Table.from_pylist(rows)))
    assert pooled["sets"] == ["heldout", "noisy"]
    assert [one["sets"] for one in apart] == [["heldout"], ["noisy"], ["partly"]]
    assert [len(one["seconds"]["lines"]) for one in (pooled, *apart)] == [2, 2, 2, 1]
    figure = re.search(
        "<figure>(.*?)</figure>", page_of(tmp_path, results, rows, lambda part, number: None), re.DOTALL
    )[1]
    points = re.findall(r'class="point" x="([\d.]+)%" y="([\d.]+)".*?<title>([^<]*)', figure)
    lines = pooled["seconds"]["lines"]
    expected = [
        (100 * (place + 0.5) / 6, 150 - 140 * one["wer"] / pooled["seconds"]["ticks"][-1], one["utterances"])
        for line in lines
        for place, one in enumerate(line["bins"])
        if one["wer"] is not None
    ]
    found = [(float(x), float(y), int(re.search(r"(\d+) utterances", said)[1])) for x, y, said in points]
    assert found == [pytest.approx(one, abs=0.06) for one in expected] and len(found) > 6


def test_errors_are_apart_by_kind_and_class_with_the_rules_beside(tmp_path):
    page = Page(page_of(tmp_path))
    assert page.tables["errors"][1][2:6] == ["1,500", "91", "32", "23"]
    assert [cell.strip() for cell in page.tables["classes"][1][:2]] == ["spelling", "12 · 25.0 %"]
    assert all(rule in page.texts for rule in RULES.values())
    row = dict(zip(page.tables["rates"][0], page.tables["rates"][2], strict=True))
    assert (row["raw text"], row["WIL %"]) == ("10.75", "15.25")
    assert page.tables["speed"][2][2:] == ["1,234", "5", "0.40", "12.3", "1.25"]


def test_the_worst_come_first_and_their_difference_has_every_word(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_page, "WORST", 8)
    monkeypatch.setattr(evaluation_page, "WHOLE", 99)
    rows = rows_of(60)
    text = page_of(tmp_path, rows=rows)
    items = re.findall(r'<li class="([w\d ]+)" style="([^"]+)">(.*?)</li>', text, re.DOTALL)
    shown = {int(re.search(r"utterance (\d+)", body)[1]): (styles, body) for _, styles, body in items}
    for index, model in enumerate(("base", "tuned")):
        counts = {row["number"]: (sum(row[k] for k in ("substitutions", "deletions", "insertions")), row["words"])
                  for row in rows if row["model"] == model}  # fmt: skip
        worst = sorted(counts, key=lambda n: (-counts[n][0], -counts[n][0] / counts[n][1], n))[:8]
        ranks = {n: int(re.search(rf"--r{index}:(\d+)", s)[1]) for n, (s, _) in shown.items() if f"--r{index}:" in s}
        assert sorted(ranks, key=ranks.get) == worst
    for number, (_, body) in shown.items():
        parts = re.findall(r'<div class="difference" dir="rtl">(.*?)</div>', body, re.DOTALL)
        for part, model in zip(parts, ("base", "tuned"), strict=True):
            (row,) = (row for row in rows if (row["model"], row["number"]) == (model, number))
            upper = re.findall(r"<(?:span|del)><bdi>(.*?)</bdi>", part)
            lower = re.findall(r'<ins><bdi>(.*?)</bdi>|<bdi class="same">(.*?)</bdi>', part)
            assert " ".join(upper).split() == row["reference_normalized"].split()
            assert " ".join(map("".join, lower)).split() == row["hypothesis_normalized"].split()
            marked = re.findall(r'<span class="(\w+)" title="(\w+), (\w+)".*?<small>. (\w+)', part)
            expected = [(c[0], c[0], c[3], c[3]) for c in json.loads(row["chunks"]) if c[0] != "equal"]
            assert marked == expected


def test_long_differences_are_cut_and_say_so():
    right = [f"מילה{i}" for i in range(1000)]
    cells = difference([["equal", right, right, None], ["delete", ["x"], [], "word"], ["equal", right, right, None]])
    kinds = [cell["kind"] for cell in cells["cells"]]
    assert kinds == ["gap", *["equal"] * 4, "delete", *["equal"] * 4, "gap"] and not cells["cut"]
    assert cells["cells"][0]["words"] == 996 and cells["cells"][4]["reference"] == "מילה999"
    cells = difference([["substitute", ["a" * 10_000], ["b"], "word"], ["insert", [], ["c"], "word"]] * 500)
    assert len(cells["cells"]) == 120 and cells["cut"] and cells["more"] == 880
    assert len(cells["cells"][0]["reference"]) < 200


def test_silence_that_was_answered_with_text_is_listed(tmp_path):
    rows = [utterance("base", "silence", n, "", "תודה " * n) for n in (3, 0, 9)]
    text = page_of(tmp_path, rows=rows_of(3) + rows)
    group = text[text.index("<summary><bdi>silence") : text.index("<h2>What was measured")]
    assert [int(n) for n in re.findall(r"utterance (\d+)", group)] == [9, 3]


def test_the_audio_of_the_worst_fills_the_page_up_to_its_limit(tmp_path, monkeypatch):
    text = page_of(tmp_path, audio=lambda part, number: None)
    assert "<audio" not in text and "No audio on this page" in text
    size, asked = len(text.encode()), []
    noise = np.random.default_rng(0).normal(0, 0.1, 5 * 16_000).astype(np.float32)
    monkeypatch.setattr(evaluation_page, "PAGE_BYTES", 6 * size)
    full = page_of(tmp_path, audio=lambda part, number: asked.append(number) or noise)
    assert 5 < full.count("<audio") == len(asked) - 1 < text.count("No audio") and len(full.encode()) < 6 * size
    first = [int(number) for number in re.findall(r"utterance (\d+)", text)][:3]
    assert set(first) <= set(asked[:6]), "the worst of both models come first"
    monkeypatch.setattr(evaluation_page, "PAGE_BYTES", int(0.9 * size))
    small = page_of(tmp_path)
    assert 'class="w' in small and len(small.encode()) < 0.9 * size


def hostile_rows() -> list[dict]:
    texts = [
        HOSTILE,
        f"שלום {HOSTILE} עולם",
        "שלום \u202eevil\u202c \u2066abc עולם\x00",
        "א" * 5000,
        "😀 ❤️ שלום 👨‍👩‍👧",
    ]
    rows = []
    for number, text in enumerate(texts):
        for model in ("base", "tuned"):
            rows.append(utterance(model, "heldout", number, f"{text} אחת", f"{text} \u202eשתיים <b>"))
            rows[-1] |= {"reference": text, "recording": f"\u202e{HOSTILE}", "detected_language": HOSTILE}
    return rows


def hostile_results() -> dict:
    results = json.loads(json.dumps(results_of()).replace('"tuned"', json.dumps(f"tuned \u202e{HOSTILE}")))
    results["sets"][0] |= {"path": HOSTILE, "fingerprint": "9" * 500, "split": HOSTILE}
    results["settings"] = {"note": f"</pre>{HOSTILE}\u2067"}
    results["quoted"] = [
        {"name": f"{HOSTILE} {'x' * 300}", "wer": 900.0, "source": f"| [a](javascript:alert(1)) {HOSTILE}"}
    ]
    results["gates"][0] |= {"name": HOSTILE, "detail": "x" * 500}
    return results


def test_hostile_text_is_only_text(tmp_path):
    rows = hostile_rows()
    for row in rows:
        row["model"] = row["model"].replace("tuned", f"tuned \u202e{HOSTILE}")
    text = page_of(tmp_path, hostile_results(), rows)
    page = Page(text)
    assert not page.tags & {"script", "img", "link", "iframe", "object", "embed", "form", "base", "ba"}
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert {value[:22] for _, name, value in page.attributes if name in ("src", "href")} == {"data:audio/ogg;base64,"}
    assert not INVISIBLE.search(text) and "⟨U+202E⟩" in text and "⟨U+0000⟩" in text
    assert any(HOSTILE in part for part in page.texts) and "49" not in "".join(page.tables["sources"][1])
    assert "default-src 'none'" in text and "script-src" not in text and not re.search(r"https?:|url\(|@import", text)
    table = markdown_table(hostile_results())
    assert "<script" not in table.replace("\\<", "") and "\u202e" not in table
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()} == {8, 5, 4, 0}


BROWSE = """
  const box = node => { const { left, right, top, bottom } = node.getBoundingClientRect();
    return { left, right, top, bottom, text: node.textContent } };
  const shown = node => node.checkVisibility(), players = all("audio");
  const listed = () => all("ol.samples > li").filter(shown)
    .map(node => [node.getBoundingClientRect().top, +node.textContent.match(/utterance (\\d+)/)[1]])
    .sort((a, b) => a[0] - b[0]).map(one => one[1]);
  const before = listed();
  const item = all("ol.samples > li")[0], cells = all(".difference", item)[0].children;
  const upper = [...cells].map(cell => box(cell.querySelector("bdi")));
  const lower = [...cells].map(cell => box(all("bdi", cell)[1]));
  const borders = Object.fromEntries(["substitute", "delete", "insert"].map(kind =>
    [kind, document.querySelector("." + kind) && getComputedStyle(document.querySelector("." + kind)).borderTopStyle]));
  players[0].muted = true;
  await players[0].play();
  await new Promise(resolve => players[0].addEventListener("ended", resolve));
  all("input")[1].checked = true;
  const after = listed();
  all("details").forEach(node => { node.open = true });
  document.body.style.maxWidth = "400px";
  const free = all("body *").filter(node => shown(node) && !node.closest(".wide, svg"));
  const reach = Math.max(...free.map(node => box(node).right));
  return { before, after, upper, lower, borders, played: players[0].currentTime, body: box(document.body).right, reach,
    texts: all(".text").map(node => [node.textContent, getComputedStyle(node).direction]) };"""


def test_a_browser_reads_differences_from_the_right_and_plays_the_audio(tmp_path):
    rows = [row | {"number": row["number"] + 1} for row in rows_of(30)]
    rows += [utterance("base", "heldout", 0, " ".join(WORDS[:5]), f"{WORDS[0]} עוד {WORDS[1]} אחר {WORDS[4]}")]
    rows += [utterance("tuned", "heldout", 0, WORDS[0], WORDS[0] + " x" * 40)]
    page_of(tmp_path, rows=rows)
    seen = look(tmp_path / "page.html", BROWSE, tmp_path)
    for index, found in enumerate((seen["before"], seen["after"])):
        model, errors = ("base", "tuned")[index], {}
        for row in rows:
            wrong = row["substitutions"] + row["deletions"] + row["insertions"]
            if row["model"] == model and wrong:
                errors[row["number"]] = (-wrong, -wrong / row["words"], row["number"])
        assert found == sorted(errors, key=errors.get), "the chosen model's worst, in its order"
    assert seen["after"][0] == 0
    for line in (seen["upper"], seen["lower"]):
        for one, following in itertools.pairwise(line):
            assert following["right"] <= one["left"] or following["top"] >= one["bottom"], (
                "from right to left, then down"
            )
    assert all(low["top"] >= up["bottom"] - 1 for up, low in zip(seen["upper"], seen["lower"], strict=True))
    assert seen["borders"] == {"substitute": "solid", "delete": "dashed", "insert": "dotted"}
    assert seen["played"] == pytest.approx(len(tone("heldout", seen["before"][0])) / 16_000, abs=0.02)
    assert seen["reach"] <= seen["body"], "a phone scrolls only down"
    assert {direction for _, direction in seen["texts"]} == {"rtl"}


def test_hostile_text_neither_runs_nor_leaves_its_place_in_a_browser(tmp_path):
    rows = hostile_rows()
    for row in rows:
        row["model"] = row["model"].replace("tuned", f"tuned \u202e{HOSTILE}")
    page_of(tmp_path, hostile_results(), rows)
    seen = look(tmp_path / "page.html", BROWSE.replace('["substitute", "delete", "insert"]', "[]"), tmp_path)
    assert seen["reach"] <= seen["body"]
    assert any(text.startswith(HOSTILE) for text, _ in seen["texts"])


def test_20_000_utterances_of_two_models_are_seen_in_two_seconds(tmp_path, monkeypatch):
    few = rows_of(500)
    rows = [row | {"number": row["number"] + 500 * times} for times in range(40) for row in few]
    noise = np.random.default_rng(0).normal(0, 0.1, 60 * 16_000).astype(np.float32)
    encoded = evaluation_page.encode_audio(noise)
    monkeypatch.setattr(evaluation_page, "encode_audio", lambda waveform: encoded)
    page_of(tmp_path, rows=rows, audio=lambda part, number: noise)
    size = (tmp_path / "page.html").stat().st_size
    assert len(rows) == 40_000 and 10e6 < size < 20e6
    script = (
        "const ready = performance.now(); return { ready, painted: await painted, items: all('.samples > li').length }"
    )
    seen = look(tmp_path / "page.html", script, tmp_path)
    assert seen["items"] > 50 and seen["painted"] < 2000 and seen["painted"] < seen["ready"]
