"""What the training package reads of the settings.

The fields themselves, with their meanings and defaults, stand in TrainingConfig in the training script, which is a
`Settings`; here are their types alone.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from hebrew_asr.command_line import Between, Range
from hebrew_asr.data.sources import DataConfig, WaveformAugmentation
from hebrew_asr.errors import InputError
from hebrew_asr.model.stages import Stage


@dataclass
class PlanSettings:
    """What --check_machine and --plan find before a run"""

    check_machine: bool = False
    """Only look, in a minute, whether this machine is fit for the run: a line each, `ok` or what to do
    (docs/planning.md)."""
    plan: bool = False
    """Only print what the run will need: memory, hours, cost. Needs no GPU and downloads nothing."""
    plan_device: Literal["A100-40GB", "A100-80GB", "H100", "H200", "L40S", "4090"] = "A100-40GB"
    plan_devices: Annotated[int, Range(1)] = 8
    plan_hours_of_audio: Annotated[float, Between(0)] | None = None
    """Of an epoch; None: from the corpora where they are local, else 350."""
    plan_mean_seconds: Annotated[float, Between(0)] = 6.0
    """Of an utterance, where the corpora are not read."""
    plan_price_per_hour: Annotated[float, Range(0)] | None = None
    """Of one device; None: no cost is printed."""


class Settings(PlanSettings, DataConfig):
    # Model and step
    model_name_or_path: str
    language: str
    bf16: bool | None
    attention: str
    torch_compile: bool
    gradient_checkpointing: bool
    fsdp: bool
    bf16_exchange: bool
    final_dtype: str
    stages: list[Stage]
    num_epochs: int
    max_steps: int | None
    lr_scheduler_type: str
    warmup_ratio: float
    warmup_steps: int
    max_grad_norm: float
    ema_decay: float | None
    optimizer: str

    # Data
    seed: int
    target_effective_batch: int
    tokens_per_micro_batch: int | None
    batch_size: int
    tracker: str
    dataloader_num_workers: int
    use_waveform_augmentation: bool
    waveform_augmentation: WaveformAugmentation

    # Evaluation and log
    eval_steps: int
    eval_batch_size: int | None
    generation_max_new_tokens: int | None
    eval_prefill_language: bool
    num_logged_predictions: int
    logging_steps: int
    target_loss: float | None
    target_wer: float | None

    # Checkpoints
    resume: str
    accept_changed_data: bool
    save_steps: int
    save_total_limit: int
    preemption_grace_seconds: float
    stall_timeout_minutes: float
    max_bad_steps: int
    check_ranks_steps: int
    hf_repo_id: str | None
    hf_private: bool
    hub_checkpoints: bool
    hub_save_total_limit: int
    inspect_data: bool
    prepare: bool
    output_dir: str | None

    @property
    def uploads(self) -> bool:
        raise NotImplementedError

    @property
    def tags(self) -> list[str]:
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """The settings that identify the run: a resumed run must match them."""
        raise NotImplementedError

    def stage_of_epoch(self, epoch: int) -> Stage:
        raise NotImplementedError

    def first_epoch_of(self, stage: Stage) -> int:
        raise NotImplementedError

    def gradient_accumulation_steps(self, processes: int) -> float:
        raise NotImplementedError


def check_batch(config: Settings, processes: int) -> None:
    """Raises InputError for a batch that cannot be cut as the settings say."""
    if config.streaming and config.target_effective_batch % processes:
        raise InputError(
            f"streaming needs a target_effective_batch ({config.target_effective_batch}) that is a multiple of the"
            f" number of processes ({processes})"
        )
    target, at_once = config.target_effective_batch, config.batch_size * processes
    if config.tokens_per_micro_batch is not None or target % at_once == 0:
        return
    sizes = [size for size in range(1, target + 1) if target % (size * processes) == 0]
    nearest_sizes = sorted(sorted(sizes, key=lambda size: abs(size - config.batch_size))[:2])
    targets = sorted({max(1, target // at_once) * at_once, (target // at_once + 1) * at_once})
    raise InputError(
        f"target_effective_batch ({target}) is not a multiple of batch_size × processes"
        f" ({config.batch_size} × {processes} = {at_once}). Nearest that divide: batch_size"
        f" {' or '.join(map(str, nearest_sizes)) or '(none)'}, or target_effective_batch"
        f" {' or '.join(map(str, targets))}"
    )
