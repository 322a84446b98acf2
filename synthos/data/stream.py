"""The stream of training batches, which can stop and go on at exactly the next sample, and the held-out samples.

The planner lives in this process and hands read instructions to stateless readers; the cursor counts batches that
training has consumed, not those fetched ahead. So the whole state is one number, equal on every rank.
"""

import atexit
import hashlib
import itertools
import signal
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from synthos.batch import Batch, Input
from synthos.data.plan import Plan
from synthos.data.reader import Reader, Sample
from synthos.data.source import open_split
from synthos.schema import DataConfig

VERSION = 1  # of the state


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
        if batch_size % world:
            near = max(batch_size // world, 1) * world
            raise ValueError(
                f"batch.size: {batch_size} does not divide among {world} ranks; {near} and {near + world} do"
            )
        self.config, self.seed, self.rank = config, seed, rank
        self.source, _ = open_split(config, inputs)
        self.fingerprint = self.source.fingerprint
        self.plan = Plan(self.source.sizes, seed, self.fingerprint, batch_size, config.lanes, config.window)
        self.share = batch_size // world
        self.cursor = 0  # samples consumed by the whole run
        self._reader = Reader(inputs, config.height, config.width)
        self._batches: Iterator[Batch] | None = None
        self._planned: deque[NDArray[np.uint64]] = deque()  # ids of global batches given to readers, not yet consumed
        self._latest = np.empty(0, np.uint64)

    def __len__(self) -> int:
        """Training samples in an epoch."""
        return len(self.source)

    def next(self) -> Batch:
        """This rank's B / W samples of the next global batch.

        Raises RuntimeError naming shard and key for a sample that can't be read.
        """
        if self._batches is None:
            self._batches = self._read_ahead()
        batch = next(self._batches)
        self._latest = self._planned.popleft()
        self.cursor += self.plan.batch_size
        return batch

    def digest(self) -> str:
        """Hash of the latest global batch's sample ids, 16 hex digits; equal on every rank, for any number of them."""
        return hashlib.blake2b(self._latest.astype("<u8").tobytes(), digest_size=8).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands and what its order depends on: plain JSON, the same on every rank."""
        return {"version": VERSION, **self._identity(), "cursor_samples": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the sample after the last one consumed when `state` was taken.

        Raises ValueError naming everything in which the state's data, seed or batch differ from this stream's.
        """
        expected = {"version": VERSION, **self._identity()}
        wrong = [f"{k} is {v!r}, the checkpoint has {state.get(k)!r}" for k, v in expected.items() if state.get(k) != v]
        cursor = state.get("cursor_samples")
        if not isinstance(cursor, int) or cursor < 0 or cursor % self.plan.batch_size:
            wrong.append(f"cursor_samples is {cursor!r}, which is no whole number of batches")
        if wrong:
            raise ValueError("data: the checkpoint belongs to another order of samples: " + "; ".join(wrong))
        self.close()
        self.cursor = state["cursor_samples"]

    def close(self) -> None:
        """Stop the readers and forget what they have fetched ahead; `next` would start them again."""
        atexit.unregister(self.close)
        # Dropping the iterator stops its readers too, but not while the traceback of an error still holds it.
        stop = getattr(self._batches, "_shutdown_workers", None)
        if stop is not None:
            stop()
        self._batches = None
        self._planned.clear()

    def _identity(self) -> dict[str, Any]:
        """All that the order of samples depends on."""
        return {
            "seed": self.seed,
            "sources": [{"name": self.source.name, "fingerprint": self.fingerprint, "samples": len(self)}],
            "holdout_fraction": self.config.holdout_fraction,
            "batch_size": self.plan.batch_size,
            "lanes": self.plan.lanes,
            "window": self.plan.window,
            "tail": "carry",
        }

    def _read_ahead(self) -> Iterator[Batch]:
        """Our share of every batch from the cursor on, without end."""
        workers = self.config.workers
        first = self.cursor // self.plan.batch_size
        loader = DataLoader(
            self._reader,
            batch_sampler=map(self._instruct, itertools.count(first)),
            collate_fn=_as_is,
            num_workers=workers,
            # Forked children would inherit locks of CUDA and of this process's threads.
            multiprocessing_context="forkserver" if workers else None,
            worker_init_fn=_ignore_signals if workers else None,
        )
        if workers:
            atexit.register(self.close)  # Python would end readers by SIGTERM, which they ignore, and wait for ever
        return iter(loader)

    def _instruct(self, t: int) -> list[Sample]:
        """Read instructions for our share of global batch t."""
        epochs, positions = self.plan.batch(t)
        ids = self.source.ids(positions)
        self._planned.append(ids)
        ours = slice(self.rank * self.share, (self.rank + 1) * self.share)
        rows = zip(positions[ours].tolist(), epochs[ours].tolist(), ids[ours].tolist(), strict=True)
        return [self.source.sample(*row) for row in rows]


class HeldOut:
    """The validation split, ordered by sample id, so that the first n are a fair draw from all shards.

    Its `ids` are int64 [N]; N is 0 where the config names no validation shards and holds nothing out.
    """

    def __init__(self, config: DataConfig, inputs: dict[str, Input]) -> None:
        _, self._source = open_split(config, inputs)
        ids = self._source.ids(np.arange(len(self._source)))
        self._positions = ids.argsort()
        self._ids = ids[self._positions]
        self._reader = Reader(inputs, config.height, config.width)
        self.ids: Tensor = torch.from_numpy(self._ids.view(np.int64))

    def __len__(self) -> int:
        return len(self._ids)

    def batch(self, rows: list[int]) -> Batch:
        """The samples at `rows` of that order, as of epoch 0."""
        places = [(int(self._positions[row]), 0, int(self._ids[row])) for row in rows]
        return self._reader.__getitems__([self._source.sample(*place) for place in places])


def _as_is(batch: Any) -> Any:
    """Readers return whole batches."""
    return batch


def _ignore_signals(worker: int) -> None:
    """A stop is the training process's to handle; readers that it still needs must not die of the same signal."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
