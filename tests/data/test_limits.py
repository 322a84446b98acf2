"""Nothing that is read makes more of itself than it may: sizes are told and checked before anything of them is made."""

import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from safetensors.torch import save_file

from synthos.data import tar as walking
from synthos.data.decode import MAX_PIXELS, decode_image, image_size
from synthos.data.embedding import MAX_HEADER_BYTES, read_embedding
from synthos.data.index import build_index, load_index, open_index
from synthos.data.shards import ShardPlace
from synthos.data.stream import Stream
from tests.data.make import INPUTS, black_png, config, encoded, noise, pairs, picture, tar


def opened(folder: Path, **changes: Any) -> Stream:
    return Stream(config(folder, **changes), INPUTS, batch_size=1, rank=0, world=1, seed=0)


def header(name: str, size: int) -> bytes:
    """A tar header that claims any size, also a negative one."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (b"\xff" if size < 0 else b"\x80") + (size & ((1 << 88) - 1)).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("size", [-512, -1024, -(1 << 40)])
def test_a_negative_size_does_not_lead_back(tmp_path: Path, size: int) -> None:
    """tarfile of some Pythons would read the same headers for ever."""
    (tmp_path / "0.tar").write_bytes(header("a.txt", 0) + header("b.txt", 0) + header("c.txt", size) + bytes(1024))
    with pytest.raises(ValueError, match=rf"0\.tar is damaged: 'c\.txt' has {size} bytes"):
        build_index(tmp_path / "0.tar")


def test_sizes_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0.tar").write_bytes(header("a.txt", 100_000_000))
    with (tmp_path / "0.tar").open("ab") as file:
        file.truncate(512 + 100_000_256 + 1024)
    with pytest.raises(ValueError, match=r"'a\.txt' has 100000000 bytes; at most 67108864 are read"):
        build_index(tmp_path / "0.tar")
    tar(tmp_path / "1.tar", [(f"{'k' * 2000}.txt", b"")], tarfile.PAX_FORMAT)
    with pytest.raises(ValueError, match="a member's name has 2004 characters; at most 1024 are read"):
        build_index(tmp_path / "1.tar")
    tar(tmp_path / "2.tar", [(f"taken {i}.{i}.txt", b"") for i in range(walking.MAX_EXTENSIONS + 1)])
    with pytest.raises(
        ValueError, match=r"more than 256 kinds of members, as '256\.txt' .*: a key ends at the first dot"
    ):
        build_index(tmp_path / "2.tar")


def test_a_caption_has_a_limit(tmp_path: Path) -> None:
    """An index says its size; also one that lies about what is in it."""
    (tmp_path / "set").mkdir()
    shard = tar(tmp_path / "set" / "0.tar", [*pairs(["a"]), ("b.png", picture()), ("b.txt", b"x" * 2_000_000)])
    said = r"0\.tar: sample 'b' has a text of 2000000 bytes; at most 1048576 are read"
    with pytest.raises(ValueError, match=said):
        opened(tmp_path / "set")
    index = load_index(shard.with_name("0.idx.npz"))
    index.members["chars"] = 10
    np.savez(shard.with_name("0.idx.npz"), tar=np.array([1, index.bytes, index.checksum]), keys=index.keys,
             extensions=np.array([e.encode() for e in index.extensions]), members=index.members)  # fmt: skip
    with pytest.raises(ValueError, match=said):
        opened(tmp_path / "set")
    assert opened(tmp_path / "set", max_bad_fraction=0.5).next().texts("text") == ["caption a"]


def npy(shape: tuple[int, ...]) -> bytes:
    """A .npy of 32 bytes of numbers whose header claims any shape."""
    text = str({"descr": "<f4", "fortran_order": False, "shape": shape}).encode()
    text += b" " * (64 - (len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(32)


def test_an_index_fills_no_memory(tmp_path: Path) -> None:
    import zipfile

    shard = tar(tmp_path / "0.tar", pairs(["a"]))
    index = open_index(ShardPlace.beside(str(shard)))
    path = tmp_path / "0.idx.npz"
    np.savez_compressed(path, tar=np.array([1, index.bytes, index.checksum]), keys=index.keys,
                        extensions=np.array([b"png"]), members=np.zeros((1 << 20, 1), index.members.dtype))  # fmt: skip
    assert path.stat().st_size < 100_000  # of 36 MB
    with pytest.raises(ValueError, match=r"0\.idx\.npz is damaged: it is compressed"):
        load_index(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("tar.npy", npy((10**12,)))
    with pytest.raises(ValueError, match=r"0\.idx\.npz is damaged: Unable to allocate"):
        load_index(path)


def test_an_embedding_fills_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    entries = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    content = json.dumps(entries).encode()
    for data in (struct.pack("<Q", len(content)) + content, struct.pack("<Q", 1 << 62)):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"^has a header of \d+ bytes; at most {MAX_HEADER_BYTES} are read"):
            read_embedding(path)
    save_file({"tokens": torch.ones(4, 4)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"[4,4]", b"[9,9]"))
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        read_embedding(path)
    for shape in ((10**12,), (1 << 62, 8), (-5,)):
        (tmp_path / "a.npy").write_bytes(npy(shape))
        with pytest.raises(ValueError, match="^(is no array: Unable to allocate|Failed to read|cannot reshape)"):
            read_embedding(tmp_path / "a.npy")
    with (tmp_path / "large.npy").open("wb") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(ValueError, match="^has 1073741825 bytes; at most 1073741824 are read"):
        read_embedding(tmp_path / "large.npy")


def test_a_picture_of_400_megapixels_in_50_kilobytes(tmp_path: Path) -> None:
    bomb = black_png(20_000)
    assert len(bomb) < 52_000
    for decode in (image_size, lambda data: decode_image(data, 8, 8, "whole")):
        with pytest.raises(ValueError, match=f"more than {MAX_PIXELS} pixels"):
            decode(bomb)
    (tmp_path / "set").mkdir()
    tar(tmp_path / "set" / "0.tar", [*pairs(["a"]), ("b.png", bomb), ("b.txt", b"caption")])
    with pytest.raises(ValueError, match=r"0\.tar: sample 'b' has an unreadable image, or one above 64 megapixels"):
        opened(tmp_path / "set")


def test_compressed_text_in_a_picture_fills_no_memory() -> None:
    words = b"comment\0\0" + zlib.compress(bytes(200_000_000), 9)
    bomb = black_png(16, (b"zTXt", words))
    assert len(bomb) < 300_000
    with pytest.raises(ValueError, match="too large"):
        decode_image(bomb, 8, 8, "whole")


def test_whatever_is_done_to_a_picture_is_a_pixel_or_a_value_error() -> None:
    """Bytes changed at random; anything else would end a run instead of costing one sample."""
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = [encoded(noise(24, 24), kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP")]
    whole += [encoded(noise(24, 24).convert(mode), kind) for mode, kind in (("P", "PNG"), ("CMYK", "JPEG"))]
    rng, refused = np.random.default_rng(0), 0
    for number in range(2000):
        data = bytearray(whole[number % len(whole)])
        for place in rng.integers(0, len(data), 3).tolist() + rng.integers(0, 120, 1).tolist():
            data[place] = int(rng.integers(256))
        try:
            assert decode_image(bytes(data), 8, 8, "shared").shape == (3, 8, 8)
        except ValueError:
            refused += 1
    assert 0 < refused < 2000 and not ImageFile.LOAD_TRUNCATED_IMAGES
