"""After an attempt: closes its record, decides what comes next, and asks Slurm for it. The same for every back end.

python -m launch.requeue RUN_DIR            in a job's batch script, once the agents of an attempt have ended
python -m launch.requeue --chain RUN_DIR    before the first attempt of a job: queues the job that follows it
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from launch import attempts, chain, notice, preflight, render, slurm
from launch.decision import CRASHES, Decision, decide
from launch.failures import killed_rank
from launch.place import job_id, job_start, node_names
from launch.rundir import hold, holders
from synthos.files import DamagedFile, create_json, read_cause, write_json
from synthos.run import read_verdict
from synthos.schema import ClusterConfig, read_job

ORPHAN_SECONDS = 600  # for ranks whose agent was killed: they save and end
ASKED = ("stop", "cancelled", "interrupt")  # by a person
PAUSES_SECONDS = (5, 25)  # before a controller that is busy, or starts again, is asked once more

Answer = TypeVar("Answer")


def main(folder: Path) -> int:
    """What comes after the attempt that this job has just run; returns the exit code of the batch script.

    render.RESTART means another attempt in this allocation; 0 that the run is done, requeued, or was asked to stop; 1
    that it ended before it was done, or that Slurm would not start it again; 2 that the agents would begin none.
    """
    config, start = read_job(folder / "config.yaml"), job_start(os.environ)
    record = attempts.newest_record(folder)
    if not start or record.get("job") != start or "next" in record:
        decided = record.get("job") == start and record["next"]["decision"] != "restart"
        if not start or decided or attempts.is_refused(folder, start):
            print(f"error: the agents began no attempt of {folder}; see above", file=sys.stderr)
            _cancel_successor(folder, start)
            return 2
        try:
            record = attempts.never_began(folder, start, node_names(os.environ))
        except RuntimeError as error:  # Slurm has started again what has used up its budgets
            print(f"error: {error}", file=sys.stderr)
            return 2
    if "ended" not in record:
        end_orphans(folder)
        attempts.end(folder, record["attempt"])
    decision = after(folder, config.cluster, start)
    if decision.decision == "restart":
        return render.RESTART
    return int(is_undone(attempts.newest_record(folder)))


def is_undone(record: Mapping[str, Any]) -> bool:
    """Whether a run has ended with this attempt, on which it was decided, and nobody wanted that."""
    wanted = record["status"] == "done" or record["cause"] in ("stop", "interrupt")
    ended = record["next"]["decision"] == "end" and not wanted
    return ended or "failed" in record["next"]


def after(folder: Path, cluster: ClusterConfig, start: str = "") -> Decision:
    """Decide what comes after the newest attempt, which is closed, write it into its record, and see to it.

    Args:
        folder: of the run.
        cluster: its budget, and how it requeues.
        start: id and restart count of the job; empty where there is none.
    """
    job = _job() if start else None
    decision = _decide(folder, cluster, job, bool(start))
    if decision.decision == "restart" and decision.wait_seconds and _wait(decision.wait_seconds):
        if not start:  # no Slurm tells more of it
            write_json(folder / "control" / "stop", {"cause": "interrupt"})
        job = _job() if start else None
        decision = _decide(folder, cluster, job, bool(start))  # what the signal meant
    if decision.decision != "end":
        attempts.forget_signal(folder)
    if start:
        _ask_slurm(folder, cluster, decision, start, job)
    return decision


def _job() -> slurm.Job | None:
    """What Slurm tells of this job, where it can be asked; else what the ranks were told has to do."""
    try:
        return _patiently(lambda: slurm.show(job_id(os.environ)))
    except RuntimeError as error:
        print(f"warning: why the attempt ended is known in part: {error}", file=sys.stderr)
        return None


def _decide(folder: Path, cluster: ClusterConfig, job: slurm.Job | None, in_slurm: bool) -> Decision:
    record = attempts.newest_record(folder)
    number, told = record["attempt"], read_cause(folder / "control" / "stop")
    left = notice.seconds_left(job, notice.notice_seconds(folder, cluster))
    known = refine(record, job, left, told) if job else {}
    if known.get("cause", record["cause"]) in CRASHES:
        if unseen := preflight.unseen(folder, record):
            known = {"cause": "preflight", "bad_nodes": unseen}
        else:
            known |= killed_rank(folder, number)
    attempts.amend(folder, number, **known)
    asked = told in ASKED
    decision = decide(attempts.records(folder), cluster, datetime.now(UTC), asked, in_slurm, left)
    wait = {"wait_seconds": decision.wait_seconds} if decision.wait_seconds else {}
    attempts.amend(folder, number, next={"decision": decision.decision, "reason": decision.reason, **wait})
    again = f" in {decision.wait_seconds} s" if decision.wait_seconds else ""
    cause = known.get("cause", record["cause"])
    who = f" (rank {known['rank']} {known['message']})" if "rank" in known else ""
    print(f"attempt {number}: {cause}{who}; {decision.decision}{again}: {decision.reason}", flush=True)
    return decision


def refine(record: Mapping[str, Any], job: slurm.Job, seconds_left: float, told: str = "") -> dict[str, Any]:
    """What Slurm's word on the job makes of a record's cause, and which nodes failed; the ranks were `told` to stop.

    SIGTERM alone may be a cancellation, a preemption, or a requeue by somebody else, and each looks different: a job
    that is to make room has a PreemptTime; one that Slurm has requeued already has restarted once more than we know.
    Where the job goes on it was srun's, which ends the other agents once one of them has failed.
    """
    cause = record["cause"]
    if record["status"] == "done" or cause in (*ASKED, "config"):
        return {}
    over, requeued = job.state != "RUNNING", _requeued(job, record["job"])
    # A job that somebody cancels because a node hangs is not to come back.
    if (requeued or job.reason == "NodeDown") and (failed := slurm.down(record["nodes"])):
        return {"cause": "node_failure", "bad_nodes": failed}
    if not over and job.nodes is not None and job.nodes < len(record["nodes"]):  # what is left of it can run nothing
        return {"cause": "node_failure", "bad_nodes": slurm.down(record["nodes"])}
    if requeued:
        return {"cause": "requeued"}
    if job.preempted:
        return {"cause": "preempted"}
    noticed = cause == "notice" or (told == "notice" and cause in CRASHES)  # saved in time, or not
    # A job that is over ends just now.
    if job.reason == "TimeLimit" or (noticed and not over and seconds_left < 0):
        return {"cause": "time_limit"}
    if over:
        return {"cause": "cancelled"}
    if cause == "notice":  # long before the limit: somebody sent it
        return {"cause": "drain"}
    return {"cause": "killed"} if cause == "terminate" else {}


def _requeued(job: slurm.Job | None, start: str) -> bool:
    """Whether Slurm has requeued a job since its agents ran."""
    return job is not None and job.restarts > int(start.split(".")[1])


def _ask_slurm(folder: Path, cluster: ClusterConfig, decision: Decision, start: str, job: slurm.Job | None) -> None:
    """Have the run started again by Slurm, or not at all; a failure is written into the record."""
    number, own = attempts.newest_record(folder)["attempt"], job_id(os.environ)
    again = decision.decision == "requeue"
    successor = chain.waiting(folder, start)
    if cluster.requeue == "chain" and not successor:  # then it was asked for in vain, as far as anybody knows
        successor = chain.unanswered(folder, start.split(".")[0])
    excluded = ""
    if again and decision.exclude:  # asked before the order, after which Slurm leaves this script no more than KillWait
        excluded = render.excluded(read_job(folder / "config.yaml"), folder) or ""
        if kept := [node for node in decision.exclude if node not in excluded.split(",")]:
            reason = f"{decision.reason}; but {', '.join(kept)} stays: its partition has too few others"
            attempts.amend(folder, number, next={"decision": "requeue", "reason": reason})
            print(f"warning: {reason}", file=sys.stderr)
    try:
        if again and cluster.requeue == "scontrol":
            _patiently(lambda: _requeue(own, start))
        elif again and not successor:
            raise RuntimeError("no successor was queued, see the job's output")
        elif decision.decision == "end":
            left = [own if _requeued(job, start) else None, successor]
            for waiting in filter(None, left):
                _order("scancel", waiting)
    except RuntimeError as error:
        reason = f"{decision.reason}; but {error}"
        told = {"decision": "end", "reason": reason, "failed": True}
        attempts.amend(folder, number, next=told)
        print(f"error: the run does not start again by itself: {reason}", file=sys.stderr)
        return
    following = own if cluster.requeue == "scontrol" else successor
    try:
        if excluded:  # only a pending job takes it
            _order("scontrol", "update", f"JobId={following}", f"ExcNodeList={excluded}")
    except RuntimeError as error:
        print(f"warning: the run may get the nodes again that failed: {error}", file=sys.stderr)


def _requeue(own: str, start: str) -> None:
    """Have this job requeued, unless it is already: by Slurm, or by an order whose answer was lost."""
    if not _requeued(slurm.show(own), start):
        slurm.order(["scontrol", "requeue", own])


def _order(*command: str) -> None:
    _patiently(lambda: slurm.order([*command]))


def _patiently(ask: Callable[[], Answer]) -> Answer:
    """Slurm's answer, for which it may be asked three times. Raises RuntimeError where it has none."""
    for seconds in PAUSES_SECONDS:
        try:
            return ask()
        except RuntimeError:
            time.sleep(seconds)
    return ask()


def _cancel_successor(folder: Path, start: str) -> None:
    """Take back the successor of a job that could not begin: it could not either, and would queue another, for ever."""
    if (waiting := chain.waiting(folder, start)) is None:
        return
    try:
        _order("scancel", waiting)
    except RuntimeError as error:
        print(f"error: job {waiting} still waits to follow this one: {error}", file=sys.stderr)


def end_orphans(folder: Path) -> None:
    """Have the ranks end whose agent was killed; they hold the run's lock as long as they live."""
    with hold(folder, patience_seconds=1) as lock:
        if lock is not None:
            return
    create_json(folder / "control" / "stop", {"cause": "terminate"})  # unless it is asked for already
    deadline = time.monotonic() + ORPHAN_SECONDS
    while time.monotonic() < deadline:
        with hold(folder, patience_seconds=5) as lock:
            if lock is not None:
                return
        if read_verdict(folder).get("attempt") == attempts.newest_record(folder)["attempt"]:
            _kill_torchrun(folder)
    print(f"warning: ranks of {folder} are still alive after {ORPHAN_SECONDS} s", file=sys.stderr)


def _kill_torchrun(folder: Path) -> None:
    """End what is left of an attempt whose ranks have ended: torchrun waits five minutes for that of other nodes."""
    for pid in holders(folder):
        with suppress(OSError):  # it has just ended
            if b"torch.distributed.run" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


def _wait(seconds: float) -> bool:
    """Wait; whether a signal cut it short."""
    heard: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    former = {n: signal.signal(n, lambda number, _: heard.append(number)) for n in numbers}
    deadline = time.monotonic() + seconds
    while not heard and time.monotonic() < deadline:
        time.sleep(0.2)
    for number, handler in former.items():
        signal.signal(number, handler)
    return bool(heard)


if __name__ == "__main__":
    *options, run = sys.argv[1:] or [""]
    if not run or options not in ([], ["--chain"]):
        sys.exit("usage: python -m launch.requeue [--chain] RUN_DIR")
    try:
        sys.exit(chain.queue(Path(run)) if options else main(Path(run)))
    except (OSError, DamagedFile) as error:  # as where the disk is full
        sys.exit(f"error: {error}")
