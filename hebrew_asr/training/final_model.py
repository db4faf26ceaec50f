"""The model a run ends with."""

import shutil
from typing import Any

from hebrew_asr.processes import together


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
