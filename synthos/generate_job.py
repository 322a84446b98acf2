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

from synthos.build import located
from synthos.generate import Generator, fill, open_recipe
from synthos.recipes.base import group_rows
from synthos.schema import GenerateConfig
from synthos.train.distributed import World
from synthos.train.pictures import sheet, to_image
from synthos.train.progress import Beat, Countdown, write_heartbeat
from synthos.train.stop import Stop
from synthos.train.validate import deal
from synthos.weights import find_source

GRID_PICTURES = 64  # the first so many requests are shown in a grid
log = logging.getLogger(__name__)


def generate(config: GenerateConfig, folder: Path, world: World, stop: Stop, attempt: int) -> dict[str, Any]:
    """Make every picture of the job in `folder` that is not in its samples/ yet; returns the verdict. Collective."""
    generator = open_generator(config, world)
    asked = config.requests if isinstance(config.requests, list) else []
    requests = [generator.request(located(row, folder), "requests") for row in asked]
    files = [folder / "samples" / f"{request.name}.png" for request in requests]
    files[0].parent.mkdir(exist_ok=True)
    todo = absent(files, world)
    log.info("%d of %d pictures are there", len(files) - len(todo), len(files))

    def tell(beat: Beat) -> None:
        write_heartbeat(folder, attempt, beat)

    countdown = Countdown(len(files), len(files) - len(todo), tell) if world.is_main else None
    try:
        cause = make(generator, [(requests[row], files[row]) for row in todo], config.micro, world, stop, countdown)
    finally:
        if countdown:
            countdown.close()
    if cause:
        return {"status": "stopped", "cause": cause, "step": len(files) - len(absent(files, world))}
    if config.grid and world.is_main:
        shown = [Image.open(file) for file in files[:GRID_PICTURES]]
        save(draw_grid(requests, shown, config.grid), folder / "grid.png")
    return {"status": "done", "cause": "finished", "step": len(files)}


def open_generator(config: GenerateConfig, world: World) -> Generator:
    """The job's weights on this rank's device."""
    source = find_source(Path(config.weights), config.average)
    with world.main_first():  # writes the parts of a tiny model; transformers saves on rank 0 only
        recipe, models = open_recipe(source, Path(config.cache_dir))
    return fill(source, recipe, models, world.device, world.dtype)


def absent(files: list[Path], world: World) -> list[int]:
    """Which of the files are not there, as rank 0 sees it: on a shared folder, ranks may see different ones."""
    found = torch.tensor([world.is_main and file.is_file() for file in files], dtype=torch.int64)
    return [row for row, there in enumerate(world.reduce(found).tolist()) if not there]


def make(
    generator: Generator,
    pictures: list[tuple[Any, Path]],
    micro: int,
    world: World,
    stop: Stop,
    countdown: Countdown | None,
) -> str:
    """Make each picture, of a request and into a file; returns the cause of a stop, or "". Collective."""
    settings = [generator.recipe.setting(request, generator.size) for request, _ in pictures]
    for group in group_rows(settings):
        for rows in deal(len(group), world, micro):
            if cause := stop.agreed():
                return cause
            mine = [pictures[group[row % len(group)]] for row in rows]  # ranks make equally many calls
            images = generator.sample([request for request, _ in mine])
            kept = [index for index, row in enumerate(rows) if row < len(group)]
            for index in kept:
                save(to_image(images[index]), mine[index][1])
            made = world.reduce(torch.tensor(len(kept)))
            if countdown:
                countdown.add(int(made))
    return ""


def save(picture: Image.Image, file: Path) -> None:
    """Write a picture that is whole or absent, also to who looks right now; its name says the format."""
    part = file.with_name(f".{file.stem}.part{file.suffix}")
    picture.save(part)
    part.replace(file)


def draw_grid(requests: list[Any], pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """References above the pictures made from them; of many requests, the first ones."""
    cells = []
    for request, picture in zip(requests, pictures, strict=False):
        files = [v for k, v in vars(request).items() if k.startswith("reference") and isinstance(v, str)]
        cells.append((picture, Path(files[0]) if files else None, request.name))
    return sheet(cells[:GRID_PICTURES], columns)
