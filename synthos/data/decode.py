"""Pictures: from a file's bytes to uint8 pixels of the asked size.

JPEG is decoded at the smallest n/8 of its size that still covers the target (an inverse DCT of fewer coefficients),
which is three to eight times faster than decoding it whole; then one antialiased resize crops and scales. The crop is
given to the resize in fractions of a pixel: rounded to whole pixels it would shift small pictures by several decibels.
"""

import io
import math
import struct
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with more pictures behind it
MAX_PIXELS = 64_000_000
_ORIENTATION = 0x0112  # EXIF tag

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


def decode_image(data: bytes, height: int, width: int, crop: Literal["shared", "whole"]) -> NDArray[np.uint8]:
    """uint8 [3, height, width]: resized to cover and centre-cropped (`shared`), or squashed whole (`whole`).

    EXIF orientation is applied, transparency lies on white, 16 bits become 8. Raises ValueError for what is no JPEG,
    PNG or WebP, is damaged, or has more than `MAX_PIXELS`.
    """
    image = open_image(data)
    turn = _orientation(image)
    size = (height, width) if turn >= 5 else (width, height)  # as the picture lies in the file
    box = _cover(image.size, size) if crop == "shared" else (0.0, 0.0, *image.size)
    try:
        pixels, scale = _load(data, image, max(size[0] / (box[2] - box[0]), size[1] / (box[3] - box[1])))
    except (OSError, SyntaxError) as error:  # SyntaxError: Pillow's word for a broken PNG chunk
        raise ValueError(f"damaged {image.format}: {error}") from None
    right, bottom = min(box[2] * scale, pixels.width), min(box[3] * scale, pixels.height)
    scaled = (box[0] * scale, box[1] * scale, right, bottom)
    small = np.asarray(pixels.resize(size, Image.Resampling.BICUBIC, box=scaled))
    return np.ascontiguousarray(_upright(small, turn).transpose(2, 0, 1))


def open_image(data: bytes) -> Image.Image:
    """The picture with only its header read; ValueError as in `decode_image`."""
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"more than {MAX_PIXELS} pixels") from None
    except OSError:
        raise ValueError("not a readable JPEG, PNG or WebP") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"more than {MAX_PIXELS} pixels: {image.width} x {image.height}")
    return image


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height as the picture is seen; reads the header only; ValueError as in `decode_image`."""
    image = open_image(data)
    return (image.height, image.width) if _orientation(image) >= 5 else image.size


def _cover(source: tuple[int, int], target: tuple[int, int]) -> Box:
    """The largest centred box of the target's shape."""
    scale = max(target[0] / source[0], target[1] / source[1])
    w, h = (min(s, t / scale) for s, t in zip(source, target, strict=True))
    return (source[0] - w) / 2, (source[1] - h) / 2, (source[0] + w) / 2, (source[1] + h) / 2


def _load(data: bytes, image: Image.Image, scale: float) -> tuple[Image.Image, float]:
    """RGB pixels at `scale` or more of the picture's size, and the scale they have."""
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        eighths = min(max(math.ceil(8 * scale - 1e-9), 1), 8)
        least = [-(-edge * eighths // 8) for edge in image.size] if eighths < 8 else [0, 0]
        try:
            array = simplejpeg.decode_jpeg(data, min_width=least[0], min_height=least[1], min_factor=1)
            return Image.fromarray(array), eighths / 8
        except ValueError:  # also raised for blemishes that a decoder can pass over: Pillow decides
            pass
    return _to_rgb(image), 1.0


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; `convert` would clip it
        grey = np.asarray(image).astype(np.float64) * (255 / 65535)
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 5 to 8 swap width and height. A picture whose EXIF is malformed is seen as it lies."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # `getexif` would decode the whole picture to look behind it
    try:
        turn = image.getexif().get(_ORIENTATION, 1)
    except (SyntaxError, struct.error, KeyError, TypeError, ValueError):
        # What Pillow's TIFF reader lets out where EXIF has no TIFF header, is cut short, or has entries of a wrong
        # type. The pixels are as good as without EXIF, and viewers show them.
        return 1
    return turn if turn in range(1, 9) else 1


def _upright(pixels: NDArray[np.uint8], turn: int) -> NDArray[np.uint8]:
    """Pixels [H, W, 3] of a file with EXIF orientation `turn`, as they are to be seen."""
    if turn >= 5:
        pixels = pixels.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels[::-1] if turn in (3, 4, 7, 8) else pixels
