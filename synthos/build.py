"""The only wiring from a config to objects."""

import dataclasses
import importlib
import logging
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from synthos.batch import Features
from synthos.data.stream import HeldOut, Stream
from synthos.models.parts import Models
from synthos.recipes.base import Encoded, Recipe, load_encoded, save_encoded
from synthos.schema import RunConfig, load, unknown
from synthos.train.checkpoint import Checkpoints
from synthos.train.distributed import (
    World,
    build_mesh,
    choose_mesh,
    fill_sharded,
    fill_whole,
    set_dtypes,
    shard,
)
from synthos.train.ema import Ema
from synthos.train.export import exporter
from synthos.train.loop import Job
from synthos.train.optim import build_optimizer, check_groups
from synthos.train.report import Report
from synthos.train.state import TrainState, trained_parameters
from synthos.train.stop import Stop
from synthos.train.validate import Validator

log = logging.getLogger(__name__)


def recipe_class(name: str) -> Any:
    """The class that `synthos.recipes.<name>` names as its RECIPE."""
    known = sorted(
        f.stem for f in (Path(__file__).parent / "recipes").glob("*.py") if f.stem not in ("__init__", "base")
    )
    if name not in known:
        raise ValueError(f"recipe.name: no recipe {name!r}; {unknown(name, known)}")
    return importlib.import_module(f"synthos.recipes.{name}").RECIPE


def recipe_config(recipe: dict[str, Any]) -> Any:
    """The recipe's own Config from the config's `recipe` group."""
    values = {key: value for key, value in recipe.items() if key != "name"}
    return load(recipe_class(recipe["name"]).Config, values, "recipe")


def build_recipe(recipe: dict[str, Any], models: Models, encoders: bool = True) -> Recipe:
    """The recipe with every module on the meta device."""
    built: Recipe = recipe_class(recipe["name"])(recipe_config(recipe), models, encoders)
    return built


def count_parameters(config: RunConfig) -> dict[str, int]:
    """Parameters that train, and all of them with the frozen parts; counted on the meta device, no file is read.

    Raises ValueError for a learning rate of a parameter group that the recipe does not have.
    """
    recipe = build_recipe(config.recipe, Models(config.model, Path(config.cache_dir), meta_only=True))
    check_groups(config.optim, recipe.param_groups())
    parts = (recipe.network, recipe.encoders, recipe.frozen)
    trained = sum(p.numel() for p in recipe.network.parameters() if p.requires_grad)
    return {"trainable": trained, "total": sum(p.numel() for part in parts for p in part.parameters())}


def build_job(config: RunConfig, folder: Path, world: World, stop: Stop, attempt: int) -> Job:
    """Everything that training needs; collective."""
    models = Models(config.model, Path(config.cache_dir), seed=config.seed)
    with world.main_first():  # writes the parts of a tiny model; transformers saves on rank 0 only
        recipe = build_recipe(config.recipe, models)
    recipe.compute_dtype = world.dtype
    held_out = HeldOut(config.data, recipe.inputs)
    stream = Stream(
        config.data,
        recipe.inputs,
        batch_size=config.batch.size,
        rank=world.rank,
        world=world.size,
        seed=config.seed,
    )
    fill_frozen(recipe, models, world.device, world.dtype)
    encoded, null = prepare_requests(config, folder, recipe, held_out, world)
    state = build_state(config, recipe, models, world)
    checkpoints = Checkpoints(folder / "checkpoints", world, config.checkpoint.keep_last, config.checkpoint.keep_best)
    validator = Validator(
        recipe, world, held_out, encoded, null, config.batch.micro, config.validate.samples, config.validate.seed
    )
    return Job(
        config=config,
        world=world,
        recipe=recipe,
        state=state,
        stream=stream,
        null=null,
        validator=validator,
        checkpoints=checkpoints,
        report=Report(folder, config, world, attempt),
        stop=stop,
        export=exporter(folder / "weights", config, world, models.part(recipe.network), null),
        last_step=last_step(config, len(stream)),
    )


def last_step(config: RunConfig, samples: int) -> int:
    """The number of optimiser steps, from `optim.steps` or from epochs of `samples`."""
    if config.optim.steps is not None:
        return config.optim.steps
    return int((config.optim.epochs or 0) * samples / config.batch.size + 1e-9)  # 0.29 * 100 is 28.999...


def fill_frozen(recipe: Recipe, models: Models, device: torch.device, dtype: torch.dtype) -> None:
    """Load what never learns: encoders in the computation's dtype, what pixels pass through in float32."""
    for group, kind in ((recipe.encoders, dtype), (recipe.frozen, torch.float32)):
        for module in group.children():
            fill_whole(module, models.tensors(module), device, kind)
            module.eval().requires_grad_(False)
        group.eval()


def build_state(config: RunConfig, recipe: Recipe, models: Models, world: World) -> TrainState:
    """Shard and fill the network; optimiser and average on top of it."""
    network: nn.Module = recipe.network
    set_dtypes(network, frozen=world.dtype)
    mode, reason = choose_mesh(config, network, world)
    log.info("mesh %s: %s", mode, reason)
    shard(network, recipe.fsdp_units(), build_mesh(mode, config, world.device), world, config.activation_checkpointing)
    fill_sharded(network, models.tensors(network), world.device)
    groups, trained = recipe.param_groups(), trained_parameters(network)
    ema = Ema(trained, config.ema) if config.ema.decay else None
    return TrainState(network, groups, trained, build_optimizer(groups, config.optim), ema, config.batch.size)


def prepare_requests(
    config: RunConfig, folder: Path, recipe: Recipe, held_out: HeldOut, world: World
) -> tuple[Encoded, Features]:
    """Requests and null conditions as the network meets them: encoded once by the first attempt, read by all others."""
    path = folder / "requests" / "encoded.safetensors"
    if world.is_main and not path.exists():
        path.parent.mkdir(exist_ok=True)
        requests = [load(recipe.Request, _located(r, folder), "validate.requests") for r in _listed(config)]
        requests += _from_split(config, path.parent, recipe, held_out)
        size = (config.data.height, config.data.width)
        with torch.no_grad():
            encoded = recipe.encode_requests(requests, size) if requests else Encoded({}, {}, [])
            for setting in encoded.settings:
                if setting.get("reference"):  # so that the folder may move
                    setting["reference"] = str(Path(setting["reference"]).relative_to(folder))
            save_encoded(path, encoded, recipe.null())
    world.barrier()
    encoded, null = load_encoded(path)
    return encoded, {name: value.to(world.device) for name, value in null.items()}


def _listed(config: RunConfig) -> list[dict[str, Any]]:
    """The requests of the frozen config: submission has turned a JSONL file into a list."""
    return config.validate.requests if isinstance(config.validate.requests, list) else []


def _located(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Pictures were copied into the run folder at submission and are named relative to it."""
    return {k: str(folder / v) if k.startswith("reference") and isinstance(v, str) else v for k, v in request.items()}


def _from_split(config: RunConfig, folder: Path, recipe: Recipe, held_out: HeldOut) -> list[Any]:
    """The first held-out samples asked as text, as image and as both, as far as the recipe reads them."""
    fields = {f.name for f in dataclasses.fields(recipe.Request)}
    picture = next((name for name, i in recipe.inputs.items() if i.kind == "image"), None)
    caption = next((name for name, i in recipe.inputs.items() if i.kind == "text"), None)
    requests = []
    for row in range(min(config.validate.from_split, len(held_out))):
        batch, asked = held_out.batch([row]), {}
        if picture and "reference" in fields:
            asked["reference"] = str(folder / f"split_{row:03d}.png")
            Image.fromarray(batch.images(picture)[0].permute(1, 2, 0).numpy()).save(asked["reference"])
        if caption and "prompt" in fields:
            asked["prompt"] = batch.texts(caption)[0]
        kinds = {"text": ("prompt",), "image": ("reference",), "both": ("prompt", "reference")}
        for kind, names in kinds.items():
            if all(name in asked for name in names):
                request = {name: asked[name] for name in names}
                requests.append(recipe.Request(name=f"split_{row:03d}_{kind}", **request))
    return requests
