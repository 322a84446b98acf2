"""The memory model: sizes of the real model, counts against tensors, and the choice of a layout."""

import dataclasses

import pytest
import torch
from torch import nn

from synthos.build import measure
from synthos.schema import RunConfig
from synthos.train.memory import (
    Memory,
    Sizes,
    checkpoint_bytes,
    choose_layout,
    export_bytes,
    rank_memory,
    readable,
    repeated_blocks,
    share,
)
from tests.support import compose_for_test

REAL = ("recipe=i2i", "cluster=local", "nodes=4", "gpus_per_node=8", "batch={size: 256, micro: 8}")
GB = 10**9


def config(*overrides: str) -> RunConfig:
    return compose_for_test(*REAL, *overrides)


@pytest.fixture(scope="module")
def projector() -> Sizes:
    return measure(config("recipe.train=projector"))


@pytest.fixture(scope="module")
def full() -> Sizes:
    return measure(config("recipe.train=full"))


def test_the_real_model_has_the_sizes_of_its_release(projector: Sizes, full: Sizes) -> None:
    last_block_of_clip = 630_766_080 - 611_088_640
    assert last_block_of_clip == 4 * 1280 * 1281 + 2 * 1280 * 5120 + 5120 + 1280 + 4 * 1280
    assert projector.trainable == 3_612_928
    assert projector.parts == {"network": 1_418_996_800 + 3_612_928, "text": 5_680_910_336, "image": 611_088_640,
                               "vae": 126_892_531}  # fmt: skip
    assert full.trainable == full.parts["network"] == projector.parts["network"]
    assert full.total == projector.total == sum(projector.parts.values())
    assert {name: len(shapes) for name, shapes in projector.groups.items()} == {"projector": 8}


def test_the_real_model_in_bytes(full: Sizes, projector: Sizes) -> None:
    """By hand: 4 bytes a master, its gradient and each moment, 2 bytes of what is frozen, 4 of the autoencoder."""
    n, encoders, vae = 1_422_609_728, 2 * (5_680_910_336 + 611_088_640), 4 * 126_892_531
    steps = 4 * len(full.trained)
    assert rank_memory(config("recipe.train=full"), full, "replicate", "replicate") == Memory(
        weights=4 * n,
        gradients=4 * n,
        optimizer=8 * n + steps,
        average=0,
        encoders=encoders,
        frozen=vae,
        gathered=2 * n,
    )
    assert rank_memory(config("ema.decay=0.9"), projector, "replicate", "replicate") == Memory(
        weights=2 * (n - 3_612_928) + 4 * 3_612_928,
        gradients=4 * 3_612_928,
        optimizer=8 * 3_612_928 + 4 * 8,
        average=4 * 3_612_928,
        encoders=encoders,
        frozen=vae,
        gathered=2 * n,
    )
    assert checkpoint_bytes(config("ema.decay=0.9"), full) == 16 * n + steps
    assert checkpoint_bytes(config(), full) == 12 * n + steps
    assert export_bytes(full) == 4 * n and export_bytes(projector) == 4 * 3_612_928


def test_accumulated_gradients_are_whole_on_every_rank(full: Sizes) -> None:
    once = rank_memory(config("batch={size: 256, micro: 8}"), full, "full", "replicate")
    twice = rank_memory(config("batch={size: 512, micro: 8}"), full, "full", "replicate")
    assert twice.gathered - once.gathered == 4 * full.trainable
    assert dataclasses.replace(twice, gathered=once.gathered) == once


def test_sharding_gathers_a_layer_at_a_time(projector: Sizes) -> None:
    replicated = rank_memory(config(), projector, "full", "replicate")
    sharded = rank_memory(config(), projector, "full", "full")
    embedding, layer = 256_384 * 4096, (5_680_910_336 - 256_384 * 4096 - 4096) // 24
    assert sharded.gathered == 2 * 2 * (embedding + 4096 + layer)  # of umT5, its last norm outside of the layers
    assert replicated.gathered < 2 * 1_422_609_728 / 4
    assert sharded.encoders == pytest.approx(replicated.encoders / 32, rel=1e-3)


@pytest.mark.parametrize("ways", [1, 2, 3, 4, 8])
def test_a_share_is_the_largest_chunk(ways: int) -> None:
    for shape in [(8, 3), (7, 2), (1, 6, 4), (5,), (3, 1)]:
        chunks = torch.empty(shape).chunk(ways)
        assert share([torch.Size(shape)], ways) == chunks[0].numel() == max(chunk.numel() for chunk in chunks)


def test_less_memory_is_more_sharding(full: Sizes) -> None:
    """The network first, within a node if that is enough, then the encoders; half of the memory stays free."""
    layouts = [choose_layout(config("recipe.train=full"), full, gb * GB) for gb in (141, 80, 72, 71, 40, 30, 20, 2, 0)]
    assert [(layout.mesh, layout.encoders) for layout in layouts] == [
        ("replicate", "replicate"),
        ("replicate", "replicate"),
        ("replicate", "replicate"),
        ("hybrid", "replicate"),
        ("hybrid", "replicate"),
        ("full", "replicate"),
        ("hybrid", "full"),
        ("full", "full"),
        ("full", "full"),
    ]
    assert layouts[0].reason == "35.85 GB of weights and states fit into 70.50 GB, 50% of a rank's memory"
    assert " do not fit into 1.00 GB" in layouts[-2].reason
    for layout in layouts:
        assert layout.memory == rank_memory(config("recipe.train=full"), full, layout.mesh, layout.encoders)


def test_what_was_asked_for_is_done(full: Sizes) -> None:
    asked = choose_layout(config("mesh=full", "encoders=full"), full, 1000 * GB)
    assert (asked.mesh, asked.encoders) == ("full", "full") and asked.reason.endswith("; both asked for")
    for memory in (0, 40 * GB, 1000 * GB):
        assert choose_layout(config("mesh=replicate"), full, memory).mesh == "replicate"
        assert choose_layout(config("encoders=replicate"), full, memory).encoders == "replicate"
    partly = choose_layout(config("mesh=replicate"), full, 40 * GB)
    assert partly.encoders == "full" and "asked for" not in partly.reason


def test_the_average_counts(full: Sizes) -> None:
    least = 2.0 * rank_memory(config("ema.decay=null"), full, "replicate", "replicate").held
    assert choose_layout(config("ema.decay=null"), full, least).mesh == "replicate"
    assert choose_layout(config("ema.decay=0.9"), full, least).mesh == "hybrid"
    assert choose_layout(config("ema.decay=null"), full, least - 2).mesh == "hybrid"


def test_hybrid_takes_several_nodes_of_several_ranks_and_one_rank_shares_with_nobody(full: Sizes) -> None:
    one_node = choose_layout(config("nodes=1"), full, 40 * GB)
    single_ranks = choose_layout(config("gpus_per_node=1"), full, 40 * GB)
    alone = choose_layout(config("nodes=1", "gpus_per_node=1"), full, 1 * GB)
    assert one_node.mesh == single_ranks.mesh == "full"
    assert (alone.mesh, alone.encoders) == ("replicate", "replicate") and "do not fit" in alone.reason


def test_bytes_are_readable() -> None:
    sizes = (0, 1_234_567, 9_999_000, 10_000_000, 141e9)
    assert [readable(size) for size in sizes] == ["0.00 MB", "1.23 MB", "10.00 MB", "0.01 GB", "141.00 GB"]


def test_blocks_are_what_the_outermost_lists_hold() -> None:
    def layer() -> nn.Module:
        return nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(1, 1)])})

    layers = [layer(), layer()]
    model = nn.ModuleDict({"embed": nn.Linear(1, 1), "body": nn.ModuleDict({"layers": nn.ModuleList(layers)})})
    assert repeated_blocks(model) == layers
    assert repeated_blocks(nn.Linear(1, 1)) == []
