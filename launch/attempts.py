"""The ledger of a run: one record per attempt, opened when it starts and closed with how it ended."""

import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch import snapshot
from launch.compose import CHECKOUT
from launch.provenance import environment_facts
from launch.rundir import read_state
from synthos.files import read_json, write_json
from synthos.run import read_verdict

SIGNAL_CAUSES = ("interrupt", "terminate", "notice")
EXIT_CODES = {"interrupt": 130, "terminate": 143}  # 128 + the signal's number, as shells have it


def begin(folder: Path, command: list[str], checkout: Path = CHECKOUT, job: str = "") -> int:
    """Open the next attempt, with the code it runs; returns its number.

    A signal that stopped an earlier one is forgotten. What a person wrote to `control/stop` since the run was submitted
    is not: it may have been meant for a job that was still waiting.

    `job` is Slurm's id of the job and its restart count, if there is one.
    """
    stop = folder / "control" / "stop"
    if stop.is_file() and stop.read_text() and read_json(stop).get("cause") in SIGNAL_CAUSES:
        stop.unlink()
    number = read_state(folder).attempts + 1
    while not _claim(attempt_folder(folder, number)):
        number += 1
    tree = snapshot.tree_name(folder)
    code = read_json(folder / "provenance" / "git.json") if tree else snapshot.git_facts(checkout)
    record = {
        "attempt": number,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": job,
        "command": command,
        "tree": tree,
        "commit": code["commit"],
        "changed": code["changed"],
        "environment": environment_facts(),
        "started": _now(),
        "start_step": read_state(folder).step or 0,
    }
    write_json(attempt_folder(folder, number) / "attempt.json", record)
    return number


def end(folder: Path, number: int, patience_seconds: float = 0) -> dict[str, Any]:
    """Close an attempt with the verdict that its ranks left; one that left none has failed.

    A shared folder may show late what a rank of another node has written: so long it is waited for.
    """
    verdict, deadline = read_verdict(folder), time.monotonic() + patience_seconds
    while verdict.get("attempt") != number and time.monotonic() < deadline:
        time.sleep(0.2)
        verdict = read_verdict(folder)
    if verdict.get("attempt") != number:
        message = "the processes ended without a verdict"
        verdict = {"status": "failed", "cause": "crash", "step": None, "attempt": number, "message": message}
    path = attempt_folder(folder, number) / "attempt.json"
    ending = {"ended": _now(), "status": verdict["status"], "cause": verdict["cause"], "end_step": verdict["step"]}
    write_json(path, read_json(path) | ending)
    return verdict


def describe(verdict: dict[str, Any]) -> str:
    """How an attempt ended that did not fail, and what comes next."""
    if verdict["status"] == "stopped":
        return f"stopped ({verdict['cause']}) at {verdict['step']}, saved; the same command goes on from there"
    return f"done at {verdict['step']}" + (f"; weights in {verdict['weights']}" if verdict.get("weights") else "")


def exit_code(verdict: dict[str, Any]) -> int:
    """0 when done or stopped by `control/stop`, 130 or 143 after a signal, 1 on failure."""
    return 1 if verdict["status"] == "failed" else EXIT_CODES.get(verdict["cause"], 0)


def attempt_folder(folder: Path, number: int) -> Path:
    return folder / "attempts" / f"{number:04d}"


def newest_record(folder: Path) -> dict[str, Any]:
    """The record of the newest attempt, empty where there is none."""
    records = sorted((folder / "attempts").glob("[0-9]*/attempt.json"))
    return read_json(records[-1]) if records else {}


def _claim(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
