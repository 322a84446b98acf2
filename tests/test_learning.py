"""The learning benchmark's score: pictures that match, that are swapped, and that know nothing."""

import itertools

import pytest
import torch

from benchmarks.learning import matching_score

PAIRS = list(itertools.combinations(range(8), 2))


@pytest.fixture
def references() -> torch.Tensor:
    coarse = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return coarse.repeat_interleave(16, 2).repeat_interleave(16, 3)


def test_copies_match_and_swapped_ones_do_not(references: torch.Tensor) -> None:
    assert matching_score(references, [references, references + 0.01], PAIRS) == 1.0
    swapped = references[[1, 0]]
    assert matching_score(references[:2], [swapped], [(0, 1)]) == 0.0


def test_layout_counts_and_not_the_palette_alone(references: torch.Tensor) -> None:
    picture = references[:1]
    pair = torch.cat([picture, picture.flip(3)])  # the same colours, mirrored
    assert matching_score(pair, [pair], [(0, 1)]) == 1.0
    assert matching_score(pair, [pair.flip(0)], [(0, 1)]) == 0.0


def test_pictures_that_know_nothing_score_a_half(references: torch.Tensor) -> None:
    same = references[:1].mean((2, 3), keepdim=True).expand_as(references)
    assert matching_score(references, [same], PAIRS) == 0.5
    noise = [torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(draw)) for draw in range(200)]
    assert matching_score(references, noise, PAIRS) == pytest.approx(0.5, abs=0.1)
