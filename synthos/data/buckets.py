"""Aspect-ratio buckets: the shapes in which pictures are read, and which of them fits a picture best.

Of several areas (multi-resolution) a picture gets the largest whose bucket it covers without being enlarged, else the
smallest; within an area, the bucket whose aspect ratio is nearest to its own, on a logarithmic scale.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from synthos.schema import DataConfig

MAX_BUCKETS = 255
Size = tuple[int, int]  # height, width in pixels


def bucket_sizes(config: DataConfig, multiple: int = 1) -> list[Size]:
    """The shapes of a run's pictures, at least one; `multiple` is what the recipe's sizes must divide by.

    Raises ValueError for shapes that the recipe can't use, and for a description of none or too many.
    """
    buckets = config.buckets
    if buckets is None:
        return [(config.height, config.width)]
    if (buckets.sizes is None) == (buckets.areas is None):
        raise ValueError("data.buckets: expected either sizes, as in [[512, 512], [448, 576]], or areas")
    if buckets.sizes is not None:
        sizes = [*buckets.sizes]
        if not sizes or any(min(size) < 1 for size in sizes):
            raise ValueError(f"data.buckets.sizes: {buckets.sizes} is not allowed; expected pairs of height and width")
    else:
        if buckets.multiple < 1 or not 1 <= buckets.max_aspect < math.inf:
            raise ValueError(
                f"data.buckets: multiple {buckets.multiple} and max_aspect {buckets.max_aspect} are not allowed; "
                "expected whole pixels above 0, and a ratio of 1 or more"
            )
        sizes = [size for area in buckets.areas or [] for size in _of_area(area, buckets.multiple, buckets.max_aspect)]
    sizes = [*dict.fromkeys(sizes)]
    if not 1 <= len(sizes) <= MAX_BUCKETS:
        raise ValueError(f"data.buckets: {len(sizes)} shapes are described; expected 1 to {MAX_BUCKETS}")
    wrong = [size for size in sizes if size[0] % multiple or size[1] % multiple]
    if wrong:
        raise ValueError(
            f"data.buckets: {wrong[0][0]} x {wrong[0][1]} is no multiple of {multiple}, which the recipe needs; "
            f"expected height and width in steps of {multiple}"
        )
    return sizes


def _of_area(area: int, multiple: int, max_aspect: float) -> list[Size]:
    """For each shorter edge the longer one that comes nearest to the area, in steps of `multiple`, the square first."""
    shorter = range(multiple, math.isqrt(area) + multiple, multiple)
    pairs = [(short, round(area / short / multiple) * multiple) for short in shorter]
    allowed = [(short, long) for short, long in pairs if short <= long <= max_aspect * short]
    return [size for short, long in reversed(allowed) for size in ((short, long), (long, short))]


def assign(widths: NDArray[np.integer], heights: NDArray[np.integer], sizes: list[Size]) -> NDArray[np.uint8]:
    """The bucket of each picture [N], by its number in `sizes`."""
    shapes = np.array(sizes, np.float64)
    order = np.argsort(shapes.prod(1), kind="stable")[::-1]  # largest area first
    w, h = widths.astype(np.float64), heights.astype(np.float64)
    best = np.full(len(w), -1, np.int64)
    for group in _groups(shapes[order].prod(1)):
        numbers = order[group]
        aspects = np.log(shapes[numbers, 1] / shapes[numbers, 0])
        nearest = numbers[np.abs(np.log(w / h)[:, None] - aspects).argmin(1)]
        covers = (w >= shapes[nearest, 1]) & (h >= shapes[nearest, 0])
        best = np.where((best < 0) & covers, nearest, best)
    return np.where(best < 0, nearest, best).astype(np.uint8)


def _groups(areas: NDArray[np.float64]) -> list[slice]:
    """Runs of like areas (within a third), of `areas` that descend."""
    starts = [0]
    for row, area in enumerate(areas):
        if area < areas[starts[-1]] * 2 / 3:
            starts.append(row)
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(areas)], strict=True)]


@dataclass(frozen=True)
class BucketFill:
    """How well a bucket suits its pictures."""

    height: int
    width: int
    samples: int
    cropped: float  # mean share of a picture's area that is cut off
    enlarged: int  # pictures smaller than the bucket


def fills(
    widths: NDArray[np.integer], heights: NDArray[np.integer], buckets: NDArray[np.uint8], sizes: list[Size]
) -> list[BucketFill]:
    """One line for each bucket, also where it is empty."""
    found = []
    for number, (height, width) in enumerate(sizes):
        w, h = (edge[buckets == number].astype(np.float64) for edge in (widths, heights))
        scale = np.maximum(width / w, height / h)
        kept = (width * height) / (scale**2 * w * h)
        cropped = float(1 - kept.mean()) if len(w) else 0.0
        found.append(BucketFill(height, width, len(w), cropped, int((scale > 1).sum())))
    return found
