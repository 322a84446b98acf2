"""Which source serves which slot of a run, by weight: a closed form, spread as evenly as whole samples can be.

The run's samples take slots n = 0, 1, 2, ... Two sources share them so that the first has floor(n r + 1/2) of the first
n slots, r being its share: never more than half a sample from n r. More sources are split in two, and each half again,
along Huffman's tree of their weights, so that a source is off by half a sample at most for each split above it,
shrunk by its share of what was split. Weights are kept in steps of 2^-24 of their sum.
"""

import heapq
import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Union

import numpy as np
from numpy.typing import NDArray

from synthos.schema import SourceConfig

BITS = 24
HALF = 1 << (BITS - 1)

Ints = NDArray[np.int64]
Tree = Union[int, "Split"]  # a leaf is the number of a source


@dataclass(frozen=True)
class Split:
    left: Tree
    right: Tree
    share: int  # of the left, in 2^-24


@dataclass(frozen=True)
class _Segment:
    """Slots under the same weights."""

    start: int  # first slot
    tree: Tree
    before: list[int]  # slots that each source had until then


class Mixture:
    """The dealing of slots to sources.

    Args:
        schedule: from which slot on which weights hold, one for each of the S sources; it names slot 0.
    """

    def __init__(self, schedule: Mapping[int, Sequence[float]]) -> None:
        assert min(schedule) == 0
        self.num_sources = len(schedule[0])
        self._segments: list[_Segment] = []
        for start in sorted(schedule):
            before = self.counts(start) if self._segments else [0] * self.num_sources
            self._segments.append(_Segment(start, _huffman(schedule[start]), before))
        self._starts = [segment.start for segment in self._segments]

    def counts(self, slots: int) -> list[int]:
        """How many of the first `slots` slots each source has, [S]."""
        segment = self._segments[max(bisect_right([s.start for s in self._segments], slots) - 1, 0)]
        counts = [*segment.before]
        _count(segment.tree, slots - segment.start, counts)
        return counts

    def deal(self, slots: Ints) -> tuple[Ints, Ints]:
        """The source of each of `slots`, which ascend, and which of that source's samples it takes; int64 [n] each."""
        sources, numbers = np.empty_like(slots), np.empty_like(slots)
        bounds = [*slots.searchsorted(self._starts).tolist(), len(slots)]
        for segment, (low, high) in zip(self._segments, itertools.pairwise(bounds), strict=True):
            if low < high:
                rows = np.arange(low, high)
                _deal(segment.tree, slots[rows] - segment.start, rows, sources, numbers)
                numbers[rows] += np.asarray(segment.before)[sources[rows]]
        return sources, numbers


def _deal(tree: Tree, slots: Ints, rows: Ints, sources: Ints, numbers: Ints) -> None:
    """Write the source and the number of each slot of `tree`, counted from its first, to `rows` of both."""
    if isinstance(tree, int):
        sources[rows], numbers[rows] = tree, slots
        return
    before = (slots * tree.share + HALF) >> BITS
    left = ((slots + 1) * tree.share + HALF) >> BITS > before
    _deal(tree.left, before[left], rows[left], sources, numbers)
    _deal(tree.right, (slots - before)[~left], rows[~left], sources, numbers)


def _count(tree: Tree, slots: int, counts: list[int]) -> None:
    if isinstance(tree, int):
        counts[tree] += slots
        return
    left = (slots * tree.share + HALF) >> BITS
    _count(tree.left, left, counts)
    _count(tree.right, slots - left, counts)


def _huffman(weights: Sequence[float]) -> Tree:
    """Lightest first: heavy sources are split off near the root."""
    assert all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0
    order = itertools.count(len(weights))  # decides between equal weights
    heap: list[tuple[float, int, Tree]] = [(float(weight), i, i) for i, weight in enumerate(weights)]
    heapq.heapify(heap)
    while len(heap) > 1:
        light, _, right = heapq.heappop(heap)
        heavy, _, left = heapq.heappop(heap)
        both = light + heavy
        share = round(heavy / both * (1 << BITS)) if both else HALF
        heapq.heappush(heap, (both, next(order), Split(left, right, share)))
    return heap[0][2]


def weight_schedule(mix: Mapping[str, SourceConfig] | None, sizes: list[int]) -> dict[int, list[float]]:
    """From which step on which weights hold, one for each source of these sizes, by which they weigh by default.

    Raises ValueError for weights that are no shares, and for a schedule that does not say how to begin.
    """
    if mix is None:
        return {0: [1.0]}
    parsed = [_parse_weight(f"data.mix.{n}.weight", s.weight, size)
              for (n, s), size in zip(mix.items(), sizes, strict=True)]  # fmt: skip
    steps = sorted({step for weights in parsed for step in weights})
    schedule = {step: [weights[max(s for s in weights if s <= step)] for weights in parsed] for step in steps}
    for step, weights in schedule.items():
        if sum(weights) <= 0:
            raise ValueError(f"data.mix: every weight is 0 from step {step} on; expected one above 0")
    return schedule


def _parse_weight(key: str, weight: float | dict[str, float] | None, size: int) -> dict[int, float]:
    given = weight if isinstance(weight, dict) else {"0": float(size if weight is None else weight)}
    if not all(step.isdecimal() for step in given) or "0" not in given:
        raise ValueError(f"{key}: {given} is not allowed; expected steps and weights that begin at 0, as in {{0: 1.0}}")
    wrong = [value for value in given.values() if not 0 <= value < math.inf]
    if wrong:
        raise ValueError(f"{key}: {wrong[0]} is not allowed; expected 0 or more")
    return {int(step): value for step, value in given.items()}
