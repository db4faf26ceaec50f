"""Fine-tunes on a few hours of recordings with transcripts, on one GPU: a preset that follows from how much there is.

    uv run scripts/train_few_hours.py --data data/calls                    calls with their transcripts, docs/data.md
    uv run scripts/train_few_hours.py --data data/calls --model_name_or_path runs/NAME/final_model
    uv run scripts/train_few_hours.py --demo                               20 minutes of the demo's speech, no GPU

It reads the recordings, and sets epochs, evaluation interval and held-out share by their hours; it prints what it set.
Without `--model_name_or_path` it begins from Qwen3-ASR-1.7B; a checkpoint that was trained on much Hebrew is a better
start. Every field of TrainingConfig can be given after it. No account is needed, and no Hub where the model is local.
"""

if __name__ == "__main__":  # the imports take seconds
    from hebrew_asr.start import begin

    begin()

import math
import os
from dataclasses import dataclass, field

from hebrew_asr.command_line import help_of, parse_config, split_options
from hebrew_asr.data.rows import load_rows
from hebrew_asr.data.sources import Source
from hebrew_asr.errors import InputError
from hebrew_asr.files import DEMO
from hebrew_asr.model.stages import Stage
from hebrew_asr.processes import launch
from train_hebrew_asr_enhanced import TrainingConfig, main
from train_round2_gradual import demo as round2_demo

BATCH = 16  # utterances of a step: a quarter of Round 2's, since few recordings are few steps
STEPS = 500  # of a run, about; reached by epochs
FEWEST_EPOCHS, MOST_EPOCHS = 3, 15
HELDOUT_HOURS = 1 / 6  # that are held out, about
SMALLEST_SHARE, LARGEST_SHARE = 0.02, 0.2  # of the recordings
EVALUATIONS = 8  # of a run
RATES = {"projector": 5e-5, "audio_top": 1.5e-5, "llm_top": 1.5e-5, "lm_head": 5e-5}  # Round 2's A, halved by √(16/64)
DEMO_DATA = Source(str(DEMO / "corpus"), split="train[:637]")  # the first 20 minutes


@dataclass
class FewHoursOptions:
    """The recordings"""

    data: list[Source] = field(default_factory=list)
    """A path or Hub id, or a source as JSON; whole recordings of it are held out unless eval_sources are given."""


def preset(hours: float, utterances: int) -> TrainingConfig:
    """The settings for so much speech."""
    share = min(LARGEST_SHARE, max(SMALLEST_SHARE, HELDOUT_HOURS / hours))
    steps = max(1, math.ceil(utterances * (1 - share) / BATCH))  # of an epoch
    epochs = min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(STEPS / steps)))
    interval = max(10, math.ceil(steps * epochs / EVALUATIONS))
    return TrainingConfig(
        stages=[Stage("calls", last_epoch=epochs, learning_rates=dict(RATES))],
        num_epochs=epochs,
        target_effective_batch=BATCH,
        eval_fraction=share,
        eval_steps=interval,
        save_steps=interval,
        tracker="trackio",
        target_loss=None,
        target_wer=None,
    )


def demo(hours: float, utterances: int) -> TrainingConfig:
    """The preset on the small model, with its layers and rates 20 times as high."""
    config, world = preset(hours, utterances), round2_demo()
    for name in ("num_epochs", "eval_fraction", "eval_steps", "save_steps", "target_loss", "target_wer", "stages"):
        setattr(world, name, getattr(config, name))
    for stage in world.stages:
        stage.learning_rates = {component: 20 * rate for component, rate in stage.learning_rates.items()}
        stage.audio_top_layers = stage.llm_top_layers = 1
    world.eval_sources, world.logging_steps = [], config.logging_steps
    return world


def recipe(argv: list[str], hours: float = 3.0, utterances: int = 1800) -> TrainingConfig:
    """The settings for so much speech; an option given replaces what the preset says."""
    mine, others = split_options(argv, FewHoursOptions)
    data = parse_config(mine, FewHoursOptions()).data or ([DEMO_DATA] if "--demo" in others else [])
    if {"--help", "-h"}.isdisjoint(argv) and not data:
        raise InputError("give --data, a folder of recordings with their transcripts (docs/data.md), or --demo")
    defaults = preset(hours, utterances)
    about = f"{__doc__}\n{help_of(FewHoursOptions())}\n\nThe others follow; those of the preset are for 3 hours here."
    config = parse_config(others, defaults, lambda: demo(hours, utterances), about)
    config.train_sources = data
    return config


def command(argv: list[str]) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("this preset is for one GPU: leave torchrun out, or take train_round2_gradual.py")
    config = recipe(argv)
    config.check_sources()
    rows = load_rows(config.train_sources, config, for_training=True)
    config = recipe(argv, rows.hours, len(rows))
    heldout = "the evaluation set is given" if config.eval_sources else f"{config.eval_fraction:.0%} held out"
    print(
        f"{rows.hours:.2f} hours in {len(rows):,} utterances: {config.num_epochs} epochs with"
        f" {config.target_effective_batch} a step, {heldout}, evaluated every {config.eval_steps} steps",
        flush=True,
    )
    main(config)


if __name__ == "__main__":
    launch(command)
