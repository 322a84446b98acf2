"""How fast is the data engine on one core, beside webdataset, MosaicML streaming and Hugging Face datasets?

    python -m benchmarks.data                    everything; makes an environment for each rival on first use
    python -m benchmarks.data --quick            small pictures and few rounds; its figures mean nothing
    python -m benchmarks.data --no-rivals        our side only

All read the same JPEGs, on the same core, in one run: they take turns, an epoch each, so that whatever else the machine
does meets them all. Each is a process of its own, each rival with its own packages. Ratios are formed within a round.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import pictures
from benchmarks.data_table import judge, markdown
from benchmarks.learning import ROOT
from launch.snapshot import git_facts

CACHE = ROOT / ".cache" / "benchmark"
RIVALS = {
    "webdataset": ("webdataset==1.0.2", "pillow==13.0.0", "numpy"),
    "mosaicml": ("mosaicml-streaming==0.13.0", "pillow==13.0.0"),
    "datasets": ("datasets==5.2.0", "pillow==13.0.0"),
}


@dataclass(frozen=True)
class Case:
    """Pictures of one size, and the edge of the squares that they become."""

    width: int
    height: int
    edge: int
    count: int


@dataclass(frozen=True)
class Effort:
    cases: tuple[Case, ...]
    batch: int
    shards: int
    rounds: int
    small: int  # tiny pictures, which are read in random order
    reads: int
    planned: int  # samples of the data set whose order is made


FULL = Effort((Case(1600, 1200, 512, 192), Case(512, 512, 512, 384)), 32, 4, 9, 4000, 100_000, 100_000_000)
QUICK = Effort((Case(400, 300, 128, 32), Case(128, 128, 128, 32)), 8, 2, 2, 40, 1000, 1_000_000)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small run without rivals that have no environment yet")
    parser.add_argument("--no-rivals", action="store_true", help="nobody but bare decoding and Synthos")
    parser.add_argument("--rounds", type=int, help="epochs that each loader is timed for; default: 9, with --quick 2")
    parser.add_argument("--core", type=int, help="which core all share; default: the last")
    parser.add_argument("--venvs", type=Path, default=CACHE / "venvs", help="environments; default: %(default)s")
    parser.add_argument("--data", type=Path, default=CACHE / "data", help="pictures; default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/data.json, with --quick none")
    args = parser.parse_args(arguments)
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds: {args.rounds} is not allowed; expected 1 or more")
    if args.out and not args.out.parent.is_dir():
        parser.error(f"--out: {args.out.parent} is no folder")
    if hasattr(os, "sched_getaffinity") and args.core is not None and args.core not in os.sched_getaffinity(0):
        parser.error(f"--core: {args.core} is not ours; {', '.join(map(str, sorted(os.sched_getaffinity(0))))} are")
    effort = QUICK if args.quick else FULL
    absent = {} if args.no_rivals else environments(args.venvs, make=not args.quick)
    rivals = {} if args.no_rivals else {n: args.venvs / n / "bin" / "python" for n in RIVALS if n not in absent}
    record = measure(effort, args.rounds or effort.rounds, rivals, args.data, args.core) | {"left_out": absent}
    record["goals"] = judge(record)
    print(markdown(record))
    if args.out or not (args.quick or args.no_rivals):
        path = args.out or ROOT / "benchmarks" / "results" / "data.json"
        path.write_text(json.dumps({"quick": args.quick, **record}, indent=1) + "\n")
    return 0


def environments(folder: Path, make: bool) -> dict[str, str]:
    """Make what is missing, each whole or not at all; who is left out, and why."""
    absent = {}
    for name, packages in RIVALS.items():
        if (folder / name / "bin" / "python").is_file():
            continue
        if not make:
            absent[name] = f"no environment {folder / name}"
            continue
        part = folder / f".{name}.part"
        _say(f"making an environment: {', '.join(packages)}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", part], check=True)
        subprocess.run([part / "bin" / "python", "-m", "pip", "install", "--quiet", *packages], check=True)
        part.rename(folder / name)
    return absent


def measure(effort: Effort, rounds: int, rivals: dict[str, Path], data: Path, core: int | None) -> dict[str, Any]:
    """Every row, and what it was measured on."""
    pythons = {"bare": Path(sys.executable), "ours": Path(sys.executable), **rivals}
    record: dict[str, Any] = {**about(), "effort": asdict(effort), "rounds": rounds, "cases": []}
    with one_core(core):
        for case in effort.cases:
            folder = pictures.shards(data, case.width, case.height, case.count, case.count // effort.shards)
            if "mosaicml" in rivals and not (folder / "mds").is_dir():
                _run(rivals["mosaicml"], "mosaicml", folder, "convert")
            record["cases"].append(asdict(case) | race(pythons, folder, case.edge, effort.batch, rounds))
        small = pictures.shards(data, 64, 64, effort.small, effort.small // effort.shards)
        ours = Path(sys.executable)
        ours, edge = Path(sys.executable), effort.cases[-1].edge
        record["plan"] = json.loads(_run(ours, "ours", "plan", effort.planned))  # alone, for its memory is told
        record |= json.loads(_run(ours, "ours", "rows", small, effort.reads, folder, edge, effort.batch))
    return record


def race(pythons: dict[str, Path], folder: Path, edge: int, batch: int, rounds: int) -> dict[str, Any]:
    """Images per second of one core, one figure for each round; the first round is not counted."""
    with contextlib.ExitStack() as stack:
        runners = {n: stack.enter_context(_start(python, n, folder, edge, batch)) for n, python in pythons.items()}
        versions = {name: _answer(runner) for name, runner in runners.items()}
        cpu: dict[str, list[float]] = {name: [] for name in runners}
        wall: dict[str, list[float]] = {name: [] for name in runners}
        for number in range(rounds + 1):
            _say(f"{folder.name}: round {number} of {rounds}")
            for name, runner in runners.items():
                assert runner.stdin is not None
                runner.stdin.write(b"\n")
                runner.stdin.flush()
                found = _answer(runner)
                if number:
                    cpu[name].append(found["images"] / found["cpu_seconds"])
                    wall[name].append(found["images"] / found["wall_seconds"])
    return {"versions": versions, "images_per_s": cpu, "images_per_wall_s": wall}


@contextlib.contextmanager
def one_core(core: int | None) -> Iterator[None]:
    """This process and its children on one core, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before) if core is None else core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def about() -> dict[str, Any]:
    """Device and commit; versions stand beside each loader's figures."""
    models = [line.partition(":")[2].strip() for line in _cpu_facts() if line.startswith("model name")]
    git = git_facts(ROOT)
    return {
        "device": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "commit": git["commit"],
        "changed_since_commit": git["changed"],
        "load": os.getloadavg()[0],
    }


def _cpu_facts() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


@contextlib.contextmanager
def _start(python: Path, name: str, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """A contestant, ended with the block."""
    command = _command(python, name, *arguments)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=_environment())
    try:
        yield process
    finally:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        process.stdout.close()
        process.wait(60)


def _answer(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The next line of JSON; what a package prints while it is imported is passed over."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(b"{"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise RuntimeError(f"{process.args!r} ended with {process.wait(60)}; its own message stands above")


def _run(python: Path, name: str, *arguments: object) -> str:
    _say(f"{name}: {' '.join(map(str, arguments))}")
    command = _command(python, name, *arguments)
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, env=_environment(), check=True, text=True)
    return done.stdout.strip().rpartition("\n")[2]


def _command(python: Path, name: str, *arguments: object) -> list[str]:
    return [str(python.absolute()), "-m", f"benchmarks.rivals.{name}", *map(str, arguments)]


def _environment() -> dict[str, str]:
    """One thread, and no look at the network by those who would ask a hub first."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(CACHE / "hf")}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
