"""`init_from`: the weights that a run's network starts from, besides those of its base model.

Either a run's exported weights, of which every tensor is taken: the next phase of one training. Or weights of another
origin, of which the network takes what it knows by name.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from synthos.models.content import digest
from synthos.models.exported import Export, find_export
from synthos.models.parts import Models, content, gate, hub_folder
from synthos.models.tensors import absent_shards, stored_shapes, take_tensors, tensor_files
from synthos.schema import ModelConfig, PartConfig, RunConfig

log = logging.getLogger(__name__)
RECORD = Path("provenance") / "init_from.json"  # of a run folder


def find(init_from: str) -> Path | None:
    """The file or folder on this machine that `init_from` names, by path or hub id; None if there is none."""
    path = Path(init_from)
    return path if path.exists() else hub_folder(init_from)


def pinned(init_from: str | None) -> str | None:
    """The same weights, a hub id replaced by its snapshot on this machine: a later download is another one."""
    path = find(init_from) if init_from else None
    return str(path) if path else init_from


def missing(config: RunConfig) -> list[str]:
    """A line if what `init_from` names is not on this machine; ValueError if it is there and of no use to this run."""
    if config.init_from is None:
        return []
    path = find(config.init_from)
    if path is None:
        return [_absent(config.init_from)]
    export = _export(path, config)
    if export:
        _check_base(export, config.model)
        return []
    try:
        if absent := absent_shards(path):
            return [f"init_from: {path} lacks {', '.join(absent)}"]
        tensor_files(path)
    except ValueError as error:
        raise ValueError(
            f"init_from: {error}; expected a folder like weights/step_00002000 of a run, or weights in safetensors"
        ) from None
    return []


def start_from(config: RunConfig, network: nn.Module, models: Models) -> None:
    """Let a built network start from `init_from`, as far as that goes; only headers of files are read here.

    Raises ValueError, under the key `init_from`, for weights that do not fit, and for a network that has nothing to
    start from without any.
    """
    if config.init_from is not None:
        if closed := models.added(network).closed:
            raise ValueError(f"init_from: {config.init_from} would be ignored: {closed}")
        _take(_found(config.init_from), config, network, models)
    models.check_start(network)


def hold(config: RunConfig, folder: Path, write: bool) -> None:
    """Hold a run to the weights that its first attempt started from: `write` notes them in its `folder`, once.

    Later attempts read again what no checkpoint has. Raises RuntimeError where it is something else by now.
    """
    if problem := changed(config, folder):
        raise RuntimeError(problem)
    record = folder / RECORD
    if config.init_from is None or record.is_file() or not write:
        return
    path = _found(config.init_from)
    record.parent.mkdir(exist_ok=True)
    part = record.with_suffix(".part")
    part.write_text(json.dumps({"path": str(path), "content": digest(path)}, indent=1))
    part.replace(record)


def changed(config: RunConfig, folder: Path) -> str | None:
    """What is wrong where `init_from` does not hold what the run in `folder` started from."""
    record = folder / RECORD
    if config.init_from is None or not record.is_file():
        return None
    path, then = _found(config.init_from), json.loads(record.read_text())
    if (now := digest(path)) == then["content"]:
        return None
    return (
        f"init_from: {path} has content {now:.12}, the run started from {then['path']} with content "
        f"{then['content']:.12}; expected the same, or a new run"
    )


def _found(init_from: str) -> Path:
    path = find(init_from)
    if path is None:
        raise ValueError(_absent(init_from))
    return path


def _absent(init_from: str) -> str:
    return (
        f"init_from: {init_from!r} is no local file or folder and not in the hub cache; "
        f"run `hf download {init_from}` if it is a hub id{gate()}"
    )


def _take(path: Path, config: RunConfig, network: nn.Module, models: Models) -> None:
    export = _export(path, config)
    try:
        where = tensor_files(export.file if export else path)
    except ValueError as error:
        raise ValueError(f"init_from: {error}") from None
    try:
        keys = _own(network, where, export.about.complete) if export else _adopted(network, models, where)
    except ValueError as error:
        raise ValueError(f"init_from: {path} {error}{_differences(export, config) if export else ''}") from None
    try:
        models.extend(network, take_tensors(network, where, keys))
    except ValueError as error:
        raise ValueError(f"init_from: {error}") from None
    log.info("init_from %s: took %d of its %d tensors: %s", path, len(keys), len(where), _summary(keys))


def _export(path: Path, config: RunConfig) -> Export | None:
    """What a run of the same recipe exported; None for weights of another origin."""
    export = find_export(path, "init_from")
    if export and (name := export.about.recipe["name"]) != config.recipe["name"]:
        raise ValueError(
            f"init_from: {path} was trained by recipe {name}, this run is of recipe "
            f"{config.recipe['name']}; expected weights of the same"
        )
    return export


def _check_base(export: Export, ours: ModelConfig) -> None:
    """Both must be made of the same parts: the same files where both are known, else the same paths."""
    theirs = export.about.model
    pairs: dict[str, tuple[Any, Any]] = {"name": (theirs.name, ours.name)}
    for part in sorted({*theirs.parts, *ours.parts}):
        there, here = theirs.parts.get(part), ours.parts.get(part)
        known = export.about.content.get(part)
        if known and here and not _same_commit(there, here) and (found := content(part, here)):
            pairs[f"parts.{part}'s content"] = (known[:12], found[:12])
        else:
            pairs |= _names(f"parts.{part}", there, here)
    for key, (was, is_now) in pairs.items():
        if was != is_now:
            raise ValueError(
                f"init_from: {export.folder} was trained with model.{key} {was}, this run has {is_now}; "
                "expected weights on the same base model"
            )


def _same_commit(there: PartConfig | None, here: PartConfig) -> bool:
    """Of a hub model: then its files are the same, however many of them were downloaded."""
    pair = [spec and (spec.path, spec.subfolder, spec.revision) for spec in (there, here)]
    return here.revision is not None and pair[0] == pair[1]


def _names(key: str, there: PartConfig | None, here: PartConfig | None) -> dict[str, tuple[Any, Any]]:
    """What two parts are called. A revision counts where both have one: a dry run may not know its own."""
    pairs = {f"{key}.{n}": (getattr(there, n, None), getattr(here, n, None)) for n in ("path", "subfolder", "revision")}
    if None in pairs[f"{key}.revision"]:
        del pairs[f"{key}.revision"]
    return pairs


def _own(network: nn.Module, where: dict[str, Path], complete: bool) -> dict[str, str]:
    """Every stored tensor under its own name. A whole network must be whole here too."""
    names = {name for name, _ in network.named_parameters()}
    if foreign := sorted(where.keys() - names):
        raise ValueError(f"holds {len(foreign)} tensors that this run's network has not, first {foreign[0]!r}")
    if complete and (absent := sorted(names - where.keys())):
        raise ValueError(f"is a whole network and lacks {len(absent)} tensors of this run's, first {absent[0]!r}")
    return {name: name for name in where}


def _adopted(network: nn.Module, models: Models, where: Mapping[str, Path]) -> dict[str, str]:
    adopt = models.added(network).adopt
    if adopt is None:
        raise ValueError(f"is no export of a run, and {type(network).__name__} takes no other weights")
    return adopt(stored_shapes(where))


def _differences(export: Export, config: RunConfig) -> str:
    """Which values of the recipe differ from those of the run that exported it: the likely reason of a misfit."""
    pairs = {key: (export.about.recipe.get(key), ours) for key, ours in config.recipe.items()}
    differ = [f"{key} {there} there, {here} here" for key, (there, here) in pairs.items() if there != here]
    return f"; its recipe differs: {', '.join(differ)}" if differ else ""


def _summary(names: Any) -> str:
    """Names with the numbers of blocks left out, each with how often it occurs."""
    counts = Counter(re.sub(r"^(\w+)\.\d+\.", r"\1.*.", name) for name in names)
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in counts.items())
