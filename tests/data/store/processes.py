"""What other processes do in the tests of the cache; they are spawned, so it is importable."""

import multiprocessing
import os
import signal
import zlib
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from synthos.data.store.cache import ShardCache
from synthos.data.store.files import FileFacts, Storage
from synthos.data.store.retry import RetryPolicy

SPAWN = multiprocessing.get_context("spawn")


def fetch(
    folder: Path, policy: RetryPolicy, url: str, facts: FileFacts, checksum: int, start: Barrier, out: "Queue[Any]"
) -> None:
    """Ask for a shard together with the others; tells what was found, and the counters."""
    storage = Storage(policy)
    cache = ShardCache(folder, None, storage)
    start.wait(60)
    path = cache.path(url, facts, checksum)
    out.put((zlib.crc32(path.read_bytes()), storage.counters))
    cache.close()


def pin_and_wait(folder: Path, urls: list[str], ready: Any) -> None:
    """Hold pins until the process is killed."""
    cache = ShardCache(folder, None, Storage())
    cache.pin(urls)
    ready.set()
    signal.pause()


def read_with(storage: Storage, url: str, out: "Queue[Any]") -> None:
    """Read by a storage that came from the parent, however this process was started."""
    out.put((os.getpid(), storage.read_spans(url, [(5, 10)])[0], storage.counters.requests))
