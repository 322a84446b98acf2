"""Sources: named shards, opened and checked, and split into what is trained on and what is held out.

A source is opened from the indexes of its shards. Where a manifest lists them and they hold many samples, what was
found is kept in a table below `data.cache`, so that opening the source again reads no index at all.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from synthos.batch import Input
from synthos.data.bad import check_faults, read_known_bad
from synthos.data.buckets import bucket_sizes
from synthos.data.img2dataset import failed_keys, incomplete
from synthos.data.index import ShardIndex, open_index
from synthos.data.manifest import ShardLine, fingerprint
from synthos.data.mixture import weight_schedule
from synthos.data.overlap import Contents, contents_of, refuse_shared
from synthos.data.selection import Rows, Selection, Selector, check_inputs
from synthos.data.shards import ShardPlace, Spec, list_shards
from synthos.data.store.files import Storage
from synthos.data.store.location import is_remote, masked
from synthos.keys import hash64
from synthos.schema import DataConfig

TABLE_SAMPLES = 200_000  # from which on what was found is worth keeping
TABLE_FORMAT = 1


@dataclass(frozen=True)
class Source:
    """Samples in the order of their shards; a position counts the used ones over all shards."""

    name: str
    places: list[ShardPlace]
    lines: list[ShardLine]
    selection: Selection
    rows: Rows | None = None  # used ones, where they are few; default: all but those left out
    starts: Rows = field(init=False, compare=False)  # row at which each shard starts, and the end of the last, [S + 1]

    def __post_init__(self) -> None:
        counts = np.array([0] + [line.samples for line in self.lines], np.int64)
        object.__setattr__(self, "starts", counts.cumsum())

    def __len__(self) -> int:
        if self.rows is not None:
            return len(self.rows)
        return self.selection.num_rows - len(self.selection.left_out)

    @property
    def sizes(self) -> Rows:
        """Used samples of each shard, [S]."""
        if self.rows is not None:
            return np.diff(self.rows.searchsorted(self.starts))
        return np.diff(self.starts) - np.diff(self.selection.left_out.searchsorted(self.starts))

    @property
    def fingerprint(self) -> str:
        """Identity of the shards, whatever part of them is used."""
        return fingerprint(self.lines)

    def find(self, positions: Rows) -> tuple[Rows, Rows]:
        """The shard of each of `positions`, and the sample's row there; int64 [n] each."""
        if self.rows is not None:
            rows = self.rows[positions]
        else:  # as many rows come before it as used ones do, and those left out in between
            gaps = self.selection.left_out - np.arange(len(self.selection.left_out))
            rows = positions + gaps.searchsorted(positions, "right")
        shards = self.starts.searchsorted(rows, "right") - 1
        return shards, rows - self.starts[shards]

    def used(self, row: int) -> tuple[int, int] | None:
        """The shard and the row there of one of all rows; None if it is not used."""
        listed = self.selection.left_out if self.rows is None else self.rows
        at = int(listed.searchsorted(row))
        if (at < len(listed) and listed[at] == row) == (self.rows is None):
            return None
        shard = int(self.starts.searchsorted(row, "right")) - 1
        return shard, row - int(self.starts[shard])

    def for_readers(self) -> "Source":
        """The same without what only planning needs."""
        return replace(self, selection=replace(self.selection, buckets=None, faults=[]))

    def held_out(self) -> "Source":
        """The samples that validation uses."""
        return Source(self.name, self.places, self.lines, self.selection, self.selection.held_out)


def open_split(
    config: DataConfig, inputs: Mapping[str, Input], storage: Storage | None = None
) -> tuple[list[Source], list[Source]]:
    """The training sources, and the held-out ones, which may be empty; indexes that are missing are built.

    With `data.streaming` nothing is opened for training. Raises ValueError, naming config key, shard and sample, for
    shards that are missing or damaged, more samples that can't be used than the config allows, samples that are in
    both, and inputs that are never read.
    """
    check_config(config)
    check_inputs(inputs)
    storage = storage or Storage()
    held_out: list[Source] = []
    refused: Contents = {}
    if config.validation is not None:
        name, key = f"{config.name}/validation", "data.validation"
        opened = open_source(config, name, config.validation, key, inputs, storage, Purpose("validation"))
        held_out = [opened]
        refused = contents_of(opened.places, opened.selection.left_out, inputs, storage)
    if config.streaming is not None:
        return [], held_out
    purpose = Purpose("training", config.holdout_fraction, held_out[0].fingerprint if held_out else "", refused)
    specs = {config.name: (config.shards, "data.shards")}
    if config.mix is not None:
        specs = {name: (source.shards, f"data.mix.{name}.shards") for name, source in config.mix.items()}
    training = [open_source(config, name, *spec, inputs, storage, purpose) for name, spec in specs.items()]
    if config.holdout_fraction:
        held_out = [source.held_out() for source in training]
        if not any(map(len, held_out)):
            raise ValueError(
                f"data.holdout_fraction: {config.holdout_fraction} of {sum(map(len, training))} samples holds none "
                "out; expected more, as in 0.1, or data.validation"
            )
    for source, (spec, key) in zip(training, specs.values(), strict=True):
        if not len(source):
            raise ValueError(f"{key}: {spec} leaves no sample to train on")
    return training, held_out


@dataclass(frozen=True)
class Purpose:
    """What a source is opened for."""

    name: str
    holdout_fraction: float = 0.0
    validation: str = ""  # fingerprint of the shards that are validated on
    refused: Contents = field(default_factory=dict)  # of validation


def open_source(
    config: DataConfig,
    name: str,
    spec: Spec,
    key: str,
    inputs: Mapping[str, Input],
    storage: Storage,
    purpose: Purpose,
) -> Source:
    """The samples of the shards that `spec` names that have every input; `key` is named in errors."""
    places = list_shards(spec, key, storage)
    cut = incomplete(place.url for place in places if not is_remote(place.url))
    if cut:
        raise ValueError(f"{key}: {cut[0]} has no _stats.json as its neighbours have: img2dataset did not finish it")
    lines = [place.line for place in places if place.line is not None]
    table = None
    if config.cache and len(lines) == len(places) and sum(line.samples for line in lines) >= TABLE_SAMPLES:
        table = Path(config.cache) / "tables" / f"{_table_key(config, name, places, inputs, purpose)}.npz"
        if table.is_file():
            return Source(name, places, lines, Selection.load(table))
    known = read_known_bad(config.known_bad, name)
    fraction = purpose.holdout_fraction
    selector = Selector(
        name,
        inputs,
        (lambda identity: hash64("holdout", identity) < fraction * 2.0**64) if fraction else None,
        bucket_sizes(config) if config.buckets and purpose.name == "training" else None,
    )
    lines = []
    for place in places:
        index = open_index(place, storage)
        lines.append(_check_line(place, index, key))
        rows = selector.add(place.name, index, known.get(place.name, set()) | failed_keys(place.url))
        refuse_shared(place, index, rows, inputs, purpose.refused)
    selection = selector.result()
    check_faults(config, key, selection, places)
    if table is not None:
        selection.save(table)
    return Source(name, places, lines, selection)


def check_config(config: DataConfig) -> None:
    """Raise ValueError for impossible numbers, and where samples are asked for in two ways."""
    for name, least in {"height": 1, "width": 1, "window": 1, "workers": 0, "max_bad_per_shard": 0}.items():
        if getattr(config, name) < least:
            raise ValueError(f"data.{name}: {getattr(config, name)} is not allowed; at least {least}")
    for name in ("holdout_fraction", "max_bad_fraction"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"data.{name}: {getattr(config, name)} is not allowed; at least 0 and below 1")
    if config.validation is not None and config.holdout_fraction:
        raise ValueError(
            f"data.holdout_fraction: {config.holdout_fraction} would be ignored, for data.validation names shards; "
            "set data.holdout_fraction=0 or data.validation=null"
        )
    if config.mix is not None and config.shards is not None:
        raise ValueError("data.shards: would be ignored, for data.mix names sources; set one of them to null")
    if config.mix is not None and not config.mix:
        raise ValueError("data.mix: names no source; expected {name: {shards: ..., weight: ...}}, or null")
    weight_schedule(config.mix, [1] * len(config.mix or [1]))
    bucket_sizes(config)
    if config.streaming is not None:
        _check_streaming(config)


def _check_streaming(config: DataConfig) -> None:
    """Raise ValueError for what only an index makes possible."""
    assert config.streaming is not None
    for name in ("samples_per_epoch", "block"):
        if getattr(config.streaming, name) < 1:
            raise ValueError(f"data.streaming.{name}: {getattr(config.streaming, name)} is not allowed; at least 1")
    usual = {"mix": None, "buckets": None, "holdout_fraction": 0, "window": 16, "lanes": None, "tail": "carry"}
    usual |= {"prepare": None}
    for name, value in usual.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"data.{name}: {getattr(config, name)} would be ignored, for data.streaming reads without an index; "
                f"expected {'null' if value is None else value}, or data.streaming=null"
            )
    if config.read == "shards":
        raise ValueError("data.read: shards would be ignored, for data.streaming keeps none; expected auto or ranges")


def _check_line(place: ShardPlace, index: ShardIndex, key: str) -> ShardLine:
    line = index.line(place.name)
    expected = place.line
    if expected is not None and (expected.bytes, expected.samples, expected.checksum) != (
        line.bytes,
        line.samples,
        line.checksum,
    ):
        raise ValueError(
            f"{key}: {masked(place.url)} has {line.samples} samples in {line.bytes} bytes, manifest.json says "
            f"{expected.samples} in {expected.bytes}, or of other content: the shard was changed; restore it"
        )
    return line


def _table_key(
    config: DataConfig, name: str, places: list[ShardPlace], inputs: Mapping[str, Input], purpose: Purpose
) -> str:
    """All that a selection depends on."""
    known = Path(config.known_bad).read_text() if config.known_bad else ""
    tables = [_table_facts(place) for place in places]  # of img2dataset, which tell failures
    sizes = bucket_sizes(config) if config.buckets and purpose.name == "training" else []
    asked = {n: asdict(item) for n, item in inputs.items()}
    parts = [
        TABLE_FORMAT,
        name,
        fingerprint(p.line for p in places if p.line),
        asked,
        purpose.name,
        purpose.holdout_fraction,
        purpose.validation,
    ]
    limits = [config.max_bad_fraction, config.max_bad_per_shard]
    return hashlib.blake2b(json.dumps([*parts, known, tables, sizes, limits]).encode(), digest_size=16).hexdigest()


def _table_facts(place: ShardPlace) -> tuple[int, int] | None:
    path = Path(place.url).with_suffix(".parquet")
    if is_remote(place.url) or not path.is_file():
        return None
    return path.stat().st_size, path.stat().st_mtime_ns
