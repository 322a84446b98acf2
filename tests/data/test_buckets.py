"""Aspect-ratio buckets: which shapes there are, and which of them a picture gets."""

import math
from typing import Any

import numpy as np
import pytest

from synthos.data.buckets import assign, bucket_sizes, fills
from synthos.schema import BucketConfig
from tests.data.make import config


def sizes(**buckets: Any) -> list[tuple[int, int]]:
    return bucket_sizes(config("x", buckets=BucketConfig(**buckets)))


def test_without_buckets_there_is_one_shape() -> None:
    assert bucket_sizes(config("x", height=48, width=32)) == [(48, 32)]


def test_generated_shapes_keep_area_and_aspect() -> None:
    found = sizes(areas=[512 * 512], multiple=64, max_aspect=2.0)
    assert (512, 512) in found and (704, 384) in found and (384, 704) in found and len(set(found)) == len(found)
    for height, width in found:
        assert height % 64 == width % 64 == 0 and max(height, width) <= 2 * min(height, width)
        short = min(height, width)
        assert abs(height * width - 512 * 512) <= 64 / 2 * short  # the longer edge is the multiple that comes nearest
    assert {(w, h) for h, w in found} == set(found)


@pytest.mark.parametrize("width, height", [(100, 100), (300, 100), (100, 300), (137, 91), (1, 2), (640, 480)])
def test_the_nearest_aspect_wins(width: int, height: int) -> None:
    shapes = sizes(sizes=[(64, 64), (48, 80), (80, 48)])
    distance = [abs(math.log(width / height) - math.log(w / h)) for h, w in shapes]
    assert assign(np.array([width]), np.array([height]), shapes).tolist() == [distance.index(min(distance))]


def test_of_several_areas_the_largest_that_is_not_enlarged() -> None:
    shapes = sizes(sizes=[(32, 32), (64, 64), (128, 128), (96, 160)])
    widths, heights = np.array([20, 40, 100, 500, 500]), np.array([20, 40, 100, 500, 300])
    assert assign(widths, heights, shapes).tolist() == [0, 0, 1, 2, 3]


def test_what_is_cropped_and_enlarged() -> None:
    shapes, widths, heights = [(10, 10), (10, 20)], np.array([20, 40, 5]), np.array([20, 20, 5])
    square, wide = fills(widths, heights, np.array([0, 1, 0], np.uint8), shapes)
    assert (square.samples, square.cropped, square.enlarged) == (2, 0.0, 1)
    assert (wide.samples, wide.cropped, wide.enlarged) == (1, 0.0, 0)
    (cut,) = fills(np.array([30]), np.array([20]), np.array([0], np.uint8), [(10, 10)])
    assert cut.cropped == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "buckets, fault",
    [
        ({}, "expected either sizes, as in"),
        ({"sizes": [(8, 8)], "areas": [64]}, "expected either sizes"),
        ({"sizes": []}, r"sizes: \[\] is not allowed"),
        ({"sizes": [(0, 8)]}, "sizes: .* is not allowed; expected pairs"),
        ({"areas": [64], "multiple": 0}, "multiple 0 and max_aspect 2.0 are not allowed"),
        ({"areas": [64], "max_aspect": 0.5}, "max_aspect 0.5 are not allowed"),
        ({"areas": []}, "0 shapes are described; expected 1 to 255"),
        ({"areas": [10**8], "multiple": 8}, r"\d+ shapes are described; expected 1 to 255"),
    ],
)
def test_wrong_descriptions(buckets: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.buckets.*{fault}"):
        sizes(**buckets)


def test_sizes_that_the_recipe_can_not_use() -> None:
    with pytest.raises(ValueError, match="data.buckets: 40 x 64 is no multiple of 16, which the recipe needs"):
        bucket_sizes(config("x", buckets=BucketConfig(sizes=[(64, 64), (40, 64)])), multiple=16)
