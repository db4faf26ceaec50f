"""One optimizer step of one process: micro-batches, one loss, and less at once where memory does not hold them."""

import contextlib
import functools
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import gather_object

from hebrew_asr.errors import InputError
from hebrew_asr.model.generation import new_token_limit
from hebrew_asr.model.loss import IGNORED_LABEL
from hebrew_asr.model.muon import Muon
from hebrew_asr.model.packing import halves
from hebrew_asr.model.sharding import is_sharded
from hebrew_asr.model.stages import ever_trained
from hebrew_asr.training.plan import BF16, FP32, USABLE, decoding_bytes, rows_at_once
from hebrew_asr.training.resuming import ResumableTrainer
from hebrew_asr.training.speed import StepClock

ENOUGH_TO_JUDGE = 1000  # utterances, before a share of broken ones means something


class StepTrainer(ResumableTrainer):
    """Trainer that accumulates the gradient of a step over micro-batches, each a sum over its items."""

    clock: StepClock
    running = 0
    """The micro-batch that is computed."""
    exchanges = False
    """Whether its backward pass exchanges gradients with the other processes."""
    split_micro_batches = 0
    """How often a micro-batch was done in two, since memory did not hold it."""
    too_many_tokens: float = math.inf
    """The fewest tokens that memory did not hold at once."""

    @functools.cached_property
    def eval_batch_size(self) -> int:
        """Utterances of the greatest length that are transcribed at once, the same on all processes.

        If the settings leave it open: as many as the memory has place for beside what stands in training, or the fewest
        where there is no GPU to know it of.
        """
        if self.config.eval_batch_size is not None:
            return self.config.eval_batch_size
        free = 0.0
        if self.args.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.args.device).total_memory
            trained = ever_trained(self.model, self.config.stages).values()
            copies = 3 if self.config.ema_decay is None else 4  # DDP's buckets, Adam's moments, the average
            standing = sum(parameter.nbytes for parameter in self.model.parameters())
            standing += copies * sum(parameter.nbytes for parameter in trained)
            free = USABLE * total - standing
        longest = self.config.max_audio_length_seconds
        new_tokens = self.config.generation_max_new_tokens or new_token_limit(longest)
        each = decoding_bytes(self.model.config, longest, new_tokens, BF16 if self.use_bf16 else FP32)
        return min(gather_object([rows_at_once(free, each)]))

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any) -> tuple[list, torch.Tensor | int | None]:
        began = time.perf_counter()
        samples = super().get_batch_samples(epoch_iterator, *args)
        self.window.waited += time.perf_counter() - began
        return samples

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.use_bf16)

    def accumulate(self, model: Any, micro_batches: list[dict[str, torch.Tensor]], scale: float) -> torch.Tensor:
        """Adds up the gradient of these micro-batches; returns the sum of their losses."""
        loss = torch.zeros((), device=self.args.device)
        # Autocast keeps its bf16 copies of what trains to the end of the outermost block: one copy for the whole step.
        with self.autocast(), torch.autocast(self.args.device.type, enabled=False):
            for i, batch in enumerate(micro_batches):
                is_last = i == len(micro_batches) - 1
                self.running, self.exchanges = i, False
                if is_sharded(model):
                    model.set_requires_gradient_sync(is_last)
                with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                    share = self.scaled_loss(model, batch, scale)
                    if is_last:
                        self.clock.end_after(share)
                    self.exchanges = is_last and model is not self.model
                    self.accelerator.backward(share)
                loss += share.detach()
        return loss

    def in_smaller_parts(
        self, model: torch.nn.Module, micro_batches: list[dict[str, torch.Tensor]], problem: str
    ) -> list[dict[str, torch.Tensor]]:
        """The step's micro-batches with the one that memory did not hold in two; the step begins again with them.

        That is between this process and its device, as long as no gradient was exchanged. Else, or where one utterance
        does not fit, it raises what says so: InputError where this process is the only one.
        """
        failed = micro_batches[self.running]
        tokens = failed["input_ids"].numel()
        too_late = is_sharded(model) or self.exchanges
        parts = [] if too_late else self.halves_of(failed)
        if not parts:
            what, remedy = "an utterance", ""
            if too_late:
                what, remedy = "a micro-batch", f"--tokens_per_micro_batch {max(64, tokens // 2 // 64 * 64)}, "
            kind = InputError if self.args.world_size == 1 else torch.OutOfMemoryError
            raise kind(
                f"step {self.state.global_step + 1}: {what} of {tokens} tokens does not fit the device's memory"
                f" ({problem}). Give {remedy}--gradient_checkpointing true, a lower --max_audio_length_seconds, or"
                " stages that train fewer layers; --find_token_budget tries what fits"
            )
        self.model.zero_grad()
        torch.cuda.empty_cache()
        self.split_micro_batches += 1
        if tokens < self.too_many_tokens:
            self.too_many_tokens = tokens
            print(
                f"process {self.args.process_index}, step {self.state.global_step + 1}: {tokens} tokens at once do not"
                " fit the device's memory; such micro-batches are done in two, with the same gradient. Less time is"
                f" lost with --tokens_per_micro_batch {max(64, int(0.9 * tokens) // 64 * 64)}",
                file=sys.stderr,
                flush=True,
            )
        return micro_batches[: self.running] + parts + micro_batches[self.running + 1 :]

    def as_it_fitted(self, batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """A micro-batch, cut as often as those were that memory did not hold."""
        parts = self.halves_of(batch) if batch["input_ids"].numel() >= self.too_many_tokens else []
        return [piece for part in parts for piece in self.as_it_fitted(part)] or [batch]

    def halves_of(self, batch: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
        """A micro-batch in two; none where it cannot be cut."""
        return halves(batch, self.model.config.audio_token_id)

    def note_step(self) -> None:
        """Called after each step, when the norm of its gradient is known and so the device is through with it."""
        self.window.computed.append(self.clock.seconds())

    def check_broken(self, step: int) -> None:
        """Raises InputError, on all processes, when more was broken so far than `max_broken_share` allows."""
        heard = step * self.config.target_effective_batch
        if heard >= ENOUGH_TO_JUDGE and self.broken_utterances > self.config.max_broken_share * heard:
            raise InputError(
                f"{self.broken_utterances} of the {heard} utterances up to step {step} are broken, more than"
                f" max_broken_share ({self.config.max_broken_share:g}): they are listed in dropped-*.txt"
            )

    def items_of(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """How many items the loss of a micro-batch is a sum over: its supervised tokens."""
        return (batch["labels"] != IGNORED_LABEL).sum()

    def scaled_loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
        """Summed nats of the supervised tokens of one micro-batch, times `scale`; the backward pass begins there."""
        with self.autocast():
            return model(**self.on_device(batch), root_scale=scale).loss

    def on_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A micro-batch where it is computed; of the loader's pinned tensors without waiting for the copies."""
        return {name: tensor.to(self.args.device, non_blocking=True) for name, tensor in batch.items()}

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Has the fused optimizer scale the gradients as it reads them, which saves a pass over all of them."""
        optimizer = self.optimizer.optimizer
        if not optimizer.defaults["fused"] or is_sharded(model) or isinstance(optimizer, Muon):
            return super()._clip_grad_norm(model)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        optimizer.grad_scale = ((norm + 1e-6) / self.args.max_grad_norm).clamp(min=1.0)
        optimizer.found_inf = torch.zeros_like(norm)  # steps without a finite gradient are skipped before
        return norm

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # Trainer's estimate reads one batch of text tokens; a step here is several, with audio
