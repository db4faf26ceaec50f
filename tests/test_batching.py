"""Packing several utterances into a row changes no gradient, and every process gets as much to do as the others."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from hebrew_asr.data.mixture import Mixture
from hebrew_asr.data.sources import Source
from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.model.packing import balanced, deal_step, rows_of
from hebrew_asr.model.stages import freeze_for
from hebrew_asr.training.batches import GlobalBatchSampler, UtteranceTokens
from train_hebrew_asr_enhanced import DataCollatorSpeechSeq2SeqWithPadding, TrainingConfig


def lognormal_tokens(count: int) -> np.ndarray:
    """Tokens of utterances with a median of 5 s, up to 30 s, 10 characters a second."""
    random = np.random.default_rng(0)
    seconds = np.minimum(30, np.exp(random.normal(np.log(5), 0.6, count)))
    return 25 + 13 * seconds + 0.37 * 10 * seconds * random.uniform(0.7, 1.3, count)


@pytest.fixture
def utterances(train_rows, processor, config):
    """Real ones, and noise of other lengths: under a second, exactly one, and over several windows of 8 s."""
    dataset = SpeechDataset(train_rows, processor, config, training=True)
    random = np.random.default_rng(0)
    made = [dataset[(1, row)] for row in range(3)]
    for frames in (57, 100, 2033, 1600, 801):
        features = random.normal(0, 0.5, (128, frames)).astype(np.float32)
        made.insert(random.integers(len(made) + 1), made[0] | {"features": features, "text": "שלום " * (frames // 80)})
    return made


@pytest.fixture
def plain(config):
    """The model as transformers has it."""
    return transformers.Qwen3ASRForConditionalGeneration.from_pretrained(config.model_name_or_path)


@pytest.mark.parametrize("number_of_stages", [0, 1, 2])
def test_packed_utterances_give_the_gradients_of_each_alone(
    config, model, plain, processor, utterances, number_of_stages
):
    """Against transformers' own loss on one clip at a time, all of the model trained, or what a stage trains."""
    config.use_specaugment = False
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    if number_of_stages:
        for either in (model, plain):
            freeze_for(either, config.stages[number_of_stages - 1])
    expected = 0.0
    for utterance in utterances:
        loss = plain(**collator([utterance], training=True), num_items_in_batch=1).loss
        loss.backward()
        expected += loss.item()
    batch = collator.packed(utterances)
    assert len(batch["input_ids"]) < len(utterances), "several in a row"
    loss = model(**batch, num_items_in_batch=1).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and not name.endswith("k_proj.bias"):  # of the encoder: nothing but rounding
            assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm(), name


def test_masks_of_packed_clips_are_those_of_each_alone(config, processor, utterances):
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    together = collator.packed(utterances)["input_features"][0]
    found = 0
    for utterance in utterances:
        alone = collator([utterance], training=True)["input_features"][0]
        windows = together.unfold(1, alone.shape[1], 100)
        found += any(torch.equal(windows[:, i], alone) for i in range(windows.shape[1]))
    assert found == len(utterances)


def test_dealing_is_near_the_best_there_is():
    random = np.random.default_rng(1)
    for _ in range(20):
        sizes = random.integers(1, 60, 8).astype(float)
        parts = balanced(sizes, 3)
        assert sorted(np.concatenate(parts).tolist()) == list(range(8))
        best = min(
            max(sum(s for s, p in zip(sizes, deal, strict=True) if p == part) for part in range(3))
            for deal in itertools.product(range(3), repeat=8)
        )
        assert max(sizes[part].sum() for part in parts) <= 4 / 3 * best


@pytest.mark.parametrize(("processes", "utterances_a_step"), [(1, 64), (8, 64), (64, 512)])
def test_little_is_padded_and_no_process_waits_long(processes, utterances_a_step):
    """The goals of the training step: 92 % useful tokens in micro-batches of the budget, 87 % with the slowest rank."""
    budget = TrainingConfig.tokens_per_micro_batch
    useful = padded = slowest = 0
    for tokens in lognormal_tokens(16_384).reshape(-1, utterances_a_step):
        deal = deal_step(tokens, processes, budget)
        assert sorted(np.concatenate([*itertools.chain(*deal)]).tolist()) == list(range(utterances_a_step))
        assert {len(micro_batches) for micro_batches in deal} == {len(deal[0])}, "every rank has as many forwards"
        assert len(deal[0]) <= max(tokens[np.concatenate(share)].sum() for share in deal) // budget + 2
        costs = []
        for micro_batches in deal:
            assert all(tokens[places].sum() <= budget for places in micro_batches)
            cuts = [(places, rows_of(tokens[places])) for places in micro_batches]
            costs.append(sum(len(rows) * max(tokens[places[row]].sum() for row in rows) for places, rows in cuts))
        useful, padded, slowest = useful + tokens.sum(), padded + sum(costs), slowest + processes * max(costs)
    assert useful / padded >= 0.92 and useful / slowest >= 0.87, (useful / padded, useful / slowest)


def test_an_utterance_longer_than_the_budget_is_alone():
    deal = deal_step(np.array([300.0, 20, 30, 40, 25]), processes=1, budget=100)
    assert [0] in [places.tolist() for places in deal[0]]
    assert all(len(places) <= 3 for places in deal[0])


@pytest.mark.parametrize(("no_system_prob", "prev_context_prob"), [(0.0, 0.0), (0.5, 0.5)])
def test_tokens_are_known_before_anything_is_decoded(config, processor, train_rows, no_system_prob, prev_context_prob):
    """Against the tokens of the collated utterances, one by one."""
    config.no_system_prob, config.prev_context_prob = no_system_prob, prev_context_prob
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    dataset = SpeechDataset(train_rows, processor, config, training=True)
    previous = train_rows.index.column_names.index("previous")
    train_rows.index = train_rows.index.set_column(previous, "previous", train_rows.index["text"])
    numbers = np.arange(len(train_rows))
    estimated = UtteranceTokens(train_rows, collator, config).of(3, numbers)
    exact = np.array([int(collator([dataset[(3, n)]], True)["attention_mask"].sum()) for n in numbers.tolist()])
    assert np.abs(estimated / exact - 1).max() < 0.1 and abs(estimated.sum() / exact.sum() - 1) < 0.02


@pytest.mark.parametrize("budget", [None, 1500])
@pytest.mark.parametrize("processes", [1, 2, 6])
def test_an_epoch_holds_every_utterance_once_and_its_steps_do_not_depend_on_the_processes(processes, budget):
    config = TrainingConfig(target_effective_batch=64, batch_size=2, tokens_per_micro_batch=budget)
    mixture = Mixture(SimpleNamespace(source_numbers=np.zeros(1001, int)), [Source("one")], config.seed)
    lengths = lognormal_tokens(1001)
    tokens = SimpleNamespace(of=lambda epoch, numbers: lengths[numbers])
    samplers = [GlobalBatchSampler(mixture, tokens, config, rank, processes) for rank in range(processes)]
    steps = [list(sampler) for sampler in samplers]
    assert {len(s) for s in steps} == {len(samplers[0])} == {16}
    order = mixture.order(1)
    assert sorted(order.tolist()) == list(range(1001))
    for number in range(16):
        micro_batches = [micro for rank in range(processes) for micro in steps[rank][number]]
        rows = sorted(row for micro in micro_batches for _, row in micro)
        assert rows == sorted(order[64 * number : 64 * (number + 1)].tolist())
        assert len({len(steps[rank][number]) for rank in range(processes)}) == 1, "every rank has as many forwards"
        if budget is None:
            assert max(map(len, micro_batches)) <= 2
        else:
            assert max(sum(lengths[row] for _, row in micro) for micro in micro_batches) <= budget
    again = GlobalBatchSampler(mixture, tokens, config, 0, processes)
    again.epoch = 2
    assert list(again) != steps[0]
