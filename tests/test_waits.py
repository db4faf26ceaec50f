"""A micro-batch never has the host wait for the device, and decoding casts no weight at a token."""

from collections import Counter

import gpu_stand_ins
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.model import attention, fused
from hebrew_asr.model.frames import audio_token_count
from hebrew_asr.model.generation import generate
from hebrew_asr.model.loading import load_model
from hebrew_asr.model.packing import halves, places_of
from hebrew_asr.model.roofline import WAITING, as_on_cuda
from hebrew_asr.model.stages import freeze_for
from train_hebrew_asr_enhanced import DataCollatorSpeechSeq2SeqWithPadding

PLACES = ("encoder_places", "audio_places", "label_places")


class Waits(TorchDispatchMode):
    """Counts operators after which the host must know a number or a shape that the device has."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name.split("::")[1]
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or masks:
            self.found[f"{name} by a mask" if masks else name] += 1
        return operator(*args, **(kwargs or {}))


class Casts(TorchDispatchMode):
    """Counts casts of a model's weights."""

    def __init__(self, model):
        super().__init__()
        self.weights, self.found = {id(parameter) for parameter in model.parameters()}, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.found += operator._schema.name == "aten::_to_copy" and id(args[0]) in self.weights
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def batch(config, processor, train_rows):
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    dataset = SpeechDataset(train_rows, processor, config, training=True)
    collator.in_one_row = True
    return collator.packed([dataset[(1, number)] for number in range(5)])


def as_on_a_gpu(config, monkeypatch):
    """The demo's model as it trains on a GPU, whose attention is a stand-in's."""
    monkeypatch.setattr(attention, "varlen_attn", gpu_stand_ins.varlen_attn)
    model = load_model(config.model_name_or_path, use_bf16=True, stages=config.stages)
    attention.register()
    for part in (model.config.text_config, model.config.audio_config):
        part._attn_implementation_internal = attention.VARLEN
    fused.fuse(model)
    freeze_for(model, config.stages[-1])
    return model


def run(model, batch) -> tuple[Counter, torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    with as_on_cuda(), Waits() as waits:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, root_scale=1.0).loss
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return waits.found, loss.detach(), gradients


def test_no_wait_is_left_in_a_micro_batch_and_nothing_is_computed_otherwise(config, batch, monkeypatch):
    model = as_on_a_gpu(config, monkeypatch)
    waits, loss, gradients = run(model, batch)
    assert not waits
    on_device = {name: tensor for name, tensor in batch.items() if name not in PLACES}
    others, same_loss, same_gradients = run(model, on_device)
    assert others == {"nonzero": 3}, "of the encoder, the placeholders and the labels"
    assert torch.equal(loss, same_loss) and gradients.keys() == same_gradients.keys()
    assert all(torch.equal(gradient, same_gradients[name]) for name, gradient in gradients.items())


def test_no_weight_is_cast_at_a_token(config):
    """Autocast keeps a weight's bf16 copy while a batch is decoded; a copy of the model saves no such cast."""
    model = load_model(config.model_name_or_path, use_bf16=True, stages=config.stages).eval()
    freeze_for(model, config.stages[0])
    model.generation_config.eos_token_id = None
    tokens = audio_token_count(200)
    prompts = torch.tensor([[7] * 9 + [model.config.audio_token_id] * tokens + [8] * 6])
    batch = {"prompt_input_ids": prompts, "prompt_attention_mask": torch.ones_like(prompts)}
    batch |= {"input_features": torch.ones(1, 128, 200), "input_features_mask": torch.ones(1, 200, dtype=torch.long)}
    casts = []
    for count in (2, 6):
        with Casts(model) as mode:
            generate(model, batch, [count])
        casts.append(mode.found)
    assert casts[0] == casts[1] > 0


def test_a_micro_batch_in_two_has_the_places_of_its_halves(batch, processor):
    audio = processor.tokenizer.convert_tokens_to_ids("<|audio_pad|>")
    for half in halves(batch, audio):
        assert set(PLACES) <= set(half)
        expected = places_of({name: t for name, t in half.items() if name not in PLACES}, audio)
        assert all(torch.equal(half[name], expected[name]) for name in PLACES)
        learnt = half["labels"].flatten()[half["label_places"] + 1]
        assert torch.equal(learnt, half["labels"][half["labels"] >= 0])
