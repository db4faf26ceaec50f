"""What can be measured: a checkpoint in transformers, a CTranslate2 Whisper, a running endpoint.

Each is a `Transcriber`. What names it decides which: a URL is an endpoint, a folder or a Hub id whose weights are
`model.bin` is CTranslate2's, any other is transformers'.
"""

import dataclasses
import io
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import soundfile
import torch
import transformers
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from hebrew_asr.data.audio import SAMPLE_RATE
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation.settings import Decoding, EvaluationConfig
from hebrew_asr.evaluation.transcription import HEBREW, QwenModel, Transcriber, Transcript, files_of, load_speech_model
from hebrew_asr.model.loading import checkpoint_problems
from hebrew_asr.model.prompts import END_OF_LANGUAGE, PROMPT_FORMS

BEAMS = 5  # of CTranslate2, where no other number is asked for: as ivrit.ai's engine, and so the leaderboard, has it
HOT_WORDS = "ירושלים, רכבת, דוקטור כהן"  # the context under which forms are compared, where none is given
DECODINGS = {"greedy": 1, "2 beams": 2, "4 beams": 4, "8 beams": 8}  # what `decodings` compares
AT_ONCE = 16  # requests to an endpoint
ATTEMPTS = 3
FIRST_WAIT_SECONDS = 1.0  # after a failure; then four times as long
ANSWER_SECONDS = 180.0  # an endpoint has for one clip
OF_ONE_CLIP = {400, 413, 415, 422}  # statuses that say something of what was sent, not of the server or a key


class ClipsRefused(InputError):
    """Clips of a batch that an endpoint does not take: `found` has what it says of each, or the transcript."""

    def __init__(self, found: list[Transcript | str]):
        super().__init__(next(one for one in found if isinstance(one, str)))
        self.found = found


def is_endpoint(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def open_engine(name: str, decoding: Decoding, device: torch.device) -> Transcriber:
    """Loads what `name` names; raises InputError for what does not transcribe, or is not whole, or is not there."""
    if is_endpoint(name):
        return EndpointModel(name, decoding)
    if is_ctranslate2(name):
        return CTranslate2Model(name, decoding, device)
    return load_speech_model(name, decoding, device)


def language_code(language: str) -> str:
    """`he` of `Hebrew`; raises InputError for a name that Whisper does not know."""
    if language.lower() not in TO_LANGUAGE_CODE:
        raise InputError(f"{language} is no language that Whisper knows by name: give one like Hebrew or English")
    return TO_LANGUAGE_CODE[language.lower()]


# ---------------------------------------------------------------------------------------------------------- CTranslate2
def is_ctranslate2(name: str) -> bool:
    """By `model.bin` in a folder; on the Hub by a configuration that names no type of model."""
    if Path(name).is_dir():
        return (Path(name) / "model.bin").is_file()
    with checkpoint_problems(name):
        file = transformers.utils.cached_file(name, "config.json")
        return "model_type" not in json.loads(Path(file).read_text(encoding="utf-8"))


class CTranslate2Model:
    """A Whisper in CTranslate2's form, as faster-whisper runs it and ivrit.ai's engine measures it.

    It hears recordings of any length, which it divides itself. faster-whisper pads a clip's features with zeros,
    transformers pads the clip with silence: a clip under 30 s may be written otherwise than by the same Whisper there.
    """

    needs_language = True

    def __init__(self, name: str, decoding: Decoding, device: torch.device):
        try:
            import faster_whisper  # ty: ignore[import-not-found]
        except ImportError as error:
            raise InputError(
                f"{name} is a CTranslate2 model, which faster-whisper runs: install it with `uv sync --group engines`"
            ) from error
        if decoding.context or decoding.temperature:
            raise InputError(f"{name}: only Qwen3-ASR takes a context, and is sampled from")
        self.decoding = decoding
        self.dtype = {"auto": "float16" if device.type == "cuda" else "float32"}.get(decoding.dtype, decoding.dtype)
        folder = Path(name)
        if not folder.is_dir():
            with checkpoint_problems(name):
                folder = Path(faster_whisper.download_model(name))
        if missing := [file for file in ("config.json", "tokenizer.json") if not (folder / file).is_file()]:
            raise InputError(
                f"{name} has no {' and no '.join(missing)}: convert the Whisper it came from again, with --copy_files"
                " tokenizer.json preprocessor_config.json"
            )
        try:
            self.model = faster_whisper.WhisperModel(
                str(folder), device=device.type, device_index=device.index or 0, compute_type=self.dtype
            )
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{name} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
        self.files = json.dumps([files_of(name), Path(__file__).read_text(encoding="utf-8")])

    def features(self, waveform: np.ndarray) -> np.ndarray:
        return waveform

    def transcribe(self, features: list[np.ndarray], seconds: list[float]) -> list[Transcript]:
        beams = self.decoding.num_beams if self.decoding.num_beams > 1 else BEAMS
        language = language_code(self.decoding.language or HEBREW)
        texts = []
        for waveform in features:
            segments, _ = self.model.transcribe(
                waveform,
                language=language,
                task="transcribe",
                beam_size=beams,
                max_new_tokens=self.decoding.max_new_tokens,
            )
            texts.append(" ".join(segment.text.strip() for segment in segments))
        return [Transcript(text, None, truncated=None) for text in texts]

    def word_starts(self, features: np.ndarray, transcript: Transcript) -> None:
        return None


# ------------------------------------------------------------------------------------------------------------- Endpoint
class EndpointModel:
    """A model behind a server with OpenAI's API of transcriptions: vLLM, SGLang, speaches and others.

    `http://host:8000/v1` measures the first model that is served there, `http://host:8000/v1#name` the one so called.
    A key, where the server wants one, is read from ENDPOINT_API_KEY.
    """

    dtype = "as served"
    decoding: Decoding
    files: str

    def __init__(self, name: str, decoding: Decoding):
        if decoding.temperature or decoding.num_beams > 1 or decoding.max_new_tokens:
            raise InputError(
                f"{name}: an endpoint takes neither temperature nor num_beams nor max_new_tokens from here"
            )
        address, _, wanted = name.partition("#")
        address = address.rstrip("/")
        self.base = address if address.count("/") > 2 else f"{address}/v1"
        self.decoding = decoding
        token = os.environ.get("ENDPOINT_API_KEY")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.client = httpx.Client(headers=headers, timeout=httpx.Timeout(ANSWER_SECONDS, connect=10.0))
        listed = self.ask("GET", "models").get("data")
        served = [one["id"] for one in listed] if isinstance(listed, list) else []
        if not served or wanted not in ("", *served):
            raise InputError(f"{self.base} serves {', '.join(served) or 'no model'}, not {wanted or 'one to measure'}")
        self.model = wanted or served[0]
        self.files = f"{self.base}#{self.model}"  # an endpoint has none to show

    @property
    def needs_language(self) -> bool:
        return "whisper" in self.model.lower()

    def ask(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        """The JSON of an answer; raises InputError where there is none after `ATTEMPTS`, or it says what is wrong.

        A ClipsRefused says that it is wrong with the clip that was sent.
        """
        url, problem = f"{self.base}/{path}", ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_WAIT_SECONDS * 4 ** (attempt - 1))
            try:
                answer = self.client.request(method, url, **request)
            except httpx.ReadTimeout:
                problem = f"has not answered in {ANSWER_SECONDS:g} s"
                break
            except httpx.HTTPError as error:
                problem = f"does not answer ({type(error).__name__}: {error}): is the server running?"
                continue
            said = " ".join(answer.text.split())[:200] or "nothing more"
            problem = f"answers {answer.status_code}: {said}"
            if answer.status_code == 200:
                try:
                    found = answer.json()
                except ValueError:
                    found = None
                if isinstance(found, dict):
                    return found
                problem = f"answers what is no JSON object: {said}"
            if method == "POST" and answer.status_code in OF_ONE_CLIP:
                raise ClipsRefused([f"{url} {problem}"])
            if answer.status_code not in (429, *range(500, 600)):
                break
        raise InputError(f"{url} {problem}")

    def features(self, waveform: np.ndarray) -> bytes:
        file = io.BytesIO()
        soundfile.write(file, waveform, SAMPLE_RATE, format="WAV", subtype="PCM_16")
        return file.getvalue()

    def transcribe(self, features: list[bytes], seconds: list[float]) -> list[Transcript]:
        """Raises ClipsRefused after all clips were asked for."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = list(pool.map(self.transcript_or_refusal, features))
        transcripts = [one for one in found if isinstance(one, Transcript)]
        if len(transcripts) < len(found):
            raise ClipsRefused(found)
        return transcripts

    def transcript_or_refusal(self, wav: bytes) -> Transcript | str:
        try:
            return self.transcribe_one(wav)
        except ClipsRefused as refused:
            return str(refused)

    def transcribe_one(self, wav: bytes) -> Transcript:
        form = {"model": self.model, "response_format": "json", "temperature": "0"}
        if self.decoding.language:
            form["language"] = language_code(self.decoding.language)
        if self.decoding.context:
            form["prompt"] = self.decoding.context
        files = {"file": ("clip.wav", wav, "audio/wav")}
        answer = self.ask("POST", "audio/transcriptions", data=form, files=files)
        if not isinstance(text := answer.get("text"), str):
            raise InputError(f"{self.base} answers without a text: {json.dumps(answer, ensure_ascii=False)[:200]}")
        before, tag, after = text.rpartition(END_OF_LANGUAGE)  # a server that passes on what Qwen3-ASR wrote
        named = before.removeprefix("language").strip() if tag and not self.decoding.language else None
        return Transcript(after.strip(), named, truncated=None)

    def word_starts(self, features: bytes, transcript: Transcript) -> None:
        return None


# ------------------------------------------------------------------------------------------------------------- Decoding
@dataclass(frozen=True)
class Way:
    """A way of asking an engine for transcripts, which has a row of its own in the results."""

    form: str
    """The name of a prompt's form, or of a way of decoding; "" where neither are compared."""
    decoding: Decoding

    def described(self, engine: Transcriber) -> dict[str, Any]:
        """What the results say of it."""
        decoding = self.decoding
        beams = BEAMS if isinstance(engine, CTranslate2Model) and decoding.num_beams == 1 else decoding.num_beams
        how = "greedy" if beams == 1 else f"{beams} beams"
        how += f", sampled at temperature {decoding.temperature:g}" if decoding.temperature else ""
        if isinstance(engine, EndpointModel):
            how = f"the endpoint's, model {engine.model}"
        gives_language = engine.needs_language or decoding.language is not None
        return {"language": "given" if gives_language else "free", "decoding": how, "dtype": engine.dtype}


def ways_of(engine: Transcriber, config: EvaluationConfig) -> list[Way]:
    """The one way, or, for Qwen3-ASR and where they are asked for, ways of decoding, or forms of prompts."""
    decoding = config.decoding
    if config.decodings and isinstance(engine, QwenModel):
        return [Way(name, dataclasses.replace(decoding, num_beams=beams)) for name, beams in DECODINGS.items()]
    if not (config.prompt_forms and isinstance(engine, QwenModel)):
        return [Way("", decoding)]
    return [
        Way(
            name,
            dataclasses.replace(
                decoding,
                system_turn=form.system != "none",
                context=(decoding.context or HOT_WORDS) if form.system == "context" else "",
                language=HEBREW if form.gives_language else None,
            ),
        )
        for name, form in PROMPT_FORMS.items()
    ]


def decoding_for(engine: Transcriber, decoding: Decoding, language: str | None) -> Decoding:
    """How an engine writes a set in which `language` is spoken (None: nobody speaks).

    The language is the set's, not the command's: `decoding.language` says no more than that one is given. An engine
    that needs one is always given it.
    """
    given = None
    if decoding.language or engine.needs_language:
        given = language or decoding.language or HEBREW
    any_length = isinstance(engine, CTranslate2Model)
    longest = math.inf if any_length else decoding.longest_seconds
    return dataclasses.replace(decoding, language=given, longest_seconds=longest)
