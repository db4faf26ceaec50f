"""The runs of the real model that would settle what recipes.py measured on the small world, most informative first."""

import math
from dataclasses import dataclass

import numpy as np

from hebrew_asr.training.plan import make_plan
from train_round2_gradual import recipe

PER_ERROR = 1.5
"""Standard deviation of the logarithm of two recipes' ratio of errors, times the square root of the errors: 1.2 to 1.8
on the demo's two sets, over 36 pairs of single runs with 5 to 9 % and 15 to 25 % WER (27 November 2026)."""
BETWEEN_SEEDS = 0.12
"""Of the same logarithm, between seeds: three of `all` and three of `b_then_a` on the demo. A larger model's is likely
less, and not known."""
DETECTED = 1.96 + 0.84  # standard errors: found at the 5 % level in 80 % of the cases


@dataclass(frozen=True)
class Question:
    """A run, and what it is compared with."""

    asks: str
    options: tuple[str, ...]
    """Of train_round2_gradual.py."""
    against: int | None
    """The number of another run, from 1."""


REPLAY = ("--strategy", "all_with_replay", "--nonspeech", "data/noise")
MUON = ("--strategy", "muon_with_replay", "--nonspeech", "data/noise")
MASKS = ("--time_mask_param", "20")
NOISE = ("--use_waveform_augmentation", "true", "--waveform_augmentation.speed_probability", "0")
NOISE += ("--waveform_augmentation.noise_probability", "0.1")
QUESTIONS = [
    Question("what the spec's recipe reaches", ("--strategy", "b_then_a"), None),
    Question("freezing, or everything", ("--strategy", "all"), 1),
    Question("what keeping English and silence costs", REPLAY, 2),
    Question("Muon, in three epochs", MUON, 3),
    Question("time masks shorter than words, and noise", (*REPLAY, *MASKS, *NOISE), 3),
    Question("everything after B", ("--strategy", "b_then_all"), 2),
    Question("chance: run 2 again", ("--strategy", "all", "--seed", "43"), 2),
    Question("chance: run 1 again", ("--strategy", "b_then_a", "--seed", "43"), 7),
]


def detectable(errors: float, between_seeds: float = 0.0) -> float:
    """The smallest change, in percent of the errors, that two runs would show in 80 % of the cases."""
    return 100 * math.expm1(DETECTED * math.hypot(PER_ERROR / math.sqrt(errors), between_seeds))


def lines_of_real(
    processes: int, device: str, hours_of_audio: float, price: float, words: int, wer: float
) -> list[str]:
    """The queue in Markdown: each run's command, and hours, GPU hours and price as --plan computes them.

    Args:
        hours_of_audio: of an epoch.
        price: of a GPU hour.
        words: of all references of the sets that are measured.
        wer: percent that is expected of them.
    """
    fits = ["--plan_device", device, "--plan_devices", str(processes), "--plan_hours_of_audio", str(hours_of_audio)]
    table = ["| run | asks | against | hours | GPU hours | price |", "|---|---|---|---|---|---|"]
    commands, total = [], np.zeros(2)
    for number, question in enumerate(QUESTIONS, 1):
        options, note = list(question.options), ""
        plan = make_plan(recipe([*options, *fits]))
        if not all(stage.fits for stage in plan.stages):
            options += ["--fsdp", "true"]
            plan = make_plan(recipe([*options, *fits]))
            note = "" if all(stage.fits for stage in plan.stages) else f" (does not fit {device})"
        hours = np.array([min(plan.hours), max(plan.hours)])
        total += hours * processes
        cells = [f"{number}", question.asks + note, f"{question.against or ''}", between(hours, 1)]
        cells += [between(hours * processes, 1), between(hours * processes * price, 0)]
        table.append(f"| {' | '.join(cells)} |")
        commands.append(f"uv run torchrun --nproc_per_node={processes} train_round2_gradual.py {' '.join(options)}")
    commands.append("uv run evaluate_hebrew_asr.py --model runs/NAME/final_model --compare runs/OTHER/final_model")
    alone, with_seeds = (detectable(words * wer / 100, seeds) for seeds in (0.0, BETWEEN_SEEDS))
    facts = [
        f"In all {between(total, 0)} GPU hours, {between(total * price, 0)} at {price:g} a GPU hour, computed;"
        " evaluations, saving and start-ups come on top.",
        f"On {words:,} words at {wer:g} % WER, two runs show a change of {alone:.0f} % of the errors in 80 % of the"
        f" cases where seeds make no difference, one of {with_seeds:.0f} % where they make the demo's.",
    ]
    return [*table, "", *facts, "", *commands]


def between(values: np.ndarray, digits: int) -> str:
    return "–".join(f"{value:,.{digits}f}" for value in values)
