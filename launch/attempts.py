"""The ledger of a run: one record per attempt, opened when it starts and closed with how it ended."""

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch.compose import CHECKOUT
from launch.rundir import git_facts, read_state
from synthos.run import read_verdict

EXIT_CODES = {"interrupt": 130, "terminate": 143}  # 128 + the signal's number, as shells have it


def begin(folder: Path, command: list[str], checkout: Path = CHECKOUT, job: str = "") -> int:
    """Open the next attempt, with the code it runs, and forget an old request to stop; returns the attempt's number.

    `job` is Slurm's id of the job and its restart count, if there is one.
    """
    (folder / "control" / "stop").unlink(missing_ok=True)
    number = read_state(folder).attempts + 1
    while not _claim(attempt_folder(folder, number)):
        number += 1
    code = git_facts(checkout)  # provenance/ tells it of the first attempt only
    record = {
        "attempt": number,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": job,
        "command": command,
        "commit": code["commit"],
        "changed": code["changed"],
        "started": _now(),
        "start_step": read_state(folder).step or 0,
    }
    write_json(attempt_folder(folder, number) / "attempt.json", record)
    return number


def end(folder: Path, number: int) -> dict[str, Any]:
    """Close an attempt with the verdict that its ranks left; one that left none has failed."""
    verdict = read_verdict(folder / "control" / "verdict.json")
    if verdict.get("attempt") != number:
        message = "the processes ended without a verdict"
        verdict = {"status": "failed", "cause": "crash", "step": None, "attempt": number, "message": message}
    path = attempt_folder(folder, number) / "attempt.json"
    ending = {"ended": _now(), "status": verdict["status"], "cause": verdict["cause"], "end_step": verdict["step"]}
    write_json(path, json.loads(path.read_text()) | ending)
    return verdict


def exit_code(verdict: dict[str, Any]) -> int:
    """0 when done or stopped by `control/stop`, 130 or 143 after a signal, 1 on failure."""
    return 1 if verdict["status"] == "failed" else EXIT_CODES.get(verdict["cause"], 0)


def attempt_folder(folder: Path, number: int) -> Path:
    return folder / "attempts" / f"{number:04d}"


def newest_record(folder: Path) -> dict[str, Any]:
    """The record of the newest attempt, empty where there is none."""
    records = sorted((folder / "attempts").glob("[0-9]*/attempt.json"))
    record: dict[str, Any] = json.loads(records[-1].read_text()) if records else {}
    return record


def write_json(path: Path, value: Any) -> None:
    """Write a file that readers see whole or not at all."""
    part = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.part")  # other nodes may write it too
    part.write_text(json.dumps(value, indent=1))
    part.replace(path)


def _claim(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
