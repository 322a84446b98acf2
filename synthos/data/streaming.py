"""Training from tars without an index, for shards elsewhere that are only to be passed over.

Each reader (`data.workers` of each rank, at least one) has a lane (`lane`): in every pass over the shards these are
permuted anew and dealt to the lanes, by rank and then by reader. Batches are dealt round a rank's lanes, each of which
goes on for ever; so every rank has as many steps as any other, and an epoch is what `data.streaming.samples_per_epoch`
declares.
"""

import atexit
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from synthos.batch import Batch, Fault, Input
from synthos.data.bad import Budget
from synthos.data.check import check_readers
from synthos.data.lane import Lane, Place
from synthos.data.loader import open_loader
from synthos.data.selection import check_inputs
from synthos.data.shards import identity_by_place, list_shards
from synthos.data.source import check_config
from synthos.data.stream import check_share
from synthos.schema import DataConfig

log = logging.getLogger(__name__)
VERSION = 1  # of the state
PROMISES = (
    "data.streaming: the shards are read without an index. In each pass over them every sample is read once, also "
    "after a stop, but then ranks and readers must be as many as now ({ranks} x {readers}). Not promised: the same "
    "batches on another number of ranks; that {epoch} samples, which nobody has counted, are one pass; that no sample "
    "is both trained on and validated on; that damage is found before it is met. A resume reads up to {block} samples "
    "of each reader again. An index (`synthos data index`) lifts all of this."
)


class Streaming:
    """This rank's share of one global batch after another, as `stream.Stream` gives them, of shards without an index.

    Args:
        config: the run's data; `streaming` is set.
        inputs: what the recipe reads of a sample.
        batch_size: B, the global batch.
        rank, world: which of how many equal shares is ours.
        seed: the run's.
        collect: gives every rank's value, by rank; collective.

    Raises ValueError for settings that need an index, and for fewer shards than lanes.
    """

    def __init__(
        self,
        config: DataConfig,
        inputs: dict[str, Input],
        *,
        batch_size: int,
        rank: int,
        world: int,
        seed: int,
        collect: Callable[[Any], list[Any]] = lambda own: [own],
    ) -> None:
        check_share(batch_size, world)
        check_config(config)
        check_inputs(inputs)
        assert config.streaming is not None
        self.config, self.collect, self.rank = config, collect, rank
        places = list_shards(config.shards)
        self.readers = max(config.workers, 1)
        check_readers(config, len(places), world)
        self.identity = {"version": VERSION, "seed": seed, "name": config.name, "shards": identity_by_place(places)}
        self.identity |= {"batch_size": batch_size, "block": config.streaming.block, "ranks": world}
        self.identity |= {"readers": self.readers}
        self.cursor, self.batch_size = 0, batch_size
        self.budget = Budget(config.max_bad_fraction, config.max_bad_per_shard)
        self._lane = Lane(config, inputs, places, seed, batch_size // world, rank, world)
        self._places = [*self._lane.starts]
        self._batches: Iterator[tuple[Batch, Place]] | None = None
        self._digest = ""
        if rank == 0:
            epoch, block = config.streaming.samples_per_epoch, config.streaming.block
            log.warning(PROMISES.format(ranks=world, readers=self.readers, epoch=epoch, block=block))

    def __len__(self) -> int:
        """Samples in an epoch, as declared."""
        assert self.config.streaming is not None
        return self.config.streaming.samples_per_epoch

    def next(self) -> Batch:
        """This rank's B / W samples of the next global batch.

        Raises ValueError naming a damaged shard, RuntimeError where no sample can be used, StorageError where a store
        fails.
        """
        if self._batches is None:
            self._batches = self._read()
        batch, place = next(self._batches)
        self._places[self.cursor % self.readers] = place
        self.cursor += 1
        self._digest = hashlib.blake2b(batch.ids.numpy().tobytes(), digest_size=8).hexdigest()
        return batch

    def count(self, faults: Sequence[Fault]) -> None:
        """Tell what bad samples all ranks met in the latest batch; RuntimeError where they are too many."""
        self.budget.count(self.cursor * self.batch_size, faults)

    def digest(self) -> str:
        """Hash of the samples of this rank's latest batch, 16 hex digits."""
        return self._digest

    def state_dict(self) -> dict[str, Any]:
        """Where every rank's lanes stand: plain JSON, the same on every rank; collective."""
        places = self.collect([asdict(place) for place in self._places])
        return {**self.identity, "cursor": self.cursor, "places": places, "bad": self.budget.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the sample after the last one consumed when `state` was taken.

        Raises ValueError for another data set, seed, batch or number of ranks or readers.
        """
        wrong = [
            f"{key} is {value!r}, the checkpoint has {state.get(key)!r}"
            for key, value in self.identity.items()
            if state.get(key) != value
        ]
        if wrong:
            raise ValueError(
                "data: the checkpoint belongs to another order of samples: "
                + "; ".join(wrong)
                + ". Restore what was changed, or start another run from its weights (init_from=)"
            )
        self.close()
        self.cursor = int(state["cursor"])
        self._places = [Place(**place) for place in state["places"][self.rank]]
        self.budget.load_state_dict(state["bad"])

    def close(self) -> None:
        """Stop the readers and forget what they have fetched ahead; `next` would start them again."""
        atexit.unregister(self.close)
        stop = getattr(self._batches, "_shutdown_workers", None)
        if stop is not None:
            stop()
        self._batches = None

    def _read(self) -> Iterator[tuple[Batch, Place]]:
        """Our batches from the cursor on, without end: of one lane after another."""
        workers = self.config.workers
        self._lane.starts, self._lane.first = [*self._places], self.cursor % self.readers
        if workers:
            atexit.register(self.close)
        return iter(open_loader(self._lane, workers, tell=self.rank == 0, batch_size=None))
