"""Does a run survive fifty faults, and end with the very weights of one that nothing happened to?

    python -m benchmarks.chaos                          on the practice Slurm; needs root, takes half an hour
    python -m benchmarks.chaos --faults 3 --steps 200   a taste
    python -m benchmarks.chaos --show FILE ...          stored figures, side by side

A small run on two nodes is hit again and again, each time some steps after it has gone on: the kinds are dealt like
cards, equally often. It goes on by itself; only a job that was cancelled is resumed by a command. Then the same run is
made without a fault, on this machine without a scheduler, and everything that counts is compared bit for bit: losses,
samples, the last checkpoint's and the exported weights.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults import FAULTS, Victim
from benchmarks.learning import ROOT, machine
from launch.attempts import newest_record
from launch.snapshot import git_facts

PRACTICE = ROOT / "slurm" / "practice.sh"
SHAPE = (
    "recipe=i2i", "model=tiny", "data=photos", "precision=fp32", "recipe.train=full", "recipe.text_length=8",
    "batch.size=8", "batch.micro=4", "optim.lr=1e-3", "ema.decay=0.9", "mesh=full", "wandb.mode=offline",
    "validate.every=null", "validate.samples=0", "validate.from_split=0", "checkpoint.every=5",
)  # fmt: skip
HIT = ("cluster=practice", "nodes=2", "gpus_per_node=1", "cluster.notice_seconds=40", "cluster.max_crashes=1000",
       "cluster.backoff_seconds=[0]")  # fmt: skip
ALONE = ("cluster=local", "cluster.device=cpu", "cluster.threads=1", "gpus_per_node=2")
AFTER_STEPS = (7, 25)  # of an attempt, it is hit
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--steps", type=int, default=2000, help="of the run, which has to outlast the faults")
    parser.add_argument("--seed", type=int, default=0, help="of which fault comes when")
    parser.add_argument("--backend", choices=("submitit", "sbatch"), default="submitit")
    parser.add_argument("--out", type=Path, help="file for the figures")
    parser.add_argument("--show", type=Path, nargs="+", help="files of figures to be shown; nothing is run")
    args = parser.parse_args(arguments)
    if args.show:
        print(matrix([json.loads(path.read_text()) for path in args.show]))
        return 0
    with tempfile.TemporaryDirectory(prefix="synthos-", dir="/tmp") as name, practice(Path(name) / "slurm") as shell:
        folder = Path(name)
        run = begin(folder, args.steps, args.backend, shell)
        rows = [*torment(run, args.faults, random.Random(args.seed))]
        run.wait(lambda: newest_record(run.folder).get("next"), "the end of the run", 3600)
        assert newest_record(run.folder)["status"] == "done", run.said()
        submit(folder / "alone", args.steps, ALONE, shell)
        (alone,) = (path.parent for path in (folder / "alone").glob("*/*/config.yaml"))
        same = compare(run.folder, alone)
        audit = audited(run.folder)
        about = {**machine(), "changed_since_commit": git_facts(ROOT)["changed"], "tracking": tracking(run.practice)}
        about |= {"backend": args.backend}
    results = {**about, "steps": args.steps, "seed": args.seed, "faults": rows, "same": same, "audit": audit}
    print(table(results))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(same.values()) and audit["clean"] and audit["wandb_runs"] == 1 else 1


@contextlib.contextmanager
def practice(folder: Path) -> Iterator[dict[str, str]]:
    """A practice cluster of our own; the environment of a shell that is pointed at it."""
    outer = ("SLURM_", "SBATCH_", "SRUN_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
    shell = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
    shell |= {"SYNTHOS_PRACTICE": str(folder), "SLURM_CONF": str(folder / "slurm.conf")}
    shell["TMPDIR"] = str(folder.parent)  # where it outlives no agent that is killed
    try:
        subprocess.run([PRACTICE, "up"], env=shell, stdout=subprocess.DEVNULL, check=True)
        yield shell
    finally:
        subprocess.run([PRACTICE, "down"], env=shell, check=False)


def tracking(cluster: Path) -> str:
    """How the cluster finds the processes of a job, which decides whom a signal reaches."""
    return (cluster / "synthos-practice").read_text().strip()


def begin(folder: Path, steps: int, backend: str, shell: dict[str, str]) -> Victim:
    said = submit(folder / "hit", steps, [*HIT, f"cluster.backend={backend}"], shell)
    (config,) = (folder / "hit").glob("*/*/config.yaml")
    if backend == "sbatch":  # the last line is the one to type
        line = ["bash", "-c", said.splitlines()[-1]]
        job = subprocess.run(line, env=shell, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1]
    else:
        job = (config.parent / "slurm" / "job").read_text()
    return Victim(config.parent, job, Path(shell["SYNTHOS_PRACTICE"]), shell)


def submit(runs_dir: Path, steps: int, where: Sequence[str], shell: dict[str, str]) -> str:
    """What the command prints that a user types; a run on this machine is over when it returns."""
    folders = [f"runs_dir={runs_dir}", f"cache_dir={runs_dir.parent / 'cache'}"]
    command = [sys.executable, "launch/submit.py", *SHAPE, f"optim.steps={steps}", *folders, *where]
    return subprocess.run(command, cwd=ROOT, env=shell, stdout=subprocess.PIPE, text=True, check=True).stdout


def torment(run: Victim, count: int, chance: random.Random) -> Iterator[Row]:
    """One fault after another; what each was, how many steps it cost, and how soon the run trained again."""
    cards = [fault for _ in range(-(-count // len(FAULTS))) for fault in FAULTS]
    chance.shuffle(cards)
    for number, fault in enumerate(cards[:count], start=1):
        run.goes_on(number, chance.randint(*AFTER_STEPS))
        began, step, attempt = time.monotonic(), run.losses()[-1][0], len(run.records())
        fault(run)
        run.goes_on(attempt + 1, 1)
        seconds = time.monotonic() - began
        before, after = run.records()[attempt - 1], run.records()[-1]
        row = {
            "fault": fault.__name__,
            "step": step,
            "attempts": len(run.records()) - attempt,
            "cause": before["cause"],
            "next": before.get("next", {}).get("decision", ""),  # killed before it could say
            "goes_on_from": after["start_step"],
            "lost_steps": before["end_step"] - after["start_step"],
            "seconds": round(seconds, 1),
        }
        print(f"{number}/{count} {row}", file=sys.stderr, flush=True)
        yield row


def compare(hit: Path, alone: Path) -> dict[str, bool]:
    """Whether what counts is equal, bit for bit, in both run folders."""
    return {
        "losses": _logged(hit) == _logged(alone),
        "checkpoint": _digest(hit, "checkpoints/*/*.distcp") == _digest(alone, "checkpoints/*/*.distcp"),
        "weights": _digest(hit, "weights/*/**/*.safetensors") == _digest(alone, "weights/*/**/*.safetensors"),
        "samples": _digest(hit, "data/trace-rank-*.bin") == _digest(alone, "data/trace-rank-*.bin"),
    }


def _logged(folder: Path) -> list[Row]:
    """What every step computed: its loss, gradient norm, learning rate and samples; not how long it took."""
    computed = re.compile(r"step|train/(loss.*|grad_norm.*|lr/.*)|data/digest")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if computed.fullmatch(key)} for row in rows if "train/loss" in row]


def _digest(folder: Path, pattern: str) -> dict[str, str]:
    """The files of the newest checkpoint or export, or of the traces, by their content."""
    files = sorted(folder.glob(pattern))
    newest = max((path.relative_to(folder).parts[:2] for path in files if "step_" in str(path)), default=None)
    kept = [path for path in files if newest is None or path.relative_to(folder).parts[:2] == newest]
    assert kept, f"{folder} has no {pattern}"
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def audited(folder: Path) -> Row:
    """The word of `synthos data audit`; and W&B's runs that the attempts have logged to."""
    command = [str(Path(sys.executable).with_name("synthos")), "data", "audit", str(folder), "--json"]
    told = json.loads(subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT).stdout)
    kept = {key: told[key] for key in ("steps", "samples", "lost", "repeated", "unplanned", "clean") if key in told}
    ids = {path.name.rpartition("-")[2] for path in (folder / "wandb").glob("offline-run-*")}
    return {**kept, "wandb_runs": len(ids)}


def table(results: dict[str, Any]) -> str:
    """For a README: the kinds with their cost, then what was compared."""
    lines = ["| fault | times | cause in the ledger | lost steps, most | seconds to go on: median, most |",
             "| --- | ---: | --- | ---: | ---: |"]  # fmt: skip
    for name, own in by_kind(results):
        seconds = sorted(row["seconds"] for row in own)
        lost = max(row["lost_steps"] for row in own)
        median = seconds[len(seconds) // 2]
        lines.append(f"| {name} | {len(own)} | {causes(own)} | {lost} | {median:g}, {seconds[-1]:g} |")
    return "\n".join([*lines, "", verdict(results)])


def matrix(each: Sequence[dict[str, Any]]) -> str:
    """The same side by side, a column for every way in which a job was started and found."""
    titles = [f"{results['backend']}, {results['tracking'].split()[0]}" for results in each]
    lines = [f"| fault: cause, lost steps, seconds to go on | {' | '.join(titles)} |", "| --- |" + " --- |" * len(each)]
    columns = [dict(by_kind(results)) for results in each]
    for name in sorted({name for column in columns for name in column}):
        cells = [
            f"{causes(own)}, {max(row['lost_steps'] for row in own)}, {max(row['seconds'] for row in own):g}"
            if (own := column.get(name))
            else ""
            for column in columns
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    said = (f"- {title}: {verdict(results)}" for title, results in zip(titles, each, strict=True))
    return "\n".join([*lines, "", *said])


def by_kind(results: dict[str, Any]) -> list[tuple[str, list[Row]]]:
    names = sorted({str(row["fault"]) for row in results["faults"]})
    return [(name, [row for row in results["faults"] if row["fault"] == name]) for name in names]


def causes(rows: Sequence[Row]) -> str:
    return ", ".join(sorted({row["cause"] for row in rows}))


def verdict(results: dict[str, Any]) -> str:
    same = ", ".join(f"{name} {'equal' if equal else '**differ**'}" for name, equal in results["same"].items())
    audit = ", ".join(f"{key} {value}" for key, value in results["audit"].items())
    return f"{len(results['faults'])} faults in {results['steps']} steps: {same}. Audit: {audit}."


if __name__ == "__main__":
    sys.exit(main())
