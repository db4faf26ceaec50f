"""What a GPU has and a CPU has not, computed plainly."""

import torch

from hebrew_asr.model import attention


def varlen_attn(query, key, value, ends, _, longest, __, *, scale, window_size, enable_gqa=False):
    """PyTorch's FlashAttention inside of utterances."""
    return attention.attend_padded(query, key, value, ends, longest, scale, window_size == (-1, 0))


def wide_addmm(total, left, right, dtype, *, beta=1, alpha=1, out):
    """The product of two bf16 matrices added to an fp32 one, nothing rounded in between."""
    product = alpha * left.to(dtype) @ right.to(dtype)
    return out.copy_(product + beta * total if beta else product)


library = torch.library.Library("aten", "IMPL")
library.impl("addmm.dtype_out", wide_addmm, "CPU")
