import itertools
import math

import pytest
import torch
from torch import Tensor

from synthos.diffusion.sampling import sample_flow
from synthos.diffusion.timesteps import shifted_grid

SAMPLERS = ["euler", "unipc"]


def noise() -> Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


def growth(x_t: Tensor, _t: Tensor) -> Tensor:
    """dx / dsigma = 0.7 x, whose solution at sigma 0 is exp(-0.7) of that at sigma 1."""
    return 0.7 * x_t


def test_the_grid_of_twenty_steps_ends_where_training_is() -> None:
    assert shifted_grid(20, 5.0)[-3:].tolist() == pytest.approx([0.469, 0.357, 0.208], abs=5e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_network_is_asked_at_the_shifted_grid(sampler: str) -> None:
    asked = []

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        assert (t.shape, t.dtype) == ((2,), torch.float32)
        asked.append(t[0].item())
        return growth(x_t, t)

    sample_flow(predict, noise(), 20, 5.0, sampler)
    assert asked == (1000 * shifted_grid(20, 5.0)).float().tolist()


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_euler_is_a_plain_loop(steps: int) -> None:
    def wavy(x_t: Tensor, t: Tensor) -> Tensor:
        return 0.7 * x_t + torch.sin(t / 300).view(-1, 1, 1)

    levels = [*shifted_grid(steps, 5.0).tolist(), 0.0]
    x_t = noise().double()
    for now, then in itertools.pairwise(levels):
        x_t = x_t + (then - now) * wavy(x_t, torch.full((2,), 1000 * now, dtype=torch.float64))
    assert torch.allclose(sample_flow(wavy, noise(), steps, 5.0).double(), x_t, atol=2e-6)


def test_euler_meets_the_closed_form_at_first_order_and_unipc_faster() -> None:
    exact = math.exp(-0.7) * noise()
    errors = {
        (sampler, steps): (sample_flow(growth, noise(), steps, 1.0, sampler) - exact).abs().max().item()
        for sampler in SAMPLERS
        for steps in (20, 40)
    }
    assert errors["euler", 20] / errors["euler", 40] == pytest.approx(2, abs=0.1)
    assert errors["unipc", 20] < errors["euler", 20] / 10


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_a_perfect_network_returns_the_latents(sampler: str, steps: int) -> None:
    latents = torch.linspace(-2, 2, 24).view(2, 3, 4)

    def perfect(x_t: Tensor, t: Tensor) -> Tensor:
        return (x_t - latents) / (t / 1000).view(-1, 1, 1)

    assert torch.allclose(sample_flow(perfect, noise(), steps, 5.0, sampler), latents, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_calls_share_nothing(sampler: str) -> None:
    def interrupted(x_t: Tensor, t: Tensor) -> Tensor:
        sample_flow(growth, x_t, 2, 3.0, sampler)
        return growth(x_t, t)

    first = sample_flow(growth, noise(), 5, 5.0, sampler)
    assert torch.equal(first, sample_flow(growth, noise(), 5, 5.0, sampler))
    assert torch.equal(first, sample_flow(interrupted, noise(), 5, 5.0, sampler))


def test_low_precision_velocities_are_integrated_in_float32() -> None:
    latents = sample_flow(lambda x, t: growth(x, t).bfloat16(), noise().bfloat16(), 20, 5.0)
    assert latents.dtype == torch.float32
    assert torch.allclose(latents, sample_flow(growth, noise(), 20, 5.0), atol=0.03)


def test_no_graph_is_kept() -> None:
    weight = torch.ones((), requires_grad=True)
    assert not sample_flow(lambda x, t: weight * growth(x, t), noise(), 3, 5.0).requires_grad


def test_an_unknown_sampler_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'eular'.*did you mean 'euler'.*unipc"):
        sample_flow(growth, noise(), 5, 5.0, "eular")
