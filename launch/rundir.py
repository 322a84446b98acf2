"""A run folder as the login node sees it: opened once with its config and provenance, then read for how far it got."""

import dataclasses
import errno
import fcntl
import itertools
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from launch import provenance, snapshot
from launch.known import Known
from launch.runs import is_run
from synthos.run import read_verdict
from synthos.schema import GenerateConfig, JobConfig, RunConfig
from synthos.strict import write_config
from synthos.train.checkpoint_files import STEP, is_whole


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


def run_folder(config: JobConfig, sig8: str, new: bool = False) -> Path:
    """Where the run with this signature lies, whether it exists or not.

    An experiment that is run anew, though it was run before, gets another generation: `<name>-<sig8>-g2`, and so on.
    The newest is the run, unless a `new` one is asked for.
    """
    first = Path(config.runs_dir) / config.group / f"{config.name}-{sig8}"

    def generation(number: int) -> Path:
        return first if number == 1 else first.with_name(f"{first.name}-g{number}")

    def is_free(number: int) -> bool:
        return not is_run(generation(number))

    return generation(next(n for n in itertools.count(1) if is_free(n if new else n + 1)))


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
        while not (locked := lock(file)) and time.monotonic() < deadline:
            time.sleep(0.2)
        yield file if locked else None


def holders(folder: Path) -> Iterator[int]:
    """The processes of this machine that have the run's lock, as /proc tells: who looks at it only reads the file."""
    lock = folder / "control" / "lock"
    for pid in sorted(int(entry.name) for entry in Path("/proc").glob("[0-9]*")):
        with suppress(OSError):  # another user's, or it has just ended
            files = [
                file for file in Path(f"/proc/{pid}/fd").iterdir() if file.exists() and os.path.samefile(file, lock)
            ]
            if any(_is_written(pid, file.name) for file in files):
                yield pid


def _is_written(pid: int, descriptor: str) -> bool:
    """Whether a process has opened a file to write to it."""
    facts = Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text().split()
    return int(facts[facts.index("flags:") + 1], 8) & os.O_ACCMODE != os.O_RDONLY


def lock(file: IO[str]) -> bool:
    """Lock an open file; False where another process has locked it. Raises ValueError where nothing can be locked."""
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


def open_folder(
    folder: Path,
    config: JobConfig,
    command: Sequence[str],
    checkout: Path,
    inputs: Mapping[str, Any] | None = None,
    known: Known | None = None,
) -> None:
    """Write what the ranks will read: their code, provenance, files of requests, then the config.

    All of it is written again when the run continues by a new submission: its code is that of today, and what is no
    part of its identity (machines, micro-batch, W&B) may have changed. What is `known` of the checkout, from a run that
    is opened with it, is not asked again. Raises RuntimeError where the code can't be copied.
    """
    copy_code(folder, config, checkout, known)
    provenance.record(folder, command, checkout, inputs or {}, known)
    frozen = _with_own_files(config, folder)
    temporary = folder / ".config.yaml.part"
    write_config(frozen, temporary)
    temporary.replace(folder / "config.yaml")


def copy_code(folder: Path, config: JobConfig, checkout: Path, known: Known | None = None) -> None:
    """Let the run's `code` lead to a copy of the checkout, and say so where it was another; debug runs the checkout."""
    former = snapshot.tree_name(folder)
    if config.cluster.backend == "debug":
        (folder / "code").unlink(missing_ok=True)
        return
    store = Path(config.runs_dir) / snapshot.STORE
    kept = (known or Known()).ask("copy", store, lambda: snapshot.take(checkout, store, not_code(config)))
    snapshot.link(folder, kept)
    if former and former != kept.name:
        print(f"code: {kept.name[:12]} from now on, was {former[:12]}; the run's attempts tell which ran which")


def not_code(config: JobConfig) -> list[Path]:
    """Folders that may lie in the checkout, and that are no code."""
    return [Path(config.runs_dir), Path(config.cache_dir)]


def code_problems(config: JobConfig, checkout: Path) -> list[str]:
    """What keeps the checkout from being copied, a line each."""
    return [] if config.cluster.backend == "debug" else [*snapshot.problems(checkout, not_code(config))]


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
