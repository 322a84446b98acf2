"""Write pictures and captions as webdataset shards, in the naming of img2dataset, with index and manifest.

The same rows give the same bytes: members are sorted, and times and owners are fixed.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synthos.data.decode import FORMATS, decode_image, image_size, open_image
from synthos.data.index import build_index, index_path, save_index
from synthos.data.manifest import ShardLine, fingerprint, write_manifest

MAX_SHARD_SIZE = 10_000  # a key is nine digits: shard * 10,000 + row
SKIPPED = "skipped.jsonl"


@dataclass(frozen=True)
class Row:
    """One sample to be written."""

    image: Path | bytes
    caption: str
    facts: dict[str, Any] = field(default_factory=dict)  # further entries of its .json


@dataclass(frozen=True)
class Written:
    """What `write_shards` did."""

    samples: int
    skipped: int
    shards: int
    fingerprint: str


def write_shards(out: Path, rows: Iterable[Row], shard_size: int = 1000) -> Written:
    """Write a whole data set to the folder `out`, which appears when it is finished.

    Each sample is its picture as it is (.jpg, .png, .webp or .avif), the caption (.txt), and a .json. Rows without a
    caption or a readable picture are left out and listed in skipped.jsonl.

    Raises ValueError if `out` holds anything, for an impossible shard size, and if no row can be written.
    """
    if not 1 <= shard_size <= MAX_SHARD_SIZE:
        raise ValueError(f"shard size {shard_size} is not allowed; 1 to {MAX_SHARD_SIZE}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; a data set is never overwritten: choose another folder")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        written = _write_all(part, rows, shard_size)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # only there if something went wrong
    return written


def _write_all(folder: Path, rows: Iterable[Row], shard_size: int) -> Written:
    skipped: list[dict[str, Any]] = []
    samples = _readable(rows, skipped)
    lines: list[ShardLine] = []
    for first in samples:  # a shard is begun only when there is a sample for it; the others follow one by one
        shard = itertools.chain([first], itertools.islice(samples, shard_size - 1))
        lines.append(_write_shard(folder, len(lines), shard))
    if not lines:
        reason = f"the first: {skipped[0]['reason']} ({skipped[0]['image']})" if skipped else "there is none"
        raise ValueError(f"none of {len(skipped)} rows can be written; {reason}")
    if skipped:
        (folder / SKIPPED).write_text("".join(json.dumps(line) + "\n" for line in skipped))
    write_manifest(folder, lines)
    return Written(sum(line.samples for line in lines), len(skipped), len(lines), fingerprint(lines))


def _readable(rows: Iterable[Row], skipped: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The samples that can be written; the others go to `skipped`, with the reason and the row's number, from 1."""
    for number, row in enumerate(rows, 1):
        try:
            yield _sample(row)
        except (ValueError, OSError) as error:
            image = str(row.image) if isinstance(row.image, Path) else None
            skipped.append({"row": number, "image": image, "reason": getattr(error, "strerror", None) or str(error)})


def _sample(row: Row) -> dict[str, Any]:
    """Members by extension; ValueError or OSError says why there are none."""
    caption = row.caption.strip()
    if not caption:
        raise ValueError("no caption")
    text = _encode(caption)
    data = row.image.read_bytes() if isinstance(row.image, Path) else row.image
    extension = FORMATS[open_image(data).format or ""]
    decode_image(data, 8, 8, "whole")  # a cut picture is found here, not in the middle of a run
    width, height = image_size(data)
    facts = {**row.facts, "caption": caption, "width": width, "height": height}
    return {extension: data, "txt": text, "json": facts}


def _encode(caption: str) -> bytes:
    try:
        return caption.encode()
    except UnicodeEncodeError:  # lone surrogates
        raise ValueError("its caption is not UTF-8") from None


def _write_shard(folder: Path, number: int, samples: Iterable[dict[str, Any]]) -> ShardLine:
    from webdataset.writer import TarWriter

    path = folder / f"{number:05d}.tar"
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for row, sample in enumerate(samples):
            key = f"{number * MAX_SHARD_SIZE + row:09d}"
            facts = json.dumps({**sample["json"], "key": key}, sort_keys=True, ensure_ascii=False)
            tar.write({**sample, "__key__": key, "json": facts.encode()})
    index = build_index(path)
    save_index(index_path(path), index)
    return index.line(path.name)
