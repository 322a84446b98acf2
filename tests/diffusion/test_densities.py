import math
from statistics import NormalDist

import pytest
import torch

from synthos.diffusion.densities import cosmap_weights, logit_normal, mode, sigma_sqrt_weights
from synthos.diffusion.timesteps import index_from_uniform, shifted_grid


def test_logit_normal_is_the_sigmoid_of_a_normal() -> None:
    for u in (1e-9, 0.1, 0.5, 0.9):
        normal = 0.3 + 2.0 * NormalDist().inv_cdf(u)
        expected = 1 / (1 + math.exp(-normal))
        assert logit_normal(torch.tensor([u], dtype=torch.float64), 0.3, 2.0).item() == pytest.approx(expected)


def test_extremes_of_the_uniform_stay_in_the_interval() -> None:
    u = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    for places in (logit_normal(u), mode(u), logit_normal(u, 3.0, 5.0)):
        assert torch.isfinite(places).all() and (places >= 0).all() and (places <= 1).all()
        index = index_from_uniform(places, 1000)
        assert (index >= 0).all() and (index < 1000).all()


def test_sd3_asks_for_the_noise_levels_it_is_known_for() -> None:
    """Logit-normal places on the shift-3 grid: mean 0.715, deciles 0.454, 0.751, 0.915."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    sigma = shifted_grid(1000, 3.0)[index_from_uniform(logit_normal(u), 1000)]
    assert sigma.mean().item() == pytest.approx(0.715, abs=2e-3)
    quantiles = sigma.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    assert quantiles.tolist() == pytest.approx([0.454, 0.751, 0.915], abs=2e-3)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.29, 1.75])
def test_mode_is_an_inverse_cdf(scale: float) -> None:
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)
    places = mode(u, scale)
    assert (places[0].item(), places[-1].item()) == pytest.approx((1.0, 0.0))
    assert (places.diff() < 1e-12).all()
    for i in (137, 1900):
        x = u[i].item()
        assert places[i].item() == pytest.approx(1 - x - scale * (math.cos(math.pi * x / 2) ** 2 - 1 + x))


def test_mode_is_heavy_in_the_middle() -> None:
    places = mode((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000, 1.29)
    middle = ((places - 0.5).abs() < 0.1).double().mean().item()
    assert middle > 0.25  # uniform: a fifth


def test_weights_are_their_formulas() -> None:
    sigma = torch.tensor([0.1, 0.5, 1.0])
    assert sigma_sqrt_weights(sigma).tolist() == pytest.approx([100.0, 4.0, 1.0], rel=1e-6)
    expected = [2 / (math.pi * (1 - 2 * s + 2 * s * s)) for s in (0.1, 0.5, 1.0)]
    assert cosmap_weights(sigma).tolist() == pytest.approx(expected, rel=1e-6)


def test_cosmap_integrates_to_one() -> None:
    middles = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    assert cosmap_weights(middles).mean().item() == pytest.approx(1.0, abs=1e-6)
