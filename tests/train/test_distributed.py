"""The memory of a rank, the layout that ranks agree on, and filling modules."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from synthos.build import build_recipe
from synthos.models.parts import Models
from synthos.recipes.base import Recipe
from synthos.train.distributed import World, fill_whole, layout_of
from synthos.train.memory import rank_bytes, rank_memory, sizes_of
from tests.support import run_config, world_of_one

CPU = torch.device("cpu")


@pytest.fixture
def world() -> Iterator[World]:
    yield from world_of_one()


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    config = run_config()
    return build_recipe(config.recipe, Models(config.model, tmp_path, meta_only=True))


def test_ranks_share_the_memory_of_a_node_unless_the_config_says_it() -> None:
    (line,) = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")]
    node = 1024 * int(line.split()[1])
    assert rank_bytes(run_config(), CPU) == pytest.approx(node, rel=0.01)
    assert rank_bytes(run_config("gpus_per_node=4"), CPU) == rank_bytes(run_config(), CPU) / 4
    assert rank_bytes(run_config("gpus_per_node=4", "cluster.gpu_memory_gb=80"), CPU) == 80e9


@pytest.mark.parametrize(("spare", "mesh"), [(0, "replicate"), (-1e-9, "full")])
def test_ranks_lay_out_what_they_hold_by_their_memory(world: World, recipe: Recipe, spare: float, mesh: str) -> None:
    config = run_config("gpus_per_node=2", "mesh=auto")
    held = rank_memory(config, sizes_of(recipe), "replicate", "replicate").held
    limited = run_config("gpus_per_node=2", "mesh=auto", f"cluster.gpu_memory_gb={2 * held / 1e9 + spare}")
    assert layout_of(limited, recipe, world).mesh == mesh
    assert layout_of(config, recipe, world).mesh == "replicate"  # in this machine's own


def test_the_first_collective_is_checked(world: World) -> None:
    assert world.meet() >= 0
    with pytest.raises(RuntimeError, match="the first collective of 1 ranks sums up to 2 on rank 1, not to 1"):
        replace(world, rank=1).meet()


def test_filling_keeps_ties_and_refuses_another_shape() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False, device="meta"), "b": nn.Linear(2, 2, bias=False)})
    module["b"].weight = module["a"].weight
    fill_whole(module, {"a.weight": lambda: torch.eye(2)}, CPU)
    assert module["a"].weight is module["b"].weight and torch.equal(module["b"].weight, torch.eye(2))
    with pytest.raises(ValueError, match=r"a.weight has shape \(3, 2\), the model needs \(2, 2\)"):
        fill_whole(module, {"a.weight": lambda: torch.ones(3, 2)}, CPU)
