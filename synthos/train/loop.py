"""The training loop. It knows recipes by their contract only."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from synthos.batch import Batch, Fault, Features
from synthos.keys import KeyedDraws
from synthos.recipes.base import Recipe
from synthos.schema import RunConfig
from synthos.train.checkpoint import Checkpoints
from synthos.train.distributed import World, fsdp_modules, peak_memory, set_training
from synthos.train.meter import Meter
from synthos.train.optim import clip_gradients, set_lr
from synthos.train.report import Report
from synthos.train.state import TrainState
from synthos.train.stop import Stop
from synthos.train.validate import Validator, encode_all
from synthos.train.waiting import waits


class Stream(Protocol):
    """What the loop needs of the data: this rank's share of one global batch after another."""

    def next(self) -> Batch: ...

    def digest(self) -> str: ...

    def count(self, faults: Sequence[Fault]) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass
class Job:
    """Everything one training run is made of; `build` puts it together."""

    config: RunConfig
    world: World
    recipe: Recipe
    state: TrainState
    stream: Stream
    null: Features
    validator: Validator
    checkpoints: Checkpoints
    report: Report
    stop: Stop
    export: Callable[[TrainState], Path]  # writes the trained weights for generation; collective
    last_step: int


def train(job: Job) -> dict[str, Any]:
    """Train from the newest whole checkpoint, or from the start, to the last step or a stop; returns the verdict."""
    with job.checkpoints:
        return _train(job)


def _train(job: Job) -> dict[str, Any]:
    config, state = job.config, job.state
    stream_state = job.checkpoints.restore(state)
    if stream_state is not None:
        job.stream.load_state_dict(stream_state)
    job.report.start(state.step, job.last_step, state.validation_due)
    set_training(job.recipe.network, True)
    stopping = ""
    while True:
        if state.validation_due and not stopping:  # also the baseline at step 0, and one that a stop had cut short
            stopping = _validate(job)
        done = state.step >= job.last_step
        if stopping or done or _due(config.checkpoint.every, state.step) or _among_best(job):
            with job.report.busy("saves"):
                job.checkpoints.save(state, job.stream.state_dict(), wait=bool(stopping) or done)
        for news in job.checkpoints.settle():
            job.report.checkpoint(state.step, news.metrics, news.message)
        if stopping:
            return {"status": "stopped", "cause": stopping, "step": state.step}
        if done:
            with job.report.busy("exports"):
                weights = job.export(state)
            return {"status": "done", "cause": "finished", "step": state.step, "weights": str(weights)}
        metrics = update(job)
        job.report.step(state.step, metrics)
        stopping = job.stop.agreed()
        state.validation_due = _due(config.validate.every, state.step) or state.step == job.last_step


def update(job: Job) -> dict[str, float | str]:
    """One optimiser step on the next global batch; returns what is logged of it, equal on every rank."""
    config, state, recipe = job.config, job.state, job.recipe
    started = time.perf_counter()
    batch = job.stream.next()
    waited = time.perf_counter() - started
    micro_batches = batch.split(config.batch.micro)
    meter = Meter()
    moved = 0.0
    for index, micro in enumerate(micro_batches):
        _sync_gradients(recipe, last=index == len(micro_batches) - 1)
        moving = time.perf_counter()
        micro = micro.to(job.world.device)
        moved += time.perf_counter() - moving
        features = encode_all(recipe, micro)
        loss = recipe.loss(features, job.null, KeyedDraws(config.seed, micro.ids, micro.epochs, job.world.device))
        (loss.per_sample * micro.weights).mean().div(len(micro_batches)).backward()  # type: ignore[no-untyped-call]
        meter.add(loss, micro.weights)
    norms, norm = clip_gradients(state.groups, config.optim.clip)
    metrics: dict[str, float | str] = dict(meter.reduce(job.world))
    _check_finite(metrics["train/loss"], norm, state.step, job.stream.digest())
    rates = set_lr(state.optimizer, config.optim, state.step, job.last_step)
    state.optimizer.step()
    state.optimizer.zero_grad()
    if state.ema:
        state.ema.update(state.step)
    state.images_seen += config.batch.size
    assert not any(m.training for part in (recipe.encoders, recipe.frozen) for m in part.modules() if m is not part)
    job.report.trace(state.step, batch)
    metrics["data/bad"] = _quarantine(job, batch)
    metrics |= {f"train/lr/{name}": rate for name, rate in rates.items()}
    metrics |= {f"train/grad_norm/{name}": value for name, value in norms.items()}
    seconds = time.perf_counter() - started
    metrics |= {"train/grad_norm": norm, "train/samples_per_s": config.batch.size / seconds}
    metrics |= {"train/mem_gb": peak_memory(job.world.device) / 1e9}
    return metrics | waits(waited, moved, seconds, batch.seconds) | {"data/digest": job.stream.digest()}


def _quarantine(job: Job, batch: Batch) -> int:
    """How many bad samples every rank met; those are written down, and end the run on every rank if too many."""
    met = int(job.world.reduce(torch.tensor(len(batch.faults))))
    if met:
        faults = job.world.collect(batch.faults)
        job.report.quarantine(job.state.step, faults)
        job.stream.count([fault for own in faults for fault in own])
    return met


def _validate(job: Job) -> str:
    """Validate at the current step; the cause of a stop that cut it short, or ""."""
    validation = job.validator.run(job.state.ema, job.stop)
    if validation is None:
        return job.stop.agreed()
    job.state.validation_due = False
    job.report.validation(job.state.step, validation, job.validator.requests.settings)
    loss = validation.losses.get("val/loss_ema", validation.losses.get("val/loss"))
    if loss is not None and job.state.step:
        ranked = sorted([*job.state.best, (loss, job.state.step)])
        job.state.best = ranked[: job.config.checkpoint.keep_best]
    return ""


def _among_best(job: Job) -> bool:
    return any(step == job.state.step for _, step in job.state.best)


def _due(every: int | None, step: int) -> bool:
    return bool(every) and step > 0 and step % (every or 1) == 0


def _sync_gradients(recipe: Recipe, last: bool) -> None:
    """Reduce gradients over ranks in the last micro-batch only."""
    for module in fsdp_modules(recipe.network):
        module.set_requires_gradient_sync(last, recurse=False)


def _check_finite(loss: float | str, norm: float, step: int, digest: str) -> None:
    """Every rank sees the same reduced numbers, so every rank raises together and nothing is written."""
    if not (math.isfinite(float(loss)) and math.isfinite(norm)):
        raise RuntimeError(
            f"step {step + 1}: loss {loss}, gradient norm {norm:g}, for the global batch {digest}; no weight was "
            "changed. The run can go on from its last checkpoint, with a lower optim.lr or a tighter optim.clip"
        )
