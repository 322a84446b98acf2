import pytest
import torch

from synthos.diffusion.noising import interpolate, velocity_target


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 1, 4, 4, generator=generator), torch.randn(3, 2, 1, 4, 4, generator=generator)


def test_ends_of_the_path_are_exact(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    latents, noise = pair
    assert torch.equal(interpolate(latents, noise, torch.zeros(3)), latents)
    assert torch.equal(interpolate(latents, noise, torch.ones(3)), noise)


def test_every_sample_has_its_own_sigma(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    latents, noise = pair
    sigma = [0.1, 0.5, 0.9]
    mixed = interpolate(latents, noise, torch.tensor(sigma, dtype=torch.float64))
    assert mixed.dtype == torch.float32
    for row, s, x0, n in zip(mixed, sigma, latents.double(), noise.double(), strict=True):
        assert torch.allclose(row.double(), (1 - s) * x0 + s * n, atol=1e-6)


def test_target_is_the_derivative_of_the_path(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    latents, noise = (x.double() for x in pair)
    step = 1e-3
    sigma = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    slope = (interpolate(latents, noise, sigma + step) - interpolate(latents, noise, sigma - step)) / (2 * step)
    assert torch.allclose(velocity_target(latents, noise), slope, atol=1e-10)


def test_target_leads_back_to_both_ends(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    latents, noise = (x.double() for x in pair)
    sigma = torch.tensor([0.3, 0.6, 1.0], dtype=torch.float64)
    x_t, velocity, s = interpolate(latents, noise, sigma), velocity_target(latents, noise), sigma.view(3, 1, 1, 1, 1)
    assert torch.allclose(x_t - s * velocity, latents, atol=1e-14)
    assert torch.allclose(x_t + (1 - s) * velocity, noise, atol=1e-14)
