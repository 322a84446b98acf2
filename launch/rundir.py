"""A run folder as the login node sees it: opened once with its config and provenance, then read for how far it got."""

import dataclasses
import errno
import fcntl
import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from synthos.run import read_verdict
from synthos.schema import GenerateConfig, JobConfig, RunConfig
from synthos.strict import write_config
from synthos.train.checkpoint import is_whole

STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class RunState:
    """How far a run got.

    Attributes:
        exists: its folder has been opened.
        attempts: how often it was started.
        step: of the newest whole checkpoint.
        verdict: what the last attempt that ended in order said of itself: status, cause, step, attempt, message.
        weights: the newest export.
    """

    exists: bool
    attempts: int
    step: int | None
    verdict: dict[str, Any]
    weights: Path | None

    @property
    def done(self) -> bool:
        return self.verdict.get("status") == "done"


def run_folder(config: JobConfig, sig8: str) -> Path:
    """Where the run with this signature lies, whether it exists or not."""
    return Path(config.runs_dir) / config.group / f"{config.name}-{sig8}"


def read_state(folder: Path) -> RunState:
    """Look into a run folder; one that does not exist has the state of a run that never started."""
    checkpoints = [step for step, path in _steps(folder / "checkpoints") if is_whole(path)]
    weights = [path for _, path in _steps(folder / "weights")]
    return RunState(
        exists=(folder / "config.yaml").is_file(),
        attempts=len(list((folder / "attempts").glob("[0-9]*"))),
        step=checkpoints[-1] if checkpoints else None,
        verdict=read_verdict(folder),
        weights=weights[-1] if weights else None,
    )


@contextmanager
def hold(folder: Path, patience_seconds: float = 0) -> Iterator[IO[str] | None]:
    """Hold the run as its only live process; None where another one holds it, still after `patience_seconds`.

    The lock is the kernel's: it goes with the last process that has the file open, however that process ends. Raises
    ValueError where the folder can't be made, or lies on a file system without locks.
    """
    path = folder / "control" / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise _unlockable(path, error) from None
    with file:
        deadline = time.monotonic() + patience_seconds
        while not (locked := _lock(file)) and time.monotonic() < deadline:
            time.sleep(0.2)
        yield file if locked else None


def _lock(file: IO[str]) -> bool:
    """Lock an open file; False where it is locked already."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise ValueError(
                f"runs_dir: {file.name} can't be locked: {error.strerror}; expected a file system with locks (Lustre: "
                "mounted with flock)"
            ) from None
        raise _unlockable(file.name, error) from None
    return True


def _unlockable(path: Path | str, error: OSError) -> ValueError:
    return ValueError(f"runs_dir: {path} can't be locked: {error.strerror}; expected a folder that can be written to")


def open_folder(folder: Path, config: JobConfig, command: Sequence[str], checkout: Path) -> None:
    """Write what the ranks will read: provenance and files of requests once, then the config.

    The config is written again when the run continues, since what is no part of its identity (machines, micro-batch,
    W&B) may have changed.
    """
    provenance = folder / "provenance"
    if not provenance.is_dir():
        part = folder / f".{provenance.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        write_provenance(part, command, checkout)
        part.rename(provenance)
    frozen = _with_own_files(config, folder)
    temporary = folder / ".config.yaml.part"
    write_config(frozen, temporary)
    temporary.replace(folder / "config.yaml")


def write_provenance(folder: Path, command: Sequence[str], checkout: Path) -> None:
    """What was typed, the code it ran with, and the packages installed."""
    (folder / "command.txt").write_text(shlex.join(command) + "\n")
    (folder / "git.json").write_text(json.dumps(git_facts(checkout), indent=1))
    (folder / "changes.patch").write_bytes(_git(checkout, "diff", "--binary", "HEAD") or b"")
    packages = {f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()}
    (folder / "packages.txt").write_text("\n".join(sorted(packages, key=str.lower)) + "\n")


def git_facts(checkout: Path) -> dict[str, Any]:
    """Commit, branch and files that git does not know; all empty outside of a git repository."""
    untracked = _git(checkout, "ls-files", "--others", "--exclude-standard") or b""
    return {
        "commit": (_git(checkout, "rev-parse", "--verify", "HEAD") or b"").decode().strip(),
        "branch": (_git(checkout, "branch", "--show-current") or b"").decode().strip(),
        "changed": bool(_git(checkout, "status", "--porcelain", "--untracked-files=no")),
        "untracked": untracked.decode().splitlines(),
    }


def _git(checkout: Path, *arguments: str) -> bytes | None:
    """What git answers, or None where there is no git, no repository or no commit."""
    try:
        done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def _with_own_files(config: JobConfig, folder: Path) -> JobConfig:
    """The config with its requests' files copied, and named relative to the run folder."""
    if isinstance(config, GenerateConfig):
        return dataclasses.replace(config, requests=_copy_files(config.requests, folder))
    assert isinstance(config, RunConfig)
    validate = dataclasses.replace(config.validate, requests=_copy_files(config.validate.requests, folder))
    return dataclasses.replace(config, validate=validate)


def _copy_files(asked: Any, folder: Path) -> list[dict[str, Any]]:
    from synthos.recipes.base import (
        file_fields,
    )  # not above: torch, for which what comes after an attempt need not wait

    requests = [dict(request) for request in asked or []]
    for request in requests:
        for key, file in file_fields(request).items():
            copy = Path("requests") / f"{request['name']}.{key}{Path(file).suffix}"
            (folder / "requests").mkdir(exist_ok=True)
            shutil.copyfile(file, folder / copy)
            request[key] = str(copy)
    return requests


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """The `step_...` folders by their step."""
    found = [(match, path) for path in folder.glob("step_*") if (match := STEP.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found)
