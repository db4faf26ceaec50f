"""The README.md of a trained checkpoint: metadata in the Hub's format, results, how to transcribe, settings.

Imports nothing of this project.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import huggingface_hub

SNIPPET = """\
import av  # pip install av: FFmpeg, for any format of sound or video
import numpy as np
from transformers import AutoProcessor, Qwen3ASRForConditionalGeneration

model_id, file, longest = "{model_id}", "speech.wav", 30  # seconds
processor = AutoProcessor.from_pretrained(model_id)
model = Qwen3ASRForConditionalGeneration.from_pretrained(model_id, dtype="auto")

with av.open(file) as container:
    resampler = av.AudioResampler(format="flt", layout="mono", rate=16_000)
    frames = [part for frame in [*container.decode(audio=0), None] for part in resampler.resample(frame)]
audio = np.concatenate([frame.to_ndarray()[0] for frame in frames])
if len(audio) > longest * 16_000:
    raise SystemExit(f"{{file}} is longer than {{longest}} s and would be cut off: cut it at pauses")

inputs = processor.apply_transcription_request(audio=audio, sampling_rate=16_000).to(model.device, model.dtype)
tokens = model.generate(**inputs, max_new_tokens=64 + 12 * longest)[0, inputs["input_ids"].shape[1] :]
if tokens[-1] not in model.generation_config.eos_token_id:
    raise SystemExit(f"the transcript of {{file}} does not end: the model repeats itself")
print(processor.decode(tokens, return_format="transcription_only"))
"""
SET_ASIDE = "set aside: it chose nothing"
COMMAND = """\
Recordings of any length, folders of them, subtitles and the times of words: the project that trained this has a command
and a function for them.

```
uv run transcribe_hebrew_asr.py FILE_OR_FOLDER --model {model_id}
```
"""


SERVE = """\
In the layout of these files, that of transformers' own classes:

- transformers 5.23: as above
- vLLM 0.26 and later (0.33 brings transformers 5.20): `vllm serve {model_id}`

In the older layout, which `uv run scripts/convert_layout.py FOLDER OLDER --to thinker` of the training code writes into
the new folder OLDER (FOLDER holds these files):

- qwen-asr 0.0.6: `Qwen3ASRModel.from_pretrained("OLDER")`
- ms-swift 4.6: `swift infer --model OLDER`
- SGLang 0.5.23: `python -m sglang.launch_server --model-path OLDER`
- vLLM up to 0.25: `vllm serve OLDER`

Versions as read in their source; under transformers and qwen-asr the conversion was run and compared.
"""


PATHS = ("path", "model_name_or_path")  # settings that name a folder or something of the Hub


def is_local(path: str) -> bool:
    return path.startswith(("/", "~", "./", "../")) or Path(path).exists()


def public(value: Any, name: str = "") -> Any:
    """A setting without the way to a local file or folder, whose last name is kept."""
    if isinstance(value, dict):
        return {key: public(one, key) for key, one in value.items()}
    if isinstance(value, list):
        return [public(one, name) for one in value]
    if isinstance(value, str) and ("/" in value or name in PATHS) and Path(value).name and is_local(value):
        return f"local: {Path(value).name}"
    return value


def write_model_card(
    folder: Path,
    model_id: str,
    base_model: str,
    train_sources: list[str],
    eval_names: list[str],
    final: dict[str, float],
    origin: str,
    settings: dict[str, Any],
    tags: list[str],
) -> None:
    """Writes README.md into the model's folder.

    Args:
        model_id: what the snippet loads: the repository on the Hub, or the folder, of which only the name is shown.
        eval_names: datasets and folders that the metrics are of.
        final: the metrics of the checkpoint as it is stored, `final/wer`, `final/cer`, `final/wer_raw`, …;
            `final/wer_low` and `final/wer_high` where there is an interval; `confirm/…` where there are some.
        origin: a sentence that says which weights these are.
        settings: the run's, without secrets; names of folders and projects are left out.
    """
    base_model, model_id = public(base_model, "path"), model_id if not is_local(model_id) else Path(model_id).name
    eval_name = ", ".join(public(name, "path") for name in eval_names)
    results = [
        huggingface_hub.EvalResult(
            task_type="automatic-speech-recognition",
            dataset_type=eval_name,
            dataset_name=eval_name,
            metric_type=metric,
            metric_value=round(final[f"final/{metric}"], 3),
        )
        for metric in ("wer", "cer")
    ]
    data = huggingface_hub.ModelCardData(
        language="he",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="automatic-speech-recognition",
        base_model=None if base_model.startswith("local: ") else base_model,
        datasets=[path for path in train_sources if not is_local(path)] or None,
        tags=tags,
        model_name=model_id.split("/")[-1],
        eval_results=results,
    )
    private = ("hf_repo_id", "output_dir", "wandb_project", "wandb_run_name")
    settings = {name: public(value, name) for name, value in settings.items() if name not in private}
    language = "given" if settings["eval_prefill_language"] else "left to the model"
    folder.joinpath("README.md").write_text(
        f"---\n{data.to_yaml()}\n---\n\n"
        f"# {model_id.split('/')[-1]}\n\n"
        f"`{base_model}` fine-tuned to Hebrew speech recognition.\n\n"
        "| set | utterances | WER % (95 % interval) | CER % | WER % on raw text |\n|---|---|---|---|---|\n"
        f"{row_of(final, 'final', eval_name)}{row_of(final, 'confirm', f'{eval_name}, {SET_ASIDE}')}\n"
        f"Measured on this checkpoint as it is stored here, greedy decoding, the language {language}, text normalised"
        " as the ivrit.ai leaderboard does.\n\n"
        f"## Transcribe\n\n```python\n{SNIPPET.format(model_id=model_id)}```\n\n{COMMAND.format(model_id=model_id)}\n"
        f"## Serve\n\n{SERVE.format(model_id=model_id)}\n"
        f"## Training\n\n{origin} Settings:\n\n"
        f"```json\n{json.dumps(settings, indent=2, ensure_ascii=False)}\n```\n",
        encoding="utf-8",
    )


def row_of(final: dict[str, float], kind: str, name: str) -> str:
    """A line of the card's table, or nothing where there are no such numbers."""
    if f"{kind}/wer" not in final:
        return ""
    is_known = f"{kind}/wer_low" in final
    interval = f" ({final[f'{kind}/wer_low']:.2f}–{final[f'{kind}/wer_high']:.2f})" if is_known else ""
    wer, cer, raw = (f"{final[f'{kind}/{metric}']:.2f}" for metric in ("wer", "cer", "wer_raw"))
    return f"| {name} | {final[f'{kind}/utterances']} | {wer}{interval} | {cer} | {raw} |\n"


class NamedSource(Protocol):
    path: str


class CardSettings(Protocol):
    """The settings of a run that its card names; the others are listed."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    hf_repo_id: str | None
    model_name_or_path: str

    @property
    def tags(self) -> list[str]: ...
    @property
    def train_sources(self) -> Sequence[NamedSource]: ...
    @property
    def eval_sources(self) -> Sequence[NamedSource]: ...


def write_card_of_run(folder: Path, config: CardSettings, shown_as: Path, final: dict[str, float], origin: str) -> None:
    """Writes the card of a run's model into `folder`; without a repository the model is known as `shown_as`."""
    write_model_card(
        folder,
        model_id=config.hf_repo_id or str(shown_as),
        base_model=config.model_name_or_path,
        train_sources=[source.path for source in config.train_sources],
        eval_names=[source.path for source in config.eval_sources] or ["held-out recordings"],
        final=final,
        origin=origin,
        settings=dataclasses.asdict(config),
        tags=config.tags,
    )


def renamed(card: str, model_id: str) -> str:
    """A card that `write_model_card` wrote, for a model that goes to this repository; another README as it is."""
    found = re.search(r'^model_id, file, longest = "(.+?)"', card, re.MULTILINE)
    if settings_of(card) is None or not found or found[1] == model_id:
        return card
    old, short = re.escape(found[1]), model_id.split("/")[-1]
    for where, name in (
        (r"(?<=^- name: ).*$", short),  # of the metadata, whose other names are further in
        (rf"(?<=^# ){re.escape(found[1].split('/')[-1])}$", short),
        (rf'(?<=^model_id, file, longest = "){old}(?=")', model_id),
        (rf"(?<=^uv run transcribe_hebrew_asr.py FILE_OR_FOLDER --model ){old}$", model_id),
        (rf"(?<=`vllm serve ){old}(?=`)", model_id),
    ):
        card = re.sub(where, lambda _, name=name: name, card, count=1, flags=re.MULTILINE)
    return card


def settings_of(card: str) -> dict[str, Any] | None:
    """The settings in a model card that `write_model_card` wrote, or None for another README."""
    found = re.search(r"^## Training$.*?^```json$(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    try:
        settings = json.loads(found[1]) if found else None
    except ValueError:
        return None
    is_ours = isinstance(settings, dict) and {"language", "text_rules"} <= set(settings)
    return settings if is_ours else None
