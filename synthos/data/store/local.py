"""Files of this machine, read by position. Here each microsecond counts: no fsspec, and descriptors stay open."""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from synthos.data.store.location import masked
from synthos.data.store.retry import MissingFile, StorageError

Span = tuple[int, int]  # offset and size in bytes
SWEEP_SECONDS = 1.0


@dataclass(frozen=True)
class FileFacts:
    """What tells one content of a file from another, without reading it."""

    size: int  # in bytes
    tag: str  # etag; mtime and inode of a local file; else the time of the last change; empty where a server tells none


def local_facts(path: str) -> FileFacts:
    """Raises MissingFile, and StorageError where the file system fails."""
    try:
        found = os.stat(path)
    except OSError as error:
        fail(path, error)
    if not os.path.isfile(path):
        raise MissingFile(f"{masked(path)}: a folder or a device, not a file")
    return _facts(found)


def fail(path: str, error: OSError) -> NoReturn:
    """The error of a local file, in this package's words."""
    missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
    raise (MissingFile if missing else StorageError)(f"{masked(path)}: {error.strerror or error}") from None


class Descriptors:
    """Open files of one process, the ones used least recently closed first; safe between threads.

    Args:
        limit: how many stay open.
    """

    def __init__(self, limit: int = 256) -> None:
        self.limit = limit
        self._opened: OrderedDict[str, _Opened] = OrderedDict()
        self._lock = threading.Lock()
        self._swept = time.monotonic()

    def read(self, path: str, spans: Sequence[Span], expected: FileFacts | None = None) -> list[bytes]:
        """The bytes of each span.

        Raises MissingFile; StorageError for a file that ends before a span does, fails, or is another than `expected`.
        """
        try:
            opened = self._get(path)
            if expected is not None and opened.facts != expected:  # perhaps replaced since it was opened
                self.forget(path)
                opened = self._get(path)
            parts = [os.pread(opened.number, size, offset) for offset, size in spans]
        except OSError as error:
            self.forget(path)  # a stale handle of a network file system heals by opening anew
            fail(path, error)
        if expected is not None and opened.facts != expected:
            raise StorageError(f"{path}: it was changed while it was in use: {_change(expected, opened.facts)}")
        for (offset, size), part in zip(spans, parts, strict=True):
            if len(part) != size:
                raise StorageError(f"{path}: it ends at byte {offset + len(part)}, before byte {offset + size}")
        return parts

    def forget(self, path: str) -> None:
        """Open the file anew when it is read next."""
        with self._lock:
            self._opened.pop(path, None)

    def _get(self, path: str) -> "_Opened":
        with self._lock:
            opened = self._opened.get(path)
            if opened is not None:
                self._opened.move_to_end(path)
                return opened
        opened = _Opened(path)
        with self._lock:
            self._opened[path] = opened
            if len(self._opened) > self.limit:
                self._opened.popitem(last=False)
            self._sweep()
        return opened

    def _sweep(self) -> None:
        """Let go of files that were deleted: an open descriptor would keep their bytes on the disk."""
        if time.monotonic() - self._swept >= SWEEP_SECONDS:
            for path in [path for path, opened in self._opened.items() if not os.fstat(opened.number).st_nlink]:
                del self._opened[path]
            self._swept = time.monotonic()


class _Opened:
    """A descriptor that closes when the last thread that uses it lets go of it."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.facts = _facts(os.fstat(self.number))

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def _facts(found: os.stat_result) -> FileFacts:
    return FileFacts(found.st_size, f"{found.st_mtime_ns}-{found.st_ino}")


def _change(expected: FileFacts, found: FileFacts) -> str:
    if expected.size != found.size:
        return f"{expected.size} bytes before, {found.size} now"
    return f"{expected.tag} before, {found.tag} now"
