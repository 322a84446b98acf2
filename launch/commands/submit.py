"""`synthos submit`: the straight line from a command line to a run. Bad input ends it before anything is written."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from launch import render, slurm, sweep
from launch.after import After, find_after, waiting
from launch.check import length_problems, machine_problems, value_problems
from launch.compose import CHECKOUT, Composed, choices
from launch.identity import sig8
from launch.known import Known
from launch.plan import UNKNOWN_SIG8, Plan
from launch.points import Point, compose_points, for_all
from launch.provenance import inputs_of
from launch.redact import problems as secrets
from launch.requests import load_requests
from launch.rundir import code_problems, open_folder, read_state, run_folder
from launch.start import start
from launch.survey import space_problems, survey
from synthos.data.plan import last_step
from synthos.models import initial
from synthos.models.content import digest
from synthos.models.parts import pinned
from synthos.recipes.base import recipe_class, recipe_config
from synthos.schema import RunConfig
from synthos.strict import dump
from synthos.train.memory import Sizes

USAGE = """usage: synthos submit recipe=<name> [group=<name>] [key=value] ...

Train a recipe. The same command again continues the run, or says that it is done. `dry_run=true` prints the plan and
writes nothing. configs/run.yaml lists the shared keys, configs/recipe/<name>.yaml those of a recipe. Several values, as
in optim.lr=1e-4,3e-4 seed=0,1, are a sweep: a run for each point, on Slurm all of them in one job array.
"""


def main(arguments: list[str]) -> int | Callable[[], int]:
    """Check and plan; returns 0 for a dry run, else the work: opening the run folder and training.

    Raises ValueError for everything that the user wrote wrongly or did not bring.
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE, *(f"{group}: {', '.join(names)}" for group, names in choices().items()), sep="\n")
        return 0
    points, known = compose_points(arguments), Known()
    plans = for_all([point.values for point in points], [lambda p=p: _plan(p, known) for p in points])  # type: ignore[misc]
    composed, command = points[0].composed, ["synthos", "submit", *arguments]
    if points[0].values:
        return _sweep(points, plans, command, known)
    if composed.array_parallelism:
        raise ValueError(
            f"array_parallelism: {composed.array_parallelism} has no effect without a sweep; expected null"
        )
    if composed.dry_run:
        print(plans[0].render(), plans[0].job(), sep="\n", end="")
        return 0
    return lambda: begin(plans[0], command, composed.follow)


def _plan(point: Point, known: Known) -> Plan:
    """The plan of one command line; ValueError, too, for what a submission would miss."""
    composed = point.composed
    plan = make_plan(composed.config, composed.dry_run, composed.full, composed.new, known)
    if plan.survey.missing and not composed.dry_run:
        raise ValueError("\n".join(plan.survey.missing))
    first = known.ask("after", composed.after, lambda: _after(composed))
    return dataclasses.replace(plan, after=first)


def _after(composed: Composed) -> After | None:
    return find_after(composed.after, composed.config, Path(composed.config.runs_dir))


def _sweep(points: Sequence[Point], plans: Sequence[Plan], command: list[str], known: Known) -> int | Callable[[], int]:
    planned = [sweep.Planned(point.values, plan) for point, plan in zip(points, plans, strict=True)]
    composed = points[0].composed
    if composed.follow:
        raise ValueError("follow: true has no effect with a sweep; expected false, and synthos status GROUP --watch")
    sweep.check(planned, composed.array_parallelism)
    if composed.dry_run:
        sweep.show(planned, composed.array_parallelism)
        return 0
    return lambda: sweep.begin(planned, composed.array_parallelism, lambda plan: prepare(plan, command, known))


def make_plan(
    config: RunConfig, dry_run: bool, full: bool = False, new: bool = False, known: Known | None = None
) -> Plan:
    """Everything that can be known before the start; ValueError, in one message, for what can't work.

    A dry run builds the model if it is to be `full`, as a submission does. A `new` run is none that was begun before.
    What is `known` from other points of a sweep is not found out again.
    """
    known = known or Known()
    recipe = recipe_class(config.recipe.get("name", ""))
    problems = [*value_problems(config, recipe, recipe_config(config.recipe)), *secrets(dump(config))]
    if problems:
        raise ValueError("\n".join(problems))
    asked, name = config.validate, config.recipe["name"]
    requests = known.ask("requests", (asked.requests, asked.from_split, name), lambda: load_requests(config, recipe))
    config = dataclasses.replace(
        config,
        validate=dataclasses.replace(asked, requests=requests),
        model=known.ask("model", config.model, lambda: pinned(config.model)),
        init_from=known.ask("init_from", config.init_from, lambda: initial.pinned(config.init_from)),
    )
    built = (config.model, config.recipe, config.init_from, config.cache_dir)
    shaped = (*built, requests, config.optim.lr_groups, config.data.height, config.data.width)
    sizes = known.ask("sizes", shaped, lambda: _measure(config)) if full or not dry_run else None
    where = (config.cluster, config.runs_dir, config.cache_dir)
    absent = known.ask("machine", (where, config.nodes, config.gpus_per_node), lambda: [*machine_problems(config)])
    absent = [*absent, *known.ask("code", where, lambda: code_problems(config, CHECKOUT))]
    needed = (config.model, config.data, config.ranks, config.cache_dir, absent, config.init_from and built, name)
    found = known.ask("survey", needed, lambda: survey(config, recipe, dry_run, absent))
    samples, fingerprint = found.data.samples, found.data.fingerprint
    steps = last_step(config, samples or 0) if samples is not None or config.optim.steps else None
    if samples is not None and steps is not None and (problems := [*length_problems(config, samples, steps)]):
        raise ValueError("\n".join(problems))
    folder = run_folder(config, _sig8(config, fingerprint, known), new) if fingerprint else None
    missing, notes = _ask_slurm(config, folder or run_folder(config, UNKNOWN_SIG8), known)
    state = read_state(folder) if folder else None
    space = space_problems([(config, sizes, folder)]) if sizes and not (state and state.done) else []
    found = dataclasses.replace(found, missing=[*found.missing, *space, *missing], notes=[*found.notes, *notes])
    return Plan(
        config=config,
        folder=folder,
        state=state,
        survey=found,
        sizes=sizes,
        last_step=steps,
    )


def _measure(config: RunConfig) -> Sizes:
    from synthos.build import measure  # not above: all of training, of which a dry run needs nothing

    return measure(config)


def _sig8(config: RunConfig, fingerprint: str, known: Known) -> str:
    return sig8(config, fingerprint, lambda path: known.ask("content", path, lambda: digest(path)))


def _ask_slurm(config: RunConfig, folder: Path, known: Known) -> tuple[list[str], list[str]]:
    """Slurm's answer to the flags of a job, whatever its name is."""
    flags = {key: value for key, value in render.flags(config, folder).items() if key not in ("job-name", "output")}
    return known.ask("slurm", (config.cluster, flags), lambda: slurm.look(config, folder))


def begin(plan: Plan, command: list[str], following: bool) -> int:
    """Start the planned run; returns the exit code."""
    folder = plan.folder
    assert folder is not None, "a submission without missing data has a folder"

    def open_it() -> None:
        step = read_state(folder).step
        print(plan.render())
        print("starts" if step is None else f"continues from step {step}")
        prepare(plan, command)

    return start(waiting(plan.config, plan.after), folder, open_it, following)


def prepare(plan: Plan, command: list[str], known: Known | None = None) -> None:
    """Write the run's folder; what is `known` of the checkout is not asked again."""
    assert plan.folder is not None, "a submission without missing data has a folder"
    inputs = inputs_of(plan.config, plan.survey.data.fingerprint)
    open_folder(plan.folder, plan.config, command, CHECKOUT, inputs, known)
