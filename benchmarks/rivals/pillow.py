"""What the rivals' users write to make a batch of Pillow's pictures: [B, H, W, 3], never turned to channels first."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]


def fit(image: Image.Image, edge: int) -> Pixels:
    """uint8 [edge, edge, 3], resized to cover and centre-cropped; a picture of that size as it is."""
    if image.size != (edge, edge):
        image = ImageOps.fit(image, (edge, edge), Image.Resampling.BICUBIC)
    return np.asarray(image)


def stack(samples: Sequence[tuple[Pixels, str]]) -> Pixels:
    return np.stack([pixels for pixels, _ in samples])


def batches(samples: Iterable[tuple[Image.Image, str]], edge: int, size: int) -> Iterator[Pixels]:
    """Whole batches, for loaders that yield one sample at a time."""
    rows: list[tuple[Pixels, str]] = []
    for image, text in samples:
        rows.append((fit(image, edge), text))
        if len(rows) == size:
            yield stack(rows)
            rows = []
