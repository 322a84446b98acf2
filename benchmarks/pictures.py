"""The pictures that loaders are measured on: scikit-image's photographs, cropped, enlarged, with a sensor's noise."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from synthos.data.write import Row, write_shards

PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
)
NOISE = 6.0  # grey levels: JPEGs of some 2 bits per pixel at quality 90, as cameras' are
QUALITY = 90


def shards(root: Path, width: int, height: int, count: int, shard_size: int) -> Path:
    """A folder whose tar/ holds `count` captioned JPEGs; one that is there is taken as it is."""
    folder = root / f"{width}x{height}-{count}"
    if not (folder / "tar").is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_shards(folder / "tar", rows(width, height, count), shard_size)
    return folder


def rows(width: int, height: int, count: int) -> Iterator[Row]:
    """The same for the same numbers, whatever the machine."""
    import skimage

    photographs = [Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB") for name in PHOTOGRAPHS]
    random = np.random.default_rng((width, height))
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        scale = min(photograph.width / width, photograph.height / height) * random.uniform(0.7, 1)
        w, h = width * scale, height * scale
        x, y = random.uniform(0, photograph.width - w), random.uniform(0, photograph.height - h)
        large = photograph.resize((width, height), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
        noisy = np.asarray(large) + random.normal(0, NOISE, (height, width, 3))
        buffer = io.BytesIO()
        Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
        yield Row(buffer.getvalue(), f"Photograph {number}.")
