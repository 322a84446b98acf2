"""What the ranks of a run agree on before they train."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from synthos.build import build_recipe, build_stream
from synthos.data.stream import Stream
from synthos.models.parts import Models
from synthos.schema import RunConfig
from synthos.train.distributed import World
from tests.data.make import data_set
from tests.support import compose_for_test


@dataclass
class Together(World):
    """Rank 1 of two in this process: what rank 0 would say is there already."""

    other: Any = None

    def collect(self, value: Any) -> list[Any]:
        return [self.other, value]


def test_ranks_that_see_other_samples_do_not_train(tmp_path: Path) -> None:
    """As where each node has a copy of the data of its own, and one of them is old."""
    copies = [data_set(tmp_path / str(number), 8 + number, 4) for number in range(2)]
    config: RunConfig = compose_for_test(
        "recipe=i2i", "model=tiny", "cluster=debug", "batch={size: 4, micro: 2}", "wandb.mode=off", "data.name=set",
        f"data.shards={copies[0]}", "data.holdout_fraction=0", "data.workers=0", "data.height=32", "data.width=32",
    )  # fmt: skip
    recipe = build_recipe(config.recipe, Models(config.model, tmp_path / "cache", seed=0))
    first = Stream(config.data, recipe.inputs, batch_size=4, rank=0, world=2, seed=config.seed).state_dict()
    world = Together(1, 1, 2, torch.device("cpu"), torch.float32, None, first)
    assert isinstance(build_stream(config, recipe, world), Stream)
    other = replace(config, data=replace(config.data, shards=str(copies[1])))
    with pytest.raises(RuntimeError, match="data: ranks 0 and 1 see other samples: .*'samples': 8.*'samples': 9"):
        build_stream(other, recipe, world)
