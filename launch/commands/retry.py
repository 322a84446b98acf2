"""`synthos retry`: try again after a failure.

Budgets of restarts count attempts that followed each other by themselves, so what a person starts has a fresh one.
"""

from launch import squeue
from launch.commands.resume import changed_config, quietly, start_again
from launch.look import look
from launch.runs import find_several
from launch.tell import new_parser, print_json, warn

RETRIED = ("failed", "lost")


def main(arguments: list[str]) -> int:
    """Start failed runs again, with a fresh budget of attempts."""
    parser = new_parser("retry", "Start failed runs again, with a fresh budget of attempts.", "+")
    parser.add_argument("--failed", action="store_true", help="leave out those that have not failed")
    args = parser.parse_args(arguments)
    folders = find_several(args.runs)
    queue = squeue.ask(folders)
    code, told = 0, []
    for folder in folders:
        one = look(folder, queue)
        if one.state in RETRIED:
            config = changed_config(folder, [])
            with quietly(args.json):
                own = start_again(folder, config, ["synthos", "retry", *arguments], False)
            told.append({"run": one.name, "started": own == 0, "exit_code": own})
            code = max(code, own)
        elif not args.failed:
            warn(f"{one.name}: is {one.state}, it has not failed; `synthos resume` goes on with a stopped run")
            told.append({"run": one.name, "started": False, "exit_code": 1})
            code = 1
    if args.json:
        print_json({"runs": told})
    elif not told:
        print(f"no failed run among {len(folders)}")
    return code
