"""`synthos retry`: try again after a failure.

Budgets of restarts count attempts that followed each other by themselves, so what a person starts has a fresh one.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from launch import squeue
from launch.commands.resume import changed_config, last_start, plan_again, quietly
from launch.look import look
from launch.runs import find_several
from launch.tell import new_parser, print_json, warn
from synthos.files import DamagedFile

RETRIED = ("failed", "lost")
UNCLEAR = ("unknown", "unreadable")


def main(arguments: list[str]) -> Callable[[], int]:
    """Find the runs; returns the start of those that failed, with a fresh budget of attempts."""
    parser = new_parser("retry", "Start failed runs again, with a fresh budget of attempts.", "+")
    parser.add_argument("--failed", action="store_true", help="leave out those that have not failed")
    args = parser.parse_args(arguments)
    folders = find_several(args.runs)
    return lambda: _start(folders, ["synthos", "retry", *arguments], args.failed, args.json)


def _start(folders: Sequence[Path], command: list[str], only_failed: bool, as_json: bool) -> int:
    """Start one after the other; what is wrong with one is said, and keeps no other from its start."""
    queue = squeue.ask(folders)
    code, told = 0, []
    for folder in folders:
        one = look(folder, queue)
        if one.state in RETRIED:
            before = last_start(folder)
            with quietly(as_json):
                try:
                    work = plan_again(folder, changed_config(folder, []), command, False)
                except ValueError as error:
                    warn(f"error: {one.name}: {error}")
                    own = 1 if isinstance(error, DamagedFile) else 2
                else:
                    own = work()
            told.append({"run": one.name, "started": last_start(folder) != before, "exit_code": own})
            code = max(code, own)
        elif one.state in UNCLEAR:
            warn(f"{one.name}: is {one.state} ({one.detail}); nothing was done")
            told.append({"run": one.name, "started": False, "exit_code": 1})
            code = max(code, 1)
        elif not only_failed:
            warn(f"{one.name}: is {one.state}, it has not failed; `synthos resume` goes on with a stopped run")
            told.append({"run": one.name, "started": False, "exit_code": 1})
            code = max(code, 1)
    if as_json:
        print_json({"runs": told})
    elif not told:
        print(f"no failed run among {len(folders)}")
    return code
