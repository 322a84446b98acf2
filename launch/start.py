"""From a plan to a run: the folder is held and opened, and the back end starts it. The same for every stage."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from launch import backends, journal
from launch.attempts import newest_record, started_by_hand
from launch.follow import follow
from launch.rundir import hold, read_state
from launch.squeue import job_of
from synthos.schema import JobConfig

HOLD_SECONDS = 2  # a command that looks at the lock has it for a moment


def start(config: JobConfig, folder: Path, prepare: Callable[[], None], following: bool) -> int:
    """Run or submit the job of `folder`; returns the exit code, 0 also where that is done or under way already.

    Args:
        config: of the job.
        folder: its run folder, which need not exist.
        prepare: writes the folder; called while it is held, and only if something is to be started.
        following: show a submitted job until it ends.
    """
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(hold(folder, HOLD_SECONDS))
        except ValueError as error:  # the one fault of the user that only trying tells
            print(f"error: {error}", file=sys.stderr)
            return 2
        try:
            settle(Path(config.runs_dir))
            # Before the queue is asked: where another command settles it meanwhile, the job is found there.
            cut_short = lock is not None and journal.pending(Path(config.runs_dir), folder)
            queued = job_of(folder)
        except RuntimeError as error:  # nothing is started that may be running already
            print(f"error: whether {folder} has a job already is not known: {error}", file=sys.stderr)
            return 1
        if queued:
            print(f"{folder} has job {queued.job} already, {queued.state} ({queued.detail})", file=sys.stderr)
        elif lock is None:
            record = newest_record(folder)
            by = f" (attempt {record['attempt']} on {record['host']}, process {record['pid']})" if record else ""
            print(f"{folder} is running already{by}", file=sys.stderr)
        elif cut_short:
            print(f"error: a submission of {folder} was just cut short; {journal.WAIT}", file=sys.stderr)
            return 1
        else:
            state = read_state(folder)  # again: now nobody else can change it
            if state.done:
                print(f"{folder} is done" + (f"; its weights are in {state.weights}" if state.weights else ""))
                return 0
            clear(folder)
            try:
                prepare()
            except (RuntimeError, OSError) as error:
                print(f"error: {folder} can't be prepared: {error}", file=sys.stderr)
                return 1
            code = backends.start(config, folder, lock)
            if code or not following:
                return code
    if following and (queued or lock):  # the lock is free for the job now
        return follow(folder, queued.job if queued else (folder / "slurm" / "job").read_text())
    return 0


def clear(folder: Path) -> None:
    """Remove what an earlier start has left for the next attempt to read; what follows has budgets of its own."""
    for earlier in ("stop", "meeting.json"):
        (folder / "control" / earlier).unlink(missing_ok=True)
    started_by_hand(folder)


def settle(runs_dir: Path) -> None:
    """Settle the submit journal, and say what was found."""
    for folder, job in journal.settle(runs_dir):
        print(f"job {job} of {folder} is recorded now: its submission was cut short", file=sys.stderr)
