"""Indexes of many shards, built by several processes: beside their tars, or in a folder of their own."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import TypeVar

from synthos.data.index import ShardIndex, build_index, load_index, save_index
from synthos.data.manifest import FILE, ShardLine, read_manifest, write_manifest
from synthos.data.processes import forkserver, hear_stops, usable_cores
from synthos.data.shards import ShardPlace, index_path
from synthos.data.store.files import Storage
from synthos.data.store.location import is_remote

Result = TypeVar("Result")
ALONE_BYTES = 256 << 20  # that one process has indexed before others have started


@dataclass(frozen=True)
class Indexed:
    """What became of one shard."""

    place: ShardPlace
    line: ShardLine | None  # None for a damaged shard
    built: bool  # False: a whole index that fits was there already
    error: str = ""


def processes_for(places: list[ShardPlace]) -> int:
    """As many as will index local shards soonest: one per core, or this one alone."""
    size = sum(os.stat(place.url).st_size for place in places)
    return usable_cores() if size > ALONE_BYTES else 1


def over_shards(
    work: Callable[[ShardPlace], Result], places: list[ShardPlace], workers: int
) -> Iterator[tuple[int, Result]]:
    """The number of each place and what `work`, which must travel to other processes, gives for it; as they finish."""
    workers = min(workers, len(places))
    if workers <= 1:
        yield from ((number, work(place)) for number, place in enumerate(places))
        return
    pool = ProcessPoolExecutor(workers, forkserver(), initializer=_follow_parent)
    waiting = iter(enumerate(places))
    running: dict[Future[Result], int] = {}
    try:
        while True:
            for number, place in itertools.islice(waiting, 2 * workers - len(running)):
                running[pool.submit(work, place)] = number
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def index_shards(
    places: list[ShardPlace], out: Path | None, workers: int, storage: Storage
) -> Iterator[tuple[int, Indexed]]:
    """Number and outcome of each shard, as they finish; an index that is whole and fits its shard is kept.

    Indexes go to the folder `out`, else beside the tars. A damaged shard is an outcome; StorageError is raised.
    """
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    return over_shards(partial(_index_one, out, storage), places, workers)


def unindexed(places: list[ShardPlace]) -> list[ShardPlace]:
    """Those that lack an index which can be left beside them."""
    return [
        place
        for place in places
        if not is_remote(place.url)
        and not is_remote(place.index)
        and not Path(place.index).is_file()
        and os.access(Path(place.index).parent, os.W_OK)
    ]


def settle_manifest(folder: Path, lines: list[ShardLine], own: bool) -> str | None:
    """Write the manifest of a folder's shards, in their order, where it has none; why not, else None.

    `own`: the folder holds indexes of tars that lie elsewhere.
    """
    present = read_manifest(folder)
    if present is None:
        listed = {line.name for line in lines}
        stray = sorted(tar.name for tar in folder.glob("*.tar") if not own and tar.name not in listed)
        if stray:
            return f"{folder} also holds {stray[0]}, which is not among the shards named: no {FILE} is written"
        write_manifest(folder, lines)
        return None
    wrong = [line.name for line in lines if present.get(line.name) != line]
    if wrong:
        return f"{folder / FILE} says otherwise of {wrong[0]}; restore the shard, or delete {FILE}"
    return None


@contextmanager
def local_copy(place: ShardPlace, storage: Storage, part: Path) -> Iterator[Path]:
    """The tar as a file of this machine: itself, or a download to `part`, which is removed afterwards."""
    if not is_remote(place.url):
        yield Path(place.url)
        return
    try:
        storage.download(place.url, part, storage.facts(place.url))
        yield part
    finally:
        part.unlink(missing_ok=True)


def _index_one(out: Path | None, storage: Storage, place: ShardPlace) -> Indexed:
    target = Path(place.index) if out is None else out / index_path(place.name)
    found = None if _older(target, place) else _fitting(target, storage.facts(place.url).size)
    built = found is None
    if found is None:
        # A restart downloads to the same name, so a killed one leaves nothing for ever.
        with local_copy(place, storage, target.with_name(f".{place.name}.part")) as tar:
            try:
                found = build_index(tar)
            except ValueError as error:
                return Indexed(place, None, True, str(error).replace(str(tar), place.name))
        save_index(target, found)
    line = found.line(place.name)
    url = place.url if is_remote(place.url) else os.path.abspath(place.url)
    return Indexed(place, line if out is None else replace(line, url=url), built)


def _older(index: Path, place: ShardPlace) -> bool:
    """Whether a tar of this machine was written after its index."""
    here = index.is_file() and not is_remote(place.url)
    return here and os.stat(place.url).st_mtime_ns > index.stat().st_mtime_ns


def _fitting(path: Path, size: int) -> ShardIndex | None:
    """The index at `path` if it is one of a tar of so many bytes."""
    if not path.is_file():
        return None
    try:
        index = load_index(path)
    except ValueError:  # damaged, or of another format
        return None
    return index if index.bytes == size else None


def _follow_parent() -> None:
    """End with the process that asked, however it ends; Ctrl-C is its to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hear_stops()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
