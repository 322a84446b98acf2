"""What a login node can say of a run's data before anything starts: from listings and indexes, never from pixels."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from synthos.batch import Input
from synthos.data.indexing import index_shards, processes_for, unindexed
from synthos.data.shards import MissingShards, ShardPlace, identity_by_place, list_shards
from synthos.data.source import check_config, open_split
from synthos.data.store.files import Storage
from synthos.data.store.location import is_remote
from synthos.data.store.retry import StorageError
from synthos.schema import DataConfig


@dataclass(frozen=True)
class DataFacts:
    """None where only an index that is not built yet could tell."""

    samples: int | None = None  # trained on, per epoch
    held_out: int | None = None
    shards: int | None = None  # of training and validation
    fingerprint: str | None = None  # of training and validation
    missing: list[str] = field(default_factory=list)  # a line for each shard that is not there, or can't be reached


def facts(config: DataConfig, inputs: Mapping[str, Input], build: bool, ranks: int = 1) -> DataFacts:
    """What the run's data are.

    With `build`, indexes that are missing are built and left beside their shards; else nothing is written.
    Raises ValueError for what is there and wrong: a damaged shard, too many samples without a caption, a sample in both
    splits; with data.streaming, fewer shards than the readers of so many `ranks`.
    """
    check_config(config)
    storage = Storage()
    places, missing = list_data(config, storage)
    if missing:
        return DataFacts(missing=missing)
    indexed = places
    if config.streaming is not None:
        indexed = list_shards(config.validation, "data.validation", storage) if config.validation is not None else []
        check_readers(config, len(places) - len(indexed), ranks)
    if not build and not all(is_remote(place.index) or Path(place.index).is_file() for place in indexed):
        return DataFacts(shards=len(places))
    absent = unindexed(indexed)
    for _ in index_shards(absent, None, processes_for(absent), storage):
        pass  # a damaged shard is named when it is opened
    try:
        training, held_out = open_split(config, inputs, storage)
    except StorageError as error:
        return DataFacts(shards=len(places), missing=[f"data: {error}"])
    of_their_own = held_out if config.validation is not None else []
    names = [source.fingerprint for source in [*training, *of_their_own]]
    samples = sum(map(len, training))
    if config.streaming is not None:
        names, samples = [*names, identity_by_place(places)], config.streaming.samples_per_epoch
    identity = hashlib.blake2b(" ".join(names).encode(), digest_size=16).hexdigest()
    return DataFacts(samples, sum(map(len, held_out)), len(places), identity, [])


def check_readers(config: DataConfig, shards: int, ranks: int) -> None:
    """Raise ValueError where data.streaming has fewer shards than readers."""
    readers = max(config.workers, 1)
    if shards < ranks * readers:
        raise ValueError(
            f"data.streaming: {shards} shards are too few for {ranks} ranks of {readers} readers, which need one each; "
            "lower data.workers, or write smaller shards"
        )


def list_data(config: DataConfig, storage: Storage) -> tuple[list[ShardPlace], list[str]]:
    """All shards of a run, and a line for each missing one."""
    places: list[ShardPlace] = []
    missing: list[str] = []
    specs = {"data.shards": config.shards}
    if config.mix is not None:
        specs = {f"data.mix.{name}.shards": source.shards for name, source in config.mix.items()}
    if config.validation is not None:
        specs["data.validation"] = config.validation
    for key, spec in specs.items():
        try:
            places += list_shards(spec, key, storage)
        except MissingShards as error:
            missing += error.lines
        except StorageError as error:
            missing.append(f"{key}: {error}")
    return places, missing
