"""The world of ranks: process group, mesh, sharding, and filling meta modules with their tensors."""

import functools
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from synthos.models.tensors import Tensors
from synthos.schema import RunConfig

Mode = Literal["replicate", "hybrid", "full"]
STATE_BYTES = 4 + 4 + 8  # fp32 weight, gradient, and AdamW's two moments, per trained parameter


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

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def open_world(config: RunConfig) -> World:
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
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    cpu_group = dist.new_group(backend="gloo") if cuda else None
    return World(dist.get_rank(), local_rank, dist.get_world_size(), device, dtype, cpu_group)


def choose_mesh(config: RunConfig, network: nn.Module, world: World) -> tuple[Mode, str]:
    """The mesh mode and the reason for it. `auto`: the least sharding whose state fits half of a rank's memory."""
    if config.mesh != "auto":
        return config.mesh, "asked for"
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in network.parameters() if not p.requires_grad)
    state = trained * (STATE_BYTES + (4 if config.ema.decay else 0)) + frozen
    least = torch.tensor(_memory(world.device, config.gpus_per_node), dtype=torch.float64)
    budget = world.reduce(least, dist.ReduceOp.MIN).item() / 2  # ranks with other memory must choose alike
    facts = (
        f"{state / 2**30:.2f} GiB of weights and states, {budget / 2**30:.1f} GiB of a rank's memory set aside for them"
    )
    if state <= budget:
        return "replicate", facts
    if config.nodes > 1 and config.gpus_per_node > 1 and state / config.gpus_per_node <= budget:
        return "hybrid", facts
    return "full", facts


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
    """Give a meta module its values without sharding; tied parameters stay tied. `dtype` None: as stored."""
    filled: dict[int, nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        value = tensors[name]().to(device, dtype)
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


def _memory(device: torch.device, ranks_per_node: int) -> float:
    """Bytes of memory that one rank may call its own."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks_per_node
