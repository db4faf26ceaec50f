"""Evaluation sets."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hebrew_asr.command_line import meant
from hebrew_asr.data.audio import audio_blocks, check_blocks
from hebrew_asr.data.rows import SpeechRows, counts, drop, load_rows
from hebrew_asr.data.selection import without_too_many
from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation.transcription import Decoding
from hebrew_asr.files import DEMO, digest
from hebrew_asr.text.targets import PAST_THE_END

PARQUET_COPY = "refs/convert/parquet"  # of the datasets that are scripts


@dataclass
class EvaluationSet:
    """A dataset to measure on."""

    name: str
    source: Source
    language: str = "Hebrew"
    """As Qwen3-ASR names it; `None`, its name for no speech: nobody speaks, and the right transcript is empty."""
    guarded: bool = False
    """Also check this Hebrew set for regressions."""
    where: str = ""
    """What to do where it is not to be had."""
    asked: bool = True
    """By name; one that was not may be missing."""

    @property
    def has_speech(self) -> bool:
        return self.language != "None"


LEADERBOARD = [
    EvaluationSet("eval-d1", Source("ivrit-ai/eval-d1", split="test", text_column="text")),
    EvaluationSet("whatsapp", Source("ivrit-ai/eval-whatsapp", split="test", text_column="text")),
    EvaluationSet("saspeech", Source("upai-inc/saspeech", split="test", text_column="text")),
    EvaluationSet("fleurs", Source("google/fleurs", "he_il", PARQUET_COPY, "test", "transcription")),
    EvaluationSet(
        "common-voice",
        Source("mozilla-foundation/common_voice_17_0", "he", PARQUET_COPY, "test", "sentence"),
        where="Common Voice left the Hub in 2025: get its Hebrew archive from Mozilla Data Collective"
        " (datacollective.mozillafoundation.org), unpack it, and give --sets common-voice=FOLDER, the one with clips/"
        " and test.tsv",
    ),
    EvaluationSet("kan", Source("imvladikon/hebrew_speech_kan", split="validation", text_column="sentence")),
]
DEMO_SETS = [
    EvaluationSet("heldout", Source(str(DEMO / "heldout"), split="test")),
    EvaluationSet("heldout-noisy", Source(str(DEMO / "heldout_noisy"), split="test")),
    EvaluationSet("english", Source(str(DEMO / "english"), split="test"), language="English"),
    EvaluationSet("non-speech", Source(str(DEMO / "nonspeech"), split="test"), language="None"),
]
SPEC = "description of Round 2: "
QUOTED = [  # WER in percent, as others report it; nothing here was measured by this command
    {"name": "Round 1", "wer": 12.3, "source": SPEC + "eval-d1 or its equivalent"},
    {"name": "Whisper large v3", "wer": 15.0, "source": SPEC + "about 15, set not named"},
    {"name": "Google Cloud Speech", "wer": 12.0, "source": SPEC + "about 12, set not named"},
    {"name": "best known, eval-d1", "wer": 5.1, "source": SPEC + "leaderboard of ivrit.ai"},
    {"name": "best known, WhatsApp", "wer": 7.2, "source": SPEC + "leaderboard of ivrit.ai"},
    {"name": "best known, Common Voice", "wer": 14.9, "source": SPEC + "leaderboard of ivrit.ai"},
    {"name": "best known, FLEURS", "wer": 17.4, "source": SPEC + "leaderboard of ivrit.ai"},
]


@dataclass
class EvaluationConfig:
    """What is measured, and how."""

    models: list[str] = field(default_factory=list)
    """Folders, Hub ids or endpoints; the first is the one in question, the others are compared with it."""
    sets: list[EvaluationSet] = field(default_factory=lambda: list(LEADERBOARD))
    decoding: Decoding = field(default_factory=Decoding)
    score: list[str] = field(default_factory=list)
    """Files of transcripts made elsewhere, in place of models or beside them."""
    prompt_forms: bool = False
    """Qwen3-ASR is measured under each of the prompts that engines write, in place of one."""
    decodings: bool = False
    """Qwen3-ASR is measured greedy and with several numbers of beams, in place of one of them."""
    max_utterances: int | None = None
    """Of each set, spread evenly over it; None: all."""
    max_broken_share: float = 0.05
    """More unreadable rows than this share of a set end the evaluation before it starts."""
    min_audio_length_seconds: float | None = None
    max_audio_length_seconds: float | None = None
    """Utterances out of these lengths are left out of every set; None: none are."""
    drop_silent: bool = False
    """Leave silent recordings out of sets with speech, as training does."""
    max_wer_rise: float | None = None
    """Points of WER that the model in question may be worse than the first it is compared with, on sets in other
    languages and guarded ones, and points of share that it may name the language, or answer silence with silence,
    less often. None: no gate; what was forgotten is reported."""
    quoted: list[dict[str, Any]] = field(default_factory=lambda: list(QUOTED))
    output_dir: str = "evaluation"
    num_workers: int = 4
    update_card: bool = False
    """Write the figures into the model card of the first model, a local folder."""
    process_timeout_minutes: int = 600


def read_set(text: str, known: dict[str, EvaluationSet]) -> EvaluationSet:
    if not text.startswith("{"):
        name, is_local, folder = text.partition("=")
        if name not in known:
            own = f'{{"name": "{Path(name).name}", "path": "{name}"}}'
            hint = meant(name, list(known)) or f", or one of your own as JSON: {own}"
            raise InputError(f"no set {name!r}: there are {', '.join(known)}{hint}")
        if not is_local:
            return known[name]
        source = dataclasses.replace(known[name].source, path=folder, config_name=None, revision=None)
        return dataclasses.replace(known[name], source=source, where="")
    try:
        given = json.loads(text)
        names = ["name", *(part.name for part in dataclasses.fields(Source)), "guarded"]
        if unknown := [key for key in given if key not in names]:
            near = meant(unknown[0], names)
            raise InputError(f"{text} is no set: there is no {unknown[0]!r}{near}; it has {', '.join(names)}")
        if lost := [key for key in ("name", "path") if key not in given]:
            raise InputError(f"{text} is no set: it needs {' and '.join(lost)}")
        language = str(given.pop("language", "Hebrew")).capitalize()  # as Qwen3-ASR writes them, null too
        guarded = bool(given.pop("guarded", False))
        one = EvaluationSet(given.pop("name"), Source(**given), language, guarded)
        if not isinstance(one.name, str) or not isinstance(one.source.path, str):
            raise TypeError("name and path must be texts")
        return one
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{text} is no set: {error}") from error


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
