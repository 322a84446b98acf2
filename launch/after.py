"""`after=RUN`: a job that Slurm starts when the job of another run has ended well."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from launch import squeue
from launch.look import look
from launch.rundir import read_state
from launch.runs import find_one
from synthos.schema import JobConfig, read_job


@dataclass(frozen=True)
class After:
    """What a job waits for.

    Attributes:
        run: the folder of the run that must be done first.
        job: its job; empty where it is done already.
    """

    run: Path
    job: str

    def describe(self) -> str:
        return (
            f"job {self.job} of {self.run.name}, once that is done" if self.job else f"{self.run.name}, which is done"
        )


def find_after(word: str | None, config: JobConfig, root: Path) -> After | None:
    """The run below `root` that `after` names, and its job. Raises ValueError where it is not done and has no job.

    So it does for a run whose every attempt is another job: of none of them Slurm can tell that the run is done.
    """
    if word is None:
        return None
    run = find_one(word, root)
    if read_state(run).done:
        return After(run, "")
    queue = squeue.ask([run])
    if queue.problem:
        raise ValueError(f"after: whether {run.name} has a job is not known: {queue.problem}")
    if not (jobs := queue.of(run)):
        one = look(run, queue)
        why = f" ({one.detail})" if one.detail else ""
        raise ValueError(
            f"after: {run.name} is {one.state}{why} and has no job; expected a run that is done, or whose job waits or "
            f"runs: synthos resume {run.name}"
        )
    if read_job(run / "config.yaml").cluster.requeue == "chain":
        raise ValueError(
            f"after: {run.name} has cluster.requeue=chain: its next attempt is another job, so the end of one does not "
            "mean that it is done; expected a run with cluster.requeue=scontrol or none"
        )
    if config.cluster.backend not in ("submitit", "sbatch"):
        raise ValueError(
            f"after: {run.name} is not done, and with cluster.backend={config.cluster.backend} nothing waits for its "
            f"job {jobs[0].job}; expected a Slurm cluster, or a run that is done"
        )
    return After(run, jobs[0].job)


def waiting(config: JobConfig, after: After | None) -> JobConfig:
    """The config of a job that waits; the run folder keeps the other one, for another attempt waits for nothing."""
    if after is None or not after.job:
        return config
    own = config.cluster.sbatch.get("dependency")
    dependency = ",".join(filter(None, [own, f"afterok:{after.job}"]))
    sbatch = {**config.cluster.sbatch, "dependency": dependency}
    return dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, sbatch=sbatch))
