"""In which number types a model runs."""

import torch
from transformers import Qwen3ASRForConditionalGeneration


def runs_bf16(device: torch.device) -> bool:
    """Whether a device runs bf16 where nobody says otherwise: a GPU that has it does, a CPU does not."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def mixed_precision(model: Qwen3ASRForConditionalGeneration) -> torch.autocast:
    """Runs a model whose weights are in fp32, in bf16, or in both: under autocast when any weight is bf16."""
    any_bf16 = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    return torch.autocast(model.device.type, torch.bfloat16, enabled=any_bf16)


def to_encoder(model: Qwen3ASRForConditionalGeneration, features: torch.Tensor) -> torch.Tensor:
    """Log-mel features on the model's device and in the type of the encoder's first convolution."""
    return features.to(model.device, model.model.audio_tower.conv2d1.weight.dtype)
