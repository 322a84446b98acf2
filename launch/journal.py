"""The submit journal: what was about to be submitted, so that no job is lost between sbatch and the record of its id.

`runs/.submits/<uuid>.intent` is written before sbatch is called, and becomes `<uuid>.json` with the id of the job. An
intent whose submitter has died is settled by the next command that submits: its job is found in the queue by the file
that it prints to, or by the id that it has written into the run folder, and adopted. It needs nobody to run. An array
is one submission of several runs.
"""

import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch import squeue
from launch.rundir import lock
from synthos.files import read_json, write_json

FOLDER = ".submits"  # in runs_dir
IN_FLIGHT_SECONDS = 60  # so long a submission may take effect whose submitter has died
WAIT = f"whether Slurm has its job is known {IN_FLIGHT_SECONDS} s later: try again then"


class Intent:
    """One submission, from before sbatch to its record."""

    def __init__(self, path: Path, said: dict[str, Any]) -> None:
        self.path, self.said = path, said

    @property
    def folders(self) -> list[Path]:
        """The runs; of an array in the order of its elements."""
        return [Path(folder) for folder in self.said["folders"]]

    def complete(self, job: str) -> list[tuple[Path, str]]:
        """Record the job, in the journal and in the run folders; returns these, each with its own job."""
        jobs = [(folder, f"{job}_{index}" if self.said["array"] else job) for index, folder in enumerate(self.folders)]
        for folder, own in jobs:
            (folder / "slurm" / "job").write_text(own)
        self._settle({"job": job})
        return jobs

    def refused(self) -> None:
        """Slurm did not take it: there is nothing to remember."""
        self.path.unlink()

    def _settle(self, found: dict[str, Any]) -> None:
        write_json(self.path.with_suffix(".json"), {**self.said, **found, "settled": _now()})
        self.path.unlink(missing_ok=True)


@contextmanager
def intend(runs_dir: Path, folders: Sequence[Path], array: bool = False) -> Iterator[Intent]:
    """Write down that the job of a run, or the `array` of several, is about to be submitted.

    The kernel's lock on the file says that its submitter lives. What ends without `complete` or `refused` stays open.
    """
    said = {
        "folders": [*map(str, folders)],
        "array": array,
        "before": [*map(_told, folders)],
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "begun": _now(),
    }
    path = runs_dir / FOLDER / f"{uuid.uuid4().hex}.intent"
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w") as file:
        file.write(json.dumps(said, indent=1))
        file.flush()
        lock(file)
        part.rename(path)
        yield Intent(path, said)


def settle(runs_dir: Path) -> list[tuple[Path, str]]:
    """Settle what dead submitters have left open; returns the run folders that were given their job, and its id.

    Raises RuntimeError where Slurm does not answer.
    """
    adopted: list[tuple[Path, str]] = []
    if not shutil.which("squeue"):  # the runs may be seen from a machine without Slurm
        return adopted
    for intent in _abandoned(runs_dir):
        if found := _find(intent):
            adopted += intent.complete(found)
        elif not _in_flight(intent):
            intent._settle({"job": None})
    return adopted


def pending(runs_dir: Path, folder: Path) -> bool:
    """Whether a submission of this run was cut short just now, so that its job may still appear in the queue.

    For the holder of the run's lock: then the submitter of every intent is dead, also of one that another command has
    locked to settle it.
    """
    intents = (read_json(path) for path in (runs_dir / FOLDER).glob("*.intent"))
    return any(str(folder) in said.get("folders", []) for said in intents)


def _find(intent: Intent) -> str | None:
    """The job of a submission, or its array, as far as it is in the queue or has begun."""
    queue = squeue.jobs_of(intent.folders)
    for index, (folder, before) in enumerate(zip(intent.folders, intent.said["before"], strict=True)):
        for job in (*(one.job for one in queue.of(folder)), _told(folder)):
            array, _, element = job.partition("_")
            if job not in ("", before) and element == (str(index) if intent.said["array"] else ""):
                return array
    return None


def _told(folder: Path) -> str:
    """The id of the last job that is known to a run."""
    try:
        return (folder / "slurm" / "job").read_text()
    except FileNotFoundError:
        return ""


def _abandoned(runs_dir: Path) -> Iterator[Intent]:
    for path in sorted((runs_dir / FOLDER).glob("*.intent")):
        try:
            with path.open("r+") as file:
                if lock(file) and (said := read_json(path)):  # empty: settled before it was locked
                    yield Intent(path, said)
        except FileNotFoundError:  # it has just been settled
            continue


def _in_flight(intent: Intent) -> bool:
    return time.time() - intent.path.stat().st_mtime < IN_FLIGHT_SECONDS


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
