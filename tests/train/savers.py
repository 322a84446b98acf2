"""One of two ranks that save while they train, started by torchrun; each part leaves FOLDER/<part>-rank-N.json.

torchrun ... -m tests.train.savers FOLDER
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.futures import Future

from synthos.train.checkpoint import Checkpoints
from synthos.train.checkpoint_writer import Writer
from synthos.train.distributed import World
from tests.train.small import advance, ended, new, save, slow_writer, small_state

SAVES = 30


class Lost(Writer):
    """Its folder is not there when it comes to write."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        self.path = Path(self.path) / "lost"
        return super().write_data(plan, planner)


def late(folder: Path, world: World) -> dict[str, Any]:
    """Rank 1 writes long after rank 0; both train on, with collectives of their own, and learn of the end together."""
    state, checkpoints, let = small_state(), new(folder / "late", world), folder / "let"
    if world.rank == 1:
        checkpoints.writer = slow_writer(let.exists)
    for _ in range(2):
        advance(state)
    save(checkpoints, state, wait=False)
    early = 0
    for _ in range(5):
        advance(state)
        world.reduce(torch.ones(1))
        early += len(checkpoints.settle())
    named = [path.name for path in checkpoints.list()]
    world.barrier()
    if world.is_main:
        let.touch()
    rounds, news = 0, []
    while not news:
        time.sleep(0.01)
        news, rounds = checkpoints.settle(), rounds + 1
    metrics = news[0].metrics
    whole = [path.name for path in checkpoints.list()]
    return {"early": early, "named": named, "rounds": rounds, "metrics": metrics, "whole": whole}


def straight(folder: Path, world: World) -> dict[str, Any]:
    """The same two steps, saved while nothing else happens."""
    state, checkpoints = small_state(), new(folder / "straight", world)
    for _ in range(2):
        advance(state)
    save(checkpoints, state)
    return {}


def failing(folder: Path, world: World) -> dict[str, Any]:
    """Rank 1 can't write; both hear of it at the same step, and it leaves nothing."""
    state, checkpoints = small_state(), new(folder / "failing", world)
    save(checkpoints, state)
    checkpoints.settle()
    if world.rank == 1:
        checkpoints.writer = Lost
    advance(state)
    save(checkpoints, state, wait=False)
    error = ""
    try:
        while checkpoints.pending:
            time.sleep(0.01)
            state.images_seen += 1
            checkpoints.settle()
    except RuntimeError as raised:
        error = str(raised)
    world.barrier()
    return {"error": error, "step": state.step, "left": sorted(p.name for p in (folder / "failing").iterdir())}


def many(folder: Path, world: World) -> dict[str, Any]:
    """Saves one upon the other, while training reduces on its own group all the time."""
    state, checkpoints = small_state(), new(folder / "many", world, keep_last=1)
    told, total = [], torch.zeros(1)
    for _ in range(SAVES):
        advance(state)
        save(checkpoints, state, wait=False)
        for _ in range(20):
            total += world.reduce(torch.ones(1))
        told += [news.metrics["checkpoint/step"] for news in checkpoints.settle()]
    told += [news.metrics["checkpoint/step"] for news in [*ended(checkpoints), *checkpoints.settle()]]
    return {"told": told, "total": total.item(), "left": [path.name for path in checkpoints.list()]}


def damaged(folder: Path, world: World) -> dict[str, Any]:
    """A byte of rank 1's file is another one."""
    state, checkpoints = small_state(), new(folder / "damaged", world)
    for _ in range(2):
        save(checkpoints, state)
        advance(state)
    if world.is_main:
        (file,) = (folder / "damaged" / "step_00000001").glob("__1_*.distcp")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    world.barrier()
    again: Checkpoints = new(folder / "damaged", world)
    again.restore(state)
    return {"step": state.step, "skipped": [news.metrics["checkpoint_skipped"] for news in again.settle()]}


PARTS: tuple[Callable[[Path, World], dict[str, Any]], ...] = (late, straight, failing, many, damaged)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    world = World(rank, rank, dist.get_world_size(), torch.device("cpu"), torch.float32, None)
    for part in PARTS:
        told = part(folder, replace(world))
        (folder / f"{part.__name__}-rank-{rank}.json").write_text(json.dumps(told))
        world.barrier()
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
