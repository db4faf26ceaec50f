"""The loss at label positions is transformers' loss: same nats, same gradients, whatever is chunked or frozen."""

import gpu_stand_ins  # noqa: F401 - wide products
import pytest
import torch
import transformers
from conftest import DEMO

from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.model import loss
from hebrew_asr.model.loading import load_to_train
from hebrew_asr.model.loss import IGNORED_LABEL, ChunkedNats, label_nats, label_states
from hebrew_asr.model.stages import freeze_for
from train_hebrew_asr_enhanced import DataCollatorSpeechSeq2SeqWithPadding


@pytest.fixture
def batch(processor, config, train_rows):
    dataset = SpeechDataset(train_rows, processor, config, training=True)
    return DataCollatorSpeechSeq2SeqWithPadding(processor, config)([dataset[(1, row)] for row in range(8)], True)


def logits_and_labels():
    torch.manual_seed(0)
    hidden = torch.randn(37, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.randint(0, 50, (37,))


@pytest.mark.parametrize("positions_at_once", [1, 5, 37, 100])
def test_chunks_give_the_loss_and_gradients_of_all_logits_at_once(monkeypatch, positions_at_once):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", positions_at_once * 50)
    hidden, weight, targets = logits_and_labels()
    each = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    expected = torch.autograd.grad(each.sum() / 3, (hidden, weight))
    total, nats = ChunkedNats.apply(hidden, weight, targets)
    found = torch.autograd.grad(total / 3, (hidden, weight))
    assert torch.allclose(nats.double(), each, rtol=1e-5) and not nats.requires_grad
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_a_frozen_vocabulary_gets_no_gradient():
    hidden, weight, targets = logits_and_labels()
    weight.requires_grad_(False)
    total, _ = ChunkedNats.apply(hidden, weight, targets)
    total.backward()
    assert weight.grad is None and hidden.grad.norm() > 0


def test_the_logits_of_all_positions_never_exist(model, batch, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 4 * 168)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if function in (torch.ops.aten.mm.default, torch.ops.aten._log_softmax.default) and out.shape[-1] == 168:
                largest = max(largest, out.numel())
            return out

    with Watch():
        model(**batch).loss.backward()
    assert largest == 4 * 168


def test_bf16_autocast_loses_no_more_than_it_does_in_transformers(batch):
    stock = transformers.Qwen3ASRForConditionalGeneration
    exact, plain, ours = (kind.from_pretrained(DEMO / "base") for kind in (stock, stock, loss.SpeechModel))
    exact(**batch).loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        plain_loss, our_loss = plain(**batch).loss, ours(**batch).loss
    plain_loss.backward()
    our_loss.backward()
    assert our_loss.item() == pytest.approx(plain_loss.item(), rel=1e-3)
    for name, parameter in exact.named_parameters():
        if name.endswith("k_proj.bias"):
            continue
        errors = [(dict(m.named_parameters())[name].grad - parameter.grad).norm().item() for m in (ours, plain)]
        assert errors[0] <= 1.5 * errors[1] + 1e-3 * parameter.grad.norm(), name


def test_nats_come_row_by_row(model, batch):
    with torch.no_grad():
        _, nats = label_nats(model, **batch)
        log_p = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.log_softmax(-1)
    expected = [
        -log_p[row, place - 1, label].item()
        for row, labels in enumerate(batch["labels"].tolist())
        for place, label in enumerate(labels)
        if label != IGNORED_LABEL
    ]
    assert nats.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("number", [0, 1])
def test_checkpointing_runs_what_trains_twice_and_a_frozen_encoder_once(config, model, batch, number):
    config.gradient_checkpointing = True
    checkpointed = load_to_train(config, use_bf16=False)
    runs: dict[str, int] = {}
    for either in (model, checkpointed):
        freeze_for(either, config.stages[number])
        either.train()
    for name, module in checkpointed.named_modules():
        if name.endswith("mlp") or name.endswith("fc1"):
            module.register_forward_pre_hook(lambda *_, name=name: runs.update({name: runs.get(name, 0) + 1}))
    for either in (model, checkpointed):
        either(**batch).loss.backward()
    for (name, ours), (_, theirs) in zip(checkpointed.named_parameters(), model.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name
    encoder = [runs[f"model.audio_tower.layers.{i}.fc1"] for i in range(3)]
    assert encoder == ([1, 1, 1] if number == 0 else [1, 1, 2]), "its top layer trains in the second stage"
    assert {count for name, count in runs.items() if "language_model" in name} == {2}


@pytest.mark.parametrize(("use_bf16", "wide"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("positions_at_once", [3, 1000])
def test_a_scale_known_beforehand_and_one_gradient_for_both_uses_change_nothing(
    model, batch, monkeypatch, positions_at_once, use_bf16, wide
):
    """Against autograd's own sum of the head's gradient and the embedding's, scaled afterwards."""
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", positions_at_once * 168)
    monkeypatch.setattr(loss, "has_wide_products", lambda _: wide)
    monkeypatch.setattr(loss, "spares_passes", lambda _: True)
    weight = model.lm_head.weight
    assert weight is model.get_input_embeddings().weight
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    found = []
    with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):
        hidden, targets = label_states(model, labels=batch["labels"], **inputs)
        plain = ChunkedNats.apply(hidden, weight, targets)[0] / 7
        rooted = model(**batch, root_scale=1 / 7).loss
        unrooted = 2 * model(**batch, num_items_in_batch=14).loss
    for total in (plain, rooted, unrooted):
        model.zero_grad()
        total.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert total.item() == pytest.approx(plain.item(), rel=1e-6)
    for name, gradient in found[0].items():
        if not name.endswith("k_proj.bias"):
            for other in found[1:]:
                assert (other[name] - gradient).norm() <= (1e-2 if use_bf16 else 1e-5) * gradient.norm(), name


def test_a_batch_without_a_label_gives_zeros(model, batch, monkeypatch):
    monkeypatch.setattr(loss, "spares_passes", lambda _: True)
    batch["labels"] = torch.full_like(batch["labels"], IGNORED_LABEL)
    model(**batch, root_scale=0.1).loss.backward()
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_the_embeddings_padding_gets_no_gradient_from_it(model, batch, monkeypatch):
    monkeypatch.setattr(loss, "spares_passes", lambda _: True)
    embedding = model.get_input_embeddings()
    gradients = []
    for padding in (None, int(batch["input_ids"][0, 0])):
        embedding.padding_idx = padding
        model.zero_grad()
        hidden, targets = label_states(model, **batch)
        ChunkedNats.apply(hidden, model.lm_head.weight, targets)[0].backward()
        expected = model.lm_head.weight.grad.clone()
        model.zero_grad()
        model(**batch, root_scale=1.0).loss.backward()
        assert torch.allclose(model.lm_head.weight.grad, expected, rtol=1e-4, atol=1e-6)
        gradients.append(expected)
    assert not torch.allclose(*gradients)
