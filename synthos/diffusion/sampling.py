"""From noise to latents, along a velocity field or by predicted noise, with diffusers' schedulers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from synthos.diffusion.ddpm import BETAS, NUM_TIMES
from synthos.diffusion.timesteps import shifted_grid
from synthos.strict import unknown

Predict = Callable[[Tensor, Tensor], Tensor]  # x_t [B, ...], t [B] in [0, 1000] -> velocity or noise [B, ...]

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {  # of a velocity: name in a request -> diffusers' scheduler
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    # A second-order multistep method (arXiv 2302.04867).
    "unipc": ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
}
STABLE_DIFFUSION = {  # SD1.5's own; it leaves the spacing of times to each sampler, as diffusers then does
    "num_train_timesteps": NUM_TIMES,
    "beta_start": BETAS[0],
    "beta_end": BETAS[1],
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
NOISE_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),  # SD1.5's; arXiv 2202.09778
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),  # arXiv 2010.02502
    "euler": ("EulerDiscreteScheduler", {}),  # arXiv 2206.00364
    "dpm": ("DPMSolverMultistepScheduler", {}),  # arXiv 2211.01095
}


@torch.no_grad()
def sample_flow(predict: Predict, noise: Tensor, steps: int, shift: float, sampler: str = "euler") -> Tensor:
    """Integrate dx / dsigma = velocity from `noise` [B, ...] at sigma 1 to latents at sigma 0; float32 [B, ...].

    The noise levels are `shifted_grid(steps, shift)` for every sampler, and `predict` is called once for each. The
    scheduler is made here and forgotten: it holds state, so training and other samplings must not share it.

    Raises ValueError for an unknown sampler.
    """
    grid = shifted_grid(steps, shift)
    scheduler = build_scheduler(sampler, SAMPLERS)
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


@torch.no_grad()
def sample_noise(predict: Predict, noise: Tensor, steps: int, sampler: str = "pndm") -> Tensor:
    """From `noise` [B, ...], N(0, 1), to latents by a network that predicts the noise in x_t; float32 [B, ...].

    `predict` is given times of SD1.5's schedule, from 1000 downwards; how often depends on `steps` and `sampler` only.
    The scheduler is made here and forgotten, as in `sample_flow`. Raises ValueError for an unknown sampler.
    """
    scheduler = build_scheduler(sampler, NOISE_SAMPLERS, STABLE_DIFFUSION)
    scheduler.set_timesteps(steps, device=noise.device)
    x_t: Tensor = noise.float() * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        epsilon = predict(scheduler.scale_model_input(x_t, step), step.expand(len(x_t)))
        x_t = scheduler.step(epsilon.float(), step, x_t, return_dict=False)[0]
    return x_t


def build_scheduler(
    sampler: str, known: dict[str, tuple[str, dict[str, Any]]], shared: dict[str, Any] | None = None
) -> Any:
    """A fresh diffusers scheduler of those `known`. Raises ValueError for an unknown sampler."""
    if sampler not in known:
        raise ValueError(f"sampler: {sampler!r} is not allowed; {unknown(sampler, list(known))}")
    import diffusers

    name, settings = known[sampler]
    return getattr(diffusers, name)(**(shared or {}), **settings)
