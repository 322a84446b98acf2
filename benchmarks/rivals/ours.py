"""Synthos' own loader, and what else is asked of it. Every call of the benchmarks to the data engine is in this file.

    python -m benchmarks.rivals.ours FOLDER EDGE BATCH                          a contestant, as in clock.py
    python -m benchmarks.rivals.ours plan SAMPLES                               prints its figures as JSON
    python -m benchmarks.rivals.ours rows SMALL READS FOLDER EDGE BATCH         prints those of the other rows

Times are the processor's: files lie in the page cache.
"""

import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rivals.clock import compete
from benchmarks.rivals.ranges import serve
from launch.compose import compose
from synthos.batch import Input
from synthos.data.mixture import Mixture
from synthos.data.order import Order
from synthos.data.plan import Planner, Position, check_lanes
from synthos.data.shelf import Shelf
from synthos.data.store.files import Storage
from synthos.data.stream import Stream, instruct

INPUTS = {"image": Input("image", ("jpg",)), "text": Input("text", ("txt",))}
BATCH = 2048  # of the rows that read no picture
SHARD = 10_000  # samples
WINDOW = 16  # shards, as in configs/data
READS = 256  # in a batch


def open_stream(folder: Path, edge: int, batch: int) -> Stream:
    """One process that reads all by itself."""
    wanted = {"shards": folder / "tar", "holdout_fraction": 0, "height": edge, "width": edge, "workers": 0}
    overrides = [f"data.{key}={value}" for key, value in wanted.items()]
    config = compose(["recipe=i2i", "model=tiny", "data=images", "batch.size=1", "batch.micro=1", *overrides]).config
    return Stream(config.data, INPUTS, batch_size=batch, rank=0, world=1, seed=0)


def epoch(folder: Path, edge: int, batch: int) -> Iterator[torch.Tensor]:
    stream = open_stream(folder, edge, batch)
    for _ in range(len(stream) // batch):
        yield stream.next().images("image")
    stream.close()


def reads(folder: Path, count: int) -> dict[str, float]:
    """Samples of random places, batch by batch: from their numbers to the bytes of picture and caption, from memory."""
    stream = open_stream(folder, 8, 1)
    shelf, (source,) = Shelf(stream.config), stream.sources
    places = np.random.default_rng(0).integers(0, len(source), (-(-count // READS), READS))
    started, size = time.process_time(), 0
    for batch in places:
        shards, rows = source.find(batch)
        for shard in np.unique(shards).tolist():
            view = shelf.view(source.places[shard], source.lines[shard], INPUTS)
            found = shelf.read(view, rows[shards == shard].tolist())
            size += sum(len(data) for sample in found for data in sample.values())
    seconds = time.process_time() - started
    return {"reads_per_s": places.size / seconds, "mean_bytes": size / places.size}


def plan(samples: int) -> dict[str, float]:
    """The order of a large data set: its first batch, its later ones, going on near an epoch's end, and the memory."""
    _memory()
    before = _memory()
    planner, first = _timed(lambda: _begin(samples, 0))
    times = [_timed(planner.next)[1] for _ in range(1, min(1000, samples // BATCH))]
    memory = _memory() - before
    _, again = _timed(lambda: _begin(samples, int(0.99 * samples / BATCH)))
    return {
        "samples": samples,
        "first_batch_s": first,
        "mean_batch_ms": 1e3 * statistics.mean(times),
        "median_batch_ms": 1e3 * statistics.median(times),
        "resume_s": again,
        "memory_mb": memory / 1e6,
    }


def resume(folder: Path, edge: int, batch: int) -> dict[str, float]:
    """From the state near the end of an epoch to the batch after it, decoded: opening, checking, planning, reading."""
    stream = open_stream(folder, edge, batch)
    cursor = int(0.9 * len(stream)) // batch
    state = stream.state_dict() | {"cursor": cursor, "plan": {"drawn": cursor * batch, "waiting": [[]]}}
    stream.close()

    def go_on() -> None:
        again = open_stream(folder, edge, batch)
        again.load_state_dict(state)
        again.next()
        again.close()

    return {"resume_s": _timed(go_on)[1], "samples": len(stream)}


def http(folder: Path, batch: int, steps: int = 8) -> dict[str, Any]:
    """Bytes that a server on this machine sent, over the bytes of the members asked for, in the order of training."""
    stream, storage, used = open_stream(folder, 8, batch), Storage(), 0
    shelf, (source,) = Shelf(stream.config), stream.sources
    with serve(folder / "tar") as server:
        for _ in range(steps):
            asked = instruct(stream.planner.next(), stream.sources, slice(None))
            for shard in np.unique(asked.shards).tolist():
                view = shelf.view(source.places[shard], source.lines[shard], INPUTS)
                members = np.concatenate([m[asked.rows[asked.shards == shard]] for m in view.members.values()])
                wanted = [*zip(members["offset"].tolist(), members["size"].tolist(), strict=True)]
                used += sum(map(len, storage.read_spans(f"{server.url}/{view.name}", wanted)))
        return {"moved_over_used": server.sent / used, "used_mb": used / 1e6, "requests": server.requests}


def _begin(samples: int, t: int) -> Planner:
    """A plan of shards of equal size, after its batch t."""
    order = Order([SHARD] * (samples // SHARD), 0, "benchmark", check_lanes(None, BATCH), WINDOW)
    planner = Planner([order], Mixture({0: [1.0]}), batch_size=BATCH)
    planner.go_to(Position(t * BATCH, [np.empty(0, np.int64)]))
    planner.next()
    return planner


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the processor's seconds."""
    started = time.process_time()
    result = work()
    return result, time.process_time() - started


def _memory() -> int:
    """Bytes that this process holds at the most from the last call on: Linux tells, and forgets when it is asked to."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    Path("/proc/self/clear_refs").write_text("5")  # man proc: the peak becomes what is held now
    return int(peak[1]) * 1024 if peak else 0


def rows(small: Path, count: int, folder: Path, edge: int, batch: int) -> dict[str, dict[str, Any]]:
    """All but the plan, whose memory wants a process of its own."""
    return {"reads": reads(small, count), "resume": resume(folder, edge, batch), "http": http(folder, batch)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "plan":
        print(json.dumps(plan(int(sys.argv[2]))))
    elif sys.argv[1] == "rows":
        _, _, tiny, number, large, *sizes = sys.argv
        print(json.dumps(rows(Path(tiny), int(number), Path(large), *map(int, sizes))))
    else:
        compete(epoch, ("torch", "simplejpeg", "opencv-python-headless"))
