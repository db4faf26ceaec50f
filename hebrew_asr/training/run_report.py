"""What a run says of itself: corpora and plan before the first step, verdict and model card at the end."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hebrew_asr.checkpoints.model_card import write_card_of_run
from hebrew_asr.data.identity import digest_of, identity_of
from hebrew_asr.data.report import write_report
from hebrew_asr.data.rows import SpeechRows
from hebrew_asr.data.shared_memory import advice
from hebrew_asr.errors import InputError
from hebrew_asr.model.sharding import is_sharded
from hebrew_asr.training.feed import ListedFeed, TrainingData
from hebrew_asr.training.resuming import ResumableTrainer
from hebrew_asr.training.run_log import RunLog, draw_curves, wer_summary
from hebrew_asr.training.settings import Settings


def report_data(folder: Path, data: TrainingData, eval_rows: SpeechRows, config: Settings, run_log: RunLog) -> None:
    run_log.say(f"run folder {folder}")
    if run_log.is_main:
        listed = isinstance(data, SpeechRows)
        try:
            lines = write_report(folder, data if listed else None, eval_rows, config)
        except OSError as error:
            lines = [f"warning: the report on the corpora could not be written ({error})"]
        for line in lines:
            run_log.say(line)
        for stream in [] if listed else data:
            run_log.say(f"streamed: {stream.source}, {stream.rows.num_shards} shards, read while training")


def describe_result(trainer: ResumableTrainer, final: dict[str, float]) -> None:
    """The model card, the curves, and the verdict's lines; InputError when the disk does not take the card."""
    config, run_log, folder = trainer.config, trainer.run_log, trainer.final_folder
    try:
        write_card_of_run(folder, config, shown_as=folder, final=final, origin=trainer.final_origin)
    except OSError as error:
        raise InputError(
            f"the card of {folder} cannot be written ({error}): make room, then the same command goes on"
        ) from error
    try:
        draw_curves(run_log.rows, trainer.stage_ends, trainer.panels, folder.parent / "curves.png")
    except OSError as error:
        run_log.say(f"warning: curves.png could not be written ({error})")
    for line in (
        *trainer.verdict(),
        *wer_summary(run_log.rows, trainer.stage_ends, trainer.stage.name),
    ):
        run_log.say(line)


def facts_of_run(trainer: ResumableTrainer, data: TrainingData, processes: int) -> dict[str, Any]:
    """What the dashboard should hold beside the settings."""
    return {
        "processes": processes,
        "gpu_count": processes if torch.cuda.is_available() else 0,
        "gradient_accumulation_steps": trainer.config.gradient_accumulation_steps(processes),
        "effective_batch_size": trainer.config.target_effective_batch,
        "steps": trainer.total_steps,
        "train_utterances": len(data) if isinstance(data, SpeechRows) else None,
        "train_hours": data.hours if isinstance(data, SpeechRows) else None,
        "bf16_autocast": trainer.use_bf16,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
    }


def announce(trainer: ResumableTrainer, eval_rows: SpeechRows, processes: int) -> None:
    """Says what will run and which stages are cut, before the first step."""
    config, say = trainer.config, trainer.run_log.say
    if isinstance(trainer.feed, ListedFeed) and config.train_sources[0].probability is not None:
        mixture = trainer.feed.mixture
        for source, count, rows in zip(config.train_sources, mixture.counts, mixture.rows, strict=True):
            share = count / len(mixture)
            say(f"mixture: {share:.1%} of an epoch from {source.path}, {count} of its {len(rows)} utterances")
    budget = config.tokens_per_micro_batch
    say(
        f"{trainer.total_steps} steps, {len(trainer.feed)} an epoch | {config.batch_size} utterances ×"
        f" {config.gradient_accumulation_steps(processes):g} micro-batches × {processes} processes ="
        f" {config.target_effective_batch} a step{f', at most {budget} tokens in a forward pass' if budget else ''} |"
        f" {'bf16 autocast' if trainer.use_bf16 else 'fp32'} on {trainer.args.device.type}"
        f"{f' | what trains is sharded over the {processes} processes' if is_sharded(trainer.model) else ''}"
    )
    if isinstance(trainer.feed, ListedFeed) and (
        line := advice(config.dataloader_num_workers, trainer.feed.seconds_at_once)
    ):
        say(line)
    if config.fsdp and processes == 1:
        say("note: fsdp is on and there is one process: nothing is sharded")
    audio, text = trainer.model.config.audio_config, trainer.model.config.text_config
    say(f"evaluation: {trainer.eval_batch_size} utterances of {config.max_audio_length_seconds:g} s at once")
    say(f"attention: encoder {audio._attn_implementation}, language model {text._attn_implementation}")
    last_epoch = math.ceil(trainer.total_steps / len(trainer.feed))
    marked = sum(not {"״", "׳"}.isdisjoint(reference) for reference in eval_rows.column("reference"))
    if marked and config.text_rules.quote_style == "ascii":
        say(
            f"note: {marked} evaluation references have ״ or ׳, which targets write as \" and '"
            " (text_rules.quote_style): by the leaderboard's rules those words differ"
        )
    for stage in config.stages:
        if last_epoch < stage.last_epoch:
            begins = config.first_epoch_of(stage)
            what = "is left out" if last_epoch < begins else f"is cut (it would end with epoch {stage.last_epoch})"
            say(f"stage {stage.name} {what}: the run ends in epoch {last_epoch}")
    if trainer.resumed:
        step, there = trainer.resumed.step, trainer.resumed.folder
        say(
            f"resumed at step {step} of {trainer.total_steps}, stage {trainer.stage.name}, epoch"
            f" {step / len(trainer.feed):.2f}, from {there}"
        )


def warn_of_a_wrong_start(loss: float, vocab_size: int, run_log: RunLog) -> None:
    """Says so when the first logged loss is that of a model which guesses."""
    guessing = math.log(vocab_size)
    if loss > 8 or abs(loss - guessing) < 0.5:
        run_log.say(
            f"warning: the loss starts at {loss:.2f} nats per token (ln of the vocabulary is {guessing:.2f}): the"
            " model is guessing, so the prompt or the labels are wrong, or the checkpoint is untrained"
        )


def note_changed_data(loads: Callable, was: dict[str, str], run_log: RunLog) -> None:
    """Says which data of a finished run are other ones now than `was`, their digests at its end."""
    try:
        data, eval_rows = loads()
    except InputError as problem:
        run_log.say(f"note: the run's data cannot be read now: {problem}")
        return
    now = {"evaluation": digest_of(identity_of(eval_rows))}
    if isinstance(data, SpeechRows):
        now["training"] = digest_of(identity_of(data))
    for name in [name for name, digest in now.items() if was.get(name, digest) != digest]:
        run_log.say(
            f"warning: the {name} data are others now than this model was made with: to use them, choose another"
            " --output_dir"
        )
