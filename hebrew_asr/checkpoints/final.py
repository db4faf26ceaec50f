"""The final model as others load it."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3ASRForConditionalGeneration

from hebrew_asr.files import follow_umask


def save_for_use(model: Qwen3ASRForConditionalGeneration, processor: Any, folder: Path, dtype: torch.dtype) -> None:
    """Writes weights in one type (safetensors) with the processor; `folder` is replaced once all of it is written."""
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
    copy.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    follow_umask(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
