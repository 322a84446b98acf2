import torch

from synthos.diffusion.composition import guided_mean, mean_by, trajectories

CPU = torch.device("cpu")


def test_every_picture_is_called_once_for_each_of_its_components() -> None:
    picture, request, part, owner = trajectories([[[0, 1, 2], [0], [1]], [[2]], [[0, 1, 2]]], CPU)
    assert picture.tolist() == [0, 0, 0, 1, 2, 3, 4, 4, 4]
    assert request.tolist() == [0, 0, 0, 0, 0, 1, 2, 2, 2]
    assert part.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert owner.tolist() == [0, 0, 0, 1, 2]


def test_each_row_is_guided_by_itself_before_the_mean() -> None:
    values = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    scale, group = torch.tensor([2.0, 2.0, 5.0]).double(), torch.tensor([0, 0, 1])
    one, two, three = (values[i] + scale[i] * (values[3 + i] - values[i]) for i in range(3))
    torch.testing.assert_close(guided_mean(values, scale, group, 2), torch.stack([(one + two) / 2, three]))
    assert torch.equal(guided_mean(values[:3], None, group, 2), mean_by(values[:3], group, 2))


def test_rows_of_a_group_are_averaged() -> None:
    values = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    means = mean_by(values, torch.tensor([1, 0, 1, 1, 2]), 3)
    expected = torch.stack([values[1], (values[0] + values[2] + values[3]) / 3, values[4]])
    torch.testing.assert_close(means, expected)


def test_a_group_of_one_is_that_row_exactly() -> None:
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mean_by(values, torch.tensor([2, 0, 1]), 3), values[[1, 2, 0]])
