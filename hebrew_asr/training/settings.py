"""What the training package reads of the settings: TrainingConfig in the training script has these fields."""

from typing import Any, Protocol

from hebrew_asr.data.augmentation import WaveformAugmentation
from hebrew_asr.data.sources import Source
from hebrew_asr.model.stages import Stage
from hebrew_asr.text.targets import TextRules


class BatchSettings(Protocol):
    """How a step is cut into micro-batches."""

    seed: int
    prev_context_prob: float
    target_effective_batch: int
    tokens_per_micro_batch: int | None
    batch_size: int


class Settings(BatchSettings, Protocol):
    """The settings of a run; their meanings stand in TrainingConfig."""

    model_name_or_path: str
    language: str
    stages: list[Stage]
    num_epochs: int
    max_steps: int | None
    train_sources: list[Source]
    eval_sources: list[Source]
    streaming: bool
    steps_per_epoch: int | None
    max_audio_length_seconds: float
    text_rules: TextRules
    use_waveform_augmentation: bool
    waveform_augmentation: WaveformAugmentation
    fsdp: bool
    ema_decay: float | None
    max_grad_norm: float
    logging_steps: int
    resume: str
    save_steps: int
    save_total_limit: int
    preemption_grace_seconds: float
    stall_timeout_minutes: float
    max_bad_steps: int
    check_ranks_steps: int
    hf_repo_id: str | None
    hub_checkpoints: bool
    hub_save_total_limit: int
    inspect_data: bool
    output_dir: str | None

    @property
    def uploads(self) -> bool: ...

    @property
    def tags(self) -> list[str]: ...

    def meaning(self) -> dict[str, Any]: ...

    def stage_of_epoch(self, epoch: int) -> Stage: ...

    def first_epoch_of(self, stage: Stage) -> int: ...

    def gradient_accumulation_steps(self, processes: int) -> float: ...
