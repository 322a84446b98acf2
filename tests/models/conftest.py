from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from synthos.models.parts import Models
from synthos.schema import ModelConfig, PartConfig


def fill(models: Models, module: nn.Module) -> Any:
    """Give a built module its values, tied parameters kept tied; the trainer's own filler also shards."""
    tensors = models.tensors(module)
    values = {id(p): nn.Parameter(tensors[name](), requires_grad=False) for name, p in module.named_parameters()}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            setattr(owner, name, values[id(parameter)])
    return module


Build = Callable[[Models], Any]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The tiny model, its parts written once for all tests."""
    return Models(ModelConfig("tiny"), tmp_path_factory.mktemp("cache"))


@pytest.fixture
def open_part(tmp_path: Path) -> Callable[..., Any]:
    """Build and fill one part from a folder in the hub's layout."""

    def open_(build: Build, part: str, folder: Path, **spec: Any) -> Any:
        models = Models(ModelConfig("local", {part: PartConfig(str(folder), **spec)}), tmp_path / "cache")
        return fill(models, build(models))

    return open_
