"""Run folders by what a person calls them: a path, a folder's name, a run's name, a signature, a job, a group."""

import fcntl
import os
import re
from collections.abc import Sequence
from pathlib import Path

from launch.compose import RUNS
from launch.tell import warn
from synthos.strict import unknown

NAME = re.compile(r"(?P<name>.+)-(?P<signature>[0-9a-f]{8})(-g\d+)?")  # of a run folder
JOB = re.compile(r"\d+(_\d+)?")  # Slurm's id of a job, or of an array's element
SHOWN = 10  # candidates of an ambiguous name


def runs_root() -> Path:
    """The folder of all runs: `SYNTHOS_RUNS`, or else where a submission from this checkout puts them."""
    return Path(os.environ.get("SYNTHOS_RUNS") or RUNS).expanduser().absolute()


def all_runs(root: Path) -> list[Path]:
    """Every run folder below `root`, by group and name. Raises ValueError where `root` can't be read."""
    if root == RUNS and not root.exists():  # nothing was submitted from this checkout yet
        return []
    try:
        groups = sorted(entry.path for entry in os.scandir(root) if _is_group(entry))
    except OSError as error:
        raise ValueError(
            f"runs: {error.filename} can't be read: {error.strerror}; expected the folder of your runs, or another one "
            "in SYNTHOS_RUNS"
        ) from None
    return [run for group in groups for run in _runs_of(Path(group))]


def _runs_of(group: Path) -> list[Path]:
    """The runs of a group; where that can't be read, none, and a warning: it keeps no other from being seen."""
    try:
        return sorted(Path(entry.path) for entry in os.scandir(group) if _is_run(entry))
    except OSError as error:
        warn(f"warning: the runs of {group} are not seen: {error.strerror}")
        return []


def _is_group(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".") and entry.is_dir()


def _is_run(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".") and is_run(entry.path)


def is_run(folder: str | Path) -> bool:
    """Whether a folder is that of a run, of which a config that was lost makes no other thing."""
    try:
        os.stat(f"{folder}/config.yaml")
    except FileNotFoundError:
        return os.path.isdir(f"{folder}/attempts")
    except NotADirectoryError:
        return False
    except OSError:  # it is closed to us
        return True
    return True


def find_one(word: str, root: Path | None = None) -> Path:
    """The one run that `word` names, below `runs_root()` unless another root is given; rather than a group of several
    the one run of that name. Raises ValueError where there is none, or more than one.
    """
    found = _matches(word, root)
    named = [run for run in found if (match := NAME.fullmatch(run.name)) and match["name"] == word]
    if len(found) > 1 and len(named) != 1:
        raise _ambiguous(word, found)
    return named[0] if len(found) > 1 else found[0]


def find_several(words: Sequence[str]) -> list[Path]:
    """The runs that the words name, each once: a group is all of its runs, anything else is one.

    Raises ValueError for a word that names nothing, or a run that is not the only one of its name.
    """
    found: dict[Path, None] = {}
    for word in words:
        runs = _matches(word)
        if len(runs) > 1 and any(run.parent.name != Path(word).name and not _is_element(run, word) for run in runs):
            raise _ambiguous(word, runs)
        found |= dict.fromkeys(runs)
    return list(found)


def _is_element(run: Path, array: str) -> bool:
    return any(job.startswith(f"{array}_") for job in jobs_of(run))


def find_any(words: Sequence[str]) -> list[Path]:
    """The same for a verb that only looks: a word may mean several runs."""
    return list(dict.fromkeys(run for word in words for run in _matches(word)))


def signature(folder: Path) -> str:
    """The 8 digits at the end of a run folder's name; empty where it has another name."""
    match = NAME.fullmatch(folder.name)
    return match["signature"] if match else ""


def jobs_of(folder: Path) -> list[str]:
    """Slurm's ids of all jobs that this run has had, as far as it knows; the one submitted last comes last."""
    outputs = [path.stem for path in (folder / "slurm").glob("*.out") if JOB.fullmatch(path.stem)]
    job = folder / "slurm" / "job"
    last = [job.read_text().strip()] if job.is_file() else []
    return [*sorted(set(outputs) - set(last)), *last]


def is_held(folder: Path) -> bool:
    """Whether a process has the run's lock (`launch.rundir.hold`), wherever it is, if the file system can tell."""
    try:
        with (folder / "control" / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # never started, or a file system without locks
        return False
    return False


def _matches(word: str, root: Path | None = None) -> list[Path]:
    """The runs that one word may mean, at least one; the name of a folder means no other run of that name."""
    path = Path(word).expanduser().absolute()
    root = root or runs_root()
    if os.sep in word and (group := _group(word, path, root)):
        if not (runs := _runs_of(group)):
            raise ValueError(f"{word}: the group {group} has no runs; `synthos ls` lists all there are")
        return runs
    if word.count(os.sep) == 1 and not path.is_dir():  # group/run, as candidates are listed
        path = root / word
    if os.sep in word or is_run(path):
        if not path.is_dir():
            raise ValueError(f"{word}: no such folder; expected a run folder, or the name of a run")
        if is_run(path):
            return [path]
        raise ValueError(f"{word} is no run folder: it has no config.yaml")
    runs = all_runs(root)
    found = [run for run in runs if word == run.name] or [run for run in runs if word in _names(run)]
    if not found and JOB.fullmatch(word):
        found = [run for run in runs if any(word in (job, job.partition("_")[0]) for job in jobs_of(run))]
    if not found:
        known = sorted({name for run in runs for name in _names(run) if name})
        hint = unknown(word, known).split("allowed: ")[0]
        raise ValueError(
            f"{word}: no run in {root} has this name, signature, job or group; {hint}`synthos ls` lists all {len(runs)}"
        )
    return found


def _group(word: str, path: Path, root: Path) -> Path | None:
    """The group that a word names by its path, or by its name with a slash behind it."""
    found = root / word if word.endswith(os.sep) and word.count(os.sep) == 1 else path
    return found if found.parent == root and found.is_dir() and not is_run(found) else None


def _names(run: Path) -> set[str]:
    match = NAME.fullmatch(run.name)
    return {run.name, run.parent.name, *(match.group("name", "signature") if match else ())}


def _ambiguous(word: str, found: Sequence[Path]) -> ValueError:
    names = [f"{run.parent.name}/{run.name}" for run in found]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    group = f", or {word}/ for the group" if any(run.parent.name == word for run in found) else ""
    return ValueError(f"{word}: means {len(names)} runs; expected one of {', '.join(names[:SHOWN])}{more}{group}")
