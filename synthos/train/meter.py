"""What a step's micro-batches returned, as means over the global batch."""

import torch
from torch import Tensor

from synthos.recipes.base import Loss
from synthos.train.distributed import World

T_BINS = 4  # of train/loss_by_t


class Meter:
    """Sums of what a step's micro-batches returned, and their means over the global batch."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, loss: Loss, weights: Tensor) -> None:
        """Take in one micro-batch; values stay on the device. A sample of weight 0 counts nothing."""
        real = (weights > 0).to(loss.t)
        bins = (loss.t.detach() * T_BINS).long().clamp(max=T_BINS - 1)
        columns = {"train/loss": loss.per_sample, "train/sigma_mean": loss.t}
        columns |= {f"train/loss_{name}": value for name, value in loss.parts.items()}
        self._sum({name: value.detach() for name, value in columns.items()}, real)
        for index in range(T_BINS):
            self._sum({f"train/loss_by_t/{index}": loss.per_sample.detach()}, (bins == index).to(loss.t) * real)

    def reduce(self, world: World) -> dict[str, float]:
        """Means over every sample of every rank; a bin without samples is left out. Collective."""
        table = world.reduce(torch.stack(list(self.sums.values())).double().cpu())
        return {name: s / n for name, (s, n) in zip(self.sums, table.tolist(), strict=True) if n}

    def _sum(self, columns: dict[str, Tensor], weight: Tensor) -> None:
        for name, value in columns.items():
            # where, not a product: a NaN must stay out of bins it does not belong to
            row = torch.stack([torch.where(weight > 0, value.float(), 0.0).sum(), weight.float().sum()])
            self.sums[name] = self.sums[name] + row if name in self.sums else row
