"""Loading a checkpoint and its processor."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from transformers import Qwen3ASRProcessor

from hebrew_asr.errors import InputError
from hebrew_asr.files import UNFINISHED
from hebrew_asr.model.attention import set_attention
from hebrew_asr.model.frames import MEL_BINS
from hebrew_asr.model.fused import fuse_where_it_runs
from hebrew_asr.model.generation import decode_plainly
from hebrew_asr.model.layouts import in_transformers_layout
from hebrew_asr.model.loss import SpeechModel
from hebrew_asr.model.stages import Stage, check_stages, ever_trained
from hebrew_asr.names import check_name


def load_processor(name: str) -> Qwen3ASRProcessor:
    """The processor of a checkpoint (a folder or a Hub id, in either layout)."""
    with checkpoint_problems(name):
        processor = transformers.AutoProcessor.from_pretrained(in_transformers_layout(name), trust_remote_code=False)
        if (bins := processor.feature_extractor.feature_size) != MEL_BINS:
            raise InputError(f"{name}: feature_size of its processor is {bins}, Qwen3-ASR has {MEL_BINS}")
        return processor


def load_model(
    name: str,
    use_bf16: bool,
    stages: Sequence[Stage] = (),
    attention: str = "auto",
    gradient_checkpointing: bool = False,
    torch_compile: bool = False,
) -> SpeechModel:
    """Loads a checkpoint: fp32 for every parameter that some stage trains, bf16 for the others under bf16.

    AdamW on bf16 weights loses most updates to rounding at these rates, so trained weights are never bf16.

    Args:
        name: a folder or a Hub id, in either layout.
        stages: what will train; none where the model only transcribes.
        attention: as `set_attention` takes it.
    """
    with checkpoint_problems(name):
        folder = in_transformers_layout(name)
        kind = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
        if kind != "qwen3_asr":
            raise InputError(
                f"{name} is not a Qwen3-ASR checkpoint (model_type {kind}): use Qwen/Qwen3-ASR-1.7B-hf or"
                " Qwen/Qwen3-ASR-0.6B-hf"
            )
        model, loaded = SpeechModel.from_pretrained(
            folder,
            dtype=torch.bfloat16 if use_bf16 else torch.float32,
            attn_implementation="sdpa",  # whatever the checkpoint names, which may be code of the Hub
            ignore_mismatched_sizes=True,  # `check_whole` names them
            output_loading_info=True,
        )
        check_whole(name, loaded)
        decode_plainly(model, transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    set_attention(model, attention, use_bf16)
    fuse_where_it_runs(model)
    check_stages(model, stages)
    for parameter in ever_trained(model, stages).values():
        parameter.data = parameter.data.float()
    if gradient_checkpointing:
        # The hooks would put a gradient on the output of the encoder's first convolution, and so run a frozen encoder
        # backwards. Without them autograd begins at the first layer that trains.
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    if torch_compile:
        torch._dynamo.config.optimize_ddp = False  # it would cut each layer where a bucket of gradients ends
        for layer in model.model.language_model.layers:
            layer.compile(dynamic=True)  # in place: names of parameters stay what they are
    return model


class ModelSettings(Protocol):
    """The settings that a model in training depends on."""

    model_name_or_path: str
    stages: list[Stage]
    gradient_checkpointing: bool
    torch_compile: bool

    @property
    def attention(self) -> str: ...


def load_to_train(config: ModelSettings, use_bf16: bool) -> SpeechModel:
    """Loads the checkpoint that a run starts from."""
    return load_model(
        config.model_name_or_path,
        use_bf16,
        config.stages,
        config.attention,
        config.gradient_checkpointing,
        config.torch_compile,
    )


def check_whole(name: str, loaded: dict[str, Any]) -> None:
    """Raises InputError for a checkpoint of which weights are missing: they would be random."""
    if lost := sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]])):
        raise InputError(
            f"{name} cannot be loaded: {len(lost)} of its weights are missing or of another size, {lost[0]}"
        )


@contextlib.contextmanager
def checkpoint_problems(name: str):
    """Turns what transformers raises for a checkpoint that is not there or not whole into one message."""
    if (Path(name) / "final_model").is_dir() and not (Path(name) / "config.json").exists():
        raise InputError(f"{name} is the folder of a run: name its model, {Path(name) / 'final_model'}")
    if Path(name).is_file():
        raise InputError(f"{name} is a file: name the folder of a checkpoint, with its config.json and weights")
    if (Path(name) / "adapter_config.json").is_file():
        raise InputError(
            f"{name} holds an adapter (adapter_config.json), not a whole model: merge it first, with peft's"
            " PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(FOLDER), copy the base's"
            " processor and tokenizer into FOLDER, and name that"
        )
    if Path(name).is_dir() and not (Path(name) / "config.json").exists():
        inside = [config.parent for config in sorted(Path(name).glob("*/config.json"))]
        whole = [str(folder) for folder in inside if UNFINISHED not in folder.name]  # the last is a run's newest
        newest = f"; did you mean {whole[-1]}?" if whole else ""
        raise InputError(f"{name} is no checkpoint: it has no config.json{newest}")
    check_name(name, "model")
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # what a damaged or foreign file makes of the libraries is of many classes
        said = next(iter(str(error).strip().splitlines()), "")
        said = said if isinstance(error, OSError | ValueError) else f"{type(error).__name__} {said}"
        raise InputError(f"{name} cannot be loaded: {said}") from error
