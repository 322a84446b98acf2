"""What the tests of the data package are made of: small pictures, small tars, a config."""

import io
import os
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from synthos.batch import Input
from synthos.data.write import Row, write_shards
from synthos.schema import DataConfig

INPUTS = {"image": Input("image", ("jpg", "jpeg", "png", "webp")), "text": Input("text", ("txt",))}


def picture(color: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (16, 16), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture whose every pixel differs."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def black_png(width: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A square of one bit per pixel, all of it black."""
    rows = zlib.compressobj(9)
    pixels = b"".join(rows.compress(bytes((width + 7) // 8 + 1)) for _ in range(width)) + rows.flush()
    every = (
        (b"IHDR", struct.pack(">IIBBBBB", width, width, 1, 0, 0, 0, 0)),
        *chunks,
        (b"IDAT", pixels),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in every
    )


class Payload:
    """What unpickling it does: it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def tar(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar of exactly these members, in this order."""
    with tarfile.open(path, "w", format=kind) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def change(shard: Path, member: str) -> None:
    """Flip bits in the middle of a member; every size and header stays."""
    with tarfile.open(shard) as file:
        place = file.getmember(member)
    data = bytearray(shard.read_bytes())
    data[place.offset_data + place.size // 2] ^= 0xFF
    shard.write_bytes(data)


def pairs(keys: list[str]) -> list[tuple[str, bytes]]:
    """A picture and a caption for each key."""
    return [m for key in keys for m in ((f"{key}.png", picture()), (f"{key}.txt", f"caption {key}".encode()))]


def parquet(path: Path, rows: list[dict[str, Any]], group: int = 4) -> Path:
    """A Parquet file of these rows, `group` of them in a row group."""
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def data_set(folder: Path, samples: int, shard_size: int, first: int = 0) -> Path:
    """Captioned pictures, each of its own colour."""
    rows = [Row(picture((i % 256, i // 256, 7)), f"caption {i}", {"number": i}) for i in range(first, first + samples)]
    write_shards(folder, rows, shard_size)
    return folder


def config(shards: Any, **changes: Any) -> DataConfig:
    values: dict[str, Any] = {"name": "set", "validation": None, "holdout_fraction": 0.0, "height": 8, "width": 8}
    values |= {"mix": None, "buckets": None, "window": 2, "lanes": None, "tail": "carry", "workers": 0}
    values |= {"read": "auto", "cache": None, "cache_gb": None, "known_bad": None}
    if changes.get("streaming"):
        values["window"] = 16  # as in configs/data: no other has an effect
    values |= {"max_bad_fraction": 0.001, "max_bad_per_shard": 20, "prepare": None, **changes}
    return DataConfig(shards=shards if isinstance(shards, list) or shards is None else str(shards), **values)
