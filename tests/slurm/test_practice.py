"""The practice cluster is a Slurm as a site has it, and leaves nothing behind."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.conftest import PRACTICE, Cluster, cluster_in, wait_until

# A job whose processes ignore SIGTERM, one of them with a parent that is gone.
STUBBORN = "srun bash -c 'trap \"\" TERM; (setsid sleep 600 &); echo started; while true; do sleep 600; done'"


@pytest.fixture
def other(cluster: Cluster, short_folder: Path) -> Iterator[Cluster]:
    """A second cluster at the same time."""
    other = cluster_in(short_folder / "two")
    try:
        other.practice("up")
        yield other
    finally:
        other.practice("down")


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that no cluster has started."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def pids(cluster: Cluster) -> dict[str, int]:
    return {path.name: int(path.read_text()) for path in (cluster.folder / "pid").iterdir()}


def state(cluster: Cluster, job: str) -> str:
    return cluster.run("squeue", "--noheader", f"--job={job}", "--format=%T").stdout.strip()


def belongs_to(folder: Path, process: Path) -> bool:
    """Whether a process names the cluster in its command or environment, or works in its folder."""
    try:
        names = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        return f"{folder}/".encode() in names or (process / "cwd").readlink().is_relative_to(folder)
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return False
    except PermissionError:  # a process that is closed to root is none that root has started
        return False


def processes(folder: Path) -> list[int]:
    return [int(process.name) for process in Path("/proc").glob("[0-9]*") if belongs_to(folder, process)]


def ports(cluster: Cluster) -> list[int]:
    """Those of its controller and of its four nodes."""
    settings = dict(
        line.split("=", 1) for line in cluster.run("scontrol", "show", "config").stdout.split("\n") if "=" in line
    )
    first = int({key.strip(): value for key, value in settings.items()}["SlurmctldPort"])
    return list(range(first, first + 5))


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_up_again_changes_nothing(cluster: Cluster) -> None:
    before = pids(cluster)
    again = cluster.practice("up")
    assert again.stdout == cluster.practice("env").stdout == f"export SLURM_CONF={cluster.folder}/slurm.conf\n"
    assert f"already up in {cluster.folder}" in again.stderr
    assert pids(cluster) == before
    assert set(before) == {"munged", "slurmctld", "node1", "node2", "node3", "node4"}


def test_status_shows_nodes_queue_and_process_tracking(cluster: Cluster) -> None:
    status = cluster.practice("status").stdout
    used = cluster.run("scontrol", "show", "config").stdout.split("proctrack/")[1].split()[0]
    assert f"process tracking: {used} (" in status
    for node in ("node1", "node2", "node3", "node4"):
        assert [line.split()[1] for line in status.splitlines() if line.startswith(node)].count("urgent") == 1
    assert "JOBID" in status


def test_job_on_two_nodes_sees_the_gpus_of_each(cluster: Cluster) -> None:
    task = "srun bash -c 'echo $SLURM_PROCID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES'"
    job = cluster.submit("--wait", "--nodes=2", "--ntasks-per-node=2", "--gres=gpu:2", f"--wrap={task}")
    assert sorted(cluster.output(job)) == ["0 node1 0,1", "1 node1 0,1", "2 node2 0,1", "3 node2 0,1"]


def test_two_jobs_share_a_node_and_have_a_gpu_each(cluster: Cluster) -> None:
    wait = f"echo $CUDA_VISIBLE_DEVICES; until [ -e {cluster.folder}/go ]; do sleep 0.1; done"
    jobs = [cluster.submit("--nodelist=node4", "--gres=gpu:1", f"--wrap={wait}") for _ in range(2)]
    wait_until(lambda: all(cluster.output(job) for job in jobs), "two jobs on node4")
    (cluster.folder / "go").touch()
    assert sorted(line for job in jobs for line in cluster.output(job)) == ["0", "1"]
    wait_until(lambda: not any(state(cluster, job) for job in jobs), "their end")


def test_an_urgent_job_requeues_a_batch_job(cluster: Cluster) -> None:
    everything = ("--nodes=4", "--gres=gpu:2")
    first = cluster.submit(*everything, "--wrap=echo started; sleep 600")
    try:
        wait_until(lambda: cluster.output(first) == ["started"], "the batch job")
        urgent = cluster.submit("--wait", "--partition=urgent", *everything, "--wrap=echo $SLURM_JOB_PARTITION")
        assert cluster.output(urgent) == ["urgent"]
        assert state(cluster, first) == "PENDING"
        assert " Restarts=1 " in cluster.run("scontrol", "show", "job", first).stdout
    finally:
        cluster.run("scancel", first)


def test_up_restarts_what_is_missing_and_down_leaves_nothing(
    cluster: Cluster, other: Cluster, stranger: subprocess.Popen[bytes]
) -> None:
    assert not set(ports(cluster)) & set(ports(other))
    job = other.submit("--nodes=2", "--ntasks-per-node=1", "--gres=gpu:2", f"--wrap={STUBBORN}")
    wait_until(lambda: other.output(job) == ["started"] * 2, "the job of the other cluster")

    os.kill(pids(other)["node1"], signal.SIGKILL)
    wait_until(lambda: "node1 does not run" in other.practice("status").stdout, "status to say so")
    assert "does not run" not in other.practice("up").stderr
    assert "does not run" not in other.practice("status").stdout
    assert state(other, job) == "RUNNING"

    # A daemon is gone, and its pid has become somebody else's.
    os.kill(pids(other)["node3"], signal.SIGKILL)
    (other.folder / "pid" / "node3").write_text(str(stranger.pid))
    listening, tracked = ports(other), len(processes(other.folder))
    other.practice("down")
    assert stranger.poll() is None
    assert tracked >= 5 + 2 * 4  # daemons; on each node a step daemon, bash and two sleeps
    assert processes(other.folder) == []
    assert not any(listens(port) for port in listening)
    assert not other.folder.exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"freezer/*{other.folder.parent.name}-{other.folder.name}*"))

    assert "nothing is up" in other.practice("down").stderr
    status = other.practice("status", check=False)
    assert status.returncode == 1 and "nothing is up" in status.stderr
    assert all(listens(port) for port in ports(cluster))


def refusal(verb: str, **settings: str) -> str:
    """What practice.sh says when it refuses."""
    env = {"PATH": os.environ["PATH"], **settings}
    command = [str(shutil.which("bash")), str(PRACTICE), verb]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("verb", ["up", "down", "status", "env"])
def test_a_folder_of_another_is_not_touched(short_folder: Path, verb: str) -> None:
    folder = short_folder / "papers"
    folder.mkdir(exist_ok=True)
    (folder / "slurm.conf").write_text("ClusterName=real\n")
    assert f"{folder} exists and is no practice cluster" in refusal(verb, SYNTHOS_PRACTICE=str(folder))
    assert [path.name for path in folder.iterdir()] == ["slurm.conf"]


@pytest.mark.parametrize("verb", ["up", "down", "status", "env"])
def test_a_shell_that_is_pointed_at_another_slurm(cluster: Cluster, short_folder: Path, verb: str) -> None:
    conf = f"{cluster.folder}/slurm.conf"
    said = refusal(verb, SYNTHOS_PRACTICE=str(short_folder / "third"), SLURM_CONF=conf)
    assert f"SLURM_CONF={conf} is not this cluster" in said
    assert not (short_folder / "third").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"SYNTHOS_PRACTICE": "/tmp/" + "x" * 60}, "at most 60"),
        ({"SYNTHOS_PRACTICE": "/tmp/a#b"}, "at most 60"),
        ({"SYNTHOS_PRACTICE_PROCTRACK": "pgid"}, "linuxproc or cgroup"),
    ],
)
def test_settings_that_cannot_be(cluster: Cluster, short_folder: Path, settings: dict[str, str], words: str) -> None:
    third = short_folder / "third"
    assert words in refusal("up", **({"SYNTHOS_PRACTICE": str(third)} | settings))
    assert not third.exists()


def test_process_tracking_does_not_change_while_it_is_up(cluster: Cluster) -> None:
    used = (cluster.folder / "synthos-practice").read_text().split()[0]
    wish = {"cgroup": "linuxproc", "linuxproc": "cgroup"}[used]
    said = refusal("up", SYNTHOS_PRACTICE=str(cluster.folder), SYNTHOS_PRACTICE_PROCTRACK=wish)
    assert f"it is there with {used}" in said


@pytest.mark.usefixtures("cluster")
def test_missing_packages_are_named(tmp_path: Path) -> None:
    for tool in ("realpath", "bash"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    assert "not found: sinfo; install them with: apt-get install slurm-wlm munge" in refusal("up", PATH=str(tmp_path))


@pytest.mark.usefixtures("cluster")
def test_only_root(tmp_path: Path) -> None:
    command, script = ["bash", "-s", "up"], PRACTICE.read_text()
    env = {"PATH": os.environ["PATH"]}
    result = subprocess.run(command, input=script, env=env, capture_output=True, text=True, user=65534, cwd="/")
    assert (result.returncode, result.stdout) == (1, "")
    assert "only root can start a Slurm" in result.stderr and "user 65534" in result.stderr
