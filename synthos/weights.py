"""Trained weights and all that belongs to them: an export of a run, a file of one, or a checkpoint.

Looking costs nothing: only names, sizes and small JSON files are read before `start` or `null` is called.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import nn

from synthos.batch import Features
from synthos.models.exported import ABOUT_FILE, NULL_FILE, Export, find_export
from synthos.models.initial import changed, start_from
from synthos.models.parts import Models
from synthos.models.tensors import take_tensors, tensor_files
from synthos.recipes.base import load_encoded
from synthos.schema import ModelConfig, PartConfig, RunConfig, read_job
from synthos.strict import read_config
from synthos.train.checkpoint_files import MANIFEST, STATE, STEP, is_whole

EXPECTED = (
    "expected a folder like weights/step_00002000 or checkpoints/step_00002000 of a run, the run itself, or a"
    f" .safetensors file of such a weights folder, or one with {ABOUT_FILE} and {NULL_FILE} beside it"
)


@dataclass(frozen=True)
class Source:
    """Where trained weights come from.

    Attributes:
        path: the folder or the file.
        recipe: its name and the fields of its Config.
        model: the parts; the exported network in place of its base, where it was exported whole.
        size: (height, width) of training in pixels.
        cache_dir: of the run, where its tiny parts are.
        averaged: whether they are averaged weights.
        start: lets a built network of the recipe start from them, reading names only; ValueError for tensors that are
            not the recipe's.
        null: reads the null conditions that the network was trained with.
    """

    path: Path
    recipe: dict[str, Any]
    model: ModelConfig
    size: tuple[int, int]
    cache_dir: Path
    averaged: bool
    start: Callable[[nn.Module, Models], None]
    null: Callable[[], Features]


def find_source(path: Path, average: bool | None = None) -> Source:
    """The weights at `path`: a folder `weights/step_N` or `checkpoints/step_N` of a run, or a `.safetensors` file.

    A run folder stands for its last weights. A file is that of an export, or stands elsewhere with copies of the
    export's synthos.json and null.safetensors beside it.

    Args:
        path: folder or file.
        average: True for averaged weights, False for raw ones; None for what an export holds, and for a checkpoint's
            average if it has one.

    Raises ValueError for anything else, for what is damaged, and where the asked kind is not there.
    """
    if is_run(path):
        return find_source(_last_weights(path), average)
    if path.is_dir() and ((path / STATE).is_file() or (path / MANIFEST).is_file()):
        return _checkpoint(path, average)
    export = find_export(path, "weights")
    if export is None:
        beside = f"is no .safetensors file with {ABOUT_FILE} and {NULL_FILE} beside it"
        problem = f"lacks {ABOUT_FILE}" if path.is_dir() else beside if path.exists() else "does not exist"
        raise ValueError(f"weights: {path} {problem}; {EXPECTED}")
    source = _exported(export)
    _check_average(source, average)
    return source


def planned_source(run: Path, average: bool | None = None) -> Source:
    """The last weights that a run will have, as its config tells: enough to check what they are asked for."""
    config = read_job(run / "config.yaml")
    if not isinstance(config, RunConfig):
        raise ValueError(f"weights: {run} has stage {config.stage}, and no weights; {EXPECTED}")
    source = Source(
        path=run,
        recipe=config.recipe,
        model=config.model,
        size=(config.data.height, config.data.width),
        cache_dir=Path(config.cache_dir),
        averaged=config.ema.decay is not None,
        start=lambda network, models: None,
        null=dict,
    )
    _check_average(source, average)
    return source


def is_run(path: Path) -> bool:
    """Whether this is a run folder, which stands for its last weights."""
    return (path / "config.yaml").is_file()


def _last_weights(run: Path) -> Path:
    found = [(int(match[1]), path) for path in (run / "weights").glob("step_*") if (match := STEP.fullmatch(path.name))]
    if not found:
        raise ValueError(f"weights: {run} has no weights, which a run writes when it is done; {EXPECTED}")
    return max(found)[1]


def _check_average(source: Source, average: bool | None) -> None:
    if average is not None and average != source.averaged:
        held = "averaged" if source.averaged else "raw"
        raise ValueError(
            f"average: {str(average).lower()} is not allowed, {source.path} holds {held} weights only; expected null, "
            "or a checkpoint of the run"
        )


def _exported(export: Export) -> Source:
    about, model = export.about, export.about.model
    if about.complete and not export.alone:  # a model folder, in place of the part that the run began with
        parts = {**model.parts, about.part: PartConfig(str(export.file.parent))}
        model = replace(model, parts=parts)
    return Source(
        path=export.file if export.alone else export.folder,
        recipe=about.recipe,
        model=model,
        size=(about.height, about.width),
        cache_dir=Path(about.cache_dir),
        averaged=about.weights == "ema",
        start=partial(_start, export),
        null=partial(load_file, export.folder / NULL_FILE),
    )


def _start(export: Export, network: nn.Module, models: Models) -> None:
    """Take every tensor of an export's file: all that trained and all that the base has not, and what else is there.

    That is what the run had from `init_from` and did not train.
    """
    where = tensor_files(export.file)
    names = [name for name, _ in network.named_parameters()]
    _check_names(export.file, set(where), {*_trained(network), *models.added(network).names}, set(names))
    models.extend(network, take_tensors(network, where, {name: name for name in where}))


def _trained(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def _check_names(path: Path, found: set[str], needed: set[str], allowed: set[str]) -> None:
    odd = sorted((needed - found) | (found - allowed))
    if odd:
        raise ValueError(f"weights: {path} does not hold exactly what the recipe trains; first difference {odd[0]!r}")


def _checkpoint(path: Path, average: bool | None) -> Source:
    run = path.absolute().parents[1]
    if not is_whole(path):
        raise ValueError(f"weights: the checkpoint {path} is damaged: its files are not those that {MANIFEST} lists")
    encoded = run / "requests" / "encoded.safetensors"
    for file in (run / "config.yaml", encoded):
        if not file.is_file():
            raise ValueError(f"weights: {path} is a checkpoint away from its run folder: there is no {file}")
    try:
        config = read_config(RunConfig, run / "config.yaml")
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"weights: {path} is a checkpoint of another version: {run / 'config.yaml'}: {error}"
        ) from None
    if average and config.ema.decay is None:
        raise ValueError(f"average: true is not allowed, {path} holds raw weights only; expected false or null")
    averaged = config.ema.decay is not None if average is None else average

    def start(network: nn.Module, models: Models) -> None:
        from synthos.train.checkpoint import read_tensors, stored_sizes  # not above: half a second of every dry run

        if problem := changed(config, run):
            raise ValueError(f"weights: {path}: {problem}")
        start_from(config, network, models)  # what the run did not train, it may have from there
        prefix = "ema." if averaged else "network."
        sizes = stored_sizes(path, prefix)
        _check_names(path, set(sizes), _trained(network), _trained(network))
        for name, size in sizes.items():
            if size != (expected := network.get_parameter(name).shape):
                raise ValueError(f"weights: {path}: {name} has shape {tuple(size)}, the model needs {tuple(expected)}")
        found = cache(partial(read_tensors, path, prefix))  # all at once, when the first is wanted
        models.extend(network, {name: lambda name=name: found()[name] for name in sizes})  # type: ignore[misc]

    size = (config.data.height, config.data.width)
    return Source(
        path=path,
        recipe=config.recipe,
        model=config.model,
        size=size,
        cache_dir=Path(config.cache_dir),
        averaged=averaged,
        start=start,
        null=lambda: load_encoded(encoded)[1],
    )
