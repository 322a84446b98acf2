"""Open shards of one process: their indexes, cut down to what a recipe reads, and the bytes of their samples."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from synthos.batch import Fault, Input
from synthos.data.index import open_index
from synthos.data.manifest import ShardLine
from synthos.data.selection import choose
from synthos.data.shards import ShardPlace
from synthos.data.store.cache import ShardCache
from synthos.data.store.files import FileFacts, Storage
from synthos.data.store.location import is_remote, masked, scheme_of
from synthos.data.store.retry import MissingFile, NoRoom
from synthos.keys import sample_id
from synthos.schema import DataConfig

MAX_ROWS = 2_000_000  # of open views in one process, some 70 bytes each for two inputs
OBJECT_STORES = ("s3", "gs", "hf")  # each request costs there: whole shards are fetched


@dataclass(frozen=True)
class View:
    """A shard as a recipe reads it."""

    url: str
    name: str
    keys: NDArray[np.bytes_]  # [N]
    members: dict[str, NDArray[np.void]]  # input -> MEMBER [N] of the index
    extensions: dict[str, NDArray[np.str_]]  # input -> the extension that serves it, [N]
    facts: FileFacts | None  # of a shard elsewhere
    checksum: int  # CRC-32 of the tar

    def key(self, row: int) -> str:
        return bytes(self.keys[row]).decode()

    def fault(self, source: str, row: int, epoch: int, name: str, reason: Any, error: str) -> Fault:
        """What is wrong with a member."""
        member, key = self.members[name][row], self.key(row)
        identity = sample_id(source, self.name, key)
        place = str(self.extensions[name][row]), int(member["offset"]), int(member["size"])
        return Fault(identity, epoch, source, self.name, key, *place, reason, error)


class Shelf:
    """Opens shards when they are needed, and keeps those used last.

    Args:
        config: of the data; says where remote shards are cached, and whether.
    """

    def __init__(self, config: DataConfig, storage: Storage | None = None) -> None:
        self.config, self.storage = config, storage or Storage()
        self._views: OrderedDict[str, View] = OrderedDict()

    def __reduce__(self) -> tuple[type["Shelf"], tuple[Any, ...]]:
        """Nothing that is open travels to another process."""
        return Shelf, (self.config, self.storage)

    def view(self, place: ShardPlace, line: ShardLine, inputs: Mapping[str, Input]) -> View:
        """The shard at `place`. Raises RuntimeError for an index that is not the one the data set was opened with."""
        view = self._views.get(place.index)
        if view is None:
            view = self._views[place.index] = self._open(place, line, inputs)
            while len(self._views) > 1 and sum(len(v.keys) for v in self._views.values()) > MAX_ROWS:
                self._views.popitem(last=False)
        self._views.move_to_end(place.index)
        return view

    def read(self, view: View, rows: list[int]) -> list[dict[str, bytes]]:
        """Each input's bytes of each row; raises StorageError."""
        wanted = [
            list(zip((m := view.members[name][rows])["offset"].tolist(), m["size"].tolist(), strict=True))
            for name in view.members
        ]
        spans = sorted({span for column in wanted for span in column})  # two inputs may read the same member
        data = dict(zip(spans, self._spans(view, spans), strict=True))
        return [
            {name: data[column[i]] for name, column in zip(view.members, wanted, strict=True)} for i in range(len(rows))
        ]

    def remote(self, view: View) -> bool:
        return is_remote(view.url)

    def whole(self, url: str) -> bool:
        """Whether a shard is fetched as a whole, to the cache."""
        mode: Literal["auto", "ranges", "shards"] = self.config.read
        if not is_remote(url) or self.config.cache is None or mode == "ranges":
            return False
        return mode == "shards" or scheme_of(url) in OBJECT_STORES

    @cached_property
    def cache(self) -> ShardCache:
        """Made when the first shard is fetched: a run of local shards needs no folder for it."""
        assert self.config.cache is not None
        limit = None if self.config.cache_gb is None else int(self.config.cache_gb * 1e9)
        return ShardCache(Path(self.config.cache) / "shards", limit, self.storage)

    def prefetch(self, shards: Mapping[str, int]) -> None:
        """Shards read next, and their checksums: fetched in the background, and kept until others are named."""
        shards = {url: checksum for url, checksum in shards.items() if self.whole(url)}
        if shards:
            self.cache.pin(shards)
            self.cache.prefetch(shards)

    def close(self) -> None:
        if "cache" in vars(self):
            self.cache.close()

    def _spans(self, view: View, spans: list[tuple[int, int]]) -> list[bytes]:
        if view.facts is None or not self.whole(view.url):
            return self.storage.read_spans(view.url, spans, view.facts)
        try:
            return self._cached(self.cache, view, view.facts, spans)
        except NoRoom:
            return self.storage.read_spans(view.url, spans, view.facts)

    def _cached(self, cache: ShardCache, view: View, facts: FileFacts, spans: list[tuple[int, int]]) -> list[bytes]:
        """From the shard's local copy, which may have given way to another one before it was opened."""
        try:
            return self.storage.read_spans(str(cache.path(view.url, facts, view.checksum)), spans)
        except MissingFile:
            return self.storage.read_spans(str(cache.path(view.url, facts, view.checksum)), spans)

    def _open(self, place: ShardPlace, line: ShardLine, inputs: Mapping[str, Input]) -> View:
        index = open_index(place, self.storage)
        if (index.bytes, index.checksum, len(index)) != (line.bytes, line.checksum, line.samples):
            raise RuntimeError(
                f"{masked(place.index)}: the index was changed since the run opened its data; start again"
            )
        facts = self.storage.facts(place.url) if is_remote(place.url) else None
        columns = {name: choose(index, item) for name, item in inputs.items()}
        rows = np.arange(len(index))
        members = {name: index.members[rows, column] for name, column in columns.items()}
        extensions = {name: np.array(index.extensions)[column] for name, column in columns.items()}
        return View(place.url, place.name, index.keys, members, extensions, facts, index.checksum)
