"""What other processes do in tests of `over_shards`; a module of its own, since each of them imports it."""

import os
import time
from pathlib import Path

from synthos.data.shards import ShardPlace


def name_of(place: ShardPlace) -> str:
    return place.name


def wait_here(place: ShardPlace) -> None:
    """Tell who we are, and stay."""
    Path(place.url).write_text(str(os.getpid()))
    time.sleep(60)
