"""What a login node can say of a run's data before anything starts: from listings and indexes, never from pixels."""

import hashlib
from dataclasses import dataclass, field

from synthos.batch import Input
from synthos.data.index import index_path
from synthos.data.shards import MissingShards, list_shards
from synthos.data.source import check_config, open_split
from synthos.schema import DataConfig


@dataclass(frozen=True)
class DataFacts:
    """None where only an index that is not built yet could tell."""

    samples: int | None = None  # trained on, per epoch
    held_out: int | None = None
    shards: int | None = None  # of training and validation
    fingerprint: str | None = None  # of training and validation
    missing: list[str] = field(default_factory=list)  # one line for each shard that is not there


def facts(config: DataConfig, inputs: dict[str, Input], build: bool) -> DataFacts:
    """What the run's data are.

    With `build`, indexes that are missing are built and left beside their shards; else nothing is written.
    Raises ValueError for what is there and wrong: a damaged shard, a sample without a caption, a sample in both splits.
    """
    check_config(config)
    paths, missing = _list(config)
    if missing:
        return DataFacts(missing=missing)
    if not build and not all(index_path(path).is_file() for path in paths):
        return DataFacts(shards=len(paths))
    training, held_out = open_split(config, inputs)
    names = [training.fingerprint] + ([held_out.fingerprint] if config.validation is not None else [])
    identity = hashlib.blake2b(" ".join(names).encode(), digest_size=16).hexdigest()
    return DataFacts(len(training), len(held_out), len(paths), identity, [])


def _list(config: DataConfig) -> tuple[list[str], list[str]]:
    """Paths of all shards, and a line for each missing one."""
    paths: list[str] = []
    missing: list[str] = []
    specs = {"data.shards": config.shards}
    if config.validation is not None:
        specs["data.validation"] = config.validation
    for key, spec in specs.items():
        try:
            paths += list_shards(spec, key)
        except MissingShards as error:
            missing += error.lines
    return paths, missing
