"""How long does a person wait: for a plan, a submission, a look at a thousand runs, a save after a signal, a restart?

    python -m benchmarks.latencies                 on a practice Slurm; needs root, takes some minutes
    python -m benchmarks.latencies --runs 20 --rounds 1

Whole commands, from the shell and back, with a tiny model; the medians of some rounds. A save and a restart are told
from the moment of the signal.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.chaos import HIT, SHAPE, begin, practice
from benchmarks.faults import Victim
from benchmarks.learning import ROOT, machine

SYNTHOS = Path(sys.executable).with_name("synthos")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="that are looked at")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file for the figures")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="synthos-", dir="/tmp") as name, practice(Path(name) / "slurm") as shell:
        folder = Path(name)
        run = begin(folder, 4000, "submitit", shell)
        run.goes_on(1)
        seconds = {f"{what}, of a run on two nodes": found for what, found in interrupted(run, args.rounds).items()}
        run.run("scancel", run.job)
        run.wait(lambda: run.state() == "CANCELLED", "the end of its job")
        seconds |= commands(run, folder, args.runs, args.rounds)
    results = {**machine(), "runs": args.runs, "rounds": args.rounds, "seconds": seconds}
    print(table(results))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def interrupted(run: Victim, rounds: int) -> dict[str, list[float]]:
    """From SIGUSR2 to a whole checkpoint; from a rank's SIGKILL, or from the start of a job, to the next step."""
    found: dict[str, list[float]] = {"SIGUSR2 to saved": [], "start of the job to its first step": [],
                                     "SIGKILL of a rank to the next step": []}  # fmt: skip
    saved, started, again = found.values()
    for _ in range(rounds):
        number = len(run.records())
        began = time.monotonic()
        run.run("scancel", "--signal=USR2", run.job)
        run.wait(lambda n=number: "ended" in run.records()[n - 1], "the end of an attempt")  # type: ignore[misc]
        saved.append(time.monotonic() - began)
        run.ended(number)
        run.starts_now()
        began = time.monotonic()
        run.goes_on(number + 1, 1)
        started.append(time.monotonic() - began)
        run.goes_on(number + 1)
        began = time.monotonic()
        os.kill(run.processes("synthos.run")[0], signal.SIGKILL)
        run.goes_on(number + 2, 1)
        again.append(time.monotonic() - began)
        run.goes_on(number + 2)
    return found


def commands(run: Victim, folder: Path, count: int, rounds: int) -> dict[str, list[float]]:
    """Commands that a person types, on a cluster that answers at once."""
    shape = [*SHAPE, *HIT, f"runs_dir={folder / 'more'}", f"cache_dir={folder / 'cache'}", "+cluster.sbatch.hold=true"]
    submit = [sys.executable, "launch/submit.py", *shape]
    copies(run.folder, folder / "many" / "i2i", count)
    many = {**run.environment, "SYNTHOS_RUNS": str(folder / "many")}
    return {
        "dry run": clock([*submit, "dry_run=true"], run.environment, rounds),
        "submission": clock(submit, run.environment, rounds, lambda n: [f"seed={n}"]),
        "submission of a sweep of 100 points": clock(
            submit, run.environment, rounds, lambda n: [f"seed=range({100 * n},{100 * n + 100})"]
        ),
        f"status of {count:,} runs": clock([SYNTHOS, "status"], many, rounds),
        f"ls of {count:,} runs": clock([SYNTHOS, "ls"], many, rounds),
    }


def copies(run: Path, group: Path, count: int) -> None:
    """Runs that one run is the pattern of."""
    left = shutil.ignore_patterns("checkpoints", "wandb", "weights", "code")
    for number in range(count):
        shutil.copytree(run, group / f"i2i-{number:08x}", symlinks=True, ignore=left)


def clock(
    command: Sequence[str | Path],
    environment: dict[str, str],
    rounds: int,
    more: Callable[[int], list[str]] = lambda number: [],
) -> list[float]:
    """Seconds that a command takes, round by round, after one that is not counted."""
    found = []
    for number in range(rounds + 1):
        began = time.monotonic()
        done = subprocess.run([*command, *more(number)], cwd=ROOT, env=environment, capture_output=True, text=True)
        # A look tells by its code that something is wrong with a run.
        assert done.returncode == 0 or (command[0] == SYNTHOS and done.returncode == 1 and done.stdout), done.stderr
        found.append(time.monotonic() - began)
    return found[1:]


def table(results: dict[str, Any]) -> str:
    """For a page of the docs."""
    lines = ["| what | seconds, median | least to most |", "| --- | ---: | ---: |"]
    for what, found in results["seconds"].items():
        lines.append(f"| {what} | {statistics.median(found):.2f} | {min(found):.2f} to {max(found):.2f} |")
    return "\n".join([*lines, "", f"{results['device']}, torch {results['torch']}, {results['rounds']} rounds."])


if __name__ == "__main__":
    sys.exit(main())
