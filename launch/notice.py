"""The notice of a job's time limit: when it comes, and how long the ranks have from then on to save.

Slurm sends it as early as the submission asked for, by the save that was measured then. One that has become slower
since, or was measured for the first time, needs an earlier one, which the first agent gives.
"""

import math
import os
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from launch import render, slurm
from launch.place import job_id
from synthos.files import read_cause, read_json
from synthos.schema import ClusterConfig

LIMIT_SLACK_SECONDS = 120  # Slurm's notice comes up to a minute early
ASK_SECONDS = 60  # between two questions to Slurm about a limit, which an administrator may have moved
GIVEN = "seconds_before_limit"  # in control/stop, of a notice that an agent gave


def notice_seconds(folder: Path, cluster: ClusterConfig) -> float:
    """How long before its limit this job hears of it, or has heard."""
    stop = folder / "control" / "stop"
    given = read_json(stop).get(GIVEN, 0) if read_cause(stop) == "notice" else 0
    return max(_by_slurm(), given, render.notice_seconds(cluster, render.save_seconds(folder)))


def seconds_left(job: slurm.Job | None, notice: float) -> float:
    """Until a notice of so many seconds may come, or negative since then."""
    if job is None or job.ends is None:
        return math.inf
    return (job.ends - datetime.now()).total_seconds() - notice - LIMIT_SLACK_SECONDS


@dataclass
class Limit:
    """The time limit of this job, as its first agent keeps it in mind.

    Attributes:
        ends: when it is reached, as Slurm has told; None where there is none, or it could not be asked.
        asked: when Slurm was asked, by a monotonic clock.
    """

    folder: Path
    cluster: ClusterConfig
    ends: datetime | None = None
    asked: float = -math.inf

    def due(self) -> float:
        """How many seconds before the limit it is high time for a notice; 0 while it is not, or Slurm gives it."""
        wanted = render.notice_seconds(self.cluster, render.save_seconds(self.folder))
        if wanted <= _by_slurm():
            return 0
        if time.monotonic() - self.asked > ASK_SECONDS:
            self._ask()
        late = self.ends is not None and (self.ends - datetime.now()).total_seconds() < wanted
        return wanted if late else 0

    def seconds_to_save(self) -> float:
        """How long the ranks, which have got a notice, may go on: they must end before the limit, or nothing is
        requeued. A job that is to make room is requeued by Slurm; its end is no limit.
        """
        self._ask()
        if self.ends is None:
            return math.inf
        notice = notice_seconds(self.folder, self.cluster)
        return (self.ends - datetime.now()).total_seconds() - notice + render.seconds_to_save(notice)

    def _ask(self) -> None:
        self.asked = time.monotonic()
        try:
            job = slurm.show(job_id(os.environ))
        except RuntimeError:
            self.ends = None
        else:
            self.ends = None if job.preempted else job.ends


def _by_slurm() -> float:
    """The notice that this job was submitted with."""
    return float(os.environ.get(render.NOTICE) or 0)
