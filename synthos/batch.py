"""What passes between data and recipe: what a recipe reads of a sample, and a batch of samples so read."""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

Features = dict[str, Tensor]  # what `encode` returns: name -> [B, ...]


@dataclass(frozen=True)
class Input:
    """One thing a recipe reads of a sample.

    An image arrives as uint8 [B, 3, H, W], resized to cover and centre-cropped (`shared`) or squashed whole to H x W
    (`whole`); a text as a list of B strings. The first of `extensions` that the sample has is read.
    """

    kind: Literal["image", "text"]
    extensions: tuple[str, ...]
    crop: Literal["shared", "whole"] = "shared"


@dataclass(frozen=True)
class Feature:
    """One thing `encode` returns: how it would be stored, and which group of features it is encoded with.

    A ragged feature has trailing rows of exact zeros beyond its length; they need not be stored.
    """

    group: Literal["target", "image", "text"]
    dtype: torch.dtype
    ragged: bool = False


@dataclass(frozen=True)
class Fault:
    """Why a sample could not be used, and where it lies."""

    id: int  # of the sample, unsigned
    epoch: int
    source: str
    shard: str  # file name of the tar
    key: str
    member: str  # extension, or "" where it is the sample as a whole
    offset: int  # bytes of the member in the tar
    size: int
    reason: Literal["missing", "checksum", "decode", "limits", "caption", "known"]
    error: str


@dataclass
class Batch:
    """Samples as read: `columns` holds each of the recipe's inputs by name.

    A bad sample has been replaced by another one of its source: `ids` are those of what was read, and `faults` tells
    what it stands for. A sample of weight 0 only fills the batch up; over a global batch the weights have the mean 1.
    """

    ids: Tensor  # int64 [B]
    epochs: Tensor  # int64 [B]
    columns: dict[str, Tensor | list[str]]
    weights: Tensor = field(default_factory=lambda: torch.empty(0))  # float32 [B]; default: ones
    replaced: Tensor = field(default_factory=lambda: torch.empty(0))  # bool [B]; default: none
    faults: list[Fault] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # that readers took: fetch, read, decode, transform

    def __post_init__(self) -> None:
        if not len(self.weights):
            self.weights = torch.ones(len(self.ids))
        if not len(self.replaced):
            self.replaced = torch.zeros(len(self.ids), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.ids)

    def images(self, name: str) -> Tensor:
        """uint8 [B, 3, H, W]."""
        column = self.columns[name]
        assert isinstance(column, Tensor)
        return column

    def texts(self, name: str) -> list[str]:
        column = self.columns[name]
        assert isinstance(column, list)
        return column

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`; ids and epochs stay on the CPU, where they are keys."""
        columns = {  # pixels arrive as they were decoded, channels last
            k: v.to(device, non_blocking=True).contiguous() if isinstance(v, Tensor) else v
            for k, v in self.columns.items()
        }
        return replace(self, columns=columns, weights=self.weights.to(device, non_blocking=True))

    def split(self, size: int) -> list["Batch"]:
        """Consecutive batches of `size` samples (the last may be shorter)."""
        return [self.slice(i, i + size) for i in range(0, len(self), size)]

    def slice(self, start: int, stop: int) -> "Batch":
        rows = slice(start, stop)
        columns = {k: v[rows] for k, v in self.columns.items()}
        return Batch(self.ids[rows], self.epochs[rows], columns, self.weights[rows], self.replaced[rows])
