"""The index of a shard: where each member lies, and what must be known of a sample before it is read.

It lies beside the shard as NNNNN.idx.npz (no pickle), or with others in a folder of its own (`synthos data index`). For
a tar of this machine it is built on first use by one pass over it. In memory it takes about 120 bytes per sample of
three members.
"""

import contextlib
import io
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from synthos.data.decode import image_size
from synthos.data.manifest import ShardLine
from synthos.data.shards import ShardPlace
from synthos.data.store.files import Storage
from synthos.data.store.location import is_remote, masked
from synthos.data.store.retry import MissingFile
from synthos.data.tar import Span, walk

FORMAT = 1
MAX_TEXT_BYTES = 1 << 20
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "avif")
MEMBER = np.dtype(
    [("offset", "<i8"), ("size", "<i8"), ("checksum", "<u4"), ("width", "<i4"), ("height", "<i4"), ("chars", "<i4")]
)


class Member(NamedTuple):
    """Where one member's bytes lie in its tar, and their CRC-32."""

    offset: int
    size: int
    checksum: int


@dataclass(frozen=True)
class ShardIndex:
    bytes: int  # of the tar
    checksum: int  # CRC-32 of the tar
    keys: NDArray[np.bytes_]  # UTF-8 [N]
    extensions: list[str]  # E of them
    # MEMBER [N, E]; size -1 where a sample lacks the member; width 0 where it is no readable picture;
    # chars 0 where it is no UTF-8 text, or blank
    members: NDArray[np.void]

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, row: int) -> str:
        return bytes(self.keys[row]).decode()

    def member(self, row: int, column: int) -> Member:
        entry = self.members[row, column]
        return Member(int(entry["offset"]), int(entry["size"]), int(entry["checksum"]))

    def line(self, name: str) -> ShardLine:
        return ShardLine(name, self.bytes, len(self), self.checksum)


def open_index(place: ShardPlace, storage: Storage | None = None) -> ShardIndex:
    """The shard's index, built and left beside it on first use (kept in memory only where that is not allowed).

    Raises ValueError for a damaged shard, for an index that does not fit its shard, and for a shard elsewhere that has
    no index.
    """
    if is_remote(place.index):
        return _read_remote(place, storage or Storage())
    path = Path(place.index)
    if path.is_file():
        index = load_index(path)
        if not is_remote(place.url):
            _check_bytes(place, index)
        return index
    if is_remote(place.url):
        raise ValueError(f"{path} is not there: the index of {masked(place.url)}; `synthos data index` writes it")
    index = build_index(place.url)
    if os.access(path.parent, os.W_OK):
        save_index(path, index)
    return index


def _read_remote(place: ShardPlace, storage: Storage) -> ShardIndex:
    try:
        data = storage.read(place.index)
    except MissingFile:
        raise ValueError(
            f"{masked(place.url)} has no index; `synthos data index {masked(place.url)} --out FOLDER` writes one, and "
            "data.shards=FOLDER then reads the shard by it"
        ) from None
    return load_index(io.BytesIO(data), masked(place.index))


def build_index(shard: str | Path) -> ShardIndex:
    """Walk the tar and read every member once; ValueError as in `tar.walk`."""
    with open(shard, "rb") as file:
        samples = walk(file, str(shard))
        extensions = sorted({extension for sample in samples.values() for extension in sample})
        members = np.zeros((len(samples), len(extensions)), MEMBER)
        members["size"] = -1
        for row, sample in enumerate(samples.values()):
            for extension, span in sample.items():
                file.seek(span[0])
                members[row, extensions.index(extension)] = _describe(extension, span, file.read(span[1]))
        file.seek(0)
        checksum = 0
        while chunk := file.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
        return ShardIndex(file.tell(), checksum, _pack(list(samples)), extensions, members)


def save_index(path: Path, index: ShardIndex) -> None:
    """Write the index; processes that meet here write the same bytes and the last rename wins."""
    part = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.part")
    with part.open("wb") as file:
        np.savez(
            file,
            tar=np.array([FORMAT, index.bytes, index.checksum], np.int64),
            keys=index.keys,
            extensions=_pack(index.extensions),
            members=index.members,
        )
    part.replace(path)


def load_index(file: Path | io.BytesIO, name: str = "") -> ShardIndex:
    """Read what `save_index` wrote; ValueError, naming it, for a damaged file or another format."""
    name = name or str(file)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in arrays.zip.infolist()):
                raise ValueError("it is compressed, and could hold more than memory does")
            version, size, checksum = arrays["tar"].tolist()
            extensions = [extension.decode() for extension in arrays["extensions"].tolist()]
            index = ShardIndex(size, checksum, arrays["keys"], extensions, arrays["members"])
    except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, MemoryError) as error:
        raise ValueError(f"{name} is damaged: {error}; delete it, and it is built anew") from None
    shape = (len(index), len(extensions))
    if version != FORMAT or index.members.dtype != MEMBER or index.members.shape != shape:
        raise ValueError(f"{name} is of another format; delete it, and it is built anew")
    return index


def _check_bytes(place: ShardPlace, index: ShardIndex) -> None:
    size = os.path.getsize(place.url)
    if size != index.bytes:
        raise ValueError(
            f"{place.url} has {size} bytes, its index says {index.bytes}: the shard is cut or was changed; "
            f"restore it, or delete {Path(place.index).name} to index it anew"
        )


def _describe(extension: str, span: Span, data: bytes) -> tuple[int, ...]:
    """One row of MEMBER."""
    width = height = chars = 0
    if extension.rsplit(".")[-1] in IMAGE_SUFFIXES:
        with contextlib.suppress(ValueError):  # width 0 says so, and the check of the inputs names the sample
            width, height = image_size(data)
    elif len(data) <= MAX_TEXT_BYTES:
        chars = _count_chars(data)
    return (*span, zlib.crc32(data), width, height, chars)


def _count_chars(data: bytes) -> int:
    try:
        return len(data.decode().strip())
    except UnicodeDecodeError:
        return 0


def _pack(words: list[str]) -> NDArray[np.bytes_]:
    """Texts as a fixed-width array, which npz stores without pickle."""
    return np.array([word.encode() for word in words], np.bytes_)
