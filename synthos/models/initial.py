"""`init_from`: the weights that a run's network starts from, besides those of its base model.

Either a run's exported weights, of which every tensor is taken: the next phase of one training. Or weights of another
origin, of which the network takes what it knows by name.
"""

import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from synthos.models.exported import ABOUT_FILE, network_file, read_about
from synthos.models.parts import Models, hub_folder
from synthos.models.tensors import take_tensors, tensor_files
from synthos.schema import RunConfig
from synthos.strict import dump

log = logging.getLogger(__name__)


def find(init_from: str) -> Path | None:
    """The file or folder on this machine that `init_from` names, by path or hub id; None if there is none."""
    path = Path(init_from)
    return path if path.exists() else hub_folder(init_from)


def missing(config: RunConfig) -> list[str]:
    """A line if what `init_from` names is not on this machine; ValueError if it is there and of no use to this run."""
    if config.init_from is None:
        return []
    path = find(config.init_from)
    if path is None:
        return [_absent(config.init_from)]
    _files(path, config)
    return []


def start_from(config: RunConfig, network: nn.Module, models: Models) -> None:
    """Let a built network start from `init_from`, as far as that goes; only headers of files are read here.

    Raises ValueError, under the key `init_from`, for weights that do not fit, and for a network that has nothing to
    start from without any.
    """
    if config.init_from is not None:
        path = find(config.init_from)
        if path is None:
            raise ValueError(_absent(config.init_from))
        _take(path, config, network, models)
    models.check_start(network)


def _absent(init_from: str) -> str:
    return (
        f"init_from: {init_from!r} is no local file or folder and not in the hub cache; "
        f"run `hf download {init_from}` if it is a hub id"
    )


def _take(path: Path, config: RunConfig, network: nn.Module, models: Models) -> None:
    where, complete = _files(path, config)
    try:
        keys = _adopted(network, models, where) if complete is None else _own(network, where, complete)
    except ValueError as error:
        raise ValueError(f"init_from: {path} {error}{_differences(path, config)}") from None
    try:
        models.extend(network, take_tensors(network, where, keys))
    except ValueError as error:
        raise ValueError(f"init_from: {error}") from None
    log.info("init_from %s: took %d of its %d tensors: %s", path, len(keys), len(where), _summary(keys))


def _files(path: Path, config: RunConfig) -> tuple[dict[str, Path], bool | None]:
    """The tensors in `path`, each with its file, and whether a run exported its whole network; None: no run did."""
    if not (path / ABOUT_FILE).is_file():
        try:
            return tensor_files(path), None
        except ValueError as error:
            raise ValueError(
                f"init_from: {error}; expected a folder like weights/step_00002000 of a run, or weights in safetensors"
            ) from None
    about = read_about(path, "init_from")
    if about["recipe"]["name"] != config.recipe["name"]:
        raise ValueError(
            f"init_from: {path} was trained by recipe {about['recipe']['name']}, this run is of recipe "
            f"{config.recipe['name']}; expected weights of the same"
        )
    _check_base(path, about["model"], dump(config.model))
    return tensor_files(network_file(path, about)), bool(about["complete"])


def _check_base(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Both must be made of the same parts. A revision counts where both have one: a dry run may not know its own."""
    names = {"name": (theirs["name"], ours["name"])}
    for part in sorted({*theirs["parts"], *ours["parts"]}):
        pair = [model["parts"].get(part, {}) for model in (theirs, ours)]
        for key in ("path", "subfolder", "revision"):
            names[f"parts.{part}.{key}"] = (pair[0].get(key), pair[1].get(key))
    for key, (there, here) in names.items():
        if there != here and not (key.endswith("revision") and None in (there, here)):
            raise ValueError(
                f"init_from: {path} was trained with model.{key} {there}, this run has {here}; "
                "expected weights on the same base model"
            )


def _own(network: nn.Module, where: dict[str, Path], complete: bool) -> dict[str, str]:
    """Every stored tensor under its own name. A whole network must be whole here too."""
    names = {name for name, _ in network.named_parameters()}
    if foreign := sorted(where.keys() - names):
        raise ValueError(f"holds {len(foreign)} tensors that this run's network has not, first {foreign[0]!r}")
    if complete and (absent := sorted(names - where.keys())):
        raise ValueError(f"is a whole network and lacks {len(absent)} tensors of this run's, first {absent[0]!r}")
    return {name: name for name in where}


def _adopted(network: nn.Module, models: Models, where: dict[str, Path]) -> dict[str, str]:
    adopt = models.added(network).adopt
    if adopt is None:
        raise ValueError(f"is no export of a run, and {type(network).__name__} takes no other weights")
    return adopt(where)


def _differences(path: Path, config: RunConfig) -> str:
    """Which values of the recipe differ from those of the run that exported `path`: the likely reason of a misfit."""
    if not (path / ABOUT_FILE).is_file():
        return ""
    theirs = read_about(path, "init_from")["recipe"]
    pairs = {key: (theirs.get(key), ours) for key, ours in config.recipe.items()}
    differ = [f"{key} {there} there, {here} here" for key, (there, here) in pairs.items() if there != here]
    return f"; its recipe differs: {', '.join(differ)}" if differ else ""


def _summary(names: Any) -> str:
    """Names with the numbers of blocks left out, each with how often it occurs."""
    counts = Counter(re.sub(r"^(\w+)\.\d+\.", r"\1.*.", name) for name in names)
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in counts.items())
