"""From read instructions to a batch. Readers hold no state, so neither their number nor a restart of one can matter."""

import os
import zlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from synthos.batch import Batch, Input
from synthos.data.decode import decode_image
from synthos.data.index import Member
from synthos.keys import signed64


class Sample(NamedTuple):
    """All that a reader is told of one sample."""

    id: int  # unsigned
    epoch: int
    shard: str  # path of its tar
    key: str
    members: dict[str, Member]  # by name of the input


class Reader(Dataset[Batch]):
    """Reads, checks and decodes samples.

    Args:
        inputs: what is read of each, by name.
        height, width: pixels of every picture.
    """

    def __init__(self, inputs: dict[str, Input], height: int, width: int) -> None:
        self.inputs, self.height, self.width = inputs, height, width

    def __getitems__(self, samples: list[Sample]) -> Batch:
        """The samples as one batch.

        Raises RuntimeError naming shard and key for a sample that has changed since it was indexed or can't be decoded.
        """
        rows = [self._read(sample) for sample in samples]
        columns: dict[str, Tensor | list[str]] = {}
        for name, item in self.inputs.items():
            values = [row[name] for row in rows]
            columns[name] = torch.from_numpy(np.stack(values)) if item.kind == "image" else values
        ids = torch.tensor([signed64(sample.id) for sample in samples], dtype=torch.int64)
        epochs = torch.tensor([sample.epoch for sample in samples], dtype=torch.int64)
        return Batch(ids, epochs, columns)

    def _read(self, sample: Sample) -> dict[str, Any]:
        """Each input's value: pixels uint8 [3, H, W], or text."""
        data = read_members(sample.shard, set(sample.members.values()))  # two inputs may read the same member
        values = {}
        for name, member in sample.members.items():
            if zlib.crc32(data[member]) != member.checksum:
                raise RuntimeError(f"{sample.shard}: sample {sample.key!r} has changed since it was indexed")
            try:
                values[name] = self._decode(self.inputs[name], data[member])
            except ValueError as error:
                raise RuntimeError(f"{sample.shard}: sample {sample.key!r}: {name}: {error}") from None
        return values

    def _decode(self, item: Input, data: bytes) -> Any:
        if item.kind == "image":
            return decode_image(data, self.height, self.width, item.crop)
        return data.decode().strip()


def read_members(shard: str, members: set[Member]) -> dict[Member, bytes]:
    """The bytes of some members of a shard; fewer than asked where the file ends."""
    descriptor = os.open(shard, os.O_RDONLY)
    try:
        return {member: os.pread(descriptor, member.size, member.offset) for member in members}
    finally:
        os.close(descriptor)
