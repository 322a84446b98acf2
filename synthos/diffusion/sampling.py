"""From noise to latents along a velocity field, with diffusers' schedulers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from synthos.diffusion.timesteps import shifted_grid
from synthos.strict import unknown

Predict = Callable[[Tensor, Tensor], Tensor]  # x_t [B, ...], t float32 [B] in [0, 1000] -> velocity [B, ...]

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {  # name in a request -> diffusers' scheduler
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    # A second-order multistep method (arXiv 2302.04867).
    "unipc": ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
}


@torch.no_grad()
def sample_flow(predict: Predict, noise: Tensor, steps: int, shift: float, sampler: str = "euler") -> Tensor:
    """Integrate dx / dsigma = velocity from `noise` [B, ...] at sigma 1 to latents at sigma 0; float32 [B, ...].

    The noise levels are `shifted_grid(steps, shift)` for every sampler, and `predict` is called once for each. The
    scheduler is made here and forgotten: it holds state, so training and other samplings must not share it.

    Raises ValueError for an unknown sampler.
    """
    grid = shifted_grid(steps, shift)
    scheduler = build_scheduler(sampler)
    # An array, because UniPC does arithmetic on what it is given. The grid is shifted already: the schedulers' own
    # shifts stay 1, and their own grids, which end elsewhere, stay unused.
    scheduler.set_timesteps(sigmas=grid.numpy(), device=noise.device)
    scheduler.set_begin_index(0)
    times = (1000 * grid).to(noise.device, torch.float32)  # UniPC's own timesteps are cut to integers
    x_t = noise.float()
    for time, step in zip(times, scheduler.timesteps, strict=True):
        velocity = predict(x_t, time.expand(len(x_t)))
        x_t = scheduler.step(velocity.float(), step, x_t, return_dict=False)[0]
    return x_t


def build_scheduler(sampler: str) -> Any:
    """A fresh diffusers scheduler. Raises ValueError for an unknown sampler."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: {sampler!r} is not allowed; {unknown(sampler, list(SAMPLERS))}")
    import diffusers

    name, settings = SAMPLERS[sampler]
    return getattr(diffusers, name)(**settings)
