"""Learning rates against closed forms, gradient norms against plain sums, AdamW against a float64 loop."""

import math

import pytest
import torch
from torch import nn

from synthos.schema import OptimConfig
from synthos.train.optim import build_optimizer, clip_gradients, lr_multiplier, set_lr


def config(**changes: object) -> OptimConfig:
    values = {
        "name": "adamw",
        "lr": 1e-3,
        "lr_groups": {},
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "schedule": "constant",
        "warmup_steps": 0,
        "decay_steps": None,
        "steps": 10,
        "epochs": None,
        "clip": None,
    }
    return OptimConfig(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("step", "value"), [(0, 0.0), (10, 0.289), (100, 0.556), (1000, 0.833), (4000, 1.0), (12000, 1 / 3), (16000, 0.0)]
)
def test_log_warmup_has_the_published_values(step: int, value: float) -> None:
    assert lr_multiplier("log_warmup_linear", step, 4000, 16000) == pytest.approx(value, abs=5e-4)


def test_schedules_end_and_warm_up() -> None:
    assert [lr_multiplier("constant", s, 4, 10) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    for schedule in ("linear", "cosine"):
        assert lr_multiplier(schedule, 4, 4, 10) == 1.0
        assert lr_multiplier(schedule, 7, 4, 10) == pytest.approx(0.5)
        assert lr_multiplier(schedule, 10, 4, 10) == pytest.approx(0.0, abs=1e-12)
        assert lr_multiplier(schedule, 25, 4, 10) == pytest.approx(0.0, abs=1e-12)
    assert lr_multiplier("cosine", 5, 0, 20) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_groups_have_their_own_rate() -> None:
    groups = {"a": [nn.Parameter(torch.ones(2))], "b": [nn.Parameter(torch.ones(2))]}
    optimizer = build_optimizer(groups, config(lr_groups={"b": 1e-2}, schedule="linear"))
    assert set_lr(optimizer, config(schedule="linear"), 5, 10) == {"a": pytest.approx(5e-4), "b": pytest.approx(5e-3)}


def test_unknown_group_is_named() -> None:
    with pytest.raises(ValueError, match="optim.lr_groups.*'c'.*a"):
        build_optimizer({"a": [nn.Parameter(torch.ones(2))]}, config(lr_groups={"c": 1.0}))


def test_adamw_with_its_ready_made_state_follows_the_definition() -> None:
    start = torch.tensor([0.5, -1.0, 2.0])
    parameter = nn.Parameter(start.clone())
    settings = config()
    optimizer = build_optimizer({"a": [parameter]}, settings)
    weight, m, v = start.double(), torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for step in range(1, 6):
        gradient = torch.tensor([0.1, -0.2, 0.3]) * step
        parameter.grad = gradient.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient.double(), 0.99 * v + 0.01 * gradient.double() ** 2
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
        weight = weight * (1 - 1e-3 * 0.1) - 1e-3 * update
    torch.testing.assert_close(parameter.detach().double(), weight, rtol=1e-6, atol=1e-6)


def test_clipping_scales_all_groups_by_their_joint_norm() -> None:
    groups = {"a": [nn.Parameter(torch.zeros(2))], "b": [nn.Parameter(torch.zeros(1))]}
    groups["a"][0].grad, groups["b"][0].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    norms, total = clip_gradients(groups, 1.0)
    assert norms == {"a": pytest.approx(3.0), "b": pytest.approx(4.0)} and total == pytest.approx(5.0)
    torch.testing.assert_close(groups["a"][0].grad, torch.tensor([0.6, 0.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(groups["b"][0].grad, torch.tensor([0.8]), atol=1e-5, rtol=0)
