"""Averages a run's checkpoints, measures each average, and makes the best one the run's final model.

    uv run scripts/average_checkpoints.py --run_dir runs/NAME            the last 3, the best 3, and the moving average
    uv run torchrun --nproc_per_node=8 scripts/average_checkpoints.py --run_dir runs/NAME --last 5 --best 0

The averages stand in runs/NAME/averages/, each a checkpoint of its own. They are measured as evaluate_hebrew_asr.py
measures, on the run's evaluation set, with the best single checkpoint among them; the one of the lowest WER becomes
final_model, and is uploaded where the run uploads. Of a run only `--save_total_limit` checkpoints and the best one are
there to be averaged: give it more when it trains. The same command goes on where it was interrupted.
"""

if __name__ == "__main__":  # the imports take seconds
    from hebrew_asr.start import begin

    begin()

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import accelerate
import torch
import transformers

from hebrew_asr.checkpoints import averages as averaging
from hebrew_asr.checkpoints import store
from hebrew_asr.checkpoints.final import finish, save_for_use
from hebrew_asr.checkpoints.hub import upload, upload_command
from hebrew_asr.checkpoints.model_card import write_card_of_run
from hebrew_asr.checkpoints.store import Checkpoint
from hebrew_asr.checkpoints.tensors import AVERAGE, WEIGHTS
from hebrew_asr.command_line import Range, parse_config, read_run_settings
from hebrew_asr.data.rows import SpeechRows, load_rows
from hebrew_asr.data.selection import load_train_and_eval, without_too_many
from hebrew_asr.data.sources import Source
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation.measuring import compare_models, measure
from hebrew_asr.evaluation.settings import Decoding, EvaluationSet
from hebrew_asr.evaluation.transcription import load_speech_model, read_transcripts, transcribe_shares
from hebrew_asr.files import flush, put, sha256
from hebrew_asr.processes import fail_together, join_processes, launch, leave_process_group, load_in_turn
from hebrew_asr.training.watch import take_lock
from train_hebrew_asr_enhanced import TrainingConfig

SET = "evaluation set"


@dataclass
class RunSettings(TrainingConfig):
    """The settings of the run whose checkpoints are averaged: Round 2's, and two of Round 3's."""

    noisy_eval_sources: list[Source] = field(default_factory=list)
    best_by: str = "wer"


@dataclass
class Average:
    """What may become the final model."""

    name: str
    found: list[Checkpoint]
    is_moving: bool = False
    """The moving average that its one checkpoint holds, not the checkpoint's weights."""

    @property
    def origin(self) -> str:
        names = ", ".join(checkpoint.folder.name for checkpoint in self.found)
        if self.is_moving:
            return f"The moving average of the weights at {names}."
        return f"The mean of {names}." if len(self.found) > 1 else f"The checkpoint {names}."


def averages_of(place: Path, last: int, best: int) -> tuple[list[Average], list[str]]:
    """The averages that a run's checkpoints allow, the best single one first, and what is to be said of them."""
    wanted = {"best-1": averaging.lowest_wer(place, 1) or averaging.newest(place, 1)}
    wanted |= {f"last-{last}": averaging.newest(place, last), f"best-{best}": averaging.lowest_wer(place, best)}
    newest = averaging.newest(place, 1)
    if not newest:
        raise InputError(f"no valid checkpoint is in {place}")
    found: list[Average] = []
    notes = []
    for name, mine in wanted.items():
        kind, count = name.split("-")
        if len(mine) < int(count):
            notes.append(f"{name}: only {len(mine)} of them are there, more are kept with a larger save_total_limit")
        if not mine or any({c.folder for c in mine} == {c.folder for c in other.found} for other in found):
            continue
        found.append(Average(f"{kind}-{len(mine)}", mine))
    if (newest[0].folder / AVERAGE).exists():
        found.append(Average("moving", newest, is_moving=True))
    return found, notes


def write_average(average: Average, folder: Path, dtype: torch.dtype) -> None:
    """Writes an average for use, or leaves it where it is already there."""
    files = [sha256(checkpoint.folder / WEIGHTS) for checkpoint in average.found]
    made_of = {"sha256": files, "moving": average.is_moving, "dtype": str(dtype)}
    note = folder.with_suffix(".json")
    if folder.exists() and note.exists() and json.loads(note.read_text()) == made_of:
        return
    like = average.found[0].folder
    model = averaging.model_of(average.found, average.is_moving)
    save_for_use(model, transformers.AutoProcessor.from_pretrained(like, trust_remote_code=False), folder, dtype)
    put(note, json.dumps(made_of))


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != "README.md"}


def measure_average(
    folder: Path,
    name: str,
    rows: SpeechRows,
    config: TrainingConfig,
    place: Path,
    state: accelerate.PartialState,
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """The evaluation command's results and records of one average; None but on the first process."""
    decoding = Decoding(language=config.language if config.eval_prefill_language else None)
    with fail_together():
        model = load_speech_model(str(folder), decoding, state.device)
    parts = transcribe_shares(model, rows, place, state, config.dataloader_num_workers)
    if not state.is_main_process:
        return None
    one = EvaluationSet(SET, Source(SET), config.language)
    return measure(name, one, rows, read_transcripts(parts, len(rows)))


def take(
    average: Average, folder: Path, measured: dict[str, str], result: dict, run: Path, config: TrainingConfig
) -> None:
    """Makes an average the run's final model; raises InputError unless it has the bytes that were measured."""
    final, unfinished = run / "final_model", run / "final_model.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(folder, unfinished)
    if hashes(unfinished) != measured:
        raise InputError(f"{folder} has other files than were measured: start again")
    write_card_of_run(
        unfinished,
        config,
        shown_as=final,
        final={f"final/{name}": result[name] for name in ("utterances", "wer_raw")}
        | {f"final/{name}": result[name]["value"] for name in ("wer", "cer")}
        | {f"final/wer_{name}": result["wer"][name] for name in ("low", "high")},
        origin=average.origin,
    )
    for path in (*unfinished.iterdir(), unfinished):
        flush(path)
    shutil.rmtree(final, ignore_errors=True)
    unfinished.rename(final)
    finish(final)


def settings_of(run: Path) -> RunSettings:
    if not (run / "config.yaml").exists():
        raise InputError(f"{run} is no run's folder: it has no config.yaml")
    return read_run_settings(run / "config.yaml", RunSettings())


def evaluation_rows(config: RunSettings) -> SpeechRows:
    """What the run chooses its best checkpoint by."""
    if config.best_by == "wer_noisy":
        config = dataclasses.replace(config, eval_sources=config.noisy_eval_sources)
    if not config.eval_sources:
        return load_train_and_eval(config, config.seed)[1]
    return without_too_many(load_rows(config.eval_sources, config, for_training=False), config)


def main(run: Path, last: int, best: int) -> None:
    """Makes, measures and chooses; InputError on every rank when it cannot."""
    # 1. The run
    config = settings_of(run)
    state = join_processes(config.process_timeout_minutes)

    def say(line: str) -> None:
        if state.is_main_process:
            print(line, flush=True)

    with fail_together():
        if state.is_main_process and (_lock := take_lock(run)) is None:
            raise InputError(f"a process trains in {run}: wait for it")
    rows = load_in_turn(state, lambda: evaluation_rows(config))

    # 2. Averages
    place, dtype = run / "averages", getattr(torch, config.final_dtype)
    place.mkdir(exist_ok=True)
    with fail_together():
        averages, notes = averages_of(run / "checkpoints", last, best)
        if state.is_main_process:
            for average in averages:
                write_average(average, place / average.name, dtype)
    for note in notes:
        say(f"note: {note}")

    # 3. Measure
    found, records, measured = {}, {}, {}
    for average in averages:
        folder = place / average.name
        measured[average.name] = hashes(folder) if state.is_main_process else {}
        if of_one := measure_average(folder, average.name, rows, config, place, state):
            found[average.name], records[average.name, SET] = of_one
            say(f"{average.name}: WER {found[average.name]['wer']['value']:.2f} %. {average.origin}")

    # 4. Choose, and upload what was measured
    with fail_together():
        if state.is_main_process:
            best_of = min(averages, key=lambda average: found[average.name]["wer"]["value"])
            others = [average.name for average in averages if average is not best_of]
            for line in compare_models(records, [best_of.name, *others], SET):
                say(line["verdict"])
            take(best_of, place / best_of.name, measured[best_of.name], found[best_of.name], run, config)
            table = [{"name": a.name, "origin": a.origin} | found[a.name] for a in averages]
            put(place / "results.json", json.dumps(table, indent=1))
            say(f"{run}/final_model is {best_of.name}, the lowest WER of {len(averages)} on the set it was chosen by")
            if config.uploads:
                store.update_status(run, uploaded=upload(config, run / "final_model", say))
            else:
                say(f"not uploaded; to do it: {upload_command(config, run / 'final_model')}")
    leave_process_group()


@dataclass
class AveragingOptions:
    """What is averaged"""

    run_dir: str = ""
    """The run's folder."""
    last: Annotated[int, Range(0)] = 3
    """So many of the newest checkpoints; 0: not."""
    best: Annotated[int, Range(0)] = 3
    """So many of those with the lowest WER; 0: not."""


def parse(argv: list[str]) -> AveragingOptions:
    """Reads the command line; raises InputError."""
    given = parse_config(argv, AveragingOptions(), about=__doc__)
    if not given.run_dir:
        raise InputError("give --run_dir, the folder of a run")
    return given


def command(argv: list[str]) -> None:
    given = parse(argv)
    main(Path(given.run_dir), given.last, given.best)


if __name__ == "__main__":
    launch(command)
