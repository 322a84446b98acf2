"""The order of one source: where its sample number q lies is a function of (seed, data set, q) and of nothing else.

The samples that a run takes from a source are numbered q = 0, 1, 2, ... and N of them make an epoch, so sample q
belongs to epoch q // N, and nothing is lost or repeated in one. Sample q goes down lane q % K, so each lane is a queue
of its own, and within one epoch the K lanes share out the data set:

1. The shards are permuted, and their samples laid on one line in that order.
2. The line is cut into K consecutive parts, equal up to one sample (a shard may straddle two). Lane k serves part k.
3. In each part, windows of `window` shards are permuted whole.

A rank that keeps to its own lanes reads shards that few others read. No permutation longer than a window is made, and
any sample can be asked for without the ones before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from synthos.keys import hash64

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Line:
    """The samples of one epoch in the order of its shards, S of them."""

    ends: Ints  # [S] where each shard ends on the line
    starts: Ints  # [S] where each begins
    positions: Ints  # [S] position of each shard's first sample


@dataclass(frozen=True)
class _Run:
    """A shuffled window: consecutive samples of one lane in one epoch."""

    start: int  # number of its first sample in the lane's queue
    epoch: int
    positions: Ints


class Order:
    """The order of one source.

    Args:
        shard_sizes: samples trained on in each shard; zeros are fine, but not all of them.
        seed: the run's.
        fingerprint: of the source; another data set has another order.
        lanes: K.
        window: shards whose samples are shuffled together.
    """

    def __init__(
        self, shard_sizes: Sequence[int] | Ints, seed: int, fingerprint: str, lanes: int, window: int = 16
    ) -> None:
        sizes = np.asarray(shard_sizes, np.int64)
        self.num_samples = int(sizes.sum())
        assert self.num_samples
        self.lanes, self.window = lanes, window
        self._key = (seed, fingerprint)
        self._sizes = sizes[sizes > 0]
        self._positions = (sizes.cumsum() - sizes)[sizes > 0]
        self._line = lru_cache(maxsize=4)(self._build_line)
        self._latest = [_Run(0, 0, np.empty(0, np.int64))] * self.lanes

    def places(self, numbers: Ints) -> tuple[Ints, Ints]:
        """Epochs and positions in the source of the samples `numbers`, which ascend, int64 [n] each."""
        epochs, positions = np.empty_like(numbers), np.empty_like(numbers)
        lanes = (numbers % self.lanes).astype(np.uint16)  # short keys are sorted by radix
        rows = lanes.argsort(kind="stable")
        bounds = lanes[rows].searchsorted(np.arange(self.lanes + 1))
        for lane in range(self.lanes):
            own = rows[bounds[lane] : bounds[lane + 1]]
            self._fill(lane, numbers[own] // self.lanes, own, epochs, positions)
        return epochs, positions

    def _fill(self, lane: int, queued: Ints, rows: Ints, epochs: Ints, positions: Ints) -> None:
        """Write where the lane's samples number `queued` are to `rows` of both."""
        done = 0
        while done < len(queued):
            run = self._run(lane, int(queued[done]))
            stop = int(queued.searchsorted(run.start + len(run.positions)))
            epochs[rows[done:stop]] = run.epoch
            positions[rows[done:stop]] = run.positions[queued[done:stop] - run.start]
            done = stop

    def _run(self, lane: int, at: int) -> _Run:
        """The window that holds the lane's `at`-th sample; each lane remembers its latest."""
        run = self._latest[lane]
        if not run.start <= at < run.start + len(run.positions):
            run = self._latest[lane] = self._shuffle(lane, at)
        return run

    def _shuffle(self, lane: int, at: int) -> _Run:
        epoch = (at * self.lanes + lane) // self.num_samples
        line = self._line(epoch)
        served = self._dealt(epoch * self.num_samples, lane)  # by this lane before this epoch
        begin = self._part_start(epoch, lane)
        end = self._part_start(epoch, lane + 1)
        first = int(line.ends.searchsorted(begin, "right"))  # shard in which the lane's part begins
        number = (int(line.ends.searchsorted(begin + at - served, "right")) - first) // self.window
        shards = slice(first + number * self.window, first + (number + 1) * self.window)
        low = max(begin, int(line.starts[shards][0]))
        high = min(end, int(line.ends[shards][-1]))
        lengths = line.ends[shards].clip(max=high) - line.starts[shards].clip(min=low)
        positions = np.arange(low, high) + np.repeat(line.positions[shards] - line.starts[shards], lengths.clip(min=0))
        shuffled = positions[self._permutation(high - low, "window", epoch, lane, number)]
        return _Run(served + low - begin, epoch, shuffled)

    def _build_line(self, epoch: int) -> _Line:
        order = self._permutation(len(self._sizes), "shards", epoch)
        ends = self._sizes[order].cumsum()
        return _Line(ends, ends - self._sizes[order], self._positions[order])

    def _part_start(self, epoch: int, lane: int) -> int:
        """Where the lane's part of an epoch begins on the line: what the lanes before it are dealt in this epoch."""
        before, after = epoch * self.num_samples, (epoch + 1) * self.num_samples
        return self._dealt_below(after, lane) - self._dealt_below(before, lane)

    def _dealt(self, count: int, lane: int) -> int:
        """How many of the run's first `count` samples went down `lane`."""
        return self._dealt_below(count, lane + 1) - self._dealt_below(count, lane)

    def _dealt_below(self, count: int, lane: int) -> int:
        """How many of the run's first `count` samples went down a lane below `lane`."""
        return count // self.lanes * lane + min(count % self.lanes, lane)

    def _permutation(self, size: int, *name: int | str) -> Ints:
        """A permutation keyed by the run, the data set and `name`: the ranks of `size` raw Philox numbers.

        Raw bits, since NumPy promises them for ever; its own `permutation` may change with a version. The lowest bits
        of each number give way to its index, so that equal ones have an order too and one fast sort does it all.
        """
        raw = np.random.Philox(key=hash64(*self._key, *name)).random_raw(size)
        low = np.uint64((1 << size.bit_length()) - 1)
        ranked = (raw & ~low) | np.arange(size, dtype=np.uint64)
        ranked.sort()
        return (ranked & low).astype(np.int64)
