"""What every contestant runs in: one epoch of whole batches, timed, for each line on standard input.

    python -m benchmarks.rivals.NAME FOLDER EDGE BATCH

FOLDER holds the pictures as shards (tar/) and in MosaicML's format (mds/). One line of JSON is printed when the
contestant stands ready, and one after each epoch. The clock starts when the first batch is there, so that nobody pays
for opening files or for making a plan. It counts the processor's time, all threads of the process together (what one
core can do, also where other work runs beside it), and the time on the wall.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Epoch = Callable[
    [Path, int, int], Iterable[Any]
]  # folder, pixels of an edge, batch size -> batches, with a length each


def compete(epoch: Epoch, packages: tuple[str, ...]) -> None:
    """Serve the lines of standard input until it ends; `packages` are those whose versions are told."""
    folder, edge, batch = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    out = os.dup(1)
    os.dup2(2, 1)  # whatever a contestant prints cannot disturb the parent

    def tell(record: dict[str, Any]) -> None:
        os.write(out, json.dumps(record).encode() + b"\n")

    tell({package: importlib.metadata.version(package) for package in packages})
    for _ in sys.stdin:
        batches = iter(epoch(folder, edge, batch))
        first = next(batches)
        assert len(first) == batch, f"a batch of {len(first)}"
        wall, processor, images = time.perf_counter(), time.process_time(), 0
        for rows in batches:
            images += len(rows)
        seconds, wall = time.process_time() - processor, time.perf_counter() - wall
        tell({"images": images, "cpu_seconds": seconds, "wall_seconds": wall})
