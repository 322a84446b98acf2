"""`synthos generate`: pictures from trained weights, here in this process or, with `cluster=`, as a job."""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from launch import slurm
from launch.after import After, find_after, waiting
from launch.ask import ask, check_keys, request_fields, split
from launch.check import generation_problems, machine_problems
from launch.compose import CHECKOUT, choices, compose_generate, file_name
from launch.generate_plan import GeneratePlan
from launch.identity import sig8_of_generation
from launch.provenance import inputs_of
from launch.redact import problems as secrets
from launch.rundir import code_problems, open_folder, read_state, run_folder
from launch.runs import find_one, runs_root
from launch.start import start
from synthos.models.parts import missing
from synthos.recipes.base import is_encoded, name_pictures, recipe_class
from synthos.schema import GenerateConfig
from synthos.strict import dump
from synthos.weights import Source, find_source, is_run, planned_source

USAGE = """usage: synthos generate weights=<folder> out=<picture or folder> [prompt=...] [reference=a.jpg,b.jpg] ...
       synthos generate weights=<folder> cluster=<name> [after=<run>] [requests=<file.jsonl>] [key=value] ...

Make pictures: here, or as a job with a run folder, spread over its ranks. `dry_run=true` prints the plan of a job. A
run as `weights` stands for its last ones; a job may wait for them (after=).
configs/generate.yaml lists the keys; beside them stand the fields of the recipe's Request: prompt, reference,
negative_prompt, height, width, steps, sampler, seed, and guidance scales. docs/generate.md says more.
"""
GRID = Path("grid.png")


def main(arguments: list[str]) -> int | Callable[[], int]:
    """Check everything that the user wrote; returns 0 for a dry run and for help, else the work that remains.

    Raises ValueError, in one message, for what is wrong; then nothing is written.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE, f"cluster: {', '.join(choices()['cluster'])}", sep="\n")
        return 0

    pairs = [split(argument) for argument in arguments]
    given = dict(pairs)
    if "weights" not in given:
        raise ValueError("weights: missing; synthos generate weights=FOLDER out=FILE.png [prompt=...] [reference=FILE]")
    root = Path(given["runs_dir"]).expanduser().absolute() if "runs_dir" in given else runs_root()
    weights = locate(given["weights"], root)
    known = planned_source(weights) if is_run(weights) else find_source(weights)
    recipe = recipe_class(known.recipe["name"])
    names = request_fields(recipe)
    check_keys(given, names)
    own = [f"{key}={value}" for key, value in pairs if key not in names and key != "weights"]
    config, once = compose_generate(str(weights), own)
    after = find_after(once.after, config, root)
    source = open_source(Path(config.weights), config.average, after)
    out = Path(once.out).expanduser() if once.out else None
    name = file_name(out.stem) if out and out.suffix and not out.is_dir() else None
    requests = ask(config, recipe, {key: value for key, value in given.items() if key in names}, name)
    config = dataclasses.replace(
        config, requests=requests, weights=str(weights.absolute() if is_run(weights) else source.path)
    )
    if "cluster" not in given:
        return here(config, source, recipe, out, once.device)
    plan = dataclasses.replace(make_plan(config, source, once.force == "new"), after=after)
    if once.dry_run:
        print(plan.render(), plan.job(), sep="\n", end="")
        return 0
    return as_job(plan, ["synthos", "generate", *arguments], once.follow)


def locate(word: str, root: Path) -> Path:
    """The weights that `word` names: a path, or a run below `root` by its name, which stands for its last ones."""
    path = Path(word).expanduser()
    if path.exists() or os.sep in word:
        return path
    try:
        return find_one(word, root)
    except ValueError as error:
        raise ValueError(f"weights: {word} does not exist, and as the name of a run: {error}") from None


def open_source(path: Path, average: bool | None, after: After | None) -> Source:
    """The weights at `path`; those of a run that is not done are still to come, for a job that waits for it.

    Raises ValueError for a run that nobody waits for, and for whatever `find_source` does.
    """
    if not is_run(path) or read_state(path).done:
        return find_source(path, average)
    if after is None or after.run.resolve() != path.resolve():
        raise ValueError(
            f"weights: {path.name} is not done, and writes its last weights then; expected cluster=<name> "
            f"after={path.name}, or a folder like weights/step_00002000 of it"
        )
    return planned_source(path, average)


def here(
    config: GenerateConfig, source: Source, recipe: Any, out: Path | None, device: str | None
) -> Callable[[], int]:
    """Check what only this machine can tell, and load the weights; returns the making of the pictures."""
    from synthos.generate import choose_device, fill, open_recipe
    from synthos.train.distributed import choose_dtype

    if problems := generation_problems(config):
        raise ValueError("\n".join(problems))
    assert isinstance(config.requests, list)
    requests = [recipe.Request(**row) for row in config.requests]
    place(out, [[row["name"]] for row in config.requests], config.grid)  # before anything is opened
    where = choose_device(device)
    if absent := missing(source.model):
        raise ValueError("\n".join(absent))
    opened, models = open_recipe(source, Path(config.cache_dir), encoders=not all(map(is_encoded, requests)))
    settings = [opened.setting(request, source.size) for request in requests]
    files = place(out, name_pictures(settings, alone=True), config.grid)
    generator = fill(source, opened, models, where, choose_dtype(config.dtype, where))
    return lambda: make(generator, requests, files, config)


def place(out: Path | None, names: list[list[str]], grid: int) -> list[list[Path]]:
    """The files of each request's pictures, in the folder `out`, or `out` itself where that is a picture file.

    Raises ValueError for an `out` that can't be either, or can't be written.
    """
    if out is None:
        raise ValueError("out: missing; expected a folder, or a picture file as in out=barn.png")
    kind, count = Image.registered_extensions().get(out.suffix.lower()), sum(map(len, names))
    is_picture = kind in Image.SAVE and not out.is_dir()
    if out.suffix and not is_picture and not out.is_dir():
        raise ValueError(f"out: {str(out)!r} is not allowed; expected a folder, or a picture file as in {out.stem}.png")
    if is_picture and count > 1:
        raise ValueError(f"out: {str(out)!r} is one picture, and {count} are asked for; expected a folder")
    if not is_picture and grid and count > 1 and any(GRID.stem in own for own in names):
        raise ValueError(f"requests: the name {GRID.stem!r} is that of {GRID}; expected another, or grid=0")
    folder = out.parent if is_picture else out
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"out: {folder} can't be written: {there} is no folder that this user may write to")
    return [[out if is_picture else out / f"{name}.png" for name in own] for own in names]


def make(generator: Any, requests: list[Any], files: list[list[Path]], config: GenerateConfig) -> int:
    """Make every picture, and a grid of several; Ctrl-C leaves those that are made."""
    from synthos.generate_job import draw_grid, save
    from synthos.train.progress import Countdown

    every = [file for own in files for file in own]
    every[0].parent.mkdir(parents=True, exist_ok=True)
    countdown = Countdown(len(every))
    try:
        for row, pictures in generator.each(requests, config.micro):
            for picture, file in zip(pictures, files[row], strict=True):
                save(picture, file)
            countdown.add(len(pictures))
    except KeyboardInterrupt:
        done = f"{countdown.done} of {len(every)} pictures are in {every[0].parent}"
        print(f"interrupted: {done}", file=sys.stderr)
        return 130
    finally:
        countdown.close()
    if config.grid and len(every) > 1:
        every.append(every[0].parent / GRID)
        save(draw_grid(requests, files, config.grid), every[-1])
    for file in every:
        with Image.open(file) as picture:
            print(f"{file}  {picture.width} x {picture.height}")
    return 0


def make_plan(config: GenerateConfig, source: Source, new: bool = False) -> GeneratePlan:
    """Everything that can be known of a job before it starts; ValueError, in one message, for what can't work."""
    if problems := [*generation_problems(config), *secrets(dump(config))]:
        raise ValueError("\n".join(problems))
    folder = run_folder(config, sig8_of_generation(config), new)
    lines, notes = slurm.look(config, folder)
    lines += [*machine_problems(config), *code_problems(config, CHECKOUT), *missing(source.model)]
    return GeneratePlan(config, source, folder, lines, notes)


def as_job(plan: GeneratePlan, command: list[str], following: bool) -> Callable[[], int]:
    """Check that weights and requests fit the recipe; returns the opening of the run folder and the start."""
    from synthos.generate import open_recipe

    if plan.missing:
        raise ValueError("\n".join(plan.missing))
    recipe, _ = open_recipe(plan.source, Path(plan.config.cache_dir))
    assert isinstance(plan.config.requests, list)
    name_pictures([recipe.setting(recipe.Request(**row), plan.source.size) for row in plan.config.requests])

    def prepare() -> None:
        print(plan.render())
        open_folder(plan.folder, plan.config, command, CHECKOUT, inputs_of(plan.config))

    def run() -> int:
        code = start(waiting(plan.config, plan.after), plan.folder, prepare, following)
        if read_state(plan.folder).done:
            print(f"pictures: {plan.folder / 'samples'}" + (f", {plan.folder / GRID}" if plan.config.grid else ""))
        return code

    return run
