"""The stream of training batches, which can stop and go on at exactly the next sample, and the held-out samples.

The planner lives in this process and hands read instructions to stateless readers; the state is that of the plan after
the batch that training consumed last, whatever was fetched ahead. So it is a few numbers, equal on every rank.
"""

import atexit
import hashlib
import itertools
import json
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthos.batch import Batch, Fault, Input
from synthos.data.bad import Budget
from synthos.data.buckets import bucket_sizes
from synthos.data.loader import open_loader
from synthos.data.mixture import Mixture, weight_schedule
from synthos.data.order import Order
from synthos.data.plan import Planned, Planner, Position, check_lanes, first_slot
from synthos.data.reader import Instruction, Reader
from synthos.data.shelf import Shelf
from synthos.data.source import Source, open_split
from synthos.schema import DataConfig

log = logging.getLogger(__name__)
VERSION = 2  # of the state
AHEAD = 16  # batches whose shards are fetched before they are read, where shards are fetched whole


class Stream:
    """This rank's share of one global batch after another.

    Args:
        config: the run's data.
        inputs: what the recipe reads of a sample.
        batch_size: B, the global batch.
        rank, world: which of how many equal shares is ours.
        seed: the run's.

    Raises ValueError as `open_split` does, and where `world` does not divide the global batch.
    """

    def __init__(
        self, config: DataConfig, inputs: dict[str, Input], *, batch_size: int, rank: int, world: int, seed: int
    ) -> None:
        check_share(batch_size, world)
        self.config, self.seed = config, seed
        self.sources, _ = open_split(config, inputs)
        self.planner = build_planner(config, self.sources, batch_size, seed)
        self.share = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self.cursor = 0  # batches consumed by the whole run
        self.budget = Budget(config.max_bad_fraction, config.max_bad_per_shard)
        self._shelf = Shelf(config)
        self._reader = Reader(self.sources, inputs, bucket_sizes(config), self._shelf)
        self._batches: Iterator[Batch] | None = None
        self._ahead: deque[tuple[Planned, Position]] = deque()  # planned, not yet given to readers
        self._given: deque[tuple[Planned, Position]] = deque()  # given to readers, not yet consumed
        self._latest: Planned | None = None
        self._position = self.planner.position()

    def __len__(self) -> int:
        """Training samples in an epoch."""
        return self.planner.num_samples

    def next(self) -> Batch:
        """This rank's B / W samples of the next global batch.

        Raises RuntimeError naming shard and key for a sample that can't be used and has no substitute, and StorageError
        where a store or a disk fails.
        """
        if self._batches is None:
            self._batches = self._read_ahead()
        batch = next(self._batches)
        self._latest, self._position = self._given.popleft()
        self.cursor += 1
        return batch

    def count(self, faults: Sequence[Fault]) -> None:
        """Tell what bad samples all ranks met in the latest batch; RuntimeError where they are too many."""
        self.budget.count(self.cursor * self.planner.batch_size, faults)

    def digest(self) -> str:
        """Hash of the samples that the latest global batch was planned of, 16 hex digits; equal on every rank."""
        assert self._latest is not None
        return digest(self._latest)

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands and what its order depends on: plain JSON, the same on every rank."""
        position = {"cursor": self.cursor, "plan": self._position.as_json(), "bad": self.budget.state_dict()}
        return {"version": VERSION, **identity(self.config, self.sources, self.planner, self.seed), **position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the sample after the last one consumed when `state` was taken.

        Raises ValueError naming everything in which the state's data, seed or batch differ from this stream's, and what
        to do.
        """
        expected = {"version": VERSION, **identity(self.config, self.sources, self.planner, self.seed)}
        wrong = [f"{k} is {v!r}, the checkpoint has {state.get(k)!r}" for k, v in expected.items() if state.get(k) != v]
        if wrong:
            raise ValueError(
                "data: the checkpoint belongs to another order of samples: "
                + "; ".join(wrong)
                + ". Restore what was changed, or start another run from its weights (init_from=)"
            )
        try:
            cursor, position = int(state["cursor"]), Position.from_json(state["plan"])
            self.budget.load_state_dict(state["bad"])
            if len(position.waiting) != self.planner.num_buckets:
                raise ValueError(f"samples wait in {len(position.waiting)} buckets")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"data: the checkpoint's position is damaged: {error!r}; remove this checkpoint, and the run goes on "
                "from the one before"
            ) from None
        self.close()
        self.cursor, self._position = cursor, position
        self.planner.go_to(position)

    def close(self) -> None:
        """Stop the readers and forget what they have fetched ahead; `next` would start them again."""
        atexit.unregister(self.close)
        # Dropping the iterator stops its readers too, but not while the traceback of an error still holds it.
        stop = getattr(self._batches, "_shutdown_workers", None)
        if stop is not None:
            stop()
        self._shelf.close()
        if self._batches is not None:
            self.planner.go_to(self._position)
        self._batches = None
        self._ahead.clear()
        self._given.clear()

    def _read_ahead(self) -> Iterator[Batch]:
        """Our share of every batch from the cursor on, without end."""
        workers = self.config.workers
        instructions = map(self._instruct, itertools.count(self.cursor))
        loader = open_loader(self._reader, workers, tell=self.share.start == 0, batch_sampler=instructions)
        if workers:
            atexit.register(self.close)  # Python would end readers by SIGTERM, which they ignore, and wait for ever
        return iter(loader)

    def _instruct(self, number: int) -> list[Instruction]:
        """Read instructions for our share of the next batch to be read."""
        whole = any(self._shelf.whole(source.places[0].url) for source in self.sources)
        while len(self._ahead) < (AHEAD if whole else 1):
            planned = self.planner.next()
            self._ahead.append((planned, self.planner.position()))
        if whole:
            self._shelf.prefetch(self._shards(planned for planned, _ in [*self._given, *self._ahead]))
        planned, position = self._ahead.popleft()
        self._given.append((planned, position))
        return [instruct(planned, self.sources, self.share)]

    def _shards(self, batches: Iterator[Planned]) -> dict[str, int]:
        """The shards of our share of some batches and their checksums, in the order in which they are met."""
        found: dict[str, int] = {}
        for planned in batches:
            asked = instruct(planned, self.sources, self.share)
            for source, shard in zip(asked.sources.tolist(), asked.shards.tolist(), strict=True):
                found[self.sources[source].places[shard].url] = self.sources[source].lines[shard].checksum
        return found


def build_planner(config: DataConfig, sources: list[Source], batch_size: int, seed: int) -> Planner:
    """The plan of a run's batches; raises ValueError where it can have none."""
    lanes = check_lanes(config.lanes, batch_size)
    schedule = weight_schedule(config.mix, [len(source) for source in sources])
    buckets, samples = [source.selection.buckets for source in sources], sum(map(len, sources))
    return Planner(
        [Order(source.sizes, seed, source.fingerprint, lanes, config.window) for source in sources],
        Mixture({first_slot(step, samples, batch_size, config.tail): weights for step, weights in schedule.items()}),
        batch_size=batch_size,
        buckets=[b for b in buckets if b is not None] or None,
        num_buckets=len(bucket_sizes(config)),
        tail=config.tail,
    )


def identity(config: DataConfig, sources: list[Source], planner: Planner, seed: int) -> dict[str, Any]:
    """All that the order of samples depends on, as plain JSON."""
    schedule = weight_schedule(config.mix, [len(source) for source in sources])
    left_out = [hashlib.blake2b(s.selection.left_out.tobytes(), digest_size=8).hexdigest() for s in sources]
    return {
        "seed": seed,
        "sources": [
            {"name": s.name, "fingerprint": s.fingerprint, "samples": len(s), "left_out": digest}
            for s, digest in zip(sources, left_out, strict=True)
        ],
        "weights": {str(step): weights for step, weights in schedule.items()},
        "buckets": [list(size) for size in bucket_sizes(config)],
        "holdout_fraction": config.holdout_fraction,
        "batch_size": planner.batch_size,
        "lanes": planner.orders[0].lanes,
        "window": config.window,
        "tail": config.tail,
    }


def digest(planned: Planned) -> str:
    """Hash of the samples that a global batch is planned of, 16 hex digits."""
    found = hashlib.blake2b(digest_size=8)
    for column in (planned.sources, planned.epochs, planned.positions):
        found.update(column.astype("<i8").tobytes())
    return found.hexdigest()


def instruct(planned: Planned, sources: list[Source], share: slice) -> Instruction:
    """How to read a share of a batch."""
    numbers, positions = planned.sources[share], planned.positions[share]
    shards, rows = np.empty_like(positions), np.empty_like(positions)
    for number, source in enumerate(sources):
        own = numbers == number
        shards[own], rows[own] = source.find(positions[own])
    weights = planned.real.astype(np.float32) * (len(planned.real) / planned.real.sum())
    return Instruction(numbers, shards, rows, planned.epochs[share], weights[share].astype(np.float32), planned.bucket)


class HeldOut:
    """The validation split, ordered by sample id, so that the first n are a fair draw from all shards.

    Its `ids` are int64 [N]; N is 0 where the config names no validation shards and holds nothing out.
    """

    def __init__(self, config: DataConfig, inputs: dict[str, Input]) -> None:
        _, self._sources = open_split(config, inputs)
        self._reader = Reader(self._sources, inputs, [(config.height, config.width)], Shelf(config))
        ids, places = [np.empty(0, np.uint64)], [np.empty((0, 3), np.int64)]
        for number, source in enumerate(self._sources):
            shards, rows = source.find(np.arange(len(source)))
            ids.append(self._reader.ids(number, shards, rows))
            places.append(np.stack([np.full_like(shards, number), shards, rows], axis=1))
        unsorted = np.concatenate(ids)
        order = unsorted.argsort()
        self._places: NDArray[np.int64] = np.concatenate(places)[order]  # source, shard and row, [N, 3]
        self.ids: Tensor = torch.from_numpy(unsorted[order].view(np.int64))

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: list[int]) -> Batch:
        """The samples at `rows` of that order, as of epoch 0; another one of theirs stands for a bad one."""
        sources, shards, numbers = self._places[rows].T
        weights = np.ones(len(rows), np.float32)
        batch = self._reader.__getitems__([Instruction(sources, shards, numbers, np.zeros_like(sources), weights, 0)])
        for fault in batch.faults:
            known = json.dumps({"source": fault.source, "shard": fault.shard, "key": fault.key})
            log.warning(
                "held out: sample %r %s; leave it out by a line of data.known_bad: %s", fault.key, fault.error, known
            )
        return batch


def check_share(batch_size: int, world: int) -> None:
    """Raise ValueError where the ranks can't share a global batch equally."""
    if batch_size % world:
        near = max(batch_size // world, 1) * world
        raise ValueError(f"batch.size: {batch_size} does not divide among {world} ranks; {near} and {near + world} do")
