"""How a run starts: in this process, or under torchrun on this machine. `cluster.backend` names the function."""

from collections.abc import Callable
from pathlib import Path
from typing import IO

from launch import agent, attempts


def start(backend: str, folder: Path, lock: IO[str]) -> int:
    """Run one attempt with the back end called `backend`, while holding the run's `lock`; returns its exit code."""
    return BACKENDS[backend](folder, lock)


def debug(folder: Path, lock: IO[str]) -> int:
    """In this process, on one device: breakpoints work, and errors of the code raise."""
    import synthos.run

    attempt = attempts.begin(folder, ["synthos.run.main", str(folder)])
    try:
        synthos.run.main(folder, attempt)
    finally:
        verdict = attempts.end(folder, attempt)
    return attempts.exit_code(verdict)


def local(folder: Path, lock: IO[str]) -> int:
    """One rank per device of this machine."""
    return agent.run(folder, keep_open=[lock.fileno()])


BACKENDS: dict[str, Callable[[Path, IO[str]], int]] = {"debug": debug, "local": local}
