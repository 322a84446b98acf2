"""A resampler that maps the states of one long text to the states of N short component texts.

A Perceiver (arXiv 2103.03206) of learned queries, without time: ELLA's (arXiv 2403.05135) less its time-aware norms,
with one bank of queries for each component.
"""

import math
from functools import partial
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional

from synthos.models.tensors import Tensors, seeded

EPSILON = 1e-6  # of every LayerNorm; none has parameters


class Attention(nn.Module):
    """Multi-head attention of queries [B, N, T, D] to themselves, each component apart, and to its text [B, L, D]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, z: Tensor, text: Tensor) -> Tensor:
        shape = z.shape  # [B, N, T, D]
        seen = self.key_value(text).unsqueeze(1).expand(-1, shape[1], -1, -1)  # one projection serves all components
        keys = torch.cat([self.key_value(z), seen], dim=2)  # [B, N, T + L, 2 D]
        key, value = keys.flatten(0, 1).chunk(2, dim=-1)
        query = self.query(z).flatten(0, 1)  # [B N, T, D]
        query, key, value = map(self._heads, (query, key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value)  # [B N, heads, T, D / heads]
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(shape))
        return result

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)  # [B N, heads, tokens, D / heads]


class Layer(nn.Module):
    """z += attention(LN(z), LN(text)); z += MLP(LN(z)), its activation the squared ReLU (arXiv 2109.08668)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, num_heads)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, z: Tensor, text: Tensor) -> Tensor:
        """`z` [B, N, T, D]; `text` [B, L, D] is normalised already: without parameters, once does for all layers."""
        z = z + self.attention(normalise(z), text)
        result: Tensor = z + self.down(functional.relu(self.up(normalise(z))).square())
        return result


class Decomposer(nn.Module):
    """States of a text [B, L, D] to those of its components [B, N, T, D].

    Components never attend to each other. There is no mask: padding is part of the text, as it is for the transformer.

    Args:
        num_components: N.
        num_tokens: T of each component.
        width: D, of the text's states.
        num_heads: of attention; must divide `width`.
        num_layers: of attention and MLP.

    Raises ValueError for heads that do not divide the width.
    """

    def __init__(self, num_components: int, num_tokens: int, width: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(
                f"recipe.num_heads: {num_heads} is not allowed; expected a divisor of the text's width {width}"
            )
        self.queries = nn.Parameter(torch.empty(num_components, num_tokens, width))
        self.layers = nn.ModuleList(Layer(width, num_heads) for _ in range(num_layers))

    def forward(self, text: Tensor) -> Tensor:
        z = self.queries.to(text.dtype).expand(len(text), -1, -1, -1)
        text = normalise(text)
        for layer in self.layers:
            z = layer(z, text)
        return z


def normalise(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension, without parameters."""
    return functional.layer_norm(x, x.shape[-1:], eps=EPSILON)


def initial_values(decomposer: Decomposer, seed: int, prefix: str = "") -> Tensors:
    """How each parameter starts, under its name after `prefix`.

    Queries N(0, 1 / D). Linear layers as torch's own: MLPs uniform within 1 / sqrt(fan in), weights and biases;
    attention as `nn.MultiheadAttention`, whose input projection is Xavier-uniform as one matrix, biases zero.
    """
    width = decomposer.queries.shape[-1]
    init: Tensors = {}
    for name, parameter in decomposer.named_parameters():
        full, shape = f"{prefix}{name}", parameter.shape
        if name == "queries":
            init[full] = seeded(seed, full, partial(_normal, shape, width**-0.5))
        elif "attention" in name and name.endswith("bias"):
            init[full] = partial(torch.zeros, shape)
        elif "attention.query" in name or "attention.key_value" in name:
            init[full] = seeded(seed, full, partial(_uniform, shape, math.sqrt(6 / (4 * width))))
        else:
            fan_in = 4 * width if ".down." in name else width
            init[full] = seeded(seed, full, partial(_uniform, shape, fan_in**-0.5))
    return init


def mean_cosine(components: Tensor) -> Tensor:
    """Mean cosine of all pairs of each row's components [B, N, T, D], each as one vector, N at least 2; [B].

    1: they say the same, and the composition is no more than one of them.
    """
    unit = functional.normalize(components.float().flatten(2), dim=-1)  # [B, N, T D]
    pairs = list(combinations(range(unit.shape[1]), 2))
    return torch.stack([(unit[:, i] * unit[:, j]).sum(-1) for i, j in pairs]).mean(0)


def _normal(shape: torch.Size, std: float, generator: torch.Generator) -> Tensor:
    return std * torch.randn(shape, generator=generator)


def _uniform(shape: torch.Size, bound: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
