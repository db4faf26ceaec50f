"""Muon for the matrices of a model, AdamW for all else (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

Muon turns the momentum of a matrix into the nearest matrix whose singular values are one (most: between 0.5 and 1.3),
and moves along that. Its step is scaled to the root mean square that AdamW's has (Liu et al. 2025, arXiv:2502.16982),
so that rates mean the same. `torch.optim.Muon` computes the same on one device; here the processes share the work, and
sharded weights are gathered.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed

from hebrew_asr.model.sharding import sharded_like, whole

MOMENTUM = 0.95
ITERATIONS = 5
A, B, C = 3.4445, -4.775, 2.0315  # of Jordan et al.: a polynomial that is steepest at zero
RMS_OF_ADAMW = 0.2
BUFFER = "momentum_buffer"
AT_ONCE = 2**24  # numbers of matrices that are multiplied in one call
BUCKET = 128 * 1024**2  # numbers of matrices that move at once, which bounds the memory it takes beside the moments


def by_muon(name: str, dimensions: int) -> bool:
    """Whether a parameter is a matrix between vectors: no table of embeddings, bias, norm or convolution."""
    return dimensions == 2 and not re.search(r"(^|\.)(embed_tokens|lm_head)\.", name)


def operations(shape: Iterable[int]) -> float:
    """Floating-point operations of `orthogonal` for a matrix."""
    short, long = sorted(shape)
    return ITERATIONS * (4.0 * short * short * long + 2.0 * short**3)


def orthogonal(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """The nearest matrices with all singular values about one, by Newton and Schulz's iteration in their own type.

    Neighbours of one shape, transposed or not, are multiplied in one call: small ones cost more to call for than to
    multiply.
    """
    found = []
    for _, alike in itertools.groupby(matrices, key=lambda matrix: sorted(matrix.shape)):
        wide = [matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix for matrix in alike]
        for part in torch.stack(wide).split(max(1, AT_ONCE // wide[0].numel())):
            part = part / part.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # so that no singular value is above one
            for _ in range(ITERATIONS):
                square = part @ part.mT
                part = torch.baddbmm(part, torch.baddbmm(square, square, square, beta=B, alpha=C), part, beta=A)
            found += part
    return [each.mT if one.shape[0] > one.shape[1] else each for each, one in zip(found, matrices, strict=True)]


class Muon(torch.optim.AdamW):
    """AdamW, but for groups with `matrices`; those have one moment, `momentum_buffer`, where AdamW has two.

    The processes share the matrices; each makes its own orthogonal and sends them to the others, so that all move by
    the same bits. Gradients must be reduced by then.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["matrices"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        moving = [
            (matrix, group)
            for group in groups
            if group["matrices"]
            for matrix in group["params"]
            if matrix.grad is not None
        ]
        moving.sort(key=lambda pair: (-pair[0].numel(), min(pair[0].shape)))  # so that neighbours are alike
        while moving:
            count = numbers_within(BUCKET, [matrix.numel() for matrix, _ in moving])
            self.move(moving[:count])
            moving = moving[count:]
        return loss

    @torch.no_grad()
    def move(self, moving: list[tuple[torch.Tensor, dict[str, Any]]]) -> None:
        alone = not torch.distributed.is_initialized()
        rank, processes = (0, 1) if alone else (torch.distributed.get_rank(), torch.distributed.get_world_size())
        directions = self.directions([matrix for matrix, _ in moving])
        mine = orthogonal(directions[rank::processes])
        directions = exchanged(mine, directions, rank, processes) if processes > 1 else mine
        alike: dict[tuple[float, float], list[int]] = {}  # places of those that move by as much, all in one kernel
        for place, (matrix, group) in enumerate(moving):
            length = group["lr"] * RMS_OF_ADAMW * math.sqrt(max(matrix.shape))
            alike.setdefault((length, 1 - group["lr"] * group["weight_decay"]), []).append(place)
        for (length, kept), places in alike.items():
            matrices = [moving[place][0] for place in places]
            along = [sharded_like(directions[place].to(m.dtype), m) for place, m in zip(places, matrices, strict=True)]
            torch._foreach_mul_(matrices, kept)
            torch._foreach_add_(matrices, along, alpha=-length)

    def directions(self, matrices: list[torch.Tensor]) -> list[torch.Tensor]:
        """Momentum as Nesterov has it, in bf16, of sharded matrices gathered."""
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        for matrix, gradient in zip(matrices, gradients, strict=True):
            if BUFFER not in self.state[matrix]:
                self.state[matrix][BUFFER] = torch.zeros_like(gradient)
        buffers = [self.state[matrix][BUFFER] for matrix in matrices]
        torch._foreach_lerp_(buffers, gradients, 1 - MOMENTUM)
        return [whole(moment.bfloat16()) for moment in torch._foreach_lerp(gradients, buffers, MOMENTUM)]


def exchanged(mine: list[torch.Tensor], like: list[torch.Tensor], rank: int, processes: int) -> list[torch.Tensor]:
    """All matrices, of which each process has every so manyth, by one exchange."""
    shares = [sum(matrix.numel() for matrix in like[other::processes]) for other in range(processes)]
    sent = like[0].new_zeros(max(shares))
    sent[: shares[rank]] = torch.cat([matrix.flatten() for matrix in mine]) if mine else sent[:0]
    received = like[0].new_empty(processes * len(sent))
    torch.distributed.all_gather_into_tensor(received, sent)
    found = list(like)
    for other, part in enumerate(received.view(processes, -1)):
        theirs = like[other::processes]
        parts = part[: shares[other]].split([matrix.numel() for matrix in theirs])
        found[other::processes] = [numbers.view(matrix.shape) for numbers, matrix in zip(parts, theirs, strict=True)]
    return found


def numbers_within(limit: int, sizes: list[int]) -> int:
    """How many of the first sizes sum to at most `limit`; at least one."""
    return max(1, int((torch.tensor(sizes).cumsum(0) <= limit).sum()))
