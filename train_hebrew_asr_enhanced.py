"""Fine-tunes Qwen3-ASR to Hebrew speech recognition, unfreezing it in stages.

    uv run torchrun --nproc_per_node=8 train_round2_gradual.py            the Round 2 recipe: Strategy B, then A
    uv run torchrun --nproc_per_node=8 train_hebrew_asr_enhanced.py       the plain defaults of TrainingConfig below
    uv run train_hebrew_asr_enhanced.py --help                            every setting

Every setting is a field of TrainingConfig: edit it here, or override it on the command line (`--num_epochs 3`).
The run's folder (`--output_dir`) gets config.yaml, corpus.html, metrics.jsonl, curves.png, checkpoints/, status.json
and final_model/. The same command in the same folder goes on from the last checkpoint.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import accelerate
import numpy as np
import torch
import transformers
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers import Qwen3ASRForConditionalGeneration, Qwen3ASRProcessor

from hebrew_asr.checkpoints import store
from hebrew_asr.checkpoints.averages import model_of, newest
from hebrew_asr.checkpoints.final import save_for_use
from hebrew_asr.checkpoints.hub import CheckpointUploader, check_upload, upload, upload_command
from hebrew_asr.command_line import parse_config
from hebrew_asr.data.augmentation import WaveformAugmentation
from hebrew_asr.data.mixture import Mixture
from hebrew_asr.data.prepare import prepare
from hebrew_asr.data.rows import BROKEN, SpeechRows
from hebrew_asr.data.selection import load_train_and_eval
from hebrew_asr.data.sources import DataConfig
from hebrew_asr.data.stream import SpeechStream, StreamedSource, StreamReader, load_streams_and_eval
from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.errors import InputError
from hebrew_asr.model.attention import CHOICES, is_inside_utterances
from hebrew_asr.model.costs import work_of
from hebrew_asr.model.generation import TOKENS_PER_SECOND, as_it_fits, generate
from hebrew_asr.model.loading import load_processor, load_to_train
from hebrew_asr.model.loss import IGNORED_LABEL, SpeechModel, label_nats
from hebrew_asr.model.packing import FRAMES_PER_CHUNK, deal_step, pack, useful_tokens
from hebrew_asr.model.prompts import MEL_BINS, Prompts, pad, padded
from hebrew_asr.model.sharding import is_sharded, shard, whole_model
from hebrew_asr.model.stages import (
    COMPONENTS,
    Stage,
    component_of,
    ever_trained,
    freeze_for,
    layer_depth,
    stage_line,
    trainable_parameters,
    trains_in,
)
from hebrew_asr.processes import launch, leave_process_group, load_in_turn, quiet_libraries, together
from hebrew_asr.text.scoring import score
from hebrew_asr.training.batches import GlobalBatchSampler, StreamedEpochs, UtteranceTokens
from hebrew_asr.training.final_model import evaluate_final
from hebrew_asr.training.moving_average import MovingAverage
from hebrew_asr.training.plan import lines_of, make_plan
from hebrew_asr.training.resuming import ResumableTrainer, StepEvents, ends_early, train, training_arguments
from hebrew_asr.training.run_folder import check_disk, checkpoint_to_resume, failures_noted, open_run_folder
from hebrew_asr.training.run_log import PANELS, TRACKERS, RunLog, success_criteria
from hebrew_asr.training.run_report import announce, describe_result, facts_of_run, report_data
from hebrew_asr.training.speed import StepClock, Window
from hebrew_asr.training.token_budget import find_token_budget
from hebrew_asr.training.watch import outlive_stop_signals

SILENCE = np.zeros((MEL_BINS, FRAMES_PER_CHUNK), np.float32)  # a second, for a process without work in a step
ENOUGH_TO_JUDGE = 1000  # utterances, before a share of broken ones means something
DOES_NOT_FIT = ("", "", 0.0, 0)  # hypothesis, language, nats, tokens of an utterance that memory does not hold


@dataclass
class TrainingConfig(DataConfig):
    # Model
    model_name_or_path: str = "Qwen/Qwen3-ASR-1.7B-hf"
    """A Qwen3-ASR checkpoint in transformers' own layout (the ids that end in -hf), or a local folder of one."""
    language: str = "Hebrew"
    """The name the model writes before the transcript: `language Hebrew<asr_text>…`."""
    bf16: bool | None = None
    """bf16 autocast and bf16 frozen weights (what trains is kept in fp32); None: where the GPU has it."""
    attention: str = "auto"
    """auto: the fastest there is; sdpa: as transformers does it; varlen: PyTorch's FlashAttention, for packed rows and
    the encoder's windows; flash_attention_2, flash_attention_3: the package's."""
    torch_compile: bool = False
    """torch.compile of the language model's layers while training: it takes minutes at the start and after a switch."""
    final_dtype: str = "bfloat16"
    """The one type of the final model's weights on disk."""

    # Data: the sources and filters are fields of DataConfig, in hebrew_corpora.py
    dataloader_num_workers: int = 4
    """Processes that decode and extract features, for each rank; 0: the training process itself."""

    # SpecAugment (Park et al. 2019, arXiv:1904.08779), on training batches only
    use_specaugment: bool = True
    time_mask_param: int = 80
    """Widest time mask in mel frames of 10 ms."""
    freq_mask_param: int = 27
    """Widest frequency mask in mel bins (of 128)."""
    num_time_masks: int = 2
    num_freq_masks: int = 2
    mask_value: float = 0.0
    max_time_mask_share: float = 0.2
    """All time masks of an utterance together cover at most this share of its frames."""

    # On the waveform, before the features: speed, noise, reverberation, gain; on training utterances only
    use_waveform_augmentation: bool = False
    waveform_augmentation: WaveformAugmentation = field(default_factory=WaveformAugmentation)

    # Schedule: one warmup and one decay over the whole run; each stage's rates are multiplied by it
    num_epochs: int = 5
    max_steps: int | None = None
    """Optimizer steps of the run; overrides num_epochs."""
    stages: list[Stage] = field(
        default_factory=lambda: [
            Stage("A", 5, {"projector": 1e-4, "audio_top": 3e-5, "llm_top": 3e-5, "lm_head": 1e-4}),
        ]
    )
    lr_scheduler_type: str = "cosine"
    """cosine, linear, constant_with_warmup or constant, as transformers.get_scheduler has them."""
    warmup_ratio: float = 0.1
    """Share of the run's steps; 0: warmup_steps is used instead."""
    warmup_steps: int = 500
    layerwise_lr_decay_rate: float = 1.0
    """Each layer of llm_top and audio_top trains this much slower than the one above it; 1.0: all alike."""

    # Batch
    target_effective_batch: int = 64
    """Utterances of one optimizer step, over all processes."""
    tokens_per_micro_batch: int | None = 3072
    """Tokens (audio and text) of one forward pass of one process; it governs. None: batch_size does, in padded rows."""
    batch_size: int = 2
    """Utterances of one forward pass of one process, where tokens_per_micro_batch is None."""
    gradient_checkpointing: bool = False
    """Less memory for a third more time: what trains runs forward a second time in the backward pass."""
    fsdp: bool = False
    """Less memory for more exchange: of what trains, each process holds only a part, with its gradient and moments."""

    # Optimizer: AdamW
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float | None = None
    """Keep an exponential moving average of what trains (0.999 spans about 1,000 steps; fp32, beside the weights), and
    make it the final model where its WER is lower than the best checkpoint's. It is evaluated at the end only."""

    # Evaluation
    eval_steps: int = 500
    """Also before the first step, at the end of each stage, and at the end."""
    eval_batch_size: int = 8
    """Utterances as long as max_audio_length_seconds; of longer ones fewer are taken at once, of shorter ones more."""
    eval_prefill_language: bool = False
    """Give the model `language Hebrew<asr_text>` instead of letting it name the language itself."""
    generation_max_new_tokens: int = 256
    """For recordings of over half a minute the limit grows with their length."""
    num_logged_predictions: int = 5

    # Tracking
    tracker: str = "wandb"
    """wandb, trackio (a local dashboard, no account), or none; metrics.jsonl is written in any case."""
    wandb_project: str = field(default_factory=lambda: os.environ.get("WANDB_PROJECT", "qwen3-asr-hebrew"))
    wandb_run_name: str | None = field(default_factory=lambda: os.environ.get("WANDB_RUN_NAME"))
    logging_steps: int = 10

    # Checkpoints
    resume: str = "auto"
    """auto: go on where the run in the folder stopped; never: a new run; hub: also from what was uploaded, where the
    folder has nothing as new; or the folder of a checkpoint."""
    save_steps: int = 500
    """Steps from one checkpoint to the next. Also when the WER is the lowest so far, and at the end of each stage."""
    save_total_limit: int = 2
    """So many of the newest checkpoints are kept, and the one of the lowest WER."""
    preemption_grace_seconds: float = 25
    """From a signal to stop to the end of the processes, with a checkpoint or without; torchrun itself gives 30."""
    stall_timeout_minutes: float = 10
    """A process that does not get on for so long while training ends the run."""
    max_bad_steps: int = 3
    """Steps in a row without a finite gradient after which the run goes back to the last checkpoint."""
    check_ranks_steps: int = 100
    """Steps from one comparison of the processes' weights to the next."""

    # What the run is held to at its end
    target_loss: float = 11.0
    """Nats per target token. The figure is Round 2's; a run whose prompt and labels are right starts below 2."""
    target_wer: float = 11.0
    """Percent."""

    # Upload
    hf_repo_id: str | None = field(default_factory=lambda: os.environ.get("HF_REPO_ID"))
    """owner/name on the Hub; None: the model stays on this disk."""
    skip_hf_upload: bool = field(default_factory=lambda: os.environ.get("SKIP_HF_UPLOAD", "").lower() in ("1", "true"))
    hf_private: bool = True
    hub_checkpoints: bool = True
    """Upload checkpoints while training, to a branch of the repository, which `--resume hub` goes on from."""
    hub_save_total_limit: int = 1
    """So many of the newest checkpoints stay on the Hub, and the one of the lowest WER; its history keeps no others."""

    # Run
    inspect_data: bool = False
    """Only read the corpora and write their report (corpus.html, .md, .json) into the run's folder."""
    prepare: bool = False
    """Only listen to the corpora (prepare_corpora.py) and write their report; later starts use what was heard."""
    plan: bool = False
    """Only print what the run will need (training_plan.py): memory, hours, cost. Needs no GPU and downloads nothing."""
    plan_device: str = "A100-40GB"
    """A100-40GB, A100-80GB, H100, H200, L40S or 4090."""
    plan_devices: int = 8
    plan_hours_of_audio: float | None = None
    """Of an epoch; None: from the corpora where they are local, else 350."""
    plan_mean_seconds: float = 6.0
    """Of an utterance, where the corpora are not read."""
    plan_price_per_hour: float | None = None
    """Of one device; None: no cost is printed."""
    find_token_budget: bool = False
    """Only try, on the GPUs given, how large tokens_per_micro_batch may be (token_budget.py), and print it."""
    output_dir: str | None = None
    """None: a folder under runs/ with a name of the settings, the same for the same command."""
    seed: int = 42
    process_timeout_minutes: int = 60
    """How long processes wait for one another at the start, above all while the first one reads the corpora."""

    def gradient_accumulation_steps(self, processes: int) -> float:
        """Micro-batches of one process in a step where batch_size governs, and then a whole number."""
        return self.target_effective_batch / (self.batch_size * processes)

    @property
    def uploads(self) -> bool:
        return self.hf_repo_id is not None and not self.skip_hf_upload

    @property
    def tags(self) -> list[str]:
        """Tags of the tracked run: what is switched on."""
        on = {
            "sota-2025": True,
            "specaugment": self.use_specaugment,
            "cosine-lr": self.lr_scheduler_type.startswith("cosine"),
            "gradual-unfreezing": len(self.stages) > 1,
        }
        return [tag for tag, is_on in on.items() if is_on]

    def meaning(self) -> dict[str, Any]:
        """The settings that decide what the run computes, as they are in JSON."""
        settings = json.loads(json.dumps(dataclasses.asdict(self)))
        return {name: value for name, value in settings.items() if name not in MAY_CHANGE}

    def stage_of_epoch(self, epoch: int) -> Stage:
        """The stage that `epoch` (from 1) belongs to; the last one goes on for ever."""
        return next((stage for stage in self.stages if epoch <= stage.last_epoch), self.stages[-1])

    def first_epoch_of(self, stage: Stage) -> int:
        index = self.stages.index(stage)
        return self.stages[index - 1].last_epoch + 1 if index else 1

    def check(self, processes: int) -> None:
        """Raises InputError for settings that cannot mean what they say, before anything is loaded."""
        if not self.stages:
            raise InputError("stages is empty: name at least one stage")
        last_epochs = [stage.last_epoch for stage in self.stages]
        if last_epochs != sorted(set(last_epochs)) or last_epochs[0] < 1:
            raise InputError(
                f"the stages' last_epoch must grow from one stage to the next, starting at 1: {last_epochs}"
            )
        if self.max_steps is None and self.num_epochs > last_epochs[-1]:
            raise InputError(
                f"num_epochs is {self.num_epochs}, but the last stage ({self.stages[-1].name}) ends at epoch"
                f" {last_epochs[-1]}: raise its last_epoch, or lower num_epochs"
            )
        if (self.num_epochs if self.max_steps is None else self.max_steps) < 1:
            raise InputError(f"nothing to train: num_epochs is {self.num_epochs}, max_steps {self.max_steps}")
        for stage in self.stages:
            if unknown := set(stage.learning_rates) - set(COMPONENTS):
                raise InputError(f"stage {stage.name}: unknown component {sorted(unknown)}, known: {list(COMPONENTS)}")
            if not stage.learning_rates or not all(rate > 0 for rate in stage.learning_rates.values()):
                raise InputError(f"stage {stage.name} trains nothing: give at least one component a rate above 0")
        self._check_batch(processes)
        choices = {
            "tracker": TRACKERS,
            "attention": CHOICES,
            "final_dtype": ("bfloat16", "float32"),
            "lr_scheduler_type": ("cosine", "linear", "constant", "constant_with_warmup"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}, must be one of {', '.join(known)}")
        ranges = dict.fromkeys(
            (
                *("eval_steps", "eval_batch_size", "logging_steps", "generation_max_new_tokens"),
                *("save_steps", "save_total_limit", "max_bad_steps", "check_ranks_steps"),
            ),
            (1, math.inf),
        )
        ranges |= {"freq_mask_param": (0, MEL_BINS), "time_mask_param": (0, math.inf), "max_time_mask_share": (0, 1)}
        ranges |= {"warmup_ratio": (0, 1), "eval_fraction": (0, 1), "layerwise_lr_decay_rate": (0, 1)}
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise InputError(f"ema_decay must lie between 0 and 1, got {self.ema_decay}; null keeps no average")
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name} must lie between {low} and {high}, got {getattr(self, name)}")
        if self.hub_checkpoints and not 1 <= self.hub_save_total_limit <= self.save_total_limit:
            raise InputError(
                f"hub_save_total_limit must lie between 1 and save_total_limit ({self.save_total_limit}), what is kept"
                f" here: {self.hub_save_total_limit}"
            )
        self.check_sources()
        if self.uploads and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.hf_repo_id):
            raise InputError(f"hf_repo_id must be owner/name, got {self.hf_repo_id!r} (from HF_REPO_ID?)")

    def _check_batch(self, processes: int) -> None:
        if self.batch_size < 1 or self.target_effective_batch < 1:
            raise InputError("batch_size and target_effective_batch must be at least 1")
        if self.streaming and self.target_effective_batch % processes:
            raise InputError(
                f"streaming needs a target_effective_batch ({self.target_effective_batch}) that is a multiple of the"
                f" number of processes ({processes})"
            )
        if self.tokens_per_micro_batch is not None and self.tokens_per_micro_batch < 1:
            raise InputError("tokens_per_micro_batch must be at least 1, or None")
        target, at_once = self.target_effective_batch, self.batch_size * processes
        if self.tokens_per_micro_batch is not None or target % at_once == 0:
            return
        sizes = [size for size in range(1, target + 1) if target % (size * processes) == 0]
        nearest_sizes = sorted(sorted(sizes, key=lambda size: abs(size - self.batch_size))[:2])
        targets = sorted({max(1, target // at_once) * at_once, (target // at_once + 1) * at_once})
        raise InputError(
            f"target_effective_batch ({target}) is not a multiple of batch_size × processes"
            f" ({self.batch_size} × {processes} = {at_once}). Nearest that divide: batch_size"
            f" {' or '.join(map(str, nearest_sizes)) or '(none)'}, or target_effective_batch"
            f" {' or '.join(map(str, targets))}"
        )


MAY_CHANGE = {  # settings that a resumed run may have otherwise than before
    *("bf16", "attention", "torch_compile", "final_dtype", "batch_size"),
    *("dataloader_num_workers", "preprocessing_num_workers"),
    *("eval_steps", "eval_batch_size", "num_logged_predictions", "logging_steps", "target_loss", "target_wer"),
    *("tracker", "wandb_project", "wandb_run_name", "hf_repo_id", "skip_hf_upload", "hf_private"),
    *("hub_checkpoints", "hub_save_total_limit"),
    *("resume", "save_steps", "save_total_limit", "preemption_grace_seconds", "stall_timeout_minutes"),
    *("max_bad_steps", "check_ranks_steps", "inspect_data", "output_dir", "process_timeout_minutes"),
    *("tokens_per_micro_batch", "gradient_checkpointing", "fsdp", "prepare", "prepared_dir"),
    *("plan", "plan_device", "plan_devices", "plan_hours_of_audio", "plan_mean_seconds", "plan_price_per_hour"),
    "find_token_budget",
}


class DataCollatorSpeechSeq2SeqWithPadding(Prompts):
    """Turns utterances into the tensors of one forward pass, masked by SpecAugment while training."""

    def __init__(self, processor: Qwen3ASRProcessor, config: TrainingConfig):
        super().__init__(processor)
        self.config = config
        self.in_one_row = False  # of packed batches

    def __call__(self, utterances: list[dict[str, Any]], training: bool) -> dict[str, torch.Tensor]:
        """Collates utterances of SpeechDataset, one to a row.

        Args:
            utterances: at least one, or none for a process without work in a step: then one second of silence without
                supervised tokens, so that its gradients are zero and the processes stay in step.
            training: whether SpecAugment is applied; otherwise the prompts alone are added, padded on the left.

        Returns:
            input_features (batch, mel, frames), input_features_mask (batch, frames), input_ids, attention_mask, labels
            (batch, tokens), padded on the right; prompt_input_ids, prompt_attention_mask if not training.
        """
        clips = [u["features"] for u in utterances] or [SILENCE]
        frames = [clip.shape[1] for clip in clips]
        features, mask = padded(clips)
        if training and self.config.use_specaugment:
            draws = [(u["epoch"], u["index"]) for u in utterances]
            features = self.apply_specaugment(features, frames, draws)
        prompts, targets = self.sequences(utterances, frames)
        pairs = list(zip(prompts, targets, strict=True))
        batch = {
            "input_features": features,
            "input_features_mask": mask,
            "input_ids": pad([p + t for p, t in pairs], self.end_of_turn_id),
            "attention_mask": pad([[1] * len(p + t) for p, t in pairs], 0),
            "labels": pad([[IGNORED_LABEL] * len(p) + t for p, t in pairs], IGNORED_LABEL),
        }
        if not training:
            if self.config.eval_prefill_language:
                prompts = [p + self.language_prefix(u["language"]) for p, u in zip(prompts, utterances, strict=True)]
            batch |= self.to_generate(clips, prompts)
        return batch

    def packed(self, utterances: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collates utterances (or none) for training, as `packing.pack` does, and masks them."""
        clips = [u["features"] for u in utterances] or [SILENCE]
        prompts, targets = self.sequences(utterances, [clip.shape[1] for clip in clips])
        batch, places = pack(clips, prompts, targets, self.end_of_turn_id, self.in_one_row)
        if self.config.use_specaugment:
            for utterance, place in zip(utterances, places, strict=False):
                clip, draw = batch["input_features"][:, :, place], (utterance["epoch"], utterance["index"])
                clip[:] = self.apply_specaugment(clip, [clip.shape[2]], [draw])
        return batch

    def apply_specaugment(
        self, features: torch.Tensor, frames: list[int], draws: list[tuple[int, int]]
    ) -> torch.Tensor:
        """Masks time and frequency stripes inside each utterance's valid frames.

        Args:
            features: (batch, mel, time) log-mel features.
            frames: valid frames of each utterance.
            draws: (epoch, row) of each utterance, the only source of randomness beside the seed.

        Returns:
            A masked copy of `features`. Widths are uniform on 0 … parameter as in Park et al.; time masks together
            cover at most `max_time_mask_share` of an utterance.
        """
        features, config = features.clone(), self.config
        for feature, count, draw in zip(features, frames, draws, strict=False):
            random = np.random.default_rng([config.seed, *draw])
            widest = int(config.max_time_mask_share * count / max(1, config.num_time_masks))
            for _ in range(config.num_time_masks):
                width = random.integers(0, min(config.time_mask_param, widest) + 1)
                start = random.integers(0, count - width + 1)
                feature[:, start : start + width] = config.mask_value
            for _ in range(config.num_freq_masks):
                width = random.integers(0, config.freq_mask_param + 1)
                start = random.integers(0, MEL_BINS - width + 1)
                feature[start : start + width, :count] = config.mask_value
        return features


# ------------------------------------------------------------------------------------------------------------- Trainer
class GradualUnfreezeTrainer(ResumableTrainer):
    """Trainer that changes what trains at stage boundaries and evaluates by transcribing.

    What it relies on in Trainer 5.23: `_run_epoch` gets the wrapped model as an argument, one item of the loader is
    one optimizer step when `gradient_accumulation_steps` is 1, and `create_optimizer` and `create_scheduler` are hooks.
    """

    loss_is_nats = True  # so that it compares with the evaluation's
    panels: ClassVar[dict[str, list[str]]] = PANELS  # of curves.png
    chosen_by = "eval/wer"  # the metric whose lowest value makes the best checkpoint

    def __init__(
        self,
        config: TrainingConfig,
        args: transformers.TrainingArguments,
        model: SpeechModel,
        processor: Qwen3ASRProcessor,
        train_rows: SpeechRows | list[StreamedSource],
        eval_rows: SpeechRows,
        run_log: RunLog,
        use_bf16: bool,
    ):
        self.config, self.run_log, self.use_bf16 = config, run_log, use_bf16
        self.processor = processor
        self.collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
        self.collator.in_one_row = is_inside_utterances(model.config.text_config)
        self.stage = config.stage_of_epoch(1)
        freeze_for(model, self.stage)
        if config.fsdp and args.world_size > 1:
            shard(model, ever_trained(model, config.stages).keys(), args.device)
        super().__init__(
            model=model,
            args=args,
            train_dataset=None if config.streaming else SpeechDataset(train_rows, processor, config, training=True),
            eval_dataset=SpeechDataset(eval_rows, processor, config, training=False),
        )
        if config.streaming:
            self.sampler = StreamedEpochs(config.steps_per_epoch)
            self.stream = self.open_stream(train_rows)
        else:
            self.mixture = Mixture(train_rows, config.train_sources, config.seed)
            around = len(self.collator.prompt(0, "")) + len(self.collator.language_prefix(config.language)) + 1
            tokens = UtteranceTokens(train_rows, around, self.collator.tokens, config)
            self.sampler = GlobalBatchSampler(self.mixture, tokens, config, args.process_index, args.world_size)
        self.total_steps = config.max_steps or config.num_epochs * len(self.sampler)
        ends = {stage.last_epoch * len(self.sampler): stage.name for stage in config.stages}
        self.stage_ends = {step: name for step, name in ends.items() if step < self.total_steps}
        self.clock = StepClock(args.device)
        self.add_callback(StepEvents(self.note_step, run_log, config.eval_steps, {*self.stage_ends, self.total_steps}))
        self.window_started = time.perf_counter()
        self.moving_average: MovingAverage | None = None
        if config.ema_decay is not None:
            self.moving_average = MovingAverage(config.ema_decay, ever_trained(self.model, config.stages))
        self.prepare_checkpoints()

    # Data

    @staticmethod
    def load_data(
        config: TrainingConfig, state: accelerate.PartialState
    ) -> tuple[SpeechRows | list[StreamedSource], SpeechRows]:
        load = load_streams_and_eval if config.streaming else load_train_and_eval
        return load_in_turn(state, functools.partial(load, config, config.seed))

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """One item is this process's share of one optimizer step: a list of micro-batches. Already sharded by rank."""
        if self.config.streaming:
            return torch.utils.data.DataLoader(self.stream, batch_sampler=self.sampler, collate_fn=lambda step: step)
        return self._loader(self.train_dataset, self.sampler, functools.partial(collate_step, self.collator))

    def open_stream(self, streams: list[StreamedSource]) -> StreamReader:
        config = self.config
        stream = SpeechStream(
            streams,
            SpeechDataset(None, self.processor, config, training=True).utterance,
            functools.partial(collate_streamed, self.collator),
            share=config.target_effective_batch // self.args.world_size,
            seed=config.seed,
            rank=self.args.process_index,
            processes=self.args.world_size,
        )
        return StreamReader(stream, config.dataloader_num_workers, pin_memory=torch.cuda.is_available())

    def get_eval_dataloader(self, eval_dataset: SpeechDataset | None = None) -> torch.utils.data.DataLoader:
        """This process's batches of the evaluation set, longest first; the batches are the same for any rank count.

        A batch has as many padded seconds as `eval_batch_size` utterances of the longest that training allows, and no
        more than four times as many utterances, so that a small set is not one batch.
        """
        dataset = eval_dataset or self.eval_dataset
        budget = self.config.eval_batch_size * self.config.max_audio_length_seconds  # padded seconds of a batch
        batches: list[list[tuple[int, int]]] = []
        size = 0
        for row in np.argsort(-dataset.rows.seconds, kind="stable").tolist():
            if not batches or len(batches[-1]) == size:
                batches.append([])
                size = min(4 * self.config.eval_batch_size, max(1, int(budget / dataset.rows.seconds[row])))
            batches[-1].append((0, row))
        mine = [[batch] for batch in batches[self.args.process_index :: self.args.world_size]]
        return self._loader(dataset, mine, functools.partial(collate_evaluation, self.collator))

    def _loader(self, dataset: SpeechDataset, batch_sampler: Any, collate: Callable) -> torch.utils.data.DataLoader:
        workers = self.config.dataloader_num_workers
        return torch.utils.data.DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=2 if workers else None,
            worker_init_fn=functools.partial(outlive_stop_signals, seconds=self.config.preemption_grace_seconds),
        )

    # Stages

    def _run_epoch(self, model: torch.nn.Module, epoch: int, **kwargs: Any) -> None:
        """Enters the stage of this epoch first (Trainer counts epochs from 0), then trains on the current wrapper."""
        self.sampler.epoch = epoch + 1
        stage = self.config.stage_of_epoch(epoch + 1)
        if stage is not self.stage:
            self.enter_stage(stage)
        super()._run_epoch(model=self.model_wrapped, epoch=epoch, **kwargs)

    def enter_stage(self, stage: Stage) -> None:
        """Changes what trains, and builds DistributedDataParallel again.

        DDP reduces the gradients of those parameters that needed one when it was built: without a new wrapper the
        ranks would drift apart in silence. The optimizer holds the parameters of every stage from the start, so that
        the moments of what was training go on.
        """
        self.set_stage(stage)
        if self.model_wrapped is not self.model:
            self.unwrap()
            self.model_wrapped = self.accelerator.prepare_model(self.model)
        self.run_log.say(f"{stage_line(self.model, stage)} | from step {self.state.global_step + 1}")

    def set_stage(self, stage: Stage) -> None:
        self.stage = stage
        freeze_for(self.model, stage)

    def unwrap(self) -> None:
        """Takes DistributedDataParallel off, if there is any."""
        if self.model_wrapped is not self.model:
            self.model_wrapped._remove_autograd_hooks()
            self.model_wrapped.reducer = None  # frees its gradient buckets; Trainer's loop keeps the wrapper itself
        self.accelerator._models.clear()  # prepare_model appends; the model would be listed twice
        self.model_wrapped = self.model

    # Optimizer and schedule

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over every parameter that some stage trains, one group for each component, layer and decay.

        Frozen ones have no gradient, and AdamW leaves a parameter without gradient, and its moments, alone.
        """
        if self.optimizer is None:
            groups: dict[tuple, dict[str, Any]] = {}
            decayed = set(self.get_decay_parameter_names(self.model))
            for name, parameter in self.model.named_parameters():
                components = {
                    component_of(name, stage, self.model.config)
                    for stage in self.config.stages
                    if trains_in(name, stage, self.model.config)
                }
                if not components:
                    continue
                (component,) = components
                key = (component, layer_depth(name, self.model.config), name in decayed)
                weight_decay = self.config.weight_decay if name in decayed else 0.0
                group = groups.setdefault(
                    key, {"component": component, "depth": key[1], "weight_decay": weight_decay, "params": []}
                )
                group["params"].append(parameter)
            # The schedule's factor is the rate itself, so every group starts from a rate of 1.
            self.optimizer = torch.optim.AdamW(list(groups.values()), lr=1.0, fused=torch.cuda.is_available() or None)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """A schedule whose rate is a pure function of (group, step): see `learning_rate`."""
        optimizer = optimizer or self.optimizer
        self.factor = schedule_factor(self.config, num_training_steps)
        rates = [functools.partial(self.learning_rate, g["component"], g["depth"]) for g in optimizer.param_groups]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def learning_rate(self, component: str, depth: int, step: int) -> float:
        """The rate of the step after `step` steps, for a component's layer `depth` layers below the top one."""
        stage = self.config.stage_of_epoch(step // len(self.sampler) + 1)
        peak = stage.learning_rates.get(component, 0.0)
        return peak * self.config.layerwise_lr_decay_rate**depth * self.factor(step)

    # Step

    def get_batch_samples(self, *args: Any) -> tuple[list, torch.Tensor | int | None]:
        began = time.perf_counter()
        samples = super().get_batch_samples(*args)
        self.window.waited += time.perf_counter() - began
        return samples

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.use_bf16)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: tuple[list[dict[str, torch.Tensor]], list[str]],
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Accumulates the gradient of one optimizer step.

        Args:
            inputs: this process's micro-batches of the step, and what was left out of them.

        Returns:
            The step's nats per target token over all processes, times the share that fell to this one, times the
            number of processes: their mean is the loss.
        """
        model.train()
        micro_batches, dropped = inputs
        if is_sharded(model) and self.config.streaming:  # each process cuts its own; layers are gathered by all at once
            most = max(self.watch.gather(len(micro_batches)))
            micro_batches = micro_batches + [self.collator.packed([])] * (most - len(micro_batches))
        self.run_log.note_dropped(dropped, self.state.global_step + 1)
        # Items of the loss, audio frames, dropped, of those the broken, positions of the model, of those not padding,
        # workers that died; and the positions of each process
        totals = torch.zeros(7 + self.args.world_size, dtype=torch.float64, device=self.args.device)
        totals[2], totals[3] = len(dropped), sum(line.split(":")[0] in BROKEN for line in dropped)
        for batch in micro_batches:
            supervised = (batch["labels"] != IGNORED_LABEL).sum()
            totals[0] += self.items_of(batch)
            totals[1] += batch["input_features_mask"].sum() * (supervised > 0)
            totals[4] += batch["input_ids"].numel()
            totals[5] += useful_tokens(batch) * (supervised > 0)
            self.window.work += work_of(batch, self.model.config)
        totals[6], self.newly_dead = self.newly_dead, 0
        totals[7 + self.args.process_index] = totals[4]
        totals = self.accelerator.reduce(totals, reduction="sum")
        items, frames, left_out, broken, positions, useful, dead_workers, *by_process = totals.tolist()
        self.window.audio_seconds += frames / FRAMES_PER_CHUNK
        self.window.positions += positions
        self.window.useful += useful
        self.window.fullest += max(by_process)
        self.dropped_utterances += int(left_out)
        self.broken_utterances += int(broken)
        self.dead_workers += int(dead_workers)
        self.check_broken(self.state.global_step + 1)
        loss = torch.zeros((), device=self.args.device)
        self.clock.begin()
        for i, batch in enumerate(micro_batches):
            is_last = i == len(micro_batches) - 1
            if is_sharded(model):
                model.set_requires_gradient_sync(is_last)
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                # Gradients are averaged over the processes; the loss is a sum over items. A step of which
                # nothing decodes has none: its gradient is NaN, and it is skipped as every such step is.
                share = self.summed_loss(model, batch) * self.args.world_size / items
                if is_last:
                    self.clock.end_after(share)
                self.accelerator.backward(share)
            loss += share.detach()
        return loss

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

    def summed_loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Summed nats of the supervised tokens of one micro-batch (the model's own loss divides by what it is told)."""
        with self.autocast():
            return model(**self._prepare_inputs(batch), num_items_in_batch=1).loss

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # Trainer's estimate reads one batch of text tokens; a step here is several, with audio

    # Evaluation

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Loss and transcription of one evaluation batch, for weights in fp32, in bf16, or in both.

        Features are cast to the type of the encoder's first convolution, and everything runs under autocast when any
        weight is bf16: "Input type (float) and bias type (c10::BFloat16) should be the same" cannot happen. The
        transcription starts from the prompts alone, never from the reference.

        Returns:
            mean nats per target token, generated tokens without the prompt (batch, new tokens), labels.
        """
        module = self.accelerator.unwrap_model(model)
        inputs = self._prepare_inputs(dict(inputs))
        prompts = {name: inputs.pop(name) for name in ("prompt_input_ids", "prompt_attention_mask")}
        inputs["input_features"] = inputs["input_features"].to(module.model.audio_tower.conv2d1.weight.dtype)
        any_bf16 = any(parameter.dtype == torch.bfloat16 for parameter in module.parameters())
        with torch.no_grad(), torch.autocast(self.args.device.type, torch.bfloat16, enabled=any_bf16):
            loss = label_nats(module, **inputs)[1].mean()
            if prediction_loss_only:
                return loss, None, None
        seconds = inputs["input_features"].shape[2] / FRAMES_PER_CHUNK
        most = max(self.config.generation_max_new_tokens, math.ceil(TOKENS_PER_SECOND * seconds))
        return loss, generate(module, inputs | prompts, most), inputs["labels"]

    def transcribe(self, module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[tuple[str, str, float, int]]:
        """Hypothesis, language, mean nats of the batch, and target tokens of each utterance of one batch."""
        loss, generated, labels = self.prediction_step(module, batch, prediction_loss_only=False)
        outputs = self.processor.decode(generated, return_format="parsed")
        tokens = (labels != IGNORED_LABEL).sum(dim=1).tolist()
        return [(o["transcription"], o["language"], loss.item(), n) for o, n in zip(outputs, tokens, strict=True)]

    @torch.compiler.set_stance("force_eager")  # decoding a token at a time would compile the layers again and again
    def evaluate(
        self,
        eval_dataset: SpeechDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        model: torch.nn.Module | None = None,
    ) -> dict[str, float]:
        """Transcribes the evaluation set, every utterance once, and pools edits, words and nats over the processes.

        Args:
            model: another model than the one in training; its result is logged but never becomes the best checkpoint.

        Returns:
            `eval/wer`, `eval/cer`, `eval/loss` and the other numbers of `hebrew_scoring.score`, under the prefix.
        """
        started = time.perf_counter()
        metrics, references, hypotheses = self.measure(
            model or whole_model(self.model), eval_dataset or self.eval_dataset
        )
        if model is None and self.loss_is_nats and not math.isnan(self.last_train_loss):
            metrics["loss_minus_train_loss"] = metrics["loss"] - self.last_train_loss
        metrics = {f"{metric_key_prefix}/{name}": value for name, value in metrics.items()}
        self.run_log.log(metrics, self.state.global_step)
        shown = np.linspace(0, len(references) - 1, min(self.config.num_logged_predictions, len(references)))
        self.run_log.log_predictions(
            f"{metric_key_prefix}/predictions",
            [(references[i], hypotheses[i]) for i in shown.astype(int)],
            self.state.global_step,
        )
        if model is None:
            self.keep_if_best(metrics[self.chosen_by])
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.window_started += time.perf_counter() - started
        return metrics

    def measure(self, model: torch.nn.Module, dataset: SpeechDataset) -> tuple[dict[str, float], list[str], list[str]]:
        """A set's metrics, its references and the model's hypotheses; the same on every process."""
        model.eval()
        found, halved = [], 0  # (row, hypothesis, language, mean nats of its batch, target tokens)
        loader = self.get_eval_dataloader(dataset)
        batches = self.while_running(loader)
        for rows, batch in tqdm(batches, "evaluating", len(loader), leave=False, disable=self.run_log.hides_progress):
            parts = as_it_fits(functools.partial(self.transcribe, model), batch)
            outputs = [output for count, part in parts for output in part or [DOES_NOT_FIT] * count]
            found += [(row, *output) for row, output in zip(rows, outputs, strict=True)]
            halved += len(parts) - 1
        found, (halved, *others) = sorted(gather_object(found)), gather_object([halved])
        texts = dataset.rows.column("reference")
        references = [texts[row] for row, *_ in found]
        hypotheses = [hypothesis for _, hypothesis, *_ in found]
        failed = [row for row, *_, count in found if not count]
        self.run_log.note_full_memory(halved + sum(others), [dataset.rows[row]["recording"] for row in failed])
        metrics = {"loss": sum(loss * count for *_, loss, count in found) / max(1, sum(count for *_, count in found))}
        metrics |= score(references, hypotheses)
        metrics["out_of_memory"] = len(failed)
        if not self.config.eval_prefill_language:
            expected = [language or self.config.language for language in dataset.rows.column("language")]
            metrics["other_language"] = sum(language != expected[row] for row, _, language, *_ in found)
        return metrics, references, hypotheses

    def keep_if_best(self, wer: float) -> None:
        """Saves a checkpoint when this WER is the lowest since training began."""
        self.evaluation_pending, self.evaluated_step, self.last_wer = False, self.state.global_step, wer
        if self.state.global_step > 0 and wer < self.best_wer:
            self.best_wer, self.best_step = wer, self.state.global_step
            self.save_checkpoint()

    def write_final_model(self) -> None:
        """Writes the checkpoint of the lowest WER for use, in its one final type."""
        self.writer.wait()
        if self.args.process_index > 0:
            return
        best = store.best_valid(self.writer.parent, self.run_log.say)
        if best is None:
            raise InputError(f"no checkpoint is in {self.writer.parent}, so there is no final model: is the disk full?")
        self.best_step = best.step
        dtype = getattr(torch, self.config.final_dtype)
        model = Qwen3ASRForConditionalGeneration.from_pretrained(best.folder, dtype=dtype)
        save_for_use(model, self.processor, self.final_folder, dtype)
        self.final_origin = f"The checkpoint with the lowest WER, at step {best.step}."

    def write_average(self, folder: Path) -> None:
        """Writes the moving average of the newest checkpoint for use."""
        if self.args.process_index == 0:
            found = newest(self.writer.parent, 1)
            self.average_origin = f"The moving average of the weights at step {found[0].step}."
            model = model_of(found, is_moving=True)
            save_for_use(model, self.processor, folder, getattr(torch, self.config.final_dtype))

    def evaluate_stored(self, folder: Path, metric_key_prefix: str) -> dict[str, float]:
        """Evaluates a model as it is on the disk."""
        model = Qwen3ASRForConditionalGeneration.from_pretrained(folder, dtype="auto")
        return self.evaluate(metric_key_prefix=metric_key_prefix, model=model.to(self.args.device))

    @property
    def final_folder(self) -> Path:
        return Path(self.args.output_dir) / "final_model"

    # Checkpoints: RNG states are not in them, since every step and every utterance seeds its own

    def run_facts(self) -> dict[str, Any]:
        """What a resumed run must find as it was, beside the settings."""
        facts = {"bf16_autocast": self.use_bf16, "steps": self.total_steps}
        if self.config.streaming:
            return facts
        rows = self.train_dataset.rows
        return facts | {"train_utterances": len(rows), "train_seconds": round(float(rows.seconds.sum()), 3)}

    def shuffle_anew(self, order: int) -> None:
        """Lets the epochs have another order: 0 is the seed's own, each time the run goes back it is the next."""
        self.order, seed = order, self.config.seed + 1_000_003 * order
        if self.config.streaming:
            self.stream.go_on_from(self.stream.state, seed)
        else:
            self.sampler.mixture = self.mixture = Mixture(self.train_dataset.rows, self.config.train_sources, seed)

    def stream_state(self) -> dict[str, Any] | None:
        return self.stream.state if self.config.streaming else None

    def restore_stream(self, states: list[dict[str, Any] | None]) -> None:
        if not self.config.streaming:
            return
        if len(states) != self.args.world_size:
            raise InputError(
                f"a streamed run goes on with as many processes as before: {len(states)}, not {self.args.world_size}"
            )
        self.stream.go_on_from(states[self.args.process_index], self.stream.stream.seed)

    def names_of_step(self, step: int) -> list[str]:
        """This process's utterances of the step that runs."""
        if self.config.streaming:
            return self.stream.last
        mine = next(itertools.islice(self.sampler, (step - 1) % len(self.sampler), None))
        rows = [(number, self.train_dataset.rows[number]) for micro_batch in mine for _, number in micro_batch]
        return [f"{row['recording']} (utterance {number}, {row['text']!r})" for number, row in rows]

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Renames what Trainer logs to the project's names and adds each component's rate, stage and speed."""
        if "loss" not in logs:
            return
        now = time.perf_counter()
        step = self.state.global_step
        numbers = {"train/loss": logs["loss"], "train/grad_norm": logs["grad_norm"], "train/epoch": self.state.epoch}
        for component in self.stage.learning_rates:
            numbers[f"train/learning_rate_{component}"] = self.learning_rate(component, 0, step - 1)
        numbers["train/stage"] = self.config.stages.index(self.stage) + 1
        numbers["train/trainable_parameters"] = trainable_parameters(self.model)
        numbers["train/dropped_utterances"] = self.dropped_utterances
        numbers["train/dead_workers"] = self.dead_workers
        numbers |= self.window.numbers(self.model, now - self.window_started, self.watch.gather(self.window.computed))
        numbers |= self.uploader.numbers(step)
        self.window_started, self.window = now, Window()
        if math.isnan(self.last_train_loss):
            self.warn_of_a_wrong_start(logs["loss"])
        self.last_train_loss = logs["loss"]
        self.run_log.log(numbers, step)

    def verdict(self) -> list[str]:
        """Round 2's success criteria, a line each."""
        vocab_size = self.model.config.text_config.vocab_size
        return success_criteria(self.run_log.rows, self.config.target_loss, self.config.target_wer, vocab_size)

    def warn_of_a_wrong_start(self, loss: float) -> None:
        guessing = math.log(self.model.config.text_config.vocab_size)
        if loss > 8 or abs(loss - guessing) < 0.5:
            self.run_log.say(
                f"warning: the loss starts at {loss:.2f} nats per token (ln of the vocabulary is {guessing:.2f}): the"
                " model is guessing, so the prompt or the labels are wrong, or the checkpoint is untrained"
            )


def collate_step(collator: DataCollatorSpeechSeq2SeqWithPadding, micro_batches: list) -> tuple[list[dict], list[str]]:
    """One step's share of one process, and the utterances left out of it because they do not decode."""
    dropped = [u["dropped"] for utterances in micro_batches for u in utterances if "dropped" in u]
    kept = [[u for u in utterances if "dropped" not in u] for utterances in micro_batches]
    if collator.config.tokens_per_micro_batch is None:
        return [collator(utterances, training=True) for utterances in kept], dropped
    return [collator.packed(utterances) for utterances in kept], dropped


def collate_streamed(collator: DataCollatorSpeechSeq2SeqWithPadding, utterances: list[dict]) -> list[dict]:
    """One process's share of a step of a stream, whose utterances are not known before they are read."""
    prompts, targets = collator.sequences(utterances, [u["features"].shape[1] for u in utterances])
    tokens = np.array([len(prompt + target) for prompt, target in zip(prompts, targets, strict=True)])
    budget = collator.config.tokens_per_micro_batch
    if budget is None:
        deal = np.array_split(np.arange(len(tokens)), math.ceil(len(tokens) / collator.config.batch_size))
    else:
        (deal,) = deal_step(tokens, processes=1, budget=budget)
    return [collator.packed([utterances[place] for place in places]) for places in deal]


def collate_evaluation(collator: DataCollatorSpeechSeq2SeqWithPadding, batches: list) -> tuple[list[int], dict]:
    (utterances,) = batches
    return [u["index"] for u in utterances], collator(utterances, training=False)


def schedule_factor(config: TrainingConfig, total_steps: int) -> Callable[[int], float]:
    """The schedule of transformers.get_scheduler as a function from steps done to a factor between 0 and 1."""
    warmup = math.ceil(config.warmup_ratio * total_steps) if config.warmup_ratio > 0 else config.warmup_steps
    nothing = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    return transformers.get_scheduler(config.lr_scheduler_type, nothing, warmup, total_steps).lr_lambdas[0]


def main(
    config: TrainingConfig,
    trainer_class: type[GradualUnfreezeTrainer] = GradualUnfreezeTrainer,
    before_upload: Callable[[], None] = lambda: None,
) -> None:
    """Trains, reloads the best checkpoint, evaluates it and uploads it; InputError on every rank when it cannot.

    `before_upload` is called by the first process when the run is finished; what it raises keeps the model here.

    Ends the process with 128 + the signal's number when the run was stopped by one.
    """
    if config.plan:
        config.check(config.plan_devices)
        if int(os.environ.get("RANK", "0")) == 0:
            print(*lines_of(make_plan(config, trains_in)), sep="\n")
        return

    # 1. Processes and settings
    cpu = not torch.cuda.is_available()
    state = accelerate.PartialState(cpu=cpu, timeout=timedelta(minutes=config.process_timeout_minutes))
    config.check(state.num_processes)
    use_bf16 = config.bf16 if config.bf16 is not None else not cpu and torch.cuda.is_bf16_supported(False)
    quiet_libraries(state.is_main_process)
    transformers.set_seed(config.seed)
    if config.find_token_budget:
        if cpu:
            raise InputError(
                "--find_token_budget tries a GPU's memory, and there is no GPU here. On a CPU no limit can be tried:"
                " the system ends a process that takes too much. --plan computes what a GPU would hold"
            )
        with together():
            processor, model = load_processor(config.model_name_or_path), load_to_train(config, use_bf16)
        collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
        collator.in_one_row = is_inside_utterances(model.config.text_config)
        lines = find_token_budget(config, state, model, collator, use_bf16)
        if state.is_main_process:
            print(*lines, sep="\n")
        leave_process_group()
        return
    folder, _lock = open_run_folder(config, state)  # the lock holds as long as this function runs
    run_log = RunLog(folder, state.process_index)
    if config.prepare:
        if config.streaming:
            raise InputError("--prepare listens to corpora on the disk: leave --streaming out")
        if state.num_processes > 1:
            raise InputError("--prepare runs without torchrun; preprocessing_num_workers says in how many processes")
        prepare(config, config.seed, run_log.say)
    if config.inspect_data or config.prepare:
        train_rows, eval_rows = trainer_class.load_data(config, state)
        report_data(folder, train_rows, eval_rows, config, run_log)
        leave_process_group()
        return
    (status,) = broadcast_object_list([store.read_status(folder)])
    if status["state"] == "finished":
        run_log.say(f"the run in {folder} is finished; for another one choose another --output_dir, or --resume never")
        leave_process_group()
        if state.is_main_process:
            before_upload()
            if config.uploads and not status["uploaded"]:
                publish(config, folder, run_log)
        return
    with together():
        if config.uploads and state.is_main_process:
            check_upload(config, folder, run_log.say)
    with failures_noted(folder):
        uploader = run(config, state, folder, run_log, use_bf16, trainer_class)

    # 7. Upload: the other ranks are done
    if state.is_main_process:
        try:
            before_upload()
            if config.uploads:
                publish(config, folder, run_log)
                uploader.finish()
            else:
                run_log.say(f"not uploaded; to do it: {upload_command(config, folder / 'final_model')}")
        finally:
            run_log.say(run_log.dashboard())


def run(
    config: TrainingConfig,
    state: accelerate.PartialState,
    folder: Path,
    run_log: RunLog,
    use_bf16: bool,
    trainer_class: type[GradualUnfreezeTrainer],
) -> CheckpointUploader:
    """Steps 2 to 6 of `main`: what happens in the run's folder."""
    if state.is_main_process:
        store.write_status(folder, "running", pid=os.getpid())
    found = checkpoint_to_resume(config, folder, run_log)

    # 2. Model
    with together():
        processor, model = load_processor(config.model_name_or_path), load_to_train(config, use_bf16)
        check_disk(folder, model, config)

    # 3. Data
    train_rows, eval_rows = trainer_class.load_data(config, state)
    report_data(folder, train_rows, eval_rows, config, run_log)

    # 4. What will run
    trainer = trainer_class(
        config,
        training_arguments(config, folder, cpu=state.device.type == "cpu"),
        model,
        processor,
        train_rows,
        eval_rows,
        run_log,
        use_bf16,
    )
    if found:
        trainer.resume(found)
    else:
        run_log.go_back([], 0)
    announce(trainer, eval_rows, state.num_processes)
    run_log.say(stage_line(model, trainer.stage))
    run_log.start_tracker(
        config.tracker,
        config.wandb_project,
        config.wandb_run_name or folder.name,
        dataclasses.asdict(config) | facts_of_run(trainer, train_rows, state.num_processes),
        config.tags,
    )

    with trainer.watch, ends_early(trainer):
        # 5. Train
        train(trainer)

        # 6. The best checkpoint, or the moving average, as it is on disk: reload, evaluate, describe
        with together():
            trainer.write_final_model()
        final = evaluate_final(trainer)
    if state.is_main_process:
        describe_result(trainer, final)
        step = trainer.state.global_step
        store.write_status(folder, "finished", step=step, uploaded=None, **trainer.uploader.facts())
    run_log.finish()
    leave_process_group()
    return trainer.uploader


def publish(config: TrainingConfig, folder: Path, run_log: RunLog) -> None:
    """Uploads the final model of a finished run."""
    address = upload(config, folder / "final_model", run_log.say)
    store.update_status(folder, uploaded=address)


if __name__ == "__main__":
    launch(lambda arguments: main(parse_config(arguments, TrainingConfig())))
