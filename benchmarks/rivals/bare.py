"""No loader: simplejpeg at a scale that covers, OpenCV's INTER_AREA, from bytes in memory; pixels are thrown away.

What one would write by hand, and what a loader's overhead is counted from. Boxes are whole pixels.
"""

import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from benchmarks.rivals.clock import compete

Pixels = NDArray[np.uint8]


@cache
def read(folder: Path) -> list[bytes]:
    found = []
    for shard in sorted((folder / "tar").glob("*.tar")):
        with tarfile.open(shard) as tar:
            found += [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]  # type: ignore[union-attr]
    return found


def decode(data: bytes, edge: int) -> Pixels:
    """uint8 [edge, edge, 3]."""
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    eighths = -(-8 * edge // min(height, width))
    least = [-(-side * eighths // 8) for side in (height, width)] if eighths < 8 else [0, 0]
    pixels: Pixels = simplejpeg.decode_jpeg(data, min_height=least[0], min_width=least[1], min_factor=1)
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    crop = pixels[top : top + side, left : left + side]
    return crop if side == edge else cv2.resize(crop, (edge, edge), interpolation=cv2.INTER_AREA)


def epoch(folder: Path, edge: int, batch: int) -> Iterator[Any]:
    files = read(folder)
    for start in range(0, len(files) - batch + 1, batch):
        for data in files[start : start + batch]:
            decode(data, edge)
        yield range(batch)


if __name__ == "__main__":
    cv2.setNumThreads(1)
    compete(epoch, ("simplejpeg", "opencv-python-headless"))
