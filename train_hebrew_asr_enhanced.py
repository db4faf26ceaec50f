"""Fine-tunes Qwen3-ASR to Hebrew speech recognition, unfreezing it in stages.

    uv run torchrun --nproc_per_node=8 train_round2_gradual.py            the Round 2 recipe: Strategy B, then A
    uv run torchrun --nproc_per_node=8 train_hebrew_asr_enhanced.py       the plain defaults of TrainingConfig below
    uv run train_hebrew_asr_enhanced.py --help                            every setting

Every setting is a field of TrainingConfig: edit it here, or override it on the command line (`--num_epochs 3`).
The run's folder (`--output_dir`) gets config.yaml, corpus.html, metrics.jsonl, curves.png, checkpoints/, status.json
and final_model/. The same command in the same folder goes on from the last checkpoint.
"""

if __name__ == "__main__":  # the imports take seconds
    from hebrew_asr.start import begin

    begin()

import dataclasses
import functools
import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from hebrew_asr.command_line import READERS, Between, Range, check_ranges, parse_config, read_options, switch, variable
from hebrew_asr.data.sources import WaveformAugmentation, check_language
from hebrew_asr.errors import InputError
from hebrew_asr.model.frames import MEL_BINS
from hebrew_asr.model.stages import Stage, check_stage_list
from hebrew_asr.training.run_log import tracker_here
from hebrew_asr.training.settings import Settings, check_batch


@dataclass
class TrainingConfig(Settings):
    # Model
    model_name_or_path: str = "Qwen/Qwen3-ASR-1.7B-hf"
    """A Qwen3-ASR checkpoint in transformers' own layout (the ids that end in -hf), or a local folder of one."""
    language: str = "Hebrew"
    """The name the model writes before the transcript: `language Hebrew<asr_text>…`."""
    bf16: bool | None = None
    """bf16 autocast and bf16 frozen weights (what trains is kept in fp32); None: where the GPU has it."""
    attention: Literal["auto", "sdpa", "varlen", "flash_attention_2", "flash_attention_3"] = "auto"
    """auto: the fastest there is; sdpa: as transformers does it; varlen: PyTorch's FlashAttention, for packed rows and
    the encoder's windows; flash_attention_2, flash_attention_3: those of the flash-attn package."""
    torch_compile: bool = False
    """torch.compile of the language model's layers while training: it takes minutes at the start and after a switch."""
    final_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """The one type of the final model's weights on disk."""

    # Data: the sources and filters are fields of DataConfig, in hebrew_asr/data/sources.py
    dataloader_num_workers: Annotated[int, Range(0)] = 4
    """Processes that decode and extract features, for each rank; 0: the training process itself."""

    # SpecAugment (Park et al. 2019, arXiv:1904.08779), on training batches only
    use_specaugment: bool = True
    time_mask_param: Annotated[int, Range(0)] = 80
    """Widest time mask in mel frames of 10 ms."""
    freq_mask_param: Annotated[int, Range(0, MEL_BINS)] = 27
    """Widest frequency mask in mel bins (of 128)."""
    num_time_masks: Annotated[int, Range(0)] = 2
    num_freq_masks: Annotated[int, Range(0)] = 2
    mask_value: float = 0.0
    """What masked features become."""
    max_time_mask_share: Annotated[float, Range(0, 1)] = 0.2
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
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup", "constant"] = "cosine"
    """As transformers.get_scheduler has them."""
    warmup_ratio: Annotated[float, Range(0, 1)] = 0.1
    """Share of the run's steps; 0: warmup_steps is used instead."""
    warmup_steps: Annotated[int, Range(0)] = 500
    """Steps, where warmup_ratio is 0."""
    layerwise_lr_decay_rate: Annotated[float, Range(0, 1)] = 1.0
    """Each layer of llm_top and audio_top trains this much slower than the one above it; 1.0: all alike."""

    # Batch
    target_effective_batch: Annotated[int, Range(1)] = 64
    """Utterances of one optimizer step, over all processes."""
    tokens_per_micro_batch: Annotated[int, Range(1)] | None = 3072
    """Token budget (audio and text) of one forward pass on one GPU; None: use batch_size (padded rows)."""
    batch_size: Annotated[int, Range(1)] = 2
    """Utterances of one forward pass of one process, where tokens_per_micro_batch is None."""
    gradient_checkpointing: bool = False
    """Less memory for a third more time: what trains runs forward a second time in the backward pass."""
    bf16_exchange: bool = False
    """Gradients are added up over the processes in bf16, with fsdp over micro-batches too: half of the exchange."""
    fsdp: bool = False
    """Of what trains each process holds only a part, with its gradient and moments; in bf16 the weights are gathered
    in bf16. Less memory, and on many GPUs a shorter step."""

    # Optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of layers and projector, AdamW for the rest (docs/recipes.md: where it won)."""
    weight_decay: Annotated[float, Range(0)] = 0.01
    max_grad_norm: Annotated[float, Between(0)] = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: Annotated[float, Between(0, 1)] | None = None
    """Keep an exponential moving average of what trains (0.999 spans about 1,000 steps; fp32, beside the weights), and
    make it the final model where its WER is lower than the best checkpoint's. It is evaluated at the end only."""

    # Evaluation
    eval_steps: Annotated[int, Range(1)] = 500
    """Also before the first step, at the end of each stage, and at the end."""
    eval_batch_size: Annotated[int, Range(1)] | None = None
    """Utterances as long as max_audio_length_seconds at once, more of shorter ones; None: as memory allows, 8–64."""
    eval_prefill_language: bool = False
    """Give the model `language Hebrew<asr_text>` instead of letting it name the language itself."""
    generation_max_new_tokens: Annotated[int, Range(1)] | None = None
    """Tokens of a transcript at most; None: 64, and 12 for each second (a fast speaker's Hebrew has 8 a second)."""
    num_logged_predictions: Annotated[int, Range(0)] = 5
    """References with their hypotheses that each evaluation prints and tracks."""

    # Tracking
    tracker: Literal["wandb", "trackio", "none"] = "wandb"
    """wandb, trackio (a local dashboard, no account), or none; metrics.jsonl is written in any case."""
    wandb_project: str = variable("WANDB_PROJECT", "qwen3-asr-hebrew")
    wandb_run_name: str | None = variable("WANDB_RUN_NAME", None)
    """None: the name of the run's folder. Also of trackio, as wandb_project is."""
    logging_steps: Annotated[int, Range(1)] = 10
    """Steps from one line of the log to the next."""

    # Checkpoints
    resume: str = "auto"
    """auto: go on where the run in the folder stopped; never: a new run; hub: also from what was uploaded, if that is
    newer than the folder's; or the folder of a checkpoint."""
    accept_changed_data: bool = False
    """Go on with other data than the checkpoint was trained or evaluated with; the lowest WER begins anew with them."""
    save_steps: Annotated[int, Range(1)] = 500
    """Steps from one checkpoint to the next. Also when the WER is the lowest so far, and at the end of each stage."""
    save_total_limit: Annotated[int, Range(1)] = 2
    """So many of the newest checkpoints are kept, and the one of the lowest WER."""
    preemption_grace_seconds: Annotated[float, Range(0)] = 25
    """From a signal to stop to the end of the processes, with a checkpoint or without; torchrun itself gives 30."""
    stall_timeout_minutes: Annotated[float, Between(0)] = 10
    """A process that makes no progress for so long while training ends the run."""
    max_bad_steps: Annotated[int, Range(1)] = 3
    """Steps in a row without a finite gradient after which the run goes back to the last checkpoint."""
    check_ranks_steps: Annotated[int, Range(1)] = 100
    """Steps from one comparison of the processes' weights to the next."""

    # Success criteria, checked after training
    target_loss: float | None = 11.0
    """Nats per target token; null: no target. The figure is Round 2's; a run that is set up right starts below 2."""
    target_wer: float | None = 11.0
    """Percent; null: no target. The figure is Round 2's, on eval-d1: another run needs its own."""

    # Upload
    hf_repo_id: str | None = variable("HF_REPO_ID", None)
    """owner/name on the Hub; None: the model stays on this disk."""
    skip_hf_upload: bool = variable("SKIP_HF_UPLOAD", False, switch)
    hf_private: bool = True
    """Of a repository that the upload creates."""
    hub_checkpoints: bool = True
    """Upload checkpoints while training, to a branch of the repository, which `--resume hub` goes on from."""
    hub_save_total_limit: int = 1
    """So many of the newest checkpoints stay on the Hub, and the one of the lowest WER; its history keeps no others."""

    # Run
    inspect_data: bool = False
    """Only read the corpora and write their report (corpus.html, .md, .json) into the run's folder."""
    prepare: bool = False
    """Only listen to the corpora once and write their report; later starts use what was heard (docs/data.md)."""
    find_token_budget: bool = False
    """Only try, on the GPUs given, how large tokens_per_micro_batch may be, and print it (docs/training.md)."""
    output_dir: str | None = None
    """None: a folder under runs/, named after the settings: the same for the same command."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 42
    """Of the order of the data, augmentation, masks and what is held out."""
    process_timeout_minutes: Annotated[int, Range(1)] = 60
    """How long processes wait for one another at the start, above all while the first one reads the corpora."""

    def gradient_accumulation_steps(self, processes: int) -> float:
        """Micro-batches of one process in a step; a whole number where batch_size is used (no token budget)."""
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

    def identity(self) -> dict[str, Any]:
        """The settings that identify the run, as JSON has them; a resumed run must match them."""
        settings = json.loads(json.dumps(dataclasses.asdict(self)))
        return {name: value for name, value in settings.items() if name not in MAY_CHANGE}

    def stage_of_epoch(self, epoch: int) -> Stage:
        """The stage that `epoch` (from 1) belongs to; epochs after the last stage use the last stage."""
        return next((stage for stage in self.stages if epoch <= stage.last_epoch), self.stages[-1])

    def first_epoch_of(self, stage: Stage) -> int:
        index = self.stages.index(stage)
        return self.stages[index - 1].last_epoch + 1 if index else 1

    def check_early(self) -> None:
        """`check` before any process has joined another: as many as torchrun started, or as are planned."""
        self.check(self.plan_devices if self.plan else int(os.environ.get("WORLD_SIZE", "1")))

    def check(self, processes: int) -> None:
        """Raises InputError for settings that cannot mean what they say, before anything is loaded."""
        check_language(self.language)
        check_stage_list(self.stages, self.num_epochs, self.max_steps)
        check_ranges(self)
        check_batch(self, processes)
        tracker_here(self.tracker)
        if self.hub_checkpoints and not 1 <= self.hub_save_total_limit <= self.save_total_limit:
            raise InputError(
                f"hub_save_total_limit must lie between 1 and save_total_limit ({self.save_total_limit}), what is kept"
                f" here: {self.hub_save_total_limit}"
            )
        self.check_sources()
        if self.uploads and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.hf_repo_id or ""):
            raise InputError(f"hf_repo_id must be owner/name, got {self.hf_repo_id!r} (from HF_REPO_ID?)")


MAY_CHANGE = {  # settings that a resumed run may have otherwise than before
    *("bf16", "attention", "torch_compile", "final_dtype", "batch_size"),
    *("dataloader_num_workers", "preprocessing_num_workers"),
    *("eval_steps", "eval_batch_size", "generation_max_new_tokens", "num_logged_predictions", "logging_steps"),
    "confirm_share",  # another evaluation set, which is noticed as such
    *("target_loss", "target_wer", "tracker", "wandb_project", "wandb_run_name"),
    *("hf_repo_id", "skip_hf_upload", "hf_private", "hub_checkpoints", "hub_save_total_limit"),
    *("resume", "accept_changed_data", "save_steps", "save_total_limit", "preemption_grace_seconds"),
    *("stall_timeout_minutes", "max_bad_steps", "check_ranks_steps", "process_timeout_minutes"),
    *("inspect_data", "output_dir"),
    *("tokens_per_micro_batch", "gradient_checkpointing", "fsdp", "bf16_exchange", "prepare", "prepared_dir"),
    *("plan", "plan_device", "plan_devices", "plan_hours_of_audio", "plan_mean_seconds", "plan_price_per_hour"),
    *("find_token_budget", "check_machine"),
}


def parse(argv: list[str]) -> TrainingConfig:
    return parse_config(argv, TrainingConfig(), about=__doc__)


if __name__ == "__main__":
    READERS.append(lambda arguments: parse(arguments).check_early())
read_options()  # what follows takes seconds to import

import accelerate
import numpy as np
import torch
import transformers
from accelerate.utils import DDPCommunicationHookType, broadcast_object_list
from transformers import Qwen3ASRProcessor

from hebrew_asr.checkpoints import store
from hebrew_asr.checkpoints.final import finish
from hebrew_asr.checkpoints.hub import CheckpointUploader, check_upload, is_of, upload_command
from hebrew_asr.console import Bar
from hebrew_asr.data.identity import identity_of
from hebrew_asr.data.prepare import prepare
from hebrew_asr.data.rows import BROKEN, SpeechRows
from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.model.attention import is_inside_utterances
from hebrew_asr.model.costs import work_of
from hebrew_asr.model.frames import FRAMES_PER_CHUNK
from hebrew_asr.model.generation import generate, new_token_limit
from hebrew_asr.model.loading import load_processor, load_to_train
from hebrew_asr.model.loss import IGNORED_LABEL, SpeechModel, label_nats
from hebrew_asr.model.muon import Muon, by_muon
from hebrew_asr.model.packing import pack, places_of
from hebrew_asr.model.precision import mixed_precision, runs_bf16, to_encoder
from hebrew_asr.model.prompts import pad, padded
from hebrew_asr.model.sharding import is_sharded, shard, whole_model
from hebrew_asr.model.stages import (
    component_of,
    ever_trained,
    freeze_for,
    layer_depth,
    stage_line,
    trainable_parameters,
    trains_in,
)
from hebrew_asr.processes import fail_together, join_processes, launch, leave_process_group
from hebrew_asr.training.batches import Collator, collate_evaluation, evaluation_batches
from hebrew_asr.training.feed import TrainingData, load_data, open_feed, speech_loader
from hebrew_asr.training.final_model import evaluate_final, is_whole, write_final_model
from hebrew_asr.training.machine import check_machine
from hebrew_asr.training.measuring import Output, pool, transcribe_batches
from hebrew_asr.training.moving_average import MovingAverage
from hebrew_asr.training.plan import lines_of, make_plan
from hebrew_asr.training.resuming import StepEvents, ends_early, stand_in_for_lost, train, training_arguments
from hebrew_asr.training.run_folder import (
    check_disk,
    checkpoint_to_resume,
    failures_noted,
    first_line,
    open_run_folder,
    publish,
    settle,
)
from hebrew_asr.training.run_log import PANELS, WORSE, RunLog, is_worse, success_criteria
from hebrew_asr.training.run_report import (
    announce,
    describe_result,
    facts_of_run,
    note_changed_data,
    report_data,
    warn_of_a_wrong_start,
)
from hebrew_asr.training.speed import StepClock, StepCounts, Window
from hebrew_asr.training.step import StepTrainer
from hebrew_asr.training.token_budget import find_token_budget

SILENCE = np.zeros((MEL_BINS, FRAMES_PER_CHUNK), np.float32)  # a second, for a process without work in a step


class DataCollatorSpeechSeq2SeqWithPadding(Collator):
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
        return batch | places_of(batch, self.audio_token_id)

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
class GradualUnfreezeTrainer(StepTrainer):
    """Trainer that changes what trains at stage boundaries and evaluates by transcribing.

    What it relies on in Trainer 5.23: `_run_epoch` gets the wrapped model as an argument, one item of the loader is
    one optimizer step when `gradient_accumulation_steps` is 1, and `create_optimizer` and `create_scheduler` are hooks.
    """

    config: TrainingConfig
    eval_dataset: SpeechDataset
    loss_is_nats = True  # so that it compares with the evaluation's
    panels: ClassVar[dict[str, list[str]]] = PANELS  # of curves.png
    chosen_by = "eval/wer"  # the metric whose lowest value makes the best checkpoint

    def __init__(
        self,
        config: TrainingConfig,
        args: transformers.TrainingArguments,
        model: SpeechModel,
        processor: Qwen3ASRProcessor,
        data: TrainingData,
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
            shard(model, ever_trained(model, config.stages).keys(), args.device, use_bf16, config.bf16_exchange)
        self.identities = {"evaluation": identity_of(eval_rows)} | (
            {"training": identity_of(data)} if isinstance(data, SpeechRows) else {}
        )
        self.feed = open_feed(data, processor, self.collator, config, args.process_index, args.world_size)
        super().__init__(
            model=model, args=args, eval_dataset=SpeechDataset(eval_rows, processor, config, training=False)
        )
        # The gradients then lie in what is exchanged, instead of being copied there and back.
        self.accelerator.ddp_handler.gradient_as_bucket_view = True
        if config.bf16_exchange:
            self.accelerator.ddp_handler.comm_hook = DDPCommunicationHookType.BF16
        self.total_steps = config.max_steps or config.num_epochs * len(self.feed)
        ends = {stage.last_epoch * len(self.feed): stage.name for stage in config.stages}
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
    def load_data(config: TrainingConfig, state: accelerate.PartialState) -> tuple[TrainingData, SpeechRows]:
        return load_data(config, state)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """One item is this process's share of one optimizer step: a list of micro-batches. Already sharded by rank."""
        return self.feed.loader()

    def get_eval_dataloader(self, eval_dataset: SpeechDataset | None = None) -> torch.utils.data.DataLoader:
        """This process's batches of the evaluation set; the batches are the same for any number of processes."""
        config, dataset = self.config, eval_dataset or self.eval_dataset
        batches = evaluation_batches(dataset.rows.seconds, config.max_audio_length_seconds, self.eval_batch_size)
        mine = [[batch] for batch in batches[self.args.process_index :: self.args.world_size]]
        seconds = min(self.eval_batch_size * config.max_audio_length_seconds, float(dataset.rows.seconds.sum()))
        return speech_loader(dataset, mine, functools.partial(collate_evaluation, self.collator), config, seconds)

    # Stages

    def _run_epoch(self, model: torch.nn.Module, epoch: int, **kwargs: Any) -> None:
        """Enters the stage of this epoch first (Trainer counts epochs from 0), then trains on the current wrapper."""
        self.feed.epoch = epoch + 1
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

    # Optimizer and schedule

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Every parameter that some stage trains, one group for each component, layer and decay.

        Frozen ones have no gradient, and a parameter without gradient is left alone, as are its moments.
        """
        if self.optimizer is None:
            groups: dict[tuple, dict[str, Any]] = {}
            decayed = set(self.get_decay_parameter_names(self.model))
            for name, parameter in ever_trained(self.model, self.config.stages).items():
                (component,) = {
                    component_of(name, stage, self.model.config)
                    for stage in self.config.stages
                    if trains_in(name, stage, self.model.config)
                }
                matrices = self.config.optimizer == "muon" and by_muon(name, parameter.dim())
                key = (component, layer_depth(name, self.model.config), name in decayed, matrices)
                weight_decay = self.config.weight_decay if name in decayed else 0.0
                new = {"component": component, "depth": key[1], "weight_decay": weight_decay, "matrices": matrices}
                groups.setdefault(key, new | {"params": []})["params"].append(parameter)
            # The base learning rate is 1, and the lambda of create_scheduler returns the learning rate.
            optimizer = Muon if self.config.optimizer == "muon" else torch.optim.AdamW
            self.optimizer = optimizer(list(groups.values()), lr=1.0, fused=torch.cuda.is_available() or None)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """A schedule whose rate is a pure function of (group, step): see `learning_rate`."""
        optimizer = optimizer or self.optimizer
        self.factor = schedule_factor(self.config, num_training_steps)
        rates: list[Any] = [
            functools.partial(self.learning_rate, g["component"], g["depth"]) for g in optimizer.param_groups
        ]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def learning_rate(self, component: str, depth: int, step: int) -> float:
        """The rate of the step after `step` steps, for a component's layer `depth` layers below the top one."""
        stage = self.config.stage_of_epoch(step // len(self.feed) + 1)
        peak = stage.learning_rates.get(component, 0.0)
        return peak * self.config.layerwise_lr_decay_rate**depth * self.factor(step)

    # Step

    def training_step(
        self,
        model: Any,
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
        micro_batches = [part for batch in micro_batches for part in self.as_it_fitted(batch)]
        counts = StepCounts(dropped=len(dropped), broken=sum(line.split(":")[0] in BROKEN for line in dropped))
        for batch in micro_batches:
            counts.add(batch, self.items_of(batch))
            self.window.work += work_of(batch, self.model.config)
        counts.dead_workers, self.newly_dead = self.newly_dead, 0
        items = self.window.add_step(counts, self.accelerator)
        self.dropped_utterances += int(counts.dropped)
        self.broken_utterances += int(counts.broken)
        self.dead_workers += int(counts.dead_workers)
        self.check_broken(self.state.global_step + 1)
        # Gradients are averaged over the processes; the loss is a sum over items. A step of which nothing decodes has
        # none: its gradient is NaN, and it is skipped as every such step is.
        scale = self.args.world_size / items if items else math.nan
        self.clock.begin()
        while True:
            try:
                return self.accumulate(model, micro_batches, scale)
            except torch.OutOfMemoryError as error:
                problem = first_line(error)  # what it had allocated goes with its traceback, at the end of this block
            micro_batches = self.in_smaller_parts(model, micro_batches, problem)

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
        inputs["input_features"] = to_encoder(module, inputs["input_features"])
        with torch.no_grad(), mixed_precision(module):
            loss = label_nats(module, **inputs)[1].mean()
            if prediction_loss_only:
                return loss, None, None
        frames = inputs["input_features_mask"].sum(dim=1).tolist()
        limits = [
            self.config.generation_max_new_tokens or new_token_limit(count / FRAMES_PER_CHUNK) for count in frames
        ]
        return loss, generate(module, inputs | prompts, limits), inputs["labels"]

    def transcribe(self, module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[Output]:
        """Hypothesis, language, mean nats of the batch, and target tokens of each utterance of one batch."""
        loss, generated, labels = self.prediction_step(module, batch, prediction_loss_only=False)
        assert labels is not None
        tokens = labels.ne(IGNORED_LABEL).sum(dim=1).tolist()
        written = zip(self.collator.read(generated), tokens, strict=True)
        return [Output(text, language, loss.item(), count) for (language, text), count in written]

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
            `eval/wer`, `eval/cer`, `eval/loss` and the other numbers of `score` in
            hebrew_asr/text/scoring.py, under the prefix.
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
        loader = self.get_eval_dataloader(dataset)
        hides = self.run_log.hides_progress
        batches = Bar(self.while_running(loader), "evaluating", len(loader), leave=False, disable=hides)
        heard, halved = transcribe_batches(batches, functools.partial(self.transcribe, model))
        language = None if self.config.eval_prefill_language else self.config.language
        return pool(heard, halved, dataset.rows, language, self.run_log)

    def keep_if_best(self, wer: float) -> None:
        """Saves a checkpoint when this WER is the lowest since training began."""
        self.evaluation_pending, self.evaluated_step, self.last_wer = False, self.state.global_step, wer
        if self.state.global_step > 0 and wer < self.best_wer:
            self.best_wer, self.best_step = wer, self.state.global_step
            self.save_checkpoint()

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
        if self.split_micro_batches:
            numbers["train/split_micro_batches"] = self.split_micro_batches  # of this process
        numbers |= self.window.numbers(self.model, now - self.window_started, self.watch.gather(self.window.computed))
        numbers |= self.uploader.numbers(step)
        self.window_started, self.window = now, Window()
        if math.isnan(self.last_train_loss):
            warn_of_a_wrong_start(logs["loss"], self.model.config.text_config.vocab_size, self.run_log)
        self.last_train_loss = logs["loss"]
        self.run_log.log(numbers, step)

    def verdict(self) -> list[str]:
        """Round 2's success criteria, a line each."""
        vocab_size = self.model.config.text_config.vocab_size
        return success_criteria(self.run_log.rows, self.config.target_loss, self.config.target_wer, vocab_size)


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
            print(*lines_of(make_plan(config)), sep="\n")
        return

    # 1. Processes and settings
    state = join_processes(config.process_timeout_minutes)
    config.check(state.num_processes)
    use_bf16 = config.bf16 if config.bf16 is not None else runs_bf16(state.device)
    transformers.set_seed(config.seed)
    if config.check_machine:
        check_machine(config, state, use_bf16)
        return leave_process_group()
    if config.find_token_budget:
        if state.device.type == "cpu":
            raise InputError(
                "--find_token_budget tries a GPU's memory, and there is no GPU here. On a CPU no limit can be tried:"
                " the system ends a process that takes too much. --plan computes what a GPU would hold"
            )
        with fail_together():
            processor, model = load_processor(config.model_name_or_path), load_to_train(config, use_bf16)
        collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
        collator.in_one_row = is_inside_utterances(model.config.text_config)
        lines = find_token_budget(config, state, model, collator, use_bf16)
        if state.is_main_process:
            print(*lines, sep="\n")
        return leave_process_group()
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
        return leave_process_group()
    (status,) = broadcast_object_list([store.read_status(folder)])
    if status["state"] == "finished" and is_whole(folder, state, run_log):
        never = "" if config.output_dir else ", or --resume never"
        run_log.say(f"the run in {folder} is finished; for another one choose another --output_dir{never}")
        if "data" in status:
            loads = functools.partial(trainer_class.load_data, config, state)
            note_changed_data(loads, status["data"], run_log)
        leave_process_group()
        if state.is_main_process:
            before_upload()
            if config.uploads and not is_of(config.hf_repo_id, status.get("uploaded")):
                publish(config, folder, run_log)
        return
    with fail_together():
        run_log.check_tracker(config.tracker, config.wandb_project)
        if config.uploads and state.is_main_process:
            check_upload(config, folder, run_log.say)
    with failures_noted(config, folder):
        uploader = run(config, state, folder, run_log, use_bf16, trainer_class)

    # 7. Upload: the other ranks are done
    if state.is_main_process:
        try:
            before_upload()
            if config.uploads:
                publish(config, folder, run_log)
                uploader.finish()
            elif is_worse(run_log.rows):
                run_log.say(WORSE)
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
    with fail_together():
        processor, model = load_processor(config.model_name_or_path), load_to_train(config, use_bf16)
        check_disk(folder, model, config)

    # 3. Data
    train_rows, eval_rows = trainer_class.load_data(config, state)
    report_data(folder, train_rows, eval_rows, config, run_log)
    if found and isinstance(train_rows, SpeechRows):
        train_rows = stand_in_for_lost(train_rows, found, run_log)

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
        trainer.resume(found)  # raises where it cannot go on, before anything in the folder is moved
    trainer.resumed = settle(found, trainer.writer.parent)
    if not found:
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
        with fail_together():
            write_final_model(trainer)
        final = evaluate_final(trainer)
    if state.is_main_process:
        describe_result(trainer, final)
        finish(trainer.final_folder)
        facts = {"step": trainer.state.global_step, "failed_saves": trainer.writer.failures, "uploaded": None}
        facts |= {"failed_log_writes": run_log.failed_writes, "data": trainer.run_facts()["data"]}
        store.write_status(folder, "finished", **facts, **trainer.uploader.facts())
    run_log.finish()
    leave_process_group()
    return trainer.uploader


if __name__ == "__main__":
    launch(lambda arguments: main(parse(arguments)))
