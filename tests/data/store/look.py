"""What the tests of the cache look at and wait for."""

import time
from collections.abc import Callable
from pathlib import Path

from synthos.data.store.cache import ShardCache

Make = Callable[..., ShardCache]


def shards(cache: ShardCache) -> list[bytes]:
    return sorted(path.read_bytes() for path in cache.folder.glob("*.shard"))


def parts(cache: ShardCache) -> list[Path]:
    return list(cache.folder.glob(".*.part"))


def wait_for(happened: Callable[[], object]) -> None:
    """Until something happens in another thread or process; a minute at most."""
    until = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)
