"""`synthos gc`: what may be deleted of runs that are over. Weights, logs and the newest checkpoint always stay."""

import dataclasses
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch import snapshot
from launch.look import Look, look_at
from launch.runs import all_runs, find_several, is_held, runs_root
from launch.tell import Undone, console, new_parser, print_json, size, table, warn
from synthos.train.checkpoint_files import STEP, is_whole, remove

YOUNG_SECONDS = 3600  # a copy of code may be of a run that is just being submitted
OLD_CHECKPOINT = "old checkpoint"


@dataclass(frozen=True)
class Waste:
    """Something that may go."""

    run: str  # "" for what belongs to none
    kind: str
    path: str
    size: int  # bytes


def main(arguments: list[str]) -> int:
    """List what may be deleted, and with --yes delete it; 1 where something could not be looked at or deleted."""
    parser = new_parser("gc", __doc__, "*")
    parser.add_argument("--yes", action="store_true", help="delete; without it nothing is touched")
    args = parser.parse_args(arguments)
    root = runs_root()
    folders = find_several(args.runs) if args.runs else all_runs(root)
    looks, problem = look_at(folders)
    if problem:  # a run whose job nobody can see may be alive
        raise Undone(f"{problem}; nothing is deleted that may be in use")
    skipped = [one for one in looks if one.state in ("unknown", "unreadable")]
    found = [waste for one in looks if not one.alive and one not in skipped for waste in of_run(Path(one.folder), one)]
    unreadable: list[str] = []
    if not args.runs:
        try:
            found += unused_code(root)
        except OSError as error:
            unreadable = [f"{root / snapshot.STORE}: left alone, {error.filename} can't be read: {error.strerror}"]
    failed = [problem for waste in found if (problem := _delete(waste))] if args.yes else []
    problems = [*failed, *unreadable, *(f"{one.name}: left alone, {one.state} ({one.detail})" for one in skipped)]
    for line in problems:
        warn(line)
    total = sum(waste.size for waste in found)
    if args.json:
        told = [dataclasses.asdict(waste) for waste in found]
        print_json({"deleted": args.yes, "bytes": total, "waste": told, "problems": problems})
    elif found:
        console().print(table(["run", "what", ">size", "path"], [(w.run, w.kind, size(w.size), w.path) for w in found]))
        print(f"{size(total)} {'deleted' if args.yes else 'may go; --yes deletes it'}")
    else:
        print("nothing to delete")
    return int(bool(problems))


def of_run(folder: Path, one: Look) -> Iterator[Waste]:
    """What may go of a run that has neither job nor process."""
    checkpoints = sorted((folder / "checkpoints").glob("step_*"))
    for left in sorted((folder / "checkpoints").glob(".step_*")):
        yield _waste(folder, "unfinished checkpoint" if left.suffix == ".part" else "half-deleted checkpoint", left)
    whole = [path for path in checkpoints if STEP.fullmatch(path.name) and is_whole(path)]
    if one.state == "done":
        for path in whole[:-1]:
            yield _waste(folder, OLD_CHECKPOINT, path)
    for attempt in sorted((folder / "attempts").glob("[0-9]*")):
        if attempt.is_dir() and not any(attempt.iterdir()):
            yield _waste(folder, "empty attempt", attempt)


def unused_code(root: Path) -> Iterator[Waste]:
    """Copies of code below `root` that nothing there leads to, and that are not of this hour.

    Raises OSError for a folder that can't be read: it may be that of a run that leads to one.
    """
    folders = (run for group in _folders(root) for run in _folders(group))
    used = {_leads_to(folder / "code") for folder in folders}
    for path in sorted((root / snapshot.STORE).glob("*")):
        if path.is_dir() and os.path.realpath(path) not in used and not _is_young(path):
            yield Waste("", "unused code", str(path), _bytes(path))


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return [Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir()]


def _leads_to(link: Path) -> str:
    """The real path that a link leads to; empty where there is none."""
    try:
        link.lstat()
    except FileNotFoundError:
        return ""
    return os.path.realpath(link)


def _waste(folder: Path, kind: str, path: Path) -> Waste:
    return Waste(folder.name, kind, str(path), _bytes(path))


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def _delete(waste: Waste) -> str:
    """Delete it; returns what went wrong. A run that came alive meanwhile is left alone."""
    path = Path(waste.path)
    if waste.run and is_held(path.parents[1]):
        return f"{path}: left alone, its run is alive again"
    try:
        if not waste.run:
            return _delete_code(path)
        elif waste.kind == OLD_CHECKPOINT:
            remove(path)
        else:
            shutil.rmtree(path)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return ""


def _delete_code(path: Path) -> str:
    """Its name goes first, so that none is ever there by half; one that a submission takes meanwhile gets it back."""
    gone = path.with_name(f".{path.name}.part")
    path.rename(gone)
    if _is_young(gone):
        gone.rename(path)
        return f"{path}: left alone, a run was just submitted with it"
    path.with_name(f"{path.name}.json").unlink(missing_ok=True)
    snapshot.remove(gone)
    return f"{gone}: not all of it could be deleted" if gone.exists() else ""


def _is_young(path: Path) -> bool:
    return time.time() - path.stat().st_mtime < YOUNG_SECONDS
