"""`synthos wandb sync`: send what runs logged offline to W&B, all attempts of a run as the one run that they are."""

import subprocess
import sys
from pathlib import Path

from launch import squeue
from launch.look import look
from launch.runs import find_several
from launch.tell import new_parser, print_json, warn


def main(arguments: list[str]) -> int:
    """Send them by W&B's own command; 1 where one could not be sent, or there is nothing to send."""
    args = new_parser("wandb sync", __doc__, "+").parse_args(arguments)
    folders = find_several(args.runs)
    queue = squeue.ask(folders)
    told = []
    for folder in folders:
        offline = offline_runs(folder)
        one = look(folder, queue)
        code = 0
        if one.alive:
            code, said = 1, f"is {one.state}: what it logs can be sent when it has ended"
        elif offline:
            code, said = sync(folder, offline)
        else:
            said = "logged nothing offline that is not sent yet"
        told.append({"run": folder.name, "offline": len(offline), "exit_code": code, "what": said})
    if args.json:
        print_json({"runs": told})
    for each in told:
        line = f"{each['run']}: {each['what']}"
        warn(line) if each["exit_code"] or args.json else print(line)
    return int(any(each["exit_code"] for each in told))


def offline_runs(folder: Path) -> list[Path]:
    """What attempts of a run have logged offline and W&B has not got yet, oldest first."""
    found = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    return [path.parent for path in found if not path.with_suffix(".wandb.synced").exists()]


def sync(folder: Path, offline: list[Path]) -> tuple[int, str]:
    """Send the attempts in order, as one run; the exit code and what became of them.

    Those that W&B got are marked in their folders: wandb ends with 0 also where the server refuses.
    """
    run_id = (folder / "wandb" / "run_id").read_text()
    command = [sys.executable, "-m", "wandb", "sync", f"--id={run_id}", *(str(path.absolute()) for path in offline)]
    # It leaves a log of its own in the current folder; what it says goes to stderr, as it comes: sending may take long.
    subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    left = len(set(offline) & set(offline_runs(folder)))
    many = f"{len(offline)} attempt{'s' if len(offline) > 1 else ''}"
    return (1, f"{left} of {many} not sent, wandb says why") if left else (0, f"{many} sent")
