import math

import pytest
import torch

from synthos.diffusion.timesteps import shifted_grid
from synthos.diffusion.weights import bell_weights


def test_weights_against_a_plain_loop() -> None:
    grid = (1000 * shifted_grid(50, 5.0)).tolist()
    bells = [math.exp(-2 * ((t - 500) / 1000) ** 2) for t in grid]
    bells = [b - min(bells) for b in bells]
    expected = [50 * b / sum(bells) for b in bells]
    assert bell_weights(torch.tensor(grid)).tolist() == pytest.approx(expected, abs=1e-5)  # the tensor is float32


def test_weights_of_the_training_grid() -> None:
    t = 1000 * shifted_grid(1000, 5.0)
    weights = bell_weights(t)
    assert weights.dtype == torch.float64
    assert weights.mean().item() == pytest.approx(1.0, abs=1e-12)
    assert (t[0].item(), weights[0].item()) == (1000, 0)
    assert weights.max().item() == pytest.approx(2.076, abs=5e-4)
    assert t[weights.argmax()].item() == pytest.approx(500, abs=1)
    assert t[-1].item() == pytest.approx(4.98, abs=5e-3)
    assert weights[-1].item() == pytest.approx(0.032, abs=5e-4)


def test_weights_do_not_lose_precision_to_a_float32_grid() -> None:
    t = 1000 * shifted_grid(1000, 5.0)
    assert torch.allclose(bell_weights(t.float()), bell_weights(t), atol=1e-6)
