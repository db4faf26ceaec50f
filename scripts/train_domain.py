"""Adapts a checkpoint to a domain of its own, with the general mix replayed, and fails if something was forgotten.

    uv run torchrun --nproc_per_node=8 scripts/train_domain.py --model_name_or_path runs/NAME/final_model \\
        --domain data/calls/train --domain_test data/calls/test --nonspeech data/noise
    uv run scripts/train_domain.py --demo                      other words as the domain of the small model, no GPU
    uv run scripts/train_domain.py --model_name_or_path runs/NAME/final_model --domain data/calls/train \\
        --domain_test data/calls/test --general data/hebrew --english none --gates none      nothing from the Hub

A domain, its test set, what is replayed and the recordings without speech are each a path, a Hub id, or a source as
JSON. After training,
and before the final model is uploaded, the first process has evaluate_hebrew_asr.py compare it with the one it began
from, on the domain's test set and on `--gates` (sets as that command takes them; one in Hebrew is a gate with
"guarded": true). Where one of them lost more than `--max_wer_rise` points, nothing is uploaded and the exit
status is not 0. Every field of TrainingConfig can be given after it.
"""

if __name__ == "__main__":  # the imports take seconds
    from hebrew_asr.start import begin

    begin()

import dataclasses
import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch

import evaluate_hebrew_asr
from hebrew_asr.checkpoints import store
from hebrew_asr.command_line import Range, help_of, parse_config, split_options
from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.errors import InputError
from hebrew_asr.files import DEMO
from hebrew_asr.model.stages import Stage
from hebrew_asr.processes import launch
from hebrew_asr.training.strategies import ENGLISH
from train_hebrew_asr_enhanced import TrainingConfig, main
from train_round2_gradual import demo as round2_demo

PARQUET_COPY = "refs/convert/parquet"
SHARES = {"domain": 0.25, "general": 0.5, "english": 0.2, "nonspeech": 0.05}  # of an epoch's utterances
GATES = [
    {"name": "eval-d1", "path": "ivrit-ai/eval-d1", "split": "test", "text_column": "text", "guarded": True},
    {"name": "english", "path": "google/fleurs", "config_name": "en_us", "revision": PARQUET_COPY, "split": "test"}
    | {"text_column": "transcription", "language": "English"},
]
DEMO_GATES = [
    {"name": "heldout", "path": str(DEMO / "heldout"), "split": "test", "guarded": True},
    {"name": "english", "path": str(DEMO / "english"), "split": "test", "language": "English"},
    {"name": "non-speech", "path": str(DEMO / "nonspeech"), "split": "test", "language": "None"},
]


def mixed(domain: Source, general: list[Source], english: Source | None, nonspeech: Source | None) -> list[Source]:
    """The sources with their shares of an epoch; where one of the four is missing, the others share its share."""
    parts = {"domain": [domain]}
    if general:
        parts["general"] = general
    if english is not None:
        parts["english"] = [dataclasses.replace(english, language=english.language or "English")]
    if nonspeech is not None:
        parts["nonspeech"] = [dataclasses.replace(nonspeech, language="None")]
    total = sum(SHARES[name] for name in parts)
    return [
        dataclasses.replace(source, probability=SHARES[name] / total * (source.probability or 1 / len(sources)))
        for name, sources in parts.items()
        for source in sources
    ]


def domain(train_sources: list[Source], test: Source) -> TrainingConfig:
    """Rates of a fifth of Round 2's, and the embedding, which every language shares, at rest."""
    return TrainingConfig(
        train_sources=train_sources,
        eval_sources=[test],
        num_epochs=4,
        stages=[Stage("domain", last_epoch=4, learning_rates={"projector": 4e-5, "audio_top": 1e-5, "llm_top": 1e-5})],
        target_loss=None,
        target_wer=None,
    )


def demo() -> TrainingConfig:
    """Other words as the domain of the small model that Round 2's recipe made; rates 20 times as high."""
    config, world = domain([Source("-")], Source("-")), round2_demo()
    replay = DEMO / "replay"
    world.model_name_or_path = str(DEMO / "tuned")
    world.train_sources = mixed(
        Source(str(DEMO / "domain")),
        [Source(str(DEMO / "corpus"))],
        Source(str(replay / "english"), language="English"),
        Source(str(replay / "nonspeech")),
    )
    world.eval_sources = [Source(str(DEMO / "domain"), split="test")]
    world.stages, world.num_epochs = config.stages, config.num_epochs
    world.target_loss, world.target_wer = config.target_loss, config.target_wer
    for stage in world.stages:
        stage.learning_rates = {component: 20 * rate for component, rate in stage.learning_rates.items()}
        stage.audio_top_layers = stage.llm_top_layers = 1
    return world


@dataclass
class DomainOptions:
    """The domain and its gates"""

    domain: Source | None = None
    """What is adapted to: a path or Hub id, or a source as JSON."""
    domain_test: Source | None = None
    """Its test set."""
    general: list[Source] = field(default_factory=lambda: DataConfig().train_sources)
    """The general mix that is replayed; none: nothing of it."""
    english: Source | None = field(default_factory=lambda: ENGLISH)
    """English that is replayed; none: nothing of it."""
    nonspeech: Source | None = None
    """Recordings in which nobody speaks."""
    gates: list[str] = field(default_factory=lambda: [json.dumps(gate) for gate in GATES])
    """Sets on which the WER must not rise, as evaluate_hebrew_asr.py takes them; none: no gate."""
    max_wer_rise: Annotated[float, Range(0)] | None = 5.0
    """Points that it may rise; null: any."""


def recipe(argv: list[str]) -> tuple[TrainingConfig, list[str]]:
    """The settings, and the arguments of the evaluation after training but for the model."""
    mine, others = split_options(argv, DomainOptions)
    is_demo = "--demo" in others
    gates = [json.dumps(gate) for gate in (DEMO_GATES if is_demo else GATES)]
    given = parse_config(mine, DomainOptions(gates=gates))
    if {"--help", "-h"}.isdisjoint(argv) and not is_demo:
        if not (given.domain and given.domain_test):
            raise InputError("give --domain and --domain_test, or --demo")
        if not any(argument.split("=")[0] == "--model_name_or_path" for argument in others):
            raise InputError("give --model_name_or_path, the checkpoint that is adapted")
    mix = mixed(given.domain or Source("-"), given.general, given.english, given.nonspeech)
    defaults = domain(mix, given.domain_test or Source("-"))
    about = f"{__doc__}\n{help_of(DomainOptions())}\n\nThe others are those of train_round2_gradual.py."
    config = parse_config(others, defaults, demo, about)
    if config.output_dir is None:
        config.output_dir = f"runs/domain-{store.fingerprint(config.identity())}"
    tested = [
        {"name": f"domain-{number}", "path": source.path, "config_name": source.config_name, "split": source.split}
        | {"revision": source.revision, "text_column": source.text_column, "language": source.language}
        for number, source in enumerate(config.eval_sources, start=1)
    ]
    sets = [json.dumps({name: value for name, value in one.items() if value is not None}) for one in tested]
    rise = "null" if given.max_wer_rise is None or not given.gates else str(given.max_wer_rise)
    arguments = ["--sets", *sets, *given.gates, "--max_wer_rise", rise]
    evaluate_hebrew_asr.parse(["--model", "after", "--compare", "before", *arguments])  # now, not after training
    return config, arguments


def check_forgetting(config: TrainingConfig, arguments: list[str]) -> None:
    """Evaluates in a process of its own, without torchrun; raises InputError where the gate is shut."""
    assert config.output_dir is not None
    folder = Path(config.output_dir)
    models = ["--model", str(folder / "final_model"), "--compare", config.model_name_or_path]
    workers = ["--num_workers", str(config.dataloader_num_workers)]
    line = [sys.executable, evaluate_hebrew_asr.__file__, *models, *arguments, *workers]
    alone = {name: value for name, value in os.environ.items() if name not in LAUNCHED and "TORCHELASTIC" not in name}
    gc.collect()  # of the trainer, whose memory the evaluation needs
    torch.cuda.empty_cache()
    done = subprocess.run([*line, "--output_dir", str(folder / "evaluation")], env=alone, check=False)
    if done.returncode:
        raise InputError(f"{folder}/final_model did not pass the gate, or could not be measured: see above")


LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}


def command(argv: list[str]) -> None:
    config, arguments = recipe(argv)
    main(config, before_upload=lambda: check_forgetting(config, arguments))


if __name__ == "__main__":
    launch(command)
