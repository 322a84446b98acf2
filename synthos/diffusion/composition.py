"""Several predictions for one picture, averaged: the conjunction of what they stand for (arXiv 2206.01714)."""

import torch
from torch import Tensor


def mean_by(values: Tensor, group: Tensor, count: int) -> Tensor:
    """The mean of `values` [K, ...] over the rows of each group, [count, ...]; `group` int64 [K], in [0, count).

    A product with a matrix, not a scatter, whose sums have no fixed order on a GPU.
    """
    member = torch.nn.functional.one_hot(group, count).to(values)  # [K, count]
    return torch.einsum("kj,k...->j...", member / member.sum(0), values)
