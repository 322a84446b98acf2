"""A training state without a recipe: sharded weights, AdamW, an average, and updates that depend on the step alone."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.futures import Future

from synthos.schema import EmaConfig
from synthos.train.checkpoint import Checkpoints, News
from synthos.train.checkpoint_writer import Writer
from synthos.train.distributed import World
from synthos.train.ema import Ema
from synthos.train.optim import build_optimizer
from synthos.train.state import TrainState, trained_parameters
from tests.support import run_config


class SlowWriter(Writer):
    """Writes when it is let."""

    may_write: Callable[[], bool]
    log: list[str]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        self.log.append(f"begin {self.final.name}")
        wait_until(self.may_write)
        written = super().write_data(plan, planner)
        self.log.append(f"end {self.final.name}")
        return written


def slow_writer(may_write: Callable[[], bool]) -> type[SlowWriter]:
    """A class of its own, for what it is told."""
    return type("Slow", (SlowWriter,), {"may_write": staticmethod(may_write), "log": []})


def wait_until(true: Callable[[], object], seconds: float = 60) -> None:
    for _ in range(int(seconds / 0.01)):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def small_state(width: int = 64) -> TrainState:
    """The same on any number of ranks."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 7))
    fully_shard(network, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    groups, trained = {"all": list(network.parameters())}, trained_parameters(network)
    optimizer = build_optimizer(groups, run_config("optim.lr=0.1").optim)
    return TrainState(network, groups, trained, optimizer, Ema(trained, EmaConfig(0.9, warmup=False)), batch_size=1)


def advance(state: TrainState) -> None:
    """One update."""
    for parameter in state.trained.values():
        parameter.grad = (parameter.detach() + state.step).sin()
    state.optimizer.step()
    assert state.ema
    state.ema.update(state.step)
    state.images_seen += 1


def stream_of(state: TrainState) -> dict[str, Any]:
    return {"cursor": 8 * state.step}


def save(checkpoints: Checkpoints, state: TrainState, wait: bool = True) -> Path:
    return checkpoints.save(state, stream_of(state), wait=wait)


def ended(checkpoints: Checkpoints) -> list[News]:
    """The news of the save under way, once it has ended."""
    news: list[News] = []
    while checkpoints.pending:
        time.sleep(0.01)
        news += checkpoints.settle()
    return news


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that a checkpoint holds, by DCP alone, without a process group of ours."""
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {n: torch.empty(m.size) for n, m in stored.items() if isinstance(m, TensorStorageMetadata)}
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors, json.loads((folder / "state.json").read_text())


def assert_equal(folder: Path, other: Path) -> None:
    (ours, counters), (theirs, others) = read(folder), read(other)
    assert counters == others and ours.keys() == theirs.keys()
    assert {"network", "optim", "ema"} == {name.split(".")[0] for name in ours}
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def new(folder: Path, world: World, keep_last: int = 2, keep_best: int = 0) -> Checkpoints:
    return Checkpoints(folder, world, keep_last, keep_best)
