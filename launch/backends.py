"""How a run starts: in this process, by torchrun on this machine, or by Slurm. `cluster.backend` names the function."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from launch import agent, attempts, journal, render, requeue, slurm
from synthos.schema import JobConfig

# Slurm's words for an answer that did not arrive; the job may be in the queue all the same.
UNANSWERED = re.compile("timed out|(send|receive|shutdown) failure|zero bytes|reset by peer", re.IGNORECASE)


def start(config: JobConfig, folder: Path, lock: IO[str]) -> int:
    """Run one attempt, or submit it, with the config's back end, while holding the run's `lock`.

    Returns the exit code; a submission's is 0 once Slurm has taken the job, which is recorded in `slurm/job`.
    """
    return BACKENDS[config.cluster.backend](config, folder, lock)


def debug(config: JobConfig, folder: Path, lock: IO[str]) -> int:
    """In this process, on one device: breakpoints work, and errors of the code raise."""
    import synthos.run

    attempt = attempts.begin(folder, ["synthos.run.main", str(folder)])
    try:
        synthos.run.main(folder, attempt)
    finally:
        verdict = attempts.end(folder, attempt)
    print(attempts.describe(verdict))
    return attempts.exit_code(verdict)


def local(config: JobConfig, folder: Path, lock: IO[str]) -> int:
    """One rank per device of this machine; after a crash again, as often as `cluster.max_crashes` allows."""
    while True:
        code = agent.run(folder, keep_open=[lock.fileno()])
        if requeue.after(folder, config.cluster).decision != "restart":
            return code


def submitit(config: JobConfig, folder: Path, lock: IO[str]) -> int:
    """A job of one agent per node, whose only argument is the run folder: nothing is pickled."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    (folder / "slurm").mkdir(exist_ok=True)
    (folder / "slurm" / "job.sh").write_text(render.job_file(config, folder))  # for a successor
    with journal.intend(Path(config.runs_dir), [folder]) as intent:
        try:
            with environment(render.clean(config.cluster, os.environ)):
                job = executor(config, folder)._submit_command("")  # it stands in the script
        except (FailedJobError, FailedSubmissionError) as error:
            said = slurm.words(str(error))
            if isinstance(error, FailedJobError) and not UNANSWERED.search(said):
                intent.refused()
            else:
                said += f"; {journal.WAIT}"
            print(f"error: sbatch: {said}", file=sys.stderr)
            return 1
        intent.complete(job.job_id)
    print(f"submitted job {job.job_id} of {folder}")
    print(f"follow it: synthos logs -f {folder}")
    print(f"stop it:   synthos stop {folder}")
    return 0


def executor(config: JobConfig, folder: Path) -> Any:
    """submitit's executor, with the very script that a dry run shows."""
    from submitit import SlurmExecutor

    class Executor(SlurmExecutor):
        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return render.batch_script(config, folder)

    return Executor(folder / "slurm")


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """The environment of this process, and of what it starts, is just this; then the former one again."""
    former = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(variables)
        yield
    finally:
        os.environ.clear()
        os.environ.update(former)


def sbatch(config: JobConfig, folder: Path, lock: IO[str]) -> int:
    """Nothing but the line to type: for sites where submitit is not wanted."""
    (folder / "slurm").mkdir(exist_ok=True)
    (folder / "slurm" / "job.sh").write_text(render.job_file(config, folder))
    print(f"stop it:   synthos stop {folder}\nfollow it: synthos logs -f {folder}")
    print(f"prepared {folder}; start it with\n{render.sbatch_line(config, folder, os.environ)}")
    return 0


BACKENDS: dict[str, Callable[[JobConfig, Path, IO[str]], int]] = {
    "debug": debug,
    "local": local,
    "submitit": submitit,
    "sbatch": sbatch,
}
