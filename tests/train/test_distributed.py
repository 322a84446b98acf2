"""The choice of a mesh, and filling modules."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from synthos.train import distributed
from synthos.train.distributed import World, choose_mesh, fill_whole
from tests.support import run_config, world_of_one

STATE = 10_000 * (4 + 4 + 8)  # bytes of fp32 weight, gradient and AdamW's moments of the network below


@pytest.fixture
def world() -> Iterator[World]:
    yield from world_of_one()


@pytest.mark.parametrize(("memory", "mode"), [(2 * STATE, "replicate"), (2 * STATE - 1, "full")])
def test_mesh_is_chosen_by_what_fits_half_of_the_memory(
    world: World, monkeypatch: pytest.MonkeyPatch, memory: int, mode: str
) -> None:
    monkeypatch.setattr(distributed, "_memory", lambda device, ranks: float(memory))
    network = nn.Linear(100, 100, bias=False)
    assert choose_mesh(run_config("ema.decay=null", "mesh=auto"), network, world)[0] == mode


def test_average_and_frozen_parts_count(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_memory", lambda device, ranks: 2.0 * STATE)
    network = nn.Linear(100, 100, bias=False)
    assert choose_mesh(run_config("ema.decay=0.9", "mesh=auto"), network, world)[0] == "full"
    frozen = nn.Sequential(network, nn.Linear(1, 1).requires_grad_(False))
    assert choose_mesh(run_config("ema.decay=null", "mesh=auto"), frozen, world)[0] == "full"


def test_mesh_may_be_asked_for(world: World) -> None:
    assert choose_mesh(run_config("mesh=full"), nn.Linear(1, 1), world) == ("full", "asked for")


def test_filling_keeps_ties_and_refuses_another_shape() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False, device="meta"), "b": nn.Linear(2, 2, bias=False)})
    module["b"].weight = module["a"].weight
    fill_whole(module, {"a.weight": lambda: torch.eye(2)}, torch.device("cpu"))
    assert module["a"].weight is module["b"].weight and torch.equal(module["b"].weight, torch.eye(2))
    with pytest.raises(ValueError, match=r"a.weight has shape \(3, 2\), the model needs \(2, 2\)"):
        fill_whole(module, {"a.weight": lambda: torch.ones(3, 2)}, torch.device("cpu"))
