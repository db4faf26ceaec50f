"""Measures recipes against the amount of data: what to train, how fast, and with what replayed beside it.

    uv run --group demo --with peft python benchmarks/recipes.py                             everything: many hours
    uv run --group demo python benchmarks/recipes.py --recipes all@0.5 all all@2 --rows 2309 --seeds 1 --on dev
    uv run python benchmarks/recipes.py --recipes b_then_a all --rows 175 2309 --seeds 3
    uv run python benchmarks/recipes.py --list                                                 what there is
    uv run python benchmarks/recipes.py --real --processes 8 --device H100 --hours_of_audio 200 --price 2.5
                                                               the queue of runs for the 1.7B, with GPU hours and price

A run is one recipe (RECIPES) with so many utterances of the demo corpus and one seed, which draws the utterances, their
order and all masks: recipes differ in nothing else. What is measured is the last checkpoint, on the demo's four sets,
by which nothing is chosen. Runs are in --work, a folder each, and are not run again; they are forked from one process
that has imported everything, --at_once at a time with one thread each. Epochs follow from the size (EPOCHS), so that
fewer utterances are heard more often. Seconds are those of the CPU, of training alone. Intervals are over seeds and
utterances, as in effects.py.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pyarrow.parquet
import torch

import evaluate_hebrew_asr as evaluation
import train_hebrew_asr_enhanced as training
import train_round2_gradual as round2
from benchmarks.effects import lean, measured, work_off, write_last
from benchmarks.effects_report import change
from benchmarks.recipes_data import dev_sets, larger_corpus
from benchmarks.recipes_lora import adapters
from benchmarks.recipes_real import lines_of_real
from hebrew_asr.data.sources import Source
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation import results as results_module
from hebrew_asr.evaluation.measuring import clusters, counted
from hebrew_asr.evaluation.settings import DEMO_SETS, Decoding, EvaluationConfig
from hebrew_asr.files import digest
from hebrew_asr.model.roofline import DEVICES
from hebrew_asr.model.stages import Stage
from hebrew_asr.processes import launch
from hebrew_asr.training.plan import ASSUMED_HOURS
from hebrew_asr.training.strategies import STRATEGIES, everything, with_replay
from train_hebrew_asr_enhanced import TrainingConfig

EPOCHS = {175: 20, 700: 10, 2309: 5, 10_000: 2}  # by utterances
SPEECH = ("heldout", "heldout-noisy", "english")


@dataclass(frozen=True)
class Recipe:
    """What trains, with the demo's rates, for 5 epochs of 2,309 utterances; of fewer utterances as many times more."""

    stages: tuple[tuple[float, dict[str, float], int | None], ...]
    """Share of the epochs that a stage ends with, its rates, and how many top layers of both towers; None: all."""
    replay: dict[str, float] = field(default_factory=dict)
    """Shares of an epoch: english, nonspeech."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of TrainingConfig."""
    epochs: float = 1.0
    """Times those of EPOCHS."""
    lora_rank: int | None = None
    """Adapters of this rank train, in all linear layers of both towers and of the projector, and are merged."""

    def faster(self, factor: float) -> "Recipe":
        """With all rates times `factor`."""
        rates = [{component: factor * rate for component, rate in rates.items()} for _, rates, _ in self.stages]
        stages = zip(self.stages, rates, strict=True)
        return dataclasses.replace(self, stages=tuple((share, faster, top) for (share, _, top), faster in stages))


def of_strategy(name: str) -> Recipe:
    """A recipe that the launcher knows, as the demo has it."""
    config, strategy = round2.demo(name), STRATEGIES[name]
    last = config.stages[-1].last_epoch
    stages = tuple((stage.last_epoch / last, stage.learning_rates, stage.llm_top_layers) for stage in config.stages)
    replay = {"english": strategy.replay_english, "nonspeech": strategy.replay_nonspeech}
    own = ["num_time_masks", "use_waveform_augmentation", "waveform_augmentation"]
    own += ["optimizer"] if strategy.optimizer != "adamw" else []
    return Recipe(stages, replay, {setting: getattr(config, setting) for setting in own}, last / EPOCHS[2309])


ADAPTED = {component: rate for component, rate in everything(2e-3).items() if component != "lm_head"}
B, A = (rates for _, rates, _ in of_strategy("b_then_a").stages)
RECIPES = {
    **{name: of_strategy(name) for name in STRATEGIES},
    "b_then_a_2": Recipe(((0.4, B, 2), (1.0, A, 2))),
    "projector_then_all": Recipe(((0.2, {"projector": 4e-3}, 1), (1.0, everything(1e-3), None))),
    "all_no_masks": Recipe(((1.0, everything(1e-3), None),), settings={"use_specaugment": False}),  # as ms-swift has it
    "all_decay": Recipe(((1.0, everything(1e-3), None),), settings={"layerwise_lr_decay_rate": 0.7}),
    "muon": Recipe(((1.0, everything(3e-3), None),), settings={"optimizer": "muon"}),
    "lora_8": Recipe(((1.0, ADAPTED, None),), lora_rank=8),
    "lora_32": Recipe(((1.0, ADAPTED, None),), lora_rank=32),
}
RECIPES["all_with_replay_top"] = dataclasses.replace(
    RECIPES["all_with_replay"],
    stages=tuple((share, rates, 2) for share, rates, _ in RECIPES["all_with_replay"].stages),
)
REPLAYS = ((0, 2), (5, 2), (10, 2), (20, 2), (10, 1), (10, 3), (10, 10))  # percent of English, and without speech
RECIPES |= {
    f"all_{english}_{nonspeech}": dataclasses.replace(
        RECIPES["all"], replay={"english": english / 100, "nonspeech": nonspeech / 100}
    )
    for english, nonspeech in REPLAYS
}


def recipe_of(name: str) -> Recipe:
    """A recipe by its name; `NAME@2`: with twice the rates; `NAME:3`, `NAME@2:3`: for 3 epochs of 2,309 utterances."""
    name, _, epochs = name.partition(":")
    known, _, factor = name.partition("@")
    recipe = RECIPES[known].faster(float(factor)) if factor else RECIPES[known]
    return dataclasses.replace(recipe, epochs=int(epochs) / EPOCHS[2309]) if epochs else recipe


def known_recipe(name: str) -> str:
    try:
        recipe_of(name)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(RECIPES)}") from None
    return name


@dataclass(frozen=True)
class Run:
    name: str
    rows: int
    seed: int

    def folder(self, work: Path) -> Path:
        """Named after the recipe's settings too, so that a changed recipe is run anew."""
        recipe = digest(repr(recipe_of(self.name)).encode())[:8]
        return work / f"{self.name}-{recipe}" / f"{self.rows}-{self.seed}"

    def __str__(self) -> str:
        return f"{self.name}, {self.rows} utterances, seed {self.seed}"


def sources(work: Path, run: Run) -> list[Source]:
    """The utterances that the seed draws, and what the recipe replays beside them."""
    folder = work / "data" / f"{run.rows}-{run.seed}"
    if not folder.exists():
        corpus = larger_corpus(work / "data", run.rows)
        drawn = np.random.default_rng([run.seed, len(corpus)]).permutation(len(corpus))[: run.rows]
        folder.mkdir(parents=True)
        pyarrow.parquet.write_table(corpus.take(np.sort(drawn)), folder / "train.parquet")
    shares = {f"replay_{name}": share for name, share in recipe_of(run.name).replay.items()}
    return with_replay([Source(str(folder))], dataclasses.replace(round2.DEMO_OPTIONS, **shares))


def settings(work: Path, run: Run) -> TrainingConfig:
    recipe, config = recipe_of(run.name), round2.demo()
    epochs = round(EPOCHS[run.rows] * recipe.epochs)
    config.train_sources = sources(work, run)
    config.num_epochs, config.seed = epochs, run.seed
    config.stages = [
        Stage(str(number), round(share * epochs), dict(rates), layers, layers)
        for number, (share, rates, layers) in enumerate(recipe.stages)
    ]
    config.output_dir, config.tracker, config.final_dtype = str(run.folder(work) / "run"), "none", "float32"
    config.eval_steps = config.save_steps = 1_000_000  # before the first step and at the end of each stage, no others
    for name, value in recipe.settings.items():
        setattr(config, name, value)
    return config


@dataclass(frozen=True)
class Measured:
    """What is measured of a run, and how."""

    on: str = "test"
    """The demo's test sets, or `dev`: sets that are made to choose by."""
    beams: int = 1

    def folder(self, run: Path) -> Path:
        return run / "-".join(["evaluation", *([] if self.on == "test" else [self.on]), str(self.beams)])

    def is_done(self, run: Path) -> bool:
        """Where nothing could be measured there are files all the same; table.md comes after what is read here."""
        folder = self.folder(run)
        if not (folder / "table.md").exists():
            return False
        return all(one["reason"] is None for one in json.loads((folder / "results.json").read_text())["results"])


TEST = Measured()


def train_and_measure(
    folder: Path, config: TrainingConfig, how: Measured = TEST, data: Path | None = None, lora_rank: int | None = None
) -> None:
    """Does what is not done yet, in this process; `data` has the sets to choose by."""
    if not (folder / "seconds.json").exists() or not (folder / "last").exists():
        for old in (folder / "run", *folder.glob("evaluation*")):  # half a run has half a time
            shutil.rmtree(old, ignore_errors=True)
        adapted = adapters(lora_rank, folder / "last") if lora_rank else contextlib.nullcontext()
        with adapted, lean(), measured() as spent:
            training.main(config)
        if not lora_rank:
            write_last(folder, 1)
        (folder / "seconds.json").write_text(json.dumps(dataclasses.asdict(spent)))
        for name in ("run/checkpoints", "run/final_model"):
            shutil.rmtree(folder / name, ignore_errors=True)
    sets = DEMO_SETS if data is None or how.on == "test" else dev_sets(data)
    measuring = EvaluationConfig([str(folder / "last")], sets, Decoding(num_beams=how.beams), quoted=[])
    measuring.output_dir, measuring.num_workers = str(how.folder(folder)), 0
    with lean():
        evaluation.main(measuring)
    shutil.rmtree(how.folder(folder) / "transcripts", ignore_errors=True)


def work_on(work: Path, run: Run, how: Measured) -> None:
    recipe = recipe_of(run.name)
    train_and_measure(run.folder(work), settings(work, run), how, work / "data", recipe.lora_rank)


def read(work: Path, run: Run, how: Measured) -> dict[str, Any]:
    return dataclasses.asdict(run) | found_in(run.folder(work), how)


def found_in(folder: Path, how: Measured = TEST) -> dict[str, Any]:
    """A run's errors of every utterance, the share of non-speech answered with no text, steps and seconds."""
    records = pyarrow.parquet.read_table(how.folder(folder) / "utterances.parquet").to_pylist()
    sets = {}
    for name in SPEECH:
        mine = [record for record in records if record["set"] == name and record["words"]]
        errors, words = counted(mine)
        sets[name] = {"errors": errors, "words": words, "recordings": clusters(mine)}
    silent = [not record["hypothesis"].strip() for record in records if record["set"] == "non-speech"]
    logged = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "steps": max(row["step"] for row in logged),
        "seconds": json.loads((folder / "seconds.json").read_text())["cpu"],
        "empty": 100 * float(np.mean(silent)),
        "sets": sets,
    }


def wer(one: dict[str, Any]) -> float:
    return 100 * sum(one["errors"]) / sum(one["words"])


def said(run: dict[str, Any]) -> str:
    rates = ", ".join(f"{name} {wer(one):.2f}" for name, one in run["sets"].items())
    return f"WER {rates}, empty {run['empty']:.0f} %"


def table_of(runs: list[dict[str, Any]], against: str) -> list[dict[str, Any]]:
    """A row for each recipe and size: means over the seeds, and the change of the WER against a recipe."""
    table = []
    for name, rows in dict.fromkeys((run["name"], run["rows"]) for run in runs):
        mine = [run for run in runs if (run["name"], run["rows"]) == (name, rows)]
        row = {"recipe": name, "utterances": rows, "seeds": [run["seed"] for run in mine], "steps": mine[0]["steps"]}
        row |= {key: float(np.mean([run[key] for run in mine])) for key in ("seconds", "empty")}
        row["wer"] = {one: float(np.mean([wer(run["sets"][one]) for run in mine])) for one in SPEECH}
        row["wers"] = {one: [wer(run["sets"][one]) for run in mine] for one in SPEECH}
        others = [run for run in runs if (run["name"], run["rows"]) == (against, rows) and run["seed"] in row["seeds"]]
        row["change"] = {}
        if name != against and len(others) == len(mine) >= 2:
            for one in SPEECH:
                errors, theirs = (np.array([run["sets"][one]["errors"] for run in part]) for part in (mine, others))
                row["change"][one] = vars(change(errors, theirs, mine[0]["sets"][one]["recordings"]))
        table.append(row)
    return table


def lines_of(table: list[dict[str, Any]], against: str) -> list[str]:
    """The table in Markdown."""
    head = ["utterances", "recipe", "seeds", "steps", "training, CPU s", "clean", f"against {against}, %", "noisy"]
    head += [f"against {against}, %", "English", "silence answered with no text, %"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in sorted(table, key=lambda row: row["utterances"]):
        cells = [row["utterances"], row["recipe"], len(row["seeds"]), row["steps"], f"{row['seconds']:.0f}"]
        for name in SPEECH:
            cells.append(f"{row['wer'][name]:.2f}")
            if name != "english":
                found = row["change"].get(name)
                cells.append(f"{found['value']:+.0f} ({found['low']:+.0f} to {found['high']:+.0f})" if found else "")
        cells.append(f"{row['empty']:.0f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def draw(table: list[dict[str, Any]], file: Path) -> None:
    """WER over the number of utterances, a line for each recipe with its seeds as points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), SPEECH[:2], strict=True):
        for number, recipe in enumerate(dict.fromkeys(row["recipe"] for row in table)):
            mine = sorted((row for row in table if row["recipe"] == recipe), key=lambda row: row["utterances"])
            sizes, wers = [row["utterances"] for row in mine], [row["wer"][name] for row in mine]
            axes.plot(sizes, wers, color=f"C{number}", marker="osD^v<>P"[number % 8], label=recipe)
            for row in mine:
                axes.plot(
                    [row["utterances"]] * len(row["seeds"]), row["wers"][name], ".", color=f"C{number}", alpha=0.5
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(list(EPOCHS), [str(size) for size in EPOCHS])
        axes.minorticks_off()
        low, high = axes.get_ylim()
        ticks = [tick for tick in (2, 3, 5, 7, 10, 15, 20, 30, 40, 60) if low <= tick <= high]
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("training utterances")
        axes.set_ylabel(f"WER on {name}, %")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    figure.savefig(file, dpi=110)


def command(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("recipes.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    about = "%(metavar)s, NAME@2 for twice its rates, NAME:3 for 3 epochs (of 2,309 utterances)"
    parser.add_argument("--recipes", nargs="+", type=known_recipe, default=list(RECIPES), metavar="NAME", help=about)
    parser.add_argument("--rows", nargs="+", type=int, choices=list(EPOCHS), default=list(EPOCHS))
    parser.add_argument("--seeds", type=int, default=3, help="so many, from --first_seed on")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--against", type=known_recipe, default="b_then_a", metavar="NAME")
    parser.add_argument(
        "--on", choices=("test", "dev"), default="test", help="dev: the sets that are made to choose by"
    )
    parser.add_argument("--num_beams", type=int, default=1, help="of the measuring; what is trained is kept")
    parser.add_argument("--work", type=Path, default=Path("runs/recipes"), help="what is done, a folder for each run")
    parser.add_argument("--at_once", type=int, default=len(os.sched_getaffinity(0)), help="runs at once")
    parser.add_argument("--json", type=Path, help="everything measured, each utterance's errors included")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--list", action="store_true", help="print the recipes and end")
    parser.add_argument("--done", action="store_true", help="run nothing: report what is done")
    real = parser.add_argument_group("the 1.7B: prints the queue of its runs, and runs nothing")
    real.add_argument("--real", action="store_true")
    real.add_argument("--processes", type=int, default=8, help="GPUs of a run")
    real.add_argument("--device", choices=list(DEVICES), default="A100-80GB")
    real.add_argument("--hours_of_audio", type=float, default=ASSUMED_HOURS, help="of an epoch")
    real.add_argument("--price", type=float, default=2.0, help="of a GPU hour")
    real.add_argument("--words", type=int, default=20_000, help="of the evaluation sets")
    real.add_argument("--wer", type=float, default=10.0, help="percent that is expected on them")
    given = parser.parse_args(arguments)
    if given.real:
        what = (given.processes, given.device, given.hours_of_audio, given.price, given.words, given.wer)
        print(*lines_of_real(*what), sep="\n")
        return
    if given.list:
        for name in given.recipes:
            print(name, recipe_of(name))
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no run stays behind
    work = given.work.resolve()
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    runs = [Run(name, rows, seed) for seed in seeds for rows in given.rows for name in given.recipes]
    how = Measured(given.on, given.num_beams)
    is_done = {run: how.is_done(run.folder(work)) for run in runs}
    left = [run for run in runs if not is_done[run]]
    if given.done:
        runs = [run for run in runs if is_done[run]]
    else:
        for run in left:
            run.folder(work).mkdir(parents=True, exist_ok=True)
            sources(work, run)
        if how.on == "dev":
            dev_sets(work / "data")
        jobs = [(str(run), functools.partial(work_on, work, run, how), run.folder(work) / "log.txt") for run in left]
        if failed := work_off(jobs, given.at_once, lambda number: said(read(work, left[number], how))):
            raise InputError(f"{len(failed)} runs failed: {'; '.join(failed)}. The same command tries them again")
    results = [read(work, run, how) for run in runs]
    table = table_of(results, given.against)
    print(*lines_of(table, given.against), sep="\n")
    if given.json:
        about = {"command": shlex.join(arguments), "created": time.strftime("%Y-%m-%d")}
        about |= {"versions": results_module.versions(), "table": table, "runs": results}
        given.json.write_text(json.dumps(about, ensure_ascii=False) + "\n")
    if given.plot:
        draw(table, given.plot)


if __name__ == "__main__":
    launch(command)
