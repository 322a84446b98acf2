"""Does a recipe learn what it says? Trains an experiment on photographs and measures it on pictures it never saw.

    python -m benchmarks.learning                      the demo: i2i on 2 ranks, seed 0
    python -m benchmarks.learning --seed 1 --ranks 1

Two held-out sets: `region`, crops of the right 30 % of photographs whose left 70 % was trained on, and `photo`, crops
of photographs never trained on. Every measure asks with the empty prompt, so that only the image tokens can help:

- fixed-grid loss before and after training, and after training with image tokens over without;
- matching score: over ordered pairs of held-out pictures, how often the picture generated from a reference is nearer to
  that reference than to the other one, in mean colours of a 4 x 4 grid. Chance is 50 %. Pairs of one photograph share a
  palette, so only layout can tell them apart.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from synthos.batch import Input
from synthos.build import build_recipe, fill_frozen
from synthos.data.stream import HeldOut
from synthos.generate import Generator, load
from synthos.models.parts import Models
from synthos.recipes.base import Encoded
from synthos.schema import RunConfig
from synthos.strict import read_config
from synthos.train.distributed import World, fill_whole, open_world
from synthos.train.pictures import grid
from synthos.train.validate import Validator, sample

SPLITS = ("region", "photo")
DRAWS = 4  # noises per held-out picture
ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="i2i_photos")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / ".demo", help="folder for the grid and the figures")
    parser.add_argument("overrides", nargs="*", help="further overrides of the run, e.g. optim.steps=100")
    args = parser.parse_args()
    run_dir, seconds = train(args.experiment, args.seed, args.ranks, args.overrides)
    results = measure(run_dir, args.out) | {"seed": args.seed, "ranks": args.ranks, "train_minutes": seconds / 60}
    record = {"experiment": args.experiment, **machine(), **results}
    (args.out / f"{args.experiment}-seed{args.seed}.json").write_text(json.dumps(record, indent=1) + "\n")
    return show(results, args.out / "grid.png")


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
    from launch.rundir import git_facts

    packages = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {"device": device, "python": platform.python_version(), **packages, "commit": git_facts(ROOT)["commit"]}


def measure(run_dir: Path, out: Path) -> dict[str, Any]:
    """Every figure of one trained run; writes the grid of references and what was made of them."""
    config = read_config(RunConfig, run_dir / "config.yaml")
    single = dataclasses.replace(config, nodes=1, gpus_per_node=1)
    world = open_world(single)
    trained = load(max((run_dir / "weights").iterdir()), device=str(world.device), dtype="fp32")
    untrained = fresh(config, world)
    results: dict[str, Any] = {"run": run_dir.name, "steps": config.optim.steps}
    rows: list[list[Tensor]] = []
    for split in SPLITS:
        folder = str(Path(str(config.data.shards)).parent / split)
        inputs = {**trained.recipe.inputs, "about": Input("text", ("json",))}
        held_out = HeldOut(dataclasses.replace(config.data, validation=folder), inputs)
        results[split] = measure_losses(trained, untrained, held_out, world)
        scores, references, made = measure_matching(trained, held_out)
        results[split] |= scores
        picks = list(range(0, len(references), max(1, len(references) // 12)))[:12]
        rows += [[references[i] for i in picks], [made[i] for i in picks]]
    world.close()
    out.mkdir(parents=True, exist_ok=True)
    grid(rows, scale=2).save(out / "grid.png")
    return results


def fresh(config: RunConfig, world: World) -> Generator:
    """The recipe as training found it."""
    models = Models(config.model, Path(config.cache_dir), seed=config.seed)
    recipe = build_recipe(config.recipe, models)
    fill_whole(recipe.network, models.tensors(recipe.network), world.device, torch.float32)
    recipe.network.eval().requires_grad_(False)
    fill_frozen(recipe, models, world.device, torch.float32)
    return Generator(recipe, recipe.null(), (config.data.height, config.data.width), world.device)


def measure_losses(trained: Generator, untrained: Generator, held_out: HeldOut, world: World) -> dict[str, float]:
    """Fixed-grid losses with the empty prompt, and their ratios."""

    def loss(generator: Generator, *drop: str) -> float:
        empty = Encoded({}, {}, [])
        validator = Validator(generator.recipe, world, held_out, empty, generator.null, 16, len(held_out), seed=0)
        table = validator.loss_grid(drop=("text", *drop))
        assert table is not None
        return table.mean().item()

    start, end, without = loss(untrained), loss(trained), loss(trained, "image")
    return {"loss_start": start, "loss_end": end, "end_over_start": end / start, "with_over_without": end / without}


def measure_matching(trained: Generator, held_out: HeldOut) -> tuple[dict[str, float], list[Tensor], list[Tensor]]:
    """Matching scores with and without the image; references and one generated picture of each, [3, H, W] in [0, 1]."""
    rows = list(range(len(held_out)))
    batch = held_out.batch(rows)
    photos = [json.loads(text)["photo"] for text in batch.texts("about")]
    references = batch.images("image").float() / 255
    images = trained.recipe.encode(batch.to(trained.device), "image")["image"]
    made = [generate(trained, images, draw) for draw in range(DRAWS)]
    dropped = [generate(trained, trained.null["image"].expand_as(images), draw) for draw in range(DRAWS)]
    pairs = list(itertools.combinations(rows, 2))
    different = [(i, j) for i, j in pairs if photos[i] != photos[j]]
    same = [(i, j) for i, j in pairs if photos[i] == photos[j]]
    scores = {
        "match_different": matching_score(references, made, different),
        "match_same": matching_score(references, made, same),
        "match_different_dropped": matching_score(references, dropped, different),
        "match_same_dropped": matching_score(references, dropped, same),
    }
    return scores, list(references), list(made[0])


@torch.no_grad()
def generate(trained: Generator, images: Tensor, draw: int) -> Tensor:
    """One picture per row of image tokens, with the empty prompt and a noise of its own, [R, 3, H, W]."""
    requests = [trained.recipe.Request(name=str(row), seed=row * DRAWS + draw) for row in range(len(images))]
    encoded = trained.recipe.encode_requests(requests, trained.size)
    encoded.conditions["image"] = images
    selected = encoded.select(list(range(len(images))), trained.device)
    return torch.cat(sample(trained.recipe, selected, trained.null, trained.device))


def matching_score(references: Tensor, made: list[Tensor], pairs: list[tuple[int, int]]) -> float:
    """Share of ordered pairs (i, j) in which picture i's 4 x 4 mean colours are nearer to reference i than to j.

    Args:
        references: [R, 3, H, W].
        made: for each draw of the noise, the pictures generated from them, [R, 3, H, W].
        pairs: which references to tell apart; each pair is asked in both orders.
    """
    size = references.shape[-1] // 4
    real = avg_pool2d(references, size).flatten(1)
    right = []
    for pictures in made:
        distance = torch.cdist(avg_pool2d(pictures, size).flatten(1), real)
        right += [distance[i, i] < distance[i, j] for i, j in pairs]
        right += [distance[j, j] < distance[j, i] for i, j in pairs]
    return torch.stack(right).double().mean().item()


LIMITS = {
    "end_over_start": ("validation loss, end / start", "<=", 0.40),
    "with_over_without": ("loss with tokens / without", "<=", 0.75),
    "match_different": ("matching, different photographs", ">=", 0.90),
    "match_same": ("matching, same photograph", ">=", 0.85),
    "match_different_dropped": ("the same with the image dropped", "+-", 0.50),
    "match_same_dropped": ("the same with the image dropped", "+-", 0.50),
}


def show(results: dict[str, Any], picture: Path) -> int:
    """Print the figures beside their limits; 0 if all hold."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{results['run']}: {results['steps']} steps, {results['train_minutes']:.1f} min of training")
    for column in ("measure (empty prompt)", "limit", *(f"held-out {split}" for split in SPLITS)):
        table.add_column(column)
    passed = True
    for split_key in ("loss_start", "loss_end"):
        table.add_row(split_key.replace("_", " at "), "", *(f"{results[s][split_key]:.3f}" for s in SPLITS))
    for key, (words, sign, limit) in LIMITS.items():
        values = [results[split][key] for split in SPLITS]
        good = [{"<=": v <= limit, ">=": v >= limit, "+-": abs(v - limit) <= 0.1}[sign] for v in values]
        passed &= all(good)
        bound = f"{sign} {limit:.2f}" if sign != "+-" else f"{limit:.2f} +- 0.10"
        table.add_row(words, bound, *(f"{v:.3f}{'' if g else '  MISSED'}" for v, g in zip(values, good, strict=True)))
    Console().print(table)
    print(f"reference | generated, row by row: {picture}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
