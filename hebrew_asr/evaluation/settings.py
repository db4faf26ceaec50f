"""The settings of an evaluation and of a transcription. Imports no torch, which takes seconds."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from hebrew_asr.command_line import Range, meant, replaced
from hebrew_asr.data.sources import Source, check_language
from hebrew_asr.errors import InputError
from hebrew_asr.files import DEMO

Format = Literal["text", "json", "srt", "vtt", "tsv"]
FORMATS: tuple[Format, ...] = ("text", "json", "srt", "vtt", "tsv")


@dataclass
class Decoding:
    """How transcripts are written."""

    language: str | None = None
    """Given to the model (`Hebrew`); None: it names the language itself, as users call it."""
    context: str = ""
    """Hot words or other text for the system turn, where Qwen3-ASR takes context."""
    system_turn: bool = True
    """Of Qwen3-ASR's prompt; false, as the transcription endpoints of vLLM and SGLang ask: no context either."""
    num_beams: Annotated[int, Range(1)] = 1
    max_new_tokens: Annotated[int, Range(1)] | None = None
    """None: 64, and 12 a second."""
    longest_seconds: Annotated[float, Range(1)] = 30.0
    """Longer recordings are cut at pauses."""
    batch_seconds: Annotated[float, Range(0)] = 240.0
    """Of audio in a batch, padding included."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto: bfloat16 where the GPU has it."""
    temperature: Annotated[float, Range(0)] = 0.0
    """0: the likeliest token at each step; above: sampled, from all tokens. Only with Qwen3-ASR."""
    seed: int = 0
    """Of the samples. The same command samples the same; another `batch_seconds` does not."""


@dataclass
class TranscribeConfig(Decoding):
    """What is transcribed, and what becomes of it."""

    # Recordings
    paths: list[str] = field(default_factory=list)
    """Files of sound or video, and folders with all that is in them; also as words that no option takes."""
    model: str | None = None
    """A folder, a Hub id, or the URL of an endpoint."""
    channel: Annotated[int, Range(0)] | None = None
    """Of recordings with several, from 0; null: their average."""

    # Transcripts
    formats: list[Format] = field(default_factory=lambda: ["text", "srt"])
    """The JSON is always written. An empty list: nothing is written, and nothing is kept."""
    output_dir: str | None = None
    """null: beside each recording."""
    word_times: bool = True
    """Only Qwen3-ASR has them; without, subtitles spread a segment's text over it by its characters."""
    overwrite: bool = False
    """Replace files that this command did not write, or that were changed since."""
    num_workers: Annotated[int, Range(0)] = 4
    """Processes that read and cut recordings."""


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

    @property
    def is_gate(self) -> bool:
        """Whether what is forgotten is looked for in it: the model is tuned to the Hebrew that is not guarded."""
        return self.guarded or self.language != "Hebrew"


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
    """A set by its name, with or without a folder, or by its fields as JSON; raises InputError."""
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
            raise InputError(f"there is no {unknown[0]!r}{meant(unknown[0], names)}; it has {', '.join(names)}")
        if lost := [key for key in ("name", "path") if key not in given]:
            raise InputError(f"it needs {' and '.join(lost)}")
        if empty := [key for key in ("name", "path", "split", "guarded") if given.get(key, "") is None]:
            raise InputError(f"{empty[0]} must not be null")
        own = {name: given.pop(name) for name in ("name", "language", "guarded") if name in given}
        if own.get("language", "") is None:  # as a run's config.yaml writes the default
            del own["language"]
        one = replaced(EvaluationSet("", replaced(Source(""), given)), own)
        check_language(one.language)
        return one
    except (ValueError, InputError) as error:
        raise InputError(f"{text} is no set: {str(error).removeprefix('--')}") from error
