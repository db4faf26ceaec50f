"""Evaluation sets."""

import dataclasses
import json
from typing import Any

import numpy as np

from hebrew_asr.data.audio import audio_blocks, check_blocks
from hebrew_asr.data.rows import SpeechRows, counts, drop, load_rows
from hebrew_asr.data.selection import without_too_many
from hebrew_asr.data.sources import DataConfig
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation.settings import EvaluationConfig, EvaluationSet
from hebrew_asr.files import digest
from hebrew_asr.text.targets import PAST_THE_END


def load_set(one: EvaluationSet, config: EvaluationConfig) -> SpeechRows:
    settings = DataConfig(
        eval_sources=[one.source],
        max_eval_utterances=config.max_utterances,
        max_broken_share=config.max_broken_share,
        preprocessing_num_workers=max(1, config.num_workers),
    )
    try:
        rows = load_rows([dataclasses.replace(one.source, language=one.language)], settings, for_training=False)
    except InputError as error:
        raise InputError(f"{error}. {one.where}" if one.where else str(error)) from error
    return without_too_many(within_limits(rows, one, config), settings)


def within_limits(rows: SpeechRows, one: EvaluationSet, config: EvaluationConfig) -> SpeechRows:
    """Leaves out, counted by reason, what the limits do not allow; raises InputError where nothing is left."""
    shortest, longest = config.min_audio_length_seconds, config.max_audio_length_seconds
    if shortest is not None:
        rows = drop(rows, [one.source], rows.seconds < shortest, f"shorter than {shortest:g} s")
    if longest is not None:
        rows = drop(rows, [one.source], rows.seconds > longest + PAST_THE_END, f"longer than {longest:g} s")
    if config.drop_silent and one.has_speech:
        heard = (check_blocks(audio_blocks(row["audio"], row["start"], row["end"]), row["seconds"]) for row in rows)
        rows = drop(rows, [one.source], np.array([problem == "silent" for problem in heard], bool), "silent")
    if not len(rows):
        raise InputError(f"{one.source}: nothing is left within the limits: {counts(rows.dropped)}")
    return rows


def describe_set(one: EvaluationSet, rows: SpeechRows | None) -> dict[str, Any]:
    known = {"name": one.name, "path": one.source.path, "config_name": one.source.config_name}
    known |= {"split": one.source.split, "language": one.language, "kind": "speech" if one.has_speech else "non-speech"}
    if rows is None:
        return known | {"utterances": None, "hours": None, "recordings": None, "fingerprint": None}
    content = json.dumps([rows.column("digest"), rows.column("reference")]).encode()
    return known | {
        "utterances": len(rows),
        "hours": rows.hours,
        "recordings": len(set(rows.column("recording"))),
        "fingerprint": digest(content),
    }
