"""Many runs as one Slurm job array: each element finds its run by its number.

`runs/<group>/.sweep-0001/` holds a link per element, `0 -> ../<run folder>`, and `sweep.json`. An element prints to the
`slurm/` of its run through the link, by which squeue tells whose job it is; an array has one name for all.
"""

import itertools
import json
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from launch import backends, journal, render, slurm, squeue
from launch.compose import CHECKOUT
from launch.rundir import hold, read_state
from launch.site import parse_settings
from launch.start import HOLD_SECONDS, clear, settle
from synthos.schema import JobConfig

BACKENDS = ("submitit", "sbatch")
# Flags of which an array has one of its own; and those that stand for cluster.requeue, which is compared by that key.
OWN = ("job-name", "output", "signal", "exclude", "requeue", "no-requeue")
KEYS = {**render.OWN_KEYS, "gres": "gpus_per_node"}
Item = TypeVar("Item")


@dataclass(frozen=True)
class Run:
    """A run that may become an element.

    Attributes:
        title: what it is called in messages.
        config: of its job.
        folder: its run folder, which need not exist.
        prepare: writes the folder.
    """

    title: str
    config: JobConfig
    folder: Path
    prepare: Callable[[], None]


def common(config: JobConfig, folder: Path) -> dict[str, object]:
    """What all elements of an array must have alike, by keys of the config."""
    cluster = config.cluster
    alike: dict[str, object] = {"cluster.backend": cluster.backend}
    if cluster.backend in BACKENDS:
        alike |= {"cluster.environment": cluster.environment, "cluster.requeue": cluster.requeue}
        for flag, value in render.flags(config, folder).items():
            if flag not in OWN:
                alike[KEYS.get(flag, f"cluster.sbatch.{flag}")] = value
    return alike


def command(
    runs: Sequence[tuple[JobConfig, Path]], folder: Path, parallelism: int | None, after: str = ""
) -> list[str]:
    """The sbatch command of the array of runs whose links lie in `folder`; it waits for the array `after` to end."""
    every = [render.flags(config, run) for config, run in runs]
    excluded = dict.fromkeys(node for flags in every for node in flags.get("exclude", "").split(",") if node)
    flags = every[0] | {
        "job-name": folder.parent.name,
        "output": str(folder / "%a" / "slurm" / "%A_%a.out"),
        "array": f"0-{len(runs) - 1}" + (f"%{parallelism}" if parallelism else ""),
        "signal": f"USR2@{_notice(runs)}",
    }
    flags["exclude"] = ",".join(excluded)
    flags["dependency"] = ",".join(filter(None, [flags.get("dependency"), after and f"afterany:{after}"]))
    given = [render.flag(key, value) for key, value in flags.items() if value or key not in ("exclude", "dependency")]
    return ["sbatch", "--parsable", *given, str(runs[0][1] / "code" / "slurm" / "train.sbatch"), str(folder)]


def _notice(runs: Sequence[tuple[JobConfig, Path]]) -> int:
    """The notice of an array: that of the run which needs the longest."""
    return max(render.planned_notice(config, folder) for config, folder in runs)


def describe(runs: Sequence[tuple[JobConfig, Path]], parallelism: int | None) -> str:
    """What Slurm will be given of runs that are not done: the commands, and the script that they name."""
    if not runs:
        return "nothing is left to submit: every point is done\n"
    group = runs[0][1].parent
    folders = (group / f".sweep-{number:04d}" for number in itertools.count(_last(group) + 1))
    parts, lines, after = _parts(runs), [], ""
    for part in parts:
        lines.append(render.typed(runs[0][0].cluster, command(part, next(folders), parallelism, after), os.environ))
        after = "<the array before>" if parallelism else ""
    script = (CHECKOUT / "slurm" / "train.sbatch").read_text()
    heads = (
        "command:" if len(lines) == 1 else f"{len(lines)} commands, for an array has at most {len(parts[0])} elements:"
    )
    return "\n".join([f"\n{heads}", *lines, "\nscript:", script])


def submit(runs: Sequence[Run], parallelism: int | None) -> int:
    """Submit the runs that are neither done nor under way, or with backend sbatch print the lines to type.

    Each run is held from the look at its state until its job is recorded. Returns the exit code.
    """
    _allow_open_files(len(runs))
    with ExitStack() as stack:
        try:
            runs_dir = Path(runs[0].config.runs_dir)
            settle(runs_dir)
            under_way = squeue.jobs_of([run.folder for run in runs])
            free = [run.folder for run in runs if not under_way.of(run.folder)]
            deadline = time.monotonic() + HOLD_SECONDS  # for all together
            locks = {f: stack.enter_context(hold(f, max(0, deadline - time.monotonic()))) for f in free}
            # Before the queue is asked: where another command settles it meanwhile, the job is found there.
            cut_short = [folder for folder in free if journal.pending(runs_dir, folder)]
            queue = squeue.jobs_of([run.folder for run in runs])  # again: now nobody else can submit one
            todo = [run for run in runs if _is_to_start(run, queue, locks.get(run.folder) is not None)]
            if any(run.folder in cut_short for run in todo):
                raise RuntimeError(f"a submission of some was just cut short; {journal.WAIT}")
            for run in todo:
                clear(run.folder)
                run.prepare()
                (run.folder / "slurm").mkdir(exist_ok=True)
            return _submit(todo, locks, parallelism) if todo else 0
        except ValueError as error:  # the one fault of the user that only trying tells
            print(f"error: {error}", file=sys.stderr)
            return 2
        except (RuntimeError, OSError) as error:
            print(f"error: what is not named above is not submitted: {error}", file=sys.stderr)
            return 1


def _is_to_start(run: Run, queue: squeue.Queue, held: bool) -> bool:
    """Whether a run is neither done nor under way; what it is instead is said."""
    if jobs := queue.of(run.folder):
        print(f"{run.title}: {run.folder.name} has job {jobs[0].job} already, {jobs[0].state} ({jobs[0].detail})")
    elif not held:
        print(f"{run.title}: {run.folder.name} is running already")
    elif (state := read_state(run.folder)).done:
        print(f"{run.title}: {run.folder.name} is done")
    else:
        if state.exists:
            print(
                f"{run.title}: {run.folder.name} " + (f"continues from step {state.step}" if state.step else "starts")
            )
        return True
    return False


def _submit(todo: Sequence[Run], locks: Mapping[Path, IO[str] | None], parallelism: int | None) -> int:
    after, group = "", todo[0].folder.parent
    for part in _parts(todo):
        pairs = [(run.config, run.folder) for run in part]
        folder = _open(group, part)
        notice = _notice(pairs)
        for config, run_dir in pairs:
            (run_dir / "slurm" / "job.sh").write_text(render.job_file(config, run_dir, notice))
        order = command(pairs, folder, parallelism, after)
        cluster = part[0].config.cluster
        if cluster.backend == "sbatch":
            print(
                f"prepared {len(part)} points in {folder}; start them with\n{render.typed(cluster, order, os.environ)}"
            )
            after = "ID_OF_THE_ARRAY_BEFORE" if parallelism else ""
            continue
        with journal.intend(Path(part[0].config.runs_dir), [run.folder for run in part], array=True) as intent:
            try:
                answer = slurm.order(order, render.clean(cluster, os.environ))
            except RuntimeError as error:
                if backends.UNANSWERED.search(str(error)) or "did not answer" in str(error):
                    raise RuntimeError(f"{error}; {journal.WAIT}") from None
                intent.refused()
                shutil.rmtree(folder)
                raise
            if not re.fullmatch(r"\d+(;\S+)?", answer):  # a site's own words; the array may be in the queue
                raise RuntimeError(f"sbatch answered {answer!r}; {journal.WAIT}")
            job = answer.split(";")[0]
            intent.complete(job)
        for run in part:  # its element may start while the next array is submitted
            if lock := locks[run.folder]:
                lock.close()
        at_a_time = f", {parallelism} at a time" if parallelism else ""
        print(f"submitted job array {job} of {len(part)} points{at_a_time}: {folder}")
        after = job if parallelism else ""
    print(f"see them:  synthos status {group.name} --watch\nstop them: synthos stop {group.name}")
    return 0


def _parts(runs: Sequence[Item]) -> list[Sequence[Item]]:
    """The runs in arrays that are as large as the cluster allows."""
    size = _largest() or len(runs)
    return [runs[start : start + size] for start in range(0, len(runs), size)]


def _largest() -> int | None:
    """How many elements an array may have; None where Slurm can't be asked."""
    try:
        told = slurm.order(["scontrol", "show", "config"])
    except RuntimeError:
        return None
    return int(parse_settings(told).get("MaxArraySize", "0")) or None


def _open(group: Path, runs: Sequence[Run]) -> Path:
    """A new folder of links to the runs, by element."""
    while True:
        folder = group / f".sweep-{_last(group) + 1:04d}"
        with suppress(FileExistsError):  # another sweep of the group has just taken it
            folder.mkdir()
            break
    for index, run in enumerate(runs):
        (folder / str(index)).symlink_to(os.path.relpath(run.folder, folder))
    points = [{"point": run.title, "folder": str(run.folder)} for run in runs]
    (folder / "sweep.json").write_text(json.dumps({"points": points}, indent=1))
    return folder


def _last(group: Path) -> int:
    found = (re.fullmatch(r"\.sweep-(\d+)", path.name) for path in group.glob(".sweep-*"))
    return max((int(match[1]) for match in found if match), default=0)


def _allow_open_files(count: int) -> None:
    """Each run is held by an open file; the usual limit is 1024, and may be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft < wanted and (hard == resource.RLIM_INFINITY or hard >= wanted):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
