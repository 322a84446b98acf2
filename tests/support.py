"""What tests share: configs, a world of one rank, and runs through the real command."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from launch.cli import main
from launch.compose import compose
from synthos.schema import RunConfig
from synthos.train.distributed import World

ROOT = Path(__file__).parents[1]
# Small enough for a test, with every part of a run in it: dropout, average, accumulation, validation, pictures.
SMALL = (
    "recipe=i2i", "model=tiny", "data=photos", "cluster=local", "cluster.device=cpu", "cluster.threads=1",
    "precision=fp32", "recipe.train=full", "recipe.text_length=8", "batch.size=8", "batch.micro=2", "optim.lr=1e-3",
    "optim.steps=6", "ema.decay=0.9", "validate.samples=8", "validate.from_split=1", "wandb.mode=off",
)  # fmt: skip


def compose_for_test(*overrides: str) -> RunConfig:
    """The config that a command line composes."""
    return compose(overrides).config


def run_config(*overrides: str) -> RunConfig:
    """A small i2i config on one rank."""
    return compose_for_test(*SMALL, "cluster=debug", *overrides)


def world_of_one() -> Iterator[World]:
    """A process group of this process alone, closed afterwards; for `yield from` in a fixture."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = World(0, 0, 1, torch.device("cpu"), torch.float32, None)
    yield world
    world.close()


def environment() -> dict[str, str]:
    """The environment of a command: no key of ours, no rank of an outer job, no progress colours."""
    dropped = ("WANDB_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC", "SLURM_")
    return {k: v for k, v in os.environ.items() if not k.startswith(dropped)}


def here(*arguments: str) -> int:
    """Run a `synthos` command in this process, which has imported everything; a debug run's threads are put back."""
    threads = torch.get_num_threads()
    try:
        return main(list(arguments))
    finally:
        torch.set_num_threads(threads)


def synthos(*arguments: str, cwd: Path = ROOT, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a `synthos` command as a user would."""
    command = [sys.executable, "-m", "launch.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout)
