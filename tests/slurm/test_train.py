"""Whole runs on a real Slurm, by the commands that a user types: every way of starting gives the same run."""

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.attempts import newest_record
from synthos.data.index import load_index, open_index, save_index
from synthos.data.shards import ShardPlace
from tests.launch.conftest import write_shard
from tests.slurm.conftest import Cluster, wait_until
from tests.support import ROOT, SMALL

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
SECRET = "planted-" + "7f3a91"  # whole in no file: code that holds a secret is not copied
SHAPE = [a for a in SMALL if not a.startswith("cluster")] + ["mesh=full", "validate.every=3"]


class Bench:
    """A folder for runs, and the commands in it, on one cluster."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder

    def submit(self, name: str, *overrides: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """`synthos submit` with run folders below `name`, from a shell that holds secrets."""
        folders = [f"runs_dir={self.folder / name}", f"cache_dir={self.folder / 'cache'}"]
        command = [sys.executable, "launch/submit.py", *SHAPE, *folders, *overrides]
        environment = {**self.cluster.env, "WANDB_API_KEY": SECRET, "SOME_PASSWORD": SECRET, "RANK": "5"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)

    def run(self, name: str) -> Path:
        (config,) = (self.folder / name).glob("*/*/config.yaml")
        return config.parent

    def losses(self, name: str) -> list[tuple[int, float]]:
        rows = [json.loads(line) for line in (self.run(name) / "metrics.jsonl").read_text().splitlines()]
        return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]

    def wait(self, job: str, seconds: float = 180) -> str:
        """The state in which the job ended."""
        for _ in range(int(seconds * 2)):
            state = self.state(job)
            if state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
                return state
            time.sleep(0.5)
        raise AssertionError(f"job {job} is still {self.state(job)}")

    def state(self, job: str) -> str:
        match = re.search(r"JobState=(\w+)", self.cluster.run("scontrol", "show", "job", job).stdout)
        return match[1] if match else ""


@pytest.fixture(scope="module")
def bench(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(cluster, tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def local(bench: Bench) -> list[tuple[int, float]]:
    """The losses of the same run on four ranks of this machine, without a scheduler."""
    done = bench.submit("local", "cluster=local", "cluster.device=cpu", "cluster.threads=1", "gpus_per_node=4")
    assert done.returncode == 0, done.stderr
    return bench.losses("local")


def finished(bench: Bench, name: str, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((bench.run(name) / "control" / "verdict.json").read_text())["status"] == "done"


def files(folder: Path) -> Iterator[tuple[Path, bytes]]:
    yield from ((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file())


def test_submitit_on_two_nodes_of_two_ranks(bench: Bench, local: list[tuple[int, float]]) -> None:
    shape = ("cluster=practice", "nodes=2", "gpus_per_node=2", f"cluster.setup=['env > {bench.folder}/submitit.env']")
    done = bench.submit("submitit", *shape, "follow=true")
    finished(bench, "submitit", done)
    assert bench.losses("submitit") == local
    folder = bench.run("submitit")
    job = (folder / "slurm" / "job").read_text()
    preflight = json.loads((folder / "attempts/0001/preflight.json").read_text())
    assert [node["name"] for node in preflight["nodes"]] == newest_record(folder)["nodes"]
    assert {node["code"] for node in preflight["nodes"]} == {newest_record(folder)["tree"]} and preflight["passed"]
    assert f"submitted job {job} of {folder}" in done.stdout and f"job {job}: done at step 6" in done.stdout
    # What a dry run shows is what was submitted, word for word.
    dry = bench.submit("submitit", *shape, "dry_run=true").stdout
    assert dry.split("batch script:\n")[1] == (folder / "slurm" / f"{job}_submission.sh").read_text()
    # No secret of the submitting shell has travelled, nor a rank that it is said to be.
    variables_of_job = dict(variables(bench.folder / "submitit.env"))
    assert SECRET not in variables_of_job.values() and "RANK" not in variables_of_job
    assert variables_of_job["SLURM_JOB_ID"] == job
    shown = bench.cluster.run("scontrol", "show", "job", job).stdout
    assert "JobState=COMPLETED" in shown and SECRET not in shown
    assert not [path for path, content in files(folder) if SECRET.encode() in content]


def test_by_hand_on_two_nodes_of_two_ranks(bench: Bench, local: list[tuple[int, float]]) -> None:
    listing = bench.folder / "sbatch.env"
    shape = ("cluster=practice", "cluster.backend=sbatch", "nodes=2", "gpus_per_node=2")
    done = bench.submit("sbatch", *shape, f"cluster.setup=['env > {listing}']")
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    assert line.startswith("env -i ") and " sbatch " in line and SECRET not in line
    assert bench.wait(submitted(bench, line)) == "COMPLETED"
    finished(bench, "sbatch", done)
    assert bench.losses("sbatch") == local
    assert SECRET not in listing.read_text()
    assert not [path for path, content in files(bench.run("sbatch")) if SECRET.encode() in content]


def submitted(bench: Bench, line: str) -> str:
    """The job that a printed line starts."""
    environment = {**bench.cluster.env, "WANDB_API_KEY": SECRET}
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_another_allocation_is_refused_by_name(bench: Bench) -> None:
    shape = ("cluster=practice", "cluster.backend=sbatch", "nodes=2", "gpus_per_node=2")
    line = bench.submit("refused", *shape).stdout.splitlines()[-1]
    job = submitted(bench, line.replace("--nodes=2", "--nodes=1").replace("--gpus-per-node=2", "--gpus-per-node=1"))
    assert bench.wait(job) == "FAILED"
    said = (bench.run("refused") / "slurm" / f"{job}.out").read_text()
    assert "error: nodes: the allocation has 1, config.yaml of the run says 2; expected sbatch with --nodes=2" in said
    assert "gpus_per_node: the allocation has 1, config.yaml of the run says 2" in said
    assert not (bench.run("refused") / "attempts").exists()
    elsewhere = shlex.split(line)[:-1]
    job = submitted(bench, shlex.join([*elsewhere[elsewhere.index("sbatch") :], str(bench.folder)]).replace("%j", "x"))
    assert bench.wait(job) == "FAILED"
    said = (bench.run("refused") / "slurm" / "x.out").read_text()
    assert f"error: {bench.folder} is no prepared run folder" in said


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("four", ("nodes=4", "gpus_per_node=1")),
        ("srun", ("nodes=2", "gpus_per_node=2", "cluster.launcher=srun")),
    ],
)
def test_other_shapes_are_the_same_run(
    bench: Bench, local: list[tuple[int, float]], name: str, shape: tuple[str, ...]
) -> None:
    finished(bench, name, bench.submit(name, "cluster=practice", "follow=true", *shape))
    assert bench.losses(name) == local


@pytest.mark.long
def test_two_jobs_on_the_same_nodes_do_not_meet(bench: Bench) -> None:
    shape = ("cluster=practice", "+cluster.sbatch.nodelist='node[1-2]'", "nodes=2", "gpus_per_node=1")
    for seed in (1, 2):
        done = bench.submit(f"seed{seed}", *shape, f"seed={seed}")
        assert done.returncode == 0, done.stderr
    jobs = [(bench.run(f"seed{seed}") / "slurm" / "job").read_text() for seed in (1, 2)]
    together = False
    while {bench.state(job) for job in jobs} & {"PENDING", "RUNNING"}:
        together = together or [bench.state(job) for job in jobs] == ["RUNNING", "RUNNING"]
        time.sleep(0.3)
    assert together and [bench.wait(job) for job in jobs] == ["COMPLETED", "COMPLETED"]
    assert bench.losses("seed1") != bench.losses("seed2") and len(bench.losses("seed1")) == 6


@pytest.mark.long
def test_a_rank_that_raises_ends_the_job_and_is_heard_first(bench: Bench, tmp_path: Path) -> None:
    """A shard that ends too early stops the rank that reads there; its peers only say whom they lost."""
    shard = tmp_path / "shards" / "00000.tar"
    shard.parent.mkdir()
    write_shard(shard, {f"{key:04d}": "a plain colour" for key in range(32)})
    open_index(ShardPlace.beside(str(shard)))
    misplace(shard, "0020")
    started = time.monotonic()
    done = bench.submit(
        "fails", "cluster=practice", "nodes=2", "gpus_per_node=2", "follow=true", "data=webdataset",
        f"data.shards={shard.parent}", "data.height=32", "data.width=32", "data.workers=0", "data.holdout_fraction=0",
        "validate.samples=0", "validate.from_split=0", "validate.every=null", "cluster.max_crashes=0",
    )  # fmt: skip
    assert done.returncode == 1 and time.monotonic() - started < 120
    tracebacks = done.stdout.split("Traceback (most recent call last):\n")
    assert "it ends at byte" in tracebacks[1] and "synthos/data" in tracebacks[1]
    assert sum("synthos/data" in text for text in tracebacks) == 1
    assert bench.state((bench.run("fails") / "slurm" / "job").read_text()) == "FAILED"
    assert "it ends at byte" in json.loads((bench.run("fails") / "control" / "verdict.json").read_text())["message"]


def misplace(shard: Path, key: str) -> None:
    """Let the index say that a sample lies beyond the shard's end: a fault of the disk, not of the sample."""
    path = Path(ShardPlace.beside(str(shard)).index)
    index = load_index(path)
    index.members["offset"][[index.key(row) for row in range(len(index))].index(key)] += 1 << 30
    save_index(path, index)


@pytest.mark.parametrize("backend", ["submitit", pytest.param("sbatch", marks=pytest.mark.long)])
def test_a_cancelled_job_has_saved_and_the_next_goes_on(bench: Bench, backend: str) -> None:
    """SIGTERM reaches the agents, the ranks agree on a step and save before Slurm kills them."""
    name = f"cancel-{backend}"
    shape = ("cluster=practice", f"cluster.backend={backend}", "nodes=2", "gpus_per_node=1", "optim.steps=4000")
    done = bench.submit(name, *shape, "validate.every=null")
    assert done.returncode == 0, done.stderr
    folder = bench.run(name)
    by_hand = backend == "sbatch"
    job = submitted(bench, done.stdout.splitlines()[-1]) if by_hand else (folder / "slurm" / "job").read_text()
    wait_until(lambda: (folder / "metrics.jsonl").exists() and len(bench.losses(name)) >= 2, "two steps", 120)
    bench.cluster.run("scancel", job)
    assert bench.wait(job) in ("CANCELLED", "COMPLETED")
    verdict = json.loads((folder / "control" / "verdict.json").read_text())
    assert (verdict["status"], verdict["cause"]) == ("stopped", "terminate")
    record = newest_record(folder)
    assert (record["cause"], record["next"]["decision"]) == ("cancelled", "end")
    assert (folder / "checkpoints" / f"step_{verdict['step']:08d}").is_dir() and verdict["step"] >= 2
    again = bench.submit(name, *shape, "validate.every=null", "dry_run=true")
    assert f"checkpoint of step {verdict['step']}, stopped" in again.stdout


def test_a_wish_to_stop_reaches_a_job_that_still_waits(bench: Bench) -> None:
    shape = ("cluster=practice", "nodes=1", "gpus_per_node=1", "optim.steps=4000", "+cluster.sbatch.hold=true")
    done = bench.submit("waits", *shape)
    assert done.returncode == 0, done.stderr
    folder = bench.run("waits")
    (folder / "control" / "stop").touch()
    job = (folder / "slurm" / "job").read_text()
    bench.cluster.run("scontrol", "release", job)
    assert bench.wait(job) == "COMPLETED"
    verdict = json.loads((folder / "control" / "verdict.json").read_text())
    assert (verdict["status"], verdict["cause"]) == ("stopped", "stop") and verdict["step"] <= 1


def test_a_job_that_is_submitted_by_a_job_gets_nothing_of_it(bench: Bench, tmp_path: Path) -> None:
    """The outer job's step has its own idea of cores, ranks and ports."""
    script = tmp_path / "outer.sh"
    listing = tmp_path / "inner.txt"
    overrides = [
        *SHAPE, "cluster=practice", "nodes=1", f"runs_dir={tmp_path / 'runs'}", f"cache_dir={bench.folder / 'cache'}",
        f"cluster.setup=['env > {listing}','exit 0']",
    ]  # fmt: skip
    command = shlex.join([sys.executable, "launch/submit.py", *overrides])
    outer = f"cd {ROOT}\nexport RANK=7 MASTER_PORT=1 SBATCH_QOS=none WANDB_API_KEY={SECRET}\nenv > {tmp_path}/outer.txt"
    script.write_text(f"#!/bin/bash\n{outer}\nexec {command}\n")
    script.chmod(0o755)
    done = bench.cluster.run("srun", "--ntasks=1", "--cpus-per-task=2", "--mem=2G", str(script))
    assert done.returncode == 0, done.stdout + done.stderr
    for _ in range(100):
        if listing.exists():
            break
        time.sleep(0.2)
    around, inner = (dict(variables(path)) for path in (tmp_path / "outer.txt", listing))
    leaked = {"RANK", "MASTER_PORT", "SBATCH_QOS", "WANDB_API_KEY"} | {
        name for name in around if re.match("SLURM_(STEP|SRUN|CPU_BIND|LAUNCH|UMASK|DISTRIBUTION)", name)
    }
    assert leaked > {"RANK", "SLURM_STEP_ID"} and not leaked & set(inner)
    assert inner["SLURM_JOB_ID"] != around["SLURM_JOB_ID"]


def variables(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text().splitlines():
        name, sign, value = line.partition("=")
        if sign:
            yield name, value


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("cluster.partition=nowhere",), "cluster: Slurm would not take this job: .*[Ii]nvalid partition"),
        (
            ("gpus_per_node=16", "batch={size: 16, micro: 1}"),
            "gpus_per_node: 16 is more than a node of partition batch",
        ),
        (("nodes=9", "batch={size: 9, micro: 1}"), "nodes: 9 are more than partition batch has, 4"),
        (("+cluster.sbatch.nonsense=1",), "cluster: Slurm would not take this job: .*nonsense"),
    ],
)
def test_what_slurm_would_refuse_is_said_before_anything_is_queued(
    bench: Bench, overrides: tuple[str, ...], said: str
) -> None:
    done = bench.submit("bad", "cluster=practice", *overrides)
    assert done.returncode == 2 and re.search(said, done.stderr), done.stderr
    assert "Traceback" not in done.stderr and not list((bench.folder / "bad").glob("*/*/config.yaml"))
    dry = bench.submit("bad", "cluster=practice", "dry_run=true", *overrides)
    assert dry.returncode == 0 and re.search(f"missing: {said}", dry.stdout)


@pytest.mark.parametrize("backend", ["submitit", pytest.param("sbatch", marks=pytest.mark.long)])
def test_the_same_command_again_does_not_queue_twice(bench: Bench, backend: str) -> None:
    shape = ("cluster=practice", f"cluster.backend={backend}", "nodes=1", "+cluster.sbatch.hold=true")
    first = bench.submit(f"twice-{backend}", *shape)
    by_hand, slurm = backend == "sbatch", bench.run(f"twice-{backend}") / "slurm"
    job = submitted(bench, first.stdout.splitlines()[-1]) if by_hand else (slurm / "job").read_text()
    second = bench.submit(f"twice-{backend}", *shape)
    bench.cluster.run("scancel", job)
    assert first.returncode == 0 and second.returncode == 0
    assert f"has job {job} already, PENDING" in second.stderr


def test_what_is_down_for_a_while_is_waited_for(bench: Bench) -> None:
    """sbatch itself would queue such a job."""
    bench.cluster.run("scontrol", "update", "NodeName=node3,node4", "State=DRAIN", "Reason=test")
    try:
        done = bench.submit("drained", "cluster=practice", "nodes=4", "+cluster.sbatch.hold=true")
    finally:
        bench.cluster.run("scontrol", "update", "NodeName=node3,node4", "State=RESUME")
    assert done.returncode == 0 and "note: Slurm: " in done.stdout, done.stdout + done.stderr
    bench.cluster.run("scancel", (bench.run("drained") / "slurm" / "job").read_text())


def test_what_the_golden_pages_say_is_taken_by_slurm(bench: Bench) -> None:
    """Each shipped cluster config, as far as this cluster has what it asks for."""
    for cluster in (("cluster=slurm", "cluster.cpus_per_rank=1"), ("cluster=practice",)):
        for backend in ("submitit", "sbatch"):
            dry = bench.submit("taken", *cluster, f"cluster.backend={backend}", "nodes=4", "dry_run=true")
            assert "note: Slurm: Job" in dry.stdout and "missing" not in dry.stdout, dry.stdout
