"""Samples of present shards, all or some of them, in new shards: the same members, byte for byte."""

import itertools
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from synthos.data.index import ShardIndex
from synthos.data.manifest import ShardLine, fingerprint, write_manifest
from synthos.data.selection import Rows
from synthos.data.shards import ShardPlace
from synthos.data.store.files import Storage
from synthos.data.store.location import masked
from synthos.data.write import Members, new_data_set, write_tar

BLOCK_BYTES = 64 << 20  # of members in memory


@dataclass(frozen=True)
class Picked:
    """Samples of one shard: those at `rows`."""

    place: ShardPlace
    index: ShardIndex
    rows: Rows


@dataclass(frozen=True)
class Rewritten:
    """What was written."""

    samples: int
    shards: int
    bytes: int
    renamed: int  # keys that two samples of a new shard would have shared
    fingerprint: str


def rewrite(out: Path, picked: Iterable[Picked], shard_size: int, storage: Storage) -> Rewritten:
    """Write a data set to the folder `out`, which appears when it is finished; the same samples give the same bytes.

    Keys stay as they are; where two samples of a new shard would share one, the later one's gets the name of the shard
    that it comes from in front. Raises ValueError as `write_shards`, for members that have changed since they were
    indexed, and where nothing is picked.
    """
    lines: list[ShardLine] = []
    renamed = 0
    with new_data_set(out, shard_size) as folder:
        samples = _read(picked, storage)
        for first in samples:
            keys = _Keys()
            shard = itertools.chain([first], itertools.islice(samples, shard_size - 1))
            named = ((keys.take(key, name), members) for name, key, members in shard)
            lines.append(write_tar(folder, len(lines), named))
            renamed += keys.renamed
        if not lines:
            raise ValueError("no sample is left: nothing is written")
        write_manifest(folder, lines)
    sizes = (sum(line.samples for line in lines), len(lines), sum(line.bytes for line in lines))
    return Rewritten(*sizes, renamed, fingerprint(lines))


def read_members(place: ShardPlace, index: ShardIndex, rows: Iterable[int], storage: Storage) -> Iterator[Members]:
    """All members of each sample; ValueError, naming it, for one that has changed since it was indexed."""
    block: list[int] = []
    size = 0
    for row in rows:
        block.append(row)
        size += int(index.members["size"][row].clip(min=0).sum())
        if size > BLOCK_BYTES:
            yield from _read_block(place, index, block, storage)
            block, size = [], 0
    yield from _read_block(place, index, block, storage)


def _read(picked: Iterable[Picked], storage: Storage) -> Iterator[tuple[str, str, Members]]:
    """The name of its shard, key and members of each sample."""
    for one in picked:
        rows = one.rows.tolist()
        for row, members in zip(rows, read_members(one.place, one.index, rows, storage), strict=True):
            yield one.place.name, one.index.key(row), members


def _read_block(place: ShardPlace, index: ShardIndex, rows: list[int], storage: Storage) -> Iterator[Members]:
    wanted = [
        (row, extension, index.member(row, column))
        for row in rows
        for column, extension in enumerate(index.extensions)
        if index.members["size"][row, column] >= 0
    ]
    bodies = storage.read_spans(place.url, [(member.offset, member.size) for _, _, member in wanted])
    found: dict[int, Members] = {row: {} for row in rows}
    for (row, extension, member), body in zip(wanted, bodies, strict=True):
        if zlib.crc32(body) != member.checksum:
            raise ValueError(
                f"{masked(place.url)}: sample {index.key(row)!r}: its {extension} has changed since it was indexed; "
                "`synthos data validate` lists all such faults"
            )
        found[row][extension] = body
    yield from found.values()


class _Keys:
    """The keys of a new shard."""

    def __init__(self) -> None:
        self.taken: set[str] = set()
        self.renamed = 0

    def take(self, key: str, shard: str) -> str:
        """The key of a sample of `shard`, or the first like it that is free."""
        stem = shard.removesuffix(".tar").replace(".", "_")
        names = itertools.chain([key, f"{stem}-{key}"], (f"{stem}-{key}-{number}" for number in itertools.count(1)))
        free = next(name for name in names if name not in self.taken)
        self.taken.add(free)
        self.renamed += free != key
        return free
