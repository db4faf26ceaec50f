"""What audio without transcripts is worth on the demo world: half of the corpus has its transcripts hidden.

    uv run python benchmarks/pseudo_labels.py [--folder DIR] [--seeds 3] [--steps 700] [--json FILE]

The corpus is halved by recording. For each seed, from `demo/base` and with the same number of steps: the half with
transcripts alone; that, and the other half as pseudo_label.py transcribes it with the checkpoint so trained; and the
true transcripts of both. Error rates are those of `demo/heldout`, with paired 95 % intervals. What is done is on the
disk: the same command goes on. No GPU is needed.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from hebrew_asr.text.scoring import score  # noqa: E402
from hebrew_asr.text.targets import TIMESTAMP  # noqa: E402

DEMO = ROOT / "demo"
RATES = {"projector": 2e-3, "audio_top": 6e-4, "llm_top": 6e-4, "lm_head": 2e-3}  # of the demo's stage A


def run(script: str, *arguments: object) -> None:
    subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], check=True)


def halve(folder: Path) -> list[Path]:
    """Writes the rows of every other recording to `labelled`, the others to `hidden`."""
    (file,) = (DEMO / "corpus").glob("*.parquet")
    table = pyarrow.parquet.read_table(file)
    entries = [row["entry_id"] for row in table["metadata"].to_pylist()]
    chosen = set(np.random.default_rng(1).permutation(sorted(set(entries)))[::2].tolist())
    halves = {"labelled": True, "hidden": False}
    for name, is_chosen in halves.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        mine = table.filter(np.array([(entry in chosen) == is_chosen for entry in entries]))
        pyarrow.parquet.write_table(mine, folder / name / "train-00000-of-00001.parquet", row_group_size=100)
    return [folder / name for name in halves]


def train(folder: Path, sources: list[Path], steps: int, seed: int) -> None:
    """Has the demo's recipe, in one stage, make folder/final_model; a run that is finished says so and ends."""
    stage = {"name": "A", "last_epoch": 1000, "learning_rates": RATES, "audio_top_layers": 1, "llm_top_layers": 1}
    run(
        "train_round2_gradual.py",
        *("--demo", "--train_sources", json.dumps([{"path": str(source)} for source in sources])),
        *("--stages", json.dumps([stage]), "--max_steps", steps, "--eval_steps", 10**6, "--save_steps", 100),
        *("--output_dir", folder, "--seed", seed, "--tracker", "none"),
    )


def labels_against_transcripts(corpus: Path, hidden: Path) -> dict[str, float]:
    """Error rates of the pseudo-labels that were kept; of rows with timestamps the text alone is known."""

    def texts(folder: Path) -> dict[bytes, str]:
        rows = [
            row for file in sorted(folder.glob("*.parquet")) for row in pyarrow.parquet.read_table(file).to_pylist()
        ]
        return {row["audio"]["bytes"]: row["transcript"] for row in rows}

    true, kept = texts(hidden), texts(corpus)
    known = [audio for audio in kept if not TIMESTAMP.search(true[audio])]
    found = score([true[audio] for audio in known], [kept[audio] for audio in known])
    return {"kept": len(kept), "of": len(true), "wer": found["wer"], "cer": found["cer"]}


def measure(folder: Path) -> dict[str, Any]:
    """Error rates of the three models, and their differences, as the evaluation command has them."""
    models = [folder / name / "final_model" for name in ("pseudo", "half", "both")]
    heldout = {"name": "heldout", "path": str(DEMO / "heldout"), "split": "test"}
    run(
        "evaluate_hebrew_asr.py",
        *("--model", models[0], "--compare", *models[1:], "--sets", json.dumps(heldout)),
        *("--output_dir", folder / "evaluation", "--num_workers", 0, "--max_wer_rise", "none"),
    )
    results = json.loads((folder / "evaluation" / "results.json").read_text())
    return {
        "wer": {r["model"].split("/")[0]: r["wer"] for r in results["results"]},
        "differences": [
            {n: c[n] for n in ("first", "second", "difference", "verdict")} for c in results["comparisons"]
        ],
    }


def one_seed(folder: Path, labelled: Path, hidden: Path, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    train(folder / "half", [labelled], given.steps, seed)
    if not (folder / "corpus").exists():
        model, limits = folder / "half" / "final_model", ("--min_confidence", given.min_confidence)
        run(
            "scripts/pseudo_label.py",
            *("--model", model, "--source", hidden, "--output", folder / "corpus", "--config"),
            *(folder / "half" / "config.yaml", "--samples", given.samples, *limits, "--num_workers", 0),
        )
    train(folder / "pseudo", [labelled, folder / "corpus"], given.steps, seed)
    train(folder / "both", [labelled, hidden], given.steps, seed)
    report = json.loads((folder / "corpus.labels" / "report.json").read_text())
    labels = labels_against_transcripts(folder / "corpus", hidden) | {"utterances": report["utterances"]}
    return {"seed": seed, "labels": labels} | measure(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "pseudo-labels")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=700, help="of each training run, 16 utterances each")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--min_confidence", type=float, default=0.8)
    parser.add_argument("--json", type=Path, help="also write the results here")
    given = parser.parse_args()
    started = time.time()
    labelled, hidden = halve(given.folder)
    seeds = [one_seed(given.folder / f"seed-{s}", labelled, hidden, s, given) for s in range(1, given.seeds + 1)]
    results = {"steps": given.steps, "samples": given.samples, "min_confidence": given.min_confidence, "seeds": seeds}
    for one in seeds:
        wers = ", ".join(f"{name} {wer['value']:.1f} %" for name, wer in one["wer"].items())
        labels = one["labels"]
        print(
            f"seed {one['seed']}: {labels['kept']} of {labels['of']} labels, their WER {labels['wer']:.1f} % | {wers}"
        )
    if given.json:
        given.json.write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
