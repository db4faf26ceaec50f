"""An utterance as tokens: the base model's chat template around the audio, and the target after it."""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from transformers import Qwen3ASRProcessor

from hebrew_asr.model.frames import FRAMES_PER_CHUNK, MEL_BINS, audio_token_count
from hebrew_asr.model.templates import rendered

AUDIO_TOKEN = "<|audio_pad|>"
CONTEXT = "CONTEXT OF AN UTTERANCE"  # stands for it while the template is rendered
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
END_OF_LANGUAGE = "<asr_text>"
EMPTY_SYSTEM_TURN = f"<|im_start|>system\n{END_OF_TURN}\n"


class PromptForm(NamedTuple):
    """A way in which engines ask for a transcript."""

    system: Literal["empty", "none", "context"]
    """The system turn: empty, left out, or filled with a context."""
    gives_language: bool
    """`language Hebrew<asr_text>` stands in the prompt; otherwise the model writes it."""


PROMPT_FORMS = {
    "empty-system": PromptForm("empty", False),  # the model's own package and template
    "no-system": PromptForm("none", False),  # the transcription endpoints of vLLM and SGLang
    "language": PromptForm("empty", True),  # the package, with a language
    "no-system-language": PromptForm("none", True),  # the endpoints, with a language
    "context": PromptForm("context", False),  # the package, with a context; the endpoints, with a prompt
}


class Prompts:
    """Writes prompts and targets.

    The prompt is the base model's chat template; the target `language Hebrew<asr_text>…<|im_end|>` follows it (where
    nobody speaks, `language None<asr_text><|im_end|>`). What is supervised is decided by position: everything after
    the prompt, up to and with <|im_end|> (which is also the padding token, so that a mask by token id would never teach
    the model to stop).
    """

    def __init__(self, processor: Qwen3ASRProcessor):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.audio_token_id: int = self.tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
        self.end_of_turn_id: int = self.tokenizer.convert_tokens_to_ids(END_OF_TURN)
        self.with_context, self.without = rendered(self.template, self.tokenizer.name_or_path)

    def template(self) -> list[str]:
        """The chat template around one recording, with CONTEXT in the system turn and without."""
        turns = [{"role": "user", "content": [{"type": "audio", "audio": ""}]}]
        system = {"role": "system", "content": [{"type": "text", "text": CONTEXT}]}
        texts = [
            self.processor.apply_chat_template(one, add_generation_prompt=True, tokenize=False)
            for one in ([system, *turns], turns)
        ]
        if any(text.count(AUDIO_TOKEN) != 1 for text in texts):
            raise ValueError(f"it does not write {AUDIO_TOKEN} once for a recording")
        return texts

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @functools.lru_cache(maxsize=64)  # noqa: B019 - the prompts live as long as the process
    def language_prefix(self, language: str) -> list[int]:
        return self.tokens(f"language {language}{END_OF_LANGUAGE}")

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def around_audio(self, context: str | None) -> tuple[list[int], list[int]]:
        """The chat template before and after the audio; `context` fills the system turn, None leaves it out."""
        text = self.with_context if context else self.without
        before, after = (part.replace(CONTEXT, context or "") for part in text.split(AUDIO_TOKEN))
        if context is None:  # the template cannot leave it out
            before = before.removeprefix(EMPTY_SYSTEM_TURN)
        return self.tokens(before), self.tokens(after)

    def prompt(self, frames: int, context: str | None) -> list[int]:
        """The prompt for a clip of `frames` mel frames, with a placeholder for each of its audio tokens."""
        before, after = self.around_audio(context)
        return before + [self.audio_token_id] * audio_token_count(frames) + after

    def sequences(self, utterances: list[dict[str, Any]], frames: list[int]) -> tuple[list[list[int]], list[list[int]]]:
        """Prompt and target of each utterance; for none, the prompt of a second of silence and no target."""
        contexts = [u["context"] for u in utterances] or [""]
        prompts = [self.prompt(count, context) for count, context in zip(frames, contexts, strict=True)]
        targets = [
            self.language_prefix(u["language"]) + self.tokens(u["text"]) + [self.end_of_turn_id] for u in utterances
        ]
        return prompts, targets or [[]]

    def read(self, generated: torch.Tensor | list[list[int]]) -> list[tuple[str | None, str]]:
        """The language and the transcript of each row of generated tokens, as the model wrote them.

        `return_format="parsed"` of the processor would show 20 and more repetitions as one: the worst hallucinations
        would not be counted.
        """
        return [read_output(text) for text in self.processor.decode(generated, skip_special_tokens=True)]

    def to_generate(self, clips: list[np.ndarray], prompts: list[list[int]]) -> dict[str, torch.Tensor]:
        """The tensors that `generation.generate` reads: features, and prompts padded on the left."""
        features, mask = padded(clips)
        return {
            "input_features": features,
            "input_features_mask": mask,
            "prompt_input_ids": pad(prompts, self.end_of_turn_id, left=True),
            "prompt_attention_mask": pad([[1] * len(p) for p in prompts], 0, left=True),
        }


def read_output(text: str) -> tuple[str | None, str]:
    """The language a model names, None for `language None` or none at all, and the transcript, loops and all."""
    prefix, mark, transcript = text.partition(END_OF_LANGUAGE)
    if not mark:
        return None, text.strip()
    language = prefix.strip().removeprefix("language ").strip()
    return (None if language in ("", "None") else language), transcript.strip()


def padded(clips: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (mel, frames) of clips as (batch, mel, time), padded to a multiple of 100 frames, and their mask."""
    frames = torch.tensor([clip.shape[1] for clip in clips])
    width = math.ceil(int(frames.max()) / FRAMES_PER_CHUNK) * FRAMES_PER_CHUNK
    features = torch.zeros(len(clips), MEL_BINS, width)
    for row, clip in zip(features, clips, strict=True):
        row[:, : clip.shape[1]] = torch.from_numpy(clip)
    return features, (torch.arange(width) < frames[:, None]).long()


def pad(rows: list[list[int]], value: int, left: bool = False) -> torch.Tensor:
    """Rows of tokens as (batch, tokens)."""
    width = max(map(len, rows))
    padding = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([p + row if left else row + p for row, p in zip(rows, padding, strict=True)])
