"""The ledger of a run: one record per attempt, opened when it starts and closed with how it ended.

A record is never deleted, and one at most is open, without `ended`. What a closed one says: `status` (done, stopped,
failed), `cause`, `message`, `end_step`, `samples` (images before and after it), `checkpoint_in` and `checkpoint_out`
(steps), `bad_nodes` (which failed), `rank` (that was killed), and `next`, what was decided to come after it, and when.
"""

import dataclasses
import json
import os
import socket
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch import render, slurm, snapshot
from launch.compose import CHECKOUT
from launch.decision import decide
from launch.provenance import environment_facts
from launch.rundir import read_state
from synthos.files import read_cause, read_json, write_json
from synthos.run import read_verdict
from synthos.schema import RunConfig, read_job

SIGNAL_CAUSES = ("interrupt", "terminate", "notice", "drain")  # of one attempt: the next knows nothing of them
EXIT_CODES = {"interrupt": 130, "terminate": 143}  # 128 + the signal's number, as shells have it
BY_SLURM = "Slurm has started the run again"
CANCELLED = "cancelled.json"  # in control/: which job and attempt a person cancelled
NO_VERDICT = "the processes ended without a verdict"


def begin(folder: Path, command: list[str], checkout: Path = CHECKOUT, job: str = "", nodes: Sequence[str] = ()) -> int:
    """Open the next attempt, with the code it runs; returns its number. What an earlier one left open is closed.

    A signal that stopped an earlier one is forgotten. What a person wrote to `control/stop` since the run was submitted
    is not: it may have been meant for a job that was still waiting.

    `job` is Slurm's id of the job and its restart count, if there is one; `nodes` are the names of its nodes. Raises
    RuntimeError where Slurm has started again what has used up its budgets.
    """
    _close_lost(folder, job)
    _account_for_requeue(folder, job)
    (folder / "control" / "refused.json").unlink(missing_ok=True)  # by an agent that has seen no attempt of ours
    forget_signal(folder)
    state = read_state(folder)
    number = state.attempts + 1
    while not _claim(attempt_folder(folder, number)):
        number += 1
    tree = snapshot.tree_name(folder)
    code = read_json(folder / "provenance" / "git.json") if tree else snapshot.git_facts(checkout)
    record = {
        "attempt": number,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": job,
        "nodes": list(nodes) or [socket.gethostname()],
        "command": command,
        "tree": tree,
        "commit": code["commit"],
        "changed": code["changed"],
        "environment": environment_facts(),
        "started": _now(),
        "start_step": state.step or 0,
        "checkpoint_in": state.step,
        "logs": _logs(number, job),
    }
    write_json(attempt_folder(folder, number) / "attempt.json", record)
    return number


def end(folder: Path, number: int, patience_seconds: float = 0) -> dict[str, Any]:
    """Close an attempt with the verdict that its ranks left; one that left none was killed.

    A shared folder may show late what a rank of another node has written: so long it is waited for.
    """
    verdict, deadline = read_verdict(folder), time.monotonic() + patience_seconds
    while verdict.get("attempt") != number and time.monotonic() < deadline:
        time.sleep(0.2)
        verdict = read_verdict(folder)
    if verdict.get("attempt") != number:
        verdict = {"status": "failed", "cause": "killed", "step": None, "attempt": number, "message": NO_VERDICT}
    if verdict["cause"] == "terminate" and is_cancelled(folder, number):
        verdict = {**verdict, "cause": "cancelled"}  # the signal was faster than the file
    _close(folder, number, verdict)
    return verdict


def never_began(folder: Path, job: str, nodes: Sequence[str]) -> dict[str, Any]:
    """The closed record of an attempt whose agents Slurm could not start, or ended as soon as it had."""
    number = begin(folder, [], job=job, nodes=nodes)
    end(folder, number)
    return newest_record(folder)


def refuse(folder: Path, start: str, why: str) -> None:
    """An agent begins no attempt in this start of the job, and none would, however often it was tried."""
    if (folder / "control").is_dir():
        write_json(folder / "control" / "refused.json", {"start": start, "why": why})


def is_refused(folder: Path, start: str) -> bool:
    return bool(read_json(folder / "control" / "refused.json").get("start") == start)


def started_by_hand(folder: Path) -> None:
    """What comes next was not brought about by the attempt before it, whose budgets it therefore does not share."""
    following = (record := newest_record(folder)).get("next", {})
    if following.get("decision") in ("restart", "requeue"):
        reason = f"{following['reason']}; but somebody has started it again before"
        amend(folder, record["attempt"], next=following | {"decision": "end", "reason": reason})


def amend(folder: Path, number: int, **known: Any) -> None:
    """Write into the record of an attempt what became known of it."""
    path = attempt_folder(folder, number) / "attempt.json"
    write_json(path, read_json(path) | known)


def _close(folder: Path, number: int, verdict: dict[str, Any]) -> None:
    record = read_json(attempt_folder(folder, number) / "attempt.json")
    logged = _logged(folder, number)
    # The newest checkpoint may have turned out to be damaged, and the one before it was restored.
    start = int(logged[0]["attempt/restart_step"]) if logged else record["start_step"]
    step = verdict["step"] if verdict["step"] is not None else int(logged[-1]["step"]) if logged else start
    batch, left = _batch_size(folder), read_state(folder).step
    if left is not None and left == record["checkpoint_in"] and step < left:
        left = start or None  # the damaged one is still there
    amend(
        folder,
        number,
        ended=_now(),
        status=verdict["status"],
        cause=verdict["cause"],
        message=verdict.get("message", ""),
        end_step=step,
        start_step=start,
        samples=[start * batch, step * batch] if batch else None,
        checkpoint_in=start or None,
        checkpoint_out=left,
        wandb=_wandb_id(folder),
        **{key: verdict[key] for key in ("bad_nodes",) if verdict.get(key)},
    )


def _close_lost(folder: Path, job: str) -> None:
    """Close what an attempt left open whose agent and batch script are gone: with the node, where its job goes on."""
    for record in records(folder):
        if "ended" in record:
            continue
        number, stop = record["attempt"], read_cause(folder / "control" / "stop")
        verdict = read_verdict(folder)
        if verdict.get("attempt") != number:
            message = f"told to stop ({stop}), and gone before it had saved" if stop else "it was never heard of again"
            cause = "killed" if not _follows(folder, record, job) else "terminate" if stop else "node_failure"
            if is_cancelled(folder, number):
                cause, message = "cancelled", "gone before it had saved"
            verdict = {"status": "failed", "cause": cause, "step": None, "message": message}
        _close(folder, number, verdict)


def _account_for_requeue(folder: Path, job: str) -> None:
    """Decide what Slurm has decided, where the batch script was killed before it could: after a lost node or a SIGTERM
    it has as little time as the ranks.
    """
    record = newest_record(folder)
    if not record or "next" in record or not _follows(folder, record, job):
        return
    cause, nodes = record["cause"], record["nodes"]
    failed = slurm.down(nodes) or (nodes if cause == "node_failure" and len(nodes) == 1 else [])
    if cause in ("terminate", "notice"):
        cause = "node_failure" if failed else "requeued"
    known = {"bad_nodes": failed} if cause == "node_failure" else {}
    amend(folder, record["attempt"], cause=cause, **known)
    # Slurm does it, whatever `cluster.requeue` says; what it starts for ever is for the budgets to end.
    cluster = dataclasses.replace(read_job(folder / "config.yaml").cluster, requeue="scontrol")
    decision = decide(records(folder), cluster, datetime.now(UTC))
    if decision.decision == "end":
        amend(folder, record["attempt"], next={"decision": "end", "reason": decision.reason})
        raise RuntimeError(f"{folder} does not go on: {decision.reason}; the same command starts it again")
    amend(folder, record["attempt"], next={"decision": "requeue", "reason": BY_SLURM})


def _follows(folder: Path, record: dict[str, Any], job: str) -> bool:
    """Whether a start of a job is a later one of the job of a record, or of its successor."""
    if not job or job == record["job"]:
        return False
    said = read_json(folder / "control" / "successor.json")
    own = job.split(".")[0]
    # Of the two jobs that it names, this is the second; or the first, once it has queued its own successor.
    former = {said.get("job"): said.get("of"), said.get("of"): said.get("after")}.get(own)
    return str(record["job"]).split(".")[0] in (own, former)


def describe(verdict: dict[str, Any], by_hand: bool = True) -> str:
    """How an attempt ended that did not fail; what comes next, where no batch script decides and tells that."""
    if verdict["status"] == "stopped":
        hint = "; the same command goes on from there" if by_hand else ""
        return f"stopped ({verdict['cause']}) at {verdict['step']}, saved{hint}"
    return f"done at {verdict['step']}" + (f"; weights in {verdict['weights']}" if verdict.get("weights") else "")


def exit_code(verdict: dict[str, Any]) -> int:
    """0 when done or stopped by `control/stop`, 130 or 143 after a signal, 1 on failure."""
    return 1 if verdict["status"] == "failed" else EXIT_CODES.get(verdict["cause"], 0)


def attempt_folder(folder: Path, number: int) -> Path:
    return folder / "attempts" / f"{number:04d}"


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of all attempts, oldest first."""
    return [read_json(path) for path in sorted((folder / "attempts").glob("[0-9]*/attempt.json"))]


def newest_record(folder: Path) -> dict[str, Any]:
    """The record of the newest attempt, empty where there is none."""
    paths = sorted((folder / "attempts").glob("[0-9]*/attempt.json"))
    return read_json(paths[-1]) if paths else {}


def forget_signal(folder: Path) -> None:
    """Take back a wish to stop that was a signal's: what is written from now on is meant for the attempt to come."""
    stop = folder / "control" / "stop"
    if stop.is_file() and not asked_to_stop(folder):
        stop.unlink()


def is_cancelled(folder: Path, number: int) -> bool:
    """Whether a person has cancelled this attempt, by our command."""
    return bool(read_json(folder / "control" / CANCELLED).get("attempt") == number)


def is_left_open(folder: Path, job: str) -> bool:
    """Whether an earlier start of a job, or the job that it follows, has left an attempt open."""
    record = newest_record(folder)
    return bool(record) and "ended" not in record and _follows(folder, record, job)


def asked_to_stop(folder: Path) -> bool:
    """Whether somebody, and not a signal, asks the run to stop."""
    return read_cause(folder / "control" / "stop") not in ("", *SIGNAL_CAUSES)


def _logged(folder: Path, number: int) -> list[dict[str, Any]]:
    """What an attempt, the newest, has logged: first where it began; empty where it did not come so far."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines[-1:] if line.endswith("}")]  # a kill may have cut the last one
    rows = [json.loads(line) for line in lines[:-1]] + rows
    first = next((n for n, row in enumerate(rows) if row.get("attempt") == number), len(rows))
    return rows[first:]  # what stands before it is of the attempts before


def _logs(number: int, job: str) -> list[str]:
    """Where to read of an attempt, relative to the run folder."""
    own = [f"attempts/{number:04d}/node-*.log", f"attempts/{number:04d}/rank-*.log"]
    return [str(render.output(Path(), job.split(".")[0])), *own] if job else own


def _batch_size(folder: Path) -> int | None:
    config = read_job(folder / "config.yaml") if (folder / "config.yaml").is_file() else None
    return config.batch.size if isinstance(config, RunConfig) else None


def _wandb_id(folder: Path) -> str | None:
    path = folder / "wandb" / "run_id"
    return path.read_text() if path.is_file() else None


def _claim(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
