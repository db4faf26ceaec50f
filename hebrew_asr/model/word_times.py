"""When each word of a transcript is spoken, read from the checkpoint's own attention.

The decoder has no cross-attention: its text attends to the audio's positions in its own sequence. In some heads the
tokens of a word look at where it is spoken. Which heads these are is not known beforehand. Every head's attention is
divided into words along a monotonic path, and the heads whose attention fits such a path best are believed: a head
that looks elsewhere has no good path. Nothing is trained, and no language is assumed.
"""

import contextlib
from collections.abc import Generator

import numpy as np
import torch
from transformers import Qwen3ASRForConditionalGeneration

from hebrew_asr.model.frames import TOKENS_PER_CHUNK
from hebrew_asr.model.precision import mixed_precision, to_encoder
from hebrew_asr.model.prompts import Prompts, padded

HEADS = 2  # believed, of all layers
POSITION_SECONDS = 0.08  # from one audio position to the next: 8 mel frames of 10 ms
LEAST_SHARE = 0.02  # of a position's attention, so that one position cannot forbid a path


def word_tokens(prompts: Prompts, text: str) -> tuple[list[int], np.ndarray]:
    """Tokens of a text whose words are one space apart, and the word (tokens,) that each belongs to."""
    encoded = prompts.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    words = np.cumsum([character == " " for character in text])
    owners = [words[end - 1] for _, end in encoded["offset_mapping"]]
    return encoded["input_ids"], np.array(owners)


@contextlib.contextmanager
def kept_attention(
    model: Qwen3ASRForConditionalGeneration, queries: slice, keys: slice
) -> Generator[list[torch.Tensor], None, None]:
    """Collects the language model's attention weights in its block: (heads, queries, keys) of each layer.

    They are computed explicitly meanwhile; fused attention does not give them.
    """
    text, kept = model.model.language_model, []
    usual = text.config._attn_implementation
    text.set_attn_implementation("eager")
    hooks = [
        layer.self_attn.register_forward_hook(lambda _, __, output: kept.append(output[1][0, :, queries, keys].float()))
        for layer in text.layers
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
        text.set_attn_implementation(usual)


@torch.no_grad()
def attention_to_audio(
    model: Qwen3ASRForConditionalGeneration, prompts: Prompts, features: np.ndarray, before: list[int], text: list[int]
) -> np.ndarray:
    """How much each head of all layers looks at the audio as it writes each token: (heads, tokens, positions).

    Args:
        features: log-mel (mel, frames) of the clip.
        before: the prompt's tokens, the audio's placeholders and the language among them.
        text: the transcript's tokens.
    """
    audio = [place for place, token in enumerate(before) if token == prompts.audio_token_id]
    clips, mask = padded([features])
    tokens = torch.tensor([before + text], device=model.device)
    writing = slice(len(before) - 1, len(before) + len(text) - 1)  # a token is written at the place before it
    with (
        mixed_precision(model),
        kept_attention(model, writing, slice(audio[0], audio[-1] + 1)) as kept,
    ):
        model.model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            input_features=to_encoder(model, clips),
            input_features_mask=mask.to(model.device),
            use_cache=False,
        )
    return torch.cat(kept).cpu().numpy()


def monotonic_paths(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best division of positions among words in their order, each with one position at least.

    Args:
        scores: (heads, words, positions), what a position adds where it belongs to a word; words ≤ positions.

    Returns:
        The first position of each word (heads, words), and the sum of the scores along the path (heads,).
    """
    heads, words, positions = scores.shape
    sums = np.concatenate([np.zeros((heads, words, 1)), scores.cumsum(axis=2)], axis=2)
    best = sums[:, 0].copy()  # best[h, e]: of the words so far, where the last one ends before position e
    best[:, 0] = -np.inf
    begins = np.zeros((words, heads, positions + 1), dtype=int)
    places = np.arange(positions + 1)
    for word in range(1, words):
        before = best - sums[:, word]
        highest = np.maximum.accumulate(before, axis=1)
        is_new = np.concatenate([np.ones((heads, 1), bool), highest[:, 1:] > highest[:, :-1]], axis=1)
        chosen = np.maximum.accumulate(np.where(is_new, places, 0), axis=1)
        begins[word, :, 1:] = chosen[:, :-1]
        best = np.full_like(best, -np.inf)
        best[:, 1:] = highest[:, :-1] + sums[:, word, 1:]
    starts = np.zeros((heads, words), dtype=int)
    end = np.full(heads, positions)
    for word in range(words - 1, 0, -1):
        end = starts[:, word] = begins[word, np.arange(heads), end]
    return starts, best[:, -1]


def first_positions(attention: np.ndarray, owners: np.ndarray) -> np.ndarray | None:
    """The first audio position of each word; None where there are more words than positions.

    Args:
        attention: (heads, tokens, positions).
        owners: (tokens,), the word that each token belongs to.
    """
    words = owners[-1] + 1
    if words > attention.shape[2]:
        return None
    attention = attention / attention.sum(axis=2, keepdims=True).clip(1e-9)
    by_word = np.stack([attention[:, owners == word].mean(axis=1) for word in range(words)], axis=1)

    def paths(by_word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shares = by_word / by_word.sum(axis=1, keepdims=True).clip(1e-9)
        return monotonic_paths(np.log(shares + LEAST_SHARE))

    _, fit = paths(by_word)
    believed = np.argsort(-fit, kind="stable")[:HEADS]
    starts, _ = paths(by_word[believed].mean(axis=0, keepdims=True))
    return starts[0]


def position_start(position: int) -> float:
    """Seconds from a clip's start at which an audio position begins; each second of audio has 13 of them."""
    second, place = divmod(position, TOKENS_PER_CHUNK)
    return max(0.0, second + (place - 0.5) * POSITION_SECONDS)


def within_speech(starts: list[float], end: float, spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(start, end) of words that begin at `starts`, without the pauses in them.

    A word that would begin in a pause begins after it; one that a pause follows ends where the pause begins. A word
    that is in a pause altogether keeps its time.

    Args:
        spans: the stretches of speech, in order.
    """
    times = []
    for start, stop in zip(starts, [*starts[1:], end], strict=True):
        spoken = [(max(start, a), min(stop, b)) for a, b in spans if a < stop and b > start]
        longest = max(spoken, key=lambda span: span[1] - span[0], default=(start, stop))
        times.append(longest)
    return times


def align(
    model: Qwen3ASRForConditionalGeneration,
    prompts: Prompts,
    features: np.ndarray,
    context: str,
    language: str,
    text: str,
) -> list[float] | None:
    """When each word of `text`, one space apart, begins: seconds from the clip's start; None: they cannot be told."""
    tokens, owners = word_tokens(prompts, text)
    before = prompts.prompt(features.shape[1], context) + prompts.language_prefix(language)
    first = first_positions(attention_to_audio(model, prompts, features, before, tokens), owners)
    return None if first is None else [position_start(int(position)) for position in first]
