"""What a run is made of and what it needs, as rows of the plan: parameters, memory of a rank, sizes on disk."""

import math

import torch

from synthos.schema import RunConfig
from synthos.train.memory import (
    SHARE,
    Layout,
    Memory,
    Sizes,
    checkpoint_bytes,
    choose_layout,
    count,
    export_bytes,
    rank_bytes,
    readable,
    staged_bytes,
)


def stated_rows(config: RunConfig) -> dict[str, str]:
    """What the model's config says of its parts, which takes no building."""
    parts = {name: part.parameters for name, part in config.model.parts.items() if part.parameters}
    listed = ", ".join(f"{name} {number:,}" for name, number in parts.items())
    return {"parameters": f"{listed}; dry_run=full counts what trains" if listed else "dry_run=full counts them"}


def counted_rows(config: RunConfig, sizes: Sizes) -> dict[str, str]:
    """Parameters, layout and memory of a rank, and what is written, of a model built without its weights."""
    memory = _known_memory(config)
    layout = choose_layout(config, sizes, math.inf if memory is None else memory)
    checkpoint, export = readable(checkpoint_bytes(config, sizes)), readable(export_bytes(sizes))
    return {
        "parameters": f"{sizes.trainable:,} trainable, {sizes.total:,} in all",
        "trained": _counts({name: count(shapes) for name, shapes in sizes.groups.items()}),
        "parts": _counts(sizes.parts),
        "layout": f"mesh {layout.mesh}, encoders {layout.encoders}: {_reason(layout, memory)}",
        "memory": _memory(layout.memory),
        "on disk": f"{checkpoint} a checkpoint, {export} of exported weights",
        "saving": f"{readable(staged_bytes(config, sizes, layout.mesh))} of host memory a rank for what is written",
    }


def _known_memory(config: RunConfig) -> float | None:
    """Bytes of a rank of this job; None where only the nodes know."""
    cluster = config.cluster
    if cluster.gpu_memory_gb is None and cluster.backend not in ("debug", "local"):
        return None
    cuda = cluster.device != "cpu" and torch.cuda.is_available()
    return rank_bytes(config, torch.device("cuda" if cuda else "cpu"))


def _reason(layout: Layout, memory: float | None) -> str:
    if memory is not None:
        return layout.reason
    needed = readable(layout.memory.held / SHARE)
    return f"fits where a rank has {needed}; cluster.gpu_memory_gb=<GB> plans for what yours have"


def _memory(memory: Memory) -> str:
    parts = ", ".join(f"{name} {readable(size)}" for name, size in vars(memory).items() if size)
    return f"{readable(memory.total)} a rank and activations: {parts}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items())
