"""A sweep: its points are checked together, then each is a run of its own, on Slurm an element of a job array."""

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import array, squeue
from launch.after import waiting
from launch.identity import LEFT_OUT
from launch.look import look_at
from launch.plan import UNKNOWN, UNKNOWN_SIG8, Plan, describe_state, page
from launch.points import title
from launch.rundir import run_folder
from launch.start import start
from launch.survey import space_problems
from launch.tell import console, table, warn
from synthos.schema import RunConfig
from synthos.train.memory import Sizes

SIGNALLED = (130, 143)  # exit codes after Ctrl-C and SIGTERM
OWN_ROWS = ("run folder", "holds")  # of a plan, which differ from point to point


@dataclass(frozen=True)
class Planned:
    """A point: values of the swept keys, and its plan."""

    values: dict[str, str]
    plan: Plan

    @property
    def title(self) -> str:
        return title(self.values)

    @property
    def config(self) -> RunConfig:
        """As its job gets it."""
        config = waiting(self.plan.config, self.plan.after)
        assert isinstance(config, RunConfig)
        return config

    @property
    def folder(self) -> Path:
        """The run folder, or where it will be."""
        return self.plan.folder or run_folder(self.plan.config, UNKNOWN_SIG8)


def check(points: Sequence[Planned], parallelism: int | None) -> None:
    """Raise ValueError, in one message, where two points are one experiment, can't be elements of one array, or would
    together fill the disk.
    """
    problems = list(_twins(points))
    backend = points[0].config.cluster.backend
    if parallelism and backend not in array.BACKENDS:
        problems.append(f"array_parallelism: {parallelism} has no effect with cluster.backend={backend}; expected null")
    if parallelism and points[0].config.cluster.requeue == "chain":
        problems.append(
            f"array_parallelism: {parallelism} can't hold with cluster.requeue=chain, whose successors are jobs of "
            "their own; expected null, or cluster.requeue=scontrol or none"
        )
    problems = problems or [*_differences(points), *space_problems([*_to_come(points)])]
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))


def _to_come(points: Sequence[Planned]) -> Iterator[tuple[RunConfig, Sizes, Path | None]]:
    """The runs that will write checkpoints, in so far as their shapes are known."""
    for plan in (point.plan for point in points):
        if plan.sizes and not (plan.state and plan.state.done):
            yield plan.config, plan.sizes, plan.folder


def _differences(points: Sequence[Planned]) -> Iterator[str]:
    """A line for each key in which a point can't be an element of the same array as the first."""
    first = array.common(points[0].config, points[0].folder)
    told: set[str] = set()
    for point in points[1:]:
        other = array.common(point.config, point.folder)
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key) and key not in told:
                told.add(key)
                where = f"{first.get(key)!r} at {points[0].title}, {other.get(key)!r} at {point.title}"
                yield f"{key}: {where}; expected one value, for the points are one job array"


def _twins(points: Sequence[Planned]) -> list[str]:
    """A line for each swept key that makes no other experiment of a run."""
    problems: list[str] = []
    seen: dict[str, Planned] = {}  # by name and signature: another `runs_dir` is no other experiment
    for point in points:
        twin = seen.setdefault(point.folder.name, point)
        if twin is point or point.plan.folder is None:
            continue
        keys = [key for key, value in point.values.items() if twin.values[key] != value]
        idle = [key for key in keys if any(key == left or key.startswith(f"{left}.") for left in LEFT_OUT)]
        problems += [f"{key}: is no part of what a run is, so its values can't be swept; expected one" for key in idle]
        if not idle:
            problems.append(
                f"{', '.join(keys or point.values)}: {twin.title} and {point.title} are the same experiment"
            )
    return problems


def show(points: Sequence[Planned], parallelism: int | None) -> None:
    """Print the sweep: what all points share, each point, and what Slurm will be given; nothing is written."""
    shared, notes = _shared([point.plan for point in points]), points[0].plan.survey
    print(page(shared, notes))
    queue = squeue.ask([point.folder for point in points])
    rows = [
        (number, *point.values.values(), point.folder.name if point.plan.folder else UNKNOWN, _holds(point, queue))
        for number, point in enumerate(points)
    ]
    group = Path(points[0].plan.config.runs_dir) / points[0].plan.config.group
    console().print(table([">", *points[0].values, "run folder", "holds"], rows, f"{len(points)} points in {group}"))
    if points[0].config.cluster.backend in array.BACKENDS:
        todo = [p for p in points if not queue.of(p.folder) and not (p.plan.state and p.plan.state.done)]
        print(array.describe([(point.config, point.folder) for point in todo], parallelism), end="")


def _holds(point: Planned, queue: squeue.Queue) -> str:
    jobs = [f", job {job.job} {job.state}" for job in queue.of(point.folder)]
    return describe_state(point.plan.state) + "".join(jobs)


def _shared(plans: Sequence[Plan]) -> dict[str, str]:
    """The rows of a plan; where points differ, all that they say."""
    every = [plan.rows() for plan in plans]
    names = [name for name in every[0] if name not in OWN_ROWS]
    return {name: " | ".join(dict.fromkeys(rows.get(name, "") for rows in every)) for name in names}


def begin(points: Sequence[Planned], parallelism: int | None, prepare: Callable[[Plan], None]) -> int:
    """Start every point that is not done and not under way; returns the exit code."""
    if points[0].config.cluster.backend in array.BACKENDS:
        runs = [
            array.Run(point.title, point.config, point.folder, lambda plan=point.plan: prepare(plan))  # type: ignore[misc]
            for point in points
        ]
        return array.submit(runs, parallelism)
    codes = []
    for point in points:
        print(f"==> {point.title}: {point.folder.name} <==", flush=True)
        codes.append(_run(point, prepare))
        if codes[-1] in SIGNALLED:
            warn(f"interrupted: {len(points) - len(codes)} points were not started; the same command goes on")
            break
    looks, _ = look_at([point.folder for point in points[: len(codes)]])
    rows = [
        (*p.values.values(), one.name, one.state, one.step, one.detail) for p, one in zip(points, looks, strict=False)
    ]
    console().print(table([*points[0].values, "run", "state", ">step", "why"], rows))
    return codes[-1] if codes[-1] in SIGNALLED else int(any(codes))


def _run(point: Planned, prepare: Callable[[Plan], None]) -> int:
    """One point on this machine."""
    try:
        return start(point.config, point.folder, lambda: prepare(point.plan), False)
    except (ValueError, RuntimeError, OSError):  # of a run with cluster=debug; the other points still have their turn
        traceback.print_exc(file=sys.stderr)
        return 1
