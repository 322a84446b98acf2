"""What the measures of all recipes share: limits, a run as it was before and after training, and scores over pairs."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from synthos.batch import Input
from synthos.build import build_recipe, fill_frozen
from synthos.data.stream import HeldOut
from synthos.generate import Generator, load
from synthos.models.parts import Models
from synthos.schema import RunConfig
from synthos.strict import read_config
from synthos.train.distributed import World, fill_whole, open_world

SPLITS = ("region", "photo")  # crops of another part of the photographs trained on, and of others
NEAR = 0.10  # what `+-` allows
Pairs = Sequence[tuple[int, int]]
Rows = list[list[Tensor]]  # pictures [3, H, W] in [0, 1], in rows of a grid


@dataclass(frozen=True)
class Limit:
    """What a measure has to reach."""

    words: str
    sign: Literal["<=", ">=", "+-"]
    bound: float

    def holds(self, value: float) -> bool:
        return {"<=": value <= self.bound, ">=": value >= self.bound, "+-": abs(value - self.bound) <= NEAR}[self.sign]

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:.2f}" if self.sign != "+-" else f"{self.bound:.2f} +- {NEAR:.2f}"


@dataclass
class Opened:
    """A finished run: its config, and its recipe as training left and as it found it."""

    config: RunConfig
    world: World
    trained: Generator
    untrained: Generator

    def held_out(self, split: str) -> HeldOut:
        """One of `SPLITS`, with what each sample's JSON tells as the text `about`."""
        folder = str(Path(str(self.config.data.shards)).parent / split)
        inputs = {**self.trained.recipe.inputs, "about": Input("text", ("json",))}
        return HeldOut(dataclasses.replace(self.config.data, validation=folder), inputs)


def open_run(run_dir: Path) -> Opened:
    """The run in this folder, on one rank; its world has to be closed."""
    config = read_config(RunConfig, run_dir / "config.yaml")
    world = open_world(dataclasses.replace(config, nodes=1, gpus_per_node=1))
    trained = load(max((run_dir / "weights").iterdir()), device=str(world.device), dtype="fp32")
    return Opened(config, world, trained, _fresh(config, world))


def _fresh(config: RunConfig, world: World) -> Generator:
    """The recipe as training found it."""
    models = Models(config.model, Path(config.cache_dir), seed=config.seed)
    recipe = build_recipe(config.recipe, models)
    fill_whole(recipe.network, models.tensors(recipe.network), world.device, torch.float32)
    recipe.network.eval().requires_grad_(False)
    fill_frozen(recipe, models, world.device, torch.float32)
    return Generator(recipe, recipe.null(), (config.data.height, config.data.width), world.device)


def split_pairs(about: list[str]) -> tuple[Pairs, Pairs]:
    """Pairs (i, j), i < j, of samples of different photographs, and of the same."""
    photos = [json.loads(text)["photo"] for text in about]
    pairs = [(i, j) for j in range(len(photos)) for i in range(j)]
    return [p for p in pairs if photos[p[0]] != photos[p[1]]], [p for p in pairs if photos[p[0]] == photos[p[1]]]


def pair_score(cost: Tensor, pairs: Pairs) -> float:
    """Share of pairs, each in both orders, in which i suits its own better than j: cost[i, i] < cost[i, j].

    Args:
        cost: [..., R, R]; leading dimensions are further trials.
        pairs: which rows to tell apart.
    """
    own = cost.diagonal(dim1=-2, dim2=-1)  # [..., R]
    right = [own[..., i] < cost[..., i, j] for a, b in pairs for i, j in ((a, b), (b, a))]
    return torch.stack(right).double().mean().item()


def matching_score(references: Tensor, made: list[Tensor], pairs: Pairs) -> float:
    """Share of ordered pairs (i, j) in which picture i's 4 x 4 mean colours are nearer to reference i than to j.

    Args:
        references: [R, 3, H, W].
        made: for each draw of the noise, the pictures generated from them, [R, 3, H, W].
        pairs: which references to tell apart; each pair is asked in both orders.
    """
    size = references.shape[-1] // 4
    real = avg_pool2d(references, size).flatten(1)
    distances = [torch.cdist(avg_pool2d(pictures, size).flatten(1), real) for pictures in made]
    return pair_score(torch.stack(distances), pairs)
