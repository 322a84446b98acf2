"""Runs that the cluster interrupts, on a real Slurm: each goes on by itself, at exactly the next step."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import attempts
from launch.agent import parents
from tests.slurm.conftest import Cluster, wait_until
from tests.slurm.test_train import SHAPE, Bench, submitted
from tests.support import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.cluster]
# Stopped by the test, far from its last step; every event finds a checkpoint that is newer than the one before.
LONG = ("optim.steps=4000", "validate.every=null", "validate.samples=0", "validate.from_split=0", "checkpoint.every=5")
TWO_NODES = ("nodes=2", "gpus_per_node=1")
ONE_NODE = ("nodes=1", "gpus_per_node=2")  # starts sooner


class Run:
    """A run on the cluster that is interrupted again and again."""

    def __init__(self, bench: Bench, name: str, *overrides: str) -> None:
        self.bench, self.name, self.cluster = bench, name, bench.cluster
        done = bench.submit(name, "cluster=practice", "cluster.notice_seconds=20", *LONG, *overrides)
        assert done.returncode == 0, done.stdout + done.stderr
        self.folder = bench.run(name)
        by_hand = "cluster.backend=sbatch" in overrides
        self.job = submitted(bench, done.stdout.splitlines()[-1]) if by_hand else self.file("slurm/job").read_text()

    def file(self, name: str) -> Path:
        return self.folder / name

    def steps(self) -> list[int]:
        return [step for step, _ in self.bench.losses(self.name)] if self.file("metrics.jsonl").exists() else []

    def records(self) -> list[dict[str, Any]]:
        return attempts.records(self.folder)

    def goes_on(self, number: int, seconds: float = 120) -> None:
        """Wait until the attempt has gone some steps beyond where it began, and beyond a checkpoint."""

        def is_under_way() -> bool:
            records = self.records()
            return len(records) == number and bool(s := self.steps()) and s[-1] >= records[-1]["start_step"] + 7

        self.wait(is_under_way, f"steps of attempt {number}", seconds)

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s: {what} of {self.name}; it said\n{self.said()}"
            time.sleep(0.2)

    def starts_now(self, *more: str) -> None:
        """Spare the two minutes that Slurm lets pass after a requeue."""
        self.wait(lambda: self.bench.state(self.job) == "PENDING", "a requeue")
        self.cluster.run("scontrol", "update", f"JobId={self.job}", "StartTime=now", *more)

    def ended(self, number: int) -> dict[str, Any]:
        """The record of an attempt, once it is decided what follows."""
        self.wait(lambda: "next" in self.records()[number - 1], f"a decision on attempt {number}")
        return self.records()[number - 1]

    def said(self) -> str:
        path = self.file(f"slurm/{self.job}.out")
        return path.read_text()[-3000:] if path.exists() else ""

    def nodes(self) -> list[str]:
        return list(self.records()[-1]["nodes"])

    def stop(self) -> None:
        self.file("control/stop").touch()
        record = self.ended(len(self.records()))
        assert (record["status"], record["cause"], record["next"]["decision"]) == ("stopped", "stop", "end")
        assert self.bench.wait(self.job) == "COMPLETED"


Event = Callable[[Run], None]


def time_limit(run: Run) -> None:
    """The limit becomes the next full minute, whose notice comes at once or soon."""
    minutes = run.cluster.run("squeue", "--noheader", f"--jobs={run.job}", "--format=%M").stdout.split(":")[-2]
    run.cluster.run("scontrol", "update", f"JobId={run.job}", f"TimeLimit={int(minutes) + 1}")
    run.ended(len(run.records()))
    run.starts_now("TimeLimit=30")


def preemption(run: Run) -> None:
    urgent = ("--partition=urgent", "--gres=gpu:2", f"--nodelist={','.join(run.nodes())}", "--wrap=true")
    run.cluster.submit(*urgent)
    run.ended(len(run.records()))
    run.starts_now()


def preemption_by_usr2(run: Run) -> None:
    conf = run.cluster.folder / "slurm.conf"
    former = conf.read_text()
    conf.write_text(f"{former}\nSlurmctldParameters=preempt_send_user_signal\n")
    run.cluster.run("scontrol", "reconfigure")
    try:
        preemption(run)
    finally:
        conf.write_text(former)
        run.cluster.run("scontrol", "reconfigure")


def requeue(run: Run) -> None:
    run.cluster.run("scontrol", "requeue", run.job)
    run.starts_now()


def node_down(run: Run) -> None:
    """Its daemon is gone as well, or it would be back at once."""
    node = run.nodes()[-1]
    os.kill(int((run.cluster.folder / "pid" / node).read_text()), signal.SIGKILL)
    run.cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    run.wait(lambda: run.bench.state(run.job) == "PENDING", "a requeue")
    run.cluster.practice("up")
    run.starts_now()


def rank_killed(run: Run) -> None:
    os.kill(processes("synthos.run", run)[0], signal.SIGKILL)


def agent_killed(run: Run) -> None:
    os.kill(processes("launch.agent" if run.name == "sbatch" else "submitit.core._submit", run)[-1], signal.SIGKILL)


def processes(module: str, run: Run) -> list[int]:
    """The processes that run a module for the run, but torchrun and srun that only start them."""
    found = []
    for pid, _ in parents():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        starts = any(word in ("torch.distributed.run", "srun") for word in words)
        if module in words and not starts and any(str(run.folder) in word for word in words):
            found.append(pid)
    return sorted(found)


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
    ("backend", "events", "causes"),
    [
        (
            "submitit",
            [time_limit, preemption, preemption_by_usr2, rank_killed, node_down],
            # On a slow machine KillWait is over before it is asked which node is down, and later none is.
            ["time_limit", "preempted", "preempted", "crash|killed", "node_failure|requeued"],
        ),
        ("sbatch", [agent_killed, requeue], ["killed", "requeued"]),
    ],
)
def test_a_run_goes_on_at_exactly_the_next_step(
    bench: Bench, backend: str, events: list[Event], causes: list[str]
) -> None:
    run = Run(bench, backend, f"cluster.backend={backend}", *(TWO_NODES if backend == "submitit" else ONE_NODE))
    times = []
    for number, event in enumerate(events, start=1):
        run.goes_on(number)
        started = time.monotonic()
        event(run)
        run.goes_on(number + 1)
        times.append(f"{event.__name__} {time.monotonic() - started:.1f} s")
    run.stop()
    print(times, run.said())
    records = run.records()
    assert len(records) == len(events) + 1
    for record, following, cause in zip(records, records[1:], causes, strict=False):
        assert re.fullmatch(cause, record["cause"]), record
        assert record["next"]["decision"] == ("restart" if cause in ("crash|killed", "killed") else "requeue"), record
        # An attempt begins with the checkpoint that the one before has left; what stopped in order has lost no step.
        assert following["checkpoint_in"] == record["checkpoint_out"] == following["start_step"]
        assert record["status"] == "failed" or record["end_step"] == record["checkpoint_out"]
        assert record["samples"] == [8 * record["start_step"], 8 * record["end_step"]]
    rows = [json.loads(line) for line in run.file("metrics.jsonl").read_text().splitlines()]
    starts = [(row["attempt"], row["attempt/restart_step"]) for row in rows if "attempt" in row]
    assert starts[-1] == (len(records), records[-1]["start_step"])
    losses = bench.losses(run.name)
    assert [step for step, _ in losses] == list(range(1, len(losses) + 1))
    assert losses == uninterrupted(bench, len(losses))[: len(losses)]


def test_a_chain_goes_on_without_requeue_and_ends_with_the_run(bench: Bench) -> None:
    """Drained twice by SIGUSR2, then stopped: each job is another one, and none is left in the queue."""
    run = Run(bench, "chain", "cluster.requeue=chain", *ONE_NODE)
    jobs = []
    for number in (1, 2):
        run.goes_on(number)
        jobs.append(run.job)
        run.cluster.run("scancel", "--signal=USR2", run.job)
        assert run.ended(number)["cause"] == "drain"
        run.wait(lambda: run.file("slurm/job").read_text() not in jobs, "a successor")
        run.job = run.file("slurm/job").read_text()
    run.goes_on(3)
    run.stop()
    assert len({*jobs, run.job}) == 3
    wait_until(
        lambda: not run.cluster.run("squeue", "--noheader", f"--name={run.folder.name}").stdout, "an empty queue"
    )
    records = run.records()
    assert [record["job"].split(".")[0] for record in records] == [*jobs, run.job]
    assert all(after["start_step"] == before["end_step"] for before, after in zip(records, records[1:], strict=False))
    losses = bench.losses("chain")
    assert losses == uninterrupted(bench, len(losses))[: len(losses)]


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
