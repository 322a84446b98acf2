"""Keyed randomness: every random number of a run is a pure function of (seed, sample id, epoch, draw, name).

So the same sample meets the same noise on any rank, in any micro-batch, on 1 GPU or 32, before and after a resume.
Changing anything here changes every run: it is a breaking change.
"""

import hashlib
import struct
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def hash64(*parts: int | str | bytes) -> int:
    """A 64-bit hash (BLAKE2b) of a sequence of integers, texts and bytes; each part is typed and length-prefixed."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, int):
            data, kind = struct.pack("<Q", part & _MASK), b"i"
        else:
            data, kind = (part.encode(), b"s") if isinstance(part, str) else (part, b"b")
        digest.update(kind + struct.pack("<I", len(data)) + data)
    return int.from_bytes(digest.digest(), "little")


def sample_id(source: str, shard: str, key: str) -> int:
    """The id of a sample: the same online and from a cache, whatever folder its shards lie in."""
    return hash64(source, shard, key)


def signed64(value: int) -> int:
    """The int64 with the same bits as the unsigned `value`: how ids travel in tensors."""
    return value - (1 << 64) if value >= 1 << 63 else value


class Draws(Protocol):
    """The only randomness a recipe sees: one stream per sample and name."""

    def uniform(self, name: str) -> Tensor:
        """Uniform numbers in [0, 1), float64 [B]."""
        ...

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, float32 [B, *shape]."""
        ...


class KeyedDraws:
    """Draws of training: a generator per sample on the compute device.

    Args:
        seed: the run's seed.
        ids: sample ids, int64 [B].
        epochs: epoch of each sample, int64 [B].
        device: where the numbers are made and used.
        draw: which of several draws of the same sample in the same epoch.
    """

    def __init__(self, seed: int, ids: Tensor, epochs: Tensor, device: torch.device | str = "cpu", draw: int = 0):
        self.keys = [(seed, i, e, draw) for i, e in zip(ids.tolist(), epochs.tolist(), strict=True)]
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device)

    def uniform(self, name: str) -> Tensor:
        values = [hash64(*key, name) / 2.0**64 for key in self.keys]
        return torch.tensor(values, dtype=torch.float64).clamp(max=1 - 2.0**-53).to(self.device)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        out = torch.empty(len(self.keys), *shape, device=self.device)
        for row, key in zip(out, self.keys, strict=True):
            row.normal_(generator=self.generator.manual_seed(hash64(*key, name)))
        return out


class FixedDraws:
    """Draws of validation: t = (i + 0.5) / 8 on a fixed grid, no condition dropped, noise keyed by (seed, id, i).

    Args:
        seed: the validation seed, independent of the run's.
        ids: sample ids, int64 [B].
        index: which of the `NUM_T` stratified times each sample is asked at, [B].
        device: where the numbers are made and used.
    """

    NUM_T = 8

    def __init__(self, seed: int, ids: Tensor, index: Sequence[int], device: torch.device | str = "cpu"):
        self.index = list(index)
        self.keyed = KeyedDraws(seed, ids, torch.tensor(self.index), device)

    def uniform(self, name: str) -> Tensor:
        values = [(i + 0.5) / self.NUM_T if name == "t" else 1.0 for i in self.index]
        return torch.tensor(values, dtype=torch.float64, device=self.keyed.device)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        return self.keyed.normal(name, shape)
