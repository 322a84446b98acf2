"""Samples that are both trained on and validated on, found by the size and CRC-32 of what is read of them."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from synthos.batch import Input
from synthos.data.index import ShardIndex, open_index
from synthos.data.selection import Rows, choose
from synthos.data.shards import ShardPlace
from synthos.data.store.files import Storage
from synthos.data.store.location import masked

Contents = dict[tuple[int, ...], str]  # content -> key of the sample that has it


def contents_of(places: list[ShardPlace], left_out: Rows, inputs: Mapping[str, Input], storage: Storage) -> Contents:
    """The contents of a source's samples but those at the rows `left_out`, and their keys."""
    found: Contents = {}
    start = 0
    for place in places:
        index = open_index(place, storage)
        rows = np.setdiff1d(np.arange(len(index)), left_out - start)
        start += len(index)
        for row, content in zip(rows.tolist(), _contents(index, rows, inputs).tolist(), strict=True):
            found[tuple(content)] = index.key(row)
    return found


def refuse_shared(
    place: ShardPlace, index: ShardIndex, rows: Rows, inputs: Mapping[str, Input], refused: Contents
) -> None:
    """A sample is the same where its pictures are: shard, key and caption may differ.

    Where no pictures are read, a sample is the same where all that is read is.
    """
    if not refused:
        return
    contents = _contents(index, rows, inputs)
    likely = np.array([content[0] for content in refused], np.int64)  # so that few samples are looked at one by one
    for number in np.flatnonzero(np.isin(contents[:, 0], likely)):
        key = refused.get(tuple(contents[number].tolist()))
        if key is not None:
            other = index.key(int(rows[number]))
            raise ValueError(
                f"data.validation: sample {key!r} is also in data.shards, as sample {other!r} of {masked(place.url)}"
            )


def _contents(index: ShardIndex, rows: Rows, inputs: Mapping[str, Input]) -> NDArray[np.int64]:
    """Size and CRC-32, in one number, of what samples have for each of their pictures, [n, inputs]."""
    items = [item for item in inputs.values() if item.kind == "image"] or [*inputs.values()]
    found = [index.members[rows, choose(index, item)[rows]] for item in items]
    return np.stack([(m["size"].astype(np.int64) << 32) | m["checksum"] for m in found], axis=1)
