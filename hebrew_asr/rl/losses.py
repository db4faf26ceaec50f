"""Objectives of Round 3 on the samples of some utterances: GSPO, GRPO, MWER, and the distance to a reference model.

Pure functions of tensors. The tokens of all samples stand in one row, `owner` says which sample each belongs to. A
sample that was drawn several times stands there once, with its count. Each objective is a sum that gets smaller as the
policy gets better; dividing it by the number of utterances is left to the caller.

Imports nothing of this project.
"""

import torch


def sums_of_samples(values: torch.Tensor, owner: torch.Tensor, samples: int) -> torch.Tensor:
    """(tokens,) → (samples,)"""
    return values.new_zeros(samples).index_add(0, owner, values)


def means_of_samples(values: torch.Tensor, owner: torch.Tensor, samples: int) -> torch.Tensor:
    lengths = sums_of_samples(torch.ones_like(values), owner, samples)
    return sums_of_samples(values, owner, samples) / lengths


def clipped_objective(
    ratio: torch.Tensor, advantage: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """min(r · A, clip(r, 1 − low, 1 + high) · A), and where the clip is what counts, so that there is no gradient."""
    plain, clipped = ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    return torch.minimum(plain, clipped), clipped < plain


def gspo(
    log_p: torch.Tensor,
    old_log_p: torch.Tensor,
    owner: torch.Tensor,
    advantage: torch.Tensor,
    share: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Group sequence policy optimization (Zheng et al. 2025, arXiv:2507.18071, equations 5 and 7).

    Args:
        log_p, old_log_p: (tokens,) of each sampled token now, and when it was sampled.
        advantage: (samples,) the reward, normalised in its group.
        share: (samples,) of its group: how often it was drawn, over the size of the group.

    Returns:
        the sum; each sample's ratio (p / old p)^(1 / length); whether the clip holds it.
    """
    ratio = means_of_samples(log_p - old_log_p, owner, len(advantage)).exp()
    objective, is_clipped = clipped_objective(ratio, advantage, clip_low, clip_high)
    return -(share * objective).sum(), ratio.detach(), is_clipped


def grpo(
    log_p: torch.Tensor,
    old_log_p: torch.Tensor,
    owner: torch.Tensor,
    advantage: torch.Tensor,
    share: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Group relative policy optimization (Shao et al. 2024, arXiv:2402.03300, equation 3), its KL term apart.

    Ratio and clip are of each token; a sample's objective is the mean over its tokens. Arguments as of `gspo`.

    Returns:
        the sum; each token's ratio; whether the clip holds it.
    """
    ratio = (log_p - old_log_p).exp()
    objective, is_clipped = clipped_objective(ratio, advantage[owner], clip_low, clip_high)
    return -(share * means_of_samples(objective, owner, len(advantage))).sum(), ratio.detach(), is_clipped


def mwer(log_p: torch.Tensor, owner: torch.Tensor, group: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    """Minimum word error rate training (Prabhavalkar et al. 2018, arXiv:1712.01818, equations 3 and 6).

    The expected errors under the probabilities of a group's different samples, renormalised over them, less the mean of
    their errors. How often each was drawn does not count: its probability does already.

    Args:
        group: (samples,) which group each is of, numbered from 0.
        errors: (samples,) what is to be made small: word errors.
    """
    groups = int(group.max()) + 1 if len(group) else 0
    log_weight = sums_of_samples(log_p, owner, len(errors))
    highest = log_weight.detach().new_full((groups,), -torch.inf)
    highest = highest.scatter_reduce(0, group, log_weight.detach(), "amax")
    weight = (log_weight - highest[group]).exp()
    weight = weight / sums_of_samples(weight, group, groups)[group]
    mean = means_of_samples(errors, group, groups)
    return (weight * (errors - mean[group])).sum()


def kl(log_p: torch.Tensor, reference_log_p: torch.Tensor, owner: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """KL(policy ‖ reference) in nats per token, as GRPO estimates it: never negative, without bias (equation 4)."""
    log_ratio = reference_log_p - log_p
    return (share * means_of_samples(log_ratio.exp() - log_ratio - 1, owner, len(share))).sum()
