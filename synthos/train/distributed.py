"""The world of ranks: process group, mesh, sharding, and filling meta modules with their tensors."""

import functools
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from synthos.models.tensors import Tensors
from synthos.recipes.base import Recipe
from synthos.schema import GenerateConfig, RunConfig
from synthos.train.memory import Layout, Mode, choose_layout, rank_bytes, repeated_blocks, sizes_of

MEETING_ELEMENTS = 2**17  # int64, a megabyte: more than a message that travels with its header
Mesh = DeviceMesh
T = TypeVar("T")


@dataclass
class World:
    """This rank among the others. Every rank is a data rank."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    dtype: torch.dtype  # of the computation
    cpu_group: dist.ProcessGroup | None  # None: the default group is on the CPU already

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """All-reduce a CPU tensor in place over every rank."""
        dist.all_reduce(values, op=op, group=self.cpu_group)
        return values

    def collect(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank."""
        found: list[T] = [value] * self.size
        dist.all_gather_object(found, value, group=self.cpu_group)
        return found

    def barrier(self) -> None:
        self.reduce(torch.zeros(1))

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block before any other rank does: for what it writes and the others read."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def meet(self) -> float:
        """The first collective, on the device and on the CPU, of sums that are known; returns its seconds.

        Raises RuntimeError for a sum that is wrong.
        """
        began, expected = time.monotonic(), self.size * (self.size + 1) // 2
        on_device = torch.full((MEETING_ELEMENTS,), self.rank + 1, device=self.device)
        dist.all_reduce(on_device)
        on_cpu = self.reduce(torch.tensor(self.rank + 1))
        wrong = {int(found) for found in (on_device.min(), on_device.max(), on_cpu)} - {expected}
        if wrong:
            raise RuntimeError(
                f"the first collective of {self.size} ranks sums up to {wrong.pop()} on rank {self.rank}, not to "
                f"{expected}: a GPU or the network computes wrongly"
            )
        return time.monotonic() - began

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def open_world(config: RunConfig | GenerateConfig) -> World:
    """Join the process group that torchrun describes, or a group of one when there is none (`cluster=debug`)."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = config.cluster.device == "cuda" or (config.cluster.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if config.cluster.threads:
        torch.set_num_threads(config.cluster.threads)
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    if dist.get_world_size() != config.ranks:
        raise RuntimeError(f"{dist.get_world_size()} ranks were started for a config of {config.ranks}")
    dtype = choose_dtype(config.dtype if isinstance(config, GenerateConfig) else config.precision, device)
    cpu_group = dist.new_group(backend="gloo") if cuda else None
    return World(dist.get_rank(), local_rank, dist.get_world_size(), device, dtype, cpu_group)


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of a computation: bf16 or fp32, or for None what suits the device, bf16 on a GPU, fp32 on the CPU."""
    kinds = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if name is not None and name not in kinds:
        raise ValueError(f"dtype: {name!r} is not allowed; expected one of {', '.join(kinds)}")
    return kinds[name or ("bf16" if device.type == "cuda" else "fp32")]


def layout_of(config: RunConfig, recipe: Recipe, world: World) -> Layout:
    """How the recipe's network and encoders are laid out: the same on every rank and at every call; collective."""
    least = torch.tensor(rank_bytes(config, world.device), dtype=torch.float64)
    memory = world.reduce(least, dist.ReduceOp.MIN).item()  # ranks with other memory must choose alike
    return choose_layout(config, sizes_of(recipe), memory)


def build_mesh(mode: Mode, config: RunConfig, device: torch.device) -> DeviceMesh:
    """replicate: (world, 1), hybrid: (nodes, gpus), full: (world,)."""
    if mode == "full":
        return init_device_mesh(device.type, (config.ranks,), mesh_dim_names=("shard",))
    shape = (config.ranks, 1) if mode == "replicate" else (config.nodes, config.gpus_per_node)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(network: nn.Module, units: list[nn.Module], mesh: DeviceMesh, world: World, recompute: bool) -> None:
    """FSDP2 on each unit and on the root; `recompute` keeps no activation inside a unit.

    Masters stay as they are (float32 where trained); gathered weights and gradients' reduction follow the policy.
    Inputs are not cast: times must reach the network in float32, and the recipe casts the rest.
    """
    low = world.dtype if world.dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    regather = mesh.ndim == 1 and mesh.size() > 1
    for unit in units:
        if recompute:
            unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False)
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=regather)
    fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=regather)


def shard_encoder(encoder: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2 on each layer and on the root of a frozen module: whole weights exist for one layer at a time.

    The module must then be called as a whole, and equally often on every rank.
    """
    for unit in [*repeated_blocks(encoder), encoder]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def set_dtypes(network: nn.Module, frozen: torch.dtype) -> None:
    """Float32 masters for what learns, `frozen` for the rest; on the meta device, before sharding."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen)


def fill_sharded(network: nn.Module, tensors: Tensors, device: torch.device) -> None:
    """Give a sharded meta module its values, one tensor at a time; every rank reads and keeps its own shard."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network.to_empty(device=device)
    for name, buffer in network.named_buffers():
        buffer.copy_(buffers[name])
    for name, parameter in network.named_parameters():
        sharded = cast(DTensor, parameter.data)
        whole = tensors[name]().to(device, sharded.dtype)
        piece = distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)
        sharded.to_local().copy_(piece.to_local())


def fill_whole(module: nn.Module, tensors: Tensors, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Give a meta module its values without sharding; tied parameters stay tied. `dtype` None: as stored.

    Each value is a copy, never a view of the file: there it stands at any offset, and the last bit of a product on the
    CPU depends on how its operands are aligned.
    """
    filled: dict[int, nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        value = tensors[name]().to(device, dtype, copy=True)
        if value.shape != parameter.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, the model needs {tuple(parameter.shape)}")
        filled[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            setattr(owner, name, filled[id(parameter)])
    _apply_to_buffers(module, lambda buffer: buffer.to(device))


def set_training(network: nn.Module, on: bool) -> None:
    """Train mode for modules that hold a trained parameter; a frozen module stays in eval for ever."""
    for module in network.modules():
        module.training = on and any(p.requires_grad for p in module.parameters())


def fsdp_modules(network: nn.Module) -> list[FSDPModule]:
    return [m for m in network.modules() if isinstance(m, FSDPModule)]


def reshard(network: nn.Module) -> None:
    """Drop gathered copies of weights, so that the next forward sees what was written to the shards."""
    for module in fsdp_modules(network):
        module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's storage of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole value of a tensor that may be sharded; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def peak_memory(device: torch.device) -> float:
    """Most bytes that this rank has held so far: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _apply_to_buffers(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, change(buffer))
