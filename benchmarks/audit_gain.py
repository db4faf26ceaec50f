"""Measures what dropping the transcripts that the audit ranks worst gains after training anew.

    uv run python benchmarks/audit_gain.py --work runs/audit-gain

The demo's corpus with 5 % of its transcripts exchanged among one another and 5 % slightly wrong: one word replaced by
another utterance's, or left out. Trained on it as it is (the recipe `all`), audited with the model that came of it,
trained again without the worst 2, 5 and 10 %; beside them the corpus without its wrong transcripts, and with right ones
in their place. One seed draws what is wrong, the order and all masks. Runs are forked, one thread each; what is done in
`--work` is not run again.
"""

import argparse
import functools
import json
import os
import re
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pyarrow.parquet
import torch

from benchmarks.effects import work_off
from benchmarks.recipes import TEST, Run, found_in, said, settings, train_and_measure, wer
from hebrew_asr.data.sources import Source
from hebrew_asr.errors import InputError
from hebrew_asr.files import DEMO
from hebrew_asr.processes import launch
from hebrew_asr.text.intervals import compare
from scripts import audit_corpus

SPOILT = "spoilt"
EXCHANGED, SLIGHTLY = 0.05, 0.05  # shares of the utterances
DROPPED = (0.02, 0.05, 0.1)
TIMESTAMP = re.compile(r"<\|[\d.]+\|>")


def spoil(texts: list[str], random: np.random.Generator) -> dict[int, tuple[str, str]]:
    """What is wrong, by number: its kind (exchanged, a word changed, a word missing) and the wrong text."""
    order = random.permutation(len(texts))
    exchanged, slightly = (round(share * len(texts)) for share in (EXCHANGED, SLIGHTLY))
    pairs = zip(order[:exchanged], np.roll(order[:exchanged], 1), strict=True)
    wrong = {int(number): ("exchanged", texts[other]) for number, other in pairs}
    for number in order[exchanged : exchanged + slightly]:
        words = texts[number].split()
        place = int(random.integers(len(words)))
        is_missing = len(words) > 1 and random.random() < 0.5
        others = texts[random.integers(len(texts))].split()
        words[place : place + 1] = [] if is_missing else [str(random.choice(others))]
        wrong[int(number)] = ("a word missing" if is_missing else "a word changed", " ".join(words))
    return wrong


def write_corpora(work: Path, seed: int) -> dict[int, str]:
    """Writes the corpora to train on; returns what is wrong in the spoilt one, by row."""
    (file,) = (DEMO / "corpus").glob("*.parquet")
    rows = pyarrow.parquet.read_table(file)
    texts = [" ".join(TIMESTAMP.sub(" ", text).split()) for text in rows["transcript"].to_pylist()]
    wrong = spoil(texts, np.random.default_rng([seed, 5]))
    right = pyarrow.array([number not in wrong for number in range(len(rows))])
    corpora = {SPOILT: [wrong.get(n, ("", text))[1] for n, text in enumerate(texts)], "right": texts}
    tables = {name: replaced(rows, "transcript", pyarrow.array(these)) for name, these in corpora.items()}
    tables = {name: replaced(t, "has_timestamps", pyarrow.array([False] * len(rows))) for name, t in tables.items()}
    for name, table in (tables | {"without": tables["right"].filter(right)}).items():
        (work / "data" / name).mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, work / "data" / name / "train.parquet")
    return {number: kind for number, (kind, _) in wrong.items()}


def replaced(table: pyarrow.Table, column: str, values: pyarrow.Array) -> pyarrow.Table:
    return table.set_column(table.column_names.index(column), table.schema.field(column), values)


def train(work: Path, name: str, seed: int, drop: float = 0.0) -> None:
    config = settings(work, Run("all", 2309, seed))
    corpus = name if (work / "data" / name).exists() else SPOILT
    config.train_sources, config.output_dir = [Source(str(work / "data" / corpus))], str(work / name / "run")
    if drop:
        config.audit_scores, config.drop_worst_share = str(work / "audit.parquet"), drop
    train_and_measure(work / name, config)


def audit(work: Path) -> None:
    source = json.dumps([{"path": str(work / "data" / SPOILT)}])
    arguments = ["--demo", "--model", str(work / SPOILT / "last"), "--audit_output", str(work / "audit.parquet")]
    audit_corpus.main([*arguments, "--train_sources", source])


def ranked(work: Path, wrong: dict[int, str]) -> list[str]:
    """How much of each kind of wrong transcript lies among the worst."""
    scores = pyarrow.parquet.read_table(work / "audit.parquet").to_pylist()
    kinds = sorted(set(wrong.values()))
    lines = [f"| worst | {' | '.join(kinds)} | right |", "|" + "---|" * (len(kinds) + 2)]
    for share in DROPPED:
        all_of = [wrong.get(row["row"], "right") for row in scores if row["rank"] is not None]  # the worst first
        worst = all_of[: round(share * len(all_of))]
        cells = [f"{worst.count(kind)} of {all_of.count(kind)}" for kind in [*kinds, "right"]]
        lines.append(f"| {share:.0%} | {' | '.join(cells)} |")
    return lines


def results(work: Path, names: list[str]) -> list[str]:
    """WER of each run, and its difference in points from what was trained on everything, on the same utterances."""
    lines = ["| trained on | clean | difference | noisy | difference |", "|" + "---|" * 5]
    everything = found_in(work / SPOILT)["sets"]
    for name in names:
        cells, sets = [], found_in(work / name)["sets"]
        for one in ("heldout", "heldout-noisy"):
            cells.append(f"{wer(sets[one]):.2f}")
            other = compare(sets[one]["errors"], everything[one]["errors"], sets[one]["words"], sets[one]["recordings"])
            low, high = other.difference.low, other.difference.high
            cells.append("" if name == SPOILT else f"{other.difference.value:+.2f} ({low:+.2f} to {high:+.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def command(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("audit_gain.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--work", type=Path, default=Path("runs/audit-gain"))
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--at_once", type=int, default=len(os.sched_getaffinity(0)), help="runs at once")
    given = parser.parse_args(arguments)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no run stays behind
    work = given.work.resolve() / f"seed-{given.seed}"
    wrong = write_corpora(work, given.seed)
    first = {SPOILT: 0.0}
    others = {f"without the worst {share:.0%}": share for share in DROPPED} | {"without": 0.0, "right": 0.0}
    for shares in (first, others):
        left = [name for name in shares if not TEST.is_done(work / name)]
        jobs = []
        for name in left:
            (work / name).mkdir(parents=True, exist_ok=True)
            body = functools.partial(train, work, name, given.seed, shares[name])
            jobs.append((name, body, work / name / "log.txt"))
        if failed := work_off(jobs, given.at_once, lambda number, left=left: said(found_in(work / left[number]))):
            raise InputError(f"{len(failed)} runs failed: {'; '.join(failed)}. The same command tries them again")
        if not (work / "audit.parquet").exists() and work_off(
            [("audit", functools.partial(audit, work), work / "audit.txt")], 1, lambda _: "done"
        ):
            raise InputError(f"the audit failed: see {work / 'audit.txt'}")
    print(*ranked(work, wrong), "", *results(work, [*first, *others]), sep="\n")


if __name__ == "__main__":
    launch(command)
