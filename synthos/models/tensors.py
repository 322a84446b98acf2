"""Where the tensors of a module come from: safetensors files in the hub's layout, or a seeded draw."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from synthos.keys import hash64, signed64

Tensors = dict[str, Callable[[], Tensor]]  # parameter name -> its whole value, read or made when called
Shape = tuple[int, ...]
# What attention's layers are called now -> in old files of diffusers, as its loader knows them (SD1.5's autoencoder).
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
INDEX = ".index.json"  # ends the name of the list of a model's shards


def match_tensors(module: nn.Module, folder: Path) -> Tensors:
    """Every parameter of `module` to its tensor in the folder's safetensors files.

    Files may hold more (a CLIP folder has both towers), may carry a prefix that the class lacks, or the other way
    round, and hold a tied parameter under any of its names. Raises ValueError naming what is absent or misshapen.
    """
    where = tensor_files(folder)
    keys = _stored_keys(module, where)
    absent = [name for name, key in keys.items() if key not in where]
    if absent:
        raise ValueError(f"{folder}: the weights lack {len(absent)} of {len(keys)} tensors, first {absent[0]!r}")
    return take_tensors(module, where, keys)


def take_tensors(module: nn.Module, where: Mapping[str, Path], keys: Mapping[str, str]) -> Tensors:
    """Parameters of `module` to tensors in files, by `keys`: parameter name -> stored name.

    Only headers are read here. Raises ValueError for a tensor of another shape, naming both.
    """
    found: Tensors = {}
    shapes = stored_shapes({key: where[key] for key in keys.values()})
    for name, key in keys.items():
        expected = tuple(module.get_parameter(name).shape)
        if shapes[key] != expected:
            raise ValueError(f"{where[key]}: {key} has shape {shapes[key]}, the model needs {expected}")
        found[name] = partial(_read_tensor, where[key], key)
    return found


def stored_shapes(where: Mapping[str, Path]) -> dict[str, Shape]:
    """The shapes of tensors in files, by their names; ValueError for a file that is not whole, or lacks one."""
    shapes: dict[str, Shape] = {}
    for path in set(where.values()):
        with _opened(path) as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key, there in where.items() if there == path}
    return shapes


def tensor_files(path: Path) -> dict[str, Path]:
    """The names of all tensors of a safetensors file, or of a folder in the hub's layout, each with its file.

    Raises ValueError where there are none, or the file is not whole.
    """
    file = weights_file(path)
    if file is None:
        raise ValueError(f"{path} lacks {' or '.join(WEIGHTS)}")
    if file.suffix != ".json":
        with _opened(file) as opened:
            return dict.fromkeys(opened.keys(), file)
    if absent := absent_shards(path):
        raise ValueError(f"{path} lacks {', '.join(absent)}")
    return {key: file.parent / shard for key, shard in _shards(file).items()}


def weights_file(path: Path) -> Path | None:
    """The safetensors file of a folder in the hub's layout, or the index of its shards; a file is itself."""
    if path.is_file():
        return path
    files = [path / f"{name}{end}" for name in WEIGHTS for end in ("", INDEX)]
    return next((file for file in files if file.is_file()), None)


def absent_shards(path: Path) -> list[str]:
    """The shards that an index lists and its folder has not: a download that did not end."""
    file = weights_file(path)
    if file is None or file.suffix != ".json":
        return []
    return [shard for shard in sorted({*_shards(file).values()}) if not (file.parent / shard).is_file()]


def seeded(seed: int, name: str, make: Callable[[torch.Generator], Tensor]) -> Callable[[], Tensor]:
    """An initial value drawn from a generator keyed by the run's seed and the parameter's name: one for all ranks."""
    return lambda: make(torch.Generator().manual_seed(signed64(hash64("init", seed, name))))


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions that any file gets; the library's own are for its owner alone."""
    save_file(dict(tensors), path, metadata)
    os.umask(mask := os.umask(0))
    path.chmod(0o666 & ~mask)


def read_json(path: Path) -> Any:
    """What a JSON file holds; ValueError for a file that is none."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def _shards(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index lists them."""
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files")
    return shards


def _read_tensor(path: Path, key: str) -> Tensor:
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(key)
    return tensor


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file: {error}") from None


def _stored_keys(module: nn.Module, where: Mapping[str, Path]) -> dict[str, str]:
    """Each parameter's key in the files; a tied one may be stored under any of its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    rename = _prefix_rename(next(iter(names.values()))[0], where)
    found = {n[0]: next((key for key in map(rename, n) if key in where), rename(n[0])) for n in names.values()}
    return {name: key if key in where else _old_name(key, where) for name, key in found.items()}


def _old_name(key: str, where: Mapping[str, Path]) -> str:
    """What an old file calls the tensor `key`, where it has it; else `key`."""
    olds = (key.replace(f".{new}.", f".{old}.") for new, old in OLD_NAMES.items())
    return next((old for old in olds if old in where), key)


def _prefix_rename(first: str, where: Mapping[str, Path]) -> Callable[[str], str]:
    """The one prefix to add to, or take from, every name so that the files know it, as found for the first name."""
    if first in where:
        return lambda name: name
    added = [key[: -len(first)] for key in where if key.endswith("." + first)]
    if added:
        return lambda name: added[0] + name
    taken = [first[: -len(key)] for key in where if first.endswith("." + key)]
    return (lambda name: name.removeprefix(taken[0])) if taken else (lambda name: name)
