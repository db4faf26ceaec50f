"""Results of an evaluation: files, card, report."""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import yaml

from hebrew_asr.data.audio import AudioError, decode_audio
from hebrew_asr.data.rows import SpeechRows
from hebrew_asr.data.sources import Source
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation.measuring import FORGOTTEN, compare_models, forgetting_gates, measure, record, summarize
from hebrew_asr.evaluation.page import markdown_table, write_page
from hebrew_asr.evaluation.sets import describe_set
from hebrew_asr.evaluation.settings import EvaluationConfig, EvaluationSet
from hebrew_asr.evaluation.transcription import Transcribed, Transcript, read_transcripts
from hebrew_asr.text import error_classes
from hebrew_asr.text.scoring import ErrorCounts, leaderboard_normalize
from hebrew_asr.text.targets import refuse_control_tokens, spoken_language, without_prefix

# ------------------------------------------------------------------------------------------------------------- Writing
WRITTEN = ("results.json", "table.md", "evaluation.html", "utterances.parquet")
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


def open_folder(folder: Path) -> None:
    """Makes an evaluation's folder; raises InputError where it cannot, or what lies there is of no evaluation."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error
    known: Any = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    is_ours = isinstance(known, dict) and {"sets", "models", "results"} <= set(known)
    if foreign := [name for name in WRITTEN if (folder / name).exists() and not is_ours]:
        raise InputError(f"{folder / foreign[0]} is of no evaluation: choose another --output_dir, or move it away")


def write_files(
    folder: Path, results: dict[str, Any], records: list[dict], audio: Callable[[str, int], np.ndarray | None]
) -> None:
    table = pyarrow.Table.from_pylist(records, UTTERANCE)
    content = json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False)
    (folder / "results.json").write_text(content + "\n", encoding="utf-8")  # first: by it the folder is known
    pyarrow.parquet.write_table(table, folder / "utterances.parquet")
    (folder / "table.md").write_text(markdown_table(results), encoding="utf-8")
    write_page(folder / "evaluation.html", results, table, audio)


def card_results(results: dict[str, Any], model: str) -> list[huggingface_hub.EvalResult]:
    """The first model's rates in the Hub's own format for evaluations."""
    sets = {one["name"]: one for one in results["sets"]}
    return [
        huggingface_hub.EvalResult(
            task_type="automatic-speech-recognition",
            dataset_type=name_of(sets[found["set"]]),
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


def name_of(one: dict[str, Any]) -> str:
    """A set's id on the Hub; its name where it is of this machine, whose paths are nobody's concern."""
    is_of_the_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", one["path"]) and not Path(one["path"]).exists()
    return one["path"] if is_of_the_hub else one["name"]


def update_card(folder: Path, results: dict[str, Any], model: str) -> None:
    """Puts the figures into a model card's metadata, and the table at its end, in place of an earlier one.

    Raises InputError for a card that cannot be read.
    """
    try:
        card = huggingface_hub.ModelCard.load(folder / "README.md")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{folder}/README.md cannot be read, so it has no figures: {error}") from error
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
    is_gate = results["settings"]["max_wer_rise"] is not None
    said = {True: "passed", False: "FAILED"} if is_gate else {True: "kept", False: "forgotten"}
    lines += [f"{said[g['passed']]}: {g['name']}, {g['detail']}" for g in results["gates"]]
    if not is_gate and results["gates"]:
        lines.append(f"for an exit status that says so, name the points that may be lost: --max_wer_rise {FORGOTTEN:g}")
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


def versions() -> dict[str, str]:
    packages = "torch transformers datasets jiwer numpy soundfile soxr accelerate".split()
    return {package: importlib.metadata.version(package) for package in packages}


@dataclass
class Cells:
    """What is to stand in the table, and where it is."""

    models: list[dict[str, Any]] = field(default_factory=list)
    """A row each: `name`, `path`, `language`, `decoding` and `dtype`, as results.json has them."""
    leading: list[str] = field(default_factory=list)
    """The first row of each model: what was forgotten is seen between models, not between prompts."""
    rows: dict[str, SpeechRows] = field(default_factory=dict)
    """By set."""
    transcribed: dict[tuple[str, str], Path | Transcribed] = field(default_factory=dict)
    """By row and set: the folder of the transcripts, or, where they were made elsewhere, themselves."""
    reasons: dict[tuple[str | None, str], str] = field(default_factory=dict)
    """Why a set (None, set), or a row on a set, is not measured."""
    excused: set[tuple[str | None, str]] = field(default_factory=set)
    """Of these, what nobody asked for."""


def read_files(cells: Cells, config: EvaluationConfig, names: list[str]) -> None:
    """Adds rows of transcripts made elsewhere: a file's lines belong to the set whose references they have."""
    for path, name in zip(config.score, names, strict=True):
        cells.models.append({"name": name, "path": path, "language": "free", "decoding": "elsewhere", "dtype": None})
        cells.leading.append(name)
        known = [one.name for one in config.sets if one.name in cells.rows]
        try:
            pairs = read_pairs(Path(path))
        except InputError as error:
            cells.reasons |= {(name, one): str(error) for one in known}
            continue
        for one in known:
            mine = [pair for pair in pairs if pair.get("set") in (None, one)]
            if [pair["reference"] for pair in mine] == cells.rows[one].column("reference"):
                texts = [Transcript(pair["hypothesis"], pair.get("language"), truncated=None) for pair in mine]
                cells.transcribed[name, one] = Transcribed(texts, [None] * len(texts), None, None)
        others = {(name, one) for one in known} - set(cells.transcribed)
        cells.reasons |= {
            place: f"{path} does not have the references of {place[1]}, in their order" for place in others
        }
        if len(others) < len(known):
            cells.excused |= others


def report(config: EvaluationConfig, folder: Path, cells: Cells) -> None:
    """Writes the files and raises InputError for what was asked for and not measured, and for a failed gate."""
    found, records, rows = [], {}, cells.rows
    names = [model["name"] for model in cells.models]
    for name in names:
        for one in config.sets:
            place = (None, one.name) if (None, one.name) in cells.reasons else (name, one.name)
            reason = cells.reasons.get(place)
            if reason is None:
                try:
                    written = cells.transcribed[name, one.name]
                    if isinstance(written, Path):
                        written = read_transcripts(written, len(rows[one.name]))
                    result, mine = measure(name, one, rows[one.name], written)
                    found.append(result)
                    records[name, one.name] = mine
                    continue
                except InputError as error:
                    reason = str(error)
            found.append({"model": name, "set": one.name, "reason": reason, "excused": place in cells.excused})
    results = {
        "created": time.strftime("%Y-%m-%d"),
        "settings": dataclasses.asdict(config) | {"confidence": 0.95},
        "versions": versions(),
        "sets": [describe_set(one, rows.get(one.name)) for one in config.sets],
        "models": cells.models,
        "results": found,
        "comparisons": [c for one in config.sets for c in compare_models(records, names, one.name)],
        "quoted": config.quoted,
        "gates": forgetting_gates(found, cells.leading, config.sets, config.max_wer_rise),
        "error_class_rules": error_classes.CLASSES,
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
    """Says what came out; raises InputError for what did not, and for a gate that was asked for and failed."""
    for line in lines_of(results):
        print(line, flush=True)
    print(f"written: {folder}/evaluation.html, results.json, utterances.parquet, table.md", flush=True)
    missing = [r for r in results["results"] if r["reason"] and not r["excused"]]
    problems = [f"not measured: {r['model']} on {r['set']} ({r['reason']})" for r in missing]
    if config.max_wer_rise is not None:
        failed = [f"{gate['name']} ({gate['detail']})" for gate in results["gates"] if not gate["passed"]]
        problems += [f"forgotten: {one}" for one in failed]
        said = {part["set"] for part in results["gates"]} | {r["set"] for r in missing}
        open_gates = [one.name for one in config.sets if one.is_gate and one.name not in said]
        problems += [f"no gate on {name}: it was not measured with both models" for name in open_gates]
    if not problems and all(r["reason"] for r in results["results"]):
        problems = [
            "nothing could be measured: " + "; ".join(f"{r['set']} ({r['reason']})" for r in results["results"])
        ]
    if config.update_card and not missing and any(r["reason"] is None for r in results["results"]):
        try:
            update_card(Path(config.models[0]), results, results["models"][0]["name"])
        except InputError as error:
            problems.append(str(error))
    elif config.update_card:
        problems.append("the model's card is as it was, since not all was measured")
    if problems:
        raise InputError("; ".join(problems))


# ----------------------------------------------------------------------------------------- Transcripts made elsewhere
def score_files(config: EvaluationConfig) -> None:
    """Scores JSONL files of pairs; several must have the same references, and are compared."""
    folder = Path(config.output_dir)
    open_folder(folder)
    names = display_names(config.score)
    one = EvaluationSet("transcripts", Source(config.score[0]))
    found, records = [], {}
    references: list[str] = []
    for path, name in zip(config.score, names, strict=True):
        pairs = read_pairs(Path(path))
        if references not in ([], [pair["reference"] for pair in pairs]):
            raise InputError(f"{path} has other references than {config.score[0]}: they cannot be compared")
        references = [pair["reference"] for pair in pairs]
        mine = [
            record(pair["reference"], Transcript(pair["hypothesis"], pair.get("language"), truncated=None))
            | {"model": name, "set": one.name, "number": i, "language": one.language, "snr_db": None}
            | {"recording": str(pair.get("recording") or i), "seconds": pair["seconds"]}
            for i, pair in enumerate(pairs)
        ]
        unknown = {"dropped": {}, "audio_seconds_per_second": None, "peak_memory_gb": None}
        found.append({"model": name, "set": one.name, "reason": None} | summarize(mine, one) | unknown)
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
        "error_class_rules": error_classes.CLASSES,
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
            pair["language"] = pair.get("language") or spoken_language(pair["hypothesis"])
            for name in ("reference", "hypothesis"):  # raw outputs begin with the language's name
                pair[name] = without_prefix(pair[name])
                refuse_control_tokens(pair[name])
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
