"""The folder of a cache: who works in it, what is needed, and what has to go when room is made.

Locks (flock) end with their process, however it ends; so what nobody holds is left over, and is removed.
"""

import errno
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

from synthos.data.store.files import disk_error
from synthos.data.store.location import masked
from synthos.data.store.retry import NoRoom, StorageError

SUFFIX = ".shard"
Lock = AbstractContextManager[bool]


class Entry(NamedTuple):
    """A whole shard in the folder; entries sort by their last use."""

    used: int  # time of the last use, ns
    path: Path
    size: int  # in bytes

    @property
    def url_hash(self) -> str:
        return self.path.name.partition("-")[0]


class Room:
    """The folder, and how many bytes it may hold; None: as many as the disk."""

    def __init__(self, folder: Path, limit_bytes: int | None) -> None:
        self.folder, self.limit = folder, limit_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._remove_left_overs(".*.part")
        except OSError as error:
            raise StorageError(f"{folder}: no cache can be kept here: {error.strerror or error}") from None

    def lock(self, url_hash: str, wait: bool = True) -> Lock:
        """For one process at a time, who downloads the URL; gives False where another does and `wait` is off."""
        return locked(self.folder / f".{url_hash}.lock", wait)

    def reserve(self, name: str, size: int, url: str) -> tuple[int, Path]:
        """A file of `size` bytes whose place on the disk is taken, and its locked descriptor.

        What was used least recently makes room, but nothing that is pinned. Raises NoRoom when there is none to be
        made, and ValueError when a single shard exceeds the limit.
        """
        if self.limit is not None and size > self.limit:
            raise ValueError(
                f"data.cache_gb: {self.limit / 1e9:g} GB hold no single shard: {masked(url)} has {size / 1e9:g} GB; "
                "expected room for the shards of two windows, or null for no limit"
            )
        part = self.folder / f".{name}.{socket.gethostname()}.{os.getpid()}.part"
        with self._alone():
            self._remove_left_overs(".*.part")
            candidates = self._candidates()
            self._keep_to_limit(size, url, candidates)
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                self._allocate(descriptor, size, candidates)
            except OSError as error:
                os.close(descriptor)
                part.unlink()
                raise disk_error(self.folder, error, size, url) from None
        return descriptor, part

    def publish(self, descriptor: int, part: Path, entry: Path) -> None:
        """Give a file that is whole its last name; after this it survives even a power cut."""
        os.fsync(descriptor)
        with self._alone():
            part.rename(entry)
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def discard(self, descriptor: int, path: Path) -> None:
        """Let go of a file, and delete it if it still has this name."""
        with self._alone():
            path.unlink(missing_ok=True)
        os.close(descriptor)

    def pin(self, descriptor: int | None, url_hashes: Iterable[str]) -> int:
        """Say what this process needs, in place of what it said before; gives the descriptor that holds it."""
        with self._alone():
            if descriptor is None:
                descriptor, _ = tempfile.mkstemp(prefix=f".pins.{socket.gethostname()}.{os.getpid()}.", dir=self.folder)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, "\n".join(url_hashes).encode(), 0)
        return descriptor

    def unpin(self, descriptor: int) -> None:
        """Let go of what `pin` gave; unlocked, its file is left over."""
        os.close(descriptor)
        with self._alone():
            self._remove_left_overs(".pins.*")

    def rename(self, entry: Path, name: Path | None) -> None:
        """Give an entry another name, or delete it."""
        with self._alone():
            entry.unlink(missing_ok=True) if name is None else entry.rename(name)

    def _alone(self) -> Lock:
        return locked(self.folder / ".folder.lock")

    def _candidates(self) -> list[Entry]:
        """What may go, oldest use first."""
        pinned = self._pinned()
        return sorted(entry for entry in self._entries() if entry.url_hash not in pinned)

    def _entries(self) -> Iterator[Entry]:
        for path in self.folder.glob(f"*{SUFFIX}"):
            found = path.stat()
            yield Entry(found.st_mtime_ns, path, found.st_size)

    def _keep_to_limit(self, size: int, url: str, candidates: list[Entry]) -> None:
        if self.limit is None:
            return
        coming = sum(part.stat().st_size for part in self.folder.glob(".*.part"))
        used = coming + sum(entry.size for entry in self._entries())
        while used + size > self.limit:
            if not candidates:
                raise NoRoom(
                    f"{self.folder}: full of shards that are in use ({used / 1e9:g} of {self.limit / 1e9:g} GB), and "
                    f"{masked(url)} needs {size / 1e9:g} GB; raise data.cache_gb"
                )
            used -= self._evict(candidates.pop(0))

    def _allocate(self, descriptor: int, size: int, candidates: list[Entry]) -> None:
        """Take the place now, so that a full disk is known before a byte is moved."""
        while size:
            try:
                os.posix_fallocate(descriptor, 0, size)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not candidates:
                    raise
                self._evict(candidates.pop(0))
            else:
                return

    def _evict(self, entry: Entry) -> int:
        """Delete a shard, and its lock where nobody holds it; who has it open reads on."""
        entry.path.unlink()
        with self.lock(entry.url_hash, wait=False) as mine:
            if mine:
                (self.folder / f".{entry.url_hash}.lock").unlink()
        return entry.size

    def _pinned(self) -> set[str]:
        """What the living processes of this node need."""
        self._remove_left_overs(".pins.*")
        return {line for path in self.folder.glob(".pins.*") for line in path.read_text().splitlines()}

    def _remove_left_overs(self, pattern: str) -> None:
        """Delete the files that a process held while it lived."""
        for path in self.folder.glob(pattern):
            with path.open("r+b") as file:
                if _take(file.fileno(), wait=False):
                    path.unlink()


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file, which is made where there is none; gives False where it is held and `wait` is off."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if not _take(descriptor, wait):
            os.close(descriptor)
            yield False
            return
        if _is_at(descriptor, path):
            break
        os.close(descriptor)  # it was deleted while we waited, and others may hold the one that took its place
    try:
        yield True
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # explicitly: a forked child may have inherited the descriptor
        os.close(descriptor)


def _take(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
