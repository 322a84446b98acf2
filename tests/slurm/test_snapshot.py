"""Jobs on a real Slurm that start long after they were submitted, and submitters that die in the act."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import snapshot
from launch.attempts import newest_record
from launch.compose import CHECKOUT
from launch.journal import FOLDER
from synthos.schema import RunConfig
from synthos.strict import read_config
from tests.slurm.conftest import Cluster, wait_until
from tests.slurm.test_train import SHAPE, Bench, submitted

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
ONE = ("cluster=practice", "nodes=1", "gpus_per_node=1", "+cluster.sbatch.hold=true", "optim.steps=2")
ONE = (*ONE, "validate.every=null", "validate.samples=0", "validate.from_split=0")
# Slurm takes the job, and the command that asked for it is dead before it hears of that.
KILLER = """#!/bin/bash
[[ " $* " == *" --test-only "* || $1 == --version ]] && exec {real} "$@"
{real} "$@"
kill -9 $PPID
"""


@pytest.fixture(scope="module")
def bench(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield Bench(cluster, tmp_path_factory.mktemp("snapshot"))


def clone_of(folder: Path, mark: str) -> Path:
    """This checkout in another place, with a change and a file of its own; no git knows it."""
    folder.mkdir()
    for package in snapshot.PACKAGES:
        shutil.copytree(CHECKOUT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "synthos" / "train" / "loop.py").open("a") as file:
        file.write("\nfrom synthos.unknown import MARK\n\nprint(MARK)\n")
    (folder / "synthos" / "unknown.py").write_text(f'MARK = "of {mark}"\n')
    return folder


def number(said: str) -> str:
    match = re.search(r"submitted job (\d+)", said)
    assert match, said
    return match[1]


def submit_from(bench: Bench, checkout: Path, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    folders = [f"runs_dir={bench.folder / name}", f"cache_dir={bench.folder / 'cache'}"]
    command = [sys.executable, str(checkout / "launch" / "submit.py"), *SHAPE, *ONE, *folders, *overrides]
    return subprocess.run(command, cwd="/", env=bench.cluster.env, capture_output=True, text=True, timeout=240)


@pytest.mark.long
def test_waiting_jobs_keep_their_trees(bench: Bench, tmp_path: Path) -> None:
    """Two changed checkouts, one by submitit and one by hand; both are changed again before their jobs start."""
    clones = [clone_of(tmp_path / mark, mark) for mark in ("A", "B")]
    jobs = []
    for clone, overrides in zip(clones, (["seed=1"], ["seed=2", "cluster.backend=sbatch"]), strict=True):
        done = submit_from(bench, clone, "trees", *overrides)
        assert done.returncode == 0, done.stdout + done.stderr
        line = done.stdout.splitlines()[-1]
        jobs.append(submitted(bench, line) if "cluster.backend=sbatch" in overrides else number(done.stdout))
    for clone in clones:
        (clone / "synthos" / "unknown.py").write_text('MARK = "edited"\n')
        shutil.rmtree(clone / "synthos" / "diffusion")
        (clone / "synthos" / "torch.py").write_text("raise ImportError\n")
        (clone / "slurm" / "train.sbatch").write_text("exit 1\n")
        (clone / "launch" / "agent.py").write_text("exit 1\n")
    bench.cluster.run("scontrol", "release", ",".join(jobs))
    assert [bench.wait(job) for job in jobs] == ["COMPLETED", "COMPLETED"]
    folders = (bench.folder / "trees" / "i2i").iterdir()
    runs = {read_config(RunConfig, folder / "config.yaml").seed: folder for folder in folders}
    trees = [newest_record(runs[seed])["tree"] for seed in (1, 2)]
    assert len({*trees}) == 2 and trees == [(runs[seed] / "code").resolve().name for seed in (1, 2)]
    for seed, job, mark in zip((1, 2), jobs, "AB", strict=True):
        output = (runs[seed] / "slurm" / f"{job}.out").read_text()
        assert f"of {mark}" in output and "edited" not in output


@pytest.fixture
def dying(bench: Bench, tmp_path: Path) -> Bench:
    """Where a submitter is killed once Slurm has the job and before it is told so."""
    real = shutil.which("sbatch")
    (tmp_path / "sbatch").write_text(KILLER.format(real=real))
    (tmp_path / "sbatch").chmod(0o755)
    path = bench.cluster.env["PATH"]
    return Bench(Cluster(bench.cluster.folder, {**bench.cluster.env, "PATH": f"{tmp_path}:{path}"}), bench.folder)


def test_an_array_whose_submitter_was_killed_is_adopted(bench: Bench, dying: Bench) -> None:
    def listed() -> set[str]:
        return {*bench.cluster.run("squeue", "--noheader", "--array", "--format=%i").stdout.split()}

    before, points = listed(), (*ONE, "seed=1,2")
    assert dying.submit("array", *points).returncode == -9
    own = listed() - before
    again = bench.submit("array", *points)
    assert again.returncode == 0 and listed() - before == own and len(own) == 2, again.stderr
    runs = [path.parent for path in (bench.folder / "array").glob("*/[!.]*/config.yaml")]
    assert {(run / "slurm" / "job").read_text() for run in runs} == own
    assert all(f"has job {job} already, PENDING" in again.stdout for job in own), again.stdout
    bench.cluster.run("scancel", *own)


def test_a_job_whose_submitter_was_killed_runs_and_is_adopted(bench: Bench, dying: Bench) -> None:
    """It needs no command of ours to begin; the array above is adopted while it waits."""
    killed = dying.submit("killed", *ONE)
    assert killed.returncode == -9
    folder, runs = bench.run("killed"), bench.folder / "killed"
    assert not (folder / "slurm" / "job").exists() and len(list((runs / FOLDER).glob("*.intent"))) == 1
    (job,) = bench.cluster.run("squeue", "--noheader", f"--name={folder.name}", "--format=%i").stdout.split()
    bench.cluster.run("scontrol", "release", job)
    assert bench.wait(job) == "COMPLETED"
    wait_until(lambda: newest_record(folder).get("status") == "done", "the run's verdict")
    again = bench.submit("killed", *ONE)
    assert again.returncode == 0 and f"job {job} of {folder} is recorded now" in again.stderr, again.stderr
    assert f"{folder} is done" in again.stdout
    (record,) = [json.loads(path.read_text()) for path in (runs / FOLDER).iterdir()]
    assert record["job"] == job == (folder / "slurm" / "job").read_text()
