"""What a training step costs on a GPU, kernel by kernel, computed without one.

The model's own forward and backward pass runs on fake tensors (shapes and types, no numbers) at its real widths, and
every operator is noted with its floating-point operations and the bytes it must move. A kernel then takes as long as
the slower of the two takes at a share of the device's data sheet, and no less than a launch. Layers that cost the same
are run once or twice and counted as often as there are of them, so that a step of the 1.7B takes about a second of CPU.

What it does not know: caches (a kernel may read what the last one left there), the host (a GPU waits where Python is
slower than its kernels), and how well a kernel is written beyond `Efficiency`.
"""

import bisect
import contextlib
import copy
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hebrew_asr.model import attention, fused, loss
from hebrew_asr.model.costs import Work, work_of
from hebrew_asr.model.frames import FRAMES_PER_CHUNK, audio_token_count
from hebrew_asr.model.loss import SpeechModel
from hebrew_asr.model.muon import by_muon, operations
from hebrew_asr.model.packing import pack, places_of
from hebrew_asr.model.stages import LAYER

BF16, FP32 = 2, 4  # bytes
PROMPT_AROUND = 15  # tokens of the chat template
PARTS = ("convolution", "encoder", "projector", "llm", "head and embedding")


@dataclass(frozen=True)
class Device:
    """Of the makers' data sheets, dense."""

    gigabytes: int
    """10⁹ bytes of memory."""
    bf16: float
    """Operations a second of matrix products in bf16."""
    fp32: float
    """The same in fp32, without TF32."""
    bandwidth: float
    """Bytes a second between memory and processors."""
    exchange: float
    """Bytes a second of an all-reduce among 8 in one machine; assumed: NVLink where it has it, else PCIe."""


DEVICES = {
    "A100-40GB": Device(40, 312e12, 19.5e12, 1.555e12, 230e9),
    "A100-80GB": Device(80, 312e12, 19.5e12, 2.039e12, 230e9),
    "H100": Device(80, 989e12, 67e12, 3.35e12, 370e9),
    "H200": Device(141, 989e12, 67e12, 4.8e12, 370e9),
    "L40S": Device(48, 362e12, 91.6e12, 0.864e12, 20e9),
    "4090": Device(24, 165e12, 82.6e12, 1.008e12, 10e9),
}


@dataclass(frozen=True)
class Efficiency:
    """Shares of the data sheet that kernels reach; assumed, not measured."""

    matrix: float = 0.65
    memory: float = 0.85
    launch: float = 4e-6
    """Seconds that the smallest kernel takes."""
    overlapped: bool = False
    """Whether gradients are exchanged behind the backward pass, but for the tied embedding's, which comes last."""


OPTIMISTIC = Efficiency(0.75, 0.9, 3e-6, overlapped=True)
PESSIMISTIC = Efficiency(0.5, 0.75, 5e-6)


@dataclass
class Kernel:
    part: str
    """One of PARTS."""
    name: str
    is_backward: bool
    operations: float
    """Floating-point, of matrix products, convolutions and attention."""
    bytes: int
    """Read and written, each operand once."""
    in_bf16: bool
    is_copy_of_weight: bool = False
    """For autocast, which makes one for all micro-batches of a step."""
    times: int = 1

    def seconds(self, device: Device, efficiency: Efficiency) -> float:
        rate = device.bf16 if self.in_bf16 else device.fp32
        computing = self.operations / (rate * efficiency.matrix)
        moving = self.bytes / (device.bandwidth * efficiency.memory)
        return self.times * max(computing, moving, efficiency.launch)

    @property
    def kind(self) -> str:
        if "attn" in self.name:
            return "attention"
        if self.operations:
            return "matrix products"
        return "casts" if self.name == "_to_copy" else "element-wise"


@dataclass
class Trace:
    """The kernels of one micro-batch's forward and backward pass."""

    work: Work
    kernels: list[Kernel] = field(default_factory=list)
    sharded: bool = False
    """Whether weights were there in bf16, as sharding.py gathers them."""
    synchronisations: Counter[str] = field(default_factory=Counter)
    """Where the host waits for the device, by operator."""
    saved: int = 0
    """Bytes that the forward pass keeps for the backward one, without weights and their copies; 0 if checkpointed."""

    def sum(self, value: Callable[[Kernel], float], chosen: Callable[[Kernel], bool] = lambda _: True) -> float:
        return sum(value(kernel) for kernel in self.kernels if chosen(kernel))

    @property
    def launches(self) -> int:
        return sum(kernel.times for kernel in self.kernels)

    @property
    def operations(self) -> float:
        return self.sum(lambda kernel: kernel.times * kernel.operations)

    @property
    def bytes(self) -> float:
        return self.sum(lambda kernel: kernel.times * kernel.bytes)

    def seconds(self, device: Device, efficiency: Efficiency) -> float:
        return self.sum(lambda kernel: kernel.seconds(device, efficiency))


# ------------------------------------------------------------------------------------------------------------ Recording

FREE = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
    "device",
}
WRITTEN_ONLY = {
    "zeros",
    "zeros_like",
    "full",
    "full_like",
    "ones_like",
    "new_zeros",
    "new_full",
    "ones",
    "scalar_tensor",
}
WRITTEN_ONLY |= {"arange", "fill_", "zero_"}
GATHERING = {"embedding", "index", "index_select", "gather"}  # they read of the first operand what they write
WAITING = {"nonzero", "masked_select", "_local_scalar_dense", "equal", "is_nonzero"}


def size(tensors: list[torch.Tensor]) -> int:
    """Bytes; what is repeated by a stride of 0 lies in memory once."""
    total = 0
    for tensor in tensors:
        count = 1
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            count *= length if stride else 1
        total += count * tensor.element_size()
    return total


def moved(name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor], kwargs: dict[str, Any]) -> int:
    """Bytes that an operator reads and writes at the least."""
    written = size(outputs)
    if name == "addmm" and kwargs.get("out") is inputs[0]:
        return size(inputs[1:]) + (2 if kwargs.get("beta", 1) else 1) * written
    if name in WRITTEN_ONLY:
        return written
    if name in GATHERING:
        return 2 * written + size(inputs[1:])
    if name == "copy_":
        return written + size(inputs[1:])
    if name in ("index_put_", "index_add_", "scatter_add_", "index_copy_"):
        return 3 * size(inputs[-1:]) + size(inputs[1:-1])
    return size(inputs) + written


def multiplied(name: str, args: tuple, outputs: list[torch.Tensor], pairs: Callable[[bool], float]) -> float:
    """Floating-point operations of a matrix product, a convolution or attention, and 0 of anything else."""
    if name == "mm":
        return 2 * args[0].numel() * args[1].shape[1]
    if name == "addmm":
        return 2 * args[1].numel() * args[2].shape[1]
    if name == "bmm":
        return 2 * args[0].numel() * args[1].shape[2]
    if name == "convolution":
        return 2 * outputs[0].numel() * args[1][0].numel()
    if name == "convolution_backward":
        return 2 * args[0].numel() * args[2][0].numel() * sum(args[-1][:2])
    if name == "_varlen_attn":
        return 4 * args[0].shape[1] * args[0].shape[2] * pairs(args[7])
    if name == "_varlen_attn_backward":  # the product of queries and keys is computed again
        return 10 * args[1].shape[1] * args[1].shape[2] * pairs(args[10])
    return 0


class Recorder(TorchDispatchMode):
    """Notes every operator with the part of the model it belongs to, also in the backward pass.

    The nodes of the autograd graph are numbered as they are made, so that a node's number tells in which module its
    forward operator ran.
    """

    def __init__(self, model: SpeechModel, batch: dict[str, torch.Tensor]):
        """`batch` is real: how far its tokens attend is taken from it."""
        super().__init__()
        self.model = model
        utterances, windows = (batch[f"{name}_ends"].diff().square().sum().item() for name in ("utterance", "window"))
        self.pairs = {True: utterances / 2, False: windows}  # of tokens that attend, by whether attention is causal
        self.notes: list[tuple[str, Kernel]] = []
        """Names of modules, and what ran in them."""
        self.waits: list[tuple[str, str]] = []
        self.inside_one = False
        """Whether what runs is part of one kernel, which is noted as a whole."""
        self.inside = [""]
        self.begun: list[tuple[int, str]] = []
        """From which number of a node on which module runs."""
        self.handles: list[Any] = []
        self.contexts = contextlib.ExitStack()
        self.saved: dict[int, tuple[str, torch.UntypedStorage]] = {}
        """By storage, what the graph keeps, and in which module it was kept first."""
        storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
        self.standing = {storage._cdata: storage for storage in storages}
        """Storages that are no activations: of weights and, as they are made, of their copies."""

    def __enter__(self) -> "Recorder":
        for name, module in self.model.named_modules():
            if name and not isinstance(module, torch.nn.ModuleList):
                self.handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
                self.handles.append(module.register_forward_hook(lambda *_: self._leave()))
        self.contexts.enter_context(mock.patch.object(fused, "run", self.run))
        self.contexts.enter_context(torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor))
        return super().__enter__()

    def __exit__(self, *problem: Any) -> None:
        for handle in self.handles:
            handle.remove()
        self.contexts.close()
        super().__exit__(*problem)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.standing:
            self.saved.setdefault(storage._cdata, (self.inside[-1], storage))
        return tensor

    def run(self, *calls: fused.Call) -> list[torch.Tensor]:
        """Runs fused functions, each of which is one kernel; a sum over all tokens is two."""
        returned = []
        for call in calls:
            self.inside_one = True
            out = fused.as_they_stand(call)
            self.inside_one = False
            returned += out
            function, args = call
            node = torch._C._current_autograd_node()
            self.note(getattr(function, "__name__", ""), args, {}, out, node)
            if function in (fused.norm_weight_gradient, fused.turned_weight_gradient):
                self.notes.append((self._where(node), Kernel("", "sum over blocks", True, 0, 0, in_bf16=False)))
        return returned

    def _enter(self, name: str) -> None:
        self.inside.append(name)
        self.begun.append((torch._C._autograd._get_sequence_nr(), name))

    def _leave(self) -> None:
        self.inside.pop()
        self.begun.append((torch._C._autograd._get_sequence_nr(), self.inside[-1]))

    def _where(self, node: Any) -> str:
        if node is None:
            return self.inside[-1]
        place = bisect.bisect_right(self.begun, node._sequence_nr(), key=lambda entry: entry[0]) - 1
        return self.begun[place][1] if place >= 0 else ""

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = operator._schema.name.split("::")[1]
        node = torch._C._current_autograd_node()
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING or masks:
            self.waits.append((self._where(node), "index by a mask" if masks else name))
        out = operator(*args, **(kwargs or {}))
        if not (self.inside_one or operator.is_view or name in FREE):
            self.note(name, args, kwargs or {}, out, node)
        return out

    def note(self, name: str, args: Any, kwargs: Any, out: Any, node: Any) -> None:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        inputs = list({id(leaf): leaf for leaf in leaves}.values())
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if not outputs:
            return
        kernel = Kernel(
            part="",
            name=name,
            is_backward=node is not None,
            operations=multiplied(name, args, outputs, self.pairs.__getitem__),
            bytes=moved(name, inputs, outputs, kwargs),
            in_bf16=any(tensor.dtype == torch.bfloat16 for tensor in inputs),
            is_copy_of_weight=name == "_to_copy" and isinstance(inputs[0], torch.nn.Parameter) and inputs[0].dim() > 1,
        )
        if kernel.is_copy_of_weight:
            storage = outputs[0].untyped_storage()
            self.standing[storage._cdata] = storage
        self.notes.append((self._where(node), kernel))


def part_of(module: str) -> str:
    if module.startswith("model.audio_tower.layers.") or module.startswith("model.audio_tower.ln_post"):
        return "encoder"
    if module.startswith("model.audio_tower"):
        return "convolution"
    if module.startswith("model.multi_modal_projector"):
        return "projector"
    if module.startswith("model.language_model") and not module.endswith("embed_tokens"):
        return "llm"
    return "head and embedding"


# ----------------------------------------------------------------------------------------------------- A model of fakes


@dataclass
class Layers:
    """Which of a tower's layers are run, and how many each stands for."""

    numbers: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, count: int, kind: Callable[[int], Any]) -> "Layers":
        """Of neighbours of one kind the lowest, and one for all above it."""
        found = cls()
        for _, neighbours in itertools.groupby(range(count), key=kind):
            lowest, *others = neighbours
            found.numbers += [lowest, *others[-1:]]
            found.times += [1] + [len(others)] * bool(others)
        return found


@dataclass
class Shortened:
    """A model on fake tensors with the layers that are run; names are those of the whole model."""

    model: SpeechModel
    towers: dict[str, Layers]

    def whole_name(self, name: str) -> str:
        return LAYER.sub(lambda m: f"{m[1]}.layers.{self.towers[m[1]].numbers[int(m[2])]}.", name)

    def times(self, module: str) -> int:
        layer = LAYER.search(f"{module}.")
        return self.towers[layer[1]].times[int(layer[2])] if layer else 1

    @classmethod
    def of(
        cls,
        config: transformers.Qwen3ASRConfig,
        fake: FakeTensorMode,
        trains: Callable[[str], bool],
        is_fp32: Callable[[str], bool],
    ) -> "Shortened":
        """Weights are bf16, or fp32 by their names."""
        config = copy.deepcopy(config)
        text, audio = config.text_config, config.audio_config
        towers = {}
        for tower, count, weight in (
            ("audio_tower", audio.num_hidden_layers, "fc1.weight"),
            ("language_model", text.num_hidden_layers, "mlp.up_proj.weight"),
        ):
            names = [f"model.{tower}.layers.{number}.{weight}" for number in range(count)]
            kinds = [(trains(name), is_fp32(name)) for name in names]
            towers[tower] = Layers.of(count, kinds.__getitem__)
        audio.num_hidden_layers = len(towers["audio_tower"].numbers)
        text.num_hidden_layers = len(towers["language_model"].numbers)
        text.layer_types = text.layer_types[: text.num_hidden_layers]
        for part in (text, audio):
            part._attn_implementation_internal = "sdpa"  # a model is not made with what is none of transformers'
        with torch.device("meta"):
            model = SpeechModel(config)
        model.tie_weights()
        found = cls(model, towers)
        made: dict[int, torch.nn.Parameter] = {}
        with fake:
            for prefix, module in model.named_modules():
                for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                    whole = found.whole_name(f"{prefix}.{name}")
                    if id(parameter) not in made:
                        dtype = torch.float32 if is_fp32(whole) else torch.bfloat16
                        values = torch.empty(parameter.shape, dtype=dtype)
                        made[id(parameter)] = torch.nn.Parameter(values, requires_grad=trains(whole))
                    setattr(module, name, made[id(parameter)])
                for name, buffer in list(module.named_buffers(recurse=False)):
                    setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        return found


@contextlib.contextmanager
def as_on_cuda() -> Generator[None]:
    """Has tensors that say they are on a CPU take a GPU's way: there autocast runs layer_norm in fp32."""
    plain = torch.nn.functional.layer_norm

    def in_fp32(x: torch.Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> torch.Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return plain(x, shape, weight, bias, eps)
        return plain(x.float(), shape, weight.float(), bias.float(), eps)

    with (
        mock.patch.object(torch.nn.functional, "layer_norm", in_fp32),
        mock.patch.object(loss, "has_wide_products", lambda _: True),
        mock.patch.object(loss, "spares_passes", lambda _: True),
    ):
        yield


def trace(
    config: transformers.Qwen3ASRConfig,
    batch: dict[str, torch.Tensor],
    trains: Callable[[str], bool],
    ever_trains: Callable[[str], bool] | None = None,
    checkpointing: bool = False,
    sharded: bool = False,
) -> Trace:
    """The kernels of one micro-batch under bf16 autocast, as they run on a GPU with PyTorch's FlashAttention.

    Args:
        batch: as `packing.pack` makes it; its shapes and the bounds of its utterances count, not its numbers.
        trains: of a parameter's name, in this stage.
        ever_trains: in any stage; the weights of it are fp32, as `load_model` has them, or bf16 where `sharded`.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    shortened = Shortened.of(config, fake, trains, (lambda _: False) if sharded else (ever_trains or trains))
    config = shortened.model.config
    attention.register()
    for tower in (config.text_config, config.audio_config):
        tower._attn_implementation_internal = attention.VARLEN
    recorder = Recorder(shortened.model, batch)
    with fake:
        inputs = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in batch.items()}
    fused.fuse(shortened.model)
    if checkpointing:
        shortened.model.activation_checkpointing_enable({"use_reentrant": False})
        shortened.model.disable_input_require_grads()
    shortened.model.train()
    with fake, as_on_cuda(), recorder:
        with torch.autocast("cpu", torch.bfloat16):
            nats = shortened.model(**inputs, root_scale=1.0).loss
        saved = sum(shortened.times(module) * storage.nbytes() for module, storage in recorder.saved.values())
        nats.backward()
    found = Trace(work_of(batch, config), sharded=sharded, saved=0 if checkpointing else saved)
    for module, kernel in recorder.notes:
        found.kernels.append(dataclasses.replace(kernel, part=part_of(module), times=shortened.times(module)))
    for module, operator in recorder.waits:
        found.synchronisations[f"{operator} in {part_of(module)}"] += shortened.times(module)
    return found


def made_up_batch(seconds: np.ndarray, labels: np.ndarray, audio_token: int) -> dict[str, torch.Tensor]:
    """A packed micro-batch of utterances with so many seconds of silence and so many targets each."""
    frames = [round(FRAMES_PER_CHUNK * length) for length in seconds.tolist()]
    clips = [np.zeros((128, count), np.float32) for count in frames]
    prompts = [[audio_token] * audio_token_count(count) + [0] * PROMPT_AROUND for count in frames]
    batch, _ = pack(clips, prompts, [[0] * count for count in labels.tolist()], padding=0, in_one_row=True)
    return batch | places_of(batch, audio_token)


# --------------------------------------------------------------------------------------------------------- A whole step


@dataclass(frozen=True)
class Trained:
    """What trains in a stage, in numbers."""

    numbers: int
    last: int
    """Of them, those whose gradient is complete only at the end of the backward pass: the tied embedding's."""
    outside: int = 0
    """Of them, those outside of the layers: sharded, they are gathered and reduced at once."""
    gathered: int = 0
    """What some stage trains: sharded, all of it is gathered."""
    by_muon: int = 0
    """Of them, in matrices that Muon moves."""
    muon_operations: float = 0.0
    """Floating-point, of a step, to make those matrices orthogonal."""

    @classmethod
    def of(
        cls,
        config: transformers.Qwen3ASRConfig,
        shapes: dict[str, torch.Size],
        trains: Callable[[str], bool],
        ever_trains: Callable[[str], bool],
        is_muon: bool = False,
    ) -> "Trained":
        sizes = {name: shape.numel() for name, shape in shapes.items()}
        matrices = [n for n, shape in shapes.items() if is_muon and trains(n) and by_muon(n, len(shape))]

        def count(chosen: Callable[[str], bool]) -> int:
            return sum(number for name, number in sizes.items() if chosen(name))

        embedding = "model.language_model.embed_tokens.weight"
        last = sizes[embedding] if config.tie_word_embeddings and trains(embedding) else 0
        outside = count(lambda name: trains(name) and not LAYER.search(name))
        its = sum(sizes[name] for name in matrices), sum(operations(shapes[name]) for name in matrices)
        return cls(count(trains), last, outside, count(ever_trains), *its)


@dataclass
class Step:
    """Seconds of one optimizer step on one device, by part; their sum is the step where the host never delays it."""

    parts: dict[str, float]
    operations: float
    launches: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def mfu(self, device: Device) -> float:
        """Share of the data sheet's bf16 operations that the step reaches."""
        return self.operations / device.bf16 / self.seconds


def step(
    traces: list[Trace],
    trained: Trained,
    ranks: int,
    device: Device,
    efficiency: Efficiency,
    bf16_exchange: bool = False,
) -> Step:
    """A step of these micro-batches on one of so many ranks, sharded if they were traced so.

    Beside the passes over the model: a micro-batch's gradients are added to those before it (two are read, one is
    written). Fused AdamW reads weight, gradient and two moments and writes all four, the gradient because it clips it;
    its norm is read before. DistributedDataParallel copies gradients into its buckets, where they stay; to exchange
    them in bf16 it makes a copy, divides it and copies it back, which is four passes' worth. All else is fp32.
    """
    muon = muon_seconds(trained, ranks, device, efficiency, traces[0].sharded)
    first, *others = traces
    kernels = first.kernels + [k for t in others for k in t.kernels if not k.is_copy_of_weight]
    parts = {part: sum(k.seconds(device, efficiency) for k in kernels if k.part == part) for part in PARTS}
    if first.sharded:
        parts |= sharded_parts(traces, trained, ranks, device, efficiency, BF16 if bf16_exchange else FP32) | muon
        return Step(parts, sum(t.operations for t in traces), sum(k.times for k in kernels))
    one_pass = FP32 * trained.numbers / (device.bandwidth * efficiency.memory)
    parts |= {"adding up gradients": 3 * len(others) * one_pass, "AdamW": 8 * one_pass, "clip": one_pass} | muon
    parts |= {"copies to exchange": 0.0, "exchange": 0.0}
    if ranks > 1:
        share = 2 * (ranks - 1) / ranks * (BF16 if bf16_exchange else FP32) / device.exchange
        hidden = traces[-1].sum(lambda k: k.seconds(device, efficiency), lambda k: k.is_backward)
        early = share * (trained.numbers - trained.last)
        parts["copies to exchange"] = (6 if bf16_exchange else 2) * one_pass
        parts["exchange"] = share * trained.last + max(0.0, early - hidden * efficiency.overlapped)
    return Step(parts, sum(t.operations for t in traces), sum(k.times for k in kernels))


def muon_seconds(
    trained: Trained, ranks: int, device: Device, efficiency: Efficiency, sharded: bool
) -> dict[str, float]:
    """What Muon takes beyond AdamW's passes, which are counted for its matrices too: one moment less is not.

    The ranks share the products; each direction goes to all of them in bf16, and sharded it is gathered before.
    """
    if not trained.by_muon:
        return {}
    products = trained.muon_operations / ranks / (device.bf16 * efficiency.matrix)
    times = (2 if sharded else 1) if ranks > 1 else 0
    return {"Muon": products + times * BF16 * trained.by_muon / device.exchange}


def sharded_parts(
    traces: list[Trace], trained: Trained, ranks: int, device: Device, efficiency: Efficiency, summed: int
) -> dict[str, float]:
    """What a sharded step takes beside the passes over the model, by part.

    Each micro-batch gathers all weights, and those of the layers that train once more for its backward pass: a rank
    rounds its part to bf16, and copies what came from all of them to where it is read. Gradients are made in bf16,
    added up over micro-batches in numbers of `summed` bytes, copied to be exchanged in that, and exchanged once a step.
    Their norm, the clip (which the fused optimizer does not fold in here) and AdamW pass over a rank's part.
    Behind a pass goes what its layers exchange; the rest, gathered first and reduced last, does not.
    """
    memory = device.bandwidth * efficiency.memory
    way = (ranks - 1) / ranks / device.exchange
    layers = trained.numbers - trained.outside  # of what trains
    times = len(traces)
    gathered = times * (trained.gathered + layers)
    part = trained.numbers / ranks
    copied = gathered * (2 * BF16 + (BF16 + FP32) / ranks)
    copied += (summed if times > 1 else BF16) * trained.numbers + summed * trained.numbers + (summed + FP32) * part
    added = trained.numbers * (BF16 + summed + (times - 1) * (BF16 + 2 * summed)) if times > 1 else 0
    late = way * trained.outside * (BF16 * times + summed)
    forward = sum(t.sum(lambda k: k.seconds(device, efficiency), lambda k: not k.is_backward) for t in traces)
    backward = sum(t.sum(lambda k: k.seconds(device, efficiency), lambda k: k.is_backward) for t in traces)
    ahead = way * BF16 * times * (trained.gathered - trained.outside)
    behind = way * layers * (BF16 * times + summed)
    if efficiency.overlapped:
        ahead, behind = max(0.0, ahead - forward), max(0.0, behind - backward)
    return {
        "adding up gradients": added / memory,
        "AdamW": 7 * FP32 * part / memory,
        "clip": 3 * FP32 * part / memory,
        "copies to exchange": copied / memory,
        "exchange": late + ahead + behind,
    }
