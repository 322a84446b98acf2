"""The notice of a job's time limit: when it comes, and how long the ranks have from then on to save.

Slurm sends it as early as the submission asked for, by the save that was measured then. One that has become slower
since, or was measured for the first time, needs an earlier one, which the first agent gives.
"""

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

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
    return job.ends.timestamp() - time.time() - notice - LIMIT_SLACK_SECONDS


@dataclass
class Limit:
    """The time limit of this job, as its first agent keeps it in mind.

    Attributes:
        job: what Slurm has told of it last; None before that.
        asked: when it was asked, by a monotonic clock.
        asking: waits for its answer; a controller may be silent for a minute, and the agent has other things to do.
    """

    folder: Path
    cluster: ClusterConfig
    job: slurm.Job | None = None
    asked: float = -math.inf
    asking: Thread = field(default_factory=Thread)

    def due(self) -> float:
        """How many seconds before the limit it is high time for a notice; 0 while it is not, or Slurm gives it."""
        wanted = render.notice_seconds(self.cluster, render.save_seconds(self.folder))
        if wanted <= _by_slurm():
            return 0
        if time.monotonic() - self.asked > ASK_SECONDS and not self.asking.is_alive():
            self.asked = time.monotonic()
            self.asking = Thread(target=self._ask, daemon=True)
            self.asking.start()
        if (left := self.seconds_left) == math.inf:
            return 0
        # The limit may be the partition's own, or an administrator's: half of it is for training in any case.
        if self.job and self.job.begins:
            wanted = min(wanted, int(left + time.time() - self.job.begins.timestamp()) // 2)
        return wanted if left < wanted else 0

    @property
    def seconds_left(self) -> float:
        """Until the limit, as far as is known; a job that is to make room is requeued by Slurm, so its end is none."""
        if self.job is None or self.job.ends is None or self.job.preempted:
            return math.inf
        return self.job.ends.timestamp() - time.time()

    def seconds_to_save(self) -> float:
        """How long the ranks, which have got a notice, may go on: they must end before the limit, or nothing is
        requeued.
        """
        self._ask()
        notice = notice_seconds(self.folder, self.cluster)
        return self.seconds_left - notice + render.seconds_to_save(notice)

    def _ask(self) -> None:
        try:
            self.job = slurm.show(job_id(os.environ))
        except RuntimeError:  # what it has told before still holds
            return


def _by_slurm() -> float:
    """The notice that this job was submitted with."""
    return float(os.environ.get(render.NOTICE) or 0)
