"""The largest `tokens_per_micro_batch` that fits the device's memory, found by running such micro-batches.

Every process tries its own device alone, with no collective and no DistributedDataParallel in between: one that runs
out of memory leaves nobody waiting. What each found is compared afterwards, and the smallest counts for all. Imports
nothing of the training script.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import accelerate
import numpy as np
import torch
from accelerate.utils import find_executable_batch_size, gather_object

from hebrew_asr.errors import InputError
from hebrew_asr.model.frames import FRAMES_PER_CHUNK, SHORTEST_CLIP, TOKENS_PER_CHUNK
from hebrew_asr.model.loss import SpeechModel
from hebrew_asr.model.muon import by_muon
from hebrew_asr.model.packing import pack, places_of
from hebrew_asr.model.stages import freeze_for
from hebrew_asr.processes import fail_together
from hebrew_asr.training.plan import TEXT_TOKENS_PER_SECOND, USABLE
from hebrew_asr.training.settings import Settings

STEP = 0.05  # from one budget tried to the next


class Utterances:
    """Made-up utterances as long as training allows, which fill a budget; their features are zeros.

    Where training gives contexts, one is as long as the transcript of the longest utterance: it may be another's.
    """

    def __init__(self, collator: Any, config: Settings):
        self.collator, self.longest = collator, config.max_audio_length_seconds
        self.language = config.language
        self.has_context = config.prev_context_prob > 0
        augmented = config.use_waveform_augmentation
        self.stretch = 1 / min(1.0, *config.waveform_augmentation.speeds) if augmented else 1.0  # of audio, once dealt

    def sequence(
        self, seconds: float, stretch: float = 1.0, in_context: bool = False
    ) -> tuple[np.ndarray, list[int], list[int]]:
        """Features, prompt and target of one."""
        frames = round(FRAMES_PER_CHUNK * seconds * stretch)
        collator, text = self.collator, [self.collator.end_of_turn_id] * round(TEXT_TOKENS_PER_SECOND * seconds)
        mel = collator.processor.feature_extractor.feature_size
        target = [*collator.language_prefix(self.language), *text, collator.end_of_turn_id]
        context = [collator.end_of_turn_id] * (round(TEXT_TOKENS_PER_SECOND * self.longest) if in_context else 0)
        return np.zeros((mel, frames), np.float32), context + collator.prompt(frames, ""), target

    def tokens(self, seconds: float, in_context: bool = False) -> int:
        _, prompt, target = self.sequence(seconds, in_context=in_context)
        return len(prompt + target)

    @property
    def least(self) -> int:
        """Tokens of the longest utterance there may be, which is alone where the budget is smaller."""
        return self.tokens(self.longest, self.has_context)

    def fillings(self, budget: int) -> list[dict[str, torch.Tensor]]:
        """The training batches that may need most: without contexts, where most is heard and learnt, and with them."""
        return [self.filling(budget, in_context) for in_context in ((False, True) if self.has_context else (False,))]

    def filling(self, budget: int, in_context: bool = False) -> dict[str, torch.Tensor]:
        """A training batch: as many of the longest as the budget holds, and a shorter one for the rest."""
        full, left = [], budget
        while not full or left >= self.tokens(self.longest, in_context):
            left -= self.tokens(self.longest, in_context)
            full.append(self.sequence(self.longest, self.stretch, in_context))
        shortest = self.tokens(SHORTEST_CLIP)
        if left >= shortest:
            more = (left - shortest) / (TOKENS_PER_CHUNK + TEXT_TOKENS_PER_SECOND)
            full.append(self.sequence(min(self.longest, SHORTEST_CLIP + more), self.stretch))
        clips, prompts, targets = zip(*full, strict=True)
        # In one row, whose mask is the largest there may be: which rows a step's utterances have is not known.
        batch, _ = pack(list(clips), list(prompts), list(targets), self.collator.end_of_turn_id, in_one_row=True)
        return batch | places_of(batch, self.collator.audio_token_id)


def run_micro_batches(
    model: SpeechModel,
    batch: dict[str, torch.Tensor],
    kept: Sequence[torch.Tensor],
    device: torch.device,
    use_bf16: bool,
    processes: int,
) -> None:
    """Two forward and backward passes of a step, the second with the gradients of the first, beside all that stands.

    Args:
        kept: what the optimizer and the moving average keep a tensor each of the size of.
    """
    model.to(device)
    model.zero_grad()
    reduced = [parameter for parameter in model.parameters() if parameter.requires_grad and processes > 1]
    # The buckets of DistributedDataParallel hold every gradient once more.
    standing = [torch.empty_like(tensor, device=device) for tensor in (*kept, *reduced)]
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    for _ in range(2):
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16):
            loss = model(**batch, num_items_in_batch=1).loss
        loss.backward()
    del standing


def largest_budget(attempt: Callable[[int], None], least: int, most: int) -> int:
    """The first budget that `attempt` has memory for, from `most` down to `least`, each about 5 % below the last.

    Raises InputError where none has.
    """
    budget = most

    def lower() -> int:
        nonlocal budget
        if budget <= least:
            raise InputError(
                f"not even the longest utterance training allows ({least} tokens) fits this device: give"
                " --gradient_checkpointing true, a lower max_audio_length_seconds, or stages that train fewer layers"
            )
        budget = max(least, int((1 - STEP) * budget) // 64 * 64)
        return budget

    def attempt_and_return(tokens: int) -> int:
        attempt(tokens)
        return tokens

    return find_executable_batch_size(attempt_and_return, most, lower)()


def search(
    config: Settings,
    model: SpeechModel,
    collator: Any,
    device: torch.device,
    use_bf16: bool,
    processes: int,
) -> tuple[int, int]:
    """Returns the largest budget that fits in every stage, and that of a process's share of the largest step.

    A stage is tried with the moments of the stages before it, from the budget down that those left.
    """
    utterances = Utterances(collator, config)
    least = utterances.least
    budget = most = math.ceil(config.target_effective_batch / processes) * least
    moved: dict[str, torch.nn.Parameter] = {}
    averaged = [p for p in model.parameters() if p.dtype == torch.float32] if config.ema_decay is not None else []
    model.train()
    for stage in config.stages:
        freeze_for(model, stage)
        moved |= {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

        is_muon = config.optimizer == "muon"
        twice = [p for name, p in moved.items() if not (is_muon and by_muon(name, p.dim()))]
        kept = [*moved.values(), *twice, *averaged]  # one moment or two, and the moving average

        def attempt(tokens: int, kept: Sequence[torch.Tensor] = kept) -> None:
            for batch in utterances.fillings(tokens):
                run_micro_batches(model, batch, kept, device, use_bf16, processes)

        budget = largest_budget(attempt, least, budget)
    return budget, most


def find_token_budget(
    config: Settings,
    state: accelerate.PartialState,
    model: SpeechModel,
    collator: Any,
    use_bf16: bool,
) -> list[str]:
    """What every process found, and the option to give, as lines; InputError on all where one finds nothing."""
    if config.fsdp:
        raise InputError("--find_token_budget tries a whole model on each device: leave --fsdp out, or ask --plan")
    if state.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(USABLE, state.device)
    with fail_together():
        found, most = search(config, model, collator, state.device, use_bf16, state.num_processes)
    by_process = gather_object([found])
    lines = []
    if len(set(by_process)) > 1:
        each = ", ".join(f"process {rank} {budget}" for rank, budget in enumerate(by_process))
        lines.append(f"the processes differ: {each}; the smallest counts for all")
    budget = min(by_process)
    lines.append(
        f"{budget} tokens fit at once in every stage, of utterances of {config.max_audio_length_seconds:g} s; "
        + (
            "that is all a process has in a step: a larger budget changes nothing"
            if budget == most
            else f"tried in steps of {STEP:.0%}, {1 - USABLE:.0%} of the memory being left free"
        )
    )
    return [*lines, f"--tokens_per_micro_batch {budget}"]
