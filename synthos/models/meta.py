"""Modules of diffusers and transformers, built from their configs with parameters on the meta device."""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


@contextmanager
def meta_parameters() -> Iterator[None]:
    """`torch.empty` gives meta tensors inside: weights cost nothing, while computed buffers (RoPE tables) are real."""
    with _EmptyOnMeta():
        yield


def to_meta(module: nn.Module) -> None:
    """Move what parameters a class made without `torch.empty` (gains, tables) to the meta device; ties are kept."""
    moved: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in moved:
                moved[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            setattr(owner, name, moved[id(parameter)])


def find_class(name: str) -> Any:
    """A module class by the name that its config carries: ours, diffusers' or transformers'."""
    for package in ("synthos.models.patch", "diffusers", "transformers"):
        found = getattr(importlib.import_module(package), name, None)
        if found is not None:
            return found
    raise ValueError(f"config.json names the class {name!r}, which neither diffusers nor transformers has")


def construct(name: str, config: Mapping[str, Any], folder: Path | None = None) -> nn.Module:
    """A module of the class `name`, from its config as a mapping or, for a transformers class, from its folder."""
    cls = find_class(name)
    if hasattr(cls, "from_config"):
        return cls.from_config(dict(config))  # type: ignore[no-any-return]
    settings = cls.config_class.from_pretrained(folder) if folder else cls.config_class.from_dict(dict(config))
    return cls(settings)  # type: ignore[no-any-return]


class _EmptyOnMeta(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
