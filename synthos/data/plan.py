"""The global batches of a run: which samples, in which shape. Every rank plans all of it, and reads its own share.

Slots n = 0, 1, 2, ... are dealt to the sources (`mixture`), each of which has an order of its own (`order`). B slots at
a time are drawn; their samples wait in the queue of their bucket, the shape in which they are read, and a queue of B
becomes a batch: all ranks share a shape. Without buckets there is one queue, which each draw fills and each batch
empties. So the whole state is the number of slots drawn and the slots that wait, whatever ranks and workers there are.

An epoch of the run is as many slots as the sources have samples. At its end (`tail`) what waits opens the next one
(`carry`), is left out (`drop`), or is filled up to a batch with samples of weight 0 (`pad`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from synthos.data.mixture import Mixture
from synthos.data.order import Order
from synthos.schema import RunConfig

MAX_LANES = 64
Tail = Literal["carry", "drop", "pad"]
Ints = NDArray[np.int64]
SLOT, SOURCE, NUMBER, EPOCH, POSITION = range(5)  # rows of a table of samples, int64 [5, n]
AHEAD = 1 << 15  # slots looked up together


@dataclass(frozen=True)
class Planned:
    """One global batch, each array [B]."""

    sources: Ints
    epochs: Ints  # of the sample's own source
    positions: Ints  # in the source
    real: NDArray[np.bool_]  # False: fills the batch up, and counts nothing
    bucket: int


@dataclass(frozen=True)
class Position:
    """Where a plan stands: all of its state."""

    drawn: int  # slots
    waiting: list[Ints]  # drawn slots whose samples are in no batch yet, of each bucket

    def as_json(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "waiting": [slots.tolist() for slots in self.waiting]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Position":
        """Raises ValueError, TypeError or KeyError for what `as_json` can't have made."""
        drawn, waiting = value["drawn"], [np.array(slots, np.int64) for slots in value["waiting"]]
        if not isinstance(drawn, int) or any(len(s) and not 0 <= s.min() <= s.max() < drawn for s in waiting):
            raise ValueError(f"{drawn!r} slots drawn, and others wait")
        return cls(drawn, waiting)


class Planner:
    """Plans one global batch after another.

    Args:
        orders: of each source.
        mixture: of them.
        buckets: of each source, the bucket of the sample at each position, uint8 [N]; None where there is one bucket.
        num_buckets: how many there are.
        batch_size: B, the global batch.
        tail: what becomes of the rest of an epoch.

    Raises ValueError where no batch could ever be filled.
    """

    def __init__(
        self,
        orders: Sequence[Order],
        mixture: Mixture,
        *,
        batch_size: int,
        buckets: Sequence[NDArray[np.uint8]] | None = None,
        num_buckets: int = 1,
        tail: Tail = "carry",
    ) -> None:
        self.orders, self.mixture, self.buckets = orders, mixture, buckets
        self.batch_size, self.num_buckets, self.tail = batch_size, num_buckets, tail
        self.num_samples = sum(order.num_samples for order in orders)  # an epoch
        if tail == "drop" and self.num_samples < batch_size:
            raise ValueError(
                f"data.tail: drop would leave out every sample: an epoch has {self.num_samples}, batch.size is "
                f"{batch_size}; expected carry or pad, or a smaller batch"
            )
        self.drawn = 0
        self.queues = [np.empty((5, 0), np.int64)] * num_buckets
        self._ahead = self.queues[0]  # of slots that will be drawn next

    def next(self) -> Planned:
        """The next global batch. Raises RuntimeError if `drop` has left out a whole epoch."""
        while not (ready := [b for b, queue in enumerate(self.queues) if queue.shape[1] >= self.batch_size]):
            waiting = [b for b, queue in enumerate(self.queues) if queue.shape[1]]
            if waiting and self.tail != "carry" and self.drawn % self.num_samples == 0:
                if self.tail == "pad":
                    return self._emit(min(waiting, key=lambda b: int(self.queues[b][SLOT, 0])))
                self._drop()
            self._draw()
        return self._emit(min(ready, key=lambda b: int(self.queues[b][SLOT, self.batch_size - 1])))

    def position(self) -> Position:
        return Position(self.drawn, [queue[SLOT] for queue in self.queues])

    def go_to(self, position: Position) -> None:
        """Go on after the batch at which `position` was taken."""
        assert len(position.waiting) == self.num_buckets
        self.drawn = position.drawn
        self._ahead = np.empty((5, 0), np.int64)
        self.queues = [self._find(slots) for slots in position.waiting]

    def _draw(self) -> None:
        """Put the samples of the next slots to the queues of their buckets."""
        stop = self.drawn + self.batch_size
        if self.tail != "carry":
            stop = min(stop, (self.drawn // self.num_samples + 1) * self.num_samples)
        found = self._look_ahead(stop)
        self.drawn = stop
        if self.buckets is None:
            self.queues[0] = np.concatenate([self.queues[0], found], axis=1)
            return
        bucket = np.empty(found.shape[1], np.uint8)
        for source, buckets in enumerate(self.buckets):
            own = found[SOURCE] == source
            bucket[own] = buckets[found[POSITION, own]]
        for number in np.unique(bucket).tolist():
            self.queues[number] = np.concatenate([self.queues[number], found[:, bucket == number]], axis=1)

    def _look_ahead(self, stop: int) -> Ints:
        """The samples of the slots from the first undrawn one to `stop`."""
        if self._ahead.shape[1] < stop - self.drawn:
            ahead = self.drawn + min(AHEAD, self.num_samples)  # small data sets have an order per epoch to make
            self._ahead = self._find(np.arange(self.drawn, max(stop, ahead)))
        found, self._ahead = np.split(self._ahead, [stop - self.drawn], axis=1)
        return found

    def _find(self, slots: Ints) -> Ints:
        """What the slots, which ascend, hold, [5, n]."""
        found = np.empty((5, len(slots)), np.int64)
        found[SLOT] = slots
        found[SOURCE], found[NUMBER] = self.mixture.deal(slots)
        for source, order in enumerate(self.orders):
            own = np.flatnonzero(found[SOURCE] == source)
            found[EPOCH, own], found[POSITION, own] = order.places(found[NUMBER, own])
        return found

    def _emit(self, bucket: int) -> Planned:
        """The first B of a queue, lane after lane; fewer are filled up with themselves."""
        batch, self.queues[bucket] = np.split(self.queues[bucket], [self.batch_size], axis=1)
        rows = (batch[NUMBER] % self.orders[0].lanes).astype(np.uint16).argsort(kind="stable")
        batch = batch[:, np.resize(rows, self.batch_size)]
        real = np.arange(self.batch_size) < len(rows)
        return Planned(batch[SOURCE], batch[EPOCH], batch[POSITION], real, bucket)

    def _drop(self) -> None:
        if sum(queue.shape[1] for queue in self.queues) == self.num_samples:
            raise RuntimeError(
                f"data.tail: drop has left out a whole epoch: none of {self.num_buckets} buckets had "
                f"{self.batch_size} of its {self.num_samples} samples; expected carry or pad, or fewer buckets"
            )
        self.queues = [queue[:, :0] for queue in self.queues]


def first_slot(step: int, num_samples: int, batch_size: int, tail: Tail) -> int:
    """The first slot that is drawn after `step` batches, where there is one bucket; buckets let some wait longer."""
    if tail == "carry":
        return step * batch_size
    batches = -(-num_samples // batch_size) if tail == "pad" else max(num_samples // batch_size, 1)  # of an epoch
    return step // batches * num_samples + step % batches * batch_size


def steps_of(epochs: float, num_samples: int, batch_size: int, tail: Tail) -> int:
    """The batches of so many epochs, where there is one bucket; of a part of an epoch, those that it fills."""
    if tail == "carry":
        return math.floor(epochs * num_samples / batch_size + 1e-9)  # 0.29 * 100 is 28.999...
    whole = -(-num_samples // batch_size) if tail == "pad" else num_samples // batch_size
    return math.floor(epochs) * whole + min(math.floor(epochs % 1 * num_samples / batch_size + 1e-9), whole)


def last_step(config: RunConfig, samples: int) -> int:
    """The number of optimiser steps, from `optim.steps` or from epochs of `samples`.

    Raises ValueError where epochs have no fixed number of steps.
    """
    if config.optim.steps is not None:
        return config.optim.steps
    if config.data.buckets and config.data.tail != "carry":
        raise ValueError(
            f"optim.epochs: with data.buckets and data.tail={config.data.tail} its steps depend on what the buckets "
            "hold; expected optim.steps, or data.tail=carry"
        )
    return steps_of(config.optim.epochs or 0, samples, config.batch.size, config.data.tail)


def default_lanes(batch_size: int) -> int:
    """The largest divisor of the global batch not above `MAX_LANES`."""
    return max(lanes for lanes in range(1, MAX_LANES + 1) if batch_size % lanes == 0)


def check_lanes(lanes: int | None, batch_size: int) -> int:
    """K, by default `default_lanes`. Raises ValueError where it does not divide the batch."""
    near = default_lanes(batch_size)
    if lanes is not None and (lanes < 1 or batch_size % lanes):
        raise ValueError(f"data.lanes: {lanes} does not divide batch.size {batch_size}; {near} does")
    return lanes or near
