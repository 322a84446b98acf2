"""One update and one validation, in this process: what moves, what must not, and what is refused."""

import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthos.batch import Batch, Fault
from synthos.build import build_recipe, build_state, fill_frozen
from synthos.keys import KeyedDraws
from synthos.models.parts import Models
from synthos.recipes.base import Encoded, Loss
from synthos.schema import RunConfig
from synthos.train.checkpoint import Checkpoints
from synthos.train.distributed import World, whole
from synthos.train.loop import Job, train, update
from synthos.train.meter import Meter
from synthos.train.report import PADDING, SUBSTITUTE, TRACE, USUAL, Report
from synthos.train.stop import Stop
from synthos.train.validate import Validator, encode_all
from tests.support import run_config, world_of_one


class Pictures:
    """Random pictures in an endless row: the loop's stream and validation's split."""

    def __init__(self, size: int) -> None:
        self.size, self.cursor = size, 0
        self.ids = torch.arange(1000, 1006)
        self.faults: list[Fault] = []

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: list[int]) -> Batch:
        return self.read(self.ids[rows])

    def next(self) -> Batch:
        self.cursor += self.size
        return self.read(torch.arange(self.cursor - self.size, self.cursor))

    def read(self, ids: torch.Tensor) -> Batch:
        images = torch.stack([self.picture(int(i)) for i in ids])
        return Batch(ids, torch.zeros_like(ids), {"image": images, "text": [f"picture {i}" for i in ids.tolist()]})

    def picture(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator)

    def digest(self) -> str:
        return f"up to {self.cursor}"

    def count(self, faults: Sequence[Fault]) -> None:
        self.faults += faults

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor = state["cursor"]


@pytest.fixture
def world() -> Iterator[World]:
    yield from world_of_one()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def build(world: World, folder: Path, cache: Path, *overrides: str) -> Job:
    config: RunConfig = run_config(f"cache_dir={cache}", *overrides)
    world.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    models = Models(config.model, cache)
    recipe = build_recipe(config.recipe, models)
    recipe.compute_dtype = world.dtype
    fill_frozen(recipe, models, world.device, world.dtype)
    null = recipe.null()
    state = build_state(config, recipe, models, world)
    pictures = Pictures(config.batch.size)
    report, none = Report(folder, config, world, 1), Encoded({}, {}, [])
    validator = Validator(recipe, world, pictures, none, null, config.batch.micro, 6, 0, report.alive)
    report.start(0, 10, False)
    return Job(
        config=config, world=world, recipe=recipe, state=state, stream=pictures, null=null, validator=validator,
        checkpoints=Checkpoints(folder / "checkpoints", world, 2, 0), report=report,
        stop=Stop(folder / "stop", world), export=lambda state: folder, last_step=10,
    )  # fmt: skip


def snapshot(job: Job) -> dict[str, torch.Tensor]:
    return {name: whole(p.detach()).clone() for name, p in job.recipe.network.named_parameters()}


@pytest.mark.parametrize("train", ["projector", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_step_moves_all_that_trains_and_nothing_else(
    world: World, tmp_path: Path, cache: Path, train: str, precision: str
) -> None:
    job = build(world, tmp_path, cache, f"recipe.train={train}", f"precision={precision}", "recipe.drop_image=0")
    before = snapshot(job)
    frozen = [p.clone() for part in (job.recipe.encoders, job.recipe.frozen) for p in part.parameters()]
    update(job)
    after = snapshot(job)
    trained = set(job.state.trained)
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == set(before) - trained
    assert {after[name].dtype for name in trained} == {torch.float32}
    now = [p for part in (job.recipe.encoders, job.recipe.frozen) for p in part.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(frozen, now, strict=True))


def test_gradient_is_that_of_the_mean_loss_over_the_global_batch(world: World, tmp_path: Path, cache: Path) -> None:
    job = build(world, tmp_path, cache, "optim.clip=null", "batch.micro=2", "ema.decay=null")
    grads: dict[str, torch.Tensor] = {}
    job.state.optimizer.step = lambda *_: grads.update(  # type: ignore[method-assign, assignment]
        {name: whole(p.grad).clone() for name, p in job.state.trained.items() if p.grad is not None}
    )
    metrics = update(job)
    batch = Pictures(8).next()
    draws = KeyedDraws(job.config.seed, batch.ids, batch.epochs)
    loss = job.recipe.loss(encode_all(job.recipe, batch), job.null, draws).per_sample.mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(metrics["train/loss"]) == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in job.state.trained.items():
        torch.testing.assert_close(grads[name], whole(parameter.grad), rtol=1e-3, atol=1e-6)


class Spoilt(Pictures):
    """Of eight samples the last three fill up, and the second stands for a bad one."""

    FAULT = Fault(77, 0, "set", "00000.tar", "000000007", "jpg", 512, 99, "decode", "can't be decoded: image: cut")

    def next(self) -> Batch:
        batch = super().next()
        weights = torch.tensor([8 / 5] * 5 + [0.0] * 3)
        replaced = torch.arange(8) == 1
        return dataclasses.replace(batch, weights=weights, replaced=replaced, faults=[self.FAULT])


def test_what_fills_a_batch_up_counts_nothing(world: World, tmp_path: Path, cache: Path) -> None:
    grads: dict[str, torch.Tensor] = {}
    job = build(world, tmp_path, cache, "optim.clip=null", "batch.micro=2", "ema.decay=null")
    job.stream = Spoilt(8)
    job.state.optimizer.step = lambda *_: grads.update(  # type: ignore[method-assign, assignment]
        {name: whole(p.grad).clone() for name, p in job.state.trained.items() if p.grad is not None}
    )
    metrics = update(job)
    real = Pictures(8).next().slice(0, 5)
    draws = KeyedDraws(job.config.seed, real.ids, real.epochs)
    loss = job.recipe.loss(encode_all(job.recipe, real), job.null, draws).per_sample.mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(metrics["train/loss"]) == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in job.state.trained.items():
        torch.testing.assert_close(grads[name], whole(parameter.grad), rtol=1e-3, atol=1e-6)


class Full(io.BytesIO):
    """A disk that takes 10 bytes at a time."""

    def write(self, data: Any) -> int:
        return super().write(data[:10])


def test_no_part_of_a_trace_is_lost_where_a_write_is_cut_short(world: World, tmp_path: Path, cache: Path) -> None:
    job = build(world, tmp_path, cache)
    batch = job.stream.next()
    job.report.trace_file = Full()
    job.report.trace(3, batch)
    rows = np.frombuffer(job.report.trace_file.getvalue(), TRACE)
    assert rows["id"].tolist() == batch.ids.tolist() and set(rows["step"].tolist()) == {3}


def test_bad_samples_are_written_down_and_counted(world: World, tmp_path: Path, cache: Path) -> None:
    job = build(world, tmp_path, cache)
    job.stream = stream = Spoilt(8)
    metrics = update(job)
    assert metrics["data/bad"] == 1 and stream.faults == [Spoilt.FAULT]
    (line,) = (tmp_path / "data" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, "rank": 0, **dataclasses.asdict(Spoilt.FAULT)}
    rows = np.fromfile(tmp_path / "data" / "trace-rank-00000.bin", TRACE)
    assert rows["kind"].tolist() == [USUAL, SUBSTITUTE, USUAL, USUAL, USUAL, PADDING, PADDING, PADDING]
    assert rows["id"].tolist() == list(range(8)) and set(rows["step"].tolist()) == {1}


def test_recomputed_activations_give_the_same_gradient(world: World, tmp_path: Path, cache: Path) -> None:
    after = []
    for recompute in ("true", "false"):
        job = build(world, tmp_path, cache, f"activation_checkpointing={recompute}")
        update(job)
        after.append(snapshot(job))
    for name in after[0]:
        torch.testing.assert_close(after[0][name], after[1][name], rtol=1e-5, atol=1e-6)


def test_validation_is_repeatable_and_leaves_no_trace(world: World, tmp_path: Path, cache: Path) -> None:
    job = build(world, tmp_path, cache)
    update(job)
    before, real = snapshot(job), job.recipe.loss

    def watched(*arguments: Any) -> Loss:
        parts = (job.recipe.network, *job.recipe.encoders.children(), *job.recipe.frozen.children())
        assert not any(m.training for part in parts for m in part.modules())
        return real(*arguments)

    job.recipe.loss = watched  # type: ignore[method-assign]
    with job.stop:
        first, second = (job.validator.run(job.state.ema, job.stop) for _ in range(2))
    assert first and second and first.losses == second.losses
    assert first.losses["val/loss"] != first.losses["val/loss_ema"]
    after = snapshot(job)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(m.training for part in job.recipe.encoders.children() for m in part.modules())
    assert job.recipe.network.training
    job.recipe.loss = real  # type: ignore[method-assign]
    update(job)


def test_averaged_loss_is_that_of_a_network_holding_the_average(world: World, tmp_path: Path, cache: Path) -> None:
    """The forward pass must not use weights gathered before the swap."""
    job = build(world, tmp_path, cache, "optim.lr=0.1", "optim.clip=null")
    assert job.state.ema
    for _ in range(3):
        update(job)
    with job.stop:
        done = job.validator.run(job.state.ema, job.stop)
    assert done
    with torch.no_grad():
        for name, parameter in job.state.trained.items():
            parameter.copy_(job.state.ema.averages[name])
    grid = job.validator.loss_grid()
    assert grid is not None and done.losses["val/loss_ema"] == grid.mean().item()


def test_validation_ends_early_when_asked_to_stop(world: World, tmp_path: Path, cache: Path) -> None:
    job = build(world, tmp_path, cache)
    (tmp_path / "stop").write_text("{}")
    with job.stop:
        assert job.validator.run(job.state.ema, job.stop) is None


def test_fixed_grid_does_not_depend_on_the_micro_batch(world: World, tmp_path: Path, cache: Path) -> None:
    job = build(world, tmp_path, cache)
    grids = [dataclasses.replace(job.validator, micro=micro).loss_grid() for micro in (1, 4, 6)]
    assert grids[0] is not None and grids[0].shape == (6, 8)
    for other in grids[1:]:
        torch.testing.assert_close(grids[0], other, rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights_change(
    world: World, tmp_path: Path, cache: Path
) -> None:
    job = build(world, tmp_path, cache)
    real, before = job.recipe.loss, snapshot(job)

    def broken(*arguments: Any) -> Loss:
        loss = real(*arguments)
        return Loss(loss.per_sample * float("nan"), loss.t)

    job.recipe.loss = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="step 1: loss nan.*up to 8"):
        update(job)
    assert all(torch.equal(before[name], value) for name, value in snapshot(job).items())


def test_meter_keeps_a_bin_to_itself() -> None:
    meter = Meter()
    meter.add(Loss(torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([0.1, 0.6, 0.2])), torch.ones(3))
    assert meter.sums["train/loss_by_t/0"].tolist() == [4.0, 2.0]
    assert torch.isnan(meter.sums["train/loss_by_t/2"][0])


def test_checkpoint_brings_back_every_tensor(world: World, tmp_path: Path, cache: Path) -> None:
    job = build(world, tmp_path, cache)
    for _ in range(2):
        update(job)
    saved = {name: whole(t).clone() for name, t in job.state.tensors().items()}
    job.checkpoints.save(job.state, job.stream.state_dict())
    update(job)
    other = build(world, tmp_path, cache)
    assert other.checkpoints.restore(other.state) == {"cursor": 16}
    assert other.state.step == 2
    restored = other.state.tensors()
    assert restored.keys() == saved.keys() and all(torch.equal(whole(restored[n]), saved[n]) for n in saved)


def test_damaged_checkpoints_never_push_out_whole_ones(world: World, tmp_path: Path, cache: Path) -> None:
    job = build(world, tmp_path, cache)
    job.checkpoints.keep_last = 1
    (tmp_path / "checkpoints" / "step_00000030").mkdir(parents=True)
    update(job)
    job.checkpoints.save(job.state, job.stream.state_dict())
    assert [f.name for f in job.checkpoints.list()] == ["step_00000001"]


def test_counters_of_a_saved_step_can_be_renewed(world: World, tmp_path: Path, cache: Path) -> None:
    job = build(world, tmp_path, cache)
    update(job)
    job.checkpoints.save(job.state, job.stream.state_dict())
    job.state.best, job.state.validation_due = [(0.5, 1)], False
    job.checkpoints.save(job.state, job.stream.state_dict())
    other = build(world, tmp_path, cache)
    other.checkpoints.restore(other.state)
    assert other.state.best == [(0.5, 1)] and not other.state.validation_due


def test_a_damaged_checkpoint_is_passed_over(world: World, tmp_path: Path, cache: Path) -> None:
    job = build(world, tmp_path, cache)
    for _ in range(2):
        update(job)
        job.checkpoints.save(job.state, job.stream.state_dict())
    newest = max((tmp_path / "checkpoints").iterdir())
    victim = next(f for f in newest.iterdir() if f.suffix == ".distcp")
    victim.write_bytes(victim.read_bytes()[:-1])
    other = build(world, tmp_path, cache)
    other.checkpoints.restore(other.state)
    assert other.state.step == 1


def test_old_checkpoints_go_and_the_best_stay(world: World, tmp_path: Path, cache: Path) -> None:
    job = build(world, tmp_path, cache)
    job.checkpoints.keep_last, job.checkpoints.keep_best = 1, 1
    job.state.best = [(0.5, 1)]
    for _ in range(3):
        update(job)
        job.checkpoints.save(job.state, job.stream.state_dict())
    assert [f.name for f in job.checkpoints.list()] == ["step_00000001", "step_00000003"]


def test_the_heartbeat_tells_how_long_a_save_takes(world: World, tmp_path: Path, cache: Path) -> None:
    """Also before the first save of an attempt: whoever stops it must know."""
    beat = tmp_path / "control" / "heartbeat.json"
    beat.parent.mkdir()
    beat.write_text(json.dumps({"save_seconds": 2.5}))
    job = build(world, tmp_path, cache)
    job.report.step(1, update(job))
    assert json.loads(beat.read_text())["save_seconds"] == 2.5
    job.report.checkpoint(1, {"checkpoint/save_seconds": 3.0}, "")
    assert json.loads(beat.read_text())["save_seconds"] == 3.0 and json.loads(beat.read_text())["step"] == 1


def test_the_heartbeat_tells_of_a_save_and_an_export_under_way(world: World, tmp_path: Path, cache: Path) -> None:
    """Nobody can know how long the first will take, and no step ends meanwhile."""
    beat = tmp_path / "control" / "heartbeat.json"
    beat.parent.mkdir()
    job = build(world, tmp_path, cache)
    seen: list[str] = []

    def seeing(work: Callable[..., Path]) -> Callable[..., Path]:
        def see(*given: Any, **named: Any) -> Path:
            seen.append(json.loads(beat.read_text())["doing"])
            return work(*given, **named)

        return see

    job.last_step, job.state.validation_due = 2, False
    job.checkpoints.save = seeing(job.checkpoints.save)  # type: ignore[method-assign]
    job.export = seeing(job.export)
    assert train(job)["status"] == "done"
    assert seen == ["saves", "exports"] and json.loads(beat.read_text())["doing"] == ""


def test_a_validation_shows_that_the_run_lives(world: World, tmp_path: Path, cache: Path) -> None:
    beat = tmp_path / "control" / "heartbeat.json"
    beat.parent.mkdir()
    job = build(world, tmp_path, cache)
    job.report.HEARTBEAT_SECONDS = 0
    job.validator.run(None, job.stop)
    assert not beat.exists()  # no step yet, of which it could tell
    job.report.step(1, update(job))
    beat.unlink()
    job.validator.run(None, job.stop)
    assert json.loads(beat.read_text())["step"] == 1
