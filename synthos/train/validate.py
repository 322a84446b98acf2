"""Validation: the fixed-grid loss on held-out samples, and pictures for the run's requests. All of it is collective."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from synthos.batch import Batch, Features
from synthos.keys import FixedDraws, KeyedDraws, hash64, signed64
from synthos.recipes.base import Encoded, Recipe, count_pictures
from synthos.train.distributed import World, reshard, set_training
from synthos.train.ema import Ema
from synthos.train.stop import Stop


class HeldOutSamples(Protocol):
    """What validation needs of the held-out split."""

    ids: Tensor  # int64 [N]

    def __len__(self) -> int: ...

    def batch(self, rows: list[int]) -> Batch: ...


@dataclass
class Validation:
    """One validation: losses by metric name, and the pictures [P, 3, H, W] of each request by its name (on rank 0)."""

    losses: dict[str, float]
    pictures: dict[str, Tensor]


@dataclass
class Validator:
    """Measures a network on the same samples, times and noise every time.

    Args:
        recipe, world, null: as in training.
        held_out: the validation split; its first `samples` are used.
        requests: pictures to make.
        micro: samples per forward pass of the loss.
        seed: of the validation noise.
        alive: called between forward passes, of which a validation may have many.
    """

    recipe: Recipe
    world: World
    held_out: HeldOutSamples
    requests: Encoded
    null: Features
    micro: int
    samples: int
    seed: int
    alive: Callable[[], None] = lambda: None

    def run(self, ema: Ema | None, stop: Stop) -> Validation | None:
        """Loss with raw and averaged weights, pictures with those to be exported; None if a stop was asked for."""
        network = self.recipe.network
        set_training(network, False)
        try:
            raw = self.loss_grid(stop)
            if raw is None:
                return None
            averaging: AbstractContextManager[None] = ema.applied(network) if ema else nullcontext()
            with averaging:
                averaged = self.loss_grid(stop) if ema else None
                if ema and averaged is None:
                    return None
                pictures = self.pictures(stop)
        finally:
            reshard(network)
            set_training(network, True)
        if pictures is None:
            return None
        losses = _summary("val/loss", raw) | (_summary("val/loss_ema", averaged) if averaged is not None else {})
        return Validation(losses, pictures)

    @torch.no_grad()
    def loss_grid(self, stop: Stop | None = None, drop: tuple[str, ...] = ()) -> Tensor | None:
        """Loss of each held-out sample at each of the 8 fixed times, float64 [samples, 8], the same on every rank.

        `drop` names features that are replaced by their null for every sample. None if a stop was asked for.
        """
        total = min(self.samples, len(self.held_out))
        grid = torch.zeros(total, FixedDraws.NUM_T, dtype=torch.float64)
        for rows in deal(total, self.world, self.micro):
            if self._stopped(stop):
                return None
            kept = [row % total for row in rows]  # ranks make equally many calls: padding repeats a row
            batch = self.held_out.batch(kept).to(self.world.device)
            features = encode_all(self.recipe, batch)
            features |= {name: self.null[name].expand_as(features[name]) for name in drop}
            for index in range(FixedDraws.NUM_T):
                draws = FixedDraws(self.seed, batch.ids, [index] * len(kept), self.world.device)
                loss = self.recipe.loss(features, self.null, draws).per_sample.double().cpu()
                for row, value in zip(rows, loss, strict=True):
                    if row < total:
                        grid[row, index] = value
        return self.world.reduce(grid)

    @torch.no_grad()
    def pictures(self, stop: Stop | None = None) -> dict[str, Tensor] | None:
        """Every request's pictures, by its name; on rank 0. None if a stop was asked for."""
        made: dict[str, Tensor] = {}
        for group in self.requests.groups():
            for rows in deal(len(group), self.world, 1):  # alone, a picture does not depend on its company
                if self._stopped(stop):
                    return None
                mine = [group[row % len(group)] for row in rows]
                images = sample(
                    self.recipe, self.requests.select(mine, self.world.device), self.null, self.world.device
                )
                for row, pictures in zip(rows, images, strict=True):
                    if row < len(group):
                        made[self.requests.settings[group[row]]["name"]] = pictures.cpu()
        return gather_pictures(made, self.world)

    def _stopped(self, stop: Stop | None) -> bool:
        self.alive()
        return bool(stop and stop.agreed())


def encode_all(recipe: Recipe, batch: Batch) -> Features:
    """Every feature of a batch, without gradients."""
    features: Features = {}
    with torch.no_grad():
        for group in dict.fromkeys(feature.group for feature in recipe.features.values()):
            features |= recipe.encode(batch, group)
    return features


def sample(recipe: Recipe, requests: Encoded, null: Features, device: torch.device) -> list[Tensor]:
    """The pictures [P, 3, H, W] of each request of one group; the noise is keyed by each request's seed alone."""
    ids = torch.tensor([signed64(hash64("request", setting["seed"])) for setting in requests.settings])
    images = recipe.sample(requests, null, KeyedDraws(0, ids, torch.zeros_like(ids), device))
    return list(torch.split(images, count_pictures(requests.settings)))


def gather_pictures(made: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """All ranks' pictures on rank 0; collective."""
    gathered: list[dict[str, Tensor]] | None = [{}] * world.size if world.is_main else None
    torch.distributed.gather_object(made, gathered, dst=0, group=world.cpu_group)
    return {name: picture for part in gathered or [] for name, picture in part.items()}


def deal(total: int, world: World, micro: int) -> list[list[int]]:
    """This rank's rows in calls of at most `micro`: equally many on every rank, so rows >= total are padding."""
    share = -(-total // world.size)
    mine = list(range(world.rank * share, (world.rank + 1) * share))
    return [mine[i : i + micro] for i in range(0, share, micro)]


def _summary(name: str, grid: Tensor) -> dict[str, float]:
    if not len(grid):
        return {}
    by_t = {f"{name}_by_t/{i}": value for i, value in enumerate(grid.mean(0).tolist())}
    return {name: grid.mean().item(), **by_t}
