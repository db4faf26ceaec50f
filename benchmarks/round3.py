"""Round 3 against further cross-entropy, on the demo world: what each makes of a Round 2 checkpoint.

    uv run --group demo python benchmarks/round3.py --json round3.json --seeds 3
    uv run --group demo python benchmarks/round3.py --measure dev --seeds 1 --options '{"kl_weight": 0.1}'

Its world is the demo's, larger and louder, so that a model of this size neither learns it by heart nor hears it all:
10,000 new sentences in the corpus' voices to train the start on and 2,500 others to go on with, and more in the
held-out voices to measure, 3,000 to report and 600 to try settings on (`--measure dev`), clean and with noise of the
demo's kinds at -5 to 10 dB; three quarters of the training utterances have such noise too. Speaking them takes some 10
minutes on two cores.

Step 1 makes the start: Round 2's demo on that corpus for --start_epochs, meant to be so many that further cross-entropy
wins nothing (its own arms tell); another one by --start. Then every arm goes on from it, for each seed with the same
utterances and noise in the same order: cross-entropy at three rates, GSPO, GRPO, MWER. Cross-entropy takes the demo's
16 utterances a step, the others 64, and gets as many epochs as cost what those of the others cost. Compared are the
last weights of each run; the rate of cross-entropy is the best one on the set that is measured, which is in its favour.
Runs are forked from one process that has imported everything; what is done is in --work, by all that it depends on, and
is not done again.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pyarrow.parquet as pq
import torch

import train_round2_gradual
from hebrew_asr import files as files_module
from hebrew_asr.checkpoints import store
from hebrew_asr.data.audio import decode_audio
from hebrew_asr.data.rows import load_rows
from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.evaluation.settings import Decoding
from hebrew_asr.evaluation.transcription import load_speech_model
from hebrew_asr.model.stages import Stage
from hebrew_asr.processes import launch
from hebrew_asr.text.intervals import compare
from hebrew_asr.text.scoring import count_utterance, repeats
from scripts import train_round3_gspo
from train_hebrew_asr_enhanced import TrainingConfig, main

DEMO = Path(__file__).parent.parent / "demo"
SENTENCES = {"test": 3000, "dev": 600, "train": 10_000, "further": 2_500}
TRAINING = "train", "further"  # of the start, and of what goes on from it
PIECE = 250  # sentences that one process speaks at once
NOISES = 200  # recordings of 6 s
NOISE_DB = (-5.0, 10.0)  # signal over noise
NOISE_SHARE = 0.75  # of the training utterances
RATES = {"projector": 2e-4, "audio_top": 6e-5, "llm_top": 6e-5, "lm_head": 2e-4}  # ×1: a tenth of Round 2's demo
START_EPOCHS = 8
OBJECTIVES = ("gspo", "grpo", "mwer")


@dataclasses.dataclass(frozen=True)
class Arm:
    objective: str  # ce, gspo, grpo or mwer
    scale: float  # of RATES
    seed: int
    epochs: int = 1
    options: str = ""
    """JSON: fields of the config."""

    @property
    def kind(self) -> str:
        return f"{self.objective} ×{self.scale:g}, {self.epochs} epochs {self.options}".rstrip()


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all arms share."""

    work: Path
    start: Path
    utterances: int  # to go on with
    measure: str  # test or dev


def start_config(work: Path, epochs: int) -> TrainingConfig:
    config = on_the_corpus(train_round2_gradual.demo(), work / "sets" / "train", "train")
    config.stages[-1].last_epoch = config.num_epochs = epochs
    config.final_dtype = "float32"
    config.output_dir = str(work / "start")
    return config


def on_the_corpus(config: TrainingConfig, corpus: Path, split: str) -> TrainingConfig:
    """Most utterances with noise, none with SpecAugment: Round 3 has none, and that is not to be compared.

    Next to nothing is evaluated while training: what counts is measured on the last weights.
    """
    config.train_sources = [Source(str(corpus), split=split)]
    config.use_specaugment, config.use_waveform_augmentation = False, True
    config.waveform_augmentation.noise_probability, config.waveform_augmentation.snr_db = NOISE_SHARE, NOISE_DB
    config.waveform_augmentation.noise_folder = str(corpus.parent / "noise")
    config.tracker = "none"
    config.eval_sources = [Source(str(DEMO / "heldout"), split="test[:8]")]
    config.num_logged_predictions, config.eval_steps, config.save_steps = 0, 10**6, 100
    return config


def arm_config(arm: Arm, setup: Setup) -> TrainingConfig:
    config = train_round2_gradual.demo() if arm.objective == "ce" else train_round3_gspo.demo()
    rates = {component: arm.scale * rate for component, rate in RATES.items()}
    config.stages = [Stage("further", arm.epochs, rates, 1, 1)]
    config.model_name_or_path, config.num_epochs, config.seed = str(setup.start), arm.epochs, arm.seed
    config = on_the_corpus(config, setup.work / "sets" / "further", f"train[:{setup.utterances}]")
    config.lr_scheduler_type, config.warmup_ratio = "linear", 0.05
    if arm.objective != "ce":
        config.objective, config.nonspeech_share, config.noisy_eval_sources = arm.objective, 0.0, []
    for name, value in json.loads(arm.options or "{}").items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    return config


# ------------------------------------------------------------------------------------------------------------ Test sets


def write_sets(folder: Path) -> None:
    """New sentences, as make_demo.py makes its own: no sentence is in two of its sets and these. Also noise to add."""
    sys.path.insert(0, str(DEMO))
    import make_demo
    import soundfile
    import speech

    def drawn(rng: random.Random, count: int, taken: set[str]) -> list[str]:
        found = speech.distinct(lambda: speech.hebrew_sentence(rng, (0, 1)), count, taken)
        taken.update(found)
        return found

    taken, again, rng = set(), random.Random(make_demo.SEED), random.Random(make_demo.SEED + 3)
    for count in (make_demo.HELDOUT_ROWS, make_demo.CORPUS_SENTENCES):  # the demo's own, by the draws that made them
        drawn(again, count, taken)
    assert {row["transcript"] for row in pq.read_table(DEMO / "heldout", columns=["transcript"]).to_pylist()} <= taken
    for name, count in SENTENCES.items():
        sentences = drawn(rng, count, taken)
        starts = range(0, count, PIECE)
        with concurrent.futures.ProcessPoolExecutor() as pool:
            pieces = list(pool.map(spoken, [name] * len(starts), starts, [sentences[i : i + PIECE] for i in starts]))
        for part in pieces[0]:
            rows, split = [row for piece in pieces for row in piece[part]], "train" if name in TRAINING else "test"
            speech.write_parquet(folder / part / f"{split}-00000-of-00001.parquet", rows)
    (folder / "noise").mkdir(exist_ok=True)
    for i in range(NOISES):
        kind, noise_rng = speech.NOISES[i % len(speech.NOISES)], np.random.default_rng([make_demo.SEED, i])
        wave = speech.noise(kind, 6 * speech.RATE, noise_rng)
        soundfile.write(folder / "noise" / f"{i:03d}.flac", 0.5 * wave / np.abs(wave).max(), speech.RATE)


@functools.cache
def the_speaker():
    """The library holds one synthesizer in a process."""
    import speech

    return speech.Espeak()


def spoken(name: str, first: int, sentences: list[str]) -> dict[str, list[dict]]:
    """Rows of some sentences: of the corpus in its voices, of the others in the held-out ones, clean and with noise."""
    import speech

    rng, espeak = random.Random(f"{name} {first}"), the_speaker()
    if name in TRAINING:
        rows = speech.corpus_rows(espeak, sentences, rng)
        for row in rows:
            row["metadata"]["entry_id"] = f"{name}-{first}-{row['metadata']['entry_id']}"
        return {name: rows}
    clips = speech.test_clips(espeak, sentences, [], 0, rng)["heldout"]
    noise_rng = np.random.default_rng(rng.randrange(2**32))
    waves = {name: [clip.wave for clip in clips]}
    waves[f"{name}_noisy"] = [speech.add_noise(clip.wave, *NOISE_DB, noise_rng) for clip in clips]
    return {
        part: [
            speech.row(wave, clip.text, part, f"{part}-{first + i:04d}")
            for i, (wave, clip) in enumerate(zip(mine, clips, strict=True))
        ]
        for part, mine in waves.items()
    }


# ---------------------------------------------------------------------------------------------------------------- Runs


def last_checkpoint(folder: Path) -> Path:
    return store.names(folder / "checkpoints")[0]


def transcribe(model: Path, folder: Path) -> list[dict]:
    """Word errors, words and loops of each utterance of a set."""
    rows = load_rows([Source(str(folder), split="test")], DataConfig(), for_training=False)
    speech = load_speech_model(str(model), Decoding(), torch.device("cpu"))
    found: dict[int, str] = {}
    for places in np.array_split(np.argsort(-rows.seconds, kind="stable"), max(1, len(rows) // 40)):
        waves = [decode_audio(rows[int(place)]["audio"]) for place in places]
        texts = speech.transcribe([speech.features(wave) for wave in waves], [rows.seconds[p] for p in places])
        found |= {int(place): text.text for place, text in zip(places, texts, strict=True)}
    measured = []
    for place, reference in enumerate(rows.column("reference")):
        counts = count_utterance(reference, found[place]).counts
        errors = counts.substitutions + counts.deletions + counts.insertions
        loop = repeats(found[place]) and not repeats(reference)
        measured.append({"errors": errors, "words": counts.words, "loop": loop})
    return measured


def measured(model: Path, setup: Setup) -> dict:
    sets, name = setup.work / "sets", setup.measure
    return {"clean": transcribe(model, sets / name), "noisy": transcribe(model, sets / f"{name}_noisy")}


def run_arm(arm: Arm, setup: Setup) -> None:
    config, folder, began = arm_config(arm, setup), folder_of(arm, setup), time.process_time()
    config.output_dir = str(folder)
    if not (folder / "cpu_seconds").exists():  # else it was measured on another set
        shutil.rmtree(folder, ignore_errors=True)  # half a run has half a time
        if arm.objective == "ce":
            main(config)
        else:
            train_round3_gspo.train_round3(config)
        files_module.put(folder / "cpu_seconds", str(time.process_time() - began))
    seconds = float((folder / "cpu_seconds").read_text())
    result = {"arm": dataclasses.asdict(arm), "cpu_seconds": seconds, **measured(last_checkpoint(folder), setup)}
    files_module.put(result_file(arm, setup), json.dumps(result))


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def digest_of_start(setup: Setup) -> str:
    return digest_of((setup.start / "model.safetensors").read_bytes())


def folder_of(arm: Arm, setup: Setup) -> Path:
    """Named by all that the arm's weights depend on, the weights it starts from included."""
    meaning = arm_config(arm, setup).identity() | {"model_name_or_path": digest_of_start(setup)}
    digest = digest_of(json.dumps(meaning, sort_keys=True, default=str).encode())
    return setup.work / f"{arm.objective}-x{arm.scale:g}-seed{arm.seed}-{digest}"


def result_file(arm: Arm, setup: Setup) -> Path:
    return folder_of(arm, setup) / f"{setup.measure}.json"


def forked(work: Path, name: str, task, *arguments) -> int:
    if pid := os.fork():
        return pid
    status = 1
    try:
        (work / f"{name}.log").parent.mkdir(parents=True, exist_ok=True)
        with open(work / f"{name}.log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            torch.set_num_threads(1)
            launch(lambda _: task(*arguments))
        status = 0
    finally:
        os._exit(status)


def run_all(arms: list[Arm], at_once: int, setup: Setup) -> None:
    work = setup.work
    waiting = [arm for arm in arms if not result_file(arm, setup).exists()]
    running: dict[int, Arm] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            arm = waiting.pop(0)
            running[forked(work, folder_of(arm, setup).name, run_arm, arm, setup)] = arm
        pid, status = os.wait()
        name = folder_of(running.pop(pid), setup).name
        print(f"{name}: {'done' if status == 0 else f'FAILED, see {work / name}.log'}", flush=True)


def make_start(work: Path, epochs: int, processes: int) -> Path:
    folder = work / "start"
    if not (folder / "final_model" / "README.md").exists():
        (file := work / "start.json").write_text(json.dumps(dataclasses.asdict(start_config(work, epochs))))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [train_round2_gradual.__file__, "--config", str(file)]
        with open(work / "start.log", "w") as log:
            if subprocess.run(command, stdout=log, stderr=log, check=False).returncode:
                raise SystemExit(f"the start could not be made, see {work / 'start.log'}")
    return folder / "final_model"


def measured_start(setup: Setup) -> dict:
    file = setup.work / f"start-{digest_of_start(setup)}-{setup.measure}.json"
    if not file.exists():
        files_module.put(file, json.dumps(measured(setup.start, setup)))
    return json.loads(file.read_text())


# --------------------------------------------------------------------------------------------------------------- Table


def pooled(results: list[dict], part: str, name: str) -> np.ndarray:
    """(utterances,) summed over the seeds."""
    return np.sum([[float(utterance[name]) for utterance in result[part]] for result in results], axis=0)


def wer(results: list[dict], part: str) -> float:
    return 100 * pooled(results, part, "errors").sum() / pooled(results, part, "words").sum()


def difference(first: list[dict], second: list[dict], part: str) -> dict[str, float]:
    """First minus second in points of WER, each utterance one unit over all seeds."""
    errors = [pooled(results, part, "errors") / len(results) for results in (first, second)]
    found = compare(*errors, pooled(first, part, "words") / len(first)).difference
    return dataclasses.asdict(found)


def table(start: dict, results: list[dict]) -> dict:
    kinds: dict[str, list[dict]] = {}
    for result in sorted(results, key=lambda result: sorted(result["arm"].items())):
        kinds.setdefault(Arm(**result["arm"]).kind, []).append(result)
    rows = {"start": {"wer": wer([start], "clean"), "wer_noisy": wer([start], "noisy")}}
    rows["start"]["loops"] = sum(utterance["loop"] for utterance in start["noisy"])
    ce = min((kind for kind in kinds if kind.startswith("ce")), key=lambda k: wer(kinds[k], "noisy"), default="")
    for kind, mine in kinds.items():
        rows[kind] = {
            "seeds": len(mine),
            "cpu_seconds": round(np.mean([result["cpu_seconds"] for result in mine])),
            "wer": wer(mine, "clean"),
            "wer_noisy": wer(mine, "noisy"),
            "wer_noisy_of_seeds": [round(wer([result], "noisy"), 2) for result in mine],
            "loops": pooled(mine, "noisy", "loop").sum() / len(mine),
            "noisy, less the start": difference(mine, [start], "noisy"),
            "clean, less the start": difference(mine, [start], "clean"),
        }
        if ce and kind != ce:
            rows[kind][f"noisy, less {ce}"] = difference(mine, kinds[ce], "noisy")
    return rows


def printed(rows: dict) -> str:
    lines = [
        "| arm | CPU-s | clean WER | noisy WER (seeds) | loops | noisy, less the start | noisy, less the best CE |"
    ]
    lines.append("|---|---|---|---|---|---|---|")

    def interval(values: dict | None) -> str:
        return f"{values['value']:+.2f} ({values['low']:+.2f} to {values['high']:+.2f})" if values else ""

    for name, row in rows.items():
        against = next((value for key, value in row.items() if key.startswith("noisy, less ce")), None)
        seeds = ", ".join(f"{value:.2f}" for value in row.get("wer_noisy_of_seeds", []))
        lines.append(
            f"| {name} | {row.get('cpu_seconds', '')} | {row['wer']:.2f} | {row['wer_noisy']:.2f}"
            f" {f'({seeds})' if seeds else ''} | {row['loops']:g} | {interval(row.get('noisy, less the start'))} |"
            f" {interval(against)} |"
        )
    return "\n".join(lines)


def benchmark(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--json", type=Path, default=Path("round3.json"))
    parser.add_argument("--work", type=Path, default=Path("runs/round3-benchmark"))
    parser.add_argument("--start", type=Path, help="a final_model of Round 2; without it one is trained")
    parser.add_argument("--start_epochs", type=int, default=START_EPOCHS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--utterances", type=int, default=2400, help="to go on with")
    parser.add_argument("--objectives", nargs="*", default=list(OBJECTIVES), choices=OBJECTIVES)
    parser.add_argument("--scales", nargs="*", type=float, default=[1.0], help="of the rates, for these objectives")
    parser.add_argument("--ce_scales", nargs="*", type=float, default=[1.0, 3.0, 10.0])
    parser.add_argument("--ce_epochs", type=int, default=4, help="of further cross-entropy, for one of the others")
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--options", default="", help="JSON: fields of GspoConfig, for these objectives")
    parser.add_argument("--epochs", type=int, default=1, help="of these objectives")
    parser.add_argument("--ce_options", default="", help="JSON: fields of TrainingConfig, for cross-entropy")
    parser.add_argument("--measure", choices=list(SENTENCES), default="test")
    given = parser.parse_args(argv)
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "sets").exists():
        write_sets(partial := work / "sets.partial")
        partial.rename(work / "sets")
    start = (given.start or make_start(work, given.start_epochs, given.parallel)).resolve()
    setup = Setup(work, start, given.utterances, given.measure)
    arms = [
        arm
        for seed in range(1, given.seeds + 1)
        for arm in (
            *(Arm(o, scale, seed, given.epochs, given.options) for o in given.objectives for scale in given.scales),
            *(Arm("ce", scale, seed, given.ce_epochs, given.ce_options) for scale in given.ce_scales),
        )
    ]
    started = measured_start(setup)
    run_all(arms, given.parallel, setup)
    files = [result_file(arm, setup) for arm in arms]
    results = [json.loads(file.read_text()) for file in files if file.exists()]
    rows = table(started, results)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
    given.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2))
    print(printed(rows))


if __name__ == "__main__":
    benchmark(sys.argv[1:])
