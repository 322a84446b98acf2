"""Exponential moving average of the trained weights, kept on each rank's own shards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from synthos.schema import EmaConfig
from synthos.train.distributed import local, reshard


class Ema:
    """average <- d average + (1 - d) weight, float32; under warm-up d = min(decay, (1 + n) / (10 + n)) at step n."""

    def __init__(self, parameters: dict[str, nn.Parameter], config: EmaConfig) -> None:
        assert config.decay is not None
        self.decay, self.warmup = config.decay, config.warmup
        self.parameters = parameters
        self.averages: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update number `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        averages = [local(a) for a in self.averages.values()]
        torch._foreach_lerp_(averages, [local(p.detach()) for p in self.parameters.values()], 1 - decay)

    @contextmanager
    def applied(self, network: nn.Module) -> Iterator[None]:
        """The network runs with averaged weights inside; the raw ones come back bit for bit."""
        self._swap()
        reshard(network)
        try:
            yield
        finally:
            self._swap()
            reshard(network)

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            weight, average = local(parameter.detach()), local(self.averages[name])
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
