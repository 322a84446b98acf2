"""`synthos status`: how runs are at this moment. `synthos ls`: all of them."""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from rich.live import Live
from rich.table import Table

from launch.look import Look, look_at
from launch.runs import all_runs, find_any, runs_root
from launch.tell import console, duration, new_parser, print_json, table, warn

RECENT_SECONDS, RECENT = 86400.0, 30  # age and number of the runs that are shown unasked though they have ended


def main(arguments: list[str]) -> int:
    """Show the runs that are named, or else those alive and the newest that ended within a day.

    Returns 1 where a run that was named is in a state that wants a person, or Slurm can't be asked.
    """
    parser = new_parser("status", __doc__, "*")
    parser.add_argument("--watch", action="store_true", help="look again and again; Ctrl-C ends it")
    parser.add_argument("--every", type=_positive, default=5.0, metavar="SECONDS", help="with --watch; default: 5")
    args = parser.parse_args(arguments)
    if args.watch and args.json:
        raise ValueError("--watch, --json: one document is printed once; expected one of the two")
    if args.watch:
        return _watch(args.runs, args.every)
    looks, older, problem = _look(args.runs)
    if args.json:
        print_json({"runs": [dataclasses.asdict(one) for one in looks], "slurm": problem})
    else:
        _print(looks, older, problem)
    return int(bool(problem) or bool(args.runs) and any(one.wrong for one in looks))


def ls(arguments: list[str]) -> int:
    """List every run, or those of a group."""
    parser = new_parser("ls", "List every run, or those of a group.")
    parser.add_argument("group", nargs="?", help="only its runs")
    args = parser.parse_args(arguments)
    folders = all_runs(runs_root())
    if args.group is not None:
        groups = sorted({folder.parent.name for folder in folders})
        if args.group not in groups:
            raise ValueError(f"{args.group}: no group of {runs_root()}; expected one of {', '.join(groups) or 'none'}")
        folders = [folder for folder in folders if folder.parent.name == args.group]
    looks, problem = look_at(folders)
    looks.sort(key=lambda one: (one.group, -one.changed))
    if args.json:
        print_json({"runs": [dataclasses.asdict(one) for one in looks], "slurm": problem})
    else:
        _print(looks, 0, problem)
    return 0


def _look(words: Sequence[str]) -> tuple[list[Look], int, str]:
    """The runs to show, how many older ones are not, and why Slurm could not be asked."""
    folders: list[Path] = find_any(words) if words else all_runs(runs_root())
    looks, problem = look_at(folders)
    looks.sort(key=lambda one: (not one.alive, -one.changed))
    since = time.time() - RECENT_SECONDS
    ended = [one for one in looks if not one.alive and one.state != "unreadable"]
    old = set() if words else {one.folder for one in ended[RECENT:]} | {o.folder for o in ended if o.changed < since}
    return [one for one in looks if one.folder not in old], len(old), problem


def _watch(words: Sequence[str], every: float) -> int:
    screen = console()
    with Live(console=screen, auto_refresh=False) as live:
        try:
            while True:
                looks, _, problem = _look(words)
                if screen.is_terminal:
                    live.update(_table(looks, problem), refresh=True)
                else:  # where nothing can be drawn anew
                    screen.print(_table(looks, problem))
                if words and not any(one.goes_on for one in looks):
                    return int(any(one.wrong for one in looks))
                time.sleep(every)
        except KeyboardInterrupt:
            return 0


def _print(looks: Sequence[Look], older: int, problem: str) -> None:
    if looks:
        console().print(_table(looks))
    else:
        print(f"no runs to show in {runs_root()}")
    if older:
        print(f"{older:,} that ended before are not shown: synthos ls")
    if problem:
        warn(f"Slurm: {problem}")


def _table(looks: Sequence[Look], title: str = "") -> Table:
    columns = ["group", "run", "state", ">attempt", ">step", ">of", ">images/s", "ETA", "job", "why"]
    return table(columns, [_cells(one) for one in looks], title)


def _cells(one: Look) -> tuple[str, ...]:
    state = one.state.upper() if one.wrong else one.state
    step, last = ("" if value is None else f"{value:,}" for value in (one.step, one.last_step))
    rate = "" if one.images_per_s is None else f"{one.images_per_s:.1f}"
    eta = "" if one.eta_s is None else duration(one.eta_s)
    return one.group, one.name, state, str(one.attempt or ""), step, last, rate, eta, one.job, one.detail


def _positive(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; expected seconds above 0")
    return seconds
