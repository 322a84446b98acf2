"""Where the tensors of a module come from: safetensors files in the hub's layout, or a seeded draw."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from synthos.keys import hash64, signed64

Tensors = dict[str, Callable[[], Tensor]]  # parameter name -> its whole value, read or made when called
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")


def match_tensors(module: nn.Module, folder: Path) -> Tensors:
    """Every parameter of `module` to its tensor in the folder's safetensors files.

    Files may hold more (a CLIP folder has both towers), may carry a prefix that the class lacks, or the other way
    round, and hold a tied parameter under any of its names. Raises ValueError naming what is absent or misshapen.
    """
    where = _tensor_files(folder)
    keys = _stored_keys(module, where)
    absent = [name for name, key in keys.items() if key not in where]
    if absent:
        raise ValueError(f"{folder}: the weights lack {len(absent)} of {len(keys)} tensors, first {absent[0]!r}")
    found: Tensors = {}
    for name, parameter in module.named_parameters():
        path, key = where[keys[name]], keys[name]
        with safe_open(path, "pt") as file:
            shape = tuple(file.get_slice(key).get_shape())
        if shape != tuple(parameter.shape):
            raise ValueError(f"{path}: {key} has shape {shape}, the model needs {tuple(parameter.shape)}")
        found[name] = lambda path=path, key=key: _read_tensor(path, key)  # type: ignore[misc]
    return found


def seeded(seed: int, name: str, make: Callable[[torch.Generator], Tensor]) -> Callable[[], Tensor]:
    """An initial value drawn from a generator keyed by the run's seed and the parameter's name: one for all ranks."""
    return lambda: make(torch.Generator().manual_seed(signed64(hash64("init", seed, name))))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def _read_tensor(path: Path, key: str) -> Tensor:
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(key)
    return tensor


def _tensor_files(folder: Path) -> dict[str, Path]:
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return {key: folder / file for key, file in read_json(index)["weight_map"].items()}
        if (folder / name).is_file():
            with safe_open(folder / name, "pt") as file:
                return dict.fromkeys(file.keys(), folder / name)
    raise ValueError(f"{folder} lacks {' or '.join(WEIGHTS)}")


def _stored_keys(module: nn.Module, where: Mapping[str, Path]) -> dict[str, str]:
    """Each parameter's key in the files; a tied one may be stored under any of its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    rename = _prefix_rename(next(iter(names.values()))[0], where)
    return {n[0]: next((key for key in map(rename, n) if key in where), rename(n[0])) for n in names.values()}


def _prefix_rename(first: str, where: Mapping[str, Path]) -> Callable[[str], str]:
    """The one prefix to add to, or take from, every name so that the files know it, as found for the first name."""
    if first in where:
        return lambda name: name
    added = [key[: -len(first)] for key in where if key.endswith("." + first)]
    if added:
        return lambda name: added[0] + name
    taken = [first[: -len(key)] for key in where if first.endswith("." + key)]
    return (lambda name: name.removeprefix(taken[0])) if taken else (lambda name: name)
