"""Greedy and sampled decoding of a batch, within the memory there is."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from transformers import Qwen3ASRForConditionalGeneration

from hebrew_asr.errors import InputError
from hebrew_asr.model.precision import mixed_precision, to_encoder
from hebrew_asr.model.prompts import END_OF_TEXT, END_OF_TURN

T = TypeVar("T")
MAX_NEW_TOKENS = 512  # as Qwen3-ASR's own checkpoints have it; `generate` here has limits of its own
Batch = dict[str, Any]  # tensors or lists of as many rows


def as_it_fits(run: Callable[[Batch], T], batch: Batch) -> list[tuple[int, T | None]]:
    """Runs a batch, tensors or lists by name, in halves where it does not fit the device's memory.

    Returns:
        the rows and the result of each part, in order; None for a single row that does not fit.
    """
    rows = len(next(iter(batch.values())))
    try:
        return [(rows, run(batch))]
    except torch.OutOfMemoryError:
        pass  # what it had allocated goes with its traceback, at the end of this block
    torch.cuda.empty_cache()
    if rows == 1:
        return [(1, None)]
    halves = [{name: tensor[part] for name, tensor in batch.items()} for part in np.s_[: rows // 2, rows // 2 :]]
    return [part for half in halves for part in as_it_fits(run, half)]


def new_token_limit(seconds: float) -> int:
    """Tokens of a transcript at most: a fast speaker's Hebrew has 8 a second (3.8 words of 2.1 tokens)."""
    return 64 + math.ceil(12 * seconds)


def decode_plainly(model: Qwen3ASRForConditionalGeneration, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Has `generate` stop at the tokens that end a turn, and pad with <|im_end|>, as Qwen3-ASR's own checkpoints do.

    Some checkpoints name other tokens in their generation_config, or none: what they write after the turn would be
    part of the transcript. What else it has (a penalty, tokens to suppress) would be obeyed unsaid, and goes; the
    number of new tokens stays. Raises InputError for a tokenizer without <|im_end|>.
    """
    known = tokenizer.get_vocab()
    if END_OF_TURN not in known:
        raise InputError(f"the tokenizer of {tokenizer.name_or_path} has no {END_OF_TURN}: take Qwen3-ASR's own")
    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        eos_token_id=[known[end] for end in (END_OF_TEXT, END_OF_TURN) if end in known],
        pad_token_id=known[END_OF_TURN],
        max_new_tokens=model.generation_config.max_new_tokens or MAX_NEW_TOKENS,
    )


def generate(
    model: Qwen3ASRForConditionalGeneration,
    batch: dict[str, torch.Tensor],
    limits: list[int],
    num_beams: int = 1,
    temperature: float = 0.0,
) -> torch.Tensor:
    """Transcribes a batch of the collator from its prompts alone; returns (batch, new tokens).

    Each row ends at its own limit of new tokens, so that no transcript depends on what else is in the batch, or before
    it, at the ends of `decode_plainly`. At a temperature above 0 it samples, from all tokens, with torch's global
    generator.

    Features are cast to the type of the encoder's first convolution, and everything runs under autocast when any
    weight is bf16.
    """
    prompts = batch["prompt_input_ids"].to(model.device)
    with torch.no_grad(), mixed_precision(model):
        generated = model.generate(
            input_ids=prompts,
            attention_mask=batch["prompt_attention_mask"].to(model.device),
            input_features=to_encoder(model, batch["input_features"]),
            input_features_mask=batch["input_features_mask"].to(model.device),
            max_new_tokens=max(limits),
            num_beams=num_beams,
            **({"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}),
        )
    generated = generated[:, prompts.shape[1] :]
    beyond = torch.arange(generated.shape[1], device=model.device) >= torch.tensor(limits, device=model.device)[:, None]
    return generated.masked_fill(beyond, model.generation_config.pad_token_id)
