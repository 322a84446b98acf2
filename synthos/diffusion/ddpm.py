"""Denoising diffusion with variance preserved (DDPM, arXiv 2006.11239), on Stable Diffusion's noise schedule."""

import torch
from torch import Tensor

NUM_TIMES = 1000
BETAS = (0.00085, 0.012)  # first and last; their square roots lie on a line


def scaled_linear_alphas() -> Tensor:
    """alpha-bar of every time 0 .. 999, float64 [1000], descending: the product of 1 - beta up to that time."""
    first, last = (beta**0.5 for beta in BETAS)
    betas = torch.linspace(first, last, NUM_TIMES, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def add_noise(latents: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """x_t = sqrt(alpha) latents + sqrt(1 - alpha) noise (eq. 4); `latents`, `noise` [B, ...], alpha-bar `alpha` [B]."""
    alpha = alpha.view(-1, *[1] * (latents.ndim - 1))  # [B, 1, ...]
    return alpha.sqrt().to(latents) * latents + (1 - alpha).sqrt().to(latents) * noise


def offset_noise(noise: Tensor, shift: Tensor, amount: float) -> Tensor:
    """`noise` [B, C, h, w] plus `amount` times `shift` [B, C, 1, 1]: noise whose mean varies too.

    With it a network learns to change a picture's overall brightness, which plain noise hardly covers. It is the
    noise in every sense: what is added, and what the network must predict.
    """
    return noise + amount * shift if amount else noise
