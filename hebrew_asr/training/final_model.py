"""The model a run ends with: the best checkpoint or the moving average, written for use and evaluated from the disk."""

import shutil
from pathlib import Path

import accelerate
import torch
from accelerate.utils import broadcast_object_list
from transformers import Qwen3ASRForConditionalGeneration

from hebrew_asr.checkpoints import store
from hebrew_asr.checkpoints.averages import model_of, newest
from hebrew_asr.checkpoints.final import damage_of, save_for_use
from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.errors import InputError
from hebrew_asr.processes import fail_together
from hebrew_asr.training.resuming import ResumableTrainer
from hebrew_asr.training.run_log import RunLog


def write_final_model(trainer: ResumableTrainer) -> None:
    """Writes the checkpoint of the lowest WER for use, in its one final type."""
    trainer.writer.wait()
    if trainer.args.process_index > 0:
        return
    best = store.best_valid(trainer.writer.parent, trainer.run_log.say)
    if best is None:
        raise InputError(f"no checkpoint is in {trainer.writer.parent}, so there is no final model: is the disk full?")
    dtype = getattr(torch, trainer.config.final_dtype)
    model = Qwen3ASRForConditionalGeneration.from_pretrained(best.folder, dtype=dtype)
    save_for_use(model, trainer.processor, trainer.final_folder, dtype)
    if best.wer is None:
        trainer.final_origin = f"The last checkpoint, at step {best.step}; none that could be saved was evaluated."
    elif trainer.best_wer < best.wer:
        trainer.final_origin = (
            f"The checkpoint with the lowest WER of those that could be saved, at step {best.step}: that of step"
            f" {trainer.best_step}, whose WER was {trainer.best_wer:.2f} %, could not."
        )
    else:
        trainer.final_origin = f"The checkpoint with the lowest WER, at step {best.step}."
    trainer.best_step = best.step


def write_average(trainer: ResumableTrainer, folder: Path) -> str:
    """Writes the moving average of the newest checkpoint for use, on the first process; returns what it is."""
    (checkpoint,) = newest(trainer.writer.parent, 1)
    if trainer.args.process_index == 0:
        model = model_of([checkpoint], is_moving=True)
        save_for_use(model, trainer.processor, folder, getattr(torch, trainer.config.final_dtype))
    return f"The moving average of the weights at step {checkpoint.step}."


def evaluate_stored(
    trainer: ResumableTrainer, folder: Path, metric_key_prefix: str, dataset: SpeechDataset | None = None
) -> dict[str, float]:
    """Evaluates a model as it is on the disk, on the evaluation set or another one."""
    model = Qwen3ASRForConditionalGeneration.from_pretrained(folder, dtype="auto").to(trainer.args.device)
    return trainer.evaluate(dataset, metric_key_prefix=metric_key_prefix, model=model)


def evaluate_final(trainer: ResumableTrainer) -> dict[str, float]:
    """Evaluates the final model as it is on the disk: the best checkpoint, or the moving average if that is better.

    Returns:
        The numbers of the one that is in `final_model` afterwards, as `final/wer` and so on, and `confirm/wer` and so
        on of what was set aside (`confirm_share`).
    """
    final = evaluate_chosen(trainer)
    rows = trainer.eval_dataset.rows.set_aside
    if rows is None:
        return final
    dataset = SpeechDataset(rows, trainer.processor, trainer.config, training=False)
    return final | evaluate_stored(trainer, trainer.final_folder, "confirm", dataset)


def evaluate_chosen(trainer: ResumableTrainer) -> dict[str, float]:
    """Evaluates what may become the final model, which it is afterwards: the checkpoint, or the moving average."""
    folder, average = trainer.final_folder, trainer.final_folder.with_name("moving_average")
    if trainer.moving_average is None:
        return evaluate_stored(trainer, folder, "final")
    with fail_together():
        average_origin = write_average(trainer, average)
    found = {"best_checkpoint": evaluate_stored(trainer, folder, "best_checkpoint")}
    found["moving_average"] = evaluate_stored(trainer, average, "moving_average")
    metric = trainer.chosen_by.partition("/")[2]
    wers = {name: numbers[f"{name}/{metric}"] for name, numbers in found.items()}
    better = min(wers, key=lambda name: wers[name])  # of equal ones the checkpoint
    if trainer.run_log.is_main:
        if better == "moving_average":
            trainer.final_origin = average_origin
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


def is_whole(folder: Path, state: accelerate.PartialState, run_log: RunLog) -> bool:
    """Whether a finished run's final model is as it was written; False: it is made anew from the checkpoints."""
    with fail_together():
        problem = damage_of(folder / "final_model") if state.is_main_process else None
        if problem and not store.names(folder / "checkpoints"):
            raise InputError(
                f"{folder}/final_model is damaged ({problem}), and no checkpoint is left to make it of: take it from"
                " where it was uploaded or copied to, or train in another --output_dir"
            )
        if problem:
            run_log.say(f"warning: {folder}/final_model is damaged ({problem}): it is made anew")
    (problem,) = broadcast_object_list([problem])
    return problem is None
