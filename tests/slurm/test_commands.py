"""The run commands beside a real Slurm: what they say of a job is what becomes of it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.commands import doctor
from synthos.schema import ClusterConfig
from synthos.strict import read_config
from tests.slurm.conftest import Cluster, wait_until
from tests.support import ROOT, SMALL

Capture = pytest.CaptureFixture[str]
pytestmark = [pytest.mark.slow, pytest.mark.slurm]


@pytest.fixture
def full(cluster: Cluster) -> Iterator[str]:
    """A job that has every node."""
    job = cluster.submit("--nodes=4", "--gres=gpu:2", "--exclusive", "--wrap=sleep 600")
    wait_until(lambda: "JobState=RUNNING" in cluster.run("scontrol", "show", "job", job).stdout, "the job of all nodes")
    yield job
    cluster.run("scancel", job)


@pytest.fixture
def here(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of this process see the cluster, and the runs of this test."""
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    monkeypatch.setenv("SYNTHOS_RUNS", str(tmp_path / "runs"))


def ask(capsys: Capture, *words: str) -> Any:
    """What a verb answers in JSON."""
    capsys.readouterr()
    main([*words, "--json"])
    return json.loads(capsys.readouterr().out)


def run_of(capsys: Capture) -> dict[str, Any]:
    (run,) = ask(capsys, "status", "i2i")["runs"]
    return dict(run)


@pytest.mark.usefixtures("here")
def test_a_job_that_waits_is_explained_cancelled_and_resumed(
    cluster: Cluster, full: str, tmp_path: Path, capsys: Capture
) -> None:
    words = [a for a in SMALL if not a.startswith("cluster")] + ["cluster=practice", f"runs_dir={tmp_path / 'runs'}"]
    done = subprocess.run(
        [sys.executable, "launch/submit.py", *words, f"cache_dir={tmp_path / 'cache'}", "validate.every=null"],
        cwd=ROOT, env=cluster.env, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wait_until(lambda: run_of(capsys)["detail"] in ("Resources", "Priority"), "Slurm to look at the job")
    run = run_of(capsys)
    job = (Path(run["folder"]) / "slurm" / "job").read_text()
    assert (run["state"], run["job"], run["attempt"]) == ("queued", job, 0)
    told = ask(capsys, "explain", job)
    assert told["why"].endswith(("the nodes it asks for are busy", "jobs of a higher priority come first"))
    by_cause = {ending["cause"]: ending for ending in told["endings"]}
    # practice.conf: KillWait 10, GraceTime 10 of the partition batch; practice.yaml: 60 s of notice.
    assert (by_cause["time limit"]["signal"], by_cause["time limit"]["seconds"]) == ("SIGUSR2", 30)
    assert (by_cause["preemption"]["signal"], by_cause["preemption"]["seconds"]) == ("SIGTERM", 20)
    assert by_cause["cancel"]["seconds"] == 10 and told["slurm"] == ""

    assert main(["resume", "i2i"]) == 1 and "is queued already" in capsys.readouterr().err
    assert main(["cancel", job]) == 0 and f"job {job} is cancelled" in capsys.readouterr().out
    wait_until(lambda: run_of(capsys)["state"] == "cancelled", "the end of the job")
    assert main(["status", "i2i"]) == 1

    cluster.run("scancel", full)
    assert main(["resume", "i2i", "nodes=2", "cluster.time=10:00"]) == 0
    again = (Path(run["folder"]) / "slurm" / "job").read_text()
    assert again != job and "TimeLimit=00:10:00" in cluster.run("scontrol", "show", "job", again).stdout
    wait_until(lambda: run_of(capsys)["state"] == "done", "the end of the run", 180)
    assert main(["logs", "i2i"]) == 0
    shown = capsys.readouterr().out
    assert "node-0.log" in shown and "node-1.log" in shown


@pytest.mark.usefixtures("here")
def test_doctor_reads_the_cluster(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    told = ask(capsys, "doctor")
    tracking = cluster.run("scontrol", "show", "config").stdout.split("ProctrackType")[1].split()[1]
    assert told["settings"]["ProctrackType"] == tracking and told["settings"]["KillWait"] == "10 sec"
    batch, urgent = told["partitions"]
    assert (batch["name"], batch["grace_seconds"], batch["nodes"], batch["gpus"], batch["cpus"]) == (
        "batch",
        10,
        4,
        2,
        4,
    )
    assert (urgent["preempt_mode"], urgent["limit"], urgent["default"]) == ("OFF", None, False)
    assert ("passes them on" in " ".join(told["findings"])) == tracking.endswith("cgroup")
    assert "preemption" in [ending["cause"] for ending in told["endings"]]

    (tmp_path / "configs" / "cluster").mkdir(parents=True)
    pattern = ROOT / "configs" / "cluster" / "slurm.yaml"
    (tmp_path / "configs" / "cluster" / "slurm.yaml").write_text(pattern.read_text())
    monkeypatch.setattr(doctor, "CONFIGS", tmp_path / "configs")
    assert main(["doctor", "--write", "mine", "--partition", "urgent"]) == 0
    page = read_config(ClusterConfig, tmp_path / "configs" / "cluster" / "mine.yaml")
    assert (page.name, page.partition, page.cpus_per_rank, page.gpu_flag) == ("mine", "urgent", 2, "gpus-per-node")
    assert main(["doctor", "--write", "mine"]) == 2 and "is there already" in capsys.readouterr().err
    assert main(["doctor", "--partition", "none"]) == 2 and "allowed: batch, urgent" in capsys.readouterr().err
