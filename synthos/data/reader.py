"""From read instructions to a batch. Readers hold no state, so neither their number nor a restart of one can matter."""

import os
import zlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from synthos.batch import Batch, Input
from synthos.data.decode import decode_into
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
        """The samples as one batch; pictures lie in memory as they are decoded, channels last.

        Raises RuntimeError naming shard and key for a sample that has changed since it was indexed or can't be decoded.
        """
        shape = (len(samples), self.height, self.width, 3)
        rows: dict[str, Any] = {
            name: np.empty(shape, np.uint8) if item.kind == "image" else [""] * len(samples)
            for name, item in self.inputs.items()
        }
        for number, sample in enumerate(samples):
            self._read(sample, number, rows)
        columns: dict[str, Tensor | list[str]] = {
            name: torch.from_numpy(rows[name]).permute(0, 3, 1, 2) if item.kind == "image" else rows[name]
            for name, item in self.inputs.items()
        }
        ids = torch.tensor([signed64(sample.id) for sample in samples], dtype=torch.int64)
        epochs = torch.tensor([sample.epoch for sample in samples], dtype=torch.int64)
        return Batch(ids, epochs, columns)

    def _read(self, sample: Sample, number: int, rows: dict[str, Any]) -> None:
        """Each input's value, pixels or text, into its row."""
        data = read_members(sample.shard, set(sample.members.values()))  # two inputs may read the same member
        for name, member in sample.members.items():
            if zlib.crc32(data[member]) != member.checksum:
                raise RuntimeError(f"{sample.shard}: sample {sample.key!r} has changed since it was indexed")
            item = self.inputs[name]
            try:
                if item.kind == "image":
                    decode_into(data[member], rows[name][number], item.crop)
                else:
                    rows[name][number] = data[member].decode().strip()
            except ValueError as error:
                raise RuntimeError(f"{sample.shard}: sample {sample.key!r}: {name}: {error}") from None


def read_members(shard: str, members: set[Member]) -> dict[Member, bytes]:
    """The bytes of some members of a shard; fewer than asked where the file ends."""
    descriptor = os.open(shard, os.O_RDONLY)
    try:
        return {member: os.pread(descriptor, member.size, member.offset) for member in members}
    finally:
        os.close(descriptor)
