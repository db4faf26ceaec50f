"""Qwen3-ASR's loss, computed where there are labels only, and never with all of its logits at once.

With a vocabulary of 151,936 the logits of one micro-batch are larger than all else in a step. Most positions are audio
or prompt and have no label; of the others, a few hundred are projected at a time.
"""

import contextlib
import functools
from collections.abc import Generator
from typing import Any

import torch
import torch.utils.checkpoint
from transformers import Qwen3ASRConfig, Qwen3ASRForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_asr.modeling_qwen3_asr import Qwen3ASRCausalLMOutputWithPast, Qwen3ASREncoder

from hebrew_asr.model.attention import WINDOW_TOKENS, packed

IGNORED_LABEL = -100  # marks positions without a label
LOGITS_AT_ONCE = 2**26  # 268 MB in fp32: 441 positions of the real vocabulary


def spares_passes(device: torch.device) -> bool:
    """Whether the vocabulary's gradient is made in few passes over memory, which is what it costs on a GPU.

    On a CPU it is made as autograd makes it: rounded otherwise, runs there would not end at the same figures.
    """
    return device.type == "cuda"


@functools.cache
def has_wide_products(device: torch.device) -> bool:
    """Whether bf16 matrices are multiplied and added to an fp32 one in one kernel, as a GPU's library does."""
    if device.type != "cuda":
        return False
    random = torch.Generator().manual_seed(0)
    total, left, right = (torch.randn(64, 64, generator=random).to(device) for _ in range(3))
    expected = total + 0.5 * left.bfloat16().float() @ right.bfloat16().float()
    try:
        torch.addmm(total, left.bfloat16(), right.bfloat16(), torch.float32, alpha=0.5, out=total)
    except RuntimeError:
        return False
    return torch.allclose(total, expected, rtol=1e-3, atol=1e-3)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, is_first: bool) -> None:
    """Adds scale × left @ right to `total` or, the first time, writes it there."""
    beta = 0 if is_first else 1
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, beta=beta, alpha=scale, out=total)
    elif has_wide_products(total.device):
        torch.addmm(total, left, right, total.dtype, beta=beta, alpha=scale, out=total)
    elif is_first:
        torch.mul(left @ right, scale, out=total)
    else:
        total.add_(left @ right, alpha=scale)


class TiedGradient:
    """The gradient of a matrix that is both vocabulary and embedding, from its one use to the other.

    It is as large as a third of all gradients. The head's part is made first; the embedding's is added to it in place,
    where autograd would make a second such matrix and a third one of their sum.
    """

    def __init__(self) -> None:
        self.of_head: torch.Tensor | None = None


class Embedding(torch.autograd.Function):
    """The embedding's rows, whose gradient is added to the head's."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor, tokens: torch.Tensor, padding: int | None, tied: TiedGradient):
        ctx.save_for_backward(weight, tokens)
        ctx.padding, ctx.tied = padding, tied
        return torch.nn.functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        weight, tokens = ctx.saved_tensors
        total, ctx.tied.of_head = ctx.tied.of_head, None
        if total is None:  # nothing had a label
            total = torch.zeros_like(weight)
        if ctx.padding is not None:
            gradient = gradient * (tokens != ctx.padding).unsqueeze(-1)
        total.index_put_((tokens.flatten(),), gradient.flatten(0, -2).to(total.dtype), accumulate=True)
        return total, None, None, None


class ChunkedNats(torch.autograd.Function):
    """Scaled sum of each target's nats, and the nats.

    The gradient is computed during forward, chunk by chunk, so that full logits never exist. Each chunk is projected
    once, and the gradient of the vocabulary's matrix is added up in one place.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        scale: float = 1.0,
        is_root: bool = False,
        tied: TiedGradient | None = None,
    ):
        """hidden (positions, width), weight (vocabulary, width), targets (positions,).

        Args:
            is_root: the backward pass begins at the sum, whose gradient is 1 and need not be multiplied.
            tied: where to leave the gradient of the matrix for the embedding, instead of returning it.
        """
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        device, dtype = hidden.device.type, weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        nats = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = None
        if wants_weight:
            # A scale of a step without labels is NaN, and so is its gradient.
            grad_weight = torch.empty_like(weight) if len(targets) else torch.full_like(weight, 0 * scale)
        at_once = max(1, LOGITS_AT_ONCE // len(weight))
        for places in (slice(begin, begin + at_once) for begin in range(0, len(targets), at_once)):
            part, aims = hidden[places].to(dtype), targets[places, None]
            log_p = torch.nn.functional.linear(part, weight).float().log_softmax(dim=1)  # autocast keeps its copy
            nats[places] = -log_p.gather(1, aims)[:, 0]
            if not (wants_hidden or wants_weight):
                continue
            grad_logits = log_p.exp_().scatter_add_(1, aims, -torch.ones_like(aims, dtype=log_p.dtype)).to(dtype)
            if grad_hidden is not None:
                grad_hidden[places] = (grad_logits @ weight).to(hidden.dtype) * scale
            if grad_weight is not None:
                with torch.autocast(device, enabled=False):
                    add_product(grad_weight, grad_logits.T, part, scale, is_first=places.start == 0)
        ctx.gradients, ctx.is_root, ctx.tied = (grad_hidden, grad_weight), is_root, tied
        ctx.mark_non_differentiable(nats)
        return nats.sum() * scale, nats

    @staticmethod
    def backward(ctx, grad_sum: torch.Tensor, _):
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: they are used once
        if not ctx.is_root:
            gradients = [None if gradient is None else gradient.mul_(grad_sum) for gradient in gradients]
        grad_hidden, grad_weight = gradients
        if ctx.tied is not None:
            ctx.tied.of_head, grad_weight = grad_weight, None
        return grad_hidden, grad_weight, None, None, None, None


def label_states(
    model: Qwen3ASRForConditionalGeneration,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    input_features: torch.Tensor,
    input_features_mask: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    utterance_ends: torch.Tensor | None = None,
    window_ends: torch.Tensor | None = None,
    audio_order: torch.Tensor | None = None,
    encoder_places: torch.Tensor | None = None,
    audio_places: torch.Tensor | None = None,
    label_places: torch.Tensor | None = None,
    tied: TiedGradient | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states of the positions that predict a label, row by row, and these labels.

    Args:
        labels: (rows, tokens), IGNORED_LABEL where a token is not to be learnt; each is predicted by the token before.
        position_ids: for rows that hold several utterances: 0 where one begins; attention stays inside of each.
        utterance_ends: of them, where utterances begin and end, one row after the other; padding is one more.
        window_ends: for features of several clips in a row: where the encoder's windows begin and end, in audio tokens.
        audio_order: which audio token stands at each placeholder, where clips stand there more than once.
        encoder_places, audio_places, label_places: as `packing.places_of` finds them; left out, they are found on the
            device, for which the host waits.
        tied: where the head leaves its gradient for the embedding.
    """
    inner = model.model
    windows: dict[str, Any] = {} if encoder_places is None else {"places": encoder_places}
    if window_ends is not None:
        windows |= {"cu_seqlens": window_ends, "max_seqlen": WINDOW_TOKENS}
    if audio_places is None:
        audio_places = flat_audio_places(input_ids, labels, model.config.audio_token_id)
    if label_places is None:
        label_places = flat_label_places(labels)
    text = {"attention_mask": attention_mask, "position_ids": position_ids}
    if utterance_ends is not None:
        text |= packed(inner.language_model.config, utterance_ends, longest=input_ids.shape[1])
    audio = inner.get_audio_features(input_features, input_features_mask, return_dict=True, **windows).pooler_output
    if audio_order is not None:
        audio = audio[audio_order]
    embedding = inner.get_input_embeddings()
    if tied is None:
        embedded = embedding(input_ids)
    else:
        embedded = Embedding.apply(embedding.weight, input_ids, embedding.padding_idx, tied)
    if embedding.weight.requires_grad:  # where it is sharded it is bf16 here; the layers' sum is fp32 all the same
        embedded = embedded.to(torch.promote_types(embedded.dtype, torch.float32))
    heard = embedded.flatten(0, 1).index_copy(0, audio_places, audio.to(embedded.dtype)).view_as(embedded)
    hidden = inner.language_model(inputs_embeds=heard, use_cache=False, **text).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, label_places), labels.flatten().index_select(0, label_places + 1)


def flat_audio_places(input_ids: torch.Tensor, labels: torch.Tensor, audio_token: int) -> torch.Tensor:
    """Placeholders, in the tokens of all rows one after the other; a sample that is learnt may hold the token too."""
    return ((input_ids == audio_token) & (labels == IGNORED_LABEL)).flatten().nonzero()[:, 0]


def flat_label_places(labels: torch.Tensor) -> torch.Tensor:
    """Tokens that predict a label, in the tokens of all rows one after the other; the label is at the next place."""
    predicts = torch.nn.functional.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1))
    return predicts.flatten().nonzero()[:, 0]


class Encoder(Qwen3ASREncoder):
    """transformers' encoder which, given `places`, need not ask the device where the sound is."""

    def forward(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor,
        places: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Features (rows, mel, frames), frames in whole seconds.

        Args:
            places: of all tokens that the convolutions make of the seconds, those of sound, in the order of the rows.
            kwargs: cu_seqlens and max_seqlen, where its windows end, and how long they are at most.
        """
        if places is None:
            return super().forward(input_features, input_features_mask, **kwargs)
        seconds = input_features.unflatten(2, (-1, 2 * self.n_window)).transpose(1, 2).flatten(0, 1).unsqueeze(1)
        for convolution in (self.conv2d1, self.conv2d2, self.conv2d3):
            seconds = torch.nn.functional.gelu(convolution(seconds))
        tokens = self.conv_out(seconds.permute(0, 3, 1, 2).flatten(2))
        tokens = tokens + self.positional_embedding.positional_embedding[: tokens.shape[1]].to(tokens.dtype)
        hidden = tokens.flatten(0, 1).index_select(0, places)
        for layer in self.layers:
            hidden = layer(hidden, **kwargs)[0]
        return BaseModelOutputWithPooling(last_hidden_state=self.ln_post(hidden))


def label_nats(
    model: Qwen3ASRForConditionalGeneration, scale: float = 1.0, is_root: bool = False, **batch: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of −log p over all labels times `scale`, and −log p of each of them, row by row.

    Args:
        is_root: the backward pass begins at that sum, and its gradient is 1.
        batch: as of `label_states`.
    """
    weight = model.lm_head.weight
    is_tied = weight is model.get_input_embeddings().weight
    is_one = is_tied and weight.requires_grad and torch.is_grad_enabled() and spares_passes(weight.device)
    tied = TiedGradient() if is_one else None
    inputs: dict[str, Any] = dict(batch)
    hidden, targets = label_states(model, **inputs, tied=tied)
    if not torch.is_grad_enabled():  # a Function is told of inputs that require a gradient even then
        hidden, weight = hidden.detach(), weight.detach()
    return ChunkedNats.apply(hidden, weight, targets, scale, is_root, tied)


@contextlib.contextmanager
def in_tf32() -> Generator[None]:
    """Has a GPU round what it multiplies of fp32 matrices to 10 bits after the point, and add up in fp32.

    Only for what is within: rotary positions are an fp32 product too, and would be off.
    """
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before


class Logits(torch.autograd.Function):
    """hidden (positions, width) @ weight.T (vocabulary, width) in TF32, as are its gradients.

    GSPO's ratio of a transcript of 40 tokens is then off by 1.5e-5 (emulated on a CPU), where its clip is 3e-4 wide.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor):
        ctx.save_for_backward(hidden, weight)
        with in_tf32():
            return hidden @ weight.T

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        hidden, weight = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad
        with in_tf32():
            of_hidden = gradient @ weight if wants_hidden else None
            return of_hidden, gradient.T @ hidden if wants_weight else None


def token_log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of each target, through which gradients flow, and the entropy in nats of what it was chosen from.

    Logits are divided by the temperature. Those of a chunk are made again in the backward pass: the gradient that
    comes from outside is not known during forward.
    """

    def of_chunk(part: torch.Tensor, aims: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        exact = torch.promote_types(part.dtype, torch.float32)
        with torch.autocast(part.device.type, enabled=False):  # bf16 logits are off by as much as GSPO's clip is wide
            logits = Logits.apply(part.to(exact), weight.to(exact))
            log_p = (logits / temperature).log_softmax(dim=1)
        entropy = -(log_p.detach().exp() * log_p.detach()).sum(dim=1)
        return log_p.gather(1, aims[:, None])[:, 0], entropy

    at_once = max(1, LOGITS_AT_ONCE // len(weight))
    chunks = [
        torch.utils.checkpoint.checkpoint(
            of_chunk,
            hidden[begin : begin + at_once],
            targets[begin : begin + at_once],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for begin in range(0, max(1, len(targets)), at_once)
    ]
    log_p, entropy = zip(*chunks, strict=True)
    return torch.cat(log_p), torch.cat(entropy)


class SpeechModel(Qwen3ASRForConditionalGeneration):
    """Qwen3ASRForConditionalGeneration that, given labels, returns their loss and no logits.

    Given a temperature too, it returns each label's log p and entropy (`token_log_probs`) instead of the loss. It is a
    model's forward so that DistributedDataParallel sees it, which reduces gradients of what its forward ran.

    Given `root_scale`, it returns the labels' summed nats times that, for a backward pass that begins there.
    """

    def __init__(self, config: Qwen3ASRConfig):
        super().__init__(config)
        self.model.audio_tower.__class__ = Encoder

    @functools.wraps(Qwen3ASRForConditionalGeneration.forward)
    def forward(self, *args: Any, labels: torch.Tensor | None = None, **inputs: Any) -> Qwen3ASRCausalLMOutputWithPast:
        if labels is None:
            return super().forward(*args, **inputs)
        if (temperature := inputs.pop("temperature", None)) is not None:
            hidden, targets = label_states(self, labels=labels, **inputs)
            return token_log_probs(hidden, self.lm_head.weight, targets, temperature)
        if (scale := inputs.pop("root_scale", None)) is not None:
            if spares_passes(labels.device):
                total, _ = label_nats(self, scale, is_root=True, labels=labels, **inputs)
            else:
                total = label_nats(self, labels=labels, **inputs)[0] * scale
            return Qwen3ASRCausalLMOutputWithPast(loss=total)
        items = inputs.pop("num_items_in_batch", None)
        total, nats = label_nats(self, labels=labels, **inputs)
        return Qwen3ASRCausalLMOutputWithPast(loss=total / (len(nats) if items is None else items))
