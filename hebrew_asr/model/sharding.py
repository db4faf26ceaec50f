"""Training that is sharded over the processes with torch's FSDP2: each holds a part of what trains.

Of every weight that some stage trains, of its gradient and of its moments, a process holds one part in as many as there
are processes. What never trains stays whole on each. Imports nothing of this project.
"""

from collections.abc import Collection, Iterable

import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Qwen3ASRForConditionalGeneration


def shard(
    model: Qwen3ASRForConditionalGeneration,
    ever_trains: Collection[str],
    device: torch.device,
    use_bf16: bool,
    bf16_exchange: bool,
) -> None:
    """Moves a model to the device and shards it in place over all processes.

    A layer of a tower is gathered when it runs. The rest is gathered together and stays whole from the beginning of a
    forward pass to the end of its backward pass: the loss reads the head's matrix, which is the embedding's, outside
    of any module. A group has what trains in some stage, and all of that is fp32; what is frozen in between is gathered
    with it and has no gradient.

    Under bf16 a process rounds its part of the weights before they are gathered, so that half as much is exchanged and
    autocast finds nothing to cast; AdamW changes the fp32 parts. A micro-batch's gradient is then bf16 too, of norms
    and of the embedding as of all else. Added up over micro-batches and processes it is fp32, which is what is usual,
    unless `bf16_exchange`: rounding there would add to the error with the number of both.

    What it relies on in Trainer 5.23: a model marked as sharded when it was loaded is neither moved to a device nor
    wrapped in DistributedDataParallel.

    Args:
        ever_trains: names of the parameters that some stage trains.
        bf16_exchange: gradients are added up in bf16.
    """
    model.to(device)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if use_bf16 else None,
        reduce_dtype=torch.bfloat16 if bf16_exchange else torch.float32,
        cast_forward_inputs=False,  # what goes from layer to layer stays fp32, as without sharding
    )
    whole_ones = {parameter for name, parameter in model.named_parameters() if name not in ever_trains}
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in (*model.model.audio_tower.layers, *model.model.language_model.layers):
        if not whole_ones.issuperset(layer.parameters()):
            fully_shard(layer, mesh=mesh, ignored_params=whole_ones, mp_policy=policy)
    fully_shard(model, mesh=mesh, ignored_params=whole_ones, mp_policy=policy)
    model._is_distributed_loading_by_transformers = True


def is_sharded(model: torch.nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered, which every process must ask for, or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor, or the tensor itself; writing to it writes to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_for_others(tensors: Iterable[torch.Tensor]) -> None:
    """Takes part in another process's `whole` of each of these tensors, one after the other."""
    for tensor in tensors:
        whole(tensor)


def sharded_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor that every process has, on the device of `like`, and cut as that is."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def whole_model(model: Qwen3ASRForConditionalGeneration) -> Qwen3ASRForConditionalGeneration:
    """A model that a process can run by itself: the model, or if it is sharded a copy with gathered weights.

    In an evaluation each process transcribes other utterances in another number of steps, so that a layer could not be
    gathered when it runs. What never trains is shared with the model.
    """
    if not is_sharded(model):
        return model
    with torch.device("meta"):
        copy = Qwen3ASRForConditionalGeneration(model.config)
    weights = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}
    copy.load_state_dict(weights, strict=False, assign=True)
    copy.tie_weights()
    for name, buffer in model.named_buffers():
        owner, _, last = name.rpartition(".")
        setattr(copy.get_submodule(owner), last, buffer)
    copy.generation_config = model.generation_config
    return copy
