"""Dropping a condition in training, so that guidance has its null branch."""

import torch
from torch import Tensor


def drop(condition: Tensor, null: Tensor, uniform: Tensor, probability: float) -> Tensor:
    """`condition` [B, ...] with the null condition [1, ...] in the rows where `uniform` [B] < `probability`.

    Every condition draws its own uniform, so two conditions are dropped together with the product of their
    probabilities.
    """
    return replace(condition, null, uniform < probability)


def replace(condition: Tensor, null: Tensor, rows: Tensor) -> Tensor:
    """`condition` [B, ...] with the null condition [1, ...] in the `rows` that are true, [B].

    A select, not a product with a mask: the kept rows are bit-identical and get all of the gradient.
    """
    return torch.where(rows.view(-1, *[1] * (condition.ndim - 1)), null.to(condition), condition)
