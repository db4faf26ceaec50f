"""The final model as others load it: written like a checkpoint, with a manifest, and checked before it is passed on."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import Qwen3ASRForConditionalGeneration

from hebrew_asr.checkpoints import store
from hebrew_asr.errors import InputError
from hebrew_asr.files import flush

CARD = "README.md"  # not in the manifest: its user may edit it


def save_for_use(model: Qwen3ASRForConditionalGeneration, processor: Any, folder: Path, dtype: torch.dtype) -> None:
    """Writes weights in one type (safetensors) with the processor; `folder` is replaced once all is on the disk.

    Raises InputError when the disk does not take it.
    """
    with torch.device("meta"):
        copy = Qwen3ASRForConditionalGeneration(type(model.config).from_dict(model.config.to_dict()))
    weights = {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    copy.tie_weights()
    copy.generation_config = model.generation_config
    for part in (copy.config.audio_config, copy.config.text_config):
        part.dtype = None  # of the model as it was loaded to train; the file has one type, which saving writes
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        copy.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        store.seal(unfinished, sorted(path.name for path in unfinished.iterdir() if path.is_file()), {})
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise InputError(
            f"{folder} cannot be written ({error}): make room, then the same command goes on from the last checkpoint"
        ) from error


def finish(folder: Path) -> None:
    """Flushes the card of a model that is complete; raises InputError when the model is not as it was written."""
    if (folder / CARD).exists():  # benchmarks write none
        flush(folder / CARD)
    flush(folder)
    flush(folder.parent)
    if problem := damage_of(folder):
        raise InputError(f"{folder} is damaged: {problem}. The same command makes it anew from the last checkpoints")


def damage_of(folder: Path) -> str | None:
    """Why a final model must not be passed on; None: its files are what their manifest says.

    Of one without a manifest (an older version wrote none) what can be seen: weights cut off, and empty files.
    """
    try:
        if (folder / store.MANIFEST).exists():
            store.verify_files(folder)
        else:
            json.loads((folder / "config.json").read_text())
            weights = sorted(folder.glob("*.safetensors"))
            if not weights:
                return "it has no weights"
            for file in weights:
                with safe_open(file, "pt"):
                    pass
        if empty := [path.name for path in sorted(folder.iterdir()) if path.is_file() and not path.stat().st_size]:
            return f"{empty[0]} is empty"
    except (OSError, ValueError, store.InvalidCheckpoint, SafetensorError) as error:
        return str(error)
    return None
