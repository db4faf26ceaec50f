"""Turns the parts of the Round 2 recipe off, and on alone, and measures what each is worth.

    uv run python benchmarks/effects.py --json effects.json            the whole table, on the small world in demo/
    uv run python benchmarks/effects.py --quick                        two variants, two seeds
    uv run python benchmarks/effects.py --variants no-specaugment linear --seeds 5 --first_seed 100
    uv run --group search python benchmarks/effects.py --search        rates, switch epoch and masks; how sure that is
    uv run python benchmarks/effects.py --real --processes 8 --sets eval-d1 whatsapp             the 1.7B, on GPUs

A variant is the recipe with some settings changed (VARIANTS). All variants run with the same seeds; a seed draws the
training utterances, their order and every mask, so that variants differ in nothing else. What is measured is the last
checkpoint of each run, not its best, on test sets that nothing is chosen by: other sentences (`dev`) give the curves
over the steps. Runs are in --work, a folder each, and are not run again; they are forked from one process that has
imported everything, --at_once at a time with one thread each. An option that --help does not list is a setting of
TrainingConfig and changes the recipe of all variants (`--weight_decay 0.1`). --print_commands prints the two commands
of each run, to run them elsewhere; the same command without it then finds them done.

The small world. ROWS utterances of the demo corpus, the demo's Round 2 (rates 20 times as high, one layer of each part)
with EPOCHS epochs for each of its own, and the demo's 16 utterances a step where the recipe has 64, hence 64 and 4 for
256 and 16: with 64 a run would have so few steps that only their number was measured. How difficult it is was set by
the recipe alone, before any other variant had run, so that a run takes at most 90 s on one core, the WER on clean
speech lies between 15 and 40 % (it can change either way), and the loss on the training utterances at the end, masks
and all, is at most two thirds of that on other voices (there is over-fitting, which something could help against).
Tried, with two seeds: 350 utterances for 10 epochs (26.4 % clean, loss 0.17 against 0.19: too little over-fitting), and
175 for 20, which is what it is now (33.8 % clean, 49.0 % noisy, loss 0.09 against 0.27; 82 s of CPU on a busy machine).
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import transformers
from safetensors.torch import save_file

import evaluate_hebrew_asr as evaluation
import train_hebrew_asr_enhanced as training
import train_round2_gradual as round2
from benchmarks import effects_report as report
from hebrew_asr import command_line
from hebrew_asr import processes as processes_module
from hebrew_asr.checkpoints import averages, store
from hebrew_asr.data import utterances as utterances_module
from hebrew_asr.data.sources import Source
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation import measuring as measuring_module
from hebrew_asr.evaluation import results as results_module
from hebrew_asr.evaluation.settings import LEADERBOARD, EvaluationConfig, EvaluationSet, read_set
from hebrew_asr.model.loss import IGNORED_LABEL
from hebrew_asr.model.packing import places_of
from hebrew_asr.model.stages import COMPONENTS, Stage
from hebrew_asr.training.run_log import curve
from train_hebrew_asr_enhanced import TrainingConfig

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo"
ROWS = 175  # training utterances that a seed draws
DEV = 30  # sentences of the held-out ones, clean and noisy, that give the curves; all others are the test
EPOCHS = 4  # for each of the recipe's
EVALUATIONS = 4  # of a run, on dev
CURVES = ("train/loss", "eval/loss", "eval/wer")


# ------------------------------------------------------------------------------------------------------------ Variants

Stages = list[Stage]
Layers = tuple[int, int]  # of the encoder and of the language model


def one_rate(stages: Stages, layers: Layers) -> Stages:
    """Each stage's components all train at the geometric mean of the stage's rates."""
    mean = [math.exp(np.mean(np.log(list(stage.learning_rates.values())))) for stage in stages]
    return [
        dataclasses.replace(stage, learning_rates=dict.fromkeys(stage.learning_rates, rate))
        for stage, rate in zip(stages, mean, strict=True)
    ]


def nothing_frozen(stages: Stages, layers: Layers) -> Stages:
    """All components and all layers in every stage; what a stage did not train has the rate of the first that does."""
    first = {name: s.learning_rates[name] for s in reversed(stages) for name in s.learning_rates}
    return [Stage(s.name, s.last_epoch, first | s.learning_rates, *layers) for s in stages]


def only_first(stages: Stages, layers: Layers) -> Stages:
    return [dataclasses.replace(stages[0], last_epoch=stages[-1].last_epoch)]


def only_last(stages: Stages, layers: Layers) -> Stages:
    return stages[-1:]


@dataclass(frozen=True)
class Variant:
    """The recipe, or what it is compared with, but for what is named here."""

    name: str
    title: str
    part: str = ""
    """What is taken away from what it is compared with, or added to it."""
    adds: bool = False
    against: str | None = "recipe"
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of TrainingConfig."""
    stages: tuple[Callable[[Stages, Layers], Stages], ...] = ()
    """Edits of the list of stages, one after the other."""
    batch: float = 1.0
    """Times the recipe's effective batch."""
    rates: float = 1.0
    """Times the recipe's rates."""
    epochs: float = 1.0
    """Times the recipe's epochs, the stages' too."""
    patch: str | None = None
    """A function of this file that changes the training system where no setting does."""
    average: int = 1
    """So many of the last checkpoints, averaged, are what is measured."""
    spec: tuple[float, float] | None = None
    """Percent by which the spec expects the part that is switched here to lower the WER."""

    @property
    def expected(self) -> tuple[float, float] | None:
        """Change of the WER in percent that follows from the spec: where a part is taken away, errors are added."""
        if self.spec is None:
            return None
        low, high = self.spec
        if self.adds:
            return -high, -low
        return 100 * low / (100 - low), 100 * high / (100 - high)


SPECAUGMENT, COSINE, RATES, BATCH, TOTAL = (5, 10), (2, 5), (3, 7), (5, 10), (15, 30)  # percent, the spec's table
UNMASKED, CONSTANT = {"use_specaugment": False}, {"lr_scheduler_type": "constant_with_warmup"}
PLAIN = UNMASKED | CONSTANT
WAVEFORM = {"use_waveform_augmentation": True}
AT_ONCE = (only_last, one_rate)  # no stages, no rates of their own


def alone(
    name: str,
    title: str,
    part: str,
    settings: dict[str, Any] | None = None,
    stages: tuple = AT_ONCE,
    batch: float = 4,
    spec: tuple[float, float] | None = None,
) -> Variant:
    """One part, beside none of them."""
    return Variant(name, title, part, True, "plain", PLAIN | (settings or {}), stages, batch, spec=spec)


VARIANTS = [
    Variant("recipe", "Round 2's recipe", against=None),
    # A part taken away
    Variant("no-specaugment", "without SpecAugment", "SpecAugment", settings=UNMASKED, spec=SPECAUGMENT),
    Variant("linear", "linear schedule", "cosine for linear", settings={"lr_scheduler_type": "linear"}, spec=COSINE),
    Variant("constant", "constant after warmup", "cosine for constant", settings=CONSTANT, spec=COSINE),
    Variant("one-rate", "one rate for all components", "a rate for each component", stages=(one_rate,), spec=RATES),
    Variant("batch-256", "batch of 256, as many epochs", "64 for 256", batch=4, spec=BATCH),
    Variant("batch-256-rates", "batch of 256, rates × 2", "64 for 256 at twice the rates", batch=4, rates=2),
    Variant("batch-16", "batch of 16, as many epochs", "64 for 16, as many epochs", batch=0.25),
    Variant("batch-16-steps", "batch of 16, as many steps", "64 for 16, as many steps", batch=0.25, epochs=0.25),
    Variant("not-frozen", "no freezing: all layers from the start", "freezing", stages=(nothing_frozen,)),
    Variant("b-only", "Strategy B to the end", "A after B", stages=(only_first,)),
    Variant("a-only", "Strategy A from the start", "B before A", stages=(only_last,)),
    Variant("plain", "none of the parts", "all of it together", settings=PLAIN, stages=AT_ONCE, batch=4, spec=TOTAL),
    # Something added
    Variant("waveform", "waveform augmentation on", "waveform augmentation", adds=True, settings=WAVEFORM),
    Variant("average", "last 4 checkpoints averaged", "averaging", adds=True, average=4),
    Variant("bf16-weights", "bf16 weights, no fp32 masters", "bf16 weights", adds=True, patch="bf16_weights"),
    Variant("prompt-labels", "labels on the prompt too", "labels on the prompt", adds=True, patch="labels_on_prompt"),
    # Something added to one of these
    Variant("short", "batch of 64, as many steps", "64 for 256, as many steps", True, "batch-256", epochs=0.25),
    # A part alone
    alone("only-specaugment", "SpecAugment alone", "SpecAugment", {"use_specaugment": True}, spec=SPECAUGMENT),
    alone("only-cosine", "cosine alone", "cosine for constant", {"lr_scheduler_type": "cosine"}, spec=COSINE),
    alone("only-rates", "rates by component alone", "a rate for each component", stages=(only_last,), spec=RATES),
    alone("only-batch", "batch of 64 alone", "64 for 256, as many epochs", batch=1, spec=BATCH),
    alone("only-stages", "stages alone, one rate in each", "stages", stages=(one_rate,)),
]  # fmt: skip
BY_NAME = {variant.name: variant for variant in VARIANTS}
CANNOT_TELL = [
    "bf16-safe evaluation, upload and tracking: they make a run possible or visible and change no weight",
    "sizes: a model of 1.5 M parameters with a vocabulary of 168 and a corpus of under an hour; how an effect grows or"
    " shrinks with them is not in here, above all of what guards a large pre-trained model (low rates, frozen layers)",
    "speech: 4 test voices of one synthesizer, and five kinds of added noise; the interval is over sentences, and says"
    " nothing of other voices",
    "training length: a batch four times as large makes a quarter of the steps in the same epochs; the rows with as"
    " many steps then differ in epochs, and the curves over the steps are in the JSON file",
    "tuning: every variant has the recipe's other settings; one that loses may win with rates of its own",
    "bf16: weights and moments are rounded after each step, products are fp32; bf16 autocast takes a run 7 minutes",
]


# ------------------------------------------------------------------------------------ Where no setting reaches: patches


@contextlib.contextmanager
def bf16_weights() -> Iterator[None]:
    """After every step weights and Adam's moments are rounded to bf16: no fp32 masters, whatever multiplies them."""
    trainer = training.GradualUnfreezeTrainer
    create = trainer.create_optimizer

    def rounded(tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.data.copy_(tensor.data.bfloat16())

    def round_all(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rounded(p for group in optimizer.param_groups for p in group["params"])
        rounded(state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = create(self, model)
        if is_new:
            rounded(self.model.parameters())
            optimizer.register_step_post_hook(round_all)
        return optimizer

    with mock.patch.object(trainer, "create_optimizer", create_optimizer):
        yield


@contextlib.contextmanager
def labels_on_prompt() -> Iterator[None]:
    """Every token but the audio is learnt, the chat template's too, as `processor(…, output_labels=True)` has it."""
    collator = training.DataCollatorSpeechSeq2SeqWithPadding
    pack = collator.packed

    def packed(self, utterances: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = pack(self, utterances)
        if utterances:
            tokens = batch["input_ids"]
            has_label = (batch["position_ids"] > 0) & (tokens != self.audio_token_id)
            batch["labels"] = torch.where(has_label, tokens, IGNORED_LABEL)
            batch |= places_of(batch, self.audio_token_id)
        return batch

    with mock.patch.object(collator, "packed", packed):
        yield


PATCHES = {"bf16_weights": bf16_weights, "labels_on_prompt": labels_on_prompt, None: contextlib.nullcontext}


@dataclass
class Spent:
    """Seconds of training, evaluations left out."""

    wall: float = 0.0
    cpu: float = 0.0


@contextlib.contextmanager
def measured() -> Iterator[Spent]:
    """Counts the time of training without that of its evaluations."""
    spent = Spent()

    def counting(call: Callable, sign: int) -> Callable:
        def counted(*args, **kwargs):
            if "model" in kwargs:  # the final model's evaluation, after training
                return call(*args, **kwargs)
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                spent.wall += sign * (time.perf_counter() - wall)
                spent.cpu += sign * (time.process_time() - cpu)

        return counted

    trainer = training.GradualUnfreezeTrainer
    with (
        mock.patch.object(training, "train", counting(training.train, +1)),
        mock.patch.object(trainer, "evaluate", counting(trainer.evaluate, -1)),
    ):
        yield spent


@contextlib.contextmanager
def lean() -> Iterator[None]:
    """A run without what is not measured: no pages for its reader, no evaluation of the best checkpoint. Each clip is
    decoded once, not in every epoch, and so are its features taken where nothing is done to its waveform."""

    def nothing(*args: Any) -> None:
        pass

    decode, decoded = utterances_module.decode_audio, {}
    extract, features = utterances_module.log_mel, {}

    def decode_once(audio: dict[str, Any], start: float, end: float | None) -> np.ndarray:
        key = audio["bytes"], start, end
        if key not in decoded:
            decoded[key] = decode(audio, start, end)
            features[id(decoded[key])] = None
        return decoded[key]

    def extract_once(extractor: Any, waveform: np.ndarray) -> np.ndarray:
        if id(waveform) not in features:  # made from a decoded one
            return extract(extractor, waveform)
        if features[id(waveform)] is None:
            features[id(waveform)] = extract(extractor, waveform)
        return features[id(waveform)]

    with (
        mock.patch.object(training, "report_data", nothing),
        mock.patch.object(training, "evaluate_final", nothing),
        mock.patch.object(training, "describe_result", nothing),
        mock.patch.object(results_module, "write_page", nothing),
        mock.patch.object(utterances_module, "decode_audio", decode_once),
        mock.patch.object(utterances_module, "log_mel", extract_once),
    ):
        yield


# --------------------------------------------------------------------------------------------------------------- A run


@dataclass(frozen=True)
class Options:
    """What all runs share."""

    work: Path
    real: bool = False
    rows: int = ROWS
    test_sentences: int | None = None
    processes: int = 0
    """Of a run, under torchrun; 0: none of that, a run is a forked process."""
    changes: tuple[str, ...] = ()
    """`--field value` over the recipe."""
    sets: tuple[EvaluationSet, ...] = ()


@dataclass(frozen=True)
class Run:
    variant: Variant
    seed: int

    def folder(self, options: Options) -> Path:
        return options.work / self.variant.name / str(self.seed)

    def is_done(self, options: Options) -> bool:
        return (self.folder(options) / "evaluation" / "results.json").exists()


def write_data(options: Options, seeds: Sequence[int]) -> None:
    """The small world's data: what each seed draws from the corpus, and the held-out sentences in two."""

    def read(part: str) -> pyarrow.Table:
        (file,) = (DEMO / part).glob("*.parquet")
        return pyarrow.parquet.read_table(file)

    def write(table: pyarrow.Table, name: str, split: str) -> None:
        (folder := options.work / "data" / name).mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")

    corpus, clean, noisy = read("corpus"), read("heldout"), read("heldout_noisy")
    for seed in seeds:
        drawn = np.random.default_rng([seed, len(corpus)]).permutation(len(corpus))[: options.rows]
        write(corpus.take(np.sort(drawn)), f"train-{seed}", "train")
    write(pyarrow.concat_tables([clean.slice(0, DEV), noisy.slice(0, DEV)]), "dev", "test")
    write(clean.slice(DEV, options.test_sentences), "clean", "test")
    write(noisy.slice(DEV, options.test_sentences), "noisy", "test")


def test_sets(options: Options) -> list[EvaluationSet]:
    small = [EvaluationSet(n, Source(str(options.work / "data" / n), split="test")) for n in ("clean", "noisy")]
    return list(options.sets) or (list(LEADERBOARD) if options.real else small)


@functools.cache
def layers_of(model: str) -> Layers:
    config = transformers.AutoConfig.from_pretrained(model)
    return config.audio_config.num_hidden_layers, config.text_config.num_hidden_layers


def whole(variant: Variant, epochs: int) -> int:
    if (found := variant.epochs * epochs) % 1:
        raise InputError(f"{variant.name} would have {found} epochs of {epochs}: leave {variant.name} out")
    return int(found)


def settings(options: Options, run: Run) -> TrainingConfig:
    """The recipe with the command line's changes, and the variant's over them."""
    variant, config = run.variant, round2.round2() if options.real else round2.demo()
    if not options.real:
        data = options.work / "data"
        config.train_sources = [Source(str(data / f"train-{run.seed}"))]
        config.eval_sources = [Source(str(data / "dev"), split="test")]
        config.final_dtype = "float32"
        config.num_epochs *= EPOCHS
        for stage in config.stages:
            stage.last_epoch *= EPOCHS
    config = command_line.parse_config(list(options.changes), config)
    config.seed, config.output_dir = run.seed, str(run.folder(options) / "run")
    config.tracker, config.skip_hf_upload = "none", True
    config.target_effective_batch = round(config.target_effective_batch * variant.batch)
    for name, value in variant.settings.items():
        setattr(config, name, value)
    config.num_epochs = whole(variant, config.num_epochs)
    config.stages = [dataclasses.replace(s, last_epoch=whole(variant, s.last_epoch)) for s in config.stages]
    for edit in variant.stages:
        config.stages = edit(config.stages, layers_of(config.model_name_or_path))
    config.stages = [
        dataclasses.replace(s, learning_rates={name: variant.rates * r for name, r in s.learning_rates.items()})
        for s in config.stages
    ]
    if not options.real:
        steps = config.max_steps or config.num_epochs * math.ceil(options.rows / config.target_effective_batch)
        config.eval_steps, config.logging_steps = math.ceil(steps / EVALUATIONS), math.ceil(steps / 40)
        config.save_steps = steps if variant.average == 1 else math.ceil(steps / 20)
    config.save_total_limit = max(config.save_total_limit, variant.average)
    return config


def train(options: Options, run: Run) -> None:
    """Trains in this process, or these of torchrun; then `last` is what is to be measured."""
    folder, config = run.folder(options), settings(options, run)
    if not options.processes:
        shutil.rmtree(folder / "run", ignore_errors=True)  # half a run has half a time
    resumed = bool(store.names(folder / "run" / "checkpoints"))
    rank = int(os.environ.get("RANK", "0"))  # read before the process group is left
    with PATCHES[run.variant.patch](), contextlib.nullcontext() if options.processes else lean(), measured() as spent:
        training.main(config)
    if rank == 0:
        times = dict.fromkeys(("wall", "cpu")) if resumed else dataclasses.asdict(spent)
        (folder / "seconds.json").write_text(json.dumps(times))
        write_last(folder, run.variant.average)


def write_last(folder: Path, count: int) -> None:
    """The last checkpoint as it is, or with the mean of the weights of so many of the last ones."""
    newest = store.names(folder / "run" / "checkpoints")[:count]
    if len(newest) < count:
        raise InputError(f"{folder}: {len(newest)} checkpoints are there, {count} are to be averaged: lower save_steps")
    shutil.rmtree(folder / "last", ignore_errors=True)
    shutil.copytree(newest[0], folder / "last", ignore=shutil.ignore_patterns("optimizer.safetensors"))
    if count > 1:
        mean = dict(averages.mean_of([store.verify(one) for one in newest]))
        save_file(mean, folder / "last" / "model.safetensors", metadata={"format": "pt"})


def transcribe(options: Options, run: Run) -> None:
    folder = run.folder(options)
    config = EvaluationConfig(
        models=[str(folder / "last")],
        sets=test_sets(options),
        max_wer_rise=None,
        quoted=[],
        output_dir=str(folder / "evaluation"),
        num_workers=0,
    )
    with lean():
        evaluation.main(config)
    for name in ("last", "run/checkpoints", "run/final_model", "evaluation/transcripts"):
        shutil.rmtree(folder / name, ignore_errors=True)


def commands(options: Options, run: Run) -> list[list[str]]:
    """A run as two commands: train, and transcribe the test sets."""
    here = ["--here", "--work", str(options.work), "--variants", run.variant.name, "--seeds", "1"]
    here += ["--first_seed", str(run.seed), "--processes", str(options.processes), "--rows", str(options.rows)]
    here += ["--real"] * options.real
    folder = run.folder(options)
    sets = [
        json.dumps({"name": one.name, "language": one.language} | dataclasses.asdict(one.source))
        for one in test_sets(options)
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={max(1, options.processes)}"]
    measuring = ["--model", str(folder / "last"), "--output_dir", str(folder / "evaluation"), "--max_wer_rise", "none"]
    return [
        [*launcher, str(Path(__file__).resolve()), *here, *options.changes],
        [*launcher, str(ROOT / "evaluate_hebrew_asr.py"), *measuring, "--sets", *sets],
    ]


def read(options: Options, run: Run) -> dict[str, Any]:
    """What is kept of a run: errors of every utterance, curves, times, and the settings it had."""
    folder = run.folder(options)
    rows = pyarrow.parquet.read_table(folder / "evaluation" / "utterances.parquet").to_pylist()
    logged = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    sets = {}
    for name in dict.fromkeys(row["set"] for row in rows):
        mine = [row for row in rows if row["set"] == name and row["words"]]
        errors, words = measuring_module.counted(mine)
        sets[name] = {"errors": errors, "words": words, "recordings": measuring_module.clusters(mine)}
    return {
        "variant": run.variant.name,
        "seed": run.seed,
        "steps": max(row["step"] for row in logged),
        "seconds": json.loads((folder / "seconds.json").read_text()),
        "curves": {name: curve(logged, name) for name in CURVES},
        "sets": sets,
    }


def check_settings(options: Options, run: Run) -> None:
    """Raises InputError where a run's folder holds another run."""
    file = run.folder(options) / "settings.json"
    config = settings(options, run)
    sets = [one.name for one in test_sets(options)]
    wanted = {"settings": config.identity(), "patch": run.variant.patch, "average": run.variant.average, "sets": sets}
    wanted |= {"bf16": config.bf16, "rows": options.rows, "sentences": options.test_sentences}
    wanted = json.loads(json.dumps(wanted))
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(wanted, indent=1))
    elif json.loads(file.read_text()) != wanted:
        raise InputError(f"{file.parent} holds a run of other settings (settings.json): choose another --work")


# --------------------------------------------------------------------------------------------------------------- Queue


def in_child(body: Callable[[], None], log: Path) -> int:
    """Forks a process that runs `body` and writes its output to a file; returns its id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.setpgid(0, 0)  # with what it starts, so that both can be ended
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        descriptor = os.open(log, os.O_WRONLY | os.O_TRUNC | os.O_CREAT)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        sys.argv = ["effects"]
        body()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def work_off(jobs: list[tuple[str, Callable[[], None], Path]], at_once: int, done: Callable[[int], str]) -> list[str]:
    """Runs jobs (name, body, log) as processes, so many at once; says how far it is. Returns the names that failed.

    Args:
        done: what to say of the job of a number that has ended well.
    """
    running: dict[int, tuple[int, float]] = {}
    waiting, failed, took, count = list(range(len(jobs))), [], [], 0
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                number = waiting.pop(0)
                _, body, log = jobs[number]
                running[in_child(body, log)] = number, time.monotonic()
            pid, status, used = os.wait4(-1, 0)
            number, began = running.pop(pid)
            took.append(time.monotonic() - began)
            cpu = used.ru_utime + used.ru_stime
            count += 1
            name, _, log = jobs[number]
            result = f"FAILED, see {log}" if status else done(number)
            failed += [name] if status else []
            left = np.mean(took) * (len(waiting) + len(running) / 2) / at_once / 60
            print(
                f"[{count}/{len(jobs)}] {name}: {result}, {took[-1]:.0f} s ({cpu:.0f} of CPU) | {left:.0f} min left",
                flush=True,
            )
    finally:
        for pid in running:
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGTERM)  # torchrun passes it on
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return failed


def run_all(options: Options, runs: list[Run], at_once: int) -> None:
    """Runs what is not done yet; raises InputError when some failed."""
    for run in runs:
        check_settings(options, run)
    left = [run for run in runs if not run.is_done(options)]
    if done := len(runs) - len(left):
        print(f"{done} of {len(runs)} runs are done")

    def body(run: Run) -> None:
        if options.processes:
            for command in commands(options, run):
                subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        else:
            train(options, run)
            transcribe(options, run)

    def wers(number: int) -> str:
        sets = read(options, left[number])["sets"].items()
        return "WER " + ", ".join(f"{name} {100 * sum(s['errors']) / sum(s['words']):.1f} %" for name, s in sets)

    jobs = [
        (f"{run.variant.name}, seed {run.seed}", functools.partial(body, run), run.folder(options) / "log.txt")
        for run in left
    ]
    if failed := work_off(jobs, at_once, wers):
        raise InputError(f"{len(failed)} runs failed: {'; '.join(failed)}. The same command tries them again")


# -------------------------------------------------------------------------------------------------------------- Search

FACTORS = 0.25, 4.0  # of the recipe's rates
SEARCH_SEED = 1000  # of all trials: they differ in nothing else; what they find is confirmed with other seeds


def scaled(stages: Stages, layers: Layers, factors: dict[str, float], switch: int) -> Stages:
    """The stages with each component's rates times a factor, the first of them ending at another epoch."""
    ends = [switch, *(stage.last_epoch for stage in stages[1:])]
    return [
        dataclasses.replace(
            stage, last_epoch=end, learning_rates={n: factors[n] * rate for n, rate in stage.learning_rates.items()}
        )
        for stage, end in zip(stages, ends, strict=True)
    ]


def found_variant(parameters: dict[str, Any], name: str) -> Variant:
    """What a trial drew, as a variant of the recipe."""
    factors = {component: parameters[component] for component in COMPONENTS}
    masks = {name: value for name, value in parameters.items() if name not in (*COMPONENTS, "switch")}
    edit = functools.partial(scaled, factors=factors, switch=parameters["switch"])
    return Variant(name, "what the search found", "what the search found", adds=True, settings=masks, stages=(edit,))


def draw(trial: Any, recipe: TrainingConfig) -> dict[str, Any]:
    drawn = {name: trial.suggest_float(name, *FACTORS, log=True) for name in COMPONENTS}
    drawn["switch"] = trial.suggest_int("switch", 1, recipe.stages[1].last_epoch - 1)
    drawn["time_mask_param"] = trial.suggest_int("time_mask_param", 0, 2 * recipe.time_mask_param)
    drawn["freq_mask_param"] = trial.suggest_int("freq_mask_param", 0, 2 * recipe.freq_mask_param)
    drawn["num_time_masks"] = trial.suggest_int("num_time_masks", 0, 2 * recipe.num_time_masks)
    drawn["num_freq_masks"] = trial.suggest_int("num_freq_masks", 0, 2 * recipe.num_freq_masks)
    return drawn


def recipe_as_drawn(recipe: TrainingConfig) -> dict[str, Any]:
    same = {name: getattr(recipe, name) for name in ("time_mask_param", "freq_mask_param")}
    same |= {name: getattr(recipe, name) for name in ("num_time_masks", "num_freq_masks")}
    return dict.fromkeys(COMPONENTS, 1.0) | {"switch": recipe.stages[0].last_epoch} | same


@contextlib.contextmanager
def reporting(trial: Any) -> Iterator[list[float]]:
    """Tells the search the WER on dev at each quarter of a run, and ends runs that the search gives up.

    Where the stage switches there is an evaluation too: it comes at another step in each trial, and is not compared.
    """
    import optuna

    evaluate, wers = training.GradualUnfreezeTrainer.evaluate, []

    def reported(self, *args, **kwargs):
        metrics = evaluate(self, *args, **kwargs)
        step, steps = self.state.global_step, self.config.eval_steps
        if step and (step % steps == 0 or step == self.total_steps) and "model" not in kwargs:
            wers.append(metrics["eval/wer"])
            trial.report(wers[-1], math.ceil(step / steps))
            if step < self.total_steps and trial.should_prune():
                raise optuna.TrialPruned
        return metrics

    with mock.patch.object(training.GradualUnfreezeTrainer, "evaluate", reported):
        yield wers


def search(options: Options, trials: int, seeds: list[int], at_once: int) -> dict[str, Any]:
    """Draws settings around the recipe's, halves the field as runs go on, and confirms the best with other seeds."""
    try:
        import optuna
    except ImportError as error:
        raise InputError(
            "--search needs optuna: uv run --group search python benchmarks/effects.py --search"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    (folder := options.work / "search").mkdir(parents=True, exist_ok=True)

    def study(number: int = 0) -> Any:
        return optuna.create_study(
            study_name="effects",
            storage=optuna.storages.JournalStorage(
                optuna.storages.journal.JournalFileBackend(str(folder / "trials.log"))
            ),
            sampler=optuna.samplers.TPESampler(seed=number, constant_liar=True),
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
            load_if_exists=True,
        )

    base = Run(dataclasses.replace(BY_NAME["recipe"], name="search/recipe"), SEARCH_SEED)
    check_settings(options, base)
    recipe = settings(options, base)
    states = optuna.trial.TrialState
    known = study()
    for trial in known.trials:
        if trial.state == states.RUNNING:
            known.tell(trial.number, state=states.FAIL)
    if not known.trials:
        known.enqueue_trial(recipe_as_drawn(recipe))
    ended = sum(trial.state in (states.COMPLETE, states.PRUNED) for trial in known.trials)

    def body(number: int) -> None:
        def objective(trial: Any) -> float:
            variant = found_variant(draw(trial, recipe), f"search/{trial.number}")
            run = Run(variant, SEARCH_SEED)
            try:
                run.folder(options).mkdir(parents=True, exist_ok=True)
                with lean(), reporting(trial) as wers:
                    training.main(settings(options, run))
                return wers[-1]
            finally:
                shutil.rmtree(run.folder(options), ignore_errors=True)

        study(number).optimize(objective, n_trials=1)

    def said(number: int) -> str:
        found = study()
        if not any(trial.state == states.COMPLETE for trial in found.trials):
            return "none has run to its end yet"
        best = found.best_trial
        return f"best so far {best.value:.1f} % on dev (trial {best.number})"

    jobs = [(f"trial {n}", functools.partial(body, n), folder / f"{n}.txt") for n in range(ended, trials)]
    if failed := work_off(jobs, at_once, said):
        raise InputError(f"{len(failed)} trials failed: {', '.join(failed)}")
    known = study()
    first, *others = known.trials
    if not (others := [trial for trial in others if trial.state in (states.COMPLETE, states.PRUNED)]):
        raise InputError("nothing but the recipe was tried: give more --trials")
    # Of those that got furthest; it is compared with the recipe by other seeds, better or not.
    best = min(others, key=lambda trial: (-max(trial.intermediate_values), trial.value))
    whole = [trial.value for trial in others if trial.state == states.COMPLETE]
    print(
        f"{len(known.trials)} trials, {sum(t.state == states.PRUNED for t in known.trials)} of them given up early; WER"
        f" on dev, one seed: recipe {first.value or math.nan:.2f} %, best drawn {best.value:.2f} %"
        f" ({len(whole)} of these ran to the end{f', median {np.median(whole):.2f} %' if whole else ''})"
    )
    print("best drawn:", ", ".join(f"{name} {value:.3g}" for name, value in best.params.items()))
    variants = [BY_NAME["recipe"], found_variant(best.params, f"found-{best.number}")]
    runs = [Run(variant, seed) for seed in seeds for variant in variants]
    run_all(options, runs, at_once)
    results = [read(options, run) for run in runs]
    trials_done = [
        {"number": t.number, "state": t.state.name, "wer": t.value, "parameters": t.params}
        | {"wers": list(t.intermediate_values.values())}
        for t in known.trials
    ]
    return {"rows": table_rows(variants, results), "trials": trials_done, "best": best.params, "runs": results}


# --------------------------------------------------------------------------------------------------------- Command line


def table_rows(variants: list[Variant], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each variant with its rates and its changes, as effects_report shows them."""
    described = [
        {name: getattr(v, name) for name in ("name", "title", "part", "adds", "against", "expected", "spec")}
        for v in variants
    ]
    return report.rows_of(described, results)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Options]:
    parser = argparse.ArgumentParser("effects.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--json", type=Path, help="everything measured, each utterance's errors and the curves included"
    )
    parser.add_argument("--plot", type=Path, help="the changes with their intervals, as a picture (docs/effects.png)")
    parser.add_argument("--work", type=Path, default=Path("runs/effects"), help="what is done, a folder for each run")
    parser.add_argument("--variants", nargs="+", choices=list(BY_NAME), metavar="NAME", help=", ".join(BY_NAME))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the recipe and no-specaugment, two seeds")
    parser.add_argument("--at_once", type=int, help="runs at once; as many as there are cores, or 1 with --processes")
    parser.add_argument("--rows", type=int, default=ROWS, help="training utterances in the small world")
    parser.add_argument("--test_sentences", type=int, help="of the small world's; all")
    parser.add_argument("--real", action="store_true", help="the real recipe, in place of the small world's")
    parser.add_argument("--processes", type=int, default=0, help="of each run, under torchrun")
    parser.add_argument("--sets", nargs="+", default=[], help="test sets, as evaluate_hebrew_asr.py takes them")
    parser.add_argument("--print_commands", action="store_true", help="run nothing, print the commands of what is left")
    parser.add_argument("--search", action="store_true", help="search rates, switch epoch and masks instead")
    parser.add_argument("--trials", type=int, default=40, help="of the search")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given, changes = parser.parse_known_args(arguments)
    given.at_once = given.at_once or (1 if given.processes else len(os.sched_getaffinity(0)))
    if given.real and not given.processes:
        raise InputError("--real needs --processes, the number of GPUs of a run")
    if given.quick:
        given.variants, given.seeds = given.variants or ["recipe", "no-specaugment"], min(given.seeds, 2)
    if given.seeds < 2 and not given.here:
        raise InputError("an interval over seeds needs --seeds 2 or more")
    everything = [v.name for v in VARIANTS if v.epochs == 1 or not given.real]  # 2 epochs have no quarter
    chosen = [BY_NAME[name] for name in given.variants or everything]
    names = [v.against for v in chosen] + [v.name for v in chosen] if not given.here else [v.name for v in chosen]
    given.variants = [v for v in VARIANTS if v.name in names]  # with what they are compared with
    known = {one.name: one for one in LEADERBOARD}
    sets = tuple(read_set(text, known) for text in given.sets)
    options = Options(
        given.work.resolve(), given.real, given.rows, given.test_sentences, given.processes, tuple(changes), sets
    )
    return given, options


def command(arguments: list[str]) -> None:
    given, options = parse(arguments)
    seeds = list(range(given.first_seed, given.first_seed + given.seeds))
    runs = [Run(variant, seed) for seed in seeds for variant in given.variants]
    if given.here:
        for run in runs:
            train(options, run)
        return
    if not options.real:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(1)
        write_data(options, [*seeds, SEARCH_SEED] if given.search else seeds)
    if given.print_commands:
        for run in runs:
            check_settings(options, run)
            if not run.is_done(options):
                print(" && ".join(shlex.join(one) for one in commands(options, run)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no run stays behind
    began = time.monotonic()
    if given.search:
        found = search(options, given.trials, seeds, given.at_once)
    else:
        run_all(options, runs, given.at_once)
        results = [read(options, run) for run in runs]
        found = {"rows": table_rows(given.variants, results), "runs": results}
    print(*report.lines_of(found["rows"]), *(f"not in it: {line}" for line in CANNOT_TELL), sep="\n")
    print(f"{time.monotonic() - began:.0f} s, {given.at_once} at once")
    if given.json:
        about = {"command": shlex.join(arguments), "created": time.strftime("%Y-%m-%d"), "seeds": seeds}
        about |= {"versions": results_module.versions(), "cannot_tell": CANNOT_TELL}
        given.json.write_text(json.dumps(about | found, ensure_ascii=False) + "\n")
    if given.plot:
        report.draw(found["rows"], given.plot)


if __name__ == "__main__":
    processes_module.launch(command)
