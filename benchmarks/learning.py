"""Does a recipe learn what it says? Trains an experiment on photographs and measures it on pictures it never saw.

    python -m benchmarks.learning                      the demo: i2i on 2 ranks, seed 0
    python -m benchmarks.learning --seed 1 --ranks 1
    python -m benchmarks.learning --experiment siglip_photos
    python -m benchmarks.learning --experiment decomposer_photos

Two held-out sets: `region`, crops of the right 30 % of photographs whose left 70 % was trained on, and `photo`, crops
of photographs never trained on. What is measured stands in `measures_image` and `measures_decomposer`.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import measures_decomposer, measures_image, tiny_base
from benchmarks.measures import SPLITS, Limit, Rows, open_run
from synthos.train.pictures import grid

ROOT = Path(__file__).parents[1]
MEASURES = {  # of each recipe, by held-out set, and the limits of some of them
    "i2i": (measures_image.measure, measures_image.I2I),
    "siglip_projector": (measures_image.measure, measures_image.SIGLIP),
    "decomposer": (measures_decomposer.measure, measures_decomposer.LIMITS),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="i2i_photos")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / ".demo", help="folder for the grid and the figures")
    parser.add_argument("overrides", nargs="*", help="further overrides of the run, e.g. optim.steps=100")
    args = parser.parse_args()
    if args.experiment == tiny_base.EXPERIMENT:
        tiny_base.prepare()
    run_dir, seconds = train(args.experiment, args.seed, args.ranks, args.overrides)
    name, grid_file = f"{args.experiment}-seed{args.seed}", args.out / "grid.png"
    recipe, results = measure(run_dir, grid_file)
    results |= {"seed": args.seed, "ranks": args.ranks, "train_minutes": seconds / 60}
    record = {"experiment": args.experiment, **machine(), **results}
    (args.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    code = show(results, MEASURES[recipe][1])
    print(f"references and what was made of them, row by row: {grid_file}")
    return code


def train(experiment: str, seed: int, ranks: int, overrides: list[str]) -> tuple[Path, float]:
    """Run the experiment by the one command; its folder, and the wall time in seconds."""
    from launch.cli import main as synthos
    from launch.commands.submit import make_plan
    from launch.compose import compose

    command = [f"experiment={experiment}", f"seed={seed}", f"gpus_per_node={ranks}", "cluster=local"]
    command += ["cluster.device=cpu", *overrides]  # the demo's figures are a CPU's, also where there is a GPU
    started = time.monotonic()
    code = synthos(["submit", *command])
    if code:
        sys.exit(code)
    folder = make_plan(compose(command).config, dry_run=True).folder
    assert folder is not None, "the data was indexed by the run"
    return folder, time.monotonic() - started


def machine() -> dict[str, Any]:
    """What the figures were made on."""
    from launch.snapshot import git_facts

    packages = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {"device": device, "python": platform.python_version(), **packages, "commit": git_facts(ROOT)["commit"]}


def measure(run_dir: Path, grid_file: Path) -> tuple[str, dict[str, Any]]:
    """A run's recipe and every figure by held-out set; writes the grid of references and what was made of them."""
    opened = open_run(run_dir)
    recipe = opened.config.recipe["name"]
    results: dict[str, Any] = {"run": run_dir.name, "steps": opened.config.optim.steps}
    rows: Rows = []
    for split in SPLITS:
        results[split], shown = MEASURES[recipe][0](opened, opened.held_out(split))
        rows += shown
    opened.world.close()
    grid_file.parent.mkdir(parents=True, exist_ok=True)
    grid(rows, scale=2).save(grid_file)
    return recipe, results


def show(results: dict[str, Any], limits: dict[str, Limit]) -> int:
    """Print the figures beside their limits; 0 if all hold."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{results['run']}: {results['steps']} steps, {results['train_minutes']:.1f} min of training")
    for column in ("measure", "limit", *(f"held-out {split}" for split in SPLITS)):
        table.add_column(column)
    passed = True
    for key in results[SPLITS[0]]:
        values, limit = [results[split][key] for split in SPLITS], limits.get(key)
        words, good = (limit.words, [limit.holds(v) for v in values]) if limit else (key.replace("_", " "), [True] * 2)
        passed &= all(good)
        told = (f"{v:.3f}{'' if g else '  MISSED'}" for v, g in zip(values, good, strict=True))
        table.add_row(words, str(limit or ""), *told)
    Console().print(table)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
