"""The order of samples: global batch t is a pure function of (seed, data set, t). No rank, no worker, no history.

The samples of a run are numbered q = 0, 1, 2, ... and N of them make an epoch, so sample q belongs to epoch q // N: the
rest of an epoch opens the batch that begins the next one (tail policy `carry`), and nothing is lost or repeated. Sample
q goes down lane q % K, so each lane is a queue of its own, and within one epoch the K lanes share out the data set:

1. The shards are permuted, and their samples laid on one line in that order.
2. The line is cut into K consecutive parts, equal up to one sample (a shard may straddle two). Lane k serves part k.
3. In each part, windows of `window` shards are permuted whole.
4. Batch t takes B / K samples from each lane, lane after lane; rank r of W takes the slice [r B/W, (r+1) B/W).

Any W that divides B gives the same batches, and while W divides K a rank keeps to its own lanes, so each shard is read
by few ranks. No permutation longer than a window is made, and any batch can be asked for without the ones before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from synthos.keys import hash64

MAX_LANES = 64
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Line:
    """The samples of one epoch in the order of its shards, S of them."""

    ends: Ints  # [S] where each shard ends on the line
    starts: Ints  # [S] where each begins
    positions: Ints  # [S] data-set position of each shard's first sample


@dataclass(frozen=True)
class _Run:
    """A shuffled window: consecutive samples of one lane in one epoch."""

    start: int  # number of its first sample in the lane's queue
    epoch: int
    positions: Ints


class Plan:
    """The order of one data set.

    Args:
        shard_sizes: samples in each shard, after held-out ones were removed; zeros are fine.
        seed: the run's.
        fingerprint: of the data set; another data set has another order.
        batch_size: B, the global batch.
        lanes: K, divides B; by default the largest divisor of B not above 64.
        window: shards whose samples are shuffled together.

    Raises ValueError for an empty data set, and for lanes that do not divide the batch.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        seed: int,
        fingerprint: str,
        batch_size: int,
        lanes: int | None = None,
        window: int = 16,
    ) -> None:
        sizes = np.asarray(shard_sizes, np.int64)
        self.num_samples = int(sizes.sum())
        if not self.num_samples:
            raise ValueError("data.shards: no sample to train on")
        if lanes is not None and (lanes < 1 or batch_size % lanes):
            near = default_lanes(batch_size)
            raise ValueError(f"data.lanes: {lanes} does not divide batch.size {batch_size}; {near} does")
        self.batch_size, self.window = batch_size, window
        self.lanes = lanes or default_lanes(batch_size)
        self._key = (seed, fingerprint)
        self._sizes = sizes[sizes > 0]
        self._positions = (sizes.cumsum() - sizes)[sizes > 0]
        self._line = lru_cache(maxsize=4)(self._build_line)
        self._latest = [_Run(0, 0, np.empty(0, np.int64))] * self.lanes

    def batch(self, t: int) -> tuple[Ints, Ints]:
        """Epochs and data-set positions of global batch t (counted over the whole run), int64 [B] each."""
        share = self.batch_size // self.lanes
        epochs = np.empty((self.lanes, share), np.int64)
        positions = np.empty((self.lanes, share), np.int64)
        for lane in range(self.lanes):
            self._fill(lane, t * share, epochs[lane], positions[lane])
        return epochs.ravel(), positions.ravel()

    def _fill(self, lane: int, start: int, epochs: Ints, positions: Ints) -> None:
        """Fill both with the lane's samples from its `start`-th on."""
        done = 0
        while done < len(epochs):
            run = self._run(lane, start + done)
            skip = start + done - run.start
            part = slice(done, done + min(len(run.positions) - skip, len(epochs) - done))
            epochs[part] = run.epoch
            positions[part] = run.positions[skip : skip + part.stop - part.start]
            done = part.stop

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
        places = low + self._permutation(high - low, "window", epoch, lane, number)
        shard = line.ends.searchsorted(places, "right")
        return _Run(served + low - begin, epoch, line.positions[shard] + places - line.starts[shard])

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

        Raw bits, since NumPy promises them for ever; its own `permutation` may change with a version.
        """
        raw = np.random.Philox(key=hash64(*self._key, *name)).random_raw(size)
        return raw.argsort(kind="stable")


def default_lanes(batch_size: int) -> int:
    """The largest divisor of the global batch not above `MAX_LANES`."""
    return max(lanes for lanes in range(1, MAX_LANES + 1) if batch_size % lanes == 0)
