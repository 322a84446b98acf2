"""Initial values of layers that no file gives: torch's own defaults, each drawn by a generator keyed by its name."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from synthos.models.tensors import Tensors, seeded

NORMS = (nn.LayerNorm, nn.GroupNorm)
TRANSFORMERS = (nn.TransformerEncoder, nn.TransformerDecoder)


def fresh(module: nn.Module, seed: int, prefix: str = "") -> Tensors:
    """Every parameter of `module`, by its name behind `prefix`, as torch would start it.

    Matrices and kernels and their biases are uniform within 1 / sqrt(inputs); those of attention's three joint
    projections, and every matrix of encoder and decoder as `nn.Transformer` starts them, within sqrt(6 / (inputs +
    outputs)); attention's biases are zero; norms are the identity; what is none of these, a learned token, is N(0, 1).
    The values are the same on every rank, whatever else is drawn.
    """
    init: Tensors = {}
    xavier = {id(p) for m in module.modules() if isinstance(m, TRANSFORMERS) for p in m.parameters() if p.ndim > 1}
    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            full = f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
            bound = math.sqrt(6 / sum(parameter.shape))
            kind = ("uniform", bound) if id(parameter) in xavier else _kind(owner, name)
            init[full] = seeded(seed, full, partial(_draw, parameter.shape, *kind))
    return init


def _kind(owner: nn.Module, name: str) -> tuple[str, float]:
    """How a parameter starts: `constant` value, `uniform` bound, or `normal` deviation."""
    if isinstance(owner, NORMS):
        return "constant", float(name == "weight")
    if isinstance(owner, nn.MultiheadAttention):
        return ("uniform", math.sqrt(6 / sum(owner.in_proj_weight.shape))) if name.endswith("weight") else _ZERO
    if isinstance(owner, nn.modules.linear.NonDynamicallyQuantizableLinear) and name == "bias":
        return _ZERO  # the output projection of attention
    if isinstance(owner, nn.Linear | nn.Conv2d):
        return "uniform", 1 / math.sqrt(owner.weight[0].numel())
    return "normal", 1.0


_ZERO = ("constant", 0.0)


def _draw(shape: torch.Size, kind: str, value: float, generator: torch.Generator) -> Tensor:
    if kind == "constant":
        return torch.full(shape, value)
    if kind == "uniform":
        return (2 * torch.rand(shape, generator=generator) - 1) * value
    return value * torch.randn(shape, generator=generator)
