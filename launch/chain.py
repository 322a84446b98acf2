"""Jobs of which each first queues the one that goes on after it (`cluster.requeue=chain`)."""

import os
import re
import sys
from pathlib import Path

from launch import attempts, render, slurm, squeue
from launch.place import job_id, job_start
from launch.rundir import read_state
from synthos.files import read_json, write_json
from synthos.schema import JobConfig, read_job

FOLLOWS = "SYNTHOS_FOLLOWS"  # the job that this one was queued by, which may have died before it could write that down


def queue(folder: Path) -> int:
    """Queue the job that goes on when this one has ended, however it ends; render.NOTHING_LEFT where it is done."""
    config, start = read_job(folder / "config.yaml"), job_start(os.environ)
    said = read_json(folder / "control" / "successor.json")
    own, former = start.split(".")[0], os.environ.get(FOLLOWS)
    ours = said.get("job") == own  # this job is itself a successor, and known as one
    ended = attempts.newest_record(folder).get("next", {}).get("decision") == "end"
    if read_state(folder).done or ((ours or former) and ended):
        print(f"{folder}: nothing is left to do")
        return render.NOTHING_LEFT
    if ours:
        (folder / "slurm" / "job").write_text(str(said["job"]))
    (folder / "slurm" / "job.sh").write_text(render.job_file(config, folder))  # with the notice of the successor
    environment = {**render.clean(config.cluster, os.environ), FOLLOWS: own}
    try:
        job = slurm.order(successor(config, folder, job_id(os.environ)), environment)
    except RuntimeError as error:
        if (found := unanswered(folder, own)) is None:
            print(f"error: no successor is queued: {error}", file=sys.stderr)
            return 0
        job = found
    # `after` is for the ledger: which job this one follows, should that have been lost.
    after = former or (said["of"] if ours else None)
    told = {"job": job.split(";")[0], "of": own, "after": after}
    write_json(folder / "control" / "successor.json", told)
    print(f"job {job} goes on after this one")
    return 0


def successor(config: JobConfig, folder: Path, job: str) -> list[str]:
    """The sbatch command of the job that follows `job`."""
    first, *more = render.sbatch(config, folder)
    kept = [word for word in more if not word.startswith("--dependency=")]  # what the first job waited for is over
    return [first, "--parsable", f"--dependency=afterany:{job}", *kept]


def waiting(folder: Path, start: str) -> str | None:
    """The job that waits to go on after this start of a job."""
    said = read_json(folder / "control" / "successor.json")
    return str(said["job"]) if said.get("of") == start.split(".")[0] else None


def unanswered(folder: Path, own: str) -> str | None:
    """The successor of a job that Slurm has taken though sbatch did not say so: it waits for that job, and no other."""
    try:
        waiting = [one.job for one in squeue.jobs_of([folder]).of(folder) if one.pending and one.job != own]
        told = {job: slurm.order(["scontrol", "--oneliner", "show", "job", job]) for job in waiting}
    except RuntimeError:
        return None
    this_one = re.compile(rf"Dependency=afterany:{own}(?![\d_])")
    return next((job for job, words in told.items() if this_one.search(words)), None)
