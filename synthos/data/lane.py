"""A lane of streaming: shards without an index, read one by one through webdataset's stages, as batches.

Our own opener and the limits of `tar` stand before webdataset's grouping, so that what an index would refuse is refused
here when it is met. Samples are shuffled in blocks: one is filled, permuted whole and emptied. So the state of a lane
is where its block began and how many of it are gone, and a resume reads one block again.
"""

import io
import itertools
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from synthos.batch import Batch, Fault, Input
from synthos.data.bad import read_known_bad
from synthos.data.decode import TooManyPixels, decode_into
from synthos.data.reader import READERS
from synthos.data.selection import MAX_BYTES
from synthos.data.shards import ShardPlace
from synthos.data.store.files import FileFacts, Storage
from synthos.data.store.location import is_remote, masked
from synthos.data.tar import MAX_MEMBERS, check_member, split_name
from synthos.keys import hash64, sample_id, signed64
from synthos.schema import DataConfig

READ_AHEAD = 8 << 20  # bytes of one request
MAX_FAULTS = 1000  # in a row


@dataclass(frozen=True)
class Place:
    """Where a lane stands: before sample `taken` of the block that begins at a byte of a shard."""

    number: int = 0  # of the pass
    shard: int = 0  # in the lane's list
    offset: int = 0
    taken: int = 0


class Piece(NamedTuple):
    """A member."""

    shard: int
    header: int  # byte where its header begins
    offset: int  # and its bytes
    data: bytes


class Lane(IterableDataset[tuple[Batch, Place]]):
    """A rank's share of the shards, as batches of `size` samples and where the lane stands after each."""

    def __init__(self, config: DataConfig, inputs: dict[str, Input], places: list[ShardPlace], seed: int,
                 size: int, rank: int, ranks: int) -> None:  # fmt: skip
        assert config.streaming is not None
        self.config, self.inputs, self.places, self.seed, self.size = config, inputs, places, seed, size
        self.rank, self.ranks, self.block = rank, ranks, config.streaming.block
        self.storage, self.remote = Storage(), any(is_remote(place.url) for place in places)
        self.known = read_known_bad(config.known_bad, config.name)
        self.starts = [Place()] * max(config.workers, 1)  # of each of the rank's lanes
        self.first = 0  # which of them has the next batch

    def __iter__(self) -> Iterator[tuple[Batch, Place]]:
        worker = get_worker_info()
        number = (self.first + (worker.id if worker else 0)) % len(self.starts)
        samples = self._samples(number)
        while True:
            yield self._batch(samples)

    def _batch(self, samples: Iterator[tuple[dict[str, Any], Place]]) -> tuple[Batch, Place]:
        """The next samples of a lane that can be used, and what was met on the way."""
        height, width = self.config.height, self.config.width
        columns: dict[str, Any] = {
            name: np.empty((self.size, height, width, 3), np.uint8) if item.kind == "image" else [""] * self.size
            for name, item in self.inputs.items()
        }
        ids, epochs, faults = np.empty(self.size, np.int64), np.empty(self.size, np.int64), []
        seconds = dict.fromkeys(READERS, 0.0)
        row = bad = 0
        while row < self.size:
            began = time.perf_counter()
            sample, place = next(samples)
            read = time.perf_counter()
            fault, moved = self._decode(sample, place, row, columns)
            seconds["fetch" if self.remote else "read"] += read - began
            seconds["decode"] += time.perf_counter() - read - moved
            seconds["transform"] += moved
            if fault is not None:
                faults.append(fault)
                bad += 1
                if bad > MAX_FAULTS:
                    shown = "; ".join(f"{f.shard}: sample {f.key!r} {f.error}" for f in faults[-3:])
                    raise RuntimeError(f"data.shards: {bad} samples in a row can't be used: {shown}")
                continue
            bad = 0
            ids[row], epochs[row] = signed64(self._id(sample)), place.number
            row += 1
        tensors = {  # [B, 3, H, W], channels last in memory
            name: torch.from_numpy(c).permute(0, 3, 1, 2) if isinstance(c, np.ndarray) else c
            for name, c in columns.items()
        }
        batch = Batch(torch.from_numpy(ids), torch.from_numpy(epochs), tensors, faults=faults, seconds=seconds)
        return batch, place

    def _id(self, sample: dict[str, Any]) -> int:
        return sample_id(self.config.name, sample["__url__"], sample["__key__"])

    def _decode(
        self, sample: dict[str, Any], place: Place, row: int, columns: dict[str, Any]
    ) -> tuple[Fault | None, float]:
        """Put each input's value to `row` of its column, or tell why it can't be; and how long cropping took, in s."""
        moved = 0.0
        for name, item in self.inputs.items():
            extension = next((e for e in item.extensions if e in sample), "")
            piece = sample.get(extension, Piece(0, 0, 0, b""))
            reason: Any = "decode" if item.kind == "image" else "caption"
            error = ""
            try:
                if not extension:
                    reason, error = "missing", f"is without {name}: it needs a member {' or '.join(item.extensions)}"
                elif len(piece.data) > MAX_BYTES[item.kind]:
                    reason, most = "limits", MAX_BYTES[item.kind]
                    error = f"has a {name} of {len(piece.data)} bytes; at most {most} are read"
                elif item.kind == "image":
                    moved += decode_into(piece.data, columns[name][row], item.crop)
                elif not (text := piece.data.decode().strip()):
                    error = f"has an empty {name}"
                else:
                    columns[name][row] = text
            except ValueError as problem:
                reason = "limits" if isinstance(problem, TooManyPixels) else reason
                error = f"can't be decoded: {name}: {problem}"
            if error:
                where = self._id(sample), place.number, self.config.name, sample["__url__"], sample["__key__"]
                return Fault(*where, extension, piece.offset, len(piece.data), reason, error), moved
        return None, moved

    def _samples(self, lane: int) -> Iterator[tuple[dict[str, Any], Place]]:
        """One pass after another of a lane: each sample, and where the lane stands after it."""
        start = self.starts[lane]
        while True:
            found = False
            read = self._read(self._dealt(lane, start.number), start)
            while block := list(itertools.islice(read, self.block)):
                begin, first = start.taken, next(piece for piece in block[0].values() if isinstance(piece, Piece))
                start = Place(start.number, first.shard, first.header, 0)
                block.sort(key=lambda sample: hash64("block", self.seed, start.number, self._id(sample)))
                for taken, sample in enumerate(block[begin:], begin + 1):
                    yield sample, replace(start, taken=taken)
                found = True
            if not found:
                raise RuntimeError(f"data.shards: no sample in {self._dealt(lane, start.number)[0].name} or its like")
            start = Place(start.number + 1)

    def _dealt(self, lane: int, number: int) -> list[ShardPlace]:
        """A lane's shards in a pass, in order."""
        shuffled = sorted(self.places, key=lambda place: hash64("shards", self.seed, number, place.name))
        return shuffled[self.rank :: self.ranks][lane :: len(self.starts)]

    def _read(self, places: list[ShardPlace], start: Place) -> Iterator[dict[str, Any]]:
        """webdataset's samples from a byte of a shard on; without those that are known to be bad."""
        import webdataset
        from webdataset.tariterators import group_by_keys

        def members(places: Any) -> Iterator[dict[str, Any]]:
            for number, place in places:
                yield from self._members(place, number, start.offset if number == start.shard else 0)
                yield {}  # a sample ends with its shard

        group = webdataset.filters.pipelinefilter(group_by_keys)(keys=lambda name: split_name(name) or (None, None))
        pipeline = webdataset.DataPipeline(lambda: enumerate(places[start.shard :], start.shard), members, group)
        for sample in pipeline:
            if sample["__key__"] not in self.known.get(sample["__url__"], ()):
                yield sample

    def _members(self, place: ShardPlace, number: int, base: int) -> Iterator[dict[str, Any]]:
        """The members of a shard; ValueError where it is damaged, and where a sample is split."""
        url, facts = masked(place.url), self.storage.facts(place.url)
        file = io.BufferedReader(_Bytes(self.storage, place.url, facts, base), READ_AHEAD)
        seen: set[str] = set()
        latest: tuple[str, set[str]] = "", set()  # key, and its extensions so far
        try:
            with tarfile.open(fileobj=file, mode="r|", errors="strict") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                    check_member(member, url)
                    named = split_name(member.name) if member.isfile() else None
                    if named is None:
                        continue
                    if named[0] != latest[0]:
                        latest = named[0], set()
                        if named[0] in seen:
                            raise ValueError(f"{url}: the key {named[0]!r} comes back: a duplicate, or a split sample")
                    if named[1] in latest[1] or len(latest[1]) >= MAX_MEMBERS:
                        raise ValueError(f"{url}: duplicate member {member.name!r}, or more than {MAX_MEMBERS} of it")
                    seen.add(named[0])
                    latest[1].add(named[1])
                    content = tar.extractfile(member)
                    assert content is not None
                    piece = Piece(number, base + member.offset, base + member.offset_data, content.read())
                    yield {"fname": member.name, "data": piece, "__url__": place.name}
                end = base + tar.offset
        except (tarfile.TarError, UnicodeDecodeError) as error:
            raise ValueError(f"{url} is cut or damaged: {error}") from None
        (mark,) = self.storage.read_spans(place.url, [(end, max(min(1024, facts.size - end), 0))], facts)
        if len(mark) < 1024 or any(mark):
            raise ValueError(f"{url} is cut or damaged: no readable header or end mark at byte {end}")


class _Bytes(io.RawIOBase):
    """A file from a byte on, by ranges; what fails for a while is asked again."""

    def __init__(self, storage: Storage, url: str, facts: FileFacts, start: int) -> None:
        self.storage, self.url, self.facts, self.at = storage, url, facts, start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self.facts.size - self.at)
        (data,) = self.storage.read_spans(self.url, [(self.at, max(size, 0))], self.facts)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)
