import pytest
import torch
from torch import Tensor

from synthos.diffusion.guidance import two_scale


@pytest.fixture
def branches() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    null, image, both = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    return null, image, both


def test_unit_scales_give_the_conditional_velocity(branches: tuple[Tensor, Tensor, Tensor]) -> None:
    assert torch.allclose(two_scale(*branches, 1.0, 1.0), branches[2], atol=1e-14)


def test_zero_scales_give_the_null_velocity(branches: tuple[Tensor, Tensor, Tensor]) -> None:
    assert torch.equal(two_scale(*branches, 0.0, 0.0), branches[0])


def test_each_scale_stretches_its_own_difference(branches: tuple[Tensor, Tensor, Tensor]) -> None:
    null, image, both = branches
    at = two_scale(*branches, 2.0, 3.0)
    assert torch.allclose(two_scale(*branches, 3.0, 3.0) - at, image - null, atol=1e-14)
    assert torch.allclose(two_scale(*branches, 2.0, 4.0) - at, both - image, atol=1e-14)


def test_equal_scales_are_ordinary_guidance(branches: tuple[Tensor, Tensor, Tensor]) -> None:
    null, _, both = branches
    assert torch.allclose(two_scale(*branches, 5.0, 5.0), null + 5 * (both - null), atol=1e-13)


def test_the_image_guides_where_the_text_is_empty(branches: tuple[Tensor, Tensor, Tensor]) -> None:
    null, image, _ = branches
    guided = two_scale(null, image, image, 5.0, 5.0)  # the empty text is the null text: the last two branches agree
    assert torch.allclose(guided, null + 5 * (image - null), atol=1e-13)
    assert (guided - image).abs().max() > 1
    assert not torch.allclose(guided, two_scale(null, image.flip(0), image.flip(0), 5.0, 5.0))


def test_scales_per_sample(branches: tuple[Tensor, Tensor, Tensor]) -> None:
    rows = two_scale(*branches, torch.tensor([2.0, 7.0]), torch.tensor([1.5, 0.0]))
    for i, (g_image, g_text) in enumerate([(2.0, 1.5), (7.0, 0.0)]):
        null, image, both = (b[i : i + 1] for b in branches)
        expected = two_scale(null, image, both, g_image, g_text)
        assert torch.allclose(rows[i : i + 1], expected, atol=1e-14)
