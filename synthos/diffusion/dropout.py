"""Dropping a condition in training, so that guidance has its null branch."""

import torch
from torch import Tensor


def drop(condition: Tensor, null: Tensor, uniform: Tensor, probability: float) -> Tensor:
    """`condition` [B, ...] with the null condition [1, ...] in the rows where `uniform` [B] < `probability`.

    Every condition draws its own uniform, so two conditions are dropped together with the product of their
    probabilities. A select, not a product with a mask: the kept rows are bit-identical and get all of the gradient.
    """
    dropped = (uniform < probability).view(-1, *[1] * (condition.ndim - 1))  # [B, 1, ...]
    return torch.where(dropped, null.to(condition), condition)
