"""Noise levels of flow matching: the shifted grid, and drawing from it by an inverse CDF."""

import torch
from torch import Tensor


def shifted_grid(num: int = 1000, shift: float = 5.0) -> Tensor:
    """Noise levels s in (0, 1], descending from pure noise, float64 [num]; the model's time is t = 1000 s.

    s' = 1, 1 - 1/num, ..., 1/num becomes s = shift s' / (1 + (shift - 1) s'): the higher the shift, the more of the
    grid lies at high noise (SD3, arXiv 2403.03206, eq. 23). Training and sampling use the same grid.
    """
    uniform = torch.linspace(1, 0, num + 1, dtype=torch.float64)[:-1]
    return shift * uniform / (1 + (shift - 1) * uniform)


def index_from_uniform(u: Tensor, num: int) -> Tensor:
    """Indices 0 .. num - 1 that are uniform when `u` [B] is uniform in [0, 1); int64 [B]."""
    return (u * num).floor().long().clamp(0, num - 1)
