"""What a data set is made of, told from indexes alone: counts, shapes, caption lengths, doubles."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synthos.batch import Input
from synthos.data.index import IMAGE_SUFFIXES, ShardIndex
from synthos.data.selection import choose

SIDES = (256, 480, 512, 720)  # pixels, of the shorter side
ASPECTS = (1 / 2, 2 / 3, 4 / 5, 1, 5 / 4, 3 / 2, 2)  # width / height, where one class ends and the next begins
PICTURES = (*IMAGE_SUFFIXES, *(f"target.{suffix}" for suffix in IMAGE_SUFFIXES))
CAPTIONS = ("txt",)
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Facts:
    """What an index tells of each sample's picture and caption, int64 [n] each; 0 where it has none that is readable.

    `content` is the size and CRC-32 of the picture in one number, -1 where there is none.
    """

    width: Ints
    height: Ints
    chars: Ints
    content: Ints

    @property
    def side(self) -> Ints:
        """The shorter one, in pixels."""
        return np.minimum(self.width, self.height)


def facts_of(index: ShardIndex, pictures: Sequence[str] = PICTURES, captions: Sequence[str] = CAPTIONS) -> Facts:
    """By the first of the extensions `pictures`, and of `captions`, that a sample has."""
    picture, caption = choose(index, Input("image", tuple(pictures))), choose(index, Input("text", tuple(captions)))
    rows = np.arange(len(index))
    seen, told = index.members[rows, picture], index.members[rows, caption]
    there = picture >= 0
    content = (seen["size"].astype(np.int64) << 32) | seen["checksum"]
    return Facts(
        np.where(there, seen["width"], 0).astype(np.int64),
        np.where(there, seen["height"], 0).astype(np.int64),
        np.where(caption >= 0, told["chars"], 0).astype(np.int64),
        np.where(there, content, -1),
    )


@dataclass(frozen=True)
class Limits:
    """Which samples are kept: those of a readable picture and within all of these."""

    min_side: int = 0  # pixels
    max_aspect: float = math.inf  # longer side / shorter side
    min_caption: int = 0  # characters
    max_caption: int | None = None

    def check(self) -> None:
        """Raise ValueError for limits that nothing passes."""
        if self.max_aspect < 1 or math.isnan(self.max_aspect):
            raise ValueError(f"--max-aspect: {self.max_aspect:g} is not allowed; expected 1 or more")
        for name in ("min_side", "min_caption", "max_caption"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"--{name.replace('_', '-')}: {value} is not allowed; expected 0 or more")
        if self.max_caption is not None and self.max_caption < self.min_caption:
            raise ValueError(f"--max-caption: {self.max_caption} is below --min-caption {self.min_caption}")

    def faults(self, facts: Facts) -> dict[str, NDArray[np.bool_]]:
        """Which samples each reason, the first that applies, leaves out, [n]."""
        longer = np.maximum(facts.width, facts.height)
        tests = {
            "no readable picture": facts.side == 0,
            f"shorter side below {self.min_side}": facts.side < self.min_side,
            f"aspect above {self.max_aspect:g}": longer > self.max_aspect * facts.side,
            f"caption below {self.min_caption} characters": facts.chars < self.min_caption,
        }
        if self.max_caption is not None:
            tests[f"caption above {self.max_caption} characters"] = facts.chars > self.max_caption
        left = np.ones(len(facts.side), bool)
        found = {}
        for reason, fails in tests.items():
            found[reason] = fails & left
            left &= ~fails
        return found


@dataclass
class Counts:
    """How often each whole number from 0 on occurred; takes no more memory for more samples."""

    counts: Ints = field(default_factory=lambda: np.zeros(1, np.int64))

    def add(self, values: Ints) -> None:
        new = np.bincount(values, minlength=len(self.counts)).astype(np.int64)
        new[: len(self.counts)] += self.counts
        self.counts = new

    def spread(self) -> dict[str, int] | None:
        """Least, middle and largest of the numbers above 0; the middle is the lower one of two."""
        counts = self.counts.copy()
        counts[0] = 0
        total = int(counts.sum())
        if not total:
            return None
        present = np.flatnonzero(counts)
        middle = int(counts.cumsum().searchsorted((total + 1) // 2))
        return {"min": int(present[0]), "median": middle, "max": int(present[-1])}

    def at_least(self, value: int) -> int:
        return int(self.counts[value:].sum())


@dataclass
class Statistics:
    """Collected shard by shard."""

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    extensions: Counter[str] = field(default_factory=Counter)  # samples that have it
    sides: Counts = field(default_factory=Counts)
    widths: Counts = field(default_factory=Counts)
    heights: Counts = field(default_factory=Counts)
    captions: Counts = field(default_factory=Counts)
    aspects: Ints = field(default_factory=lambda: np.zeros(len(ASPECTS) + 1, np.int64))
    contents: list[Ints] = field(default_factory=list)

    def add(self, index: ShardIndex, facts: Facts) -> None:
        self.shards += 1
        self.bytes += index.bytes
        have = (index.members["size"] >= 0).sum(0)
        self.extensions.update(dict(zip(index.extensions, have.tolist(), strict=True)))
        self.count(facts)
        self.contents.append(facts.content[facts.content >= 0])

    def count(self, facts: Facts) -> None:
        """Samples without their shard."""
        self.samples += len(facts.side)
        for counts, values in ((self.sides, facts.side), (self.widths, facts.width), (self.heights, facts.height),
                               (self.captions, facts.chars)):  # fmt: skip
            counts.add(values)
        seen = facts.side > 0
        classes = np.searchsorted(ASPECTS, facts.width[seen] / facts.height[seen])
        self.aspects += np.bincount(classes, minlength=len(self.aspects))

    def distribution(self, also: int = 0) -> dict[int, int]:
        """Samples whose shorter side has at least so many pixels: `SIDES`, and `also` where it is not 0."""
        return {side: self.sides.at_least(side) for side in sorted({*SIDES, also} - {0})}

    def doubles(self) -> int:
        """Samples whose picture an earlier one has, by size and CRC-32."""
        contents = np.concatenate([np.empty(0, np.int64), *self.contents])
        return len(contents) - len(np.unique(contents))

    def as_json(self) -> dict[str, Any]:
        return {
            "shards": self.shards,
            "samples": self.samples,
            "bytes": self.bytes,
            "extensions": dict(self.extensions.most_common()),
            "without_picture": self.samples - self.sides.at_least(1),
            "without_caption": self.samples - self.captions.at_least(1),
            "shorter_side": self.sides.spread(),
            "width": self.widths.spread(),
            "height": self.heights.spread(),
            "caption": self.captions.spread(),
            "at_least": {str(side): count for side, count in self.distribution().items()},
            "aspects": dict(zip(aspect_names(), self.aspects.tolist(), strict=True)),
            "doubles": self.doubles(),
        }


def aspect_names() -> list[str]:
    """What the classes of width / height are called; each includes its upper bound."""
    bounds = [f"{bound:.3g}" for bound in ASPECTS]
    return [
        f"to {bounds[0]}",
        *(f"{a} to {b}" for a, b in zip(bounds, bounds[1:], strict=False)),
        f"above {bounds[-1]}",
    ]
