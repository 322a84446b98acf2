"""Decoding, against Pillow's full decode and its resizes."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from synthos.data.decode import MAX_PIXELS, decode_image, decode_into, image_size
from tests.data.make import encoded, noise


def lanczos(image: Image.Image, height: int, width: int, whole: bool = False) -> np.ndarray:
    """[3, H, W]: the reference."""
    if whole:
        small = image.resize((width, height), Image.Resampling.LANCZOS)
    else:
        small = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(small).transpose(2, 0, 1)


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(((one.astype(float) - two) ** 2).mean(), 1e-9)))


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    data = Path(pytest.importorskip("skimage").__file__).parent / "data" / "coffee.png"
    return Image.open(data).convert("RGB")  # 600 x 400


@pytest.mark.parametrize("size", [(64, 64), (128, 96), (200, 100), (240, 416), (256, 256), (333, 500), (500, 700)])
@pytest.mark.parametrize("kind, options", [("JPEG", {"quality": 90}), ("PNG", {}), ("WEBP", {"quality": 90})])
def test_close_to_a_full_decode(
    photograph: Image.Image, size: tuple[int, int], kind: str, options: dict[str, int]
) -> None:
    data = encoded(photograph, kind, **options)
    full = Image.open(io.BytesIO(data)).convert("RGB")
    for crop in ("shared", "whole"):
        pixels = decode_image(data, *size, crop)  # type: ignore[arg-type]
        assert pixels.shape == (3, *size) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
        assert psnr(pixels, lanczos(full, *size, whole=crop == "whole")) > 35


@pytest.mark.parametrize(
    "height, width", [(64, 64), (96, 40), (40, 96), (173, 260), (399, 599), (400, 500), (417, 611)]
)
@pytest.mark.parametrize("cut", [(0, 0), (1, 0), (0, 1), (7, 3), (113, 0)])
def test_the_crop_and_the_resize_are_pillows(
    photograph: Image.Image, cut: tuple[int, int], height: int, width: int
) -> None:
    """Of a lossless picture, so that nothing else differs. The crop may be an eighth of a pixel off: 43 dB or more."""
    image = photograph.crop((0, 0, photograph.width - cut[0], photograph.height - cut[1]))
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    expected = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box)).transpose(2, 0, 1)
    data = encoded(image, "PNG", compress_level=1)
    assert psnr(decode_image(data, height, width, "shared"), expected) > 43
    squashed = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert psnr(decode_image(data, height, width, "whole"), squashed) > 52


@pytest.mark.parametrize("source", [(1, 1), (1, 300), (300, 1), (2, 77), (511, 513)])
@pytest.mark.parametrize("target", [(1, 1), (1, 64), (64, 1), (33, 65), (512, 512)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_one_colour_stays_so_at_any_size(source: tuple[int, int], target: tuple[int, int], kind: str) -> None:
    data = encoded(Image.new("RGB", (source[1], source[0]), (200, 200, 200)), kind)
    for crop in ("shared", "whole"):
        assert np.abs(decode_image(data, *target, crop).astype(int) - 200).max() <= 1  # type: ignore[arg-type]


def test_a_row_of_a_batch_is_filled(photograph: Image.Image) -> None:
    for kind, size in (("JPEG", (400, 600)), ("JPEG", (123, 77)), ("PNG", (400, 500)), ("WEBP", (64, 64))):
        data = encoded(photograph, kind)
        rows = np.full((3, *size, 3), 7, np.uint8)
        decode_into(data, rows[1], "shared")
        assert np.array_equal(rows[1].transpose(2, 0, 1), decode_image(data, *size, "shared"))
        assert (rows[0] == 7).all() and (rows[2] == 7).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_to_the_pixel(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("JPEG", "PNG"):
        data = encoded(noise(24, 40), kind, exif=exif)
        upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        assert np.array_equal(decode_image(data, *upright.shape[:2], "shared"), upright.transpose(2, 0, 1))


def test_orientation_in_xmp(photograph: Image.Image) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(photograph, "JPEG", xmp=xmp)
    assert image_size(data) == (400, 600)
    turned = photograph.transpose(Image.Transpose.ROTATE_270)
    assert psnr(decode_image(data, 60, 40, "whole"), lanczos(turned, 60, 40)) > 35


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_exif_orientation(photograph: Image.Image, orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photograph, kind, exif=exif, **({"speed": 10} if kind == "AVIF" else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert image_size(data) == upright.size
    assert psnr(decode_image(data, 96, 128, "shared"), lanczos(upright, 96, 128)) > 35
    assert psnr(decode_image(data, 96, 128, "whole"), lanczos(upright, 96, 128, whole=True)) > 35


@pytest.mark.parametrize("exif", [b"junk", b"II*\0"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_malformed_exif_is_passed_over(kind: str, exif: bytes) -> None:
    image = noise(16, 24)
    plain = encoded(image, kind)
    options = {"exif": b"Exif\0\0" + exif, "dpi": (72, 72)} if kind == "JPEG" else {"exif": exif}
    data = encoded(image, kind, **options)  # a JPEG without dpi would have Pillow look, and fail, on opening already
    assert exif in data and image_size(data) == (24, 16)
    assert np.array_equal(decode_image(data, 16, 24, "whole"), decode_image(plain, 16, 24, "whole"))


@pytest.mark.parametrize("size", [(24, 40), (17, 31), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_same_size_is_a_plain_decode(kind: str, size: tuple[int, int]) -> None:
    data = encoded(noise(*size), kind)
    plain = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
    for crop in ("shared", "whole"):
        assert np.array_equal(decode_image(data, *size, crop), plain)  # type: ignore[arg-type]


def test_centre_crop() -> None:
    image = noise(10, 30)
    middle = np.asarray(image)[:, 10:20].transpose(2, 0, 1)
    assert np.array_equal(decode_image(encoded(image, "PNG"), 10, 10, "shared"), middle)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(mode: str) -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.paste((0, 0, 0, 255), (0, 0, 4, 8))
    pixels = decode_image(encoded(clear.convert(mode), "PNG"), 8, 8, "whole")
    assert (pixels[:, :, :4] == 0).all() and (pixels[:, :, 4:] == 255).all()


def test_sixteen_bits_become_eight() -> None:
    grey = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    pixels = decode_image(encoded(Image.fromarray(grey), "PNG"), 8, 8, "whole")
    assert np.abs(pixels - grey / 65535 * 255).max() <= 0.5


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_other_jpeg_colours(photograph: Image.Image, mode: str) -> None:
    data = encoded(photograph.convert(mode), "JPEG", quality=95)
    full = Image.open(io.BytesIO(data)).convert("RGB")
    assert psnr(decode_image(data, 100, 100, "shared"), lanczos(full, 100, 100)) > 35


def test_too_many_pixels_are_refused_by_the_header() -> None:
    for width in (8001, 20_000):  # beyond our limit, and beyond Pillow's
        header = struct.pack(">IIBBBBB", width, width, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
        data = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in chunks
        )
        assert width * width > MAX_PIXELS
        with pytest.raises(ValueError, match="more than 64000000 pixels"):
            decode_image(data, 8, 8, "shared")


def test_a_huge_jpeg_is_refused_by_its_header() -> None:
    data = bytearray(encoded(noise(8, 8), "JPEG"))
    frame = data.index(b"\xff\xc0")  # length, precision, height, width
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    for meta in (b"", b"\xff\xe1\x00\x08Exif\0\0"):  # read by us, and by Pillow
        with pytest.raises(ValueError, match="more than 64000000 pixels"):
            decode_image(bytes(data[:2] + meta + data[2:]), 8, 8, "shared")


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="not a readable JPEG, PNG, WebP or AVIF"):
        decode_image(encoded(noise(8, 8), kind), 8, 8, "shared")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_a_cut_picture_is_an_error(kind: str) -> None:
    data = encoded(noise(64, 64), kind)
    with pytest.raises(ValueError, match="damaged|not a readable"):
        decode_image(data[: len(data) // 2], 16, 16, "shared")
    with pytest.raises(ValueError, match="not a readable"):
        decode_image(b"", 16, 16, "shared")


def test_a_blemished_jpeg_is_read(photograph: Image.Image) -> None:
    """Stray bytes before a segment: a strict decoder refuses, every viewer shows the picture."""
    data = encoded(photograph, "JPEG")
    blemished = data.replace(b"\xff\xda", b"\x12\x34\xff\xda", 1)
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(blemished)
    assert psnr(decode_image(blemished, 100, 150, "whole"), decode_image(data, 100, 150, "whole")) > 35
