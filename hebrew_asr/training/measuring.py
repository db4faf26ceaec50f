"""The evaluation while training: batches are transcribed, and their counts pooled over the processes."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from accelerate.utils import gather_object

from hebrew_asr.data.rows import SpeechRows
from hebrew_asr.model.generation import as_it_fits
from hebrew_asr.text.scoring import score
from hebrew_asr.training.run_log import RunLog


class Output(NamedTuple):
    """What the model made of one utterance."""

    hypothesis: str
    language: str | None
    nats: float
    """Mean per target token of the batch that the utterance was in."""
    tokens: int
    """Of the target; 0 where the utterance does not fit the memory."""


DOES_NOT_FIT = Output("", "", 0.0, 0)
Heard = list[tuple[int, Output]]  # the row of each utterance, and its output


def transcribe_batches(
    batches: Iterable[tuple[list[int], dict[str, torch.Tensor]]],
    transcribe: Callable[[dict[str, torch.Tensor]], list[Output]],
) -> tuple[Heard, int]:
    """Transcribes batches of (rows, tensors), in halves where one does not fit the memory; counts the halvings."""
    heard: Heard = []
    halved = 0
    for rows, batch in batches:
        parts = as_it_fits(transcribe, batch)
        outputs = [output for count, part in parts for output in part or [DOES_NOT_FIT] * count]
        heard += zip(rows, outputs, strict=True)
        halved += len(parts) - 1
    return heard, halved


def pool(
    heard: Heard, halved: int, rows: SpeechRows, language: str | None, run_log: RunLog
) -> tuple[dict[str, float], list[str], list[str]]:
    """A set's metrics, its references and the model's hypotheses; the same on every process.

    Args:
        heard: what this process has transcribed.
        language: of the run, which a row without one of its own should be heard as; None: it is not counted.
    """
    heard, (halved, *others) = sorted(gather_object(heard)), gather_object([halved])
    texts = rows.column("reference")
    references, hypotheses = [texts[row] for row, _ in heard], [output.hypothesis for _, output in heard]
    failed = [row for row, output in heard if not output.tokens]
    run_log.note_full_memory(halved + sum(others), [rows[row]["recording"] for row in failed])
    tokens = sum(output.tokens for _, output in heard)
    metrics = {"loss": sum(output.nats * output.tokens for _, output in heard) / max(1, tokens)}
    names = rows.column("recording")
    metrics |= score(references, hypotheses, [names[row] for row, _ in heard])
    metrics["out_of_memory"] = len(failed)
    if language is not None:
        expected = [own or language for own in rows.column("language")]
        metrics["other_language"] = sum(output.language != expected[row] for row, output in heard)
    return metrics, references, hypotheses
