"""A practice cluster of these tests' own: four nodes of a real Slurm, beside any other that runs on this machine."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import ROOT, environment

PRACTICE = ROOT / "slurm" / "practice.sh"
NEEDED = ("sbatch", "slurmctld", "slurmd", "munged")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.slurm)


@dataclass(frozen=True)
class Cluster:
    """A practice cluster in `folder`; `env` is the environment of a shell that is pointed at it."""

    folder: Path
    env: dict[str, str]

    def run(self, *command: str | Path, timeout: float = 60, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command as a user of the cluster; one that fails is an error unless `check` is off."""
        result = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout)
        assert result.returncode == 0 or not check, f"{command} exits with {result.returncode}: {result.stderr}"
        return result

    def practice(self, verb: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run practice.sh on it."""
        return self.run(PRACTICE, verb, timeout=120, check=check)

    def submit(self, *arguments: str) -> str:
        """The id of a job that sbatch queues; its output goes to the job's id in the cluster's folder."""
        output = f"--output={self.folder}/%j.out"
        return self.run("sbatch", "--parsable", output, *arguments).stdout.strip()

    def output(self, job: str) -> list[str]:
        """The lines that a job has written."""
        path = self.folder / f"{job}.out"
        return path.read_text().splitlines() if path.exists() else []


def cluster_in(folder: Path) -> Cluster:
    """A cluster that is not up yet, without the Slurm that this process may itself run under."""
    leftovers = ("SBATCH_", "SRUN_", "SALLOC_")
    env = {k: v for k, v in environment().items() if not k.startswith(leftovers)}
    return Cluster(folder, env | {"SYNTHOS_PRACTICE": str(folder), "SLURM_CONF": str(folder / "slurm.conf")})


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait for the scheduler; fails with `what` after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.2)


def _why_not() -> str | None:
    """Why no Slurm can be started here."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [tool for tool in NEEDED if shutil.which(tool, path=path) is None]
    if missing:
        return f"no {', '.join(missing)} on PATH"
    return None if os.geteuid() == 0 else "only root can start one"


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """A folder whose path is short enough for sockets, which pytest's own is not."""
    with tempfile.TemporaryDirectory(prefix="synthos-slurm-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def cluster(short_folder: Path) -> Iterator[Cluster]:
    """A cluster for the whole session; skipped where there is no Slurm, unless SYNTHOS_REQUIRE_SLURM=1."""
    why_not = _why_not()
    if why_not is not None and os.environ.get("SYNTHOS_REQUIRE_SLURM") == "1":
        pytest.fail(f"SYNTHOS_REQUIRE_SLURM=1, but {why_not}")
    if why_not is not None:
        pytest.skip(f"Slurm missing: skipped ({why_not})")
    cluster = cluster_in(short_folder / "one")
    try:
        cluster.practice("up")
        yield cluster
    finally:
        cluster.practice("down")
