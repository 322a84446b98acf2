import torch

from synthos.diffusion.composition import mean_by


def test_rows_of_a_group_are_averaged() -> None:
    values = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    means = mean_by(values, torch.tensor([1, 0, 1, 1, 2]), 3)
    expected = torch.stack([values[1], (values[0] + values[2] + values[3]) / 3, values[4]])
    torch.testing.assert_close(means, expected)


def test_a_group_of_one_is_that_row_exactly() -> None:
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mean_by(values, torch.tensor([2, 0, 1]), 3), values[[1, 2, 0]])
