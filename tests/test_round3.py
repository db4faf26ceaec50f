"""Round 3: the objectives are the papers', rewards cannot be gamed, samples depend on nothing but their seeds."""

import copy
import dataclasses
import gc
import importlib.metadata
import json
import math
import random
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from conftest import DEMO, first_rows, small_config
from forked import forked
from test_resume import own_signals  # noqa: F401 - a fixture
from torch.utils._python_dispatch import TorchDispatchMode

from hebrew_asr.checkpoints import store
from hebrew_asr.checkpoints.model_card import settings_of, write_model_card
from hebrew_asr.data.selection import chosen_by_difficulty
from hebrew_asr.data.sources import Source
from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.errors import InputError
from hebrew_asr.model.loss import token_log_probs
from hebrew_asr.model.packing import pack_samples
from hebrew_asr.model.stages import Stage
from hebrew_asr.rl import losses as policy_losses
from hebrew_asr.rl import rewards
from hebrew_asr.rl.rewards import EARNED, RewardWeights, reward_parts, total_reward
from hebrew_asr.rl.rollouts import (
    GenerateSampler,
    Group,
    InverseSampling,
    Sample,
    batches_of,
    embed,
    group_of,
    micro_batches_of,
    prompt_of,
    read_output,
)
from hebrew_asr.rl.vllm_sampler import VllmSampler
from hebrew_asr.training.watch import Watch
from scripts import audit_corpus, average_checkpoints, pseudo_label
from scripts.train_round3_gspo import GspoConfig, GspoTrainer, check_start, demo, recipe, train_round3
from train_hebrew_asr_enhanced import DataCollatorSpeechSeq2SeqWithPadding

HERE = Path(__file__).parent


# ---------------------------------------------------------------------------------------------------------- Objectives


def samples(seed: int = 0):
    """Two groups of 3 and 2 samples of 1 to 6 tokens; one counts twice, ratios lie on both sides of the clips."""
    random = np.random.default_rng(seed)
    lengths, group = [4, 1, 6, 3, 5], [0, 0, 0, 1, 1]
    old = random.uniform(-2, -0.1, sum(lengths))
    log_p = old + random.normal(0, 0.3, sum(lengths))
    advantage, errors = random.normal(size=5), random.integers(0, 5, 5).astype(float)
    share = [2 / 4, 1 / 4, 1 / 4, 1 / 2, 1 / 2]
    return lengths, group, old, log_p, advantage, errors, share


def tensors(lengths, group, old, log_p, advantage, errors, share):
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    log_p = torch.tensor(log_p, requires_grad=True)
    numbers = (torch.tensor(values, dtype=torch.float64) for values in (advantage, errors, share))
    return owner, torch.tensor(group, dtype=torch.long), torch.tensor(old), log_p, *numbers


def of_each(lengths: list[int], values: np.ndarray) -> list[list[float]]:
    return [part.tolist() for part in np.split(values, np.cumsum(lengths)[:-1])]


def gspo_by_hand(lengths, group, old, log_p, advantage, errors, share, low, high) -> float:
    total = 0.0
    for now, before, a, weight in zip(of_each(lengths, log_p), of_each(lengths, old), advantage, share, strict=True):
        s = (math.exp(math.fsum(now)) / math.exp(math.fsum(before))) ** (1 / len(now))
        total += weight * min(s * a, min(max(s, 1 - low), 1 + high) * a)
    return -total


def grpo_by_hand(lengths, group, old, log_p, advantage, errors, share, low, high) -> float:
    total = 0.0
    for now, before, a, weight in zip(of_each(lengths, log_p), of_each(lengths, old), advantage, share, strict=True):
        ratios = [math.exp(n) / math.exp(b) for n, b in zip(now, before, strict=True)]
        total += weight * sum(min(r * a, min(max(r, 1 - low), 1 + high) * a) for r in ratios) / len(now)
    return -total


def mwer_by_hand(lengths, group, old, log_p, advantage, errors, share) -> float:
    """Each different sample by its probability, however often it was drawn."""
    total = 0.0
    for number in (0, 1):
        mine = [i for i in range(len(group)) if group[i] == number]
        p = [math.exp(math.fsum(of_each(lengths, log_p)[i])) for i in mine]
        mean = sum(errors[i] for i in mine) / len(mine)
        total += sum(p_i / sum(p) * (errors[i] - mean) for p_i, i in zip(p, mine, strict=True))
    return total


def kl_by_hand(lengths, group, old, log_p, advantage, errors, share) -> float:
    each = [
        sum(math.exp(b) / math.exp(n) - math.log(math.exp(b) / math.exp(n)) - 1 for n, b in zip(now, ref, strict=True))
        / len(now)
        for now, ref in zip(of_each(lengths, log_p), of_each(lengths, old), strict=True)
    ]
    return sum(weight * value for weight, value in zip(share, each, strict=True))


def loss_of(name: str, values: tuple, log_p: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    owner, group, old, given, advantage, errors, share = tensors(*values)
    log_p = given if log_p is None else log_p
    if name == "mwer":
        return policy_losses.mwer(log_p, owner, group, errors), log_p
    if name == "kl":
        return policy_losses.kl(log_p, old, owner, share), log_p
    clips = {"gspo": (0.1, 0.15), "grpo": (0.2, 0.2)}[name]
    return getattr(policy_losses, name)(log_p, old, owner, advantage, share, *clips)[0], log_p


BY_HAND = {
    "gspo": lambda values: gspo_by_hand(*values, 0.1, 0.15),
    "grpo": lambda values: grpo_by_hand(*values, 0.2, 0.2),
    "mwer": lambda values: mwer_by_hand(*values),
    "kl": lambda values: kl_by_hand(*values),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", BY_HAND)
def test_an_objective_and_its_gradient_are_those_of_the_paper(name, seed):
    values = samples(seed)
    loss, log_p = loss_of(name, values)
    assert loss.item() == pytest.approx(BY_HAND[name](values), rel=1e-10)
    (gradient,) = torch.autograd.grad(loss, log_p)
    step = 1e-6
    for place in range(len(gradient)):
        moved = [np.array(values[3]), np.array(values[3])]
        moved[0][place] += step
        moved[1][place] -= step
        up, down = (BY_HAND[name]((*values[:3], shifted, *values[4:])) for shifted in moved)
        assert gradient[place].item() == pytest.approx((up - down) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_process_without_samples_in_a_step_has_a_gradient_of_zero(name):
    nothing = [], [], np.zeros(0), np.zeros(0), np.zeros(0), np.zeros(0), []
    loss, log_p = loss_of(name, nothing)
    assert loss.item() == 0 and len(torch.autograd.grad(loss, log_p)[0]) == 0


@pytest.mark.parametrize("objective", [policy_losses.gspo, policy_losses.grpo])
def test_the_samples_of_the_tests_are_clipped_on_both_sides(objective):
    sides = set()
    for seed in range(5):
        owner, _, old, log_p, advantage, _, share = tensors(*samples(seed))
        ratio, is_clipped = objective(log_p, old, owner, advantage, share, 0.1, 0.15)[1:]
        sides |= {bool(one) for one in ratio[is_clipped] > 1}
    assert sides == {True, False}


def test_at_the_weights_that_sampled_gspo_is_the_policy_gradient_of_the_mean_log_p():
    lengths, group, old, _, advantage, errors, share = samples()
    loss, log_p = loss_of("gspo", (lengths, group, old, old, advantage, errors, share))
    (gradient,) = torch.autograd.grad(loss, log_p)
    expected = np.repeat(-np.array(share) * advantage / lengths, lengths)
    assert np.allclose(gradient.numpy(), expected)


def test_advantages_are_normalised_in_the_group_and_a_group_without_variance_has_none():
    def group(rewards_of: list[tuple[int, float]]) -> Group:
        return Group(1, 0, "", 0, [Sample([1], count, [0.0], {}, reward) for count, reward in rewards_of])

    drawn = np.array([1.0, 1.0, 1.0, 0.5, 0.0])
    expected = (drawn - drawn.mean()) / drawn.std()
    assert np.allclose(group([(3, 1.0), (1, 0.5), (1, 0.0)]).advantages(), expected[[0, 3, 4]])
    assert group([(4, 0.7), (4, 0.7)]).advantages() is None


@pytest.mark.parametrize("positions_at_once", [1, 5, 100])
def test_log_p_of_tokens_in_chunks_is_that_of_all_logits_and_so_is_its_gradient(monkeypatch, positions_at_once):
    monkeypatch.setattr("hebrew_asr.model.loss.LOGITS_AT_ONCE", positions_at_once * 50)
    torch.manual_seed(0)
    hidden = torch.randn(13, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    targets, factors = torch.randint(0, 50, (13,)), torch.randn(13, dtype=torch.float64)
    log_p, entropy = token_log_probs(hidden, weight, targets, 0.7)
    every = (hidden @ weight.T / 0.7).log_softmax(1)
    expected = every[torch.arange(13), targets]
    assert torch.allclose(log_p, expected)
    assert torch.allclose(entropy, torch.distributions.Categorical(logits=every).entropy())
    assert not entropy.requires_grad
    found = torch.autograd.grad(log_p @ factors, (hidden, weight))
    wanted = torch.autograd.grad(expected @ factors, (hidden, weight))
    assert all(torch.allclose(a, b) for a, b in zip(found, wanted, strict=True))


class Products(TorchDispatchMode):
    """Notes what a GPU would round of each matrix product's inputs."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator._schema.name == "aten::mm":
            self.found.append(torch.backends.cuda.matmul.fp32_precision)
        return operator(*args, **(kwargs or {}))


def test_the_products_of_the_log_p_are_in_tf32_and_no_others():
    hidden, weight = torch.randn(13, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    with Products() as products:
        log_p, _ = token_log_probs(hidden, weight, torch.randint(0, 50, (13,)), 1.0)
        log_p.sum().backward()
        torch.mm(hidden, weight.T)
    *within, after = products.found  # forward, again for the backward pass, and two gradients
    assert within == ["tf32"] * 4 and after != "tf32"


# ------------------------------------------------------------------------------------------------------------- Rewards

WEIGHTS = RewardWeights(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


def reward(reference: str, hypothesis: str, language: str | None = "Hebrew") -> float:
    parts = reward_parts(reference, hypothesis, "Hebrew" if reference else None, language)
    return total_reward(parts, WEIGHTS)


def test_each_part_of_the_reward_is_what_its_name_says():
    said = "הילד הלך אל הבית"
    assert rewards.one_minus_wer(said, "הילד הלך אל בית") == 0.75
    assert rewards.one_minus_cer(said, "הילד הלך אל בית") == pytest.approx(1 - 1 / 16)
    assert rewards.one_minus_wer(said, " ".join(["לא"] * 30)) == 0, "a loop is not worse than nothing"
    assert (
        rewards.repetition(said, "לא לא לא לא לא") == 1 and rewards.repetition("לא לא לא לא לא", "לא לא לא לא לא") == 0
    )
    assert rewards.text_on_nonspeech("", "הילד") == 1 and rewards.text_on_nonspeech("", " . ") == 0
    assert rewards.text_on_nonspeech(said, "הילד") == 0
    assert rewards.wrong_length(said, "") == 1 and rewards.wrong_length(said, said) == 0
    assert rewards.wrong_length("אבגד", "אבגדה") == 0.25
    assert rewards.wrong_language("Hebrew", "English") == 1 and rewards.wrong_language(None, None) == 0


def test_a_right_transcript_earns_most_and_every_penalty_is_subtracted():
    said = "הילד הלך אל הבית"
    assert reward(said, said) == 2
    assert reward(said, said, "English") == 1
    assert reward("", "", None) == 2, "nobody speaks, nothing is written"
    assert reward("", "שלום", "Hebrew") == -2
    assert reward("", "", "Hebrew") == 1
    assert reward(said, "") < reward(said, "הילד")


@pytest.mark.parametrize("said", ["הילד הלך אל הבית", 'דובר צה"ל אמר שלום', "בשנת 1948 הוקמה המדינה", ""])
def test_formatting_earns_nothing(said):
    best = reward(said, said, "Hebrew" if said else None)
    chance = random.Random(0)
    marks = [
        ".",
        ",",
        "!",
        "?",
        "…",
        "-",
        "–",
        '"',
        "'",
        "״",
        "׳",
        " ",
        "  ",
        "\n",
        "ָ",
        "ַ",
        "ּ",
        "\u200f",
        "(",
        ")",
        "[",
        "]",
    ]
    for _ in range(200):
        letters = list(said)
        for _ in range(chance.randint(1, 6)):
            letters.insert(chance.randint(0, len(letters)), chance.choice(marks))
        assert reward(said, "".join(letters), "Hebrew" if said else None) <= best
    if said:
        pointed = "".join(letter + ("ָ" if letter.isalpha() else "") for letter in said)
        assert reward(said, pointed) == best, "niqqud costs nothing either"


# ------------------------------------------------------------------------------------------------------------- Samples


def test_inverse_sampling_draws_from_the_distribution_at_its_temperature():
    scores = torch.tensor([2.0, 0.5, -1.0, -torch.inf, 1.0])
    draws = 20_000
    chooser = InverseSampling(torch.from_numpy(np.random.default_rng(0).random((draws, 1))), 1.5)
    chosen = chooser(torch.zeros(draws, 0), scores.expand(draws, -1)).argmax(1)
    expected = (scores / 1.5).softmax(0)
    assert torch.allclose(torch.bincount(chosen, minlength=5) / draws, expected, atol=0.01)
    assert 3 not in chosen, "what cannot be is never drawn"
    assert torch.allclose(chooser.log_p[0], expected.log()[chosen])


def test_tokens_that_follow_one_another_are_drawn_independently():
    scores, draws = torch.tensor([0.0, 1.0, 0.5]), 20_000
    chooser = InverseSampling(torch.from_numpy(np.random.default_rng(0).random((draws, 2))), 1.0)
    first, second = (chooser(torch.zeros(draws, 0), scores.expand(draws, -1)).argmax(1) for _ in range(2))
    together = torch.bincount(3 * first + second, minlength=9).view(3, 3) / draws
    assert torch.allclose(together, torch.outer(scores.softmax(0), scores.softmax(0)), atol=0.01)


@pytest.fixture
def utterances(config, processor, train_rows):
    dataset = SpeechDataset(train_rows, processor, config, training=True)
    return [dataset[(1, number)] for number in range(6)]


@pytest.fixture
def tuned(config):
    from hebrew_asr.model.loading import load_to_train

    config.model_name_or_path = str(DEMO / "tuned")
    return load_to_train(config, use_bf16=False).eval()


def test_what_is_drawn_does_not_depend_on_the_batch_and_has_the_log_p_of_the_trainers_forward(
    config, processor, tuned, utterances
):
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    sampler = GenerateSampler(tuned, collator.end_of_turn_id, 1.3, torch.inference_mode)
    prompts = [prompt_of(u, collator, seed=1, samples=3, limit=20 + i) for i, u in enumerate(utterances)]
    together = sampler.sample(prompts)
    alone = [sampler.sample([prompt])[0] for prompt in reversed(prompts)][::-1]
    assert [[tokens for tokens, _ in group] for group in together] == [[t for t, _ in group] for group in alone]
    assert len({tuple(tokens) for group in together for tokens, _ in group}) > 6, "samples differ"
    assert all(len(tokens) <= 20 + i for i, group in enumerate(together) for tokens, _ in group)
    clip_of = [i for i in range(6) for _ in range(3)]
    flat = [sample for group in together for sample in group]
    batch, order = pack_samples(
        [u["features"] for u in utterances],
        clip_of,
        [prompts[i].tokens for i in clip_of],
        [tokens for tokens, _ in flat],
        collator.end_of_turn_id,
    )
    assert batch["input_features"].shape[2] == sum(100 * math.ceil(u["features"].shape[1] / 100) for u in utterances)
    with torch.no_grad():
        log_p, _ = tuned(**batch, temperature=1.3)
    expected = [value for i in order for value in flat[i][1]]
    assert np.allclose(log_p.numpy(), expected, atol=1e-4)


class StandInEngine:
    """What is used of vLLM's LLM, by transformers' own class for a language model alone and without a cache."""

    def __init__(
        self, *, model, load_format, skip_tokenizer_init, enable_prompt_embeds, enable_prefix_caching, async_scheduling,
        dtype, gpu_memory_utilization, max_model_len, logprobs_mode, distributed_executor_backend, seed,
    ):  # fmt: skip
        assert load_format == "dummy" and skip_tokenizer_init and enable_prompt_embeds and not enable_prefix_caching
        assert logprobs_mode == "processed_logprobs" and distributed_executor_backend is None and dtype == "float32"
        config = transformers.AutoConfig.from_pretrained(model)
        self.model = transformers.AutoModelForCausalLM.from_config(config)
        assert config.architectures == ["Qwen3ForCausalLM"] and type(self.model).__name__ == "Qwen3ForCausalLM"

    def apply_model(self, function) -> None:
        function(self)

    def load_weights(self, weights) -> None:
        weights = dict(weights)
        missing, unknown = self.model.load_state_dict(weights, strict=False)
        assert not unknown and missing == ["lm_head.weight"] * self.model.config.tie_word_embeddings

    @torch.no_grad()
    def generate(self, requests, parameters, use_tqdm: bool):
        return [self.answer(r["prompt_embeds"], p) for r, p in zip(requests, parameters, strict=True)]

    def answer(self, embedded, wanted):
        random, tokens, log_p = torch.Generator().manual_seed(wanted.seed), [], []
        while len(tokens) < wanted.max_tokens and not (tokens and tokens[-1] in wanted.stop_token_ids):
            logits = self.model(inputs_embeds=embedded[None]).logits[0, -1].float() / wanted.temperature
            tokens.append(int(torch.multinomial(logits.softmax(0), 1, generator=random)))
            log_p.append({tokens[-1]: SimpleNamespace(logprob=float(logits.log_softmax(0)[tokens[-1]]))})
            embedded = torch.cat([embedded, self.model.get_input_embeddings()(torch.tensor(tokens[-1:]))])
        reason = "stop" if tokens[-1] in wanted.stop_token_ids else "length"
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, logprobs=log_p, finish_reason=reason)])


def sampling_params(*, temperature, top_p, top_k, seed, max_tokens, stop_token_ids, logprobs, detokenize):
    assert top_p == 1 and top_k == 0 and logprobs == 0 and not detokenize
    return SimpleNamespace(temperature=temperature, seed=seed, max_tokens=max_tokens, stop_token_ids=stop_token_ids)


@pytest.fixture
def stand_in_vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = StandInEngine, sampling_params
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.0" if name == "vllm" else version(name))


def test_vllm_is_asked_for_what_the_trainer_would_draw_and_follows_its_weights(stand_in_vllm, settings, tmp_path):
    """Its language model, alone, gives each token the log p that the whole model gives it."""
    config = settings(tmp_path / "run", rollout_engine="vllm", max_steps=5, num_epochs=1)
    train_round3(config)
    found = rows(tmp_path / "run")
    gaps = [row["train/largest_sampler_gap"] for row in found if "train/largest_sampler_gap" in row]
    assert len(gaps) > 1 and 0 < max(gaps) < 1e-3, "the second rollout is with the weights that the first one trained"
    assert any(row.get("train/distinct", 0) > 1 for row in found), "samples of an utterance differ"
    assert all(math.isfinite(row["train/loss"]) for row in found if "train/loss" in row)


def test_a_head_of_its_own_is_handed_over_too(stand_in_vllm, config, processor, tuned, utterances):
    tuned.config.tie_word_embeddings = False
    tuned.lm_head.weight = torch.nn.Parameter(torch.roll(tuned.lm_head.weight.detach(), 1, dims=0))
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    how = tuned, collator.end_of_turn_id, 1.0, torch.inference_mode
    engine = VllmSampler(*how, dtype=torch.float32, memory_share=0.3, rank=0, processes=1)
    engine.refresh()
    assert (engine.engine.model.lm_head.weight == tuned.lm_head.weight).all()
    assert (engine.engine.model.lm_head.weight != engine.engine.model.get_input_embeddings().weight).any()


def test_an_old_vllm_is_refused(stand_in_vllm, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.11.0")
    with pytest.raises(InputError, match=r"vllm>=0\.19\.1 is required"):
        dataclasses.replace(demo(), rollout_engine="vllm").check(1)


def test_a_budget_below_one_sample_gives_micro_batches_of_one(utterances, config, processor):
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    groups = [Group(1, 0, "", 1, [Sample([20, 21, collator.end_of_turn_id], 1, []) for _ in range(3)])]
    found = micro_batches_of(utterances[:1], groups, collator, budget=1, whole_groups=False)
    assert [len(one.order) for one in found] == [1, 1, 1]


def test_a_sample_may_hold_the_placeholder_of_audio(config, processor, tuned, utterances):
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    (prompt,) = [prompt_of(u, collator, 1, samples=1, limit=20) for u in utterances[:1]]
    sample = [20, tuned.config.audio_token_id, 21, collator.end_of_turn_id]
    batch, _ = pack_samples([prompt.features], [0], [prompt.tokens], [sample], collator.end_of_turn_id)
    with torch.no_grad():
        log_p, _ = tuned(**batch, temperature=1.0)
        embedded, mask = embed(tuned, [prompt], collator.end_of_turn_id)
        answer = tuned.get_input_embeddings()(torch.tensor([sample]))
        logits = tuned.lm_head(tuned.model.language_model(inputs_embeds=torch.cat([embedded, answer], 1))[0])
    expected = logits[0, mask.shape[1] - 1 : -1].log_softmax(-1)[range(4), sample]
    assert torch.allclose(log_p, expected, atol=1e-4)


def test_rollouts_are_batched_by_budget_each_prompt_once(utterances, config, processor):
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    prompts = [prompt_of(u, collator, 1, samples=4, limit=30) for u in utterances]
    widest = max(len(prompt.tokens) for prompt in prompts)
    batches = batches_of(prompts, budget=2 * 4 * (widest + 30))
    assert sorted(place for places in batches for place in places) == list(range(6)) and len(batches) > 1
    for places in batches:
        assert 4 * len(places) * (max(len(prompts[i].tokens) for i in places) + 30) <= 2 * 4 * (widest + 30)
    assert len(batches_of(prompts, budget=1)) == 6, "one that is too long for the budget is alone"


def test_equal_samples_are_counted_and_the_language_is_read():
    texts = {
        (1,): "language Hebrew<asr_text>שלום",
        (2,): "language English<asr_text>hello",
        (3,): "language None<asr_text>",
    }
    drawn = [([1], [-0.1]), ([2], [-3.0]), ([1], [-0.1]), ([3], [-4.0])]
    utterance = {"epoch": 1, "index": 7, "text": "שלום", "language": "Hebrew"}
    group = group_of(utterance, drawn, lambda tokens: texts[tuple(tokens)], RewardWeights())
    assert [(s.count, s.reward) for s in group.samples] == [(2, 1.0), (1, -0.5), (1, -0.5)]
    english = group_of(
        utterance | {"text": "hello", "language": "English"}, drawn, lambda t: texts[tuple(t)], RewardWeights()
    )
    assert english.samples[1].reward == 1.0 > max(s.reward for s in english.samples[::2]), "in its own language"
    assert read_output("language None<asr_text>") == (None, "") and read_output("שלום") == (None, "שלום")


# -------------------------------------------------------------------------------------------------- Bad input, settings


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"group_size": 1}, "at least 2"),
        ({"reward_weights": RewardWeights(0, 0, 0, 0, 0, 0)}, "the reward is constant"),
        ({"reward_weights": RewardWeights(0, 0, 0, 0, 1, 0), "nonspeech_share": 0.0}, "the reward is constant"),
        ({"temperature": 0.0}, "must be above 0"),
        ({"rollout_engine": "vllm"}, "vLLM is not installed"),
        ({"objective": "ppo"}, "gspo, grpo or mwer"),
        ({"use_specaugment": True}, "use_waveform_augmentation"),
        ({"updates_per_rollout": 0}, "updates_per_rollout"),
        ({"clip_low": 0.0}, "clip_low"),
        ({"difficulty_range": (0.2, 0.9)}, "go together"),
        ({"best_by": "wer_noisy", "noisy_eval_sources": []}, "needs noisy_eval_sources"),
        ({"streaming": True, "steps_per_epoch": 3}, "streaming must be off"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_loaded(changed, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(demo(), **changed).check(1)


def test_a_checkpoint_that_round_2_did_not_write_is_refused(tmp_path):
    config = demo()
    check_start(config)  # of demo/tuned, with its card
    config.model_name_or_path = str(DEMO / "base")
    with pytest.raises(InputError, match="what Round 2 ends with"):
        check_start(config)
    config.any_checkpoint = True
    check_start(config)
    with pytest.raises(InputError, match="nowhere"):
        check_start(dataclasses.replace(config, model_name_or_path=str(tmp_path / "nowhere")))


def test_a_checkpoint_that_writes_otherwise_is_refused(tmp_path):
    config = demo()
    final = {f"final/{name}": 1.0 for name in ("wer", "cer", "wer_raw", "utterances")}
    other = copy.deepcopy(config)
    other.text_rules.quote_style = "hebrew"
    write_model_card(tmp_path, "x/y", "base", [], ["set"], final, 1, dataclasses.asdict(other), [])
    assert settings_of((tmp_path / "README.md").read_text())["text_rules"]["quote_style"] == "hebrew"
    assert settings_of("# another card") is None
    for block in ('{"accuracy": 1}', "[1]", "{"):
        assert settings_of(f"# another card\n\n## Training\n\n```json\n{block}\n```\n") is None
    config.model_name_or_path = str(tmp_path)
    shutil.copy(DEMO / "tuned" / "config.json", tmp_path)
    with pytest.raises(InputError, match="was trained with text_rules"):
        check_start(config)


def test_the_settings_of_a_round_3_run_are_read_by_what_comes_after_it(tmp_path):
    config = dataclasses.replace(demo(), language="English", kl_weight=0.5)
    (tmp_path / "config.yaml").write_text(json.dumps(dataclasses.asdict(config), indent=2))
    given = ["--model", str(DEMO / "tuned"), "--config", str(tmp_path / "config.yaml")]
    audited, _ = audit_corpus.settings([*given, "--eval_batch_size", "3"])
    assert (audited.language, audited.eval_batch_size) == ("English", 3)
    assert audited.train_sources == config.train_sources and audited.text_rules == config.text_rules
    labelling = pseudo_label.parse([*given, "--source", "x", "--output", str(tmp_path / "out")])
    assert labelling.language == "English" and labelling.text_rules == config.text_rules
    averaged = dataclasses.asdict(average_checkpoints.settings_of(tmp_path))
    assert averaged == {name: value for name, value in dataclasses.asdict(config).items() if name in averaged}


def test_the_command_line_has_every_setting_of_both_rounds():
    config = recipe(["--model", "x", "--objective", "mwer", "--reward_weights.cer", "0.5", "--num_epochs", "1"])
    assert (config.model_name_or_path, config.objective, config.num_epochs) == ("x", "mwer", 1)
    assert config.reward_weights == RewardWeights(cer=0.5)
    assert recipe(["--demo", "--model=y"]).model_name_or_path == "y"
    assert GspoConfig().clip_range == (3e-4, 4e-4) and GspoConfig(objective="grpo").clip_range == (0.2, 0.2)
    with pytest.raises(InputError, match="did you mean --group_size"):
        recipe(["--group_sizes", "4"])


def test_utterances_are_chosen_by_the_audits_rank(config, train_rows, tmp_path):
    count = 20
    table = pyarrow.table(
        {
            "digest": train_rows.column("digest")[:count],
            "words": train_rows.column("words")[:count],
            "rank": pyarrow.array([*range(1, count), None]),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "audit.parquet")
    chosen = dataclasses.replace(
        demo(), difficulty_scores=str(tmp_path / "audit.parquet"), difficulty_range=(0.5, 0.9),
        train_sources=config.train_sources,
    )  # fmt: skip
    kept = chosen_by_difficulty(train_rows, chosen.train_sources, chosen.difficulty_scores, chosen.difficulty_range)
    ranks = [1 + train_rows.column("digest").index(name) for name in kept.column("digest")]
    assert ranks == [rank for rank in range(1, count) if 0.5 <= 1 - (rank - 1) / (count - 2) <= 0.9]
    assert sum(drop.utterances for drop in kept.dropped) + len(kept) == len(train_rows) + sum(
        d.utterances for d in train_rows.dropped if d.reason not in {x.reason for x in kept.dropped[-2:]}
    )


# ---------------------------------------------------------------------------------------------------------------- Runs


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> Path:
    return first_rows("heldout_noisy", 9, tmp_path_factory.mktemp("data") / "noisy")


@pytest.fixture(scope="module")
def settings(corpus, heldout, noisy):
    def make(folder: Path, **changed) -> GspoConfig:
        small = small_config(corpus, heldout, folder)
        config = demo()
        for name in (
            *("train_sources", "eval_sources", "output_dir", "target_effective_batch", "tokens_per_micro_batch"),
            *("generation_max_new_tokens", "eval_batch_size", "eval_steps", "tracker", "final_dtype"),
        ):
            setattr(config, name, getattr(small, name))
        config.noisy_eval_sources = [Source(str(noisy))]
        config.stages = [Stage("RL", 2, {"projector": 2e-4, "audio_top": 6e-5, "llm_top": 6e-5, "lm_head": 2e-4}, 1, 1)]
        config.num_epochs, config.group_size, config.temperature, config.kl_weight = 2, 4, 1.5, 0.01
        config.nonspeech_share, config.logging_steps, config.save_steps, config.save_total_limit = 0.2, 3, 1, 100
        config.updates_per_rollout, config.lr_scheduler_type = 4, "constant_with_warmup"
        return dataclasses.replace(config, **changed)

    return make


TIMES = ("train/audio_seconds_per_second", "train/waiting_for_data", "train/gigaflops_per_second")


def rows(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = (*TIMES, "train/time_in_rollouts")
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    """Two epochs of 6 steps: rollouts before steps 1, 5, 7 and 11."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_round3(settings(folder))
    return folder


def test_a_run_logs_its_samples_both_sets_and_the_distance_to_the_sampler(whole):
    found = rows(whole)
    names = {name for row in found for name in row}
    parts = {f"train/reward_{f.name}" for f in dataclasses.fields(RewardWeights)}
    assert names >= parts | {
        *("train/reward", "train/entropy", "train/ratio", "train/clip_share", "train/length", "train/kept_groups"),
        *("train/dropped_groups", "train/kl", "train/sampler_gap", "eval/wer", "eval/wer_noisy", "eval/repetitions"),
        *("eval/repetitions_noisy", "final/wer_noisy"),
    }
    assert "eval/loss_minus_train_loss" not in names
    for row in (row for row in found if "train/reward" in row):
        weights = dataclasses.asdict(RewardWeights())
        total = sum(w * row[f"train/reward_{name}"] * (1 if name in EARNED else -1) for name, w in weights.items())
        assert row["train/reward"] == pytest.approx(total) and total != 0
    gaps = [row["train/largest_sampler_gap"] for row in found if "train/largest_sampler_gap" in row]
    assert gaps and 0 < max(gaps) < 1e-3
    assert any(row.get("train/clip_share", 0) > 0 for row in found)
    assert [row["step"] for row in found if "eval/wer_noisy" in row] == [0, 12]


@pytest.mark.parametrize("step", [1, 3, 6, 9, 11])
def test_from_any_step_also_between_rollouts_a_run_ends_in_the_same_bits(whole, settings, tmp_path, step):
    begin = whole / "checkpoints" / f"step-{step:08d}"
    state = json.loads((begin / "state.json").read_text())["streams"][0]
    assert bool(state["groups"]) == (step % 6 not in (0, 4)), "samples that are still to be trained on, and no others"
    train_round3(settings(tmp_path / "run", resume=str(begin)))
    for name in ("model.safetensors", "optimizer.safetensors"):
        mine, other = (run / "checkpoints" / "step-00000012" / name for run in (tmp_path / "run", whole))
        assert mine.read_bytes() == other.read_bytes(), name
    assert rows(tmp_path / "run") == rows(whole)


def test_a_signal_during_a_rollout_saves_the_steps_before_it(whole, settings, tmp_path, monkeypatch):
    agree, draw = Watch.agree_to_stop, GspoTrainer.draw
    sampling = []

    def draw_until_stopped(self, utterances):
        sampling.append(self.state.global_step)
        try:
            return draw(self, utterances)
        finally:
            sampling.pop()

    monkeypatch.setattr(GspoTrainer, "draw", draw_until_stopped)
    monkeypatch.setattr(Watch, "agree_to_stop", lambda self: 15 if sampling == [4] else agree(self))
    config = settings(tmp_path / "run", save_steps=1000)
    status = None
    try:
        train_round3(config)
    except SystemExit as end:
        status = end.code
    gc.collect()  # the frames of the run, with its lock
    assert status == 128 + 15
    assert [c.name for c in store.names(tmp_path / "run" / "checkpoints")] == ["step-00000004"]
    monkeypatch.undo()
    train_round3(config)
    mine, other = (run / "checkpoints" / "step-00000012" / "model.safetensors" for run in (tmp_path / "run", whole))
    assert mine.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("objective", ["grpo", "mwer"])
def test_the_other_objectives_train_too(settings, tmp_path, objective):
    train_round3(settings(tmp_path / "run", objective=objective, max_steps=2, kl_weight=0.0))
    losses = [row["train/loss"] for row in rows(tmp_path / "run") if "train/loss" in row]
    assert losses and all(math.isfinite(loss) for loss in losses)


def test_nonspeech_is_heard_without_text_and_the_same_each_time(config, processor, train_rows):
    from hebrew_asr.rl.data import RolloutDataset

    config = dataclasses.replace(demo(), nonspeech_share=0.5, seed=3)
    dataset = RolloutDataset(train_rows, processor, config, training=True)
    heard = [dataset[(1, number)] for number in range(30)]
    empty = [u for u in heard if not u["text"]]
    assert 8 <= len(empty) <= 22
    again = dataset[(1, empty[0]["index"])]
    assert (again["features"] == empty[0]["features"]).all()
    assert dataset[(2, empty[0]["index"])]["features"].shape != again["features"].shape


@pytest.mark.slow
def test_two_processes_train_what_one_trains(settings, tmp_path):
    def run(name: str, processes: int) -> list[dict]:
        config = settings(tmp_path / name / "run", save_steps=5)
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(dataclasses.asdict(config)))
        done = forked("scripts/train_round3_gspo.py", "--config", file, processes=processes)
        assert done.returncode == 0, done.stdout + done.stderr
        return rows(tmp_path / name / "run")

    one, two = run("one", 1), run("two", 2)
    for mine, other in zip(one, two, strict=True):
        for name in ("train/loss", "train/reward", "train/entropy", "train/kept_groups", "eval/wer", "eval/wer_noisy"):
            assert mine.get(name) == pytest.approx(other.get(name), abs=1e-5), name
    # a checkpoint between two rollouts, of two processes, goes on in one
    config = settings(tmp_path / "two" / "run", save_steps=5)
    config.resume, config.output_dir = (
        str(tmp_path / "two" / "run" / "checkpoints" / "step-00000005"),
        str(tmp_path / "on"),
    )
    train_round3(config)
    last = [row["train/reward"] for row in rows(tmp_path / "on") if "train/reward" in row][-1]
    assert last == pytest.approx([row["train/reward"] for row in two if "train/reward" in row][-1], abs=1e-5)
