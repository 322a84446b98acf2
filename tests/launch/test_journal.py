"""The submit journal, without a Slurm; tests/slurm/test_snapshot.py kills a real submitter after sbatch."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

from launch import backends, journal
from launch.journal import FOLDER, IN_FLIGHT_SECONDS, intend, pending, settle
from launch.rundir import hold, lock
from tests.support import compose_for_test

SQUEUE = """#!/bin/sh
echo '{job} |0 |PENDING |Priority | |N/A |{output} '
"""
DIES = """
import os, signal, sys
from pathlib import Path
from launch.journal import intend
with intend(Path(sys.argv[1]), [*map(Path, sys.argv[2:])], array=len(sys.argv) > 3):
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


def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: Path | None, job: str = "41") -> None:
    """The answer of squeue, word for word as Slurm 22.05 gives it: one job that waits, or an empty queue."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text(SQUEUE.format(job=job, output=output) if output else "#!/bin/sh\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def test_a_submission_is_written_before_and_completed_after(folder: Path) -> None:
    runs = folder.parents[1]
    with intend(runs, [folder]) as intent:
        (open_one,) = (runs / FOLDER).iterdir()
        assert json.loads(open_one.read_text())["folders"] == [str(folder)] and open_one.suffix == ".intent"
        intent.complete("17")
    (record,) = records(runs)
    assert (record["folders"], record["job"], record["pid"]) == ([str(folder)], "17", os.getpid())
    assert (folder / "slurm" / "job").read_text() == "17" and len(list((runs / FOLDER).iterdir())) == 1


def test_what_slurm_refuses_leaves_nothing(folder: Path) -> None:
    with intend(folder.parents[1], [folder]) as intent:
        intent.refused()
    assert list((folder.parents[1] / FOLDER).iterdir()) == [] and not (folder / "slurm" / "job").exists()


def test_the_job_of_a_dead_submitter_is_adopted(
    folder: Path, abandoned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = folder.parents[1]
    queue(tmp_path, monkeypatch, folder / "slurm" / "41.out")
    assert pending(runs, folder) and not pending(runs, folder.with_name("another"))
    assert settle(runs) == [(folder, "41")]
    assert (folder / "slurm" / "job").read_text() == "41" and not abandoned.exists()
    assert [record["job"] for record in records(runs)] == ["41"]
    assert settle(runs) == [] and not pending(runs, folder)


def test_the_array_of_a_dead_submitter_is_adopted_by_any_of_its_elements(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, other = folder.parents[1], folder.with_name("i2i-5e6f7a8b")
    (other / "slurm").mkdir(parents=True)
    assert subprocess.run([sys.executable, "-c", DIES, runs, folder, other], timeout=60).returncode == -9
    sweep = folder.with_name(".sweep-0001")
    sweep.mkdir()
    (sweep / "1").symlink_to(f"../{other.name}")
    queue(tmp_path, monkeypatch, sweep / "%a" / "slurm" / "%A_%a.out", "41_1")
    assert pending(runs, folder) and pending(runs, other)
    assert settle(runs) == [(folder, "41_0"), (other, "41_1")] and not pending(runs, other)
    assert [(run / "slurm" / "job").read_text() for run in (folder, other)] == ["41_0", "41_1"]


def test_the_job_of_another_run_of_that_name_is_not_adopted(
    folder: Path, abandoned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue(tmp_path, monkeypatch, tmp_path / "elsewhere" / "i2i-1a2b3c4d" / "slurm" / "41.out")
    assert settle(folder.parents[1]) == [] and abandoned.exists()


@pytest.mark.parametrize(("told", "array"), [(["41"], False), (["50", "41_1"], True)])
def test_a_job_that_has_ended_is_adopted_by_what_it_wrote(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str], array: bool
) -> None:
    """Nobody looked while it was in the queue. An earlier job's id is no news, nor is one an element's successor."""
    runs, other = folder.parents[1], folder.with_name("i2i-5e6f7a8b")
    (other / "slurm").mkdir(parents=True)
    (folder / "slurm" / "job").write_text("39_0" if array else "40")
    folders = [folder, other][: len(told)]
    assert subprocess.run([sys.executable, "-c", DIES, runs, *folders], timeout=60).returncode == -9
    queue(tmp_path, monkeypatch, None)
    assert settle(runs) == [] and pending(runs, folder)
    for run, job in zip(folders, told, strict=True):
        (run / "slurm" / "job").write_text(job)
    assert settle(runs) == [(run, f"41_{index}" if array else "41") for index, run in enumerate(folders)]
    assert [record["job"] for record in records(runs)] == ["41"]


def test_a_submission_without_a_job_is_closed_when_none_can_come(
    folder: Path, abandoned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch outlives the process that called it, so at first its job may still come."""
    runs = folder.parents[1]
    queue(tmp_path, monkeypatch, None)
    assert settle(runs) == [] and abandoned.exists() and pending(runs, folder)
    then = time.time() - IN_FLIGHT_SECONDS - 1
    os.utime(abandoned, (then, then))
    assert settle(runs) == [] and not pending(runs, folder)
    assert [record["job"] for record in records(runs)] == [None] and not (folder / "slurm" / "job").exists()


def test_a_submission_that_another_command_settles_is_pending(folder: Path, abandoned: Path) -> None:
    with abandoned.open("r+") as file:
        assert lock(file)
        assert pending(folder.parents[1], folder)


def test_an_intent_settled_between_two_looks_is_none(
    folder: Path, abandoned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was opened before another command had settled it, and locked thereafter."""

    def late(file: IO[str]) -> bool:
        abandoned.unlink()
        return lock(file)

    queue(tmp_path, monkeypatch, None)
    monkeypatch.setattr(journal, "lock", late)
    assert settle(folder.parents[1]) == []


@pytest.mark.parametrize(
    ("said", "code", "open_intents"),
    [
        ("Batch job submission failed: Invalid account", 1, 0),
        ("Batch job submission failed: Unable to contact slurm controller (connect failure)", 1, 0),
        ("Batch job submission failed: Socket timed out on send/recv operation", 1, 1),
        ("Batch job submission failed: Zero Bytes were transmitted or received", 1, 1),
        ("Unable to contact slurm controller (receive failure)", 1, 1),
        ("a site's own words, without a number", 0, 1),
    ],
)  # fmt: skip
def test_a_submission_without_an_answer_is_not_forgotten(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    said: str, code: int, open_intents: int,
) -> None:  # fmt: skip
    queue(tmp_path, monkeypatch, folder / "slurm" / "41.out")
    for name, text in (("srun", ""), ("sbatch", f'cat <<"."\n{said}\n.\ncat >&2 <<"."\nsbatch: error: {said}\n.\n')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}exit {code}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    runs = folder.parents[1]
    config = compose_for_test("recipe=i2i", "model=tiny", "data=photos", "cluster=slurm", f"runs_dir={runs}")
    with hold(folder) as held:
        assert held is not None and backends.start(config, folder, held) == 1
        assert pending(runs, folder) == bool(open_intents)
    assert said in (told := capsys.readouterr().err) and (journal.WAIT in told) == bool(open_intents)
    assert len(list((runs / FOLDER).glob("*.intent"))) == open_intents
    assert settle(runs) == [(folder, "41")] * open_intents


def test_a_living_submitter_is_left_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue(tmp_path, monkeypatch, folder / "slurm" / "41.out")
    with intend(folder.parents[1], [folder]) as intent:
        assert settle(folder.parents[1]) == [] and intent.path.exists()
        intent.refused()


def test_a_machine_without_slurm_settles_nothing(
    folder: Path, abandoned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal.shutil, "which", lambda _: None)
    os.utime(abandoned, (0, 0))
    assert settle(folder.parents[1]) == [] and abandoned.exists()
