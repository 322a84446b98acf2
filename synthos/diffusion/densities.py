"""How often training asks at which noise level: densities on [0, 1] by their inverse CDFs, and loss weights."""

import math
from typing import Literal

import torch
from torch import Tensor

Density = Literal["logit_normal", "mode", "cosmap", "sigma_sqrt"]  # the last two are weights, of uniform levels
MODE_SCALE = 1.75  # at most: `mode` falls for scales from -1 to 2 / (pi - 2) = 1.7519...


def place(density: Density, u: Tensor, mean: float, std: float, scale: float) -> Tensor:
    """Uniform numbers [B] to places on the grid in [0, 1): small ones are high noise."""
    if density == "logit_normal":
        return logit_normal(u, mean, std)
    return mode(u, scale) if density == "mode" else u


def weights(density: Density, sigma: Tensor) -> Tensor:
    """Loss weights at the noise levels `sigma`, float64 [B]; 1 for a density that levels are drawn by."""
    weigh = {"cosmap": cosmap_weights, "sigma_sqrt": sigma_sqrt_weights}.get(density, torch.ones_like)
    return weigh(sigma.double())


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """sigmoid(mean + std * normal) of uniform `u` [B] in [0, 1) (arXiv 2403.03206, eq. 19)."""
    tiny = torch.finfo(torch.float64).tiny
    return torch.sigmoid(mean + std * torch.special.ndtri(u.double().clamp(min=tiny)))


def mode(u: Tensor, scale: float = 1.29) -> Tensor:
    """1 - u - scale (cos(pi u / 2)^2 - 1 + u), heavy in the middle where `scale` > 0 (arXiv 2403.03206, eq. 20).

    It falls from 1 to 0 with `u` [B], for any `scale` in [-1, 2 / (pi - 2)].
    """
    u = u.double()
    return 1 - u - scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)


def cosmap_weights(sigma: Tensor) -> Tensor:
    """2 / (pi (1 - 2 sigma + 2 sigma^2)), the density of the cosine schedule's noise levels (as eq. 21, same paper)."""
    sigma = sigma.double()
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))


def sigma_sqrt_weights(sigma: Tensor) -> Tensor:
    """sigma^-2: a loss in latents weighs as one in velocities."""
    return sigma.double() ** -2
