"""The only wiring from a config to objects."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from synthos.batch import Features
from synthos.data.plan import last_step
from synthos.data.stream import HeldOut, Stream
from synthos.data.streaming import Streaming
from synthos.models import initial
from synthos.models.parts import Models, contents
from synthos.recipes.base import (
    Encoded,
    Recipe,
    file_fields,
    load_encoded,
    located,
    name_pictures,
    recipe_class,
    recipe_config,
    save_encoded,
)
from synthos.schema import RunConfig
from synthos.strict import load
from synthos.train.checkpoint import Checkpoints
from synthos.train.distributed import (
    Mesh,
    World,
    build_mesh,
    fill_sharded,
    fill_whole,
    fsdp_modules,
    layout_of,
    set_dtypes,
    shard,
    shard_encoder,
)
from synthos.train.ema import Ema
from synthos.train.export import exporter
from synthos.train.loop import Job
from synthos.train.memory import Sizes, sizes_of
from synthos.train.optim import build_optimizer, check_groups
from synthos.train.report import Report
from synthos.train.state import TrainState, trained_parameters
from synthos.train.stop import Stop
from synthos.train.validate import Validator

log = logging.getLogger(__name__)


def build_recipe(recipe: dict[str, Any], models: Models, encoders: bool = True) -> Recipe:
    """The recipe with every module on the meta device."""
    built: Recipe = recipe_class(recipe["name"])(recipe_config(recipe), models, encoders)
    return built


def measure(config: RunConfig) -> Sizes:
    """The shapes of everything the recipe is made of, built on the meta device from configs; no weight is read.

    Raises ValueError for a learning rate of a parameter group that the recipe does not have, and for a request that it
    can't make.
    """
    models = Models(config.model, Path(config.cache_dir), meta_only=True)
    recipe = build_recipe(config.recipe, models)
    check_groups(config.optim, recipe.param_groups())
    size, requests = (config.data.height, config.data.width), _listed(config)
    name_pictures([recipe.setting(load(recipe.Request, row, "validate.requests"), size) for row in requests])
    if not initial.missing(config):
        initial.start_from(config, recipe.network, models)
    return sizes_of(recipe, models.added(recipe.network).names)


def build_job(config: RunConfig, folder: Path, world: World, stop: Stop, attempt: int) -> Job:
    """Everything that training needs; collective."""
    models = Models(config.model, Path(config.cache_dir), seed=config.seed)
    with world.main_first():  # writes the parts of a tiny model; transformers saves on rank 0 only
        recipe = build_recipe(config.recipe, models)
        initial.hold(config, folder, write=world.is_main)
    initial.start_from(config, recipe.network, models)
    recipe.compute_dtype = world.dtype
    held_out = HeldOut(config.data, recipe.inputs)
    stream = build_stream(config, recipe, world)
    layout = layout_of(config, recipe, world)
    log.info("encoders %s: %s", layout.encoders, layout.reason)
    everyone = build_mesh("full", config, world.device) if layout.encoders == "full" else None
    fill_frozen(recipe, models, world.device, world.dtype, everyone)
    encoded, null = prepare_requests(config, folder, recipe, held_out, world)
    state = build_state(config, recipe, models, world)
    starts, added = models.tensors(recipe.network), models.added(recipe.network).names
    checkpoints = Checkpoints(folder / "checkpoints", world, config.checkpoint.keep_last, config.checkpoint.keep_best)
    report, settings = Report(folder, config, world, attempt), config.validate
    validator = Validator(
        recipe, world, held_out, encoded, null, config.batch.micro, settings.samples, settings.seed, report.alive
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
        report=report,
        stop=stop,
        export=exporter(
            folder / "weights",
            config,
            world,
            models.part(recipe.network),
            null,
            added={name: starts[name] for name in added},
            content=contents(config.model) if world.is_main else {},
        ),
        last_step=last_step(config, len(stream)),
    )


def build_stream(config: RunConfig, recipe: Recipe, world: World) -> Stream | Streaming:
    """This rank's batches: planned from indexes, or read one shard after another."""
    data, inputs, size, seed = config.data, recipe.inputs, config.batch.size, config.seed
    if data.streaming is None:
        stream = Stream(data, inputs, batch_size=size, rank=world.rank, world=world.size, seed=seed)
        states = world.collect(stream.state_dict())
        if different := [rank for rank, state in enumerate(states) if state != states[0]]:
            raise RuntimeError(
                f"data: ranks 0 and {different[0]} see other samples: {states[0]} and {states[different[0]]}"
            )
        return stream
    return Streaming(data, inputs, batch_size=size, rank=world.rank, world=world.size, seed=seed, collect=world.collect)


def fill_frozen(
    recipe: Recipe, models: Models, device: torch.device, dtype: torch.dtype, mesh: Mesh | None = None
) -> None:
    """Load what never learns: encoders in the computation's dtype, what pixels pass through in float32.

    With a `mesh` the encoders are sharded over it: each rank keeps its shard, and encoding is collective.
    """
    for module in recipe.encoders.children():
        if mesh:
            set_dtypes(module, frozen=dtype)
            shard_encoder(module, mesh)
            fill_sharded(module, models.tensors(module), device)
        else:
            fill_whole(module, models.tensors(module), device, dtype)
    for module in recipe.frozen.children():
        fill_whole(module, models.tensors(module), device, torch.float32)
    for group in (recipe.encoders, recipe.frozen):
        group.eval().requires_grad_(False)


def build_state(config: RunConfig, recipe: Recipe, models: Models, world: World) -> TrainState:
    """Shard and fill the network; optimiser and average on top of it."""
    network: nn.Module = recipe.network
    set_dtypes(network, frozen=world.dtype)
    layout = layout_of(config, recipe, world)
    log.info("mesh %s: %s", layout.mesh, layout.reason)
    mesh = build_mesh(layout.mesh, config, world.device)
    shard(network, recipe.fsdp_units(), mesh, world, config.activation_checkpointing)
    fill_sharded(network, models.tensors(network), world.device)
    groups, trained = recipe.param_groups(), trained_parameters(network)
    ema = Ema(trained, config.ema) if config.ema.decay else None
    return TrainState(network, groups, trained, build_optimizer(groups, config.optim), ema, config.batch.size)


def prepare_requests(
    config: RunConfig, folder: Path, recipe: Recipe, held_out: HeldOut, world: World
) -> tuple[Encoded, Features]:
    """Requests and null conditions as the network meets them: encoded once by the first attempt, read by all others.

    Where encoders are sharded, every rank encodes the same requests; the main one writes.
    """
    path = folder / "requests" / "encoded.safetensors"
    absent = torch.tensor(float(world.is_main and not path.exists()))  # as the main rank sees it
    if world.reduce(absent).item():
        with world.main_first():
            requests = [load(recipe.Request, located(r, folder), "validate.requests") for r in _listed(config)]
            requests += _from_split(config, path.parent, recipe, held_out, save=world.is_main)
        if world.is_main or fsdp_modules(recipe.encoders):
            encoded, null = _encode(config, recipe, requests)
            for setting in encoded.settings:
                for key, file in file_fields(setting).items():  # so that the folder may move
                    setting[key] = str(Path(file).relative_to(folder))
            if world.is_main:
                save_encoded(path, encoded, null)
        world.barrier()
    encoded, null = load_encoded(path)
    return encoded, {name: value.to(world.device) for name, value in null.items()}


@torch.no_grad()
def _encode(config: RunConfig, recipe: Recipe, requests: list[Any]) -> tuple[Encoded, Features]:
    """Requests, each by itself as `synthos generate` encodes it, and the null conditions."""
    size = (config.data.height, config.data.width)
    return Encoded.join([recipe.encode_requests([request], size) for request in requests]), recipe.null()


def _listed(config: RunConfig) -> list[dict[str, Any]]:
    """The requests of the frozen config: submission has turned a JSONL file into a list."""
    return config.validate.requests if isinstance(config.validate.requests, list) else []


def _from_split(config: RunConfig, folder: Path, recipe: Recipe, held_out: HeldOut, save: bool) -> list[Any]:
    """The first held-out samples asked as text, as image and as both, as far as the recipe reads them.

    Their pictures lie in `folder`, where `save` writes them.
    """
    folder.mkdir(exist_ok=True)
    fields = {f.name for f in dataclasses.fields(recipe.Request)}
    pictures = sorted((i.crop != "whole", name) for name, i in recipe.inputs.items() if i.kind == "image")
    picture = pictures[0][1] if pictures else None  # the whole picture where a recipe reads it: a crop can be cut of it
    caption = next((name for name, i in recipe.inputs.items() if i.kind == "text"), None)
    requests = []
    for row in range(min(config.validate.from_split, len(held_out))):
        batch, asked = held_out.batch([row]), {}
        if picture and "reference" in fields:
            asked["reference"] = str(folder / f"split_{row:03d}.png")
            if save:
                Image.fromarray(batch.images(picture)[0].permute(1, 2, 0).numpy()).save(asked["reference"])
        if caption and "prompt" in fields:
            asked["prompt"] = batch.texts(caption)[0]
        kinds = {"text": ("prompt",), "image": ("reference",), "both": ("prompt", "reference")}
        for kind, names in kinds.items():
            if all(name in asked for name in names):
                request = {name: asked[name] for name in names}
                requests.append(recipe.Request(name=f"split_{row:03d}_{kind}", **request, **recipe.from_split))
    return requests
