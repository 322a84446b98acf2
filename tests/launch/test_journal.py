"""The submit journal, without a Slurm; tests/slurm/test_snapshot.py kills a real submitter after sbatch."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import journal
from launch.journal import FOLDER, IN_FLIGHT_SECONDS, intend, pending, settle

SQUEUE = """#!/bin/sh
case "$*" in
  *--name=*) echo 41 ;;
  *) echo "PENDING||Priority" ;;
esac
"""
DIES = """
import os, signal, sys
from pathlib import Path
from launch.journal import intend
with intend(Path(sys.argv[1]), Path(sys.argv[2])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "runs" / "i2i" / "i2i-1a2b3c4d"
    (made / "slurm").mkdir(parents=True)
    return made


@pytest.fixture
def abandoned(folder: Path) -> Path:
    """The intent of a submitter that was killed."""
    runs = folder.parents[1]
    done = subprocess.run([sys.executable, "-c", DIES, runs, folder], timeout=60)
    assert done.returncode == -9
    (path,) = (runs / FOLDER).glob("*.intent")
    return path


def records(runs: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in (runs / FOLDER).glob("*.json")]


def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: str, output: Path | None = None) -> None:
    """Answers of Slurm's commands, word for word as Slurm 22.05 gives them."""
    (tmp_path / "bin").mkdir()
    for name, text in (("squeue", squeue), ("scontrol", f"#!/bin/sh\necho '   StdOut={output}'\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def test_a_submission_is_written_before_and_completed_after(folder: Path) -> None:
    runs = folder.parents[1]
    with intend(runs, folder) as intent:
        (open_one,) = (runs / FOLDER).iterdir()
        assert json.loads(open_one.read_text())["folder"] == str(folder) and open_one.suffix == ".intent"
        assert not pending(runs, folder)  # its submitter lives
        intent.complete("17")
    (record,) = records(runs)
    assert (record["folder"], record["job"], record["pid"]) == (str(folder), "17", os.getpid())
    assert (folder / "slurm" / "job").read_text() == "17" and len(list((runs / FOLDER).iterdir())) == 1


def test_what_slurm_refuses_leaves_nothing(folder: Path) -> None:
    with intend(folder.parents[1], folder) as intent:
        intent.refused()
    assert list((folder.parents[1] / FOLDER).iterdir()) == [] and not (folder / "slurm" / "job").exists()


def test_the_job_of_a_dead_submitter_is_adopted(
    folder: Path, abandoned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = folder.parents[1]
    (folder / "slurm" / "0123abcd.pkl").write_text("the job")
    (folder / "slurm" / "40_submitted.pkl").write_text("an earlier job")
    queue(tmp_path, monkeypatch, SQUEUE, folder / "slurm" / "41.out")
    assert pending(runs, folder) and not pending(runs, folder.with_name("another"))
    assert settle(runs) == [(folder, "41")]
    assert (folder / "slurm" / "job").read_text() == "41" and not abandoned.exists()
    assert (folder / "slurm" / "41_submitted.pkl").read_text() == "the job"
    assert [record["job"] for record in records(runs)] == ["41"]
    assert settle(runs) == [] and not pending(runs, folder)


def test_the_job_of_another_run_of_that_name_is_not_adopted(
    folder: Path, abandoned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue(tmp_path, monkeypatch, SQUEUE, tmp_path / "elsewhere" / "i2i-1a2b3c4d" / "slurm" / "41.out")
    assert settle(folder.parents[1]) == [] and abandoned.exists()


def test_a_submission_without_a_job_is_closed_when_none_can_come(
    folder: Path, abandoned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch outlives the process that called it, so at first its job may still come."""
    runs = folder.parents[1]
    queue(tmp_path, monkeypatch, "#!/bin/sh\n")
    assert settle(runs) == [] and abandoned.exists() and pending(runs, folder)
    then = time.time() - IN_FLIGHT_SECONDS - 1
    os.utime(abandoned, (then, then))
    assert settle(runs) == [] and not pending(runs, folder)
    assert [record["job"] for record in records(runs)] == [None] and not (folder / "slurm" / "job").exists()


def test_a_living_submitter_is_left_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue(tmp_path, monkeypatch, SQUEUE, folder / "slurm" / "41.out")
    with intend(folder.parents[1], folder) as intent:
        assert settle(folder.parents[1]) == [] and intent.path.exists()
        intent.refused()


def test_a_machine_without_slurm_settles_nothing(
    folder: Path, abandoned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal.shutil, "which", lambda _: None)
    os.utime(abandoned, (0, 0))
    assert settle(folder.parents[1]) == [] and abandoned.exists()
