"""The tensors of a checkpoint by name."""

from collections.abc import Iterable

import torch

from hebrew_asr.checkpoints.store import Checkpoint
from hebrew_asr.model.sharding import sharded_like

WEIGHTS, ADAM = "model.safetensors", "optimizer.safetensors"  # the tensors of a checkpoint
DATA = "data.safetensors"  # the identity of what trains and evaluates, see data/identity.py
AVERAGE = "moving_average.safetensors"  # where a moving average is kept


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter once, where two are tied, and the buffers that belong to the weights."""
    kept = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def load_weights(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    load_tensors(model, checkpoint.tensors(WEIGHTS))


def load_tensors(model: torch.nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Puts tensors in the place of the model's own, by name; two that are tied have one name, and stay tied."""
    mine = weights_of(model)
    with torch.no_grad():
        for name, tensor in tensors:
            mine[name].copy_(sharded_like(tensor, mine[name]))
