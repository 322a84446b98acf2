"""A run on 2, 4 and 1 gloo ranks, killed in between: its traces are the plan, no sample of it lost or repeated.

Through the real command, on shards of which one sample turns out bad while training.
"""

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from synthos.data.index import open_index
from synthos.data.shards import ShardPlace
from synthos.data.stream import Stream
from synthos.keys import sample_id
from synthos.recipes.i2i import RECIPE
from synthos.schema import RunConfig, read_job
from synthos.train.report import SUBSTITUTE, TRACE
from tests.data.make import change, encoded, noise, tar
from tests.support import SMALL
from tests.train.test_exact import Runs, is_rank, kill_all, kill_named, lines, verdict, wait_for_checkpoint

pytestmark = pytest.mark.slow
SAMPLES, BATCH, STEPS = 36, 8, 45  # ten epochs: steps are short
BAD = ("00002.tar", "014")


def shards(folder: Path, indexed: bool) -> Path:
    """Six captioned pictures in a shard; one changes behind its index, if there is one."""
    folder.mkdir()
    for first in range(0, SAMPLES, 6):
        members = []
        for i in range(first, first + 6):
            members += [(f"{i:03d}.png", encoded(noise(64, 64, i), "PNG")), (f"{i:03d}.txt", f"caption {i}".encode())]
        shard = tar(folder / f"{first // 6:05d}.tar", members)
        if indexed:
            open_index(ShardPlace.beside(str(shard)))
    if indexed:
        change(folder / BAD[0], f"{BAD[1]}.png")
    return folder


def plan(config: RunConfig) -> list[Counter[tuple[int, int]]]:
    """Epoch and id of what each step was to consume, by position, as the shards were written."""
    planner = Stream(config.data, RECIPE.inputs, batch_size=BATCH, rank=0, world=1, seed=config.seed).planner
    ids = [sample_id(config.data.name, f"{i // 6:05d}.tar", f"{i:03d}") for i in range(SAMPLES)]
    batches = [planner.next() for _ in range(STEPS)]
    return [Counter((e, ids[p]) for e, p in zip(b.epochs.tolist(), b.positions.tolist(), strict=True)) for b in batches]


def consumed(folder: Path) -> list[Counter[tuple[int, int]]]:
    """The same as all ranks' traces have it; a substitute counts for what it stood for."""
    rows = np.concatenate([np.fromfile(file, TRACE) for file in (folder / "data").glob("trace-rank-*.bin")])
    faults = [json.loads(line) for line in (folder / "data" / "quarantine.jsonl").read_text().splitlines()]
    found = []
    for step in range(1, STEPS + 1):
        own = rows[rows["step"] == step]
        bad = [fault for fault in faults if fault["step"] == step]
        assert int((own["kind"] == SUBSTITUTE).sum()) == len(bad)
        assert all((fault["shard"], fault["key"], fault["reason"]) == (*BAD, "checksum") for fault in bad)
        usual = own[own["kind"] != SUBSTITUTE]
        counted = Counter(zip(usual["epoch"].tolist(), usual["id"].tolist(), strict=True))
        found.append(counted + Counter((fault["epoch"], fault["id"]) for fault in bad))
    assert len(rows) == STEPS * BATCH and len(faults) == STEPS * BATCH // SAMPLES
    return found


def kill_one(folder: Path) -> None:
    ranks = [entry for entry in Path("/proc").glob("[0-9]*") if is_rank(entry, folder)]
    os.kill(int(ranks[-1].name), signal.SIGKILL)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    own = [value for value in SMALL if not value.startswith(("data=", "validate.", "optim.steps="))]
    own += ["data=images", f"data.shards={tmp_path / 'set'}", "data.height=32", "data.width=32", "data.workers=0"]
    own += ["data.holdout_fraction=0", "data.window=3", f"optim.steps={STEPS}", "checkpoint.every=5", "mesh=full"]
    own += ["validate.every=null", "validate.samples=0", "validate.from_split=0"]
    yield Runs(tmp_path, tuple(own))
    kill_named(tmp_path / "run")  # where the test has failed


def test_killed_on_two_ranks_then_on_four_and_ended_on_one(runs: Runs) -> None:
    shards(runs.folder / "set", indexed=True)
    process = runs.open("run", "gpus_per_node=2")
    folder = runs.wait("run", 7, process)
    wait_for_checkpoint(folder, 5)
    kill_one(folder)
    output, _ = process.communicate(timeout=240)
    assert process.returncode, output
    process = runs.open("run", "gpus_per_node=4")
    runs.wait("run", 18, process)
    wait_for_checkpoint(folder, 15)
    kill_all(folder, process)
    runs.finish("run", "gpus_per_node=1")
    assert verdict(folder)["status"] == "done" and verdict(folder)["step"] == STEPS
    restarts = [line["attempt/restart_step"] for line in lines(folder) if "attempt/restart_step" in line]
    assert restarts[0] == 0 and 5 <= restarts[1] <= restarts[2] < STEPS and restarts[2] >= 15
    config = read_job(folder / "config.yaml")
    assert isinstance(config, RunConfig)
    assert consumed(folder) == plan(config)
    whole = sum(consumed(folder), Counter())
    assert set(whole.values()) == {1} and len(whole) == STEPS * BATCH == 10 * SAMPLES


@pytest.mark.long
def test_streaming_goes_on_where_two_ranks_were_killed(runs: Runs) -> None:
    runs.arguments += ("data.streaming={samples_per_epoch: 36, block: 7}", "data.window=16", "gpus_per_node=2")
    folder = shards(runs.folder / "set", indexed=False)
    process = runs.open("run")
    wait_for_checkpoint(runs.wait("run", 7, process), 5)
    kill_all(runs.path("run"), process)
    run = runs.finish("run")
    assert verdict(run)["status"] == "done" and not [*folder.glob("*.npz")]
    assert [line["attempt/restart_step"] >= 5 for line in lines(run) if "attempt/restart_step" in line] == [False, True]
    rows = np.concatenate([np.fromfile(file, TRACE) for file in (run / "data").glob("trace-rank-*.bin")])
    counted = Counter(zip(rows["epoch"].tolist(), rows["id"].tolist(), strict=True))
    assert set(counted.values()) == {1} and len(counted) == 10 * SAMPLES  # ten passes, each whole
    assert {epoch for epoch, _ in counted} == {*range(10)}
