"""A run is the same run however it is interrupted and on however many ranks: through the real command, on gloo.

Bit for bit where the number of ranks is the same; to the rounding of float sums where it is not.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from launch import cli
from synthos.train.report import TRACE
from tests.support import SMALL, environment
from tests.train.small import wait_until

pytestmark = pytest.mark.slow
STEPS = 40
LONG = (*SMALL, f"optim.steps={STEPS}", "checkpoint.every=10", "validate.every=20", "mesh=full")
CLI = "import sys; from launch.cli import main; sys.exit(main(['submit', *sys.argv[1:]]))"


class Runs:
    """Starts the same run in folders of their own."""

    def __init__(self, folder: Path, arguments: tuple[str, ...] = LONG) -> None:
        self.folder, self.arguments = folder, arguments

    def open(self, name: str, *overrides: str) -> subprocess.Popen[str]:
        arguments = [
            *self.arguments,
            f"runs_dir={self.folder / name}",
            f"cache_dir={self.folder / 'cache'}",
            *overrides,
        ]
        return subprocess.Popen(
            [sys.executable, "-c", CLI, *arguments],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, name: str, *overrides: str) -> Path:
        process = self.open(name, *overrides)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        return self.path(name)

    def path(self, name: str) -> Path:
        (config,) = (self.folder / name).glob("*/*/config.yaml")
        return config.parent

    def stop_at(self, name: str, step: int, *overrides: str) -> Path:
        """Start, ask for a stop by control/stop once `step` is done, and wait for the verdict."""
        process = self.open(name, *overrides)
        folder = self.wait(name, step, process)
        (folder / "control" / "stop").write_text("{}")
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert verdict(folder)["status"] == "stopped" and verdict(folder)["cause"] == "stop"
        assert step <= verdict(folder)["step"] < STEPS
        return folder

    def wait(self, name: str, step: int, process: subprocess.Popen[str]) -> Path:
        for _ in range(3000):
            found = list((self.folder / name).glob("*/*/metrics.jsonl"))
            if found and any(line["step"] >= step for line in lines(found[0].parent)):
                return found[0].parent
            assert process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.1)
        raise AssertionError(f"{name}: step {step} was not reached")


def wait_for_checkpoint(folder: Path, step: int) -> None:
    """Until a checkpoint of the step or a later one has its name: it is written while training goes on."""
    wait_until(lambda: any(path.name >= f"step_{step:08d}" for path in (folder / "checkpoints").glob("step_*")))


def lines(folder: Path) -> list[dict[str, Any]]:
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        if line.endswith("}"):
            found.append(json.loads(line))
    return found


def story(folder: Path, *keys: str) -> dict[str, dict[int, Any]]:
    """Each key's values by step."""
    return {key: {line["step"]: line[key] for line in lines(folder) if key in line} for key in keys}


def verdict(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "control" / "verdict.json").read_text()))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, whole."""
    path = max((folder / "checkpoints").glob("step_*"))
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    empty = {
        k: torch.empty(m.size, dtype=m.properties.dtype)
        for k, m in metadata.items()
        if isinstance(m, TensorStorageMetadata)
    }
    dcp.load(empty, checkpoint_id=path, no_dist=True)
    return empty


def trace(folder: Path) -> dict[int, list[int]]:
    """Sample ids of each step, over all ranks in order."""
    steps: dict[int, list[int]] = {}
    for file in sorted((folder / "data").glob("trace-rank-*.bin")):
        rows = np.fromfile(file, TRACE)
        for step in np.unique(rows["step"]):
            steps.setdefault(int(step), []).extend(rows["id"][rows["step"] == step].tolist())
    return steps


EXACT = ("train/loss", "train/grad_norm", "val/loss", "val/loss_ema", "data/digest")


def assert_same(folder: Path, other: Path) -> None:
    assert story(folder, *EXACT) == story(other, *EXACT)
    ours, theirs = tensors(folder), tensors(other)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different
    assert {"network", "optim", "ema"} == {name.split(".")[0] for name in ours}


def assert_close(folder: Path, other: Path) -> None:
    ours, theirs = story(folder, *EXACT), story(other, *EXACT)
    assert ours["data/digest"] == theirs["data/digest"]
    for key in EXACT[:-1]:
        assert ours[key].keys() == theirs[key].keys()
        np.testing.assert_allclose(list(ours[key].values()), list(theirs[key].values()), rtol=2e-4, err_msg=key)
    weights, others = tensors(folder), tensors(other)
    for kind in ("network.", "ema."):
        pairs = [(weights[name], others[name]) for name in weights if name.startswith(kind)]
        apart = sum((a - b).square().sum().item() for a, b in pairs) / sum(b.square().sum().item() for _, b in pairs)
        assert apart**0.5 < 1e-3, kind


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module")
def straight(runs: Runs) -> Iterator[Path]:
    """Two ranks, never interrupted."""
    yield runs.finish("straight", "gpus_per_node=2")


def test_story_is_whole(straight: Path) -> None:
    assert verdict(straight)["status"] == "done"
    losses = story(straight, "train/loss")["train/loss"]
    assert list(losses) == list(range(1, STEPS + 1))
    assert list(story(straight, "val/loss")["val/loss"]) == [0, 20, STEPS]
    assert np.mean(list(losses.values())[-10:]) < np.mean(list(losses.values())[:10])
    ids = [i for step in trace(straight).values() for i in step]
    assert len(ids) == len(set(ids)) == 8 * STEPS  # less than an epoch: no sample twice


def test_stopped_and_started_again_is_the_same_run(runs: Runs, straight: Path) -> None:
    stopped = runs.stop_at("stopped", 5, "gpus_per_node=2")
    runs.finish("stopped", "gpus_per_node=2")
    assert_same(stopped, straight)
    assert trace(stopped) == trace(straight)


@pytest.mark.long
def test_killed_and_started_again_goes_on_from_the_last_checkpoint(runs: Runs, straight: Path) -> None:
    process = runs.open("killed", "gpus_per_node=2")
    folder = runs.wait("killed", 13, process)
    wait_for_checkpoint(folder, 10)
    kill_all(folder, process)
    assert not (folder / "control" / "verdict.json").exists()
    runs.finish("killed", "gpus_per_node=2")
    restarts = story(folder, "attempt/restart_step")["attempt/restart_step"]
    assert any(step >= 10 for step in restarts.values())
    assert_same(folder, straight)
    assert trace(folder) == trace(straight)  # what the lost steps had consumed is forgotten
    assert cli.main(["data", "audit", str(folder)]) == 0


def kill_all(folder: Path, process: subprocess.Popen[str]) -> None:
    """kill -9 every process of the run at once."""
    process.kill()
    kill_named(folder)
    process.communicate(timeout=60)


def kill_named(folder: Path) -> None:
    """kill -9 every process that has the folder in its command."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode()
        except OSError:
            continue
        if str(folder) in command:
            os.kill(int(entry.name), signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "mesh"), [(1, "full"), (4, "full"), (2, "replicate")])
def test_ranks_and_mesh_change_nothing_but_rounding(runs: Runs, straight: Path, ranks: int, mesh: str) -> None:
    assert_close(runs.finish(f"{mesh}{ranks}", f"gpus_per_node={ranks}", f"mesh={mesh}"), straight)


@pytest.mark.long
def test_ranks_may_change_on_the_way(runs: Runs, straight: Path) -> None:
    runs.stop_at("elastic", 3, "gpus_per_node=2")
    folder = runs.stop_at("elastic", verdict(runs.path("elastic"))["step"] + 2, "gpus_per_node=1")
    runs.finish("elastic", "gpus_per_node=4")
    assert_close(folder, straight)
    consumed, expected = trace(folder), trace(straight)
    assert {step: sorted(ids) for step, ids in consumed.items()} == {
        step: sorted(ids) for step, ids in expected.items()
    }
    assert cli.main(["data", "audit", str(folder)]) == 0


@pytest.mark.long
def test_accumulation_is_one_batch(runs: Runs, straight: Path) -> None:
    assert_close(runs.finish("whole", "gpus_per_node=1", "batch.micro=8", "mesh=replicate"), straight)


@pytest.mark.long
def test_sigterm_to_a_rank_ends_the_run_saved(runs: Runs) -> None:
    process = runs.open("terminated", "gpus_per_node=2")
    folder = runs.wait("terminated", 3, process)
    ranks = [p for p in Path("/proc").glob("[0-9]*") if is_rank(p, folder)]
    os.kill(int(ranks[-1].name), signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    end = verdict(folder)
    assert end["status"] == "stopped" and end["cause"] == "terminate"
    assert (folder / "checkpoints" / f"step_{end['step']:08d}").is_dir()


def is_rank(entry: Path, folder: Path) -> bool:
    try:
        command = (entry / "cmdline").read_bytes().decode().split("\0")
    except OSError:
        return False
    return str(folder) in command and "synthos.run" in command and "torch.distributed.run" not in command


def test_done_is_said(runs: Runs, straight: Path) -> None:
    before = sorted(p.stat().st_mtime_ns for p in straight.rglob("*.safetensors"))
    process = runs.open("straight", "gpus_per_node=2")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "is done" in output
    assert sorted(p.stat().st_mtime_ns for p in straight.rglob("*.safetensors")) == before
