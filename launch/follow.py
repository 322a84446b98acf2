"""A submitted run as it goes: what its job prints, its progress, and how it ended."""

import codecs
import sys
import time
from pathlib import Path

from launch import attempts, render, requeue, slurm
from launch.rundir import read_state
from launch.screen import Screen

POLL_SECONDS = 0.5
QUEUE_SECONDS = 5  # between two questions to Slurm


def follow(folder: Path, job: str) -> int:
    """Show the job until it leaves the queue; returns the run's exit code. Ctrl-C ends the showing, not the job."""
    try:
        _show(folder, job)
    except KeyboardInterrupt:
        print(f"\njob {job} goes on; stop the run with: synthos stop {folder}", file=sys.stderr)
        return 0
    verdict = read_state(folder).verdict
    record = attempts.newest_record(folder)
    if not record.get("job", "").startswith(f"{job}.") or verdict.get("attempt") != record["attempt"]:
        print(f"job {job} left the queue without a verdict; see {folder / 'slurm'}", file=sys.stderr)
        return 1
    following = record.get("next", {})  # none where the job was killed before it could decide
    why = f"; {following['decision']}: {following['reason']}" if following else ""
    print(f"job {job}: {verdict['status']} at step {verdict['step']}{why}")
    return attempts.exit_code(verdict) or int(bool(following) and requeue.is_undone(record))


def _show(folder: Path, job: str) -> None:
    """Print the job's output as it grows, and what the queue says whenever that changes."""
    log = render.output(folder, job)
    screen, decoder = Screen(folder), codecs.getincrementaldecoder("utf-8")("replace")
    shown, asked, said, ended = 0, float("-inf"), "", False
    while not ended:
        if time.monotonic() - asked > QUEUE_SECONDS:
            state, ended = _ask(job)
            asked = time.monotonic()
            if state != said:
                said = state
                screen.show(state)
        text = log.read_bytes()[shown:] if log.exists() else b""  # after the question, so that the end is not missed
        shown += len(text)
        screen.show(decoder.decode(text))
        time.sleep(POLL_SECONDS)
    screen.close()


def _ask(job: str) -> tuple[str, bool]:
    """What the queue says of a job, as a line, and whether the job has ended."""
    try:
        found = slurm.queued(job)
    except RuntimeError as error:  # a busy controller says nothing of the job
        return f"job {job}: {error}\n", False
    return (f"job {job}: {found.state} ({found.detail})\n", False) if found else ("", True)
