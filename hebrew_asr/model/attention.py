"""Attention inside each utterance of a packed row and each window of the encoder, in one call and without a mask.

Left to itself, transformers makes a mask of `position_ids`, with which PyTorch has no FlashAttention, and calls
attention once for each of the encoder's windows. Here the kernel is told where utterances and windows end: PyTorch's
`varlen_attn`, or that of FlashAttention's package (for that one transformers alone finds packed utterances only where a
batch is a single row).
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, Qwen3ASRForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

from hebrew_asr.errors import InputError

# Attention in one call, by PyTorch's kernel or padded; transformers passes windows' ends to names with "flash" in them
VARLEN, PADDED = "flash_varlen", "flash_padded"
FLASH_TYPES = (torch.bfloat16, torch.float16)  # what the kernel takes
FEWER_KEYS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 has it not
WINDOW_TOKENS = 8 * 13  # the encoder's attention sees 8 s at once
KERNEL_TOLERANCE = 0.02  # of the norm; bf16 alone is off by less than 0.01
CHOICES = ("auto", "sdpa", "varlen", "flash_attention_2", "flash_attention_3")


@functools.cache
def has_flash() -> bool:
    """Whether PyTorch has its FlashAttention kernels for this process's GPU, and they are right on a small example."""
    if not torch.cuda.is_available() or not torch.backends.cuda.is_flash_attention_available():
        return False
    if torch.cuda.get_device_capability() < (8, 0):
        return False
    if wrong := kernel_error(flash, torch.device("cuda"), torch.bfloat16):
        warnings.warn(f"PyTorch's varlen_attn is not used: {wrong}", stacklevel=2)
    return not wrong


def kernel_error(kernel: Callable[..., torch.Tensor], device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with a kernel, called as `attend_padded` is: it fails, or it computes something else; or None."""
    ends = torch.tensor([0, 3, 40, 41, 150], dtype=torch.int32, device=device)
    random = torch.Generator().manual_seed(0)
    for is_causal, width, keys in ((False, 64, 4), (True, 128, 2)):  # as the encoder's, as the language model's
        shapes = [(150, heads, width) for heads in (4, keys, keys, 4)]
        drawn = [torch.randn(shape, generator=random).to(device, dtype) for shape in shapes]
        found = []
        for attention, exact in ((kernel, dtype), (attend_padded, torch.float32)):
            inputs = [tensor.detach().to(exact).requires_grad_() for tensor in drawn[:3]]
            try:
                output = attention(*inputs, ends, 109, 0.125, is_causal)
                gradients = torch.autograd.grad(output, inputs, drawn[3].to(exact))
            except RuntimeError as error:
                return str(error).strip().splitlines()[0]
            found.append([tensor.float() for tensor in (output, *gradients)])
        off = max(((ours - exact).norm() / exact.norm()).item() for ours, exact in zip(*found, strict=True))
        if not off < KERNEL_TOLERANCE:
            return f"it is off by {off:.1%} in a small example"
    return None


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scaling: float,
    is_causal: bool,
) -> torch.Tensor:
    """What `attend_padded` computes, by PyTorch's kernel where it takes the type."""
    if value.dtype not in FLASH_TYPES:  # an evaluation without autocast
        return attend_padded(query, key, value, ends, longest, scaling, is_causal)
    how: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0 if is_causal else -1)}
    if key.shape[1] != query.shape[1] and FEWER_KEYS:
        how["enable_gqa"] = True
    else:
        key, value = (repeated(tensor, query.shape[1]) for tensor in (key, value))
    return cast(torch.Tensor, varlen_attn(query, key, value, ends, ends, longest, longest, **how))


def repeated(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values (tokens, fewer heads, width) for so many heads of queries."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def set_attention(model: Qwen3ASRForConditionalGeneration, wanted: str, use_bf16: bool) -> None:
    """Has a model attend as `wanted`, one of CHOICES, says; raises InputError for what is not there.

    Args:
        wanted: auto: on a GPU as varlen, as far as it has the kernels, elsewhere sdpa; sdpa: as transformers does it;
            varlen: PyTorch's kernels; the others: FlashAttention's package.
    """
    text = audio = wanted
    if wanted == "auto":
        text = VARLEN if has_flash() and use_bf16 else "sdpa"
        audio = VARLEN if has_flash() and use_bf16 else PADDED if torch.cuda.is_available() else "sdpa"
    elif wanted == "varlen":
        text = audio = VARLEN
        if not has_flash():
            raise InputError("attention varlen needs a GPU of compute capability 8.0 (A100) or more: leave it at auto")
    if wanted not in ("auto", "sdpa") and not use_bf16:
        raise InputError(f"attention {wanted} needs bf16: leave it at auto")
    register()
    try:
        model.set_attn_implementation({"text_config": text, "audio_config": audio})
    except (ImportError, ValueError) as error:
        raise InputError(f"attention {wanted} cannot be had: {error} Leave it at auto") from error


def register() -> None:
    """Tells transformers of attention in one call. Which kernel it is, is known before a layer runs or is compiled."""
    for name, kernel in ((VARLEN, flash), (PADDED, attend_padded)):
        AttentionInterface.register(name, functools.partial(attend, kernel=kernel))
        AttentionMaskInterface.register(name, sdpa_mask)


def is_inside_utterances(text_config: PreTrainedConfig) -> bool:
    """Whether the language model's attention is computed in each utterance of a packed row, not under a mask."""
    return is_flash_attention_requested(text_config)


def packed(text_config: PreTrainedConfig, ends: torch.Tensor, longest: int) -> dict[str, Any]:
    """What the language model is given so that attention stays inside utterances, beside their positions.

    Args:
        ends: where utterances begin and end in the rows, one row after the other, padding included.
        longest: no utterance has more tokens.
    """
    if not is_inside_utterances(text_config):
        return {}  # a mask is made of the positions
    kernel = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    return kernel | {"attention_mask": {"full_attention": None}}


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    is_causal: bool = True,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    *,
    kernel: Callable[..., torch.Tensor],
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: of (rows, heads, tokens, width) each, to (rows, tokens, heads, width)."""
    if cu_seq_lens_q is None:  # one utterance to a row, and generation
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # Under autocast norms with fp32 weights leave queries and keys in fp32.
    flat = [tensor.transpose(1, 2).flatten(0, 1).to(value.dtype) for tensor in (query, key, value)]
    output = kernel(*flat, cu_seq_lens_q, max_length_q, scaling, is_causal)
    return output.unflatten(0, (len(query), -1)), None


def attend_padded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scaling: float,
    is_causal: bool,
) -> torch.Tensor:
    """Attention of (tokens, heads, width) each inside the stretches that `ends` bounds, padded into one batch.

    Keys and values may have fewer heads.
    """
    key, value = (repeated(tensor, query.shape[1]) for tensor in (key, value))
    lengths = ends.diff()
    stretch = torch.repeat_interleave(lengths, output_size=len(query))
    place = torch.arange(len(query), device=query.device) - ends[stretch]

    def batch(flat: torch.Tensor) -> torch.Tensor:
        padded = flat.new_zeros(len(lengths), longest, *flat.shape[1:])
        padded[stretch, place] = flat
        return padded.transpose(1, 2)

    mask = None  # what is padded stands last, and no token looks ahead
    if not is_causal:
        mask = (torch.arange(longest, device=query.device) < lengths[:, None])[:, None, None]
    output = torch.nn.functional.scaled_dot_product_attention(
        batch(query), batch(key), batch(value), attn_mask=mask, is_causal=is_causal, scale=scaling
    )
    return output.transpose(1, 2)[stretch, place]
