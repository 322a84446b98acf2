"""Runs that the cluster interrupts, on a real Slurm: each goes on by itself, at exactly the next step."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chaos
from benchmarks.faults import (
    FAULTS,
    Fault,
    Victim,
    agent_killed,
    node_down,
    preemption,
    preemption_by_usr2,
    rank_killed,
    time_limit,
)
from tests import wandb_file
from tests.slurm.conftest import Cluster, wait_until
from tests.slurm.test_train import SHAPE, Bench, submitted
from tests.support import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
# Stopped by the test, far from its last step; every fault finds a checkpoint that is newer than the one before.
LONG = (
    "optim.steps=4000",
    "wandb.mode=offline",
    "validate.every=null",
    "validate.samples=0",
    "validate.from_split=0",
    "checkpoint.every=5",
)
TWO_NODES = ("nodes=2", "gpus_per_node=1")
ONE_NODE = ("nodes=1", "gpus_per_node=2")  # starts sooner
# What each fault is called in the ledger, and what follows. On a slow machine KillWait is over before it is asked who
# cancels, or which node is down, and later none is; and ranks may see that others are gone before their agent does.
CAUSES = {
    "time_limit": ("time_limit", "requeue"),
    "preemption": ("preempted", "requeue"),
    "preemption_by_usr2": ("preempted", "requeue"),
    "slow_save": ("requeued|preempted", "requeue"),
    "requeue": ("requeued", "requeue"),
    "truncated": ("requeued", "requeue"),
    "node_down": ("node_failure|requeued", "requeue"),
    "drain": ("drain", "requeue"),
    "cancelled": ("cancelled|terminate", "end|"),
    "rank_killed": ("killed", "restart"),
    "killed_in_save": ("killed", "restart"),
    "agent_killed": ("crash|killed", "restart"),
}


def is_expected(fault: str, cause: str, decision: str) -> bool:
    return all(re.fullmatch(*pair) for pair in zip(CAUSES[fault], (cause, decision), strict=True))


def started(bench: Bench, name: str, *overrides: str) -> Victim:
    """A run on the cluster, to be interrupted again and again."""
    done = bench.submit(name, "cluster=practice", "cluster.notice_seconds=20", *LONG, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    folder, by_hand = bench.run(name), "cluster.backend=sbatch" in overrides
    job = submitted(bench, done.stdout.splitlines()[-1]) if by_hand else (folder / "slurm" / "job").read_text()
    return Victim(folder, job, bench.cluster.folder, bench.cluster.env)


def stop(run: Victim) -> None:
    (run.folder / "control" / "stop").touch()
    record = run.ended(len(run.records()))
    assert (record["status"], record["cause"], record["next"]["decision"]) == ("stopped", "stop", "end")
    run.wait(lambda: run.state() == "COMPLETED", "the end of the job")


@pytest.fixture(scope="module")
def bench(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(cluster, tmp_path_factory.mktemp("requeue"))


def uninterrupted(bench: Bench, steps: int) -> list[tuple[int, float]]:
    """The losses of the same run on two ranks of this machine, as far as they are wanted."""
    if list((bench.folder / "local").glob("*/*/metrics.jsonl")) and len(done := bench.losses("local")) >= steps:
        return done
    shape = ["cluster=local", "cluster.device=cpu", "cluster.threads=1", "gpus_per_node=2"]
    folders = [f"runs_dir={bench.folder / 'local'}", f"cache_dir={bench.folder / 'cache'}"]
    command = [sys.executable, "launch/submit.py", *SHAPE, *folders, *LONG, *shape]
    with subprocess.Popen(command, cwd=ROOT, env=bench.cluster.env, stdout=subprocess.DEVNULL) as process:

        def is_far_enough() -> bool:
            paths = list((bench.folder / "local").glob("*/*/metrics.jsonl"))
            return process.poll() is not None or bool(paths) and len(bench.losses("local")) >= steps

        wait_until(is_far_enough, "the uninterrupted run", 300)
        (bench.run("local") / "control" / "stop").touch()
        assert process.wait(60) == 0
    return bench.losses("local")


@pytest.mark.parametrize(
    ("backend", "faults"),
    [
        ("submitit", [time_limit, preemption, preemption_by_usr2, rank_killed, node_down]),
        ("sbatch", [agent_killed]),
    ],
)
def test_a_run_goes_on_at_exactly_the_next_step(bench: Bench, backend: str, faults: list[Fault]) -> None:
    run = started(bench, backend, f"cluster.backend={backend}", *(TWO_NODES if backend == "submitit" else ONE_NODE))
    times = []
    for number, fault in enumerate(faults, start=1):
        run.goes_on(number)
        began = time.monotonic()
        fault(run)
        run.goes_on(number + 1)
        times.append(f"{fault.__name__} {time.monotonic() - began:.1f} s")
    stop(run)
    print(times, run.said())
    ledger(run.records(), [fault.__name__ for fault in faults])
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    starts = [(row["attempt"], row["attempt/restart_step"]) for row in rows if "attempt" in row]
    assert starts[-1] == (len(faults) + 1, run.records()[-1]["start_step"])
    losses = run.losses()
    assert [step for step, _ in losses] == list(range(1, len(losses) + 1))
    assert losses == uninterrupted(bench, len(losses))[: len(losses)]
    audit = chaos.audited(run.folder)
    assert audit["clean"] and audit["steps"] == len(losses) and audit["wandb_runs"] == 1
    in_wandb(run.folder, dict(losses), starts)


def in_wandb(folder: Path, losses: dict[int, float], starts: list[tuple[int, int]]) -> None:
    """W&B was told the same, on our step axis and repeated steps alike, as far as who is killed can write it down."""
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    rows = [row for file in files for row in wandb_file.history(file)]
    told = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert {*told} <= {*losses.items()} and len({*told}) > len(losses) / 2
    begun = [(row["attempt"], row["attempt/restart_step"]) for row in rows if "attempt/restart_step" in row]
    assert len(files) == len(starts) and begun and [start for start in starts if start in begun] == begun


def ledger(records: list[dict[str, Any]], faults: list[str]) -> None:
    """Every attempt has its cause, and begins with the checkpoint that the one before has left; no sample is lost."""
    assert len(records) == len(faults) + 1
    for fault, record, following in zip(faults, records, records[1:], strict=False):
        assert is_expected(fault, record["cause"], record["next"]["decision"]), (fault, record)
        assert following["checkpoint_in"] == following["start_step"]
        assert fault == "truncated" or following["checkpoint_in"] == record["checkpoint_out"]
        # What stopped in order has lost no step.
        assert record["status"] == "failed" or record["end_step"] == record["checkpoint_out"]
        assert record["samples"] == [8 * record["start_step"], 8 * record["end_step"]]


@pytest.mark.cluster
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("tracking", ["linuxproc", "cgroup"])
@pytest.mark.parametrize("backend", ["submitit", "sbatch"])
def test_every_fault(backend: str, tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By either back end, however Slurm finds the processes of a job."""
    if (
        tracking == "cgroup"
        and not os.access("/sys/fs/cgroup/freezer/freezer.state", os.F_OK)
        and not Path("/sys/fs/cgroup/freezer").is_dir()
    ):
        pytest.skip("there is no freezer here")
    monkeypatch.setenv("SYNTHOS_PRACTICE_PROCTRACK", tracking)
    out = tmp_path / "figures.json"
    command = ["--faults", str(len(FAULTS)), "--steps", "400", f"--backend={backend}", f"--out={out}"]
    assert chaos.main(command) == 0
    figures = json.loads(out.read_text())
    assert figures["tracking"].startswith(tracking) and figures["audit"]["wandb_runs"] == 1
    for row in figures["faults"]:
        assert is_expected(row["fault"], row["cause"], row["next"]), row


@pytest.mark.cluster
def test_a_chain_goes_on_without_requeue_and_ends_with_the_run(bench: Bench) -> None:
    """Drained twice by SIGUSR2, then stopped: each job is another one, and none is left in the queue."""
    run = started(bench, "chain", "cluster.requeue=chain", *ONE_NODE)
    jobs = []
    for number in (1, 2):
        run.goes_on(number)
        jobs.append(run.job)
        run.run("scancel", "--signal=USR2", run.job)
        assert run.ended(number)["cause"] == "drain"
        run.wait(lambda: (run.folder / "slurm" / "job").read_text() not in jobs, "a successor")
        run.job = (run.folder / "slurm" / "job").read_text()
    run.goes_on(3)
    stop(run)
    assert len({*jobs, run.job}) == 3
    wait_until(lambda: not run.run("squeue", "--noheader", f"--name={run.folder.name}"), "an empty queue")
    records = run.records()
    assert [record["job"].split(".")[0] for record in records] == [*jobs, run.job]
    assert all(after["start_step"] == before["end_step"] for before, after in zip(records, records[1:], strict=False))
    losses = run.losses()
    assert losses == uninterrupted(bench, len(losses))[: len(losses)]


@pytest.mark.cluster
@pytest.mark.parametrize("backend", ["submitit", "sbatch"])
def test_half_of_the_ranks_go_on_with_what_all_began(bench: Bench, backend: str) -> None:
    """Four ranks on two nodes, then two on one: the same samples, the same losses but for the order of sums."""
    shape = ("nodes=2", "gpus_per_node=2", "batch.micro=2")
    run = started(bench, f"half-{backend}", f"cluster.backend={backend}", *shape)
    run.goes_on(1)
    stop(run)
    run.resume("nodes=1")
    run.goes_on(2, 20)
    stop(run)
    before, after = run.records()
    assert (len(before["nodes"]), len(after["nodes"])) == (2, 1) and after["start_step"] == before["end_step"]
    losses = run.losses()
    whole = uninterrupted(bench, len(losses))[: len(losses)]
    assert [step for step, _ in losses] == [step for step, _ in whole]
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in whole], rel=1e-3)
    audit = chaos.audited(run.folder)
    assert audit["clean"] and audit["steps"] == len(losses) and audit["wandb_runs"] == 1


def test_a_save_that_is_slower_than_the_grace_is_warned_of(bench: Bench) -> None:
    """The practice cluster gives 10 s and then 10 s."""
    overrides = ("cluster=practice", *ONE_NODE, "+cluster.sbatch.hold=true")
    assert bench.submit("grace", *overrides).returncode == 0
    folder = bench.run("grace")
    bench.cluster.run("scancel", (folder / "slurm" / "job").read_text())
    beat = folder / "control" / "heartbeat.json"
    for seconds, warned in ((19.0, False), (21.0, True)):
        beat.write_text(json.dumps({"save_seconds": seconds}))
        said = bench.submit("grace", *overrides, "dry_run=true").stdout
        assert ("a preemption leaves 20 s (GraceTime and KillWait)" in said) == warned
