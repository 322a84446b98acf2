"""How fast does i2i train on one GPU? Models of true size with random weights, and the product's own optimiser step.

    python -m benchmarks.gpu                     every case at rising batch sizes, until one does not fit
    python -m benchmarks.gpu --batch 8 16        these batch sizes
    python -m benchmarks.gpu --toy               the whole program at toy size, also on a CPU
    python -m benchmarks.gpu recipe.text_length=128 activation_checkpointing=true

What trains is taken in turn, with the encoders in the step (`online`) and with their features computed before it
(`memory`). Nothing is read, downloaded or decoded: weights and pictures are drawn, and captions fill the text length,
the most they can cost. Rates are set against the device's own: the best of several large square matrix products in the
computation's dtype, measured in the same run.
"""

import argparse
import gc
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.drawn import build_job, step_flops, with_batch
from benchmarks.learning import ROOT, machine
from launch.compose import compose
from launch.snapshot import git_facts
from synthos.schema import RunConfig
from synthos.train.distributed import World, open_world, peak_memory
from synthos.train.loop import Job, update

BASE = ("recipe=i2i", "cluster=debug", "wandb.mode=off", "batch.size=1", "batch.micro=1")
TOY = ("model=tiny", "data.height=64", "data.width=96", "recipe.text_length=16")


@dataclass(frozen=True)
class Effort:
    """How much is measured, and for how long."""

    batches: tuple[int, ...]
    products: tuple[int, ...]  # rows of the square matrices
    warmup: int  # calls that are not timed
    steps: int  # calls in one timing
    repeats: int  # timings


TRUE_EFFORT = Effort((1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128), (4096, 8192, 16384), warmup=3, steps=5, repeats=5)
TOY_EFFORT = Effort((1, 2), (256, 512), warmup=1, steps=2, repeats=3)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny models and small pictures, also without a GPU")
    parser.add_argument("--train", nargs="+", default=["full", "projector"], help="what trains; default: %(default)s")
    parser.add_argument("--batch", nargs="+", type=int, help="batch sizes, rising; default: a sweep to what fits")
    parser.add_argument("--out", type=Path, help="JSON file; default: results/gpu-DEVICE.json, with --toy none")
    parser.add_argument("overrides", nargs="*", help="further overrides of the run, e.g. precision=fp32")
    args = parser.parse_intermixed_args(arguments)
    if not (args.toy or torch.cuda.is_available()):
        parser.error("no GPU on this machine; --toy runs the program at toy size on its CPU")
    for key in ("recipe.train", "batch.size", "batch.micro"):
        if any(override.startswith(f"{key}=") for override in args.overrides):
            parser.error(f"{key}: not to be overridden; use --train and --batch")
    if min(args.batch or [1]) < 1:
        parser.error(f"--batch: {min(args.batch)} is not allowed; expected 1 or more images")
    common = [*BASE, *(TOY if args.toy else ()), *args.overrides]
    try:
        configs = [compose([*common, f"recipe.train={train}"]).config for train in args.train]
    except ValueError as error:
        parser.error(str(error))
    effort = TOY_EFFORT if args.toy else TRUE_EFFORT
    effort = replace(effort, batches=tuple(args.batch or effort.batches))
    if args.overrides and not (args.toy or args.out):
        parser.error("--out: missing; with overrides the figures are not those of results/gpu-DEVICE.json")
    if args.out and not args.out.parent.is_dir():
        parser.error(f"--out: {args.out.parent} is no folder")

    def keep(record: dict[str, Any]) -> None:
        if args.out or not args.toy:
            name = re.sub(r"[^a-z0-9]+", "-", record["device"].lower())
            path = args.out or ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
            path.write_text(json.dumps({"toy": args.toy, **record}, indent=1) + "\n")

    Console().print(table(measure(configs, effort, keep)))
    return 0


def measure(configs: list[RunConfig], effort: Effort, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Every config, with encoders online and with features from memory, and what the figures were made on.

    `keep` is given the record after each case, so that a later one that fails takes nothing with it.
    """
    world = open_world(configs[0])
    cases = list(itertools.product(configs, (True, False)))
    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        rates = matmul_rates(world, effort)
        record = about(configs[0], world) | {"effort": asdict(effort), "matmul_tflops": rates, "cases": []}
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=len(cases) * len(effort.batches))
            for number, (config, online) in enumerate(cases, start=1):
                progress.update(task, description=f"{config.recipe['train']}, {'online' if online else 'memory'}")
                case = measure_case(config, world, online, effort, partial(progress.advance, task))
                for row in case["batches"]:
                    row["fraction_of_matmul"] = row["tflops"] / max(rates.values())
                record["cases"].append(case)
                keep(record)
                progress.update(task, completed=number * len(effort.batches))  # also where the larger ones do not fit
    finally:
        world.close()
    return record


def about(config: RunConfig, world: World) -> dict[str, Any]:
    """Device, versions, and what the cases have in common."""
    on_gpu = world.device.type == "cuda"
    return {
        **machine(),
        "changed_since_commit": git_facts(ROOT)["changed"],
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads",
        "memory_gb": torch.cuda.get_device_properties(world.device).total_memory / 1e9 if on_gpu else None,
        "model": config.model.name,
        "precision": config.precision,
        "activation_checkpointing": config.activation_checkpointing,
        "height": config.data.height,
        "width": config.data.width,
        "recipe": {key: value for key, value in config.recipe.items() if key != "train"},
    }


def matmul_rates(world: World, effort: Effort) -> dict[str, float]:
    """TFLOP/s of square matrix products in the computation's dtype, by rows; the best of several timings each."""
    rates = {}
    for size in effort.products:
        a, b = (torch.randn(size, size, device=world.device, dtype=world.dtype) for _ in range(2))
        rates[str(size)] = 2 * size**3 / min(timed(partial(torch.mm, a, b), world.device, effort)) / 1e12
    return rates


def measure_case(
    config: RunConfig, world: World, online: bool, effort: Effort, advance: Callable[[], None]
) -> dict[str, Any]:
    """What one config does at each batch size, up to the first that does not fit."""
    _forget(world.device)
    rows: list[dict[str, Any]] = []
    does_not_fit = None
    with tempfile.TemporaryDirectory() as folder:
        job = build_job(config, world, Path(folder), online)
        flops = step_flops(job)
        for size in effort.batches:
            try:
                rows.append(measure_batch(with_batch(job, size), sum(flops.values()), effort))
            except torch.OutOfMemoryError:
                does_not_fit = size
                break
            advance()
        job.report.close({})
    return {
        "train": config.recipe["train"],
        "features": "online" if online else "memory",
        "tflop_per_image": {name: count / 1e12 for name, count in flops.items()},
        "batches": rows,
        "does_not_fit": does_not_fit,
    }


def measure_batch(job: Job, flops: float, effort: Effort) -> dict[str, Any]:
    """Images per second (median and range), TFLOP/s at the median, and peak memory of updates of one batch size."""
    device, size = job.world.device, job.config.batch.size
    _forget(device)
    rates = [size / seconds for seconds in timed(partial(update, job), device, effort)]
    middle = statistics.median(rates)
    return {
        "batch": size,
        "images_per_s": middle,
        "images_per_s_range": [min(rates), max(rates)],
        "tflops": middle * flops / 1e12,
        "peak_memory_gb": peak_memory(device) / 1e9,
    }


def timed(work: Callable[[], object], device: torch.device, effort: Effort) -> list[float]:
    """Seconds that one call takes, once for each timing."""
    for _ in range(effort.warmup):
        work()
    seconds = []
    for _ in range(effort.repeats):
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(effort.steps):
            work()
        _synchronize(device)
        seconds.append((time.perf_counter() - started) / effort.steps)
    return seconds


def table(record: dict[str, Any]) -> Table:
    """The record for a terminal; each case's fastest batch size is bold."""
    rate = max(record["matmul_tflops"].values())
    what = f"i2i, {record['model']}, {record['height']} x {record['width']} pixels, {record['precision']}"
    shown = Table(title=f"{what}\n{record['device']}, matmul at {rate:.3g} TFLOP/s", box=SIMPLE, padding=0)
    for name in ("trained, features", "TFLOP/image", "batch", "images/s", "spread", "TFLOP/s", "of matmul", "peak GB"):
        shown.add_column(name, justify="left" if name == "trained, features" else "right", no_wrap=True)
    for case in record["cases"]:
        fastest = max((row["images_per_s"] for row in case["batches"]), default=None)
        case_of = f"{case['train']}, {case['features']}", f"{sum(case['tflop_per_image'].values()):.4g}"
        for row in case["batches"]:
            style = "bold" if row["images_per_s"] == fastest else None
            shown.add_row(*case_of, *_cells(row), style=style)
            case_of = "", ""
        if case["does_not_fit"]:
            shown.add_row(*case_of, str(case["does_not_fit"]), "no room")
        shown.add_section()
    return shown


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    low, high = row["images_per_s_range"]
    spread = (high - low) / row["images_per_s"]
    return (
        str(row["batch"]), f"{row['images_per_s']:.2f}", f"{100 * spread:.1f} %", f"{row['tflops']:.3g}",
        f"{100 * row['fraction_of_matmul']:.0f} %", f"{row['peak_memory_gb']:.1f}",
    )  # fmt: skip


def _forget(device: torch.device) -> None:
    """Give back what nobody uses any more (modules hold each other), and count the peak from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
