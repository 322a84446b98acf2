"""What will happen to a job: the signals that reach it, and whether a save fits between them and its end."""

from dataclasses import dataclass

from launch.render import seconds_to_save
from launch.site import Partition, Site
from launch.tell import duration

AGAIN = {  # by cluster.requeue
    "scontrol": "Slurm starts the job again",
    "chain": "the next job of the chain goes on",
    "none": "the run ends, since cluster.requeue is none",
}


@dataclass(frozen=True)
class Ending:
    """One way in which Slurm ends a job.

    Attributes:
        cause: time limit, preemption, cancel, node failure.
        signal: the first that arrives; empty where none does.
        seconds: from there to SIGKILL, at least; at a time limit our agent kills, for a requeue takes time as well.
        then: what Slurm does with the job.
    """

    cause: str
    signal: str
    seconds: int
    then: str

    def fits(self, save_seconds: float | None, step_seconds: float | None) -> bool | None:
        """Whether a step, a save under way and the last one fit; None where it is not known how long they take."""
        if save_seconds is None:
            return None
        return self.seconds >= 2 * save_seconds + (step_seconds or 0.0)

    def words(self) -> str:
        if not self.signal:
            return f"no signal; {self.then}"
        return f"{self.signal}, SIGKILL {duration(self.seconds)} later; {self.then}"


def endings(site: Site, partition: Partition | None, notice_seconds: int, requeue: str) -> list[Ending]:
    """How jobs of a partition end that get SIGUSR2 so long before their limit, with a `cluster.requeue`."""
    again = AGAIN[requeue]
    wait = site.kill_wait_seconds
    found = [
        Ending("time limit", "SIGUSR2", int(seconds_to_save(notice_seconds)), again),
        Ending("cancel", "SIGTERM", wait, "Slurm ends the job"),
    ]
    if partition and preemptible(site, partition):
        signal = "SIGUSR2" if site.user_signal else "SIGTERM"
        mode = partition.preempt_mode.split(",")[-1]
        then = again if mode == "REQUEUE" else f"the job is preempted ({mode})"
        found.append(Ending("preemption", signal, partition.grace_seconds + wait, then))
    return [*found, Ending("node failure", "", 0, again)]


def preemptible(site: Site, partition: Partition) -> bool:
    """Whether other jobs may take this partition's nodes from its jobs."""
    kind = site.settings.get("PreemptType", "")
    if kind in ("", "preempt/none") or partition.preempt_mode in ("OFF", ""):
        return False
    return "partition" not in kind or any(other.tier > partition.tier for other in site.partitions)
