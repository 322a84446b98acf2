"""Several predictions for one picture, averaged: the conjunction of what they stand for (arXiv 2206.01714)."""

import torch
from torch import Tensor


def trajectories(shown: list[list[list[int]]], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The calls of a network that pictures are composed of.

    Args:
        shown: for each request, for each picture of it, the components that it is composed of.
        device: of the results.

    Returns:
        For each call its picture, its request and its component, int64 [K]; for each picture its request, int64 [P].
    """
    pictures = [(row, parts) for row, own in enumerate(shown) for parts in own]
    calls = [(number, row, part) for number, (row, parts) in enumerate(pictures) for part in parts]
    picture, request, part = torch.tensor(calls, device=device).T
    return picture, request, part, torch.tensor([row for row, _ in pictures], device=device)


def guided_mean(values: Tensor, scale: Tensor | None, group: Tensor, count: int) -> Tensor:
    """The mean of each group [count, ...], every row guided by itself: mean of u + scale (v - u).

    Args:
        values: [K, ...] without a `scale`; else [2 K, ...], the unguided u before the v.
        scale: [K].
        group: int64 [K], as in `mean_by`.
    """
    if scale is not None:
        without, given = values.chunk(2)
        values = without + scale.view(-1, *[1] * (values.ndim - 1)) * (given - without)
    return mean_by(values, group, count)


def mean_by(values: Tensor, group: Tensor, count: int) -> Tensor:
    """The mean of `values` [K, ...] over the rows of each group, [count, ...]; `group` int64 [K], in [0, count).

    A product with a matrix, not a scatter, whose sums have no fixed order on a GPU.
    """
    member = torch.nn.functional.one_hot(group, count).to(values)  # [K, count]
    return torch.einsum("kj,k...->j...", member / member.sum(0), values)
