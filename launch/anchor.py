"""Relative paths of a config, taken from the folder in which it was written: ranks may start anywhere."""

import dataclasses
from pathlib import Path

from synthos.schema import DataConfig, ModelConfig, PartConfig, RunConfig


def anchor(config: RunConfig, folder: Path) -> RunConfig:
    """The same config with its relative paths taken from `folder`."""
    requests = config.validate.requests
    if isinstance(requests, str):
        requests = absolute(requests, folder)
    return dataclasses.replace(
        config,
        data=_anchor_data(config.data, folder),
        model=_anchor_model(config.model, folder),
        init_from=_anchor_id(config.init_from, folder) if config.init_from is not None else None,
        validate=dataclasses.replace(config.validate, requests=requests),
    )


def _anchor_data(data: DataConfig, folder: Path) -> DataConfig:
    def anchored(shards: str | list[str]) -> str | list[str]:
        return absolute(shards, folder) if isinstance(shards, str) else [absolute(shard, folder) for shard in shards]

    mix = data.mix and {name: dataclasses.replace(s, shards=anchored(s.shards)) for name, s in data.mix.items()}
    known_bad, cache = (path and absolute(path, folder) for path in (data.known_bad, data.cache))
    shards, validation = (shards and anchored(shards) for shards in (data.shards, data.validation))
    return dataclasses.replace(data, shards=shards, validation=validation, mix=mix, known_bad=known_bad, cache=cache)


def _anchor_model(model: ModelConfig, folder: Path) -> ModelConfig:
    def anchored(part: PartConfig) -> PartConfig:
        return dataclasses.replace(part, path=_anchor_id(part.path, folder))

    return dataclasses.replace(model, parts={name: anchored(part) for name, part in model.parts.items()})


def _anchor_id(name: str, folder: Path) -> str:
    """The path from `folder` of a file or folder that is there; anything else is a hub id."""
    path = absolute(name, folder)
    return path if Path(path).exists() else name


def absolute(path: str, folder: Path) -> str:
    """`path` from `folder`; addresses such as s3://bucket/a.tar stay as they are."""
    return path if "://" in path else str(folder / Path(path).expanduser())
