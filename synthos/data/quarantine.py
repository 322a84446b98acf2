"""The bad samples of a run, as data/quarantine.jsonl lists them, and whether they are still bad."""

import json
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from synthos.batch import Fault
from synthos.data.decode import decode_image
from synthos.data.index import IMAGE_SUFFIXES, ShardIndex, open_index
from synthos.data.shards import MissingShards, ShardPlace, list_shards
from synthos.data.store.files import Storage
from synthos.schema import DataConfig

FILE = Path("data") / "quarantine.jsonl"


@dataclass
class Bad:
    """A bad sample, however often it was met."""

    source: str
    shard: str
    key: str
    member: str
    reason: str
    error: str
    times: int = 0
    now: str | None = None  # what is wrong with it now; "" where it can be used again; None: not looked at


def read_quarantine(folder: Path) -> list[Bad]:
    """The bad samples of the run in `folder`, by source, shard and key. ValueError for a file of other lines."""
    path = folder / FILE
    if not path.is_file():
        return []
    found: dict[tuple[str, str, str], Bad] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.endswith("}"):
            continue  # a kill has cut it
        try:
            values = json.loads(line)
            fault = Fault(**{name: value for name, value in values.items() if name not in ("step", "rank")})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no bad sample: {error}") from None
        where = fault.source, fault.shard, fault.key
        bad = found.setdefault(where, Bad(*where, fault.member, fault.reason, fault.error))
        bad.times += 1
    return [found[where] for where in sorted(found)]


def known_bad_lines(bad: Iterable[Bad]) -> list[str]:
    """What data.known_bad reads."""
    return [json.dumps({"source": b.source, "shard": b.shard, "key": b.key, "reason": b.reason}) for b in bad]


@dataclass
class Recheck:
    """Looks at bad samples again, in the shards as they are now."""

    config: DataConfig
    storage: Storage = field(default_factory=Storage)
    _places: dict[str, dict[str, ShardPlace]] = field(default_factory=dict)

    def look(self, bad: Bad) -> str:
        """What is wrong with it; "" if it can be used. Raises StorageError."""
        place = self._shards(bad.source).get(bad.shard)
        if place is None:
            return "its shard is not there"
        try:
            index = open_index(place, self.storage)
        except ValueError as error:
            return str(error)
        rows = np.flatnonzero(index.keys == bad.key.encode())
        if not len(rows):
            return "is not in its shard"
        return self._read(place, index, int(rows[0]), bad.member)

    def _read(self, place: ShardPlace, index: ShardIndex, row: int, extension: str) -> str:
        if extension not in index.extensions:
            return f"is without {extension or 'the member'}"
        member = index.member(row, index.extensions.index(extension))
        if member.size < 0:
            return f"is without {extension}"
        (data,) = self.storage.read_spans(place.url, [(member.offset, member.size)])
        if zlib.crc32(data) != member.checksum:
            return "has changed since it was indexed"
        try:
            if extension.rsplit(".")[-1] in IMAGE_SUFFIXES:
                decode_image(data, self.config.height, self.config.width, "shared")
            elif not data.decode().strip():
                return f"has an empty {extension}"
        except ValueError as error:
            return f"can't be decoded: {error}"
        return ""

    def _shards(self, source: str) -> dict[str, ShardPlace]:
        """By file name; none where they are gone."""
        if source not in self._places:
            mix = self.config.mix or {}
            spec: Any = mix[source].shards if source in mix else self.config.shards
            try:
                places = list_shards(spec, "data.shards", self.storage)
            except MissingShards:
                places = []
            self._places[source] = {place.name: place for place in places}
        return self._places[source]


def by_shard(bad: Iterable[Bad]) -> list[tuple[str, str, str, int]]:
    """How many of each source, shard and reason, the most first."""
    counts = Counter((b.source, b.shard, b.reason) for b in bad)
    return [(*where, count) for where, count in counts.most_common()]
