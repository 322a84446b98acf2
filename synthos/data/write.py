"""Write pictures and captions as webdataset shards, in the naming of img2dataset, with index and manifest.

The same rows give the same bytes: members are sorted, and times and owners are fixed.
"""

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from synthos.data.decode import FORMATS, decode_image, image_size, open_image
from synthos.data.index import build_index, save_index
from synthos.data.manifest import ShardLine, fingerprint, write_manifest
from synthos.data.shards import index_path
from synthos.data.tar import MAX_MEMBER_BYTES

MAX_SHARD_SIZE = 10_000  # a key is nine digits: shard * 10,000 + row
SKIPPED = "skipped.jsonl"

Members = dict[str, bytes]  # extension -> content


@dataclass(frozen=True)
class Lost:
    """A picture that a table names and that is not to be read."""

    name: str
    reason: str

    def __str__(self) -> str:
        return self.name


Picture = Path | bytes | Lost


class Item(Protocol):
    """What becomes one sample."""

    @property
    def image(self) -> Picture:
        """The picture by which it is known in skipped.jsonl."""
        ...

    @property
    def number(self) -> int:
        """Its row in the table, from 1; 0 where its place among the items says so."""
        ...

    def members(self) -> tuple[Members, dict[str, Any]]:
        """The sample's members, and the entries of its .json; ValueError says why it can't be written."""
        ...


@dataclass(frozen=True)
class Row:
    """A picture, with or without a caption."""

    image: Picture
    caption: str | None  # None: the data set is one without captions
    facts: dict[str, Any] = field(default_factory=dict)  # further entries of its .json
    number: int = 0

    def members(self) -> tuple[Members, dict[str, Any]]:
        caption, told = caption_members(self.caption)
        data = read_picture(self.image)
        extension = check_picture(data)
        width, height = image_size(data)
        return {extension: data, **caption}, {**self.facts, **told, "width": width, "height": height}


@dataclass(frozen=True)
class Written:
    """What `write_shards` did."""

    samples: int
    skipped: int
    shards: int
    fingerprint: str
    reasons: dict[str, int]  # why rows were left out, and how many


def caption_members(caption: str | None) -> tuple[Members, dict[str, Any]]:
    """The .txt and what the .json says of it; ValueError for a caption that is empty or can't be UTF-8."""
    if caption is None:
        return {}, {}
    caption = caption.strip()
    if not caption:
        raise ValueError("no caption")
    return {"txt": encode(caption, "caption")}, {"caption": caption}


def read_picture(picture: Picture) -> bytes:
    """The bytes of a picture; ValueError says why there are none."""
    if isinstance(picture, Lost):
        raise ValueError(picture.reason)
    data = _read_file(picture) if isinstance(picture, Path) else picture
    if len(data) > MAX_MEMBER_BYTES:
        raise ValueError(f"more than {MAX_MEMBER_BYTES} bytes")
    return data


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_MEMBER_BYTES + 1)  # no more than tells that it is too much: a device may have no end
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None


def check_picture(data: bytes) -> str:
    """The extension of a whole, readable picture; a cut one is found here, not in the middle of a run. ValueError."""
    extension = FORMATS[open_image(data).format or ""]
    decode_image(data, 8, 8, "whole")
    return extension


def encode(text: str, what: str) -> bytes:
    """UTF-8; ValueError naming `what` for lone surrogates."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"its {what} is not UTF-8") from None


def write_shards(out: Path, items: Iterable[Item], shard_size: int = 1000) -> Written:
    """Write a whole data set to the folder `out`, which appears when it is finished.

    Each sample is its pictures as they are (.jpg, .png, .webp or .avif), the caption (.txt), and a .json. Items
    without a caption or a readable picture are left out and listed in skipped.jsonl.

    Raises ValueError if `out` holds anything, for an impossible shard size, and if no item can be written.
    """
    with new_data_set(out, shard_size) as part:
        return _write_all(part, items, shard_size)


@contextmanager
def new_data_set(out: Path, shard_size: int) -> Iterator[Path]:
    """A folder that becomes `out` when the block is left in order; ValueError as in `write_shards`."""
    if not 1 <= shard_size <= MAX_SHARD_SIZE:
        raise ValueError(f"shard size {shard_size} is not allowed; 1 to {MAX_SHARD_SIZE}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; a data set is never overwritten: choose another folder")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # only there if something went wrong


def _write_all(folder: Path, items: Iterable[Item], shard_size: int) -> Written:
    reasons: Counter[str] = Counter()
    lines: list[ShardLine] = []
    with (folder / SKIPPED).open("w+") as skipped:
        samples = _readable(items, skipped, reasons)
        for first in samples:  # a shard is begun only when there is a sample for it; the others follow one by one
            shard = itertools.chain([first], itertools.islice(samples, shard_size - 1))
            lines.append(_write_shard(folder, len(lines), shard))
        if not lines:
            raise ValueError(f"none of {reasons.total()} rows can be written; {_first(skipped)}")
    if not reasons:
        (folder / SKIPPED).unlink()
    write_manifest(folder, lines)
    samples_written = sum(line.samples for line in lines)
    return Written(samples_written, reasons.total(), len(lines), fingerprint(lines), dict(reasons.most_common()))


def _readable(
    items: Iterable[Item], skipped: IO[str], reasons: Counter[str]
) -> Iterator[tuple[Members, dict[str, Any]]]:
    """The samples that can be written; the others are listed in `skipped`, with the reason and the row's number."""
    for place, item in enumerate(items, 1):
        try:
            members, facts = item.members()
            encode(json.dumps(facts, ensure_ascii=False), "metadata")
        except ValueError as error:
            image = None if isinstance(item.image, bytes) else str(item.image)
            line = {"row": item.number or place, "image": image, "reason": str(error)}
            skipped.write(json.dumps(line) + "\n")
            reasons[str(error).split(":")[0]] += 1  # what stands behind the colon differs from row to row
            continue
        yield members, facts


def _first(skipped: IO[str]) -> str:
    """The first row that was left out, in words."""
    skipped.seek(0)
    line = skipped.readline()
    if not line:
        return "there is none"
    first = json.loads(line)
    return f"the first: {first['reason']} ({first['image']})"


def _write_shard(folder: Path, number: int, samples: Iterable[tuple[Members, dict[str, Any]]]) -> ShardLine:
    return write_tar(folder, number, (_keyed(number, row, *sample) for row, sample in enumerate(samples)))


def _keyed(number: int, row: int, members: Members, facts: dict[str, Any]) -> tuple[str, Members]:
    key = f"{number * MAX_SHARD_SIZE + row:09d}"
    text = json.dumps({**facts, "key": key}, sort_keys=True, ensure_ascii=False)
    return key, {**members, "json": text.encode()}


def write_tar(folder: Path, number: int, samples: Iterable[tuple[str, Members]]) -> ShardLine:
    """Write keys and members as shard `number` of a folder, with its index."""
    from webdataset.writer import TarWriter

    path = folder / f"{number:05d}.tar"
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0, keep_meta=True) as tar:
        for key, members in samples:
            tar.write({**members, "__key__": key})
    index = build_index(path)
    save_index(Path(index_path(str(path))), index)
    return index.line(path.name)
