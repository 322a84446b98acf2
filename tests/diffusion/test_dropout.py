import math

import pytest
import torch

from synthos.diffusion.dropout import drop
from synthos.keys import FixedDraws, KeyedDraws


def keyed(num: int) -> KeyedDraws:
    return KeyedDraws(0, torch.arange(num), torch.zeros(num, dtype=torch.int64))


def test_rows_below_the_probability_become_null() -> None:
    condition, null = torch.arange(12.0).view(3, 2, 2), torch.full((1, 2, 2), -1.0)
    dropped = drop(condition, null, torch.tensor([0.1, 0.3, 0.9], dtype=torch.float64), 0.3)
    assert torch.equal(dropped[0], null[0])
    assert torch.equal(dropped[1:], condition[1:])


def test_probabilities_zero_and_one_are_exact() -> None:
    condition, null, uniform = torch.randn(512, 2), torch.zeros(1, 2), keyed(512).uniform("drop_text")
    assert torch.equal(drop(condition, null, uniform, 0.0), condition)
    assert torch.equal(drop(condition, null, uniform, 1.0), null.expand(512, 2))


def test_validation_never_drops() -> None:
    condition, uniform = torch.ones(8, 2), FixedDraws(0, torch.arange(8), range(8)).uniform("drop_text")
    assert torch.equal(drop(condition, torch.zeros(1, 2), uniform, 1.0), condition)


def test_the_type_of_the_condition_is_kept() -> None:
    condition = torch.ones(2, 3, dtype=torch.bfloat16)
    assert drop(condition, torch.zeros(1, 3), torch.tensor([0.0, 0.5]), 0.2).dtype == torch.bfloat16


def test_a_null_that_is_not_a_number_reaches_neither_kept_rows_nor_their_gradient() -> None:
    condition = torch.ones(2, 3, requires_grad=True)
    kept = drop(condition, torch.full((1, 3), math.nan), torch.tensor([0.0, 0.5]), 0.2)
    (gradient,) = torch.autograd.grad(kept[1].sum(), condition)
    assert torch.equal(kept[1], condition[1])
    assert gradient.tolist() == [[0] * 3, [1] * 3]


@pytest.mark.parametrize(("p_text", "p_image"), [(0.2, 0.3), (0.9, 0.1)])
def test_conditions_are_dropped_independently(p_text: float, p_image: float) -> None:
    num, null, draws = 4000, torch.zeros(1, 1), keyed(4000)
    text = drop(torch.ones(num, 1), null, draws.uniform("drop_text"), p_text) == 0
    image = drop(torch.ones(num, 1), null, draws.uniform("drop_image"), p_image) == 0
    for event, p in [(text, p_text), (image, p_image), (text & image, p_text * p_image)]:
        sigma = math.sqrt(p * (1 - p) / num)
        assert event.double().mean().item() == pytest.approx(p, abs=4 * sigma)
