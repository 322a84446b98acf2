"""The generate stage: the pictures of a job's requests, a share of them on every rank.

Weights and encoders are whole on every rank, and each picture is made by one. Still, the ranks go through the requests
as validation does: in groups of equal settings, every rank with equally many calls of the network. So a recipe whose
`sample` is collective would do, and a stop meets all ranks between the same two calls.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from synthos.generate import Generator, fill, open_recipe
from synthos.recipes.base import group_rows, is_encoded, located, name_pictures, recipe_class
from synthos.schema import GenerateConfig
from synthos.strict import load as load_schema
from synthos.train.distributed import World
from synthos.train.pictures import sheet, to_image
from synthos.train.progress import Beat, Countdown, write_heartbeat
from synthos.train.stop import Stop
from synthos.train.validate import deal
from synthos.weights import Source, find_source

GRID_PICTURES = 64  # the first so many are shown in a grid
log = logging.getLogger(__name__)


def generate(config: GenerateConfig, folder: Path, world: World, stop: Stop, attempt: int) -> dict[str, Any]:
    """Make every picture of the job in `folder` that is not in its samples/ yet; returns the verdict. Collective."""
    source = find_source(Path(config.weights), config.average)
    asked = config.requests if isinstance(config.requests, list) else []
    kind = recipe_class(source.recipe["name"]).Request
    requests = [load_schema(kind, located(row, folder), "requests") for row in asked]
    generator = open_generator(config, source, requests, world)
    settings = [generator.recipe.setting(request, generator.size) for request in requests]
    files = [[folder / "samples" / f"{name}.png" for name in names] for names in name_pictures(settings, alone=True)]
    (folder / "samples").mkdir(exist_ok=True)
    todo, total = absent(files, world), sum(map(len, files))
    there = total - sum(len(files[row]) for row in todo)
    log.info("%d of %d pictures are there", there, total)

    def tell(beat: Beat) -> None:
        write_heartbeat(folder, attempt, beat)

    countdown = Countdown(total, there, tell) if world.is_main else None
    try:
        cause = make(generator, [(requests[row], files[row]) for row in todo], config.micro, world, stop, countdown)
    finally:
        if countdown:
            countdown.close()
    if cause:
        left = sum(len(files[row]) for row in absent(files, world))
        return {"status": "stopped", "cause": cause, "step": total - left}
    if config.grid and world.is_main:
        save(draw_grid(requests, files, config.grid), folder / "grid.png")
    return {"status": "done", "cause": "finished", "step": total}


def open_generator(config: GenerateConfig, source: Source, requests: list[Any], world: World) -> Generator:
    """The job's weights on this rank's device, and the encoders unless no request needs one."""
    encoders = not all(map(is_encoded, requests))
    with world.main_first():  # writes the parts of a tiny model; transformers saves on rank 0 only
        recipe, models = open_recipe(source, Path(config.cache_dir), encoders)
    return fill(source, recipe, models, world.device, world.dtype)


def absent(files: list[list[Path]], world: World) -> list[int]:
    """The requests that lack a file, as rank 0 sees it: on a shared folder, ranks may see different ones."""
    found = [world.is_main and all(file.is_file() for file in own) for own in files]
    return [row for row, there in enumerate(world.reduce(torch.tensor(found, dtype=torch.int64)).tolist()) if not there]


def make(
    generator: Generator,
    asked: list[tuple[Any, list[Path]]],
    micro: int,
    world: World,
    stop: Stop,
    countdown: Countdown | None,
) -> str:
    """Make the pictures of each request, into its files; returns the cause of a stop, or "". Collective."""
    settings = [generator.recipe.setting(request, generator.size) for request, _ in asked]
    for group in group_rows(settings):
        for rows in deal(len(group), world, micro):
            if cause := stop.agreed():
                return cause
            mine = [asked[group[row % len(group)]] for row in rows]  # ranks make equally many calls
            made = 0
            images = generator.sample([request for request, _ in mine])
            for row, own, (_, files) in zip(rows, images, mine, strict=True):
                if row < len(group):
                    for image, file in zip(own, files, strict=True):
                        save(to_image(image), file)
                    made += len(files)
            made = int(world.reduce(torch.tensor(made)))
            if countdown:
                countdown.add(made)
    return ""


def save(picture: Image.Image, file: Path) -> None:
    """Write a picture that is whole or absent, also to who looks right now; its name says the format."""
    part = file.with_name(f".{file.stem}.part{file.suffix}")
    picture.save(part)
    part.replace(file)


def draw_grid(requests: list[Any], files: Sequence[Sequence[Path]], columns: int) -> Image.Image:
    """References above the pictures made from them; of many pictures, the first ones."""
    cells: list[tuple[Path, Path | None, str]] = []
    for request, own in zip(requests, files, strict=True):
        names = [v for k, v in vars(request).items() if k.startswith("reference") and isinstance(v, str)]
        cells += [(file, Path(names[0]) if names else None, file.stem) for file in own]
    return sheet([(Image.open(file), above, name) for file, above, name in cells[:GRID_PICTURES]], columns)
