"""`synthos stop`: save and end. `synthos cancel`: end now. Both for runs whose job still waits, too."""

import getpass
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launch import slurm, squeue
from launch.attempts import CANCELLED
from launch.look import Look, look
from launch.rundir import holders
from launch.runs import find_several
from launch.tell import Undone, new_parser, print_json
from synthos.files import write_json

WHEN = {
    "queued": "it ends as soon as it has started",
    "unknown": "it saves and ends, or ends as soon as it has started; whether it runs Slurm can't be asked",
}


def main(arguments: list[str]) -> int:
    """Ask runs to save and end; one that still waits in the queue does so as soon as it starts."""
    args = new_parser("stop", "Ask runs to save and end.", "+").parse_args(arguments)
    folders = find_several(args.runs)
    queue = squeue.ask(folders)
    told = []
    for folder in folders:
        one = look(folder, queue)
        asked = one.alive or one.state == "unknown"  # the file is read wherever the run is
        when = WHEN.get(one.state, "it saves and ends")
        try:
            if asked:
                write_json(folder / "control" / "stop", {"cause": "stop"})
        except OSError as error:  # keeps no other from being asked
            asked, when = False, f"can't be asked: {error.filename}: {error.strerror}"
        told.append(_told(one, asked, when if one.alive or one.state == "unknown" else ""))
    return _tell(told, args.json)


def cancel(arguments: list[str]) -> int:
    """End runs now, also those whose job still waits. What was saved stays; `synthos resume` goes on from there."""
    args = new_parser("cancel", "End runs now; `synthos resume` goes on from what was saved last.", "+").parse_args(
        arguments
    )
    folders = find_several(args.runs)
    queue = squeue.ask(folders)
    if queue.problem:
        raise Undone(queue.problem)
    told = []
    for folder in folders:
        one = look(folder, queue)
        done, what = _end(folder, one, queue.of(folder)) if one.alive else (False, "")
        told.append(_told(one, done, what))
    return _tell(told, args.json)


def _end(folder: Path, one: Look, jobs: Sequence[squeue.Job]) -> tuple[bool, str]:
    """End one run; returns whether that was possible, and what was done or why not."""
    pids = [] if jobs else list(holders(folder))
    if not jobs and not pids:
        return False, f"runs on another machine, without Slurm; expected `synthos stop {folder.name}`"
    # Before any signal: the agent must not take it for a preemption, nor a successor in the queue go on.
    record = {"job": jobs[0].job if jobs else "", "attempt": one.attempt, "by": getpass.getuser(), "time": time.time()}
    control = folder / "control"
    written = [file for file in (control / CANCELLED, control / "stop") if not file.exists()]
    write_json(control / CANCELLED, record)
    write_json(control / "stop", {"cause": "cancelled"})
    if not jobs:
        for pid in pids:
            with suppress(ProcessLookupError):  # it was faster
                os.kill(pid, signal.SIGTERM)
        return True, f"process {', '.join(map(str, pids))} got SIGTERM, saves and ends"
    names = [job.job for job in jobs]
    try:
        slurm.order(["scancel", *names])
    except RuntimeError as error:
        for file in written:  # or the run would end all the same, unless it has heard of it by now
            file.unlink(missing_ok=True)
        return False, str(error)
    return True, f"job {', '.join(names)} is cancelled"


def _told(one: Look, done: bool, what: str) -> dict[str, object]:
    why = f" ({one.detail})" if one.detail else ""
    said = what if done or what else f"is {one.state}{why}; nothing was done"
    return {"run": one.name, "folder": one.folder, "state": one.state, "done": done, "what": said}


def _tell(told: Sequence[dict[str, object]], as_json: bool) -> int:
    """Say what was done of each run; returns 1 where nothing could be."""
    if as_json:
        print_json({"runs": told})
    else:
        for one in told:
            print(f"{one['run']}: {one['what']}", file=sys.stdout if one["done"] else sys.stderr)
    return int(not all(one["done"] for one in told))
