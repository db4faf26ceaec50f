"""Averages of weights: of several checkpoints, and a moving one that is kept while training.

Sums are in fp64 and the averages in fp32; a final model is cast to its one type when it is written. Imports nothing of
the training script: its trainer is passed in.
"""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import Qwen3ASRForConditionalGeneration

import checkpoints
from checkpoints import Checkpoint
from resuming import AVERAGE, WEIGHTS, load_tensors, together
from sharding import local, sharded_like

# ------------------------------------------------------------------------------------------------------ Of checkpoints


def mean_of(found: list[Checkpoint]) -> Iterator[tuple[str, torch.Tensor]]:
    """The mean of each tensor over checkpoints, in fp32, one tensor after the other.

    A checkpoint has two tied weights once, so that what is loaded from here stays tied.
    """
    for tensors in zip(*(checkpoint.tensors(WEIGHTS) for checkpoint in found), strict=True):
        (name,) = {name for name, _ in tensors}
        yield name, (sum(tensor.double() for _, tensor in tensors) / len(tensors)).float()


def newest(place: Path, count: int) -> list[Checkpoint]:
    """The valid ones of the newest checkpoints, at most `count`, the newest first."""
    return valid(checkpoints.names(place), count)


def lowest_wer(place: Path, count: int) -> list[Checkpoint]:
    """The valid ones of the checkpoints with a WER, at most `count`, the lowest first."""
    return valid(checkpoints.by_wer(place), count)


def valid(folders: Iterable[Path], count: int) -> list[Checkpoint]:
    found = []
    for folder in folders:
        if len(found) < count:
            try:
                found.append(checkpoints.verify(folder))
            except checkpoints.InvalidCheckpoint:
                continue
    return found


def model_of(found: list[Checkpoint], is_moving: bool = False) -> Qwen3ASRForConditionalGeneration:
    """The mean of checkpoints as a model in fp32, or the moving average that the first one holds.

    What no stage trains is the same in every checkpoint of a run.
    """
    model = Qwen3ASRForConditionalGeneration.from_pretrained(found[0].folder, dtype=torch.float32)
    load_tensors(model, found[0].tensors(AVERAGE) if is_moving else mean_of(found))
    return model


# ------------------------------------------------------------------------------------------------------ While training


class MovingAverage:
    """An exponential moving average of parameters, in fp32, beside them on every process.

    After step n it is d^n w_0 + (1 - d) Σ d^(n-i) w_i over the steps i. A parameter that does not train yet has itself
    as its average, so that a stage may begin with it at any step.
    """

    def __init__(self, decay: float, parameters: dict[str, torch.nn.Parameter]):
        self.parameters = parameters
        self.weights = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}
        self._blend = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Takes one step's weights in."""
        averages, weights = self.weights.values(), self.parameters.values()
        self._blend([local(average) for average in averages], [local(weight.detach()) for weight in weights], None)

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            self.weights[name].copy_(sharded_like(tensor, self.weights[name]))


def evaluate_final(trainer: Any) -> dict[str, float]:
    """Evaluates the final model as it is on the disk: the best checkpoint, or the moving average if that is better.

    Returns:
        The numbers of the one that is in `final_model` afterwards, as `final/wer` and so on.
    """
    folder, average = trainer.final_folder, trainer.final_folder.with_name("moving_average")
    if trainer.moving_average is None:
        return trainer.evaluate_stored(folder, "final")
    with together():
        trainer.write_average(average)
    found = {"best_checkpoint": trainer.evaluate_stored(folder, "best_checkpoint")}
    found["moving_average"] = trainer.evaluate_stored(average, "moving_average")
    metric = trainer.chosen_by.partition("/")[2]
    wers = {name: numbers[f"{name}/{metric}"] for name, numbers in found.items()}
    better = min(wers, key=wers.get)  # of equal ones the checkpoint
    if trainer.run_log.is_main:
        if better == "moving_average":
            trainer.final_origin = trainer.average_origin
            shutil.rmtree(folder)
            average.rename(folder)
        else:
            shutil.rmtree(average)
    final = {f"final/{name.partition('/')[2]}": number for name, number in found[better].items()}
    trainer.run_log.log(final, trainer.state.global_step)
    trainer.run_log.say(
        f"{metric} {wers['best_checkpoint']:.2f} % of the best checkpoint, {wers['moving_average']:.2f} % of the moving"
        f" average: final_model is the {better.replace('_', ' ')}"
    )
    return final
