"""Measures checkpoints: error rates with intervals, what went wrong, what was forgotten, how fast.

    uv run evaluate_hebrew_asr.py --model runs/NAME/final_model --compare Qwen/Qwen3-ASR-1.7B-hf
    uv run torchrun --nproc_per_node=8 evaluate_hebrew_asr.py --model OWNER/NAME --sets eval-d1 whatsapp
    uv run evaluate_hebrew_asr.py --score transcripts.jsonl         a {"reference": …, "hypothesis": …} a line
    uv run evaluate_hebrew_asr.py --demo                            the demo's checkpoints and sets, no GPU

`--output_dir` gets results.json, utterances.parquet, table.md and evaluation.html. Transcripts are kept there too: the
same command goes on where it was interrupted. The exit status is not 0 when something could not be measured, or when
more was forgotten than `--max_wer_rise` allows.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from accelerate.utils import broadcast_object_list

import hebrew_errors
import train_hebrew_asr_enhanced as training
from evaluation_page import markdown_table, write_page
from hebrew_audio import AudioError, decode_audio
from hebrew_corpora import DataConfig, InputError, Source, SpeechRows, digest, load_rows, without_too_many
from hebrew_scoring import ErrorCounts, count_utterance, leaderboard_normalize, repeats
from intervals import MIN_RECORDINGS, Interval, compare, error_rate_interval, verdict
from transcription import (
    Decoding,
    Transcribed,
    Transcript,
    key,
    load_speech_model,
    read_transcripts,
    transcribe_set,
)

DEMO = Path(__file__).parent / "demo"
PARQUET_COPY = "refs/convert/parquet"  # of the datasets that are scripts


@dataclass
class EvaluationSet:
    """A dataset to measure on."""

    name: str
    source: Source
    language: str = "Hebrew"
    """As Qwen3-ASR names it; `None`, its name for no speech: nobody speaks, and the right transcript is empty."""
    guarded: bool = False
    """A gate although it is in Hebrew: what was to stay as good as it was while something else was learned."""

    @property
    def has_speech(self) -> bool:
        return self.language != "None"


LEADERBOARD = [
    EvaluationSet("eval-d1", Source("ivrit-ai/eval-d1", split="test", text_column="text")),
    EvaluationSet("whatsapp", Source("ivrit-ai/eval-whatsapp", split="test", text_column="text")),
    EvaluationSet("saspeech", Source("upai-inc/saspeech", split="test", text_column="text")),
    EvaluationSet("fleurs", Source("google/fleurs", "he_il", PARQUET_COPY, "test", "transcription")),
    EvaluationSet(
        "common-voice", Source("mozilla-foundation/common_voice_17_0", "he", PARQUET_COPY, "test", "sentence")
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
    """Folders or Hub ids; the first is the one in question, the others are compared with it."""
    sets: list[EvaluationSet] = field(default_factory=lambda: list(LEADERBOARD))
    decoding: Decoding = field(default_factory=Decoding)
    score: list[str] = field(default_factory=list)
    """Files of transcripts made elsewhere, in place of models."""
    max_utterances: int | None = None
    """Of each set, spread evenly over it; None: all."""
    max_wer_rise: float | None = 5.0
    """Points of WER that the model in question may be worse than the first it is compared with, on sets in other
    languages and guarded ones, and points of share that it may name the language, or answer silence with silence,
    less often."""
    quoted: list[dict[str, Any]] = field(default_factory=lambda: list(QUOTED))
    output_dir: str = "evaluation"
    num_workers: int = 4
    update_card: bool = False
    """Write the figures into the model card of the first model, a local folder."""
    process_timeout_minutes: int = 600


def parse(argv: list[str]) -> EvaluationConfig:
    """Reads the command line; raises InputError."""
    parser = argparse.ArgumentParser("evaluate_hebrew_asr.py", allow_abbrev=False)
    parser.add_argument("--model", help="the checkpoint to measure: a folder or a Hub id")
    parser.add_argument("--compare", nargs="+", default=[], help="checkpoints to compare it with")
    names = ", ".join(one.name for one in LEADERBOARD)
    parser.add_argument(
        "--sets",
        nargs="+",
        help=f'of {names}; or one of your own, as JSON: {{"name": "calls", "path": "data/calls"}}, with'
        ' any field of Source, "language" where it is not Hebrew ("None": nobody speaks), and "guarded": true to make'
        " it a gate",
    )
    parser.add_argument("--score", nargs="+", default=[], help="JSONL files of transcripts, instead of a model")
    parser.add_argument("--demo", action="store_true", help="the demo's checkpoints and sets")
    parser.add_argument("--output_dir")
    parser.add_argument("--max_utterances", type=int, help="of each set, for a quick look")
    parser.add_argument(
        "--max_wer_rise",
        type=lambda text: None if text == "none" else float(text),
        default=5.0,
        help="points, or none; see EvaluationConfig",
    )
    parser.add_argument("--num_workers", type=int, default=4)
    parser.add_argument("--update_card", action="store_true", help="write the figures into the model's card")
    for one in dataclasses.fields(Decoding):
        kinds = {int: int, int | None: int, float: float}
        parser.add_argument(f"--{one.name}", type=kinds.get(one.type, str), default=one.default)
    given = parser.parse_args(argv)
    if bool(given.score) == bool(given.model or given.demo):
        raise InputError("give either --model (or --demo), or --score")
    if given.score and (given.update_card or given.compare or given.sets or given.max_utterances):
        raise InputError("--score takes files alone: leave --compare, --sets, --max_utterances and --update_card out")
    if given.update_card and (given.max_utterances or not (Path(given.model or "") / "README.md").is_file()):
        raise InputError("--update_card needs a local folder with a README.md as --model, and whole sets")
    check_numbers(given)
    known = {one.name: one for one in (DEMO_SETS if given.demo else LEADERBOARD)}
    config = EvaluationConfig(
        models=[given.model or str(DEMO / "tuned"), *(given.compare or ([str(DEMO / "base")] if given.demo else []))]
        if not given.score
        else [],
        sets=[read_set(name, known) for name in given.sets] if given.sets else list(known.values()),
        decoding=Decoding(**{one.name: getattr(given, one.name) for one in dataclasses.fields(Decoding)}),
        score=given.score,
        max_utterances=given.max_utterances,
        max_wer_rise=given.max_wer_rise,
        quoted=[] if given.demo or given.score else list(QUOTED),
        num_workers=0 if given.demo else given.num_workers,
        update_card=given.update_card,
    )
    names = [one.name for one in config.sets]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"two sets have the name {', '.join(twice)}: give each its own")
    meaning = json.dumps(dataclasses.asdict(config), default=str).encode()
    config.output_dir = given.output_dir or f"runs/evaluation-{digest(meaning)[:10]}"
    return config


def check_numbers(given: argparse.Namespace) -> None:
    """Raises InputError for a number that cannot mean anything."""
    least = {"longest_seconds": 1, "batch_seconds": 0, "num_beams": 1, "num_workers": 0, "max_new_tokens": 1}
    least |= {"max_utterances": 1, "max_wer_rise": 0, "temperature": 0}
    for name, low in least.items():
        value = getattr(given, name)
        if value is not None and not (low <= value < math.inf):
            raise InputError(f"{name} must be a number from {low} up, got {value}")
    if given.dtype not in ("auto", "bfloat16", "float32"):
        raise InputError(f"dtype is {given.dtype!r}, must be auto, bfloat16 or float32")


def read_set(text: str, known: dict[str, EvaluationSet]) -> EvaluationSet:
    if not text.startswith("{"):
        if text not in known:
            raise InputError(f"no set {text!r}: there are {', '.join(known)}, or one of your own as JSON")
        return known[text]
    try:
        given = json.loads(text)
        language = str(given.pop("language", "Hebrew")).capitalize()  # as Qwen3-ASR writes them, null too
        guarded = bool(given.pop("guarded", False))
        one = EvaluationSet(given.pop("name"), Source(**given), language, guarded)
        if not isinstance(one.name, str) or not isinstance(one.source.path, str):
            raise TypeError("name and path must be texts")
        return one
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{text} is no set: {error!r}") from error


# ----------------------------------------------------------------------------------------------------------- Measuring


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
        classes, chunks = hebrew_errors.read_errors(scored.reference, scored.hypothesis)
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
        return found | {"wer": None, "cer": None, "wer_by_recording": None, "wer_raw": None, "wil": None}
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
        "wer": limits(error_rate_interval(errors, words)),
        "wer_by_recording": limits(error_rate_interval(errors, words, recordings)) if recordings else None,
        "cer": limits(
            error_rate_interval([r["character_edits"] for r in scored], [r["characters"] for r in scored], recordings)
        ),
        "wer_raw": 100 * sum(r["raw_errors"] for r in scored) / sum(r["raw_words"] for r in scored),
        "wil": total.wil,
        "error_classes": {name: sum(c[name] for c in classes) for name in hebrew_errors.CLASSES},
    }


def limits(interval: Interval) -> dict[str, float]:
    return {name: float(value) for name, value in dataclasses.asdict(interval).items()}


def counted(records: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    errors = [r["substitutions"] + r["deletions"] + r["insertions"] for r in records]
    return errors, [r["words"] for r in records]


def clusters(records: list[dict[str, Any]]) -> list[str] | None:
    """The recordings, where several utterances share one and there are enough of them for an interval."""
    names = [r["recording"] for r in records]
    return names if MIN_RECORDINGS <= len(set(names)) < len(names) else None


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
    """The first model against the second on what it was not tuned to: other languages, silence, and guarded sets."""
    measured = {(r["model"], r["set"]): r for r in results if r["reason"] is None}
    gates = []
    for one in sets:
        is_gate = one.guarded or one.language != "Hebrew"
        if len(models) < 2 or not is_gate or not {(m, one.name) for m in models[:2]} <= set(measured):
            continue
        after, before = (measured[model, one.name] for model in models[:2])
        figures = {"WER": (before["wer"], after["wer"], 1)}
        figures["language named right"] = (before["language_accuracy"], after["language_accuracy"], -1)
        figures["no text where nobody speaks"] = (before["none_accuracy"], after["none_accuracy"], -1)
        for name, (old, new, sign) in figures.items():
            if old is None:
                continue
            if new is None:
                gates.append({"name": f"{one.name}: {name}", "passed": False, "detail": "measured before, not after"})
                continue
            old, new = (value["value"] if isinstance(value, dict) else value for value in (old, new))
            worse = sign * (new - old)
            allowed = "no limit was set" if limit is None else f"at most {limit:g} points worse allowed"
            gates.append(
                {"name": f"{one.name}: {name}", "passed": limit is None or worse <= limit}
                | {"detail": f"{old:.1f} % → {new:.1f} %, {allowed}"}
            )
    return gates


# ------------------------------------------------------------------------------------------------------------- Writing

UTTERANCE = pyarrow.schema(
    {
        **{name: pyarrow.string() for name in ("model", "set", "language", "recording", "reference", "hypothesis")},
        **{"number": pyarrow.int64(), "seconds": pyarrow.float64(), "snr_db": pyarrow.float64()},
        **{n: pyarrow.string() for n in ("detected_language", "reference_normalized", "hypothesis_normalized")},
        **{one.name: pyarrow.int64() for one in dataclasses.fields(ErrorCounts)},
        **{name: pyarrow.int64() for name in ("raw_words", "raw_errors")},
        **{name: pyarrow.bool_() for name in ("repetition", "truncated")},
        **{name: pyarrow.string() for name in ("error_classes", "chunks")},
    }
)


def write_files(
    folder: Path, results: dict[str, Any], records: list[dict], audio: Callable[[str, int], np.ndarray | None]
) -> None:
    table = pyarrow.Table.from_pylist(records, UTTERANCE)
    pyarrow.parquet.write_table(table, folder / "utterances.parquet")
    content = json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False)
    (folder / "results.json").write_text(content + "\n", encoding="utf-8")
    (folder / "table.md").write_text(markdown_table(results), encoding="utf-8")
    write_page(folder / "evaluation.html", results, table, audio)


def card_results(results: dict[str, Any], model: str) -> list[huggingface_hub.EvalResult]:
    """The first model's rates in the Hub's own format for evaluations."""
    sets = {one["name"]: one for one in results["sets"]}
    return [
        huggingface_hub.EvalResult(
            task_type="automatic-speech-recognition",
            dataset_type=sets[found["set"]]["path"],
            dataset_name=found["set"],
            dataset_config=sets[found["set"]]["config_name"],
            dataset_split=sets[found["set"]]["split"],
            metric_type=metric,
            metric_value=round(found[metric]["value"], 2),
        )
        for found in results["results"]
        if found["model"] == model and found["reason"] is None and found["wer"]
        for metric in ("wer", "cer")
    ]


def update_card(folder: Path, results: dict[str, Any], model: str) -> None:
    """Puts the figures into a model card's metadata, and the table at its end, in place of an earlier one."""
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    card.data.eval_results, card.data.model_name = card_results(results, model), model
    before, _, after = card.text.partition("\n## Evaluation\n")
    _, next_heading, rest = after.partition("\n## ")
    table = f"\n\n## Evaluation\n\n{markdown_table(results)}"
    card.text = before.rstrip("\n") + table + next_heading + rest
    card.save(folder / "README.md")


def lines_of(results: dict[str, Any]) -> list[str]:
    """What the console shows at the end."""
    lines = [markdown_table(results)]
    lines += [
        f"left out of {found['set']}: {count} × {reason}"
        for found in results["results"]
        if found["reason"] is None and found["model"] == results["models"][0]["name"]
        for reason, count in found["dropped"].items()
    ]
    lines += [f"{one['set']}: {one['verdict']}" for one in results["comparisons"]]
    lines += [f"{'passed' if g['passed'] else 'FAILED'}: {g['name']}, {g['detail']}" for g in results["gates"]]
    return lines


# ---------------------------------------------------------------------------------------------------------------- Main


def display_names(models: list[str]) -> list[str]:
    """Short names, each only once: a Hub id as it is, a folder by its name and, where needed, its parents'."""
    names = []
    for model in models:
        parts = Path(model).resolve().parts if Path(model).exists() else (model,)
        take = 2 if parts[-1] == "final_model" else 1
        while (name := "/".join(parts[-take:])) in names and take < len(parts):
            take += 1
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names


def load_set(one: EvaluationSet, config: EvaluationConfig) -> SpeechRows:
    settings = DataConfig(
        eval_sources=[one.source],
        max_eval_utterances=config.max_utterances,
        preprocessing_num_workers=max(1, config.num_workers),
    )
    rows = load_rows([dataclasses.replace(one.source, language=one.language)], settings, for_training=False)
    return without_too_many(rows, settings)


@contextlib.contextmanager
def transcription_problems():
    """Turns what one set can fail by, after it was loaded, into one message."""
    try:
        yield
    except (AudioError, ValueError, torch.OutOfMemoryError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"transcribing failed: {lines[-1]}") from error


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


def versions() -> dict[str, str]:
    packages = "torch transformers datasets jiwer numpy soundfile soxr accelerate".split()
    return {package: importlib.metadata.version(package) for package in packages}


def main(config: EvaluationConfig) -> None:
    """Measures every model on every set; InputError at the end when something could not be, or a gate failed."""
    # 1. Processes and folder
    cpu = not torch.cuda.is_available()
    state = accelerate.PartialState(cpu=cpu, timeout=timedelta(minutes=config.process_timeout_minutes))
    training.quiet_libraries(state.is_main_process)
    (folder,) = map(Path, broadcast_object_list([config.output_dir]))  # the time in it is the first process's
    with training.together():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror}") from error

    # 2. Sets: one that cannot be read does not stop the others
    rows: dict[str, SpeechRows] = {}
    reasons: dict[tuple[str | None, str], str] = {}
    for one in config.sets:
        try:
            rows[one.name] = training.load_in_turn(state, lambda one=one: load_set(one, config))
        except InputError as error:
            reasons[None, one.name] = str(error)

    # 3. Models, one after another
    names, dtypes, transcribed = display_names(config.models), {}, {}
    for path, name in zip(config.models, names, strict=True):
        try:
            with training.together():
                model = load_speech_model(path, config.decoding, state.device)
        except InputError as error:
            reasons |= {(name, one.name): str(error) for one in config.sets}
            continue
        dtypes[name] = model.dtype
        for one in config.sets:
            if one.name not in rows:
                continue
            (done,) = broadcast_object_list([key(path, model.dtype, config.decoding, rows[one.name])])
            parts = folder / "transcripts" / done
            parts.mkdir(parents=True, exist_ok=True)
            state.wait_for_everyone()
            if state.is_main_process:
                print(f"{name} on {one.name}: {len(rows[one.name])} utterances", flush=True)
            try:
                with training.together(), transcription_problems():
                    transcribe_set(
                        model,
                        rows[one.name],
                        config.decoding,
                        parts,
                        state.process_index,
                        state.num_processes,
                        config.num_workers,
                        hides_progress=not state.is_main_process,
                    )
                transcribed[name, one.name] = parts
            except InputError as error:
                reasons[name, one.name] = str(error)
        del model

    # 4. Score, compare, write: the first process
    with training.together():
        if state.is_main_process:
            report(config, folder, names, dtypes, rows, transcribed, reasons)
    training.leave_process_group()


def report(
    config: EvaluationConfig,
    folder: Path,
    names: list[str],
    dtypes: dict[str, str],
    rows: dict[str, SpeechRows],
    transcribed: dict[tuple[str, str], Path],
    reasons: dict[tuple[str | None, str], str],
) -> None:
    """Writes the files and raises InputError for what was asked for and not measured, and for failed gates."""
    found, records = [], {}
    for name in names:
        for one in config.sets:
            reason = reasons.get((None, one.name)) or reasons.get((name, one.name))
            if reason is None:
                try:
                    written = read_transcripts(transcribed[name, one.name], len(rows[one.name]))
                    result, mine = measure(name, one, rows[one.name], written)
                    found.append(result)
                    records[name, one.name] = mine
                    continue
                except InputError as error:
                    reason = str(error)
            found.append({"model": name, "set": one.name, "reason": reason})
    decoding = config.decoding
    how = "greedy" if decoding.num_beams == 1 else f"{decoding.num_beams} beams"
    how += f", sampled at temperature {decoding.temperature:g}" if decoding.temperature else ""
    results = {
        "created": time.strftime("%Y-%m-%d"),
        "settings": dataclasses.asdict(config) | {"confidence": 0.95},
        "versions": versions(),
        "sets": [describe_set(one, rows.get(one.name)) for one in config.sets],
        "models": [
            {"name": name, "path": path, "language": decoding.language or "free", "decoding": how}
            | {"dtype": dtypes.get(name)}
            for path, name in zip(config.models, names, strict=True)
        ],
        "results": found,
        "comparisons": [c for one in config.sets for c in compare_models(records, names, one.name)],
        "quoted": config.quoted,
        "gates": forgetting_gates(found, names, config.sets, config.max_wer_rise),
        "error_class_rules": hebrew_errors.CLASSES,
    }

    def audio(name: str, number: int) -> np.ndarray | None:
        row = rows[name][number]
        try:
            return decode_audio(row["audio"], row["start"], row["end"])
        except AudioError:
            return None

    write_files(folder, results, [r for mine in records.values() for r in mine], audio)
    conclude(config, folder, results)


def conclude(config: EvaluationConfig, folder: Path, results: dict[str, Any]) -> None:
    """Says what came out; raises InputError for what did not."""
    if config.update_card:
        card = Path(config.models[0]) / "README.md"
        if not card.exists():
            raise InputError(f"--update_card: {card} does not exist")
        update_card(card.parent, results, results["models"][0]["name"])
    for line in lines_of(results):
        print(line, flush=True)
    print(f"written: {folder}/evaluation.html, results.json, utterances.parquet, table.md", flush=True)
    missing = [f"{r['model']} on {r['set']} ({r['reason']})" for r in results["results"] if r["reason"]]
    failed = [f"{gate['name']} ({gate['detail']})" for gate in results["gates"] if not gate["passed"]]
    problems = [f"not measured: {one}" for one in missing] + [f"forgotten: {one}" for one in failed]
    if problems:
        raise InputError("; ".join(problems))


# ----------------------------------------------------------------------------------------- Transcripts made elsewhere


def score_files(config: EvaluationConfig) -> None:
    """Scores JSONL files of pairs; several must have the same references, and are compared."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    names = display_names(config.score)
    one = EvaluationSet("transcripts", Source(config.score[0]))
    found, records, references = [], {}, None
    for path, name in zip(config.score, names, strict=True):
        pairs = read_pairs(Path(path))
        if references not in (None, [pair["reference"] for pair in pairs]):
            raise InputError(f"{path} has other references than {config.score[0]}: they cannot be compared")
        references = [pair["reference"] for pair in pairs]
        mine = [
            record(pair["reference"], Transcript(pair["hypothesis"], pair.get("language"), truncated=None))
            | {"model": name, "set": one.name, "number": i, "language": one.language, "snr_db": None}
            | {"recording": str(pair.get("recording") or i), "seconds": pair["seconds"]}
            for i, pair in enumerate(pairs)
        ]
        found.append({"model": name, "set": one.name, "reason": None} | summarize(mine, one))
        found[-1] |= {"dropped": {}, "audio_seconds_per_second": None, "peak_memory_gb": None}
        records[name, one.name] = mine
    known = describe_set(one, None) | {"utterances": len(references)}
    results = {
        "created": time.strftime("%Y-%m-%d"),
        "settings": dataclasses.asdict(config) | {"confidence": 0.95},
        "versions": versions(),
        "sets": [known],
        "models": [
            {"name": name, "path": path, "language": "free", "decoding": "elsewhere", "dtype": None}
            for path, name in zip(config.score, names, strict=True)
        ],
        "results": found,
        "comparisons": compare_models(records, names, one.name),
        "quoted": [],
        "gates": [],
        "error_class_rules": hebrew_errors.CLASSES,
    }
    write_files(folder, results, [r for mine in records.values() for r in mine], lambda name, number: None)
    conclude(config, folder, results)


def read_pairs(file: Path) -> list[dict[str, Any]]:
    """Reads pairs; raises InputError that names the line."""
    pairs = []
    try:
        lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            pair = json.loads(line)
            texts = [pair["reference"], pair["hypothesis"], pair.get("language") or ""]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("reference, hypothesis and language must be texts")
            "".join(texts).encode()  # refuses half a surrogate pair
            pair["seconds"] = float(pair.get("seconds") or 0)
            if not math.isfinite(pair["seconds"]):
                raise ValueError("seconds must be a number")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'{file}, line {number}: {error!r}. A line is {{"reference": "…", "hypothesis": "…"}}, and may have'
                " recording, seconds and language"
            ) from error
        pairs.append(pair)
    if not any(leaderboard_normalize(pair["reference"]) for pair in pairs):
        raise InputError(f"{file} has no reference with a word in it")
    return pairs


def command(argv: list[str]) -> None:
    config = parse(argv)
    score_files(config) if config.score else main(config)


if __name__ == "__main__":
    training.launch(command)
