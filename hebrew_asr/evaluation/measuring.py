"""Transcribe a set with a model and count its errors."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from hebrew_asr.data.rows import SpeechRows
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation.settings import EvaluationSet
from hebrew_asr.evaluation.transcription import Transcribed, Transcript
from hebrew_asr.text import error_classes
from hebrew_asr.text.intervals import Interval, by_recording, compare, error_rate_interval, verdict
from hebrew_asr.text.scoring import ErrorCounts, count_utterance, repeats

FORGOTTEN = 5.0  # points: what is worse by more is called forgotten


def measure(
    model: str, one: EvaluationSet, rows: SpeechRows, written: Transcribed
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The results of one model on one set, and a record of each utterance."""
    names, seconds = rows.column("recording"), rows.seconds.tolist()
    pairs = zip(rows.column("reference"), written.transcripts, strict=True)
    records = [
        record(reference, transcript)
        | {"model": model, "set": one.name, "number": i, "language": one.language}
        | {"recording": names[i], "seconds": seconds[i], "snr_db": written.snr_db[i]}
        for i, (reference, transcript) in enumerate(pairs)
    ]
    found = summarize(records, one)
    found["dropped"] = {drop.reason: drop.utterances for drop in rows.dropped}
    found["audio_seconds_per_second"] = written.audio_seconds_per_second
    found["peak_memory_gb"] = written.peak_memory_gb
    return {"model": model, "set": one.name, "reason": None} | found, records


def record(reference: str, transcript: Transcript) -> dict[str, Any]:
    """One utterance: both texts, both normalised, counts of errors, and the alignment as JSON."""
    scored = count_utterance(reference, transcript.text)
    counts, raw = scored.counts or ErrorCounts(), scored.raw_counts or ErrorCounts()
    classes, chunks = {}, []
    if scored.counts:
        classes, chunks = error_classes.read_errors(scored.reference, scored.hypothesis)
    return {
        "reference": reference,
        "hypothesis": transcript.text,
        "detected_language": transcript.language,
        "reference_normalized": scored.reference,
        "hypothesis_normalized": scored.hypothesis,
        **dataclasses.asdict(counts),
        "raw_words": raw.words,
        "raw_errors": raw.substitutions + raw.deletions + raw.insertions,
        "repetition": repeats(transcript.text) and not repeats(reference),
        "truncated": transcript.truncated,
        "error_classes": json.dumps(classes),
        "chunks": json.dumps([[c.kind, c.reference, c.hypothesis, c.error_class] for c in chunks], ensure_ascii=False),
    }


def summarize(records: list[dict[str, Any]], one: EvaluationSet) -> dict[str, Any]:
    """Rates with their intervals, and what went wrong, of the records of one model and set."""
    named = [r for r in records if r["detected_language"] is not None]  # "" is a language not named
    answered = sum(bool(r["hypothesis_normalized"]) for r in records)
    right = sum(r["detected_language"] == one.language for r in named)
    found = {
        "utterances": len(records),
        "hours": sum(r["seconds"] for r in records) / 3600,
        "failures": {
            "empty": None if not one.has_speech else len(records) - answered,
            "repetition": sum(r["repetition"] for r in records),
            "other_language": len(named) - right if named and one.has_speech else None,
            "truncated": sum(cut) if (cut := [r["truncated"] for r in records if r["truncated"] is not None]) else None,
            "text_on_non_speech": None if one.has_speech else answered,
        },
        "repetitions_per_1000": 1000 * sum(r["repetition"] for r in records) / len(records),
        "language_accuracy": 100 * right / len(named) if named and one.has_speech else None,
        "none_accuracy": None if one.has_speech else 100 * (1 - answered / len(records)),
    }
    scored = [r for r in records if r["words"]]
    found["empty_references"] = len(records) - len(scored) if one.has_speech else 0
    if not one.has_speech:
        return found | {"wer": None, "cer": None, "recordings": None, "wer_raw": None, "wil": None}
    if not scored:
        raise InputError(f"{one.name}: nothing of its references is left after normalisation")
    total = ErrorCounts()
    for r in scored:
        total += ErrorCounts(*(r[one.name] for one in dataclasses.fields(ErrorCounts)))
    errors, words = counted(scored)
    recordings = clusters(scored)
    classes = [json.loads(r["error_classes"]) for r in scored]
    return found | {
        "words": total.words,
        "substitutions": total.substitutions,
        "deletions": total.deletions,
        "insertions": total.insertions,
        "wer": limits(error_rate_interval(errors, words, recordings)),
        "recordings": len(set(recordings)) if recordings else None,  # that the intervals are over; else utterances
        "cer": limits(
            error_rate_interval([r["character_edits"] for r in scored], [r["characters"] for r in scored], recordings)
        ),
        "wer_raw": 100 * sum(r["raw_errors"] for r in scored) / sum(r["raw_words"] for r in scored),
        "wil": total.wil,
        "error_classes": {name: sum(c[name] for c in classes) for name in error_classes.CLASSES},
    }


def limits(interval: Interval) -> dict[str, float]:
    return {name: float(value) for name, value in dataclasses.asdict(interval).items()}


def counted(records: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    errors = [r["substitutions"] + r["deletions"] + r["insertions"] for r in records]
    return errors, [r["words"] for r in records]


def clusters(records: list[dict[str, Any]]) -> Sequence[str] | None:
    return by_recording([record["recording"] for record in records])


def compare_models(records: dict[tuple[str, str], list[dict]], models: list[str], name: str) -> list[dict[str, Any]]:
    """The first model against each of the others on one set, utterance by utterance."""
    found = []
    for other in models[1:]:
        if (models[0], name) not in records or (other, name) not in records:
            continue
        first = [r for r in records[models[0], name] if r["words"]]
        second = [r for r in records[other, name] if r["words"]]
        if not first:
            continue
        (errors, words), (others, _) = counted(first), counted(second)
        result = compare(errors, others, words, clusters(first))
        found.append(
            {"first": models[0], "second": other, "set": name, "difference": limits(result.difference)}
            | {"probability_first_better": float(result.first_better), "verdict": verdict(result, models[0], other)}
            | {"more_than_noise": bool(result.more_than_noise)}
        )
    return found


def forgetting_gates(
    results: list[dict[str, Any]], models: list[str], sets: list[EvaluationSet], limit: float | None
) -> list[dict[str, Any]]:
    """The first model against the second on what it was not tuned to: other languages, silence, and guarded sets.

    Without a limit `passed` says whether it is at most `FORGOTTEN` points worse.
    """
    measured = {(r["model"], r["set"]): r for r in results if r["reason"] is None}
    gates = []
    for one in sets:
        if len(models) < 2 or not one.is_gate or not {(m, one.name) for m in models[:2]} <= set(measured):
            continue
        after, before = (measured[model, one.name] for model in models[:2])
        figures = {"WER": (before["wer"], after["wer"], 1)}
        if after["language_accuracy"] is not None:  # Whisper, or a model that is given the language, never names one
            figures["language named right"] = (before["language_accuracy"], after["language_accuracy"], -1)
        figures["no text where nobody speaks"] = (before["none_accuracy"], after["none_accuracy"], -1)
        for name, (old, new, sign) in figures.items():
            if old is None:
                continue
            if new is None:
                gates.append(
                    {"set": one.name, "name": f"{one.name}: {name}", "passed": False}
                    | {"detail": "measured before, not after"}
                )
                continue
            old, new = (value["value"] if isinstance(value, dict) else value for value in (old, new))
            worse = sign * (new - old)
            allowed = "" if limit is None else f", at most {limit:g} points worse allowed"
            gates.append(
                {"set": one.name, "name": f"{one.name}: {name}"}
                | {"passed": worse <= (FORGOTTEN if limit is None else limit)}
                | {"detail": f"{old:.1f} % → {new:.1f} %{allowed}"}
            )
    return gates
