"""The jobs of many runs by one question to Slurm."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import slurm

FIELDS = ("JobArrayID:60", "RestartCnt:10", "State:30", "Reason:100", "NodeList:200", "StartTime:30", "STDOUT:1000")


@dataclass(frozen=True)
class Job:
    """A job that has not ended.

    Attributes:
        job: its id; of an array's element as in 17_3.
        start: its id and how often it was requeued, as attempts record it: 17.0.
        state: as in PENDING, RUNNING.
        reason: why it is pending, in Slurm's word.
        nodes: that it runs on.
        begins: when it began, or is expected to; empty where nobody knows.
    """

    job: str
    start: str
    state: str
    reason: str
    nodes: str
    begins: str

    @property
    def detail(self) -> str:
        """Its nodes, or why it is pending."""
        return self.nodes or self.reason

    @property
    def pending(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")


class Queue:
    """What Slurm says of the jobs of some runs.

    Attributes:
        problem: why it could not be asked; empty where it was.
    """

    def __init__(self, jobs: dict[Path, list[Job]], problem: str = "") -> None:
        self.jobs, self.problem = jobs, problem

    def of(self, folder: Path) -> list[Job]:
        """The jobs of a run that have not ended."""
        return self.jobs.get(folder.resolve(), [])


def ask(folders: Sequence[Path]) -> Queue:
    """One squeue for the jobs of all these runs, without Slurm's accounting; none where no run was ever submitted.

    A job is known by the file that it prints to, `slurm/` of its run folder.
    """
    submitted = [folder for folder in folders if os.path.isdir(folder / "slurm")]
    if not submitted:
        return Queue({})
    if not shutil.which("squeue"):
        return Queue({}, "there is no squeue on PATH here: whether jobs wait or run is not known")
    owners = sorted({str(folder.stat().st_uid) for folder in submitted})
    command = ["squeue", "--noheader", "--array", "--states=all", f"--user={','.join(owners)}"]
    try:
        done = slurm.ask([*command, "--Format=" + "".join(f"{field}|," for field in FIELDS).rstrip(",")])
    except RuntimeError as error:
        return Queue({}, str(error))
    if done.returncode:
        return Queue({}, f"squeue: {slurm.words(done.stderr)}")
    jobs: dict[Path, list[Job]] = {}
    for line in done.stdout.splitlines():
        name, restarts, state, reason, nodes, begins, output = (p.strip() for p in line.split("|", 6))
        if state not in slurm.ENDED:
            job = Job(name, f"{name}.{restarts}", state, reason, nodes, "" if begins == "N/A" else begins)
            # Of an element squeue leaves its index to be filled in, also when it runs.
            file = output.rstrip("|").replace("%a", name.partition("_")[2])
            jobs.setdefault(Path(file).parent.parent.resolve(), []).append(job)
    return Queue(jobs)


def job_of(folder: Path) -> Job | None:
    """The job of a run, while it is in the queue. Raises RuntimeError where Slurm does not answer."""
    return next(iter(jobs_of([folder]).of(folder)), None)


def jobs_of(folders: Sequence[Path]) -> Queue:
    """As `ask`, but RuntimeError where Slurm does not answer; where there is none, nobody can have a job."""
    queue = ask(folders) if shutil.which("squeue") else Queue({})
    if queue.problem:
        raise RuntimeError(queue.problem)
    return queue
