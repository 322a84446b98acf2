"""From URL to bytes: the one way in which anything of a data set is read, be it local or in an object store."""

import errno
import glob
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from synthos.data.store.local import Descriptors, FileFacts, Span, fail, local_facts
from synthos.data.store.location import file_name, is_remote, join, local_path, masked, scheme_of
from synthos.data.store.remote import CONNECTIONS, ask, cat_ranges, open_file_system, size_and_tag
from synthos.data.store.retry import MissingFile, NoRoom, Passing, RetryPolicy, StorageError, retry, worst

T = TypeVar("T")
Bodies = list[bytes]  # named here, for in `Storage` a list is what its method gives
Names = list[str]
MERGE_BYTES = 256 << 10  # a gap of so many bytes costs less than a request of its own
RANGE_BYTES = 16 << 20  # of one request of a download

__all__ = ["Counters", "FileFacts", "Storage"]


@dataclass
class Counters:
    """What one process has done since it began."""

    bytes_fetched: int = 0  # over the network
    requests: int = 0
    retries: int = 0
    cache_hits: int = 0  # shards found in the cache
    cache_misses: int = 0  # shards that this process downloaded
    seconds: float = 0.0  # spent waiting for the network, summed over threads


@dataclass
class _Process:
    """What belongs to one process and is worth nothing in a child of it."""

    number: int = field(default_factory=os.getpid)
    systems: dict[str, Any] = field(default_factory=dict)
    descriptors: Descriptors = field(default_factory=Descriptors)
    opening: threading.Lock = field(default_factory=threading.Lock)
    counting: threading.Lock = field(default_factory=threading.Lock)
    parent: "_Process | None" = None  # kept alive: closing its connections here would disturb them there


class Storage:
    """Reads files by URL or path. It may be sent to other processes, and forked: each opens its own connections.

    Every method raises StorageError, and of these MissingFile for what does not exist; nothing else for what the world
    does.
    """

    def __init__(self, policy: RetryPolicy = RetryPolicy()) -> None:  # noqa: B008  (frozen)
        self.policy = policy
        self.counters = Counters()
        self._process = _Process()

    def __reduce__(self) -> tuple[type["Storage"], tuple[RetryPolicy]]:
        return Storage, (self.policy,)

    def facts(self, url: str) -> FileFacts:
        """Size and tag of a file."""
        if not is_remote(url):
            return local_facts(local_path(url))
        size, tag = self._info(url)
        if size is None:
            raise StorageError(f"{masked(url)}: the server does not tell its size, so it can't be read in ranges")
        return FileFacts(size, tag)

    def read(self, url: str) -> bytes:
        """A whole small file: a list, an index, a manifest."""
        if not is_remote(url):
            try:
                return Path(local_path(url)).read_bytes()
            except OSError as error:
                fail(url, error)
        size, tag = self._info(url, fresh=True)
        if size is None:  # made as it is sent; its end is told by the transfer's own framing
            found: bytes = self._retry(url, lambda until: self._ask(url, "cat_file", until=until))
            self.count(bytes_fetched=len(found))
            return found
        return b"".join(self._fetch(url, _parts(size), FileFacts(size, tag)))

    def read_spans(self, url: str, spans: Sequence[Span], expected: FileFacts | None = None) -> Bodies:
        """The bytes of each (offset, size), in their order.

        Remote spans less than 256 KiB apart come by one request. With `expected` the file must still be that one; of an
        object store just the size is known at this point.
        """
        if not is_remote(url):
            return self._here().descriptors.read(local_path(url), spans, expected)
        end = max((offset + size for offset, size in spans), default=0)
        if expected is not None and end > expected.size:
            raise StorageError(f"{masked(url)}: it ends at byte {expected.size}, before byte {end}")
        merged = merge(spans)
        bodies = self._fetch(url, merged, expected)
        return [_cut(span, merged, bodies) for span in spans]

    def list(self, url: str) -> Names:
        """The tars in a folder, or the files that match a glob, sorted, as full URLs."""
        pattern = glob.has_magic(file_name(url))
        if not is_remote(url):
            path = local_path(url)
            if not pattern and not os.path.isdir(path):
                raise MissingFile(f"{path}: no such folder")
            return sorted(glob.glob(path if pattern else join(glob.escape(path), "*.tar")))
        found = self._retry(url, lambda until: self._list(url, pattern, until))
        return sorted(name for name in found if pattern or file_name(name).endswith(".tar"))

    def download(self, url: str, path: Path, expected: FileFacts, stop: threading.Event | None = None) -> None:
        """Write a remote file to `path`, in ranges over several connections.

        What `path` held is overwritten in place; the caller makes it appear under its last name. Raises StorageError
        also if the file is no longer `expected` when all of it has come, and ends early if `stop` is set.
        """
        parts = _parts(expected.size)
        try:
            with _open_to_write(path, expected.size) as descriptor:
                for first in range(0, len(parts), CONNECTIONS):
                    if stop is not None and stop.is_set():
                        raise StorageError(f"{masked(url)}: stopped")
                    batch = parts[first : first + CONNECTIONS]
                    for (offset, _), data in zip(batch, self._fetch(url, batch, expected, stop), strict=True):
                        _write(descriptor, data, offset)
        except MissingFile:
            raise
        except OSError as error:
            raise disk_error(path.parent, error, expected.size, url) from None
        size, tag = self._info(url, fresh=True)
        if (size, tag) != (expected.size, expected.tag):
            raise StorageError(
                f"{masked(url)}: it was changed: {expected.size} bytes, tag {expected.tag or 'none'} were expected, "
                f"{size} bytes, tag {tag or 'none'} are there; index it again, or restore it"
            )

    def count(self, **amounts: float) -> None:
        """Add to the counters."""
        with self._here().counting:
            for name, amount in amounts.items():
                setattr(self.counters, name, getattr(self.counters, name) + amount)

    def _info(self, url: str, fresh: bool = False) -> tuple[int | None, str]:
        """Size and tag; `fresh`: as the store has it now, whatever an earlier listing said."""
        kwargs = {"refresh": True} if fresh and scheme_of(url) == "s3" else {}
        info = self._retry(url, lambda until: self._ask(url, "info", until=until, **kwargs))
        if info.get("type") == "directory":
            raise MissingFile(f"{masked(url)}: a folder, not a file")
        return size_and_tag(info)

    def _fetch(
        self, url: str, spans: Sequence[Span], expected: FileFacts | None, stop: threading.Event | None = None
    ) -> Bodies:
        """The bytes of each span, each checked for its length; what came is not asked for again."""
        found: dict[Span, bytes] = {}

        def attempt(until: float) -> None:
            missing = [span for span in spans if span not in found]
            system = self._system(url)
            path = system._strip_protocol(url)
            answers = cat_ranges(system, path, missing, expected, until) if missing else []
            self.count(requests=len(missing), bytes_fetched=sum(len(a) for a in answers if isinstance(a, bytes)))
            faults = []
            for span, answer in zip(missing, answers, strict=True):
                if isinstance(answer, Exception):
                    faults.append(answer)
                elif len(answer) == span[1]:
                    found[span] = answer
                else:
                    faults.append(_wrong_length(url, span, len(answer)))
            if faults:
                raise worst(faults)

        self._retry(url, attempt, stop)
        return [found[span] for span in spans]

    def _ask(self, url: str, method: str, until: float, **kwargs: Any) -> Any:
        system = self._system(url)
        self.count(requests=1)
        return ask(system, method, system._strip_protocol(url), until=until, **kwargs)

    def _list(self, url: str, pattern: bool, until: float) -> Names:
        system = self._system(url)
        system.invalidate_cache()
        names = self._ask(url, "glob", until) if pattern else self._ask(url, "ls", until, detail=False)
        return [system.unstrip_protocol(name) for name in names]

    def _retry(self, url: str, attempt: Callable[[float], T], stop: threading.Event | None = None) -> T:
        """What `attempt` returns, tried again by the policy; it is told when, on the monotonic clock, time is up."""
        began = time.monotonic()
        until = began + self.policy.deadline_seconds
        try:
            return retry(lambda: attempt(until), url, self.policy, lambda: self.count(retries=1), stop)
        finally:
            self.count(seconds=time.monotonic() - began)

    def _system(self, url: str) -> Any:
        scheme = scheme_of(url)
        here = self._here()
        with here.opening:
            if scheme not in here.systems:
                here.systems[scheme] = open_file_system(scheme, self.policy)
            return here.systems[scheme]

    def _here(self) -> _Process:
        """What belongs to this process: nothing of a parent's survives a fork."""
        if self._process.number != os.getpid():
            self._process = _Process(parent=self._process)
            self.counters = Counters()
        return self._process


def merge(spans: Sequence[Span]) -> list[Span]:
    """Spans in the order of the file, those that nearly touch made one; empty ones are left out."""
    merged: list[Span] = []
    for offset, size in sorted(span for span in spans if span[1]):
        if merged and offset <= sum(merged[-1]) + MERGE_BYTES:
            first = merged[-1][0]
            merged[-1] = (first, max(sum(merged[-1]), offset + size) - first)
        else:
            merged.append((offset, size))
    return merged


def disk_error(folder: Path, error: OSError, size: int, url: str) -> StorageError:
    """What to raise when `size` bytes of a file could not be written to a folder."""
    kind = NoRoom if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
    return kind(f"{folder}: {error.strerror or error}; {size} bytes are needed for {masked(url)}")


def _parts(size: int) -> list[Span]:
    """A whole file in ranges."""
    return [(start, min(RANGE_BYTES, size - start)) for start in range(0, size, RANGE_BYTES)]


def _cut(span: Span, merged: Sequence[Span], bodies: Sequence[bytes]) -> bytes:
    """The bytes of a span from those of the merged spans."""
    if not span[1]:
        return b""
    number = bisect_right(merged, span[0], key=lambda whole: whole[0]) - 1
    start = span[0] - merged[number][0]
    return bodies[number][start : start + span[1]]


def _wrong_length(url: str, span: Span, got: int) -> Exception:
    if got < span[1]:
        return Passing(f"{got} bytes came of {span[1]}")
    return StorageError(
        f"{masked(url)}: {got} bytes came where {span[1]} were asked for: the server does not serve ranges; "
        "use one that does, or copy the files"
    )


@contextmanager
def _open_to_write(path: Path, size: int) -> Iterator[int]:
    """A descriptor of a file of this size, whose place on the disk, if it has one, stays taken."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.ftruncate(descriptor, size)
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: bytes, offset: int) -> None:
    """All of `data`, also where a call takes less."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
