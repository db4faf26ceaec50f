"""The plan's memory is what small models of the real classes need, to 15 %; its hours follow from operations.

All of it on a CPU in fp32, the saved activations under the CPU's bf16 autocast too: no GPU has confirmed it.
"""

import dataclasses
import weakref

import numpy as np
import pytest
import torch
import transformers
from conftest import DEMO
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hebrew_asr.command_line import parse_config
from hebrew_asr.data.rows import load_rows
from hebrew_asr.errors import InputError
from hebrew_asr.model.costs import PEAK_FLOPS, flops, real_config, work_of
from hebrew_asr.model.frames import audio_token_count
from hebrew_asr.model.generation import generate, new_token_limit
from hebrew_asr.model.loss import SpeechModel, label_nats
from hebrew_asr.model.packing import pack, places_of
from hebrew_asr.model.roofline import DEVICES, trace
from hebrew_asr.model.stages import Stage, freeze_for, trains_in
from hebrew_asr.training import plan as training_plan
from hebrew_asr.training.plan import Weights, activations, decoding_bytes, make_plan, passing, rows_at_once, standing
from train_hebrew_asr_enhanced import main
from train_round2_gradual import round2

STAGES = [
    Stage("B", 1, {"projector": 1e-4, "llm_top": 1e-4, "lm_head": 1e-4}, 2, 2),
    Stage("A", 2, {"projector": 1e-4, "audio_top": 1e-4, "llm_top": 1e-4, "lm_head": 1e-4}, 2, 2),
    Stage("top alone", 3, {"llm_top": 1e-4}, 2, 2),
]
SIZES = {
    "narrow": ({"num_hidden_layers": 4}, {"encoder_layers": 4}),
    "wide": (
        {
            "num_hidden_layers": 5,
            "hidden_size": 256,
            "intermediate_size": 640,
            "num_attention_heads": 8,
            "head_dim": 32,
        },
        {"encoder_layers": 3, "d_model": 192, "encoder_ffn_dim": 640, "output_dim": 256, "downsample_hidden_size": 16},
    ),
}


def small_model(size: str, vocabulary: int = 168) -> SpeechModel:
    config = transformers.AutoConfig.from_pretrained(DEMO / "base")
    text, audio = SIZES[size]
    for part, changes in ((config.text_config, text | {"vocab_size": vocabulary}), (config.audio_config, audio)):
        for name, value in changes.items():
            setattr(part, name, value)
    config.text_config.layer_types = ["full_attention"] * config.text_config.num_hidden_layers
    torch.manual_seed(0)
    return SpeechModel(config).train()


def packed(config, seconds=(2.3, 4.1, 9.5, 3.0, 6.2)) -> dict[str, torch.Tensor]:
    clips = [np.ones((128, int(100 * length)), np.float32) for length in seconds]
    prompts = [[7] * 9 + [config.audio_token_id] * audio_token_count(clip.shape[1]) + [8] * 6 for clip in clips]
    batch, _ = pack(clips, prompts, [[9] * int(5 * length) for length in seconds], 2)
    return batch | places_of(batch, config.audio_token_id)


def checkpoint(model):
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()


def bytes_saved(model, batch) -> int:
    """Of the tensors that autograd still holds after the forward pass, each storage once, without the weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen = []

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            seen.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = label_nats(model, **batch)
    storages = (tensor.untyped_storage() for ref in seen if (tensor := ref()) is not None)
    found = {storage.data_ptr(): storage.nbytes() for storage in storages}
    del loss
    return sum(found.values())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_what_a_forward_pass_saves_is_what_the_plan_says(size, checkpointing, stage):
    model = small_model(size)
    if checkpointing:
        checkpoint(model)
    freeze_for(model, stage)
    batch = packed(model.config)

    def trains(name):
        return trains_in(name, stage, model.config)

    planned = activations(model.config, work_of(batch, model.config), trains, 4, checkpointing)
    assert planned.saved == pytest.approx(bytes_saved(model, batch), rel=0.15 if checkpointing else 0.03)
    if not checkpointing:  # under bf16 autocast, with a GPU's kernels: on fake tensors
        traced = trace(
            model.config, batch, trains, lambda name: any(trains_in(name, one, model.config) for one in STAGES)
        )
        planned = activations(model.config, traced.work, trains, 2, checkpointing=False)
        assert planned.saved == pytest.approx(traced.saved, rel=0.05)


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once, from those there at the start on; every operation's output is seen."""

    def __init__(self, there: list[torch.Tensor]):
        super().__init__()
        self.now = self.most = 0
        self.alive = set()
        for tensor in there:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)

    def remove(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


@pytest.mark.parametrize("channels", [8, 64])
def test_an_evaluation_needs_no_more_than_the_plan_says_for_each_utterance(channels):
    """With narrow convolutions decoding has the peak, with wide ones they have it."""
    config = small_model("wide").config
    config.audio_config.downsample_hidden_size = channels
    model = SpeechModel(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    limit, tokens = 40, audio_token_count(400)

    def peak(rows: int) -> int:
        prompts = torch.tensor([[7] * 9 + [config.audio_token_id] * tokens + [8] * 6] * rows)
        batch = {"prompt_input_ids": prompts, "prompt_attention_mask": torch.ones_like(prompts)}
        batch |= {"input_features": torch.ones(rows, 128, 400)}
        batch |= {"input_features_mask": torch.ones(rows, 400, dtype=torch.long)}
        with Peak(list(model.parameters())) as memory:
            generate(model, batch, [limit] * rows)
        return memory.most

    each = (peak(6) - peak(2)) / 4
    planned = decoding_bytes(config, 4.0, limit, 4)
    assert 0.5 * planned < each <= 1.05 * planned, (each, planned)


def test_an_evaluation_takes_as_many_at_once_as_memory_has_place_for():
    each = decoding_bytes(real_config(), 30.0, new_token_limit(30.0), 2)
    assert [rows_at_once(gigabytes * 1e9, each) for gigabytes in (0, 8, 55)] == [8, int(8e9 // each), 64]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("size", "vocabulary"), [("narrow", 168), ("wide", 20_000)])
def test_the_peak_of_a_micro_batch_is_what_the_plan_says(size, vocabulary, checkpointing, monkeypatch):
    """In each stage after the first step, with gradients and moments there; what stands is exact."""
    model = small_model(size, vocabulary)
    monkeypatch.setattr("hebrew_asr.model.loss.LOGITS_AT_ONCE", 40 * vocabulary)
    monkeypatch.setattr("hebrew_asr.model.loss.spares_passes", lambda _: True)
    monkeypatch.setattr(training_plan, "LOGITS_AT_ONCE", 40 * vocabulary)
    if checkpointing:
        checkpoint(model)
    batch = packed(model.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    weights = Weights.of(model.config)
    stages = [lambda name, stage=stage: trains_in(name, stage, model.config) for stage in STAGES]
    for number, stage in enumerate(STAGES):
        freeze_for(model, stage)
        label_nats(model, **batch)[0].backward()
        optimizer.step()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
        there = [*model.parameters(), *gradients, *moments]
        stands = sum(tensor.nbytes for tensor in there)
        assert sum(standing(weights, stages, number, 4, processes=1).values()) == stands
        with Peak(there) as peak:
            label_nats(model, **batch)[0].backward()
        on_top = passing(model.config, work_of(batch, model.config), stages[number], 4, checkpointing)
        assert sum(on_top) == pytest.approx(peak.most - stands, rel=0.15)


@pytest.fixture(scope="module")
def real():
    """Round 2 on eight A100s of 40 GB, and its plan."""
    config = parse_config(["--plan", "--plan_price_per_hour", "2"], round2())
    return config, make_plan(config)


def test_the_stages_train_what_the_recipe_names(real):
    """12 of 28 layers of the language model, the tied embedding and the projector; then 8 of 24 of the encoder."""
    layer = 2048 * 128 * (16 + 8 + 8 + 16) + 3 * 2048 * 6144 + 2 * 2048 + 2 * 128
    projector = 2 * 1024 + 1024 * 1024 + 1024 + 1024 * 2048 + 2048
    encoder_layer = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    expected = 12 * layer + 151_936 * 2048 + projector
    assert [stage.trained_parameters for stage in real[1].stages] == [expected, expected + 8 * encoder_layer]


def test_hours_are_those_of_the_roofline(real):
    """A step takes at least what its operations do at the data sheet's rate; the slow end is not twice the fast one."""
    config, plan = real
    model, seconds = training_plan.real_config(), np.full(64, 6.0)
    work = training_plan.work_expected(seconds)
    for stage, planned in zip(config.stages, plan.stages, strict=True):
        operations = sum(flops(model, work, lambda name, stage=stage: trains_in(name, stage, model)).values())
        fast, slow = planned.step_seconds
        assert operations / 8 / PEAK_FLOPS["A100"] < fast < slow < 2 * fast
        assert planned.mfu[1] == pytest.approx(operations / 8 / PEAK_FLOPS["A100"] / slow, rel=0.12)
    assert sum(stage.steps for stage in plan.stages) == pytest.approx(5 * 350 * 3600 / 6 / 64, rel=0.01)
    assert plan.hours[0] == pytest.approx(sum(stage.steps * stage.step_seconds[0] / 3600 for stage in plan.stages))
    assert plan.cost == pytest.approx([hours * 8 * 2 for hours in plan.hours])


def test_memory_counts_the_tokens_a_rank_has(real):
    """On eight devices no rank fills a budget of 3,072 tokens with its share of 64 utterances of 6 s."""
    one, eight = (
        make_plan(dataclasses.replace(real[0], plan_device="H200", plan_devices=devices)).stages[0]
        for devices in (1, 8)
    )
    assert eight.memory["activations"] < 0.5 * one.memory["activations"]
    smaller = make_plan(dataclasses.replace(real[0], tokens_per_micro_batch=1536)).stages[0]
    assert smaller.memory == real[1].stages[0].memory, "all that a rank has fits both budgets"


def test_checkpointing_makes_the_step_longer_and_needs_less(real):
    plans = real[1], make_plan(dataclasses.replace(real[0], gradient_checkpointing=True))
    without, with_it = (plan.stages[1] for plan in plans)
    assert 1.05 * without.step_seconds[0] < with_it.step_seconds[0] < 1.4 * without.step_seconds[0]
    assert with_it.memory["activations"] < 0.3 * without.memory["activations"]


def test_the_advised_budget_fits_and_the_next_larger_does_not(real):
    config = dataclasses.replace(real[0], tokens_per_micro_batch=8192, plan_devices=1)
    stage = make_plan(config).stages[1]
    assert not stage.fits and stage.advice[0].startswith("--tokens_per_micro_batch ")
    budget = int(stage.advice[0].split()[1])
    changed = [dataclasses.replace(config, tokens_per_micro_batch=tokens) for tokens in (budget, budget + 64)]
    assert [make_plan(other).stages[1].fits for other in changed] == [True, False]


def test_sharding_divides_what_trains_over_the_devices(real):
    """Whole for a while are the embedding, the projector, two layers, and where a step is in parts the gradients."""
    config, plan = real
    whole = plan.stages[0]
    sharded = make_plan(dataclasses.replace(config, fsdp=True, plan_devices=64)).stages[0]
    for part in ("weights that train in some stage, fp32", "gradients", "moments"):
        assert sharded.memory[part] == pytest.approx(whole.memory[part] / 64, rel=1e-6)
    assert sharded.memory["DDP's buckets"] == 0
    assert sharded.memory["bf16 copies for autocast"] == 0 < whole.memory["bf16 copies for autocast"]
    assert sharded.memory["weights that never train"] == whole.memory["weights that never train"]
    layer = 2048 * 128 * (16 + 8 + 8 + 16) + 3 * 2048 * 6144 + 2 * 2048 + 2 * 128
    rest = 151_936 * 2048 + 1024 * 1024 + 1024 + 1024 * 2048 + 2048 + 2 * 1024
    assert sharded.memory["weights gathered"] == 2 * (rest + 2 * layer)
    assert sharded.memory["gradients to be exchanged"] == (2 + 4) * (rest + 2 * layer)
    several = make_plan(dataclasses.replace(config, fsdp=True, plan_devices=2)).stages[0]
    assert several.memory["gradients to be exchanged"] == 4 * (rest + several.trained_parameters)
    rounded = make_plan(dataclasses.replace(config, fsdp=True, bf16_exchange=True, plan_devices=2)).stages[0]
    assert rounded.memory["gradients to be exchanged"] == 2 * (rest + several.trained_parameters)


def test_the_hours_of_a_sharded_run_are_its_own(real):
    config = dataclasses.replace(real[0], plan_devices=8)
    whole, sharded, rounded = (
        sum(make_plan(dataclasses.replace(config, **changes)).hours)
        for changes in ({}, {"fsdp": True}, {"fsdp": True, "bf16_exchange": True})
    )
    assert 0.6 * whole < rounded < sharded < 0.9 * whole
    said = {devices: make_plan(dataclasses.replace(config, plan_devices=devices)).advised for devices in (1, 2, 8)}
    assert not said[1] and not said[2] and said[8].startswith("--fsdp true would take 0.3")
    assert not make_plan(dataclasses.replace(config, fsdp=True)).advised


def test_muon_keeps_one_moment_of_a_matrix_and_shares_its_products(real):
    """Stage B of the spec: 12 layers of the language model, and the projector's two matrices."""
    config, plan = real
    config = dataclasses.replace(config, optimizer="muon")
    muon, adam = make_plan(config).stages[0], plan.stages[0]
    shapes = 12 * [(2048, 2048), (1024, 2048), (1024, 2048), (2048, 2048), *3 * [(2048, 6144)]]
    shapes += [(1024, 1024), (1024, 2048)]
    numbers = sum(short * long for short, long in shapes)
    assert adam.memory["moments"] - muon.memory["moments"] == 4 * numbers
    assert {name: muon.memory[name] for name in muon.memory if name != "moments"} == {
        name: adam.memory[name] for name in adam.memory if name != "moments"
    }
    products = 5 * sum(2 * short * short * (2 * long + short) for short, long in shapes)  # in each of 5 iterations
    a100 = 312e12
    fast, slow = (mine - theirs for mine, theirs in zip(muon.step_seconds, adam.step_seconds, strict=True))
    sent = 2 * numbers / DEVICES["A100-40GB"].exchange
    assert fast == pytest.approx(products / 8 / (0.75 * a100) + sent, rel=1e-6)
    assert slow == pytest.approx(products / 8 / (0.5 * a100) + sent, rel=1e-6)


def test_a_plan_that_does_not_fit_advises_sharding_where_that_fits(real):
    plans = [make_plan(dataclasses.replace(real[0], plan_device="4090", fsdp=fsdp)).stages[1] for fsdp in (False, True)]
    assert [plan.fits for plan in plans] == [False, True] and "--fsdp true" in plans[0].advice


def test_the_command_prints_the_plan_and_does_nothing_else(config, tmp_path, capsys, monkeypatch):
    """Of a small model and a corpus on this disk; their hours are the corpus's own."""
    monkeypatch.chdir(tmp_path)
    main(dataclasses.replace(config, plan=True))
    printed = capsys.readouterr().out
    hours = load_rows(config.train_sources, config, for_training=True).hours
    assert f"{hours:,.2f} h of audio an epoch (read from the corpora" in printed and "no GPU was tried" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given", [["--plan_device", "V100"], ["--plan_devices", "0"], ["--model_name_or_path", "Qwen/Qwen3-ASR-9B-hf"]]
)
def test_what_the_plan_does_not_know_is_said(given):
    with pytest.raises(InputError, match=r"plan_device|--plan"):
        make_plan(parse_config(given, round2()))
