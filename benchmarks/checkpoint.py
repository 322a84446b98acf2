"""How long does training stand still for a checkpoint, beside torch's own saves?

    python -m benchmarks.checkpoint              two gloo ranks, 300 MB, eight rounds
    python -m benchmarks.checkpoint --quick      a few MB and two rounds; its figures mean nothing

All save the same sharded state (weights, two moments, an average) to the same disk, in turn, in one run; ratios are
formed within a round. The rivals are `torch.distributed.checkpoint.save`, for which training waits to the end, and
`async_save` as it comes, with a copy of its own for every save; neither keeps checksums.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.distributed.checkpoint.state_dict_saver import async_save as torch_async_save
from torch.distributed.checkpoint.state_dict_saver import save as torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.learning import ROOT, machine
from launch.snapshot import git_facts
from synthos.schema import EmaConfig
from synthos.train.checkpoint import Checkpoints
from synthos.train.distributed import World
from synthos.train.ema import Ema
from synthos.train.state import TrainState, trained_parameters

WIDTH, COPIES = 1024, 4
OURS, SYNC, ASYNC = "synthos", "torch save", "torch async_save"
Saves = dict[str, list[dict[str, float]]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300, help="of one checkpoint")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, help="on the disk to write to; default: a temporary one")
    parser.add_argument("--out", type=Path, help="file for the figures")
    args = parser.parse_args()
    if args.quick:
        args.megabytes, args.rounds = 20, 2
    if "RANK" in os.environ:
        run_rank(args)
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures = Path(folder) / "figures.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
        asked = [f"--megabytes={args.megabytes}", f"--rounds={args.rounds}", f"--folder={folder}", f"--out={figures}"]
        subprocess.run([*torchrun, "-m", "benchmarks.checkpoint", *asked], cwd=ROOT, check=True)
        saves: Saves = json.loads(figures.read_text())
    about = {**machine(), "changed_since_commit": git_facts(ROOT)["changed"], "ranks": args.ranks}
    results = {**about, "megabytes": args.megabytes, "rounds": args.rounds, **summarise(saves), "saves": saves}
    print(table(results))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def summarise(saves: Saves) -> dict[str, Any]:
    """Median, least and most of each figure, and of the ratios to ours within a round."""
    names = {name: saves[name] for name in (OURS, SYNC, ASYNC)}
    figures = {n: {key: spread([row[key] for row in rows]) for key in rows[0]} for n, rows in names.items()}
    ratios = {
        name: spread([rival["stall"] / ours["stall"] for rival, ours in zip(saves[name], saves[OURS], strict=True)])
        for name in (SYNC, ASYNC)
    }
    return {"figures": figures, "times_our_stall": ratios}


def spread(values: list[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = ["| save | training waits, s | spread | whole save, s | waits ... times as long as Synthos |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for name, figures in results["figures"].items():
        stall, whole = figures["stall"], figures["whole"]
        ratio = results["times_our_stall"].get(name)
        times = f"{ratio[0]:.1f} ({ratio[1]:.1f} to {ratio[2]:.1f})" if ratio else ""
        lines.append(f"| {name} | {stall[0]:.3f} | {stall[1]:.3f} to {stall[2]:.3f} | {whole[0]:.2f} | {times} |")
    ours = results["figures"][OURS]
    restore, load = ours["restore"][0], ours["load"][0]
    told = (
        f"Going on: {restore:.2f} s with checksums, {load:.2f} s by torch's load alone. A step while a save is written"
    )
    return "\n".join([*lines, "", f"{told} takes {ours['slower'][0]:.2f} times as long."])


def run_rank(args: argparse.Namespace) -> None:
    """Take every round on this rank; rank 0 writes what they took."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, rank, size, torch.device("cpu"), torch.float32, None)
    state, folder = build_state(args.megabytes), args.folder
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    checkpoints = Checkpoints(folder / "ours", world, keep_last=1, keep_best=0)
    saves: Saves = {OURS: [], SYNC: [], ASYNC: []}
    for number in range(args.rounds + 1):  # the first is not counted
        state.images_seen += 1
        contestants: dict[str, Callable[[], dict[str, float]]] = {
            OURS: lambda: save_ours(state, checkpoints, world),
            SYNC: lambda: save_sync(state, folder / "sync", group, world),
            ASYNC: lambda: save_async(state, folder / "async", group, world),
        }
        for name in list(contestants)[number % 3 :] + list(contestants)[: number % 3]:
            taken = contestants[name]()
            slowest = world.reduce(torch.tensor(list(taken.values()), dtype=torch.float64), dist.ReduceOp.MAX)
            if number:
                saves[name].append(dict(zip(taken, slowest.tolist(), strict=True)))
    if world.is_main:
        args.out.write_text(json.dumps(saves))
    world.close()


def build_state(megabytes: int) -> TrainState:
    """Linear layers that make up so many megabytes with AdamW's moments and an average."""
    layers = max(1, round(megabytes * 1e6 / (4 * COPIES * WIDTH * WIDTH)))
    network = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    fully_shard(network, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    parameters, trained = list(network.parameters()), trained_parameters(network)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return TrainState(network, {"all": parameters}, trained, optimizer, Ema(trained, EmaConfig(0.9, False)), 1)


def save_ours(state: TrainState, checkpoints: Checkpoints, world: World) -> dict[str, float]:
    """One save while training goes on, and the time to go on from it beside a load without checksums."""
    idle = statistics.median(step(world) for _ in range(5))
    with clock(world) as whole:
        with clock(world) as stall:
            checkpoints.save(state, {}, wait=False)
        steps = []
        while checkpoints.pending:
            steps.append(step(world))
            checkpoints.settle()
    with clock(world) as restore:
        checkpoints.restore(state)
    with clock(world) as load:
        torch_load(state.tensors(), checkpoint_id=checkpoints.list()[-1], process_group=checkpoints.group)
    slower = statistics.median(steps) / idle
    return {"stall": stall[0], "whole": whole[0], "restore": restore[0], "load": load[0], "slower": slower}


def save_sync(state: TrainState, folder: Path, group: dist.ProcessGroup, world: World) -> dict[str, float]:
    """torch's synchronous save, to an empty folder."""
    with emptied(folder, world), clock(world) as stall:
        torch_save(state.tensors(), checkpoint_id=folder, process_group=group)
    return {"stall": stall[0], "whole": stall[0]}


def save_async(state: TrainState, folder: Path, group: dist.ProcessGroup, world: World) -> dict[str, float]:
    """torch's asynchronous save by its defaults, waited for outside of the stall."""
    with emptied(folder, world), clock(world) as whole:
        with clock(world) as stall:
            saved = torch_async_save(state.tensors(), checkpoint_id=folder, process_group=group)
        assert isinstance(saved, Future)
        while not saved.done():
            step(world, reduce=False)  # ranks do not agree on the end
    return {"stall": stall[0], "whole": whole[0]}


@contextmanager
def emptied(folder: Path, world: World) -> Iterator[None]:
    """The folder is not there at the start, nor at the end."""
    yield
    world.barrier()
    if world.is_main:
        shutil.rmtree(folder)


@contextmanager
def clock(world: World) -> Iterator[list[float]]:
    """Seconds of the block on this rank, all ranks having come to it."""
    world.barrier()
    taken: list[float] = []
    started = time.perf_counter()
    yield taken
    taken.append(time.perf_counter() - started)


def step(world: World, reduce: bool = True) -> float:
    """What stands for a training step, in seconds: a product, and a reduction over the ranks."""
    started = time.perf_counter()
    made: Tensor = torch.ones(512, 512) @ torch.ones(512, 512)
    if reduce:
        world.reduce(made[0])
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
