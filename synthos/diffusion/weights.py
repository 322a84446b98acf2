"""Loss weights by noise level."""

import torch
from torch import Tensor


def bell_weights(t: Tensor) -> Tensor:
    """The bell-shaped weight of every time of a training grid, of mean 1; float64 [num].

    w = num b / sum(b) with b(t) = exp(-2 ((t - 500) / 1000)^2) - min(b): largest at t = 500, and zero at pure noise,
    where nothing of the picture can be seen. It is defined on the whole grid, so callers index the result.

    Args:
        t: the grid of model times in [0, 1000], [num].
    """
    bell = torch.exp(-2 * ((t.double() - 500) / 1000) ** 2)
    bell = bell - bell.min()
    return bell * len(bell) / bell.sum()
