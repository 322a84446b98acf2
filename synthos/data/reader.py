"""From read instructions to a batch. Readers hold no state, so neither their number nor a restart of one can matter.

A sample that can't be used is replaced by another one of its source and bucket, drawn by a hash of its id and epoch:
the same on any rank, in any reader, at any time. The world's failures (a store, a disk) are never a sample's fault.
"""

import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from synthos.batch import Batch, Fault, Input
from synthos.data.buckets import Size, assign
from synthos.data.decode import TooManyPixels, decode_into
from synthos.data.selection import sized_input
from synthos.data.shelf import Shelf, View
from synthos.data.source import Source
from synthos.data.store.location import is_remote
from synthos.keys import hash64, sample_id

Ints = NDArray[np.int64]
Columns = dict[str, Any]  # pixels uint8 [B, H, W, 3] or a list of B texts, by input
READERS = ("fetch", "read", "decode", "transform")  # what a reader spends its time on
TRIES = 4096  # rows looked at for a substitute of the same bucket, then as many of any


class Instruction(NamedTuple):
    """What to read for one batch, each array [B]."""

    sources: Ints
    shards: Ints  # of the source
    rows: Ints  # of the shard
    epochs: Ints
    weights: NDArray[np.float32]
    bucket: int


class Unusable(Exception):
    """A sample that can't be used."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.error)
        self.fault = fault


class Reader(Dataset[Batch]):
    """Reads, checks and decodes samples.

    Args:
        sources: their shards are read by number.
        inputs: what is read of each, by name.
        sizes: height and width of the pictures of each bucket.
        shelf: where shards are opened.
    """

    def __init__(self, sources: list[Source], inputs: dict[str, Input], sizes: list[Size], shelf: Shelf) -> None:
        self.sources, self.inputs, self.sizes, self.shelf = [s.for_readers() for s in sources], inputs, sizes, shelf
        self.seconds: dict[str, float] = {}

    def __getitems__(self, instructions: list[Instruction]) -> Batch:
        """The samples of one instruction as a batch.

        Raises RuntimeError naming shard and key for a sample that can't be used and has no substitute.
        """
        (asked,) = instructions
        self.seconds = dict.fromkeys(READERS, 0.0)
        size = self.sizes[asked.bucket]
        columns = self._columns(len(asked.rows), size)
        ids, replaced, faults = np.empty(len(asked.rows), np.uint64), np.zeros(len(asked.rows), bool), []
        for (source, shard), places in _grouped(asked).items():
            view = self._view(source, shard)
            rows = asked.rows[places].tolist()
            with self._timed("fetch" if self.shelf.remote(view) else "read"):
                found = self.shelf.read(view, rows)
            for place, row, data in zip(places.tolist(), rows, found, strict=True):
                try:
                    self._decode(source, view, row, int(asked.epochs[place]), data, columns, place)
                    ids[place] = self._id(source, view, row)
                except Unusable as error:
                    if not asked.weights[place]:  # it only fills the batch up: nothing needs to stand for it
                        ids[place] = error.fault.id
                        _clear(columns, place)
                        continue
                    faults.append(error.fault)
                    ids[place] = self._substitute(source, error.fault, asked.bucket, columns, place)
                    replaced[place] = True
        tensors = {  # [B, 3, H, W], channels last in memory
            name: torch.from_numpy(c).permute(0, 3, 1, 2) if isinstance(c, np.ndarray) else c
            for name, c in columns.items()
        }
        return Batch(
            torch.from_numpy(ids.view(np.int64)),
            torch.from_numpy(asked.epochs),
            tensors,
            torch.from_numpy(asked.weights),
            torch.from_numpy(replaced),
            faults,
            self.seconds,
        )

    def ids(self, source: int, shards: Ints, rows: Ints) -> NDArray[np.uint64]:
        """Sample ids, [n]."""
        pairs = zip(shards.tolist(), rows.tolist(), strict=True)
        return np.array([self._id(source, self._view(source, shard), row) for shard, row in pairs], np.uint64)

    def _columns(self, count: int, size: Size) -> Columns:
        """Room for a batch: pixels are decoded to where they stay."""
        return {
            name: np.empty((count, *size, 3), np.uint8) if item.kind == "image" else [""] * count
            for name, item in self.inputs.items()
        }

    def _view(self, source: int, shard: int) -> View:
        place, line = self.sources[source].places[shard], self.sources[source].lines[shard]
        with self._timed("fetch" if is_remote(place.index) else "read"):
            return self.shelf.view(place, line, self.inputs)

    def _id(self, source: int, view: View, row: int) -> int:
        return sample_id(self.sources[source].name, view.name, view.key(row))

    def _decode(
        self, source: int, view: View, row: int, epoch: int, data: dict[str, bytes], columns: Columns, place: int
    ) -> None:
        """Put each input of a sample to its place in the batch. Raises Unusable, and may leave half of it there."""
        name, moved = self.sources[source].name, 0.0
        with self._timed("decode"):
            for key, item in self.inputs.items():
                if zlib.crc32(data[key]) != view.members[key][row]["checksum"]:
                    raise Unusable(view.fault(name, row, epoch, key, "checksum", "has changed since it was indexed"))
                try:
                    if item.kind == "image":
                        moved += decode_into(data[key], columns[key][place], item.crop)
                    else:
                        columns[key][place] = data[key].decode().strip()
                except ValueError as error:
                    limited = isinstance(error, TooManyPixels)
                    reason = "limits" if limited else "decode" if item.kind == "image" else "caption"
                    said = f"can't be decoded: {key}: {error}"
                    raise Unusable(view.fault(name, row, epoch, key, reason, said)) from None
        self.seconds["decode"] -= moved
        self.seconds["transform"] += moved

    def _substitute(self, source: int, fault: Fault, bucket: int, columns: Columns, place: int) -> int:
        """Put the sample that stands for a bad one to its place; returns its id."""
        tried = {fault.key}
        for attempt in range(2 * TRIES):
            found = candidate(self.sources[source], fault.id, fault.epoch, attempt)
            if found is None:
                continue
            view, row = self._view(source, found[0]), found[1]
            if view.key(row) in tried or (attempt < TRIES and self._bucket(view, row) != bucket):
                continue
            (data,) = self.shelf.read(view, [row])
            try:
                self._decode(source, view, row, fault.epoch, data, columns, place)
                return self._id(source, view, row)
            except Unusable:  # met and counted when its own turn comes
                tried.add(view.key(row))
        raise RuntimeError(
            f"{fault.source}/{fault.shard}: sample {fault.key!r} {fault.error}, and no other sample of {fault.source} "
            "can stand for it"
        )

    def _bucket(self, view: View, row: int) -> int:
        if len(self.sizes) == 1:
            return 0
        member = view.members[sized_input(self.inputs)][row : row + 1]
        return int(assign(member["width"], member["height"], self.sizes)[0])

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def candidate(source: Source, identity: int, epoch: int, attempt: int) -> tuple[int, int] | None:
    """Shard and row of the sample that an attempt looks at, to stand for a bad one; None where it is not used."""
    return source.used(hash64("substitute", identity, epoch, attempt) % source.selection.num_rows)


def _clear(columns: Columns, place: int) -> None:
    """Nothing, in place of what half a sample has left there."""
    for column in columns.values():
        column[place] = 0 if isinstance(column, np.ndarray) else ""


def _grouped(asked: Instruction) -> dict[tuple[int, int], Ints]:
    """Places in the batch by source and shard, so that neighbours are read together."""
    order = np.lexsort((asked.rows, asked.shards, asked.sources))
    cuts = np.flatnonzero(np.diff(asked.sources[order]) | np.diff(asked.shards[order])) + 1
    groups = np.split(order, cuts)
    return {(int(asked.sources[g[0]]), int(asked.shards[g[0]])): g for g in groups if len(g)}
