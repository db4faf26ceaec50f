"""Samples of transcripts for reinforcement learning: drawn, rewarded, compared in their group, and packed for a step.

What `generate` draws for an utterance depends on the weights and on (seed, epoch, utterance, sample) alone: not on the
batch it is in, the process it falls to, or what was drawn before. (Under bf16 the padding of a batch changes the last
bits of the logits, and now and then a token with them.) Imports nothing of the training script.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import transformers
from transformers import Qwen3ASRForConditionalGeneration

from hebrew_asr.model.packing import deal_step, pack_clips, pack_samples, places_of
from hebrew_asr.model.prompts import read_output
from hebrew_asr.rl.rewards import RewardWeights, reward_parts, total_reward
from hebrew_asr.text.scoring import leaderboard_normalize


@dataclass
class Sample:
    """One transcript that was drawn for an utterance, as tokens."""

    tokens: list[int]
    """With the mark of the end, unless the limit cut it off."""
    count: int
    """How often it was drawn."""
    sampler_log_p: list[float]
    """Of each token, as the sampler saw it."""
    parts: dict[str, float] = field(default_factory=dict)
    """Of the reward."""
    reward: float = 0.0
    log_p: list[float] = field(default_factory=list)
    """Of each token, under the trainer's own forward pass when it was drawn."""
    reference_log_p: list[float] = field(default_factory=list)
    """The same under the reference model, where there is one."""


@dataclass
class Group:
    """The different samples of one utterance."""

    epoch: int
    number: int
    reference: str
    words: int
    """Of the reference, normalised."""
    samples: list[Sample]

    def size(self) -> int:
        return sum(sample.count for sample in self.samples)

    def mean(self, value: Callable[[Sample], float]) -> float:
        return sum(sample.count * value(sample) for sample in self.samples) / self.size()

    def advantages(self) -> list[float] | None:
        """(reward − mean) / standard deviation, over all that was drawn; None where they all earn the same."""
        mean = self.mean(lambda sample: sample.reward)
        deviation = math.sqrt(self.mean(lambda sample: (sample.reward - mean) ** 2))
        if deviation < 1e-6:  # rounding
            return None
        return [(sample.reward - mean) / deviation for sample in self.samples]


def group_from_json(values: dict[str, Any]) -> Group:
    samples = [Sample(**sample) for sample in values["samples"]]
    return Group(**{name: value for name, value in values.items() if name != "samples"}, samples=samples)


# ------------------------------------------------------------------------------------------------------------- Sampling
class Prompt(NamedTuple):
    """What a sampler is asked for."""

    features: np.ndarray  # (mel, frames)
    tokens: list[int]  # with a placeholder for each audio token
    uniforms: np.ndarray  # (samples, limit): in [0, 1), one number for each token that is drawn


Drawn = tuple[list[int], list[float]]  # tokens, and the log p of each


class Sampler(Protocol):
    """Draws transcripts: for each prompt as many as it has rows of `uniforms`."""

    def refresh(self) -> None:
        """Called before each rollout: the trainer's weights have changed."""
        ...

    def sample(self, prompts: list[Prompt]) -> list[list[Drawn]]:
        """For each prompt its samples."""
        ...


def embed(
    model: Qwen3ASRForConditionalGeneration, prompts: list[Prompt], padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with the audio in its places, padded on the left: (prompts, positions, width), and their mask."""
    device = model.device
    width = max(len(prompt.tokens) for prompt in prompts)
    ids = [[padding] * (width - len(prompt.tokens)) + prompt.tokens for prompt in prompts]
    mask = [[False] * (width - len(prompt.tokens)) + [True] * len(prompt.tokens) for prompt in prompts]
    audio, _, _ = pack_clips([prompt.features for prompt in prompts], list(range(len(prompts))))
    audio = {name: tensor.to(device) for name, tensor in audio.items()}
    heard = model.get_audio_features(
        audio["input_features"],
        audio["input_features_mask"],
        return_dict=True,
        cu_seqlens=audio["window_ends"],
    ).pooler_output
    tokens = torch.tensor(ids, device=device)
    embedded = model.get_input_embeddings()(tokens)
    is_audio = (tokens == model.config.audio_token_id).unsqueeze(-1)
    return embedded.masked_scatter(is_audio, heard.to(embedded.dtype)), torch.tensor(mask, device=device)


def ends_of(model: Qwen3ASRForConditionalGeneration, padding: int) -> set[int]:
    """The tokens that end a transcript; <|im_end|> is the padding too."""
    ends = model.generation_config.eos_token_id
    return {padding, *(ends if isinstance(ends, list) else [ends])}


def cut(tokens: list[int], log_p: list[float], limit: int, ends: set[int]) -> Drawn:
    """Up to and with the end, and no longer than the limit."""
    length = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
    length = min(length, limit)
    return tokens[:length], log_p[:length]


class InverseSampling(transformers.LogitsProcessor):
    """Draws each token by inverting its distribution at a given number, and leaves `generate` no other choice."""

    def __init__(self, uniforms: torch.Tensor, temperature: float):
        """`uniforms`: (rows, steps), on the device of the logits."""
        self.uniforms, self.temperature, self.log_p = uniforms, temperature, []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        log_p = (scores.float() / self.temperature).log_softmax(dim=1)
        reached = log_p.double().exp().cumsum(dim=1)
        aims = self.uniforms[:, len(self.log_p), None] * reached[:, -1:]
        tokens = torch.searchsorted(reached, aims, right=True).clamp_max(scores.shape[1] - 1)
        self.log_p.append(log_p.gather(1, tokens)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)


class GenerateSampler:
    """Transformers' generate with its cache; each clip goes through the encoder once."""

    def __init__(self, model: Qwen3ASRForConditionalGeneration, padding: int, temperature: float, autocast: Callable):
        self.model, self.padding, self.temperature, self.autocast = model, padding, temperature, autocast
        self.ends = ends_of(model, padding)

    def refresh(self) -> None:
        """Samples with the trainer's own weights."""

    @torch.no_grad()
    def sample(self, prompts: list[Prompt]) -> list[list[Drawn]]:
        model = self.model
        repeats = torch.tensor([len(prompt.uniforms) for prompt in prompts], device=model.device)
        limits = [prompt.uniforms.shape[1] for prompt in prompts for _ in prompt.uniforms]
        uniforms = torch.zeros(len(limits), max(limits), dtype=torch.float64)
        for row, numbers in enumerate(numbers for prompt in prompts for numbers in prompt.uniforms):
            uniforms[row, : len(numbers)] = torch.from_numpy(numbers)
        chooser = InverseSampling(uniforms.to(model.device), self.temperature)
        with self.autocast():
            embedded, mask = embed(model, prompts, self.padding)
            generated = model.generate(
                inputs_embeds=embedded.repeat_interleave(repeats, dim=0),
                attention_mask=mask.long().repeat_interleave(repeats, dim=0),
                max_new_tokens=max(limits),
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,  # whatever the checkpoint's own settings for use are
                no_repeat_ngram_size=0,
                logits_processor=transformers.LogitsProcessorList([chooser]),
            ).tolist()
        log_p = torch.stack(chooser.log_p, dim=1).tolist()
        rows = iter([cut(*row, self.ends) for row in zip(generated, log_p, limits, strict=True)])
        return [[next(rows) for _ in prompt.uniforms] for prompt in prompts]


def prompt_of(utterance: dict[str, Any], collator: Any, seed: int, samples: int, limit: int) -> Prompt:
    """The prompt that training gives an utterance, and the numbers that decide what is drawn for it."""
    draws = [
        np.random.default_rng([seed, utterance["epoch"], utterance["index"], 4, sample]).random(limit)
        for sample in range(samples)
    ]
    features = utterance["features"]
    return Prompt(features, collator.prompt(features.shape[1], utterance["context"]), np.stack(draws))


def batches_of(prompts: list[Prompt], budget: int) -> list[list[int]]:
    """Places of the prompts that are sampled together: longest first, up to `budget` positions of the cache."""
    batches: list[list[int]] = []
    widest, limit, rows = 0, 0, 0
    for place in sorted(range(len(prompts)), key=lambda place: -len(prompts[place].tokens)):
        samples, longest = prompts[place].uniforms.shape
        grown = rows + samples, max(widest, len(prompts[place].tokens)), max(limit, longest)
        if batches and grown[0] * (grown[1] + grown[2]) <= budget:
            batches[-1].append(place)
            rows, widest, limit = grown
        else:
            batches.append([place])
            rows, widest, limit = samples, len(prompts[place].tokens), longest
    return batches


def group_of(
    utterance: dict[str, Any],
    drawn: list[Drawn],
    decode: Callable[[list[int]], str],
    weights: RewardWeights,
) -> Group:
    """Counts equal samples and rewards each; an utterance without text is one in which nobody speaks."""
    counts = Counter(tuple(tokens) for tokens, _ in drawn)
    log_p = {tuple(tokens): mine for tokens, mine in reversed(drawn)}
    reference = utterance["text"]
    samples = []
    for tokens, count in counts.items():
        named, transcript = read_output(decode(list(tokens)))
        parts = reward_parts(reference, transcript, utterance["language"] if reference else None, named)
        samples.append(Sample(list(tokens), count, log_p[tokens], parts, total_reward(parts, weights)))
    words = len(leaderboard_normalize(reference).split())
    return Group(utterance["epoch"], utterance["index"], reference, words, samples)


# ------------------------------------------------------------------------------------------------------- For a step
@dataclass
class PackedGroups:
    """Groups of one micro-batch, or parts of them, with their tensors."""

    groups: list[Group]
    batch: dict[str, torch.Tensor]
    """What `label_states` takes."""
    order: list[Sample]
    """The samples in the order in which `batch` holds their tokens."""

    def flatten(self, name: str) -> torch.Tensor:
        """(tokens,) of a list that each sample has, in the batch's order."""
        return torch.tensor([value for sample in self.order for value in getattr(sample, name)], dtype=torch.float32)

    def keep(self, name: str, values: torch.Tensor) -> None:
        """Gives each sample its own of (tokens,)."""
        each = iter(values.tolist())
        for sample in self.order:
            setattr(sample, name, [next(each) for _ in sample.tokens])

    def policy(self) -> dict[str, torch.Tensor]:
        """What the objectives take, see hebrew_asr/rl/losses.py."""
        found: dict[int, tuple[int, float, float, float]] = {}
        for number, group in enumerate(self.groups):
            advantages = group.advantages() or [0.0] * len(group.samples)
            for sample, advantage in zip(group.samples, advantages, strict=True):
                errors = -sample.reward * max(1, group.words)
                found[id(sample)] = number, advantage, sample.count / group.size(), errors
        rows = [found[id(sample)] for sample in self.order]
        group, advantage, share, errors = zip(*rows, strict=True) if rows else ((), (), (), ())
        lengths = torch.tensor([len(sample.tokens) for sample in self.order], dtype=torch.long)
        return {
            "owner": torch.arange(len(lengths)).repeat_interleave(lengths),
            "group": torch.tensor(group, dtype=torch.long),
            "advantage": torch.tensor(advantage, dtype=torch.float32),
            "share": torch.tensor(share, dtype=torch.float32),
            "errors": torch.tensor(errors, dtype=torch.float32),
            "old_log_p": self.flatten("log_p"),
            "reference_log_p": self.flatten("reference_log_p"),
        }


def pack_groups(
    utterances: list[dict[str, Any]], groups: list[Group], collator: Any, samples: list[list[Sample]] | None = None
) -> PackedGroups:
    """One micro-batch; without groups it is a second of silence, so that the processes stay in step.

    Args:
        samples: those of each group that are in it; None: all.
    """
    if not groups:
        return PackedGroups([], collator.packed([]), [])
    parts = [group.samples for group in groups] if samples is None else samples
    clip_of = [place for place, part in enumerate(parts) for _ in part]
    flat = [sample for part in parts for sample in part]
    prompts = [collator.prompt(u["features"].shape[1], u["context"]) for u in utterances]
    batch, order = pack_samples(
        [u["features"] for u in utterances],
        clip_of,
        [prompts[place] for place in clip_of],
        [sample.tokens for sample in flat],
        collator.end_of_turn_id,
        collator.in_one_row,
    )
    batch |= places_of(batch, collator.audio_token_id)
    return PackedGroups(groups, batch, [flat[i] for i in order])


def micro_batches_of(
    utterances: list[dict[str, Any]], groups: list[Group], collator: Any, budget: int, whole_groups: bool
) -> list[PackedGroups]:
    """The groups of a process's share of a step, as few micro-batches as the budget of tokens allows.

    Args:
        whole_groups: no group is divided, though it may be larger than the budget: MWER compares inside of a group.
    """
    pieces: list[tuple[dict[str, Any], Group, list[Sample]]] = []
    sizes: list[int] = []
    for utterance, group in zip(utterances, groups, strict=True):
        prompt = len(collator.prompt(utterance["features"].shape[1], utterance["context"]))
        lengths = np.array([prompt + len(sample.tokens) for sample in group.samples])
        cut = [np.arange(len(lengths))] if whole_groups else deal_step(lengths, processes=1, budget=budget)[0]
        for places in filter(len, cut):  # with a budget below one sample some parts are empty
            pieces.append((utterance, group, [group.samples[place] for place in places]))
            sizes.append(int(lengths[places].sum()))
    if not sizes:
        return []
    (deal,) = deal_step(np.array(sizes), processes=1, budget=budget)
    batches = [[pieces[i] for i in places] for places in deal if len(places)]
    return [pack_groups([u for u, *_ in b], [g for _, g, _ in b], collator, [part for *_, part in b]) for b in batches]
