"""Whole shards on the node's own disk for as long as they are of use; one folder serves all processes of a node.

<url>-<content>.shard                  a whole shard: hashes of its URL, and of its size, tag and checksum
.<url>-<content>.<host>.<pid>.part     one that is coming
.<url>.lock                            held by who downloads it; the others wait, then use it
.pins.<host>.<pid>.*                   hashes of the URLs that a process needs
.folder.lock                           held while room is made and names change
"""

import hashlib
import os
import threading
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from synthos.data.store.files import Storage, disk_error
from synthos.data.store.local import FileFacts
from synthos.data.store.location import is_remote, local_path, masked
from synthos.data.store.prefetch import Prefetcher
from synthos.data.store.retry import MissingFile, NoRoom, Passing, StorageError, retry
from synthos.data.store.room import SUFFIX, Room

__all__ = ["NoRoom", "ShardCache"]


@dataclass
class _Process:
    """What belongs to one process and is worth nothing in a child of it."""

    number: int = field(default_factory=os.getpid)
    pins: int | None = None  # descriptor
    prefetcher: Prefetcher | None = None
    known: dict[str, tuple[FileFacts, int | None]] = field(default_factory=dict)  # facts and checksum by URL
    checksums: dict[str, int | None] = field(default_factory=dict)  # of those to bring, by URL


class ShardCache:
    """Local copies of remote shards. It may be sent to other processes, and forked.

    A shard that is pinned stays. Another may be deleted as soon as room is needed, also between `path` and the opening
    of what it names: then ask again.

    Args:
        folder: on a disk of this node.
        limit_bytes: what all shards together may take; None: as much as the disk has, old ones giving way.
        storage: downloads, and counts.

    Raises StorageError where no cache can be kept.
    """

    def __init__(self, folder: Path, limit_bytes: int | None, storage: Storage) -> None:
        self.folder, self.limit_bytes, self.storage = folder, limit_bytes, storage
        self._room = Room(folder, limit_bytes)
        self._process = _Process()

    def __reduce__(self) -> tuple[type["ShardCache"], tuple[Any, ...]]:
        return ShardCache, (self.folder, self.limit_bytes, self.storage)

    def path(self, url: str, expected: FileFacts, checksum: int | None = None) -> Path:
        """The local file that holds the shard, whole and right; a plain path is its own.

        It is downloaded if need be, or waited for while another process of the node does.

        Args:
            expected: what the shard has to be.
            checksum: CRC-32 of the whole shard.

        Raises ValueError for a limit below this shard; NoRoom where it can't be kept, so that it is to be read in
        ranges; StorageError for all else that the world does.
        """
        if not is_remote(url):
            return Path(local_path(url))
        self._here().known[url] = (expected, checksum)
        try:
            found = self._obtain(url, expected, checksum)
        except MissingFile:
            raise
        except OSError as error:
            raise disk_error(self.folder, error, expected.size, url) from None
        assert found is not None  # it was waited for
        return found

    def pin(self, urls: Iterable[str]) -> None:
        """Keep these, in place of those that this process pinned before; the pins of a process end with it."""
        here = self._here()
        here.pins = self._room.pin(here.pins, [_hash(url) for url in urls])

    def prefetch(self, shards: Mapping[str, int | None]) -> None:
        """Bring these in the background, in this order, in place of those not begun; CRC-32 by URL, where it is known.

        Skipped are those that another process is bringing; so the processes of a node share the work.
        """
        here = self._here()
        if here.prefetcher is None:
            here.prefetcher = Prefetcher(self._bring_ahead)
        here.checksums = dict(shards)
        here.prefetcher.want([url for url in shards if is_remote(url)])

    def close(self) -> None:
        """End the background thread and the pins; what is cached stays for the next run."""
        here = self._here()
        if here.prefetcher is not None:
            here.prefetcher.close()
        if here.pins is not None:
            self._room.unpin(here.pins)
        self._process = _Process()

    def _bring_ahead(self, url: str, stop: threading.Event) -> None:
        known = self._here().known
        if url not in known:
            known[url] = (self.storage.facts(url), self._here().checksums.get(url))
        self._obtain(url, *known[url], stop)

    def _obtain(
        self, url: str, expected: FileFacts, checksum: int | None, stop: threading.Event | None = None
    ) -> Path | None:
        """The shard's entry; with `stop`, ahead of use: then None if another process is bringing it."""
        entry = self._entry(url, expected, checksum)
        found = _use(entry, expected)
        if not found:
            with self._room.lock(_hash(url), wait=stop is None) as mine:
                if not mine:
                    return None
                found = _use(entry, expected) or self._adopt(url, expected, checksum, entry)
                if not found:
                    self._bring(url, expected, checksum, entry, stop)
                    self.storage.count(cache_misses=1)
        if found and stop is None:
            self.storage.count(cache_hits=1)
        return entry

    def _adopt(self, url: str, expected: FileFacts, checksum: int | None, entry: Path) -> bool:
        """Use what was brought ahead, before its checksum was known, if it has this one."""
        unchecked = self._entry(url, expected, None)
        if checksum is None or not _use(unchecked, expected):
            return False
        try:
            right = _checksum(unchecked) == checksum
            self._room.rename(unchecked, entry if right else None)
        except FileNotFoundError:  # it gave way to another one meanwhile
            return False
        return right

    def _bring(
        self, url: str, expected: FileFacts, checksum: int | None, entry: Path, stop: threading.Event | None
    ) -> None:
        descriptor, part = self._room.reserve(entry.name, expected.size, url)
        try:
            self._download(url, expected, checksum, part, stop)
            self._room.publish(descriptor, part, entry)
        finally:
            self._room.discard(descriptor, part)

    def _download(
        self, url: str, expected: FileFacts, checksum: int | None, part: Path, stop: threading.Event | None
    ) -> None:
        """Download to `part` until the checksum is right; the same wrong content twice is what the store holds."""
        wrong: set[int] = set()

        def attempt() -> None:
            self.storage.download(url, part, expected, stop)
            if checksum is None or (found := _checksum(part)) == checksum:
                return
            if found in wrong:
                raise StorageError(
                    f"{masked(url)}: its checksum is {found:08x}, {checksum:08x} was expected: its content is not what "
                    "was indexed; index it again, or restore it"
                )
            wrong.add(found)
            raise Passing(f"its checksum is {found:08x}, {checksum:08x} was expected")

        policy = replace(self.storage.policy, deadline_seconds=float("inf"))  # each download has its own
        retry(attempt, url, policy, lambda: self.storage.count(retries=1), stop)

    def _entry(self, url: str, expected: FileFacts, checksum: int | None) -> Path:
        content = _hash(str(expected.size), expected.tag, "" if checksum is None else f"{checksum:08x}")
        return self.folder / f"{_hash(url)}-{content}{SUFFIX}"

    def _here(self) -> _Process:
        """What belongs to this process: nothing of a parent's survives a fork."""
        if self._process.number != os.getpid():
            self._process = _Process()
        return self._process


def _use(entry: Path, expected: FileFacts) -> bool:
    """Whether the entry is there and whole; if so, now is its last use."""
    try:
        if entry.stat().st_size != expected.size:
            return False
        os.utime(entry)
    except FileNotFoundError:
        return False
    return True


def _checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return value


def _hash(*parts: str) -> str:
    """32 hex digits; no two sequences of texts have the same in practice."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
