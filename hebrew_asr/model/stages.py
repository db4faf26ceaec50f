"""What trains: components, stages, freezing."""

import re
import typing
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hebrew_asr.errors import InputError

if typing.TYPE_CHECKING:  # a command line that names stages is read before these are imported, which takes seconds
    import torch
    from transformers import Qwen3ASRConfig, Qwen3ASRForConditionalGeneration

COMPONENTS = ("projector", "audio_top", "llm_top", "lm_head")


@dataclass
class Stage:
    """What trains, and how fast, until the end of `last_epoch`."""

    name: str
    last_epoch: int
    """Epochs are counted from 1; this one still belongs to the stage."""
    learning_rates: dict[str, float]
    """Peak rate of each component that trains (projector, audio_top, llm_top, lm_head); the others are frozen."""
    audio_top_layers: int | None = 8
    """How many of the encoder's last layers `audio_top` means (of 24 in the 1.7B); None: all of them."""
    llm_top_layers: int | None = 12
    """How many of the language model's last layers `llm_top` means (of 28 in the 1.7B); None: all of them."""


LAYER = re.compile(r"(audio_tower|language_model)\.layers\.(\d+)\.")


def layer_depth(name: str, model_config: "Qwen3ASRConfig") -> int:
    """How many layers lie above a parameter in its tower, or 0 for one outside of the layers."""
    if not (match := LAYER.search(name)):
        return 0
    tower = model_config.audio_config if match[1] == "audio_tower" else model_config.text_config
    return tower.num_hidden_layers - 1 - int(match[2])


def component_of(name: str, stage: Stage, model_config: "Qwen3ASRConfig") -> str | None:
    """Which component a parameter belongs to in a stage, or None for what no component covers.

    The one place that knows: freezing, parameter groups, logging and checks all ask here.
    """
    if "multi_modal_projector." in name or "audio_tower.ln_post." in name:
        return "projector"
    if name == "lm_head.weight" or (name.endswith("embed_tokens.weight") and model_config.tie_word_embeddings):
        return "lm_head"
    if match := LAYER.search(name):
        component, top = (
            ("audio_top", stage.audio_top_layers) if match[1] == "audio_tower" else ("llm_top", stage.llm_top_layers)
        )
        return component if top is None or layer_depth(name, model_config) < top else None
    return None


def trains_in(name: str, stage: Stage, model_config: "Qwen3ASRConfig") -> bool:
    return component_of(name, stage, model_config) in stage.learning_rates


def ever_trained(model: "Qwen3ASRForConditionalGeneration", stages: Sequence[Stage]) -> "dict[str, torch.nn.Parameter]":
    """The parameters that some stage trains."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(trains_in(name, stage, model.config) for stage in stages)
    }


def check_stage_list(stages: Sequence[Stage], num_epochs: int, max_steps: int | None) -> None:
    """Raises InputError for stages that cannot follow one another, or that train nothing."""
    if not stages:
        raise InputError("stages is empty: name at least one stage")
    last_epochs = [stage.last_epoch for stage in stages]
    if last_epochs != sorted(set(last_epochs)) or last_epochs[0] < 1:
        raise InputError(f"the stages' last_epoch must grow from one stage to the next, starting at 1: {last_epochs}")
    if max_steps is None and num_epochs > last_epochs[-1]:
        raise InputError(
            f"num_epochs is {num_epochs}, but the last stage ({stages[-1].name}) ends at epoch"
            f" {last_epochs[-1]}: raise its last_epoch, or lower num_epochs"
        )
    if (num_epochs if max_steps is None else max_steps) < 1:
        raise InputError(f"nothing to train: num_epochs is {num_epochs}, max_steps {max_steps}; give 1 or more")
    for stage in stages:
        if unknown := set(stage.learning_rates) - set(COMPONENTS):
            raise InputError(f"stage {stage.name}: unknown component {sorted(unknown)}, known: {list(COMPONENTS)}")
        if not stage.learning_rates or not all(rate > 0 for rate in stage.learning_rates.values()):
            raise InputError(f"stage {stage.name} trains nothing: give at least one component a rate above 0")


def check_stages(model: "Qwen3ASRForConditionalGeneration", stages: Sequence[Stage]) -> None:
    """Raises InputError for a stage that asks for layers the model has not, or for a component without parameters."""
    for stage in stages:
        towers = (
            ("audio_top", stage.audio_top_layers, model.config.audio_config.num_hidden_layers),
            ("llm_top", stage.llm_top_layers, model.config.text_config.num_hidden_layers),
        )
        for component, wanted, there in towers:
            if component in stage.learning_rates and wanted is not None and not 1 <= wanted <= there:
                raise InputError(
                    f"stage {stage.name}: {component}_layers is {wanted}, but the model has {there} such layers"
                )
        found = {component_of(name, stage, model.config) for name, _ in model.named_parameters()}
        if missing := set(stage.learning_rates) - found:
            raise InputError(f"stage {stage.name}: the model has no parameter of {sorted(missing)}")


def freeze_for(model: "Qwen3ASRForConditionalGeneration", stage: Stage) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains_in(name, stage, model.config))
        if not parameter.requires_grad:
            parameter.grad = None


def trainable_parameters(model: "Qwen3ASRForConditionalGeneration") -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def stage_line(model: "Qwen3ASRForConditionalGeneration", stage: Stage) -> str:
    """One line for the log: what trains in a stage, with parameters and peak rates."""
    sizes: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sizes[component_of(name, stage, model.config) or ""] += parameter.numel()
    parts = [f"{name} {sizes[name] / 1e6:.2f} M at {rate:g}" for name, rate in stage.learning_rates.items()]
    tied = " (lm_head is tied to the embedding, which trains with it)" if "lm_head" in stage.learning_rates else ""
    return f"stage {stage.name}, to epoch {stage.last_epoch}: {', '.join(parts)}{tied}"
