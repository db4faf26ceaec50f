"""Scores every training utterance with a checkpoint, to find the transcripts that are not what is spoken.

    uv run torchrun --nproc_per_node=8 scripts/audit_corpus.py --model runs/NAME/final_model \\
        --config runs/NAME/config.yaml
    uv run scripts/audit_corpus.py --model CHECKPOINT --demo

Beside `--model` and `--audit_output` it takes every setting of train_round2_gradual.py. The scores go to audit.parquet
in `--output_dir`, or else beside the checkpoint's folder. A second start goes on where the first one stopped.
"""

if __name__ == "__main__":  # the imports take seconds
    from hebrew_asr.start import begin

    begin()

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import torch
import transformers
from accelerate.utils import broadcast_object_list

import train_hebrew_asr_enhanced
from hebrew_asr.command_line import help_of, parse_config, split_options
from hebrew_asr.console import Bar
from hebrew_asr.data.rows import SpeechRows, load_rows
from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation import transcription
from hebrew_asr.files import whole_or_nothing
from hebrew_asr.model import loss
from hebrew_asr.model.loading import load_processor, load_to_train
from hebrew_asr.model.loss import IGNORED_LABEL, label_nats
from hebrew_asr.model.precision import mixed_precision, runs_bf16, to_encoder
from hebrew_asr.processes import fail_together, join_processes, launch, leave_process_group, load_in_turn
from hebrew_asr.text import scoring
from hebrew_asr.text.scoring import count_errors, leaderboard_normalize
from hebrew_asr.training import resuming
from hebrew_asr.training.batches import evaluation_batches
from hebrew_asr.training.feed import ListedFeed, speech_loader
from hebrew_asr.training.run_log import RunLog
from train_hebrew_asr_enhanced import GradualUnfreezeTrainer, TrainingConfig
from train_round2_gradual import demo, round2

CODE = (__file__, train_hebrew_asr_enhanced.__file__, loss.__file__, scoring.__file__, *transcription.CODE)
BATCHES_PER_PART = 50  # of one process; an interruption loses at most so many
PART = pyarrow.schema(
    {
        "number": pyarrow.int64(),  # of the utterance among those that are audited
        "hypothesis": pyarrow.string(),  # the checkpoint's own transcription
        "nats_per_token": pyarrow.float64(),  # of the transcript and the mark of its end, given the audio
        "cer": pyarrow.float64(),  # percent, of the hypothesis against the transcript, normalised as for scoring
        "skipped": pyarrow.string(),  # why there are no scores, or ""
    }
)


def ranked(scores: pyarrow.Table) -> pyarrow.Table:
    """Adds `rank` (1: the transcript most likely to be wrong; null where skipped) and sorts by it.

    By the product of nats per token and CER: a wrong transcript surprises the model, and the model hears something
    else. Hard audio has the second, a rare spelling the first. CER counts to 100 %, so that a loop is not worse.
    """
    nats, cer = scores["nats_per_token"], pyarrow.compute.min_element_wise(scores["cer"], 100.0, skip_nulls=False)
    scores = scores.append_column("suspicion", pyarrow.compute.multiply(nats, cer))
    order = {"suspicion": "descending", "nats_per_token": "descending", "number": "ascending"}  # nulls come last
    ranks = np.arange(1, len(scores) + 1)
    skipped = ranks > len(scores) - nats.null_count
    return scores.sort_by(list(order.items())).append_column("rank", pyarrow.array(ranks, mask=skipped))


def nats_per_token(
    trainer: GradualUnfreezeTrainer, batch: dict[str, torch.Tensor], languages: list[str]
) -> list[float]:
    """Mean nats of each transcript's tokens, the mark of its end included, the language's name before it not."""
    inputs = trainer._prepare_inputs({k: tensor for k, tensor in batch.items() if not k.startswith("prompt_")})
    inputs["input_features"] = to_encoder(trainer.model, inputs["input_features"])
    with torch.no_grad(), mixed_precision(trainer.model):
        _, nats = label_nats(trainer.model, **inputs)
    counts = (inputs["labels"] != IGNORED_LABEL).sum(dim=1).tolist()
    prefixes = [len(trainer.collator.language_prefix(language)) for language in languages]
    return [mine[prefix:].mean().item() for mine, prefix in zip(nats.split(counts), prefixes, strict=True)]


def character_error_rate(text: str, hypothesis: str) -> float:
    """Percent, normalised; where nothing is left of the text it is 0 or 100."""
    text, hypothesis = leaderboard_normalize(text), leaderboard_normalize(hypothesis)
    return count_errors(text, hypothesis).cer if text else 100.0 * bool(hypothesis)


def dataset_of(trainer: GradualUnfreezeTrainer) -> SpeechDataset:
    assert isinstance(trainer.feed, ListedFeed), "a stream is not audited"
    return trainer.feed.dataset


def score(trainer: GradualUnfreezeTrainer, batches: list[list[tuple[int, int]]]) -> Iterator[list[dict]]:
    """Yields the rows of PART of each batch of (epoch, number)."""
    most = trainer.eval_batch_size * trainer.config.max_audio_length_seconds
    dealt = [[batch] for batch in batches]
    loader = speech_loader(dataset_of(trainer), dealt, lambda loaded: loaded[0], trainer.config, most)
    for batch, utterances in zip(batches, loader, strict=True):
        found = {
            number: {"number": number, "skipped": u.get("dropped", "")}
            for (_, number), u in zip(batch, utterances, strict=True)
        }
        if heard := [u for u in utterances if "dropped" not in u]:
            inputs = trainer.collator(heard, training=False)
            _, generated, _ = trainer.prediction_step(trainer.model, inputs, prediction_loss_only=False)
            hypotheses = [text for _, text in trainer.collator.read(generated)]
            nats_of_each = nats_per_token(trainer, inputs, [u["language"] for u in heard])
            for u, nats, hypothesis in zip(heard, nats_of_each, hypotheses, strict=True):
                cer = character_error_rate(u["text"], hypothesis)
                found[u["index"]] |= {"hypothesis": hypothesis, "nats_per_token": nats, "cer": cer}
        yield list(found.values())


def key(config: TrainingConfig, rows: SpeechRows) -> str:
    """Names what the scores depend on: the weights, the utterances, how they are transcribed, and the code for it."""
    folder = Path(transformers.utils.cached_file(config.model_name_or_path, "config.json")).parent
    files = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.glob("*.safetensors"))]
    names = "language eval_prefill_language generation_max_new_tokens eval_batch_size max_audio_length_seconds".split()
    code = [transformers.__version__, *(Path(file).read_text(encoding="utf-8") for file in CODE)]
    content = [files, [getattr(config, name) for name in names], rows.column("digest"), rows.column("text"), code]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=12).hexdigest()


def write_whole(table: pyarrow.Table, file: Path) -> None:
    with whole_or_nothing(file) as unfinished:
        pyarrow.parquet.write_table(table, unfinished)


def read_parts(folder: Path) -> pyarrow.Table:
    return pyarrow.concat_tables(
        [PART.empty_table(), *map(pyarrow.parquet.read_table, sorted(folder.glob("*.parquet")))]
    )


def score_what_is_left(trainer: GradualUnfreezeTrainer, folder: Path) -> int:
    """Scores this process's share of the batches that no part holds; returns how many utterances were in parts."""
    done = set(read_parts(folder)["number"].to_pylist())
    trainer.accelerator.wait_for_everyone()  # every process has read the same parts before one writes another
    config, args = trainer.config, trainer.args
    batches = evaluation_batches(
        dataset_of(trainer).rows.seconds, config.max_audio_length_seconds, trainer.eval_batch_size
    )
    mine = batches[args.process_index :: args.world_size]
    left = [batch for batch in mine if batch[0][1] not in done]
    found: list[dict] = []
    with Bar(total=sum(map(len, left)), desc="auditing", disable=trainer.run_log.hides_progress) as bar:
        for i, rows in enumerate(score(trainer, left), start=1):
            found += rows
            bar.update(len(rows))
            if i % BATCHES_PER_PART == 0 or i == len(left):
                write_whole(pyarrow.Table.from_pylist(found, PART), folder / f"{found[0]['number']}.parquet")
                found = []
    trainer.accelerator.wait_for_everyone()
    return len(done)


@dataclass
class AuditOptions:
    """What scores, and where to"""

    model: str = ""
    """The checkpoint that scores: a folder or a Hub id."""
    audit_output: str | None = None
    """Parquet file of the scores; None: audit.parquet beside the model or in output_dir."""


def settings(argv: list[str]) -> tuple[TrainingConfig, Path]:
    """The settings, with the checkpoint in the base model's place, and the file of the scores."""
    mine, others = split_options(argv, AuditOptions)
    about = f"{__doc__}\n{help_of(AuditOptions())}\n\nThe others are those of train_round2_gradual.py."
    config = parse_config(others, round2(), demo, about, of_another=True)
    given = parse_config(mine, AuditOptions())
    if not given.model:
        raise InputError("give --model, the checkpoint that scores: a folder or a Hub id")
    config.check_sources()
    beside = Path(given.model).resolve().parent if Path(given.model).is_dir() else Path("runs")
    output = Path(given.audit_output or Path(config.output_dir or beside) / "audit.parquet")
    as_it_is: dict[str, Any] = {"no_system_prob": 0.0, "prev_context_prob": 0.0, "use_waveform_augmentation": False}
    as_it_is |= {"fsdp": False, "torch_compile": False, "ema_decay": None}  # of training
    return dataclasses.replace(config, model_name_or_path=given.model, **as_it_is), output


def main(argv: list[str]) -> None:
    """Scores, ranks and writes; InputError on every rank when it cannot."""
    # 1. Processes and settings
    config, output = settings(argv)
    state = join_processes(config.process_timeout_minutes)

    # 2. Model and data: the first process of each machine reads and caches, the others find the cache
    with fail_together():
        processor = load_processor(config.model_name_or_path)
        use_bf16 = runs_bf16(state.device)
        model = load_to_train(dataclasses.replace(config, stages=[]), use_bf16)  # no weight is kept for training
    rows = load_in_turn(state, functools.partial(load_rows, config.train_sources, config, for_training=True))

    # 3. Score
    (name,) = broadcast_object_list([key(config, rows) if state.is_main_process else ""])
    parts = output.with_suffix(".parts") / name
    parts.mkdir(parents=True, exist_ok=True)
    log = RunLog(parts, state.process_index)
    arguments = resuming.training_arguments(config, parts, cpu=state.device.type == "cpu")
    trainer = GradualUnfreezeTrainer(config, arguments, model, processor, rows, rows, log, use_bf16)
    log.say(f"to audit: {len(rows)} utterances, {rows.hours:.2f} h")
    for drop in rows.dropped:
        log.say(f"  dropped of {drop.source}: {drop.utterances}, {drop.hours:.2f} h: {drop.reason}")
    done_before = score_what_is_left(trainer, parts)

    # 4. Rank, write, report
    with fail_together():
        if state.is_main_process:
            scores = read_parts(parts)
            if len(scores) != len(rows):
                raise InputError(f"{len(rows) - len(scores)} scores are not in {parts}: is it on a shared file system?")
            scores = with_texts(ranked(scores), rows, [source.path for source in config.train_sources])
            write_whole(scores, output)
            for line in report(scores, done_before):
                log.say(line)
            log.say(f"scores: {output} (its parts, in {parts.parent}, may be removed)")
    leave_process_group()


def with_texts(scores: pyarrow.Table, rows: SpeechRows, paths: list[str]) -> pyarrow.Table:
    """Puts what each line is about before its scores."""
    columns = {name: pyarrow.array(rows.column(name)) for name in "row start digest words recording text".split()}
    columns = {"source": pyarrow.array([paths[number] for number in rows.column("source")])} | columns
    results = "hypothesis nats_per_token cer rank skipped".split()
    return pyarrow.table({n: c.take(scores["number"]) for n, c in columns.items()} | {n: scores[n] for n in results})


def report(scores: pyarrow.Table, done_before: int) -> list[str]:
    """Lines for the console: what was scored, what was skipped and why, and the 20 transcripts to look at first."""
    skipped = scores.filter(pyarrow.compute.is_null(scores["rank"])).to_pylist()
    scored = len(scores) - len(skipped)
    lines = [f"audited: {scored} utterances scored, {len(skipped)} skipped ({done_before} of all at an earlier start)"]
    lines += [f"  skipped in {row['source']}: {row['skipped']}" for row in skipped]
    for row in scores.slice(0, min(20, scored)).to_pylist():
        lines += [
            f"{row['rank']:3} | {row['nats_per_token']:.2f} nats per token | {row['cer']:.0f} % CER |"
            f" {row['recording']} from {row['start']:.2f} s | row {row['row']} of {row['source']}",
            f"    transcript {row['text']}",
            f"    hypothesis {row['hypothesis']}",
        ]
    return lines


if __name__ == "__main__":
    launch(main)
