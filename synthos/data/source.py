"""A source: named shards, opened and checked, and split into what is trained on and what is held out."""

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from synthos.batch import Input
from synthos.data.index import ShardIndex, open_index
from synthos.data.manifest import fingerprint, read_manifest
from synthos.data.reader import Sample
from synthos.data.shards import Spec, list_shards
from synthos.keys import hash64, sample_id
from synthos.schema import DataConfig

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    """One shard of a source."""

    path: str
    name: str  # of the file, part of every sample's id
    index: ShardIndex
    columns: dict[str, Rows]  # input -> which of the index's extensions serves it, [N]
    rows: Rows  # samples that the source uses


@dataclass
class Source:
    """Samples in the order of their shards; a position counts the used ones over all shards."""

    name: str
    shards: list[Shard]
    ends: Rows = field(init=False)  # position at which each shard ends

    def __post_init__(self) -> None:
        self.ends = np.cumsum(self.sizes, dtype=np.int64)

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Used samples of each shard."""
        return [len(shard.rows) for shard in self.shards]

    @property
    def fingerprint(self) -> str:
        """Identity of the shards, whatever part of them is used."""
        return fingerprint(shard.index.line(shard.name) for shard in self.shards)

    def ids(self, positions: Rows) -> NDArray[np.uint64]:
        """Sample ids at `positions`, [n]."""
        found = (self._id(*self._find(position)) for position in positions.tolist())
        return np.fromiter(found, np.uint64, len(positions))

    def sample(self, position: int, epoch: int, identity: int) -> Sample:
        """How to read the sample at `position`, whose id is `identity`."""
        shard, row = self._find(position)
        members = {name: shard.index.member(row, int(column[row])) for name, column in shard.columns.items()}
        return Sample(identity, epoch, shard.path, shard.index.key(row), members)

    def split(self, fraction: float) -> tuple["Source", "Source"]:
        """What stays and what is held out: samples whose id's hash lies in the lowest `fraction` of all hashes."""
        stay, held = [], []
        for shard in self.shards:
            hashes = (hash64("holdout", self._id(shard, row)) for row in shard.rows.tolist())
            out = np.fromiter((value < fraction * 2.0**64 for value in hashes), bool, len(shard.rows))
            stay.append(replace(shard, rows=shard.rows[~out]))
            held.append(replace(shard, rows=shard.rows[out]))
        return Source(self.name, stay), Source(self.name, held)

    def _id(self, shard: Shard, row: int) -> int:
        return sample_id(self.name, shard.name, shard.index.key(row))

    def _find(self, position: int) -> tuple[Shard, int]:
        """The shard of a sample and its row there."""
        number = int(self.ends.searchsorted(position, "right"))
        shard = self.shards[number]
        return shard, int(shard.rows[position - int(self.ends[number])])  # counted back from the shard's end


def open_split(config: DataConfig, inputs: dict[str, Input]) -> tuple[Source, Source]:
    """The training source and the held-out one, which may be empty; indexes that are missing are built.

    Raises ValueError, in one message naming config key, shard and sample, for shards that are missing or damaged,
    samples that lack an input, and samples that are in both.
    """
    check_config(config)
    training = open_source(config.name, config.shards, "data.shards", inputs)
    if config.validation is not None:
        held_out = open_source(f"{config.name}/validation", config.validation, "data.validation", inputs)
        _refuse_shared(training, held_out, inputs)
    else:
        training, held_out = training.split(config.holdout_fraction)
        if config.holdout_fraction and not len(held_out):
            raise ValueError(
                f"data.holdout_fraction: {config.holdout_fraction} of {len(training)} samples holds none out; "
                "expected more, as in 0.1, or data.validation"
            )
    if not len(training):
        raise ValueError(f"data.shards: {config.shards} leaves no sample to train on")
    return training, held_out


def open_source(name: str, spec: Spec, key: str, inputs: dict[str, Input]) -> Source:
    """All samples of the shards that `spec` names, each checked to have every input; `key` is named in errors."""
    manifest = cache(read_manifest)
    shards = []
    for path in map(Path, list_shards(spec, key)):
        index = open_index(str(path))
        expected = (manifest(path.parent) or {}).get(path.name, index.line(path.name))
        if expected != index.line(path.name):
            raise ValueError(
                f"{key}: {path} has {len(index)} samples in {index.bytes} bytes, manifest.json says "
                f"{expected.samples} in {expected.bytes}, or of other content: the shard was changed; restore it"
            )
        columns = {name: _choose(f"{key}: {path}", index, name, item) for name, item in inputs.items()}
        shards.append(Shard(str(path), path.name, index, columns, np.arange(len(index))))
    return Source(name, shards)


def check_config(config: DataConfig) -> None:
    """Raise ValueError for impossible numbers, and where held-out samples are asked for in two ways."""
    for name, least in {"height": 1, "width": 1, "window": 1, "workers": 0}.items():
        if getattr(config, name) < least:
            raise ValueError(f"data.{name}: {getattr(config, name)} is not allowed; at least {least}")
    if not 0 <= config.holdout_fraction < 1:
        raise ValueError(f"data.holdout_fraction: {config.holdout_fraction} is not allowed; at least 0 and below 1")
    if config.validation is not None and config.holdout_fraction:
        raise ValueError(
            f"data.holdout_fraction: {config.holdout_fraction} would be ignored, for data.validation names shards; "
            "set data.holdout_fraction=0 or data.validation=null"
        )


def _choose(where: str, index: ShardIndex, name: str, item: Input) -> Rows:
    """The column of the first extension that serves the input, for each sample [N]."""
    chosen = np.full(len(index), -1, np.int64)
    for extension in reversed(item.extensions):
        if extension in index.extensions:
            column = index.extensions.index(extension)
            chosen[index.members["size"][:, column] >= 0] = column
    readable = index.members["width" if item.kind == "image" else "chars"] > 0
    lacking = np.flatnonzero(chosen < 0)
    if len(lacking):
        raise ValueError(f"{where}: {_lacking(index, int(lacking[0]), name, item)}{_more(lacking)}")
    unreadable = np.flatnonzero(~readable[np.arange(len(index)), chosen])
    if len(unreadable):
        fault = "unreadable or larger than 64 megapixels" if item.kind == "image" else "empty or not UTF-8"
        key = index.key(int(unreadable[0]))
        raise ValueError(f"{where}: sample {key!r}: its {name} is {fault}{_more(unreadable)}")
    return chosen


def _lacking(index: ShardIndex, row: int, name: str, item: Input) -> str:
    """That a sample has none of an input's extensions, and which it has."""
    what = "an image" if item.kind == "image" else "a caption"
    has = ", ".join(e for e, m in zip(index.extensions, index.members[row], strict=True) if m["size"] >= 0)
    needed = " or ".join(item.extensions)
    return f"sample {index.key(row)!r} is without {what}: {name} needs a member {needed}, it has {has}"


def _more(rows: Rows) -> str:
    """How many samples beyond the one that is named have its fault."""
    return f"; {len(rows) - 1} more of this shard's samples have the same fault" if len(rows) > 1 else ""


def _refuse_shared(training: Source, held_out: Source, inputs: dict[str, Input]) -> None:
    """A sample is the same where its pictures are: shard, key and caption may differ.

    Where no pictures are read, a sample is the same where all that is read is.
    """
    names = [name for name, item in inputs.items() if item.kind == "image"] or list(inputs)
    wanted: dict[tuple[int, ...], str] = {}  # content -> key
    for shard in held_out.shards:
        for row, content in zip(shard.rows.tolist(), _contents(shard, names).tolist(), strict=True):
            wanted[tuple(content)] = shard.index.key(row)
    likely = np.array([content[0] for content in wanted], np.int64)  # so that few samples are looked at one by one
    for shard in training.shards:
        contents = _contents(shard, names)
        for number in np.flatnonzero(np.isin(contents[:, 0], likely)):
            key = wanted.get(tuple(contents[number].tolist()))
            if key is not None:
                other = shard.index.key(int(shard.rows[number]))
                raise ValueError(
                    f"data.validation: sample {key!r} is also in data.shards, as sample {other!r} of {shard.path}"
                )


def _contents(shard: Shard, names: list[str]) -> Rows:
    """Size and CRC-32, in one number, of what the used samples have for each of the inputs `names`, [n, inputs]."""
    found = [shard.index.members[shard.rows, shard.columns[name][shard.rows]] for name in names]
    return np.stack([(m["size"].astype(np.int64) << 32) | m["checksum"] for m in found], axis=1)
