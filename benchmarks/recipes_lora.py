"""Training adapters in place of a model's own weights, as peft has them, by the trainer that is there."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import train_hebrew_asr_enhanced as training
from hebrew_asr.errors import InputError
from hebrew_asr.model import stages
from hebrew_asr.model.stages import Stage


@contextlib.contextmanager
def adapters(rank: int, last: Path) -> Iterator[None]:
    """Within it `training.main` trains adapters alone, merges them and writes the model into `last`, no final model.

    They are in every linear layer of the components that train, scaled by 2 (lora_alpha = 2 × rank).
    """
    try:
        import peft
    except ImportError as error:
        raise InputError(f"{error}: start it by `uv run --with peft python benchmarks/recipes.py`") from error
    load, train, component_of = training.load_to_train, training.train, stages.component_of

    def load_with_adapters(config: Any, use_bf16: bool) -> Any:
        model = load(config, use_bf16)
        stage: Stage = config.stages[-1]
        linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        names = [name for name in linear if component_of(f"{name}.weight", stage, model.config) in stage.learning_rates]
        settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
        peft.inject_adapter_in_model(settings, model)
        for module in (training, stages):
            stack.enter_context(mock.patch.object(module, "component_of", adapters_alone))
        return model

    def adapters_alone(name: str, stage: Stage, model_config: Any) -> str | None:
        return component_of(name, stage, model_config) if ".lora_" in name else None

    def train_and_merge(trainer: Any) -> None:
        train(trainer)
        layers = [(n, m) for n, m in trainer.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        for name, layer in layers:
            layer.merge()
            trainer.model.set_submodule(name, layer.get_base_layer())
        trainer.model.save_pretrained(last)
        trainer.processor.save_pretrained(last)

    def nothing(*_: Any) -> None:
        pass

    replaced: list[tuple[Any, str, Callable]] = [
        (training, "load_to_train", load_with_adapters),
        (training, "train", train_and_merge),
        *((training, name, nothing) for name in ("write_final_model", "finish")),
    ]
    with contextlib.ExitStack() as stack:
        for module, name, function in replaced:
            stack.enter_context(mock.patch.object(module, name, function))
        yield
