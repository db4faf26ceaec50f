"""Measures checkpoints: error rates with intervals, what went wrong, what was forgotten, how fast.

    uv run evaluate_hebrew_asr.py --model runs/NAME/final_model --compare Qwen/Qwen3-ASR-1.7B-hf
    uv run torchrun --nproc_per_node=8 evaluate_hebrew_asr.py --model OWNER/NAME --sets eval-d1 whatsapp
    uv run evaluate_hebrew_asr.py --model OWNER/NAME --compare ivrit-ai/whisper-large-v3-ct2-20250513
    uv run evaluate_hebrew_asr.py --endpoint http://localhost:8000/v1 --score others.jsonl --sets eval-d1
    uv run evaluate_hebrew_asr.py --score transcripts.jsonl         a {"reference": …, "hypothesis": …} a line
    uv run evaluate_hebrew_asr.py --demo                            what the demo's run made, on its sets, no GPU

`--output_dir` gets results.json, utterances.parquet, table.md and evaluation.html. Transcripts are kept there too: the
same command goes on where it was interrupted. The exit status is not 0 when something could not be measured. What was
forgotten is a finding; with `--max_wer_rise 5` it is a gate too: the status is not 0 where more was lost than that.
"""

if __name__ == "__main__":  # the imports take seconds
    from hebrew_asr.start import begin

    begin()

import contextlib
import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from hebrew_asr.command_line import READERS, Range, parse_config, read_options
from hebrew_asr.data.sources import check_language
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation.settings import DEMO_SETS, LEADERBOARD, QUOTED, Decoding, EvaluationConfig, read_set
from hebrew_asr.files import DEMO, digest

BASE = str(DEMO / "base")  # what the demo's run begins from


@dataclass
class EvaluationOptions(Decoding):
    """The command line."""

    # What is measured
    model: str | None = None
    """The checkpoint to measure: a folder or a Hub id, of transformers or of CTranslate2 (`model.bin`)."""
    compare: list[str] = field(default_factory=list)
    """Checkpoints to compare it with."""
    endpoint: list[str] = field(default_factory=list)
    """Servers with OpenAI's API of transcriptions: http://host:8000/v1, or http://host:8000/v1#name where several
    models are served."""
    prompt_forms: bool = False
    """Measure Qwen3-ASR under each of the prompts that engines write: an empty system turn, none, the language given,
    a context (`--context`, or a few words)."""
    decodings: bool = False
    """Measure Qwen3-ASR greedy and with 2, 4 and 8 beams, side by side."""
    sets: list[str] = field(default_factory=list)
    """Of the leaderboard's (eval-d1, whatsapp, saspeech, fleurs, common-voice, kan; left out: those that can be had),
    with =FOLDER after the name where you have a copy (common-voice=cv-corpus-22.0/he), or one of your own as JSON:
    {"name": "calls", "path": "data/calls"}, with any field of Source, "language" where it is not Hebrew ("None":
    nobody speaks), and "guarded": true to check it for regressions too."""
    score: list[str] = field(default_factory=list)
    """JSONL files of transcripts, a {"reference": …, "hypothesis": …} a line, instead of a model or beside it. Beside
    it they are those of the sets, in their order; a line may name its "set"."""
    output_dir: str | None = None
    """None: a folder under runs/, named after the settings."""
    max_utterances: Annotated[int, Range(1)] | None = None
    """At most so many of each set, for a quick look."""
    max_wer_rise: Annotated[float, Range(0)] | None = None
    """A gate: the exit status is not 0 where the model is worse than the first it is compared with by more points of
    WER than these, on sets in other languages and guarded ones. Left out (null): forgetting is only reported."""
    min_audio_length_seconds: Annotated[float, Range(0)] | None = None
    """Shorter utterances are left out; null: none. Training's own limit is 0.3."""
    max_audio_length_seconds: Annotated[float, Range(0)] | None = None
    """Longer ones are left out; null: none, they are cut at pauses. Training's own limit is 30."""
    drop_silent: bool = False
    """Leave silent recordings out of sets with speech, as training does."""
    max_broken_share: Annotated[float, Range(0, 1)] = 0.05
    """A set of which more rows than this share cannot be read is not measured."""
    num_workers: Annotated[int, Range(0)] = 4
    """Processes that decode and extract features, for each rank."""
    update_card: bool = False
    """Write the figures into the model's card."""


def demo() -> EvaluationOptions:
    return EvaluationOptions(model=demo_model(Path("runs")), compare=[BASE], num_workers=0)


def demo_model(runs: Path) -> str:
    """What the newest finished run of train_round2_gradual.py's demo in `runs` made; without one, demo/tuned."""
    for status in sorted(runs.glob("*/status.json"), key=lambda file: file.stat().st_mtime, reverse=True):
        folder = status.parent
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # of another command, or damaged
            settings = json.loads((folder / "config.yaml").read_text(encoding="utf-8"))
            began = (settings["model_name_or_path"], settings["train_sources"][0]["path"])  # what follows is replayed
            if json.loads(status.read_text())["state"] == "finished" and began == (BASE, str(DEMO / "corpus")):
                return str(folder / "final_model")
    return str(DEMO / "tuned")


def parse(argv: list[str]) -> EvaluationConfig:
    """Reads the command line; raises InputError."""
    given = parse_config(argv, EvaluationOptions(), demo, __doc__)
    is_demo = "--demo" in argv
    models = [*([given.model] if given.model else []), *given.compare, *given.endpoint]
    if not models and not given.score:
        raise InputError("give --model (or --demo), --endpoint or --score")
    if given.compare and not given.model:
        raise InputError("--compare needs a --model to compare")
    if not models and (given.update_card or given.sets or given.max_utterances):
        raise InputError("--score without a model takes files alone: leave --sets, --max_utterances, --update_card out")
    if given.language is not None:
        check_language(given.language, "--")
    if given.prompt_forms and (given.language or not given.system_turn):
        raise InputError("--prompt_forms gives and leaves out language and system turn itself: leave both options out")
    if given.decodings and (given.prompt_forms or given.num_beams > 1 or given.temperature):
        raise InputError("--decodings chooses the beams: leave --num_beams, --temperature and --prompt_forms out")
    if given.context and not given.system_turn:
        raise InputError("--context stands in the system turn: leave --system_turn false out")
    card = Path(given.model or "") / "README.md"
    limits = (given.max_utterances, given.min_audio_length_seconds, given.max_audio_length_seconds, given.drop_silent)
    if given.update_card and (any(limits) or not given.model or not card.is_file()):
        raise InputError(
            "--update_card needs a local folder with a README.md as --model, and whole sets: leave --max_utterances,"
            " --min_audio_length_seconds, --max_audio_length_seconds and --drop_silent out"
        )
    known = {one.name: one for one in (DEMO_SETS if is_demo else LEADERBOARD)}
    sets = [read_set(name, known) for name in given.sets]
    sets = sets or [dataclasses.replace(one, asked=is_demo) for one in known.values()]
    if given.max_wer_rise is not None:
        if not models or len([*models, *given.score]) < 2:
            raise InputError("--max_wer_rise compares two models: give the one from before as --compare")
        if not any(one.is_gate for one in sets):
            raise InputError(
                "--max_wer_rise is a gate on sets in other languages, without speech, or guarded, and none of --sets is"
                ' one: add such a set, or "guarded": true to one of your own, or leave the option out'
            )
    config = EvaluationConfig(
        models=models,
        sets=sets,
        decoding=Decoding(**{one.name: getattr(given, one.name) for one in dataclasses.fields(Decoding)}),
        score=given.score,
        prompt_forms=given.prompt_forms,
        decodings=given.decodings,
        max_utterances=given.max_utterances,
        min_audio_length_seconds=given.min_audio_length_seconds,
        max_audio_length_seconds=given.max_audio_length_seconds,
        drop_silent=given.drop_silent,
        max_wer_rise=given.max_wer_rise,
        max_broken_share=given.max_broken_share,
        quoted=list(QUOTED) if models and not is_demo and any(one.name in known for one in sets) else [],
        num_workers=given.num_workers,
        update_card=given.update_card,
    )
    names = [one.name for one in config.sets]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"two sets have the name {', '.join(twice)}: give each its own")
    settings = json.dumps(dataclasses.asdict(config), default=str).encode()
    config.output_dir = given.output_dir or f"runs/evaluation-{digest(settings)[:10]}"
    return config


if __name__ == "__main__":
    READERS.append(parse)
    read_options()  # what follows takes seconds to import

import accelerate
from accelerate.utils import broadcast_object_list

from hebrew_asr.data.rows import SpeechRows
from hebrew_asr.evaluation.engines import decoding_for, open_engine, ways_of
from hebrew_asr.evaluation.results import Cells, display_names, open_folder, read_files, report, score_files
from hebrew_asr.evaluation.sets import load_set
from hebrew_asr.evaluation.transcription import Transcriber, transcribe_shares
from hebrew_asr.processes import fail_together, join_processes, launch, leave_process_group, load_in_turn


def main(config: EvaluationConfig) -> None:
    """Measures every model on every set; InputError at the end when something could not be, or a gate failed."""
    # 1. Processes and folder
    state = join_processes(config.process_timeout_minutes)
    (folder,) = map(Path, broadcast_object_list([config.output_dir]))  # the time in it is the first process's
    with fail_together():
        open_folder(folder)

    # 2. Sets: one that cannot be read does not stop the others
    cells = Cells()
    for one in config.sets:
        try:
            cells.rows[one.name] = load_in_turn(state, lambda one=one: load_set(one, config))
        except InputError as error:
            cells.reasons[None, one.name] = str(error)
            cells.excused |= set() if one.asked else {(None, one.name)}

    # 3. Models, one after another, and what was transcribed elsewhere
    names = display_names([*config.models, *config.score])
    for path, name in zip(config.models, names, strict=False):
        try:
            with fail_together():
                engine = open_engine(path, config.decoding, state.device)
        except InputError as error:
            unknown = {"language": None, "decoding": None, "dtype": None}
            cells.models.append({"name": name, "path": path} | unknown)
            cells.leading.append(name)
            cells.reasons |= {(name, one.name): str(error) for one in config.sets}
            continue
        ways = {f"{name} [{way.form}]" if way.form else name: way for way in ways_of(engine, config)}
        cells.leading.append(next(iter(ways)))
        for row, way in ways.items():
            cells.models.append({"name": row, "path": path} | way.described(engine))
            for one in config.sets:
                if one.name in cells.rows:
                    try:
                        engine.decoding = decoding_for(engine, way.decoding, one.language if one.has_speech else None)
                        parts = transcribe(engine, path, row, one.name, cells.rows[one.name], folder, config, state)
                        cells.transcribed[row, one.name] = parts
                    except InputError as error:
                        cells.reasons[row, one.name] = str(error)
        del engine
    read_files(cells, config, names[len(config.models) :])

    # 4. Score, compare, write: the first process
    with fail_together():
        if state.is_main_process:
            report(config, folder, cells)
    leave_process_group()


def transcribe(
    engine: Transcriber,
    path: str,
    row: str,
    name: str,
    rows: SpeechRows,
    folder: Path,
    config: EvaluationConfig,
    state: accelerate.PartialState,
) -> Path:
    """Lets `engine` transcribe a set, all processes together; returns the folder of the transcripts."""
    if state.is_main_process:
        print(f"{row} on {name}: {len(rows)} utterances", flush=True)
    return transcribe_shares(engine, rows, folder, state, config.num_workers)


def command(argv: list[str]) -> None:
    config = parse(argv)
    if "--demo" in argv and int(os.environ.get("RANK", "0")) == 0:
        made = "what the newest demo run made" if config.models[0] != str(DEMO / "tuned") else "no demo run in runs/"
        print(f"measuring {config.models[0]} ({made}), compared with {config.models[1]}", flush=True)
    main(config) if config.models else score_files(config)


if __name__ == "__main__":
    launch(command)
