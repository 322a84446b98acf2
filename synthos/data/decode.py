"""Pictures: from a file's bytes to uint8 pixels of the asked size.

The header is read and held against the limits before anything is decoded. A JPEG is then decoded at the smallest n/8 of
its size that still covers the target (an inverse DCT of fewer coefficients), and one antialiased bicubic resize crops
and scales. Both were chosen by measurement, on photographs with sensor noise of random sizes against a full decode and
Pillow's BICUBIC of the same crop:

- 5/8 to 7/8 are left out: libjpeg-turbo has no vector code for them, so they take longer than 8/8 (13 to 17 ms against
  9 at 1600 x 1200) and are 8 dB farther from the reference (47 against 55).
- torch's resize of uint8 is Pillow's but for rounding (52 dB and more) and takes a quarter of its time (1.7 ms against
  6.9 from 600 x 600 to 512 x 512), half of that of OpenCV's INTER_AREA, which is 8 to 17 dB farther from the reference.

The crop's edges lie between pixels. Rounded to whole ones they would shift small pictures, down to 32 dB.
"""

import io
import math
import struct
import time
from typing import Literal, NamedTuple

import cv2
import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "AVIF": "avif"}  # MPO: a JPEG with more behind it
MAX_PIXELS = 64_000_000
Crop = Literal["shared", "whole"]
Pixels = NDArray[np.uint8]  # [H, W, 3] unless said otherwise
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

_ORIENTATION = 0x0112  # EXIF tag
_FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}  # orientation, after a transposition from 5 on -> OpenCV's axis
_EIGHTHS = (1, 2, 3, 4, 8)
_OFF_GRID = 1 / 8  # of a pixel: a shift that is seen less (44 dB at worst) than what the decode at n/8 does
_EARLY = 16  # pixels made before the first wanted one, at most


class TooManyPixels(ValueError):
    """A picture of more than `MAX_PIXELS`."""


class _Header(NamedTuple):
    size: tuple[int, int]  # width, height as the picture lies in the file
    turn: int  # EXIF orientation, 1 to 8; 5 to 8 swap width and height
    jpeg: bool  # one that simplejpeg can decode
    image: Image.Image | None  # opened by Pillow, where that was needed


def decode_image(data: bytes, height: int, width: int, crop: Crop) -> NDArray[np.uint8]:
    """uint8 [3, height, width]: resized to cover and centre-cropped (`shared`), or squashed whole (`whole`).

    EXIF orientation is applied, transparency lies on white, 16 bits become 8. Raises ValueError for what is no JPEG,
    PNG, WebP or AVIF, is damaged, or has more than `MAX_PIXELS`.
    """
    pixels = np.empty((height, width, 3), np.uint8)
    decode_into(data, pixels, crop)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def decode_into(data: bytes, out: Pixels, crop: Crop) -> float:
    """Like `decode_image`, into `out`, C-contiguous [height, width, 3]; after an error its content is undefined.

    Returns the seconds that it took to crop, scale and turn what was decoded.
    """
    header = _read_header(data)
    lying = out
    if header.turn != 1:
        lying = np.empty(out.shape if header.turn < 5 else (out.shape[1], out.shape[0], 3), np.uint8)
    try:
        decoded = _decode(data, header, crop, lying)
    except (OSError, SyntaxError) as error:  # SyntaxError: Pillow's word for a broken PNG chunk
        raise ValueError(f"damaged {header.image.format if header.image else 'JPEG'}: {error}") from None
    began = time.perf_counter()
    if decoded is not None:
        _resize(*decoded, lying)
    if header.turn != 1:
        _stand_up(lying, header.turn, out)
    return time.perf_counter() - began


def open_image(data: bytes) -> Image.Image:
    """The picture with only its header read; ValueError as in `decode_image`."""
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "AVIF"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooManyPixels(f"more than {MAX_PIXELS} pixels") from None
    except OSError:
        raise ValueError("not a readable JPEG, PNG, WebP or AVIF") from None
    _limit(*image.size)
    return image


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height as the picture is seen; reads the header only; ValueError as in `decode_image`."""
    (width, height), turn, *_ = _read_header(data)
    return (height, width) if turn >= 5 else (width, height)


def _limit(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise TooManyPixels(f"more than {MAX_PIXELS} pixels: {width} x {height}")


def _read_header(data: bytes) -> _Header:
    if _is_plain_jpeg(data):
        try:
            height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:  # also raised for blemishes that a decoder can pass over: Pillow decides
            pass
        else:
            _limit(width, height)
            if colors in ("YCbCr", "Gray", "RGB"):
                return _Header((width, height), 1, True, None)
    image = open_image(data)
    jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
    return _Header(image.size, _orientation(image), jpeg, image)


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether it has no APP1 segment, where EXIF and XMP tell the orientation."""
    if data[:2] != b"\xff\xd8":
        return False
    at, last = 2, len(data) - 4
    while at <= last and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in (0xE1, 0xDA):
            return marker == 0xDA
        at += 2 + max(data[at + 2] << 8 | data[at + 3], 2)
    return False


def _decode(data: bytes, header: _Header, crop: Crop, out: Pixels) -> tuple[Pixels, Box] | None:
    """Pixels as they lie in the file, at least as large as `out` wants, and the box of them that it shows.

    None where they are wanted as they are: then they are in `out`.
    """
    height, width, _ = out.shape
    box = _cover(header.size, (width, height)) if crop == "shared" else (0.0, 0.0, *header.size)
    scale = max(width / (box[2] - box[0]), height / (box[3] - box[1]))
    if header.jpeg:
        eighths = next((n for n in _EIGHTHS if n >= 8 * scale - 1e-9), 8)
        least = [-(-edge * eighths // 8) for edge in header.size] if eighths < 8 else [0, 0]
        same = header.size == (width, height)
        try:
            pixels = simplejpeg.decode_jpeg(
                data, min_width=least[0], min_height=least[1], min_factor=1, buffer=out if same else None
            )
        except ValueError:  # as above
            pass
        else:
            left, top, right, bottom = (edge * eighths / 8 for edge in box)
            return None if same else (pixels, (left, top, right, bottom))
    return np.array(_to_rgb(header.image or open_image(data))), box


def _cover(source: tuple[int, int], target: tuple[int, int]) -> Box:
    """The largest centred box of the target's shape."""
    scale = max(target[0] / source[0], target[1] / source[1])
    w, h = (min(s, t / scale) for s, t in zip(source, target, strict=True))
    return (source[0] - w) / 2, (source[1] - h) / 2, (source[0] + w) / 2, (source[1] + h) / 2


def _resize(pixels: Pixels, box: Box, out: Pixels) -> None:
    """`box` of the pixels, scaled with Keys' cubic, into `out`; the box may end beyond the pixels by part of one."""
    height, width, _ = out.shape
    across, down = _on_grid(box[0], box[2], width), _on_grid(box[1], box[3], height)
    if across is None or down is None:
        box = (box[0], box[1], min(box[2], pixels.shape[1]), min(box[3], pixels.shape[0]))
        out[:] = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, box=box))
        return
    crop = np.ascontiguousarray(pixels[down.read, across.read])
    if across.step == down.step == 1:
        out[:] = crop
        return
    planes = torch.from_numpy(crop[None]).permute(0, 3, 1, 2)
    factors = [(1 + 1e-6) / axis.step for axis in (down, across)]  # sizes are rounded down: a bit more, to lack none
    planes = F.interpolate(planes, scale_factor=factors, mode="bicubic", antialias=True)
    cv2.merge([plane[down.keep, across.keep] for plane in planes[0].numpy()], out)


class _Axis(NamedTuple):
    step: float  # from one wanted pixel to the next
    read: slice  # of what is there
    keep: slice  # of what comes of it


def _on_grid(start: float, stop: float, count: int) -> _Axis | None:
    """How to resize start..stop to `count` pixels from a whole pixel on; None if that would miss them.

    torch resizes from whole pixels only. From one before `start` some more steps may lead to it, or very near to it.
    """
    step = round((stop - start) / count, 9)
    whole = abs(start - round(start)) < 1e-6
    early = range(1 if whole else min(int(start / step), _EARLY) + 1)
    skip = min(early, key=lambda steps: abs(start - steps * step - round(start - steps * step)))
    first = round(start - skip * step)
    length = math.ceil((skip + count) * step - 1e-6)
    if abs(start - skip * step - first) > _OFF_GRID:
        return None
    if length == skip + count and step != 1:  # torch takes equal sizes for nothing to do
        return None
    return _Axis(step, slice(first, first + length), slice(skip, skip + count))


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


def _stand_up(lying: Pixels, turn: int, out: Pixels) -> None:
    """Pixels of a file with EXIF orientation `turn` as they are to be seen, into `out`."""
    if turn >= 5:
        lying = cv2.transpose(lying)
    out[:] = cv2.flip(lying, _FLIPS[turn]) if turn in _FLIPS else lying
