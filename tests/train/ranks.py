"""One rank of a small run, started by torchrun: builds it by the real path, makes three steps, and tells what it holds.

torchrun ... -m tests.train.ranks FOLDER: for each line of FOLDER/runs.json, {name: overrides}, in turn.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from synthos.build import build_job
from synthos.schema import RunConfig
from synthos.train.distributed import World, fsdp_modules, local, open_world, whole
from synthos.train.loop import Job, update
from synthos.train.stop import Stop
from tests.support import compose_for_test

STEPS = 3


def run(folder: Path, config: RunConfig, world: World) -> None:
    """Three steps, a validation loss, a checkpoint and an export; leaves rank-N.json and, by rank 0, tensors."""
    world.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    folder.mkdir(exist_ok=True)
    with Stop(folder / "control" / "stop", world) as stop:
        job = build_job(config, folder, world, stop, 1)
        parts = kinds(job)
        held = watch(job, parts)
        job.report.start(0, STEPS, False)
        keep(folder / "start.safetensors", job)
        losses = [update(job)["train/loss"] for _ in range(STEPS)]
        keep(folder / "end.safetensors", job)
        grid = job.validator.loss_grid()
        assert grid is not None
        job.checkpoints.save(job.state, job.stream.state_dict())
        held["staged"] = size(job.checkpoints.copies.values())
        job.export(job.state)
        job.report.close({"status": "done", "cause": "finished"})
    told: dict[str, Any] = {"losses": losses, "validation": grid.tolist(), "held": held}
    told["dtypes"] = {name: sorted({str(p.dtype) for p in ps}) for name, ps in parts.items()}
    told["with_gradient"] = sorted(held.pop("with_gradient"))
    told["trained"] = sorted(job.state.trained)
    told["masters"] = sorted({str(p.dtype) for p in job.state.trained.values()})
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(told))


def kinds(job: Job) -> dict[str, list[nn.Parameter]]:
    """What is frozen, by where it stands."""
    trained = {id(p) for p in job.state.trained.values()}
    return {
        "base": [p for p in job.recipe.network.parameters() if id(p) not in trained],
        "encoders": [*job.recipe.encoders.parameters()],
        "frozen": [*job.recipe.frozen.parameters()],
    }


def watch(job: Job, parts: dict[str, list[nn.Parameter]]) -> dict[str, Any]:
    """Bytes of this rank by component, as the optimiser meets them, and what has a gradient then."""
    held: dict[str, Any] = {}
    optimizer, network = job.state.optimizer, job.recipe.network
    named = dict(network.named_parameters())  # the shards themselves: between steps nothing is gathered
    step = optimizer.step

    def measured() -> None:
        trained = list(job.state.trained.values())
        held["weights"] = size(trained + parts["base"])
        held["gradients"] = size(p.grad for p in trained if p.grad is not None)
        held["optimizer"] = size(value for p in trained for value in optimizer.state[p].values())
        held["average"] = size(job.state.ema.averages.values()) if job.state.ema else 0
        held["encoders"], held["frozen"] = size(parts["encoders"]), size(parts["frozen"])
        held["with_gradient"] = [name for name, p in named.items() if p.grad is not None]
        step()

    def gathered(*_: Any) -> None:
        if torch.is_grad_enabled():
            held["gathered"] = size(network.parameters()) + held.get("whole_gradients", 0)

    def accumulated(*_: Any) -> None:
        units = [group for m in fsdp_modules(network) for group in m._get_fsdp_state()._fsdp_param_groups]
        gathered = [p for group in units for p in group.fsdp_params if hasattr(p, "_unsharded_param")]
        sums = [g for p in gathered for g in (p.unsharded_accumulated_grad, p._unsharded_param.grad) if g is not None]
        held["whole_gradients"] = size(sums)

    optimizer.step = measured  # type: ignore[method-assign, assignment]
    network.register_forward_pre_hook(accumulated)
    network.register_forward_hook(gathered)
    return held


def size(tensors: Iterable[Tensor]) -> int:
    return sum(local(t.detach()).nbytes for t in tensors)


def keep(path: Path, job: Job) -> None:
    """Every tensor of the run, whole; collective."""
    named = {f"network.{n}": p for n, p in job.recipe.network.named_parameters()}
    named |= {f"encoders.{n}": p for n, p in job.recipe.encoders.named_parameters()}
    named |= {f"frozen.{n}": p for n, p in job.recipe.frozen.named_parameters()}
    tensors = {name: whole(p.detach()).clone() for name, p in named.items()}
    if job.world.is_main:
        save_file(tensors, path)


def main(folder: Path) -> None:
    runs = {
        name: compose_for_test(*overrides) for name, overrides in json.loads((folder / "runs.json").read_text()).items()
    }
    world = open_world(next(iter(runs.values())))
    for name, config in runs.items():
        run(folder / name, config, world)
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
