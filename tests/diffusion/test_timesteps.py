import math
from typing import Any

import pytest
import torch

from synthos.diffusion.timesteps import index_from_uniform, shifted_grid
from synthos.keys import FixedDraws


def test_grid_is_the_shifted_line_computed_point_by_point() -> None:
    grid = shifted_grid(7, 3.0)
    lines = [1 - i / 7 for i in range(7)]
    assert grid.dtype == torch.float64
    assert grid.tolist() == pytest.approx([3 * s / (1 + 2 * s) for s in lines], abs=1e-15)


def test_grid_without_shift_is_uniform() -> None:
    assert shifted_grid(4, 1.0).tolist() == [1.0, 0.75, 0.5, 0.25]


def test_training_grid_is_the_one_of_the_euler_scheduler() -> None:
    import diffusers

    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler
    timesteps = scheduler(shift=5.0).timesteps.double()
    assert torch.allclose(shifted_grid(1000, 5.0) * 1000, timesteps, rtol=0, atol=2e-4)  # theirs is float32


def test_most_draws_are_noisy() -> None:
    grid = shifted_grid(1000, 5.0)
    assert (grid > 0.5).double().mean().item() == pytest.approx(0.834)
    assert (1000 * grid).quantile(0.5).item() == pytest.approx(833.6, abs=0.05)


def test_index_from_uniform_covers_every_index_equally() -> None:
    u = (torch.arange(40, dtype=torch.float64) + 0.5) / 40
    assert index_from_uniform(u, 10).bincount().tolist() == [4] * 10


def test_index_from_uniform_stays_inside_at_both_ends() -> None:
    u = torch.tensor([0.0, math.nextafter(1.0, 0.0), 1.0], dtype=torch.float64)
    assert index_from_uniform(u, 1000).tolist() == [0, 999, 999]
    assert index_from_uniform(u.float(), 1000).tolist() == [0, 999, 999]  # the largest below 1 rounds to 1 here


def test_validation_times_are_the_middles_of_eight_equal_strata() -> None:
    draws = FixedDraws(0, torch.arange(8), range(8))
    index = index_from_uniform(draws.uniform("t"), 1000)
    assert index.tolist() == [62, 187, 312, 437, 562, 687, 812, 937]
