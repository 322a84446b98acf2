"""The straight path from latents to noise (flow matching, arXiv 2210.02747; rectified flow, arXiv 2209.03003)."""

from torch import Tensor


def interpolate(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t = (1 - sigma) latents + sigma noise; `latents` and `noise` [B, ...], `sigma` [B] in [0, 1]."""
    sigma = sigma.to(latents.dtype).view(-1, *[1] * (latents.ndim - 1))  # [B, 1, ...]
    return (1 - sigma) * latents + sigma * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """d x_t / d sigma = noise - latents, what a velocity network predicts; its negative gives complementary colours."""
    return noise - latents
