"""An exponential moving average of what trains."""

from collections.abc import Iterable

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hebrew_asr.model.sharding import local, sharded_like


class MovingAverage:
    """An exponential moving average of parameters, in fp32, beside them on every process.

    After step n it is d^n w_0 + (1 - d) Σ d^(n-i) w_i over the steps i. A parameter that does not train yet has itself
    as its average, so that a stage may begin with it at any step.
    """

    def __init__(self, decay: float, parameters: dict[str, torch.nn.Parameter]):
        self.parameters = parameters
        self.weights = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}
        self._blend = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Takes one step's weights in."""
        averages, weights = self.weights.values(), self.parameters.values()
        self._blend([local(average) for average in averages], [local(weight.detach()) for weight in weights], None)

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            self.weights[name].copy_(sharded_like(tensor, self.weights[name]))
