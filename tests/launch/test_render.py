"""What Slurm is told: golden pages for each cluster config, and the rules behind them."""

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch import render
from launch.compose import CHECKOUT, compose
from synthos.files import write_json
from synthos.schema import JobConfig

GOLDEN = Path(__file__).parent / "golden"
FOLDER = Path("/runs/i2i/i2i-1a2b3c4d")
SHELL = {"HOME": "/home/ada", "PATH": "/usr/bin", "WANDB_API_KEY": "planted", "SLURM_JOB_ID": "7", "RANK": "3"}


def config(*overrides: str) -> JobConfig:
    return compose(["recipe=i2i", "model=tiny", "data=photos", *overrides]).config


def told(config: JobConfig) -> str:
    """All that a cluster config makes of a job, free of this machine's paths."""
    pages = {
        "batch script": render.batch_script(config, FOLDER),
        "line by hand": render.sbatch_line(config, FOLDER, SHELL),
        "slurm/job.sh": render.job_file(config, FOLDER),
    }
    text = "\n".join(f"== {name}\n{page.rstrip()}\n" for name, page in pages.items())
    return text.replace(sys.executable, "PYTHON").replace(str(CHECKOUT), "CHECKOUT")


@pytest.mark.parametrize("cluster", ["slurm", "practice"])
def test_golden(cluster: str) -> None:
    made = told(config(f"cluster={cluster}", "nodes=4", "gpus_per_node=2"))
    path = GOLDEN / f"{cluster}.txt"
    if "SYNTHOS_WRITE_GOLDEN" in os.environ:
        path.write_text(made)
    assert made == path.read_text()


def test_a_site_has_the_last_word_but_on_what_the_plan_knows() -> None:
    flags = render.flags(config("cluster=slurm", "+cluster.sbatch={requeue: null, exclusive: true, nice: 5}"), FOLDER)
    assert "requeue" not in flags and flags["exclusive"] == "" and flags["nice"] == "5"
    assert "#SBATCH --exclusive\n" in render.batch_script(
        config("cluster=slurm", "+cluster.sbatch={exclusive: true}"), FOLDER
    )


def test_nodes_that_failed_twice_are_excluded_beside_those_of_the_site(tmp_path: Path) -> None:
    for number, failed in enumerate((["node7"], ["node7", "node8"]), start=1):
        (tmp_path / "attempts" / f"{number:04d}").mkdir(parents=True)
        write_json(tmp_path / "attempts" / f"{number:04d}" / "attempt.json", {"bad_nodes": failed})
    own = config("cluster=slurm", "+cluster.sbatch.exclude='node[1-3]'")
    assert render.flags(own, tmp_path)["exclude"] == "node[1-3],node7"
    assert "#SBATCH --exclude=node7\n" in render.batch_script(config("cluster=slurm"), tmp_path)
    assert "'--exclude=node[1-3],node7'" in render.sbatch_line(own, tmp_path, {})


def test_a_notice_leaves_half_of_the_time(tmp_path: Path) -> None:
    cluster = config("cluster=slurm", "cluster.time=00:20:00").cluster
    assert [render.notice_seconds(cluster, save) for save in (100, 200, 400)] == [320, 520, 600]
    assert render.notice_seconds(replace(cluster, notice_seconds=700), 400) == 700
    assert render.notice_seconds(replace(cluster, time=None), 400) == 920


def test_gpus_are_asked_for_as_the_site_wants() -> None:
    def asked(*overrides: str) -> dict[str, str]:
        flags = render.flags(config("cluster=slurm", "gpus_per_node=8", "batch.micro=1", *overrides), FOLDER)
        return {key: value for key, value in flags.items() if key in ("gres", "gpus-per-node")}

    assert asked() == {"gpus-per-node": "8"}
    assert asked("cluster.gpu_type=h200") == {"gpus-per-node": "h200:8"}
    assert asked("cluster.gpu_flag=gres", "cluster.gpu_type=a100") == {"gres": "gpu:a100:8"}
    assert asked("cluster.gpu_flag=null") == {}


def test_srun_starts_a_task_per_rank_where_torchrun_may_not() -> None:
    flags = render.flags(config("cluster=slurm", "cluster.launcher=srun", "gpus_per_node=8", "batch.micro=1"), FOLDER)
    assert (flags["ntasks-per-node"], flags["cpus-per-task"]) == ("8", "8")
    one = render.flags(config("cluster=slurm", "gpus_per_node=8", "batch.micro=1"), FOLDER)
    assert (one["ntasks-per-node"], one["cpus-per-task"]) == ("1", "64")


def test_only_what_is_named_travels() -> None:
    cluster = config("cluster=slurm", "cluster.environment=[NCCL_SOCKET_IFNAME]").cluster
    shell = {**SHELL, "NCCL_SOCKET_IFNAME": "ib0", "AWS_SECRET_ACCESS_KEY": "x", "SBATCH_ACCOUNT": "y"}
    assert render.travelling(cluster, shell) == ["HOME", "PATH", "NCCL_SOCKET_IFNAME"]
    assert render.clean(cluster, shell) == {"HOME": "/home/ada", "PATH": "/usr/bin", "NCCL_SOCKET_IFNAME": "ib0"}


def test_odd_paths_are_quoted() -> None:
    folder = Path("/my runs/it's/x-1a2b3c4d")
    line = render.sbatch_line(config("cluster=slurm"), folder, {})
    assert shlex.split(line)[-1] == str(folder)
    script = render.batch_script(config("cluster=slurm"), folder)
    (output,) = [text for text in script.splitlines() if "--output" in text]
    assert shlex.split(output.removeprefix("#SBATCH "))[0] == f"--output={folder}/slurm/%j.out"


def test_submitit_would_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own page for the same wishes: the flags that it knows, and that one task of each node starts our agent."""
    from submitit import SlurmExecutor

    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    theirs = SlurmExecutor(FOLDER / "slurm")
    wishes = {"job_name": FOLDER.name, "nodes": 4, "ntasks_per_node": 1, "gpus_per_node": 2, "cpus_per_task": 2}
    more = {"mem": "2G", "partition": "batch", "signal_delay_s": 60, "time": 30}
    theirs.update_parameters(**wishes, **more)
    page = theirs._make_submission_file_text(theirs._submitit_command_str, "x").splitlines()
    made = render.batch_script(config("cluster=practice", "nodes=4", "gpus_per_node=2"), FOLDER).splitlines()
    known = ("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "partition", "signal")
    for flag in (*known, "open-mode"):
        (line,) = [line for line in page if line.startswith(f"#SBATCH --{flag}=")]
        assert line in made
    (command,) = [line for line in made if "srun " in line and not line.startswith("#")]
    assert command.endswith(f" {sys.executable} -u -m launch.agent {FOLDER}")


def test_the_batch_script_outlives_the_signals_of_slurm(tmp_path: Path) -> None:
    """Each wakes the shell that waits; the command goes on, does not ignore them, and runs once for each attempt."""
    decides = tmp_path / "decides"  # again after the first attempt, then the end
    decides.write_text(
        f"#!/bin/bash\nkill -TERM $$\necho next >>{tmp_path}/log\n(($(grep -c next {tmp_path}/log) > 1))\n"
    )
    decides.write_text(decides.read_text() + "exit $(($? ? 75 : 6))\n")
    decides.chmod(0o755)
    command = f"echo up >>{tmp_path}/log; until [[ -e {tmp_path}/go ]]; do sleep 0.05; done; kill -TERM $$; echo no"
    lines = render.attempts(config("cluster=slurm", f"cluster.python={decides}"), tmp_path)
    script = "\n".join(["set -eo pipefail", *lines, f"attempts bash -c {shlex.quote(command)}"])
    with subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True) as shell:
        while not (tmp_path / "log").exists():
            time.sleep(0.05)
        for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2, signal.SIGTERM):
            shell.send_signal(number)
            time.sleep(0.1)
        assert shell.poll() is None and (tmp_path / "log").read_text() == "up\n"
        (tmp_path / "go").touch()
        said, _ = shell.communicate(timeout=30)
    # The command died of its SIGTERM; who decides ignored its own. The exit code is the decision's.
    assert (said, (tmp_path / "log").read_text(), shell.returncode) == ("", "up\nnext\nup\nnext\n", 6)
