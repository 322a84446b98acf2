"""Which samples of a source a run can use, told from indexes alone, and why it can't use the others."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synthos.batch import Fault, Input
from synthos.data.buckets import Size, assign
from synthos.data.index import IMAGE_SUFFIXES, MAX_TEXT_BYTES, ShardIndex
from synthos.data.tar import MAX_MEMBER_BYTES
from synthos.keys import sample_id

log = logging.getLogger(__name__)
Rows = NDArray[np.int64]
SUFFIXES = {"image": IMAGE_SUFFIXES, "text": ("txt", "text", "caption", "md", "json")}  # all that is ever decoded
PICKLES = ("pyd", "pkl", "pickle", "pt", "pth", "npz")
MAX_BYTES = {"image": MAX_MEMBER_BYTES, "text": MAX_TEXT_BYTES}


@dataclass(frozen=True)
class Selection:
    """Of all rows of a source, over its shards in order: which are left out, and the buckets of the others."""

    num_rows: int
    left_out: Rows  # ascending; held out, faulty or known to be bad
    held_out: Rows  # ascending; those of them that validation uses
    buckets: NDArray[np.uint8] | None  # of the N - len(left_out) others; None where there is one shape
    faults: list[Fault]  # what is wrong with those that are neither held out nor known

    def save(self, path: Path) -> None:
        """Write it, if that can be; processes that meet here write the same and the last rename wins."""
        arrays: dict[str, Any] = {"left_out": self.left_out, "held_out": self.held_out}
        if self.buckets is not None:
            arrays["buckets"] = self.buckets
        faults = json.dumps([asdict(fault) for fault in self.faults]).encode()
        part = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                np.savez(file, num_rows=self.num_rows, faults=np.frombuffer(faults, np.uint8), **arrays)
            part.replace(path)
        except OSError as error:  # it only saves the next opening some time
            log.warning("data.cache: %s is not kept: %s", path, error)
            with suppress(OSError):
                part.unlink()

    @classmethod
    def load(cls, path: Path) -> "Selection":
        with np.load(path, allow_pickle=False) as file:
            faults = [Fault(**fault) for fault in json.loads(file["faults"].tobytes())]
            buckets = file.get("buckets")
            return cls(int(file["num_rows"]), file["left_out"], file["held_out"], buckets, faults)


@dataclass
class Selector:
    """Collects a selection shard by shard.

    Args:
        source: its name.
        inputs: what a sample is read for.
        holds_out: whether the sample of an id is held out.
        sizes: of the buckets, (height, width); None where every picture is read in one shape.
    """

    source: str
    inputs: Mapping[str, Input]
    holds_out: Callable[[int], bool] | None = None
    sizes: list[Size] | None = None

    def __post_init__(self) -> None:
        self._num_rows = 0
        self._left_out: list[Rows] = []
        self._held_out: list[Rows] = []
        self._buckets: list[NDArray[np.uint8]] = []
        self.faults: list[Fault] = []

    def add(self, shard: str, index: ShardIndex, known: set[str]) -> Rows:
        """Take in the next shard, by its file name, leaving out the keys `known`; returns its rows in use."""
        usable = np.ones(len(index), bool)
        if known:
            usable &= [index.key(row) not in known for row in range(len(index))]
        for name, item in self.inputs.items():
            usable &= self._check(shard, index, name, item, usable)
        held = np.zeros(len(index), bool)
        if self.holds_out is not None:
            for row in np.flatnonzero(usable).tolist():
                held[row] = self.holds_out(sample_id(self.source, shard, index.key(row)))
        rows = np.flatnonzero(usable & ~held)
        self._left_out.append(np.flatnonzero(~usable | held) + self._num_rows)
        self._held_out.append(np.flatnonzero(held) + self._num_rows)
        if self.sizes is not None:
            column = choose(index, self.inputs[sized_input(self.inputs)])[rows]
            picked = index.members[rows, column]
            self._buckets.append(assign(picked["width"], picked["height"], self.sizes))
        self._num_rows += len(index)
        return rows

    def result(self) -> Selection:
        buckets = np.concatenate([np.empty(0, np.uint8), *self._buckets]) if self.sizes is not None else None
        left_out, held_out = (np.concatenate([np.empty(0, np.int64), *r]) for r in (self._left_out, self._held_out))
        return Selection(self._num_rows, left_out, held_out, buckets, self.faults)

    def _check(
        self, shard: str, index: ShardIndex, name: str, item: Input, wanted: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Which samples have the input, [n]; the others of those `wanted` become faults."""
        chosen = choose(index, item)
        there = chosen >= 0
        fact = index.members["width" if item.kind == "image" else "chars"]
        each = np.arange(len(index)), chosen
        good = there & (fact[each] > 0) & (index.members["size"][each] <= MAX_BYTES[item.kind])
        for row in np.flatnonzero(wanted & ~good).tolist():
            self.faults.append(self._fault(shard, index, row, name, item, int(chosen[row])))
        return good

    def _fault(self, shard: str, index: ShardIndex, row: int, name: str, item: Input, column: int) -> Fault:
        key = index.key(row)
        where = sample_id(self.source, shard, key), 0, self.source, shard, key
        if column < 0:
            return Fault(*where, "", 0, 0, "missing", _lacking(index, row, name, item))
        member = index.member(row, column)
        place = index.extensions[column], member.offset, member.size
        if member.size > MAX_BYTES[item.kind]:
            most = MAX_BYTES[item.kind]
            return Fault(*where, *place, "limits", f"has a {name} of {member.size} bytes; at most {most} are read")
        if item.kind == "image":
            return Fault(*where, *place, "decode", f"has an unreadable {name}, or one above 64 megapixels")
        return Fault(*where, *place, "caption", f"has an empty {name}, or one that is not UTF-8")


def check_inputs(inputs: Mapping[str, Input]) -> None:
    """Raise ValueError for members that are never decoded: other kinds, above all those that run code when read."""
    for name, item in inputs.items():
        for extension in item.extensions:
            last = extension.rpartition(".")[2]
            if last not in SUFFIXES[item.kind]:
                why = ": a pickle can run any code" if last in PICKLES else ""
                raise ValueError(
                    f"the recipe's input {name!r}: members .{extension} are not read{why}; "
                    f"an input of kind {item.kind} is read of {', '.join(SUFFIXES[item.kind])}"
                )


def choose(index: ShardIndex, item: Input) -> Rows:
    """For each sample, the column of the first extension that serves the input, -1 where there is none; [n]."""
    chosen = np.full(len(index), -1, np.int64)
    for extension in reversed(item.extensions):
        if extension in index.extensions:
            column = index.extensions.index(extension)
            chosen[index.members["size"][:, column] >= 0] = column
    return chosen


def sized_input(inputs: Mapping[str, Input]) -> str:
    """The picture whose shape decides a sample's bucket: the first that is cropped, else the first.

    Raises ValueError where a recipe reads no picture.
    """
    pictures = sorted((item.crop != "shared", order, name) for order, (name, item) in enumerate(inputs.items())
                      if item.kind == "image")  # fmt: skip
    if not pictures:
        raise ValueError("data.buckets: this recipe reads no picture; expected null")
    return pictures[0][2]


def _lacking(index: ShardIndex, row: int, name: str, item: Input) -> str:
    """That a sample has none of an input's extensions, and which it has."""
    what = "an image" if item.kind == "image" else "a caption"
    has = ", ".join(e for e, m in zip(index.extensions, index.members[row], strict=True) if m["size"] >= 0)
    return f"is without {what}: {name} needs a member {' or '.join(item.extensions)}, it has {has}"
