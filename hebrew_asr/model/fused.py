"""Norms, rotary positions and the gated product of a packed row, each in one kernel forward and one backward.

As transformers writes them they are about sixty kernels a layer, most of which read and write fp32: half of a step's
time on a GPU. Here each is a plain function of tensors with its gradient beside it. On a GPU PyTorch's compiler makes a
kernel of it; elsewhere it runs as it stands, which is how tests compare it with transformers' form. Within a kernel all
is fp32. What is written for a matrix product has its type (bf16 under autocast), so that nothing is cast afterwards.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Function
from transformers import Qwen3ASRForConditionalGeneration
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from hebrew_asr.model.attention import VARLEN, flash

TOLERANCE = 0.02  # of the norm; bf16 alone is off by less than 0.01
EXAMPLE_TOKENS = 2048  # of tensors for whose size a kernel is chosen; it then takes any number
INDEXED = 2**31 - 1  # numbers of a tensor that a kernel can count; one of 300,000 tokens would have more

Call = tuple[Callable, tuple[Any, ...]]
"""One of the functions below, and its arguments, of which no tensor is larger than the first."""


def run(*calls: Call) -> list[torch.Tensor]:
    """The tensors that calls return, one after the other; none needs what another returns. On a GPU each is a kernel.

    What is run together costs the host about what one call does.
    """
    return launch(*calls) if calls[0][1][0].is_cuda else as_they_stand(*calls)


def as_they_stand(*calls: Call) -> list[torch.Tensor]:
    returned = (function(*args) for function, args in calls)
    return [tensor for out in returned for tensor in (out if isinstance(out, tuple) else (out,))]


KERNELS: dict[tuple, Callable[..., Any]] = {}
"""By functions and by all of their arguments that a kernel is made for: types, widths, numbers, but not tokens."""


def launch(*calls: Call) -> list[torch.Tensor]:
    """Runs calls as kernels, which are compiled for the first calls of their kind.

    They are called past torch.compile: what it does at each call costs the host more than all else here.
    """
    first = calls[0][1][0]
    if first.numel() > INDEXED:
        return as_they_stand(*calls)
    kind, tensors = [first.device], []
    for function, args in calls:
        kind.append(function)
        for arg in args:
            if isinstance(arg, torch.Tensor):
                tensors.append(arg.contiguous())
                kind += arg.dtype, arg.shape[1:] or arg.shape  # (tokens, …), or a weight
            else:
                kind.append(arg)
    key = tuple(kind)
    if key not in KERNELS:
        KERNELS[key] = tried(calls, tensors)
    return KERNELS[key](*tensors)


def tried(calls: tuple[Call, ...], tensors: list[torch.Tensor]) -> Callable[..., Any]:
    """A kernel that has run, or the calls as they stand, with a warning; raises what the very first one raises."""
    try:
        kernel = compiled(calls)
        kernel(*tensors)
        return kernel
    except torch.OutOfMemoryError:  # the step is tried again, with less
        raise
    except Exception as error:
        if not KERNELS:  # `kernel_error` says so, and nothing is fused
            raise
        names = ", ".join(getattr(function, "__name__", str(function)) for function, _ in calls)
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        warnings.warn(f"{names}: runs unfused, which is slower: {reason}", stacklevel=3)
        return Together(calls)


class Together(torch.nn.Module):
    """Calls as a function of their tensors."""

    def __init__(self, calls: tuple[Call, ...]):
        super().__init__()
        self.calls = calls

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        given = iter(tensors)
        return as_they_stand(
            *(
                (f, tuple(next(given) if isinstance(arg, torch.Tensor) else arg for arg in args))
                for f, args in self.calls
            )
        )


def compiled(calls: tuple[Call, ...]) -> Callable[..., Any]:
    """What PyTorch's compiler makes of calls: a function of their tensors, for any number of tokens."""
    examples, lengths = [], []
    for tensor in (arg for _, args in calls for arg in args if isinstance(arg, torch.Tensor)):
        is_weight = tensor.dim() == 1
        shape = tensor.shape if is_weight else (EXAMPLE_TOKENS, *tensor.shape[1:])
        examples.append(torch.empty(shape, dtype=tensor.dtype, device=tensor.device))
        lengths.append(None if is_weight else {0: torch.export.Dim.DYNAMIC})
    with torch.no_grad(), torch.autocast(examples[0].device.type, enabled=False):
        exported = torch.export.export(Together(calls), tuple(examples), dynamic_shapes={"tensors": tuple(lengths)})
        graph = exported.graph_module
        inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)


# -------------------------------------------------------------------------------------------------------------- Kernels


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """RMSNorm of (tokens, width)."""
    x = hidden.float()
    return (weight * (x * inverse_rms(x, eps))).to(dtype)


def add_norm(
    hidden: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Their sum, and its RMSNorm."""
    total = hidden + branch
    return total, norm(total, weight, eps, dtype)


def norm_gradient(
    of_normed: torch.Tensor, of_total: torch.Tensor, total: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Of what went in, where it also went past the norm."""
    x = total.float()
    scale = inverse_rms(x, eps)
    x, g = x * scale, of_normed.float() * weight
    return (of_total + scale * (g - x * (g * x).mean(-1, keepdim=True))).to(total.dtype)


def norms_gradient(
    of_normed: torch.Tensor,
    of_total: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    branch_type: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, also in the type of the branch that was added."""
    gradient = norm_gradient(of_normed, of_total, total, weight, eps)
    return gradient, gradient.to(branch_type)


def norm_weight_gradient(of_normed: torch.Tensor, total: torch.Tensor, eps: float) -> torch.Tensor:
    x = total.float()
    return (of_normed.float() * (x * inverse_rms(x, eps))).sum(0)


def halves(x: torch.Tensor) -> torch.Tensor:
    """(…, width) as (…, 2, width / 2), in fp32. Joining halves would be kernels of their own; swapping them is none."""
    return x.float().unflatten(-1, (2, -1))


def signs(x: torch.Tensor) -> torch.Tensor:
    """−1 for the lower half and 1 for the upper one."""
    return 2 * torch.arange(2, device=x.device)[:, None] - 1


def turned(
    heads: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """RMSNorm of each head of (tokens, heads, width), turned by its token's position; cos, sin (tokens, width)."""
    x = halves(heads) * inverse_rms(heads.float(), eps)[..., None] * halves(weight)
    return (x * halves(cos)[:, None] + x.flip(-2) * signs(x) * halves(sin)[:, None]).flatten(-2).to(dtype)


def turned_back(gradient: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    g = halves(gradient)
    return (g * halves(cos)[:, None] - (g * halves(sin)[:, None]).flip(-2) * signs(g)).flatten(-2)


def turned_gradient(
    gradient: torch.Tensor,
    heads: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    x = heads.float()
    scale = inverse_rms(x, eps)
    x, g = x * scale, turned_back(gradient, cos, sin) * weight
    return (scale * (g - x * (g * x).mean(-1, keepdim=True))).to(heads.dtype)


def turned_weight_gradient(
    gradient: torch.Tensor, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    x = heads.float()
    return (turned_back(gradient, cos, sin) * (x * inverse_rms(x, eps))).sum((0, 1))


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) × up"""
    g = gate.float()
    return (g * torch.sigmoid(g) * up.float()).to(gate.dtype)


def gated_gradient(gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gradient, g = gradient.float(), gate.float()
    open_ = torch.sigmoid(g)
    of_gate = gradient * up.float() * open_ * (1 + g * (1 - open_))
    return of_gate.to(gate.dtype), (gradient * g * open_).to(up.dtype)


# ------------------------------------------------------------------------------------------------------------ Functions


class Norm(Function):
    """hidden (tokens, width) as it is, and its RMSNorm: so that both gradients are added where the norm's is made."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype):
        ctx.save_for_backward(hidden, weight)
        ctx.eps = eps
        return hidden, *run((norm, (hidden, weight, eps, dtype)))

    @staticmethod
    def backward(ctx, of_hidden: torch.Tensor, of_normed: torch.Tensor):
        hidden, weight = ctx.saved_tensors
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        calls: list[Call] = []
        if wants_hidden:
            calls.append((norm_gradient, (of_normed, of_hidden, hidden, weight, ctx.eps)))
        if wants_weight:
            calls.append((norm_weight_gradient, (of_normed, hidden, ctx.eps)))
        gradients = run(*calls)
        gradient = gradients[0] if wants_hidden else None
        return gradient, gradients[-1].to(weight.dtype) if wants_weight else None, None, None


class AddNorm(Function):
    """hidden + branch, and its RMSNorm."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype):
        total, normed = run((add_norm, (hidden, branch, weight, eps, dtype)))
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.branch_type = eps, branch.dtype
        return total, normed

    @staticmethod
    def backward(ctx, of_total: torch.Tensor, of_normed: torch.Tensor):
        total, weight = ctx.saved_tensors
        calls: list[Call] = [(norms_gradient, (of_normed, of_total, total, weight, ctx.eps, ctx.branch_type))]
        if ctx.needs_input_grad[2]:
            calls.append((norm_weight_gradient, (of_normed, total, ctx.eps)))
        of_hidden, of_branch, *of_weight = run(*calls)
        return of_hidden, of_branch, of_weight[0].to(weight.dtype) if of_weight else None, None, None


class Turned(Function):
    """Queries and keys (tokens, heads, width), normed and turned."""

    @staticmethod
    def forward(
        ctx,
        query: torch.Tensor,
        key: torch.Tensor,
        query_weight: torch.Tensor,
        key_weight: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        eps: float,
    ):
        ctx.save_for_backward(query, key, query_weight, key_weight, cos, sin)
        ctx.eps = eps
        both = ((query, query_weight), (key, key_weight))
        return tuple(run(*((turned, (heads, weight, cos, sin, eps, heads.dtype)) for heads, weight in both)))

    @staticmethod
    def backward(ctx, of_query: torch.Tensor, of_key: torch.Tensor):
        query, key, query_weight, key_weight, cos, sin = ctx.saved_tensors
        both = ((of_query, query, query_weight), (of_key, key, key_weight))
        calls: list[Call] = [(turned_gradient, (g, heads, weight, cos, sin, ctx.eps)) for g, heads, weight in both]
        if not any(ctx.needs_input_grad[2:4]):
            return *run(*calls), None, None, None, None, None
        calls += [(turned_weight_gradient, (g, heads, cos, sin, ctx.eps)) for g, heads, _ in both]
        *gradients, of_query_weight, of_key_weight = run(*calls)
        of_weights = of_query_weight.to(query_weight.dtype), of_key_weight.to(key_weight.dtype)
        return *gradients, *of_weights, None, None, None


class Gated(Function):
    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor):
        ctx.save_for_backward(gate, up)
        [out] = run((gated, (gate, up)))
        return out

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return tuple(run((gated_gradient, (gradient, *ctx.saved_tensors))))


# --------------------------------------------------------------------------------------------------------------- Layers


APPLIED = Norm.apply, AddNorm.apply, Turned.apply, Gated.apply
TRACED = (  # for a compiler that sees the whole layer, and makes gradients and kernels itself
    lambda hidden, *args: (hidden, norm(hidden, *args)),
    add_norm,
    lambda query, key, query_weight, key_weight, *args: (
        turned(query, query_weight, *args, query.dtype),
        turned(key, key_weight, *args, key.dtype),
    ),
    gated,
)


class FusedLayer(Qwen3DecoderLayer):
    """A layer of the language model that computes packed rows in few kernels, and all else as transformers does."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        ends = kwargs.get("cu_seq_lens_q")
        if ends is None:  # one utterance to a row, and generation
            return super().forward(hidden_states, **kwargs)
        attention, mlp, device = self.self_attn, self.mlp, hidden_states.device.type
        eps = self.input_layernorm.variance_epsilon
        narrow = hidden_states.dtype
        if torch.is_autocast_enabled(device):
            narrow = torch.get_autocast_dtype(device)
        cos, sin = (turns.flatten(0, 1) for turns in kwargs["position_embeddings"])
        normed_of, sum_normed, turned_of, gated_of = TRACED if torch.compiler.is_compiling() else APPLIED
        hidden, normed = normed_of(hidden_states.flatten(0, 1), self.input_layernorm.weight, eps, narrow)
        query, key, value = (
            project(normed).unflatten(1, (-1, attention.head_dim))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = turned_of(query, key, attention.q_norm.weight, attention.k_norm.weight, cos, sin, eps)
        attended = flash(query, key, value, ends, kwargs["max_length_q"], attention.scaling, True)
        branch = attention.o_proj(attended.flatten(1))
        hidden, normed = sum_normed(hidden, branch, self.post_attention_layernorm.weight, eps, narrow)
        branch = mlp.down_proj(gated_of(mlp.gate_proj(normed), mlp.up_proj(normed)))
        # A sum and no view, on which FSDP2's hook for the backward pass could be lost.
        return hidden.view_as(hidden_states) + branch.view_as(hidden_states)


class NarrowLayerNorm(torch.nn.LayerNorm):
    """Reads and writes its input's type. Autocast would have it read and write fp32, with a cast on either side."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return torch.nn.functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def fuse(model: Qwen3ASRForConditionalGeneration) -> None:
    """Has a model compute packed rows in few kernels; names and values of its parameters stay what they are."""
    for layer in model.model.language_model.layers:
        layer.__class__ = FusedLayer
    for module in model.model.audio_tower.modules():
        if type(module) is torch.nn.LayerNorm:
            module.__class__ = NarrowLayerNorm


def fuse_where_it_runs(model: Qwen3ASRForConditionalGeneration) -> None:
    """`fuse`, where the language model's attention is told where utterances end and this GPU has the kernels."""
    if model.config.text_config._attn_implementation == VARLEN and has_fused():
        fuse(model)


@functools.cache
def has_fused() -> bool:
    """Whether this process's GPU computes what the functions above do; says why not."""
    if wrong := kernel_error(torch.device("cuda")):
        warnings.warn(f"norms, positions and gated products run unfused, which is slower: {wrong}", stacklevel=2)
    return not wrong


def kernel_error(device: torch.device) -> str | None:
    """What is wrong with the kernels on a device, in bf16 against fp32 as it stands: one fails, or is off; or None."""
    random = torch.Generator().manual_seed(0)
    hidden, branch, of_hidden = (torch.randn(70, 256, generator=random).to(device) for _ in range(3))
    gate, of_normed = (torch.randn(70, 256, generator=random).to(device, torch.bfloat16) for _ in range(2))
    branch = branch.bfloat16()
    weight = torch.rand(256, generator=random).to(device)
    heads, of_heads = (tensor.unflatten(1, (2, 128)) for tensor in (gate, of_normed))
    cos, sin = (wave(torch.rand(70, 128, generator=random)).to(device) for wave in (torch.cos, torch.sin))
    each = weight[:128].contiguous()
    examples: list[tuple[Callable, Any]] = [
        (norm, (hidden, weight, 1e-6, torch.bfloat16)),
        (add_norm, (hidden, branch, weight, 1e-6, torch.bfloat16)),
        (norm_gradient, (of_normed, of_hidden, hidden, weight, 1e-6)),
        (norms_gradient, (of_normed, of_hidden, hidden, weight, 1e-6, torch.bfloat16)),
        (norm_weight_gradient, (of_normed, hidden, 1e-6)),
        (turned, (heads, each, cos, sin, 1e-6, torch.bfloat16)),
        (turned_gradient, (of_heads, heads, each, cos, sin, 1e-6)),
        (turned_weight_gradient, (of_heads, heads, cos, sin, 1e-6)),
        (gated, (gate, branch)),
        (gated_gradient, (of_normed, gate, branch)),
    ]
    for function, args in examples:
        try:
            found = run((function, args))
        except Exception as error:  # a compiler that is missing fails in many ways
            return f"{getattr(function, '__name__', function)}: {(str(error).strip() or repr(error)).splitlines()[0]}"
        for ours, exact in zip(found, as_they_stand((function, args)), strict=True):
            off = ((ours.float() - exact.float()).norm() / exact.float().norm()).item()
            if not off < TOLERANCE:
                return f"{getattr(function, '__name__', function)} is off by {off:.1%} in a small example"
    return None
