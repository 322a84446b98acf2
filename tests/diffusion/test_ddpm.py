import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler

from synthos.diffusion.ddpm import BETAS, add_noise, offset_noise, scaled_linear_alphas
from synthos.diffusion.sampling import NOISE_SAMPLERS, STABLE_DIFFUSION, sample_noise


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_schedule_is_a_plain_loop_in_float64() -> None:
    alpha, expected = 1.0, []
    for t in range(1000):
        root = math.sqrt(BETAS[0]) + t / 999 * (math.sqrt(BETAS[1]) - math.sqrt(BETAS[0]))
        alpha *= 1 - root**2
        expected.append(alpha)
    assert torch.allclose(scaled_linear_alphas(), torch.tensor(expected, dtype=torch.float64), atol=1e-12)
    assert expected[-1] == pytest.approx(0.00466, abs=1e-5)


def test_noising_is_diffusers_own() -> None:
    scheduler = DDPMScheduler(**STABLE_DIFFUSION, clip_sample=False)
    latents, noise, t = draw(5, 4, 8, 8), draw(5, 4, 8, 8, seed=1), torch.tensor([0, 1, 500, 998, 999])
    expected = scheduler.add_noise(latents, noise, t)
    assert torch.allclose(add_noise(latents, noise, scaled_linear_alphas()[t]), expected, atol=1e-5)


def test_offset_shifts_each_channel_as_a_whole() -> None:
    noise, shift = draw(2, 4, 8, 8), draw(2, 4, 1, 1, seed=1)
    found = offset_noise(noise, shift, 0.1) - noise
    assert torch.allclose(found, (0.1 * shift).expand_as(noise), atol=1e-6)
    assert offset_noise(noise, shift, 0.0) is noise


@pytest.mark.parametrize("sampler", NOISE_SAMPLERS)
@pytest.mark.parametrize("steps", [2, 7, 50])  # one step is asked at time 1, where all is nearly done
def test_a_perfect_network_returns_the_latents(sampler: str, steps: int) -> None:
    """The noise of a single known picture, by its closed form at every time."""
    latents, alphas = draw(2, 4, 4, 4, seed=5), scaled_linear_alphas().numpy()
    levels = np.sqrt(1 / alphas - 1)  # noise over signal; Euler's times may lie between two

    def perfect(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        level = torch.from_numpy(np.interp(t.numpy(), np.arange(1000), levels))
        alpha = (1 / (1 + level**2)).view(-1, 1, 1, 1).float()
        return (x_t - alpha.sqrt() * latents) / (1 - alpha).sqrt()  # type: ignore[no-any-return]

    found = sample_noise(perfect, draw(2, 4, 4, 4), steps, sampler)
    assert (found - latents).abs().max() < 0.2  # the last step ends at time 0, or 1, where some noise is left


@pytest.mark.parametrize("sampler", NOISE_SAMPLERS)
def test_calls_share_nothing(sampler: str) -> None:
    def predict(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.5 * x_t + 0.001 * t.view(-1, 1, 1)

    def interrupted(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sample_noise(predict, x_t, 3, sampler)
        return predict(x_t, t)

    first = sample_noise(predict, draw(2, 3, 4), 6, sampler)
    assert torch.equal(first, sample_noise(interrupted, draw(2, 3, 4), 6, sampler))


def test_ddim_is_a_plain_loop_in_float64() -> None:
    alphas, x = scaled_linear_alphas(), draw(1, 2, 2).double()
    times = [1 + 250 * k for k in (3, 2, 1, 0)]
    for t in times:
        now, then = alphas[t], alphas[t - 250] if t > 250 else alphas[0]
        epsilon = 0.3 * x + t / 1000
        clean = (x - (1 - now).sqrt() * epsilon) / now.sqrt()
        x = then.sqrt() * clean + (1 - then).sqrt() * epsilon
    asked: list[int] = []

    def predict(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.append(int(t[0]))
        return 0.3 * x_t + t.view(-1, 1, 1) / 1000

    found = sample_noise(predict, draw(1, 2, 2), 4, "ddim")
    assert asked == times
    assert torch.allclose(found.double(), x, atol=1e-4)


def test_the_settings_are_those_that_sd15_publishes() -> None:
    """As in the scheduler_config.json of its repository, which names PNDM."""
    published = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "skip_prk_steps": True,
                 "set_alpha_to_one": False, "steps_offset": 1, "num_train_timesteps": 1000}  # fmt: skip
    settings = STABLE_DIFFUSION | NOISE_SAMPLERS["pndm"][1]
    assert {key: settings[key] for key in published} == published
    assert PNDMScheduler(**settings).config.timestep_spacing == "leading"
    assert DDIMScheduler(**STABLE_DIFFUSION, **NOISE_SAMPLERS["ddim"][1]).config.clip_sample is False


def test_an_unknown_sampler_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'eular'.*did you mean 'euler'.*pndm"):
        sample_noise(lambda x, t: x, draw(1, 2), 5, "eular")


@pytest.mark.parametrize("sampler", ["pndm", "ddim", "euler", "dpm"])
def test_the_most_steps_that_are_allowed_can_be_made(sampler: str) -> None:
    made = sample_noise(lambda x, t: torch.zeros_like(x), torch.ones(1, 1, 1, 1), 999, sampler)
    assert made.isfinite().all()
