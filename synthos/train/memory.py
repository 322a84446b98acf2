"""What a rank must hold: bytes by component, from shapes alone, and the least sharding that makes them fit.

Weights and states at rest are counted to the byte, and what FSDP gathers in a step beside them; activations are not.
"""

import dataclasses
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from synthos.recipes.base import Recipe
from synthos.schema import RunConfig

Mode = Literal["replicate", "hybrid", "full"]
Shapes = list[torch.Size]
MASTER = 4  # bytes of a float32: trained weights, their gradients, each of AdamW's two moments, the average
SHARE = 0.5  # of a rank's memory for what it holds; the rest is left to activations and gathered weights


@dataclass(frozen=True)
class Sizes:
    """The parameters of a recipe by their shapes; the same before and after sharding.

    Attributes:
        groups: trained parameters, by the recipe's parameter group.
        base: the network's frozen parameters.
        added: those of `base` that are exported all the same, because the base model's files don't give them.
        units: parameters of each FSDP unit of the network; those outside of any come last.
        encoders, frozen: parameters of each frozen part, by its name in the recipe.
        encoder_units: as `units`, of each encoder.
    """

    groups: dict[str, Shapes]
    base: Shapes
    added: Shapes
    units: list[int]
    encoders: dict[str, Shapes]
    frozen: dict[str, Shapes]
    encoder_units: dict[str, list[int]]

    @property
    def trained(self) -> Shapes:
        return [shape for shapes in self.groups.values() for shape in shapes]

    @property
    def trainable(self) -> int:
        """Number of trained parameters."""
        return count(self.trained)

    @property
    def parts(self) -> dict[str, int]:
        """Number of parameters of each part: the network, the encoders, what else is frozen."""
        frozen = {name: count(shapes) for name, shapes in (self.encoders | self.frozen).items()}
        return {"network": self.trainable + count(self.base), **frozen}

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank, by component; of the fullest rank where a tensor does not divide evenly."""

    weights: int  # of the network: float32 masters of what trains, the rest in the computation's dtype
    gradients: int
    optimizer: int
    average: int
    encoders: int
    frozen: int
    gathered: int  # comes and goes in a step: whole weights of what is being computed, gradients being accumulated

    @property
    def held(self) -> int:
        """What stays from step to step."""
        return self.total - self.gathered

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Layout:
    """How the network and the encoders are laid out over the ranks.

    Attributes:
        mesh: of the network.
        encoders: replicate, or full: sharded over all ranks, and gathered block by block in every encoding.
        memory: of a rank, laid out so.
        reason: for people.
    """

    mesh: Mode
    encoders: Mode
    memory: Memory
    reason: str


def sizes_of(recipe: Recipe, added: Collection[str] = ()) -> Sizes:
    """The sizes of a built recipe, whose network has the parameters `added` besides the base model's."""
    base = {name: p.shape for name, p in recipe.network.named_parameters() if not p.requires_grad}
    return Sizes(
        groups={name: [p.shape for p in group] for name, group in recipe.param_groups().items()},
        base=[*base.values()],
        added=[shape for name, shape in base.items() if name in added],
        units=_units(recipe.network, recipe.fsdp_units()),
        encoders={name: _shapes(module) for name, module in recipe.encoders.items()},
        frozen={name: _shapes(module) for name, module in recipe.frozen.items()},
        encoder_units={name: _units(module, repeated_blocks(module)) for name, module in recipe.encoders.items()},
    )


def choose_layout(config: RunConfig, sizes: Sizes, memory: float) -> Layout:
    """The least sharding by which a rank holds its weights and states in half of its `memory` (bytes).

    The network is sharded before the encoders. What `mesh` and `encoders` ask for is done; where nothing fits, the
    most sharding.
    """
    networks: list[Mode] = [config.mesh] if config.mesh != "auto" else _network_modes(config)
    encoders: list[Mode] = [config.encoders] if config.encoders != "auto" else _encoder_modes(config)
    options = [(mesh, mode, rank_memory(config, sizes, mesh, mode)) for mode in encoders for mesh in networks]
    budget = SHARE * memory
    mesh, mode, found = next((option for option in options if option[2].held <= budget), options[-1])
    fits = "fit" if found.held <= budget else "do not fit"
    needs, offers = readable(found.held), readable(budget)
    reason = f"{needs} of weights and states {fits} into {offers}, {SHARE:.0%} of a rank's memory"
    asked = "auto" not in (config.mesh, config.encoders)
    return Layout(mesh, mode, found, f"{reason}; both asked for" if asked else reason)


def rank_memory(config: RunConfig, sizes: Sizes, mesh: Mode, encoders: Mode) -> Memory:
    """What a rank holds if the network is laid out as `mesh` and the encoders as `encoders`."""
    low = _low(config)
    ways = {"replicate": 1, "hybrid": config.gpus_per_node, "full": config.ranks}
    trained, base = share(sizes.trained, ways[mesh]), share(sizes.base, ways[mesh])
    encoded = sum(share(shapes, ways[encoders]) for shapes in sizes.encoders.values())
    return Memory(
        weights=MASTER * trained + low * base,
        gradients=MASTER * trained,
        optimizer=2 * MASTER * trained + MASTER * len(sizes.trained),  # and a step count for each tensor
        average=MASTER * trained if config.ema.decay else 0,
        encoders=low * encoded,
        frozen=4 * sum(map(count, sizes.frozen.values())),
        gathered=low * _gathered(config, sizes, mesh, encoders)
        + (MASTER * sizes.trainable if config.accumulation > 1 else 0),  # whole until the last micro-batch reduces them
    )


def checkpoint_bytes(config: RunConfig, sizes: Sizes) -> int:
    """Of one checkpoint: trained weights, moments and step counts, and the average; all ranks' files together."""
    copies = 3 + bool(config.ema.decay)
    return MASTER * (copies * sizes.trainable + len(sizes.trained))


def staged_bytes(config: RunConfig, sizes: Sizes, mesh: Mode) -> int:
    """Of host memory on each rank: the copy of its shards that a checkpoint is written from, kept for the next one.

    On a GPU it is page-locked. It stands beside what `rank_memory` counts, also where that is host memory.
    """
    ways = {"replicate": 1, "hybrid": config.gpus_per_node, "full": config.ranks}[mesh]
    return MASTER * ((3 + bool(config.ema.decay)) * share(sizes.trained, ways) + len(sizes.trained))


def export_bytes(sizes: Sizes) -> int:
    """Of one export: what was trained, and what was added to the base model as its source has it: float32 at most."""
    return MASTER * (sizes.trainable + count(sizes.added))


def count(shapes: Shapes) -> int:
    """Number of elements."""
    return sum(map(math.prod, shapes))


def share(shapes: Shapes, ways: int) -> int:
    """Elements that a rank stores of tensors sharded `ways` ways by their first dimension, the last shard padded."""
    return sum(math.ceil(shape[0] / ways) * math.prod(shape[1:]) for shape in shapes)


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The layers of a model: what its outermost lists of modules hold."""
    found: list[nn.Module] = []
    for child in module.children():
        found += child if isinstance(child, nn.ModuleList) else repeated_blocks(child)
    return found


def readable(size: float) -> str:
    """Bytes for people: GB are 10^9, MB 10^6."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def _low(config: RunConfig) -> int:
    """Bytes of a number in the computation's dtype."""
    return 2 if config.precision == "bf16" else 4


def _network_modes(config: RunConfig) -> list[Mode]:
    if config.ranks == 1:
        return ["replicate"]
    return ["replicate", "hybrid", "full"] if config.nodes > 1 and config.gpus_per_node > 1 else ["replicate", "full"]


def _encoder_modes(config: RunConfig) -> list[Mode]:
    return ["replicate", "full"] if config.ranks > 1 else ["replicate"]


def _gathered(config: RunConfig, sizes: Sizes, mesh: Mode, encoders: Mode) -> int:
    """Elements gathered at a time, by the network or by an encoder: the two run one after the other.

    Without resharding after the forward pass the whole network is; else what stands outside of the units and a unit,
    each as it arrives and copied out.
    """
    whole = mesh != "full" or config.ranks == 1
    network = sum(sizes.units) if whole else _in_turn(sizes.units)
    return max([network, *(_in_turn(units) for units in sizes.encoder_units.values() if encoders == "full")])


def _in_turn(units: list[int]) -> int:
    return 2 * (units[-1] + max(units[:-1], default=0))


def _shapes(module: nn.Module) -> Shapes:
    return [p.shape for p in module.parameters()]


def _units(module: nn.Module, units: list[nn.Module]) -> list[int]:
    """Elements of each unit without those of earlier, inner ones, and last of what none of them holds."""
    owned: set[nn.Parameter] = set()
    sizes = []
    for unit in [*units, module]:
        own = set(unit.parameters()) - owned
        sizes.append(sum(p.numel() for p in own))
        owned |= own
    return sizes


def rank_bytes(config: RunConfig, device: torch.device) -> float:
    """Bytes of memory that one rank may call its own: `cluster.gpu_memory_gb` if set, else what the device has."""
    if config.cluster.gpu_memory_gb is not None:
        return 1e9 * config.cluster.gpu_memory_gb
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / config.gpus_per_node
