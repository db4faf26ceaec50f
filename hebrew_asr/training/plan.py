"""What a run will need, before it is paid for: memory by part, whether it fits the device, hours and cost.

Computed from the model's configuration, without a GPU and without a download. What a forward pass saves for the
backward one, and the peak of a micro-batch, are checked against small models on a CPU and on fake tensors; hours come
from the roofline (model/roofline.py). Nothing here was checked on a GPU. Attention is PyTorch's FlashAttention, which
saves queries, keys, values, the output and one number for each head and position. CUDA's context, NCCL's buffers,
cuDNN's workspace and fragmentation are in no part; `USABLE` leaves room for them.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from hebrew_asr.data.mixture import Mixture
from hebrew_asr.data.rows import load_rows
from hebrew_asr.errors import InputError
from hebrew_asr.model.costs import Work, real_config, small_config
from hebrew_asr.model.frames import FRAMES_PER_CHUNK, SHORTEST_CLIP, TOKENS_PER_CHUNK
from hebrew_asr.model.layouts import in_transformers_layout
from hebrew_asr.model.loading import checkpoint_problems
from hebrew_asr.model.loss import LOGITS_AT_ONCE
from hebrew_asr.model.muon import by_muon
from hebrew_asr.model.packing import WINDOW_TOKENS, deal_step, rows_of
from hebrew_asr.model.roofline import (
    DEVICES,
    OPTIMISTIC,
    PESSIMISTIC,
    Step,
    Trained,
    made_up_batch,
    step,
    trace,
)
from hebrew_asr.model.stages import trains_in
from hebrew_asr.training.settings import Settings

USABLE = 0.95  # of a device's memory; assumed, not measured
ASSUMED = OPTIMISTIC, PESSIMISTIC
WORTH_IT = 0.9  # of the hours
ON_TOP = "evaluation, checkpoints and waiting for data or for Python"
REAL_MODELS = {"Qwen/Qwen3-ASR-1.7B-hf": real_config, "Qwen/Qwen3-ASR-0.6B-hf": small_config}
LAYER = re.compile(r"(audio_tower|language_model)\.layers\.\d+\.")
# Assumed of corpora that are not on this disk
ASSUMED_HOURS = 350.0  # crowd-transcribe about 300, recital about 50
SPREAD = 0.6  # of the logarithm of the durations
TEXT_TOKENS_PER_SECOND = 5.0
TOKENS_AROUND = 19  # the chat template, `language Hebrew<asr_text>` and the end
LABELS_AROUND = 4
STEPS_SIMULATED = 50
FP32, BF16 = 4, 2  # bytes


# ------------------------------------------------------------------------------------------------------------- Memory
@dataclass
class Activations:
    """Bytes that a forward pass saves for the backward one."""

    saved: int
    """All of them, or with checkpointing what is left of them."""
    recomputed: int
    """What one layer saves when checkpointing runs it again, and 0 without."""


def activations(
    config: transformers.Qwen3ASRConfig, work: Work, trains: Callable[[str], bool], element: int, checkpointing: bool
) -> Activations:
    """What `label_nats` saves of a packed micro-batch, without the weights and their bf16 copies.

    Args:
        trains: of a parameter's name.
        element: bytes of a number that autocast may narrow: 2 as on a GPU, where packed rows run fused (fused.py) and
            attention is told where utterances end; 4 as on a CPU, as transformers has the layers.
    """
    audio, text = config.audio_config, config.text_config
    hidden, inner = text.hidden_size, text.intermediate_size
    queries = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    narrowed = element < FP32
    below = False
    saved = recomputed = 0

    def layer(full: int, kept: int) -> None:
        nonlocal saved, recomputed
        saved += kept if checkpointing else full
        recomputed = max(recomputed, full if checkpointing else 0)

    for number in range(audio.encoder_layers):
        below |= trains(f"model.audio_tower.layers.{number}.fc1.weight")
        if below:
            # Inputs and outputs of two norms, with their means and deviations; attention; the feed-forward layer.
            each = FP32 * (4 + audio.encoder_attention_heads)
            each += element * ((8 if narrowed else 9) * audio.d_model + 2 * audio.encoder_ffn_dim)
            layer(work.audio_tokens * each, work.audio_tokens * element * audio.d_model)
    below |= trains("model.multi_modal_projector.linear_1.weight")
    if below:
        saved += work.audio_tokens * (FP32 * 2 + element * 4 * audio.d_model)
    below |= trains("model.language_model.embed_tokens.weight")
    for number in range(text.num_hidden_layers):
        learns = trains(f"model.language_model.layers.{number}.mlp.up_proj.weight")
        below |= learns
        if not below:
            continue
        if narrowed:
            # What goes into the norms; queries and keys before and after they are turned, values, what is attended.
            each = FP32 * (2 * hidden + text.num_attention_heads) + element * 3 * (queries + keys) + element * 2 * inner
            each += element * (2 * hidden + inner) if learns else 0
        else:
            # The inputs of four norms with their deviations; attention with repeated keys; the gated product.
            each = FP32 * (2 * hidden + queries + keys + 2 + 2 * text.num_attention_heads + text.num_key_value_heads)
            each += element * (4 * queries + 3 * inner)
            each += FP32 * (4 * hidden + queries + keys + inner) if learns else 0
            each += work.token_pairs * element / max(1, work.tokens)  # the mask
        layer(int(work.tokens * each), work.tokens * FP32 * hidden)
    if below:
        saved += work.tokens * FP32 * (hidden + 1)
        turns = work.tokens * FP32 * 2 * text.head_dim  # of rotary positions, shared by all layers
        saved, recomputed = (saved, recomputed + turns) if checkpointing else (saved + turns, 0)
    return Activations(saved, recomputed)


def head_name(config: transformers.Qwen3ASRConfig) -> str:
    return "model.language_model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"


def passing(
    config: transformers.Qwen3ASRConfig, work: Work, trains: Callable[[str], bool], element: int, checkpointing: bool
) -> tuple[int, int]:
    """Bytes that a micro-batch needs beside weights, copies, gradients and moments: saved, and on top at its peak.

    The peak is in the convolutions, in the loss, or in a layer's backward pass.
    """
    audio, text = config.audio_config, config.text_config
    kept = activations(config, work, trains, element, checkpointing)
    vocabulary, hidden = text.vocab_size, text.hidden_size
    head = vocabulary * hidden
    learns, narrowed = trains(head_name(config)), element < FP32

    convolution = 2 * work.chunks * audio.downsample_hidden_size * 50 * math.ceil(audio.num_mel_bins / 2) * element

    head_gradient = FP32 * (head if learns else 0) + FP32 * work.labels * hidden
    at_once = max(1, LOGITS_AT_ONCE // vocabulary)
    logits = min(at_once, work.labels) * vocabulary
    gradient_of_logits = FP32 + (element if narrowed else 0)  # bytes of one, with the fp32 number it is made from
    several = work.labels > at_once  # then the chunk before is still there
    loss = logits * (2 * FP32 + (gradient_of_logits if several else 0)) + head_gradient

    backward = head_gradient + kept.recomputed
    backward += work.tokens * (element * 3 * text.intermediate_size + FP32 * 2 * hidden)
    peak = max(convolution, kept.saved + loss, kept.saved + backward)
    return kept.saved, peak - kept.saved


@dataclass
class Weights:
    """Sizes of a model's parameters, in numbers."""

    shapes: dict[str, torch.Size]
    matrices: set[str]
    """Of them, those that products read, for which autocast has bf16 copies."""

    @classmethod
    def of(cls, config: transformers.Qwen3ASRConfig) -> "Weights":
        with torch.device("meta"):
            model = transformers.Qwen3ASRForConditionalGeneration(config)
        parameters = dict(model.named_parameters())
        matrices = {name for name, parameter in parameters.items() if parameter.dim() > 1}
        return cls({name: parameter.shape for name, parameter in parameters.items()}, matrices)

    @property
    def sizes(self) -> dict[str, int]:
        return {name: shape.numel() for name, shape in self.shapes.items()}

    def count(self, wanted: Callable[[str], bool]) -> int:
        return sum(size for name, size in self.sizes.items() if wanted(name))


def standing(
    weights: Weights,
    stages: list[Callable[[str], bool]],
    number: int,
    element: int,
    processes: int,
    is_averaged: bool = False,
    sharded: bool = False,
    in_parts: bool = True,
    is_muon: bool = False,
) -> dict[str, int]:
    """Bytes of each part that stays from one micro-batch to the next, in a stage given by its place.

    Args:
        stages: of each stage, whether a parameter trains; moments are those of all stages so far.
        is_averaged: a moving average of what trains is kept.
        sharded: over the processes, as `hebrew_asr/model/sharding.py` does.
        in_parts: a step has several micro-batches. Else DDP's buckets hold the only gradients there are.
    """
    share = processes if sharded else 1
    trains = stages[number]
    ever = weights.count(lambda name: any(stage(name) for stage in stages))
    moved = weights.count(lambda name: any(stage(name) for stage in stages[: number + 1]))
    once = weights.count(  # has one moment
        lambda name: is_muon and by_muon(name, len(weights.shapes[name])) and any(s(name) for s in stages[: number + 1])
    )
    now = weights.count(trains)
    copied = weights.count(lambda name: trains(name) and name in weights.matrices)
    return {
        "weights that train in some stage, fp32": FP32 * ever // share,
        "weights that never train": element * (weights.count(lambda name: True) - ever),
        "gradients": FP32 * now // share,
        "moments": FP32 * (2 * moved - once) // share,
        "moving average": FP32 * ever // share if is_averaged else 0,
        "DDP's buckets": FP32 * now if processes > 1 and in_parts and not sharded else 0,
        "bf16 copies for autocast": element * copied if element < FP32 and not sharded else 0,  # the graph keeps them
    }


@dataclass
class Gathered:
    """What is whole for a while where training is sharded in bf16, in numbers.

    In an evaluation all weights are, in fp32; there are no gradients then, and it is not counted.
    """

    rest: int
    """Of what trains in some stage, all outside of the layers: whole for a whole pass."""
    layer: int
    """The largest layer: whole as it runs, while the next one is gathered."""
    now: int
    """All that trains in this stage."""
    tokens: float
    """Of a process's share of a step, the most."""

    @classmethod
    def of(cls, weights: Weights, stages: list[Callable[[str], bool]], number: int, tokens: float) -> "Gathered":
        sizes: Counter[str] = Counter()
        for name, size in weights.sizes.items():
            if any(stage(name) for stage in stages):
                layer = LAYER.search(name)
                sizes[layer[0] if layer else "rest"] += size
        rest = sizes.pop("rest", 0)
        return cls(rest, max(sizes.values(), default=0), weights.count(stages[number]), tokens)

    def parts(self, budget: int, summed: int) -> dict[str, int]:
        """Bytes. Gradients are exchanged after a step's last micro-batch: where it has several, they add up whole.

        Args:
            summed: bytes of a number in which they are added up and exchanged; they are made in bf16.
        """
        passing = self.rest + 2 * self.layer
        in_parts = summed * (self.now + self.rest)
        return {
            "weights gathered": BF16 * passing,
            "gradients to be exchanged": in_parts if self.tokens > budget else (BF16 + summed) * passing,
        }


# ---------------------------------------------------------------------------------------------------------- Evaluation
FEWEST_AT_ONCE, MOST_AT_ONCE = 8, 64  # utterances of the greatest length; of shorter ones up to four times as many


def decoding_bytes(config: transformers.Qwen3ASRConfig, seconds: float, new_tokens: int, element: int) -> int:
    """Bytes that one utterance needs at the peak of an evaluation: in the convolutions, or while it is decoded.

    Keys and values are counted in fp32, which norms with fp32 weights leave keys in; a layer's are written anew at each
    token, so that one layer's are there twice.
    """
    audio, text = config.audio_config, config.text_config
    chunks, mel = math.ceil(seconds), math.ceil(audio.num_mel_bins / 2)
    features = 2 * FP32 * chunks * FRAMES_PER_CHUNK * audio.num_mel_bins  # in clips, and in seconds
    convolution = 2 * chunks * audio.downsample_hidden_size * 50 * mel * element
    tokens = TOKENS_AROUND + chunks * TOKENS_PER_CHUNK
    kept = 2 * text.num_key_value_heads * text.head_dim * FP32 * (tokens + new_tokens)
    hidden = tokens * (element * 3 * text.intermediate_size + 3 * FP32 * text.hidden_size)
    logits = text.vocab_size * (FP32 + element)
    return features + max(convolution, (text.num_hidden_layers + 1) * kept + max(hidden, logits))


def rows_at_once(free: float, each: int) -> int:
    """Utterances of the greatest length in a batch of the evaluation, for so many bytes."""
    return int(min(MOST_AT_ONCE, max(FEWEST_AT_ONCE, free // each)))


# --------------------------------------------------------------------------------------------------------------- Steps
def tokens_of(seconds: np.ndarray) -> np.ndarray:
    return TOKENS_AROUND + TOKENS_PER_CHUNK * np.maximum(seconds, SHORTEST_CLIP) + TEXT_TOKENS_PER_SECOND * seconds


def work_expected(seconds: np.ndarray) -> Work:
    """Of one micro-batch with utterances of these durations, packed into rows."""
    tokens = tokens_of(seconds)
    rows = rows_of(tokens)
    width = max(tokens[row].sum() for row in rows)
    audio = np.round(TOKENS_PER_CHUNK * np.maximum(seconds, SHORTEST_CLIP)).astype(int)
    whole, rest = np.divmod(audio, WINDOW_TOKENS)
    return Work(
        chunks=int(np.ceil(seconds).sum()),
        audio_tokens=int(audio.sum()),
        window_pairs=int((whole * WINDOW_TOKENS**2 + rest**2).sum()),
        tokens=int(len(rows) * width),
        token_pairs=int(len(rows) * width**2),
        labels=int((LABELS_AROUND + TEXT_TOKENS_PER_SECOND * seconds).sum()),
    )


def largest_micro_batch(seconds: np.ndarray, budget: int) -> Work:
    """Of utterances like these that fill the budget, the longest among them; that one alone where it is larger."""
    longest = seconds.max()
    many = np.random.default_rng(0).choice(seconds, max(1, int(budget / tokens_of(seconds).mean()) + 1))
    filling = tokens_of(longest) + np.cumsum(tokens_of(many)) <= budget
    return work_expected(np.concatenate([[longest], many[filling]]))


@dataclass
class Steps:
    """What a process has to do in a step, on average over steps that were dealt as in training."""

    balance: float
    """Tokens of all processes ÷ (processes × those of the slowest)."""
    typical: list[np.ndarray]
    """Seconds of the utterances of each micro-batch of the slowest process in a step of median length."""
    most: float
    """Tokens of a process in a step, padding left out."""


def simulated(seconds: np.ndarray, utterances: int, processes: int, budget: int) -> Steps:
    random = np.random.default_rng(0)
    useful, bound, largest = 0, 0, 0.0
    steps: list[tuple[int, list[np.ndarray]]] = []
    for _ in range(STEPS_SIMULATED):
        drawn = random.choice(seconds, utterances)
        tokens = tokens_of(drawn)
        dealt = deal_step(tokens, processes, budget)
        shares = [sum((work_expected(drawn[places]) for places in mine if len(places)), Work()) for mine in dealt]
        last = max(range(processes), key=lambda process: shares[process].tokens)
        most = shares[last]
        steps.append((most.tokens, [drawn[places] for places in dealt[last] if len(places)]))
        useful, bound = useful + tokens.sum(), bound + processes * most.tokens
        largest = max(largest, *(sum(tokens[places].sum() for places in mine) for mine in dealt))
    typical = sorted(steps, key=lambda found: found[0])[len(steps) // 2][1]
    return Steps(float(useful / bound), typical, float(largest))


def assumed_durations(mean: float, longest: float) -> np.ndarray:
    drawn = np.random.default_rng(0).normal(math.log(mean) - SPREAD**2 / 2, SPREAD, 20_000)
    return np.minimum(longest, np.exp(drawn))


# ---------------------------------------------------------------------------------------------------------------- Plan
@dataclass
class StagePlan:
    """One stage of the run, on one device of it."""

    name: str
    trained_parameters: int
    memory: dict[str, int]
    """Bytes by part; their sum is the peak."""
    usable_bytes: int
    advice: list[str]
    """What to change where it does not fit."""
    steps: int
    step_seconds: list[float]
    """At each of `ASSUMED`."""
    mfu: list[float]

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.usable_bytes

    @property
    def hours(self) -> list[float]:
        return [self.steps * seconds / 3600 for seconds in self.step_seconds]


@dataclass
class Plan:
    stages: list[StagePlan]
    facts: list[str]
    """What it rests on."""
    hours: list[float]
    """Of the steps at each of `ASSUMED`; what `ON_TOP` names is not in them."""
    cost: list[float] | None
    advised: str = ""
    """What would take less time, if anything."""


def durations(config: Settings) -> tuple[np.ndarray, float, str]:
    """Seconds of an epoch's utterances (or of a sample), hours of an epoch, and where both come from."""
    local = all(Path(source.path).exists() for source in config.train_sources)
    if config.plan_hours_of_audio is None and local and not config.streaming:
        rows = load_rows(config.train_sources, config, for_training=True)
        seconds = rows.seconds[Mixture(rows, config.train_sources, config.seed).order(1)]
        return seconds, seconds.sum() / 3600, "read from the corpora, before utterances are held out"
    mean = config.plan_mean_seconds
    seconds = assumed_durations(mean, config.max_audio_length_seconds)
    if config.plan_hours_of_audio is not None:
        return seconds, config.plan_hours_of_audio, f"as given; durations assumed log-normal, {mean:g} s on average"
    return seconds, ASSUMED_HOURS, f"assumed: the corpora are not here; durations log-normal, {mean:g} s on average"


def model_config(name: str) -> transformers.Qwen3ASRConfig:
    if Path(name).is_dir():
        with checkpoint_problems(name):
            return transformers.AutoConfig.from_pretrained(in_transformers_layout(name), trust_remote_code=False)
    real = REAL_MODELS.get(name.removesuffix("-hf") + "-hf")  # the older layout has the same sizes
    if real is None:
        known = " and ".join(REAL_MODELS)
        raise InputError(f"--plan knows {known} without downloading them; of {name} give a local folder")
    return real()


def make_plan(config: Settings) -> Plan:
    """The plan of a run."""
    device, processes, budget = config.plan_device, config.plan_devices, config.tokens_per_micro_batch
    if budget is None or config.bf16 is False:
        raise InputError("--plan is for tokens_per_micro_batch and bf16: leave out what switches them off")
    model = model_config(config.model_name_or_path)
    weights = Weights.of(model)
    seconds, hours_of_audio, origin = durations(config)
    utterances = hours_of_audio * 3600 / seconds.mean()
    steps_per_epoch = config.steps_per_epoch or math.ceil(utterances / config.target_effective_batch)
    total_steps = config.max_steps or config.num_epochs * steps_per_epoch
    steps = simulated(seconds, config.target_effective_batch, processes, budget)
    trained: list[Callable[[str], bool]] = [
        functools.partial(lambda stage, name: trains_in(name, stage, model), stage) for stage in config.stages
    ]

    def ever_trains(name: str) -> bool:
        return any(stage(name) for stage in trained)

    could_shard = processes > 1 and not config.fsdp
    plans, done, sharded_hours, advised = [], 0, np.zeros(len(ASSUMED)), ""
    for number, stage in enumerate(config.stages):
        trains = trained[number]
        last = number == len(config.stages) - 1
        end = total_steps if last else min(total_steps, stage.last_epoch * steps_per_epoch)
        whole, sharded = (
            Needed(
                model,
                trains,
                standing(
                    weights,
                    trained,
                    number,
                    BF16,
                    processes,
                    config.ema_decay is not None,
                    is_sharded,
                    steps.most > budget,
                    config.optimizer == "muon",
                ),
                seconds,
                Gathered.of(weights, trained, number, steps.most) if is_sharded else None,
                math.ceil(steps.most),
                BF16 if config.bf16_exchange else FP32,
            )
            for is_sharded in (False, processes > 1)
        )
        needed = sharded if config.fsdp else whole
        costs_if = functools.partial(
            step_costs,
            model,
            steps.typical,
            trains,
            ever_trains,
            Trained.of(model, weights.shapes, trains, ever_trains, config.optimizer == "muon"),
            processes,
            device,
            config.gradient_checkpointing,
            config.bf16_exchange,
        )
        costs = costs_if(config.fsdp and processes > 1)
        plan = StagePlan(
            name=stage.name,
            trained_parameters=weights.count(trains),
            memory=needed.parts(budget, config.gradient_checkpointing),
            usable_bytes=usable(device),
            advice=[],
            steps=max(0, end - done),
            step_seconds=[cost.seconds for cost in costs],
            mfu=[cost.mfu(DEVICES[device]) for cost in costs],
        )
        if not plan.fits:
            plan.advice = advice(needed, sharded, device, budget, config.gradient_checkpointing)
        plans.append(plan)
        done = max(done, end)
        if could_shard:
            sharded_hours += plan.steps * np.array([cost.seconds for cost in costs_if(True)]) / 3600
    hours = [sum(plan.hours[i] for plan in plans) for i in range(len(ASSUMED))]
    if could_shard and all(sharded_hours < WORTH_IT * np.array(hours)):
        low, high = min(sharded_hours), max(sharded_hours)
        advised = f"--fsdp true would take {low:.2f}–{high:.2f} h, and less memory, if Python keeps up"
    price = config.plan_price_per_hour
    switch = "on" if config.gradient_checkpointing else "off"
    facts = [
        f"{config.model_name_or_path}, {weights.count(lambda name: True) / 1e6:,.0f} M parameters | {processes} ×"
        f" {device} | at most {budget} tokens at once, checkpointing {switch}"
        f"{', what trains is sharded' if config.fsdp and processes > 1 else ''}",
        f"{hours_of_audio:,.2f} h of audio an epoch ({origin}) | {steps_per_epoch:,} steps of"
        f" {config.target_effective_batch} utterances an epoch | balance over processes and rows {steps.balance:.2f}",
    ]
    cost = None if price is None else [hour * processes * price for hour in hours]
    return Plan(plans, facts, hours, cost, advised)


def step_costs(
    model: transformers.Qwen3ASRConfig,
    micro_batches: list[np.ndarray],
    trains: Callable[[str], bool],
    ever_trains: Callable[[str], bool],
    trained: Trained,
    processes: int,
    device: str,
    checkpointing: bool,
    bf16_exchange: bool,
    sharded: bool,
) -> list[Step]:
    """A step of micro-batches like the first of these (seconds of utterances), at each of `ASSUMED`."""
    seconds = micro_batches[0]
    labels = (LABELS_AROUND + TEXT_TOKENS_PER_SECOND * seconds).round().astype(int)
    batch = made_up_batch(np.maximum(seconds, SHORTEST_CLIP), labels, model.audio_token_id)
    traced = trace(model, batch, trains, ever_trains, checkpointing, sharded)
    share = [traced] * len(micro_batches)
    return [step(share, trained, processes, DEVICES[device], efficiency, bf16_exchange) for efficiency in ASSUMED]


def usable(device: str) -> int:
    return int(USABLE * DEVICES[device].gigabytes * 1e9)


@dataclass
class Needed:
    """What one stage needs, whatever the micro-batch and the device."""

    model: transformers.Qwen3ASRConfig
    trains: Callable[[str], bool]
    standing: dict[str, int]
    seconds: np.ndarray
    gathered: Gathered | None
    """Where training is sharded."""
    most: int
    """Tokens of a process in a step: no micro-batch has more, whatever the budget."""
    summed: int
    """Bytes of a number in which gradients are exchanged."""

    def parts(self, budget: int, checkpointing: bool) -> dict[str, int]:
        """Bytes by part; their sum is the peak."""
        saved, on_top = self.passing(budget, checkpointing)
        found = self.standing | {"activations": saved, "loss, gradients in passing": on_top}
        if self.gathered:
            found |= self.gathered.parts(budget, self.summed)
        return found

    def passing(self, budget: int, checkpointing: bool) -> tuple[int, int]:
        return passing(
            self.model, largest_micro_batch(self.seconds, min(budget, self.most)), self.trains, BF16, checkpointing
        )

    def bytes(self, budget: int, checkpointing: bool) -> int:
        return sum(self.parts(budget, checkpointing).values())

    def largest_budget(self, device: str, most: int, checkpointing: bool) -> int | None:
        """Tokens of the largest micro-batch that fits, in steps of 64; None where the longest utterance does not."""
        least = math.ceil(tokens_of(self.seconds).max() / 64) * 64
        fitting = (b for b in range(most // 64 * 64, least - 1, -64) if self.bytes(b, checkpointing) <= usable(device))
        return next(fitting, None)


def advice(needed: Needed, sharded: Needed, device: str, budget: int, checkpointing: bool) -> list[str]:
    """What would make a stage fit that does not, each alone."""
    found = []
    if smaller := needed.largest_budget(device, budget, checkpointing):
        found.append(f"--tokens_per_micro_batch {smaller}")
    if not checkpointing and (smaller := needed.largest_budget(device, budget, True)):
        found.append(
            "--gradient_checkpointing true" + (f" --tokens_per_micro_batch {smaller}" if smaller < budget else "")
        )
    if sharded.bytes(budget, checkpointing) <= usable(device):
        found.append("--fsdp true")
    larger = [name for name in DEVICES if needed.bytes(budget, checkpointing) <= usable(name)]
    if larger:
        found.append(f"as it is on {', '.join(larger)}")
    return found or ["nothing named here fits it: train less"]


def lines_of(plan: Plan) -> list[str]:
    """The plan as an aligned table, in lines."""
    stages = plan.stages
    rows = [("stage", [stage.name for stage in stages])]
    rows.append(("parameters that train, M", [f"{stage.trained_parameters / 1e6:,.0f}" for stage in stages]))
    rows += [(f"{part}, GB", [f"{stage.memory[part] / 1e9:.1f}" for stage in stages]) for part in stages[0].memory]
    rows.append(("peak, GB", [f"{stage.peak_bytes / 1e9:.1f}" for stage in stages]))
    rows.append(
        (f"fits {stages[0].usable_bytes / 1e9:.1f} GB", ["yes" if stage.fits else "NO" for stage in stages]),
    )
    rows.append(("steps", [f"{stage.steps:,}" for stage in stages]))
    for i, name in enumerate(("fast", "slow")):
        rows.append((f"seconds a step, {name}", [f"{stage.step_seconds[i]:.3f}" for stage in stages]))
        rows.append((f"MFU, {name}", [f"{stage.mfu[i]:.0%}" for stage in stages]))
        rows.append((f"hours, {name}", [f"{stage.hours[i]:.2f}" for stage in stages]))
    width = max(len(label) for label, _ in rows)
    table = [f"{label:<{width}}" + "".join(f"{value:>9}" for value in values) for label, values in rows]
    changes = [
        f"stage {stage.name} does not fit; any of these would: {'; '.join(stage.advice)}"
        for stage in stages
        if stage.advice
    ]
    low, high = min(plan.hours), max(plan.hours)
    end = f"in all {low:.2f}–{high:.2f} h of steps; {ON_TOP} come on top"
    if plan.cost:
        end += f" | cost {min(plan.cost):,.2f}–{max(plan.cost):,.2f}"
    ranges = ", ".join(
        f"{name} has {efficiency.matrix:.0%} of the data sheet's operations, {efficiency.memory:.0%} of its bandwidth,"
        f" {efficiency.launch * 1e6:.0f} µs for the smallest kernel, the exchange"
        f" {'behind the backward pass' if efficiency.overlapped else 'after it'}"
        for name, efficiency in zip(("fast", "slow"), ASSUMED, strict=True)
    )
    note = (
        f"computed, not measured: every kernel of a step on fake tensors; {ranges}. Memory was checked on small models"
        " on a CPU; no GPU was tried"
    )
    return [*plan.facts, *table, *changes, end, *([plan.advised] if plan.advised else []), note]
