"""A sweep as one job array of a real Slurm, and a job that waits for another."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.chaos import compare
from benchmarks.faults import Victim, requeue
from launch import attempts, squeue
from launch.cli import main
from launch.rundir import read_state
from launch.runs import find_one
from tests.slurm.conftest import Cluster, wait_until
from tests.slurm.test_train import SHAPE
from tests.support import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.cluster, pytest.mark.slurm]
QUICK = ("validate.every=null", "validate.samples=0", "validate.from_split=0", "mesh=auto", "ema.decay=null")


@pytest.fixture
def runs(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this test's runs, which commands of this process see, too."""
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    monkeypatch.setenv("SYNTHOS_RUNS", str(tmp_path))
    return tmp_path


def command(cluster: Cluster, runs: Path, verb: str, *words: str) -> str:
    """What a `synthos` command prints that a user of the cluster gives."""
    line = [sys.executable, "-m", "launch.cli", verb, *words, f"runs_dir={runs}", f"cache_dir={runs / 'cache'}"]
    done = subprocess.run(line, cwd=ROOT, env=cluster.env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("backend", ["submitit", "sbatch"])
def test_an_array_leaves_out_what_is_done_and_an_element_is_requeued_alone(
    cluster: Cluster, runs: Path, backend: str
) -> None:
    same = (*SHAPE, *QUICK, "group=tries", "wandb.mode=offline")
    command(cluster, runs, "submit", *same, "optim.steps=1", "cluster=local", "cluster.device=cpu")
    (done,) = (runs / "tries").glob("[!.]*")
    site = ("cluster=practice", f"cluster.backend={backend}")
    said = command(cluster, runs, "submit", *same, "optim.steps=1,1000,2", *site, "array_parallelism=1")
    assert f"optim.steps=1: {done.name} is done" in said
    if backend == "submitit":
        job = re.findall(r"submitted job array (\d+) of 2 points, 1 at a time", said)[0]
    else:
        assert "prepared 2 points in " in said
        (line,) = (line for line in said.splitlines() if line.startswith("env -i "))  # to be typed
        job = cluster.run("bash", "-c", line).stdout.split()[-1]
    long, short = ((runs / "tries" / ".sweep-0001" / element).resolve() for element in "01")

    def waits(run: Path) -> bool:
        (own,) = squeue.jobs_of([long, short]).of(run)
        return own.pending

    wait_until(lambda: (long / "metrics.jsonl").exists(), "a step of the first element")
    assert waits(short) and not waits(long)
    again = command(cluster, runs, "submit", *same, "optim.steps=1,1000,2", *site)
    assert f"{long.name} has job {job}_0 already" in again and f"{short.name} has job {job}_1 already" in again
    cluster.run("scontrol", "requeue", f"{job}_0")
    Victim(long, f"{job}_0", cluster.folder, cluster.env).starts_now()  # else it would wait for two minutes
    wait_until(lambda: read_state(long).done and read_state(short).done, "the end of both", 300)
    jobs = [[record["job"] for record in attempts.records(run)] for run in (long, short)]
    assert jobs == [[f"{job}_0.0", f"{job}_0.1"], [f"{job}_1.0"]]
    first, second = attempts.records(long)
    assert first["cause"] == "requeued" and second["checkpoint_in"] == first["checkpoint_out"] > 0
    assert (long / "slurm" / f"{job}_0.out").is_file() and (short / "slurm" / f"{job}_1.out").is_file()
    assert len({(run / "wandb" / "run_id").read_text() for run in (done, long, short)}) == 3
    assert (find_one(f"{job}_0"), find_one(f"{job}_1")) == (long, short)
    assert main(["status", "tries"]) == 0 and main(["logs", f"{job}_1"]) == 0
    # The requeued one is the very run that nothing happens to.
    command(cluster, runs / "alone", "submit", *same, "optim.steps=1000", "cluster=local", "cluster.device=cpu",
            "cluster.threads=1")  # fmt: skip
    (alone,) = (runs / "alone" / "tries").glob("[!.]*")
    assert compare(long, alone) == dict.fromkeys(("losses", "checkpoint", "weights", "samples"), True)


def test_pictures_are_made_once_the_training_before_them_is_done(cluster: Cluster, runs: Path) -> None:
    """Which is requeued meanwhile."""
    command(cluster, runs, "submit", *SHAPE, *QUICK, "name=first", "optim.steps=600", "cluster=practice")
    given = ("weights=first", "prompt=red", "steps=2", "cluster=practice")
    said = command(cluster, runs, "generate", *given, "after=first")
    train, generation = find_one("first"), find_one("generate")
    assert "once that is done\n" in said and not read_state(train).done
    (own,) = squeue.jobs_of([generation]).of(generation)
    assert own.reason == "Dependency"
    wait_until(lambda: (train / "metrics.jsonl").exists(), "a step")
    victim = Victim(train, (train / "slurm" / "job").read_text(), cluster.folder, cluster.env)
    requeue(victim)
    wait_until(lambda: read_state(generation).done, "the pictures", 240)
    assert [record["cause"] for record in attempts.records(train)] == ["requeued", "finished"]
    assert len(attempts.records(generation)) == 1  # it never began before
    assert read_state(train).done and len(list((generation / "samples").glob("*.png"))) == 1
    assert "is done" in command(cluster, runs, "generate", *given)
