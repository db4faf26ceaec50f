"""How long a start takes on a large corpus: from the settings to the first batch, with the index already there.

    uv run python benchmarks/startup.py [--rows 2300000] [--folder DIR] [--json FILE]

Makes a corpus of short rows (their audio are paths to a few recordings, so it fits a disk), indexes it once, starts
again in a fresh process, then writes what `--prepare` would have heard of it and starts twice more. Reports seconds and
peak memory of each.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train_hebrew_asr_enhanced import TrainingConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

SECONDS_A_ROW = 7.8  # 2.3 million rows are 5,000 hours


def make_corpus(folder: Path, rows: int) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import soundfile

    random = np.random.default_rng(0)
    letters = np.array(list("אבגדהוזחטיכלמנסעפצקרשת"))
    vocabulary = np.array(["".join(random.choice(letters, random.integers(2, 7))) for _ in range(50_000)])
    for i in range(50):
        soundfile.write(folder / f"{i}.wav", random.normal(0, 0.1, int(SECONDS_A_ROW * 16_000)), 16_000)
    for i in range(math.ceil(rows / 50)):  # every row has a path of its own, or it would be a duplicate
        (folder / f"links-{i % 100}").mkdir(exist_ok=True)
        (folder / f"links-{i % 100}" / str(i)).symlink_to(folder)
    schema = pa.schema(
        {
            "audio": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            "transcript": pa.string(),
            "metadata": pa.struct({"entry_id": pa.string(), "quality_score": pa.float64()}),
        }
    )
    with pq.ParquetWriter(folder / "train-00000.parquet", schema) as writer:
        for begin in range(0, rows, 50_000):
            count = min(50_000, rows - begin)
            numbers = range(begin, begin + count)
            words = random.choice(vocabulary, (count, 14))
            columns = {
                "audio": [
                    {"bytes": None, "path": f"{folder}/links-{i // 50 % 100}/{i // 50}/{i % 50}.wav"} for i in numbers
                ],
                "transcript": [" ".join(line) for line in words],
                "metadata": [{"entry_id": f"r{i // 40}", "quality_score": 0.9} for i in numbers],
            }
            writer.write_table(pa.table(columns, schema=schema))


def write_prepared(folder: str) -> None:
    """What `--prepare` leaves, for every piece; its fingerprints are not read at a start and stay empty."""
    import pyarrow as pa

    from hebrew_asr.data import prepare, selection

    config = settings(folder)
    train, heldout = selection.split(config, seed=42)
    place = selection.prepared_folder(config.train_sources[0], config)
    names = selection.piece_names(train).to_pylist()
    for part, begin in enumerate(range(0, len(names), prepare.PART), start=1):
        mine = names[begin : begin + prepare.PART]
        columns = [mine, train.seconds[begin : begin + len(mine)], [""] * len(mine), [b""] * len(mine)]
        file = place / selection.HEARD.replace("*", f"{part:06}")
        prepare.write_part(pa.table(columns, schema=selection.PREPARED), file)
        compared = place / f"leaks-{selection.evaluation_key(heldout)}" / file.name
        prepare.write_part(selection.LEAKED.empty_table(), compared)


def settings(folder: str) -> "TrainingConfig":
    from hebrew_asr.data.sources import Source
    from train_hebrew_asr_enhanced import TrainingConfig

    source = Source(f"{folder}/train-00000.parquet")
    return TrainingConfig(train_sources=[source], preprocessing_num_workers=os.cpu_count())


def watch_memory(own: list[float]) -> None:
    """Appends the memory that is this process's own, in GB, ten times a second.

    Pages of the mapped index are not: they are the system's cache, which all processes of a machine share.
    """
    while True:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        own.append(int(status["RssAnon"].split()[0]) / 1e6)
        time.sleep(0.1)


def start(folder: str) -> dict[str, float]:
    """From the settings to the first collated batch, in this process."""
    own: list[float] = []
    threading.Thread(target=watch_memory, args=(own,), daemon=True).start()
    began = time.perf_counter()
    import transformers

    from hebrew_asr.data.mixture import Mixture
    from hebrew_asr.data.selection import load_train_and_eval
    from hebrew_asr.data.utterances import SpeechDataset
    from hebrew_asr.training.batches import GlobalBatchSampler, UtteranceTokens, collate_step
    from train_hebrew_asr_enhanced import DataCollatorSpeechSeq2SeqWithPadding

    imported = time.perf_counter()
    config = settings(folder)
    train, heldout = load_train_and_eval(config, config.seed)
    loaded = time.perf_counter()
    processor = transformers.AutoProcessor.from_pretrained(ROOT / "demo" / "base")
    dataset = SpeechDataset(train, processor, config, training=True)
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    tokens = UtteranceTokens(train, collator, config)
    mixture = Mixture(train, config.train_sources, config.seed)
    sampler = GlobalBatchSampler(mixture, tokens, config, rank=0, processes=8)
    share = dataset.__getitems__(next(iter(sampler)))
    collate_step(collator, True, share)
    ended = time.perf_counter()
    return {
        "import_seconds": imported - began,
        "corpus_seconds": loaded - imported,
        "first_batch_seconds": ended - loaded,
        "total_seconds": ended - began,
        "own_peak_gb": max(own),
        "with_mapped_files_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "utterances": len(train),
        "heldout": len(heldout),
        "hours": train.hours,
        "first_batch_utterances": sum(map(len, share)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=2_300_000)
    parser.add_argument("--folder", help="where the corpus is made, and found again; default: a temporary folder")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    parser.add_argument("--write_prepared", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write_prepared:
        write_prepared(arguments.write_prepared)
        return
    if arguments.start:
        print(json.dumps(start(arguments.start)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "train-00000.parquet").exists():
            make_corpus(folder, arguments.rows)
        os.environ["HF_HOME"] = str(folder / "hf")
        results = {}
        for name in ("index", "start", "prepared", "prepared, start", "prepared, again"):
            command = [sys.executable, __file__, "--write_prepared" if name == "prepared" else "--start", str(folder)]
            if name == "prepared":
                subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
                continue
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in results[name].items()), flush=True)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
