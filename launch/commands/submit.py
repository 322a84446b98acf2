"""`synthos submit`: the straight line from a command line to a run. Bad input ends it before anything is written."""

import dataclasses
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from launch import backends
from launch.attempts import newest_record
from launch.check import length_problems, machine_problems, value_problems
from launch.compose import CHECKOUT, choices, compose
from launch.identity import sig8
from launch.plan import Plan
from launch.requests import load_requests
from launch.rundir import hold, open_folder, read_state, run_folder
from launch.survey import survey
from synthos.models.parts import pinned
from synthos.schema import RunConfig

USAGE = """usage: synthos submit recipe=<name> [group=<name>] [key=value] ...

Train a recipe. The same command again continues the run, or says that it is done. `dry_run=true` prints the plan and
writes nothing. configs/run.yaml lists the shared keys, configs/recipe/<name>.yaml those of a recipe.
"""


def main(arguments: list[str]) -> int | Callable[[], int]:
    """Check and plan; returns 0 for a dry run, else the work: opening the run folder and training.

    Raises ValueError for everything that the user wrote wrongly or did not bring.
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE, *(f"{group}: {', '.join(names)}" for group, names in choices().items()), sep="\n")
        return 0
    composed = compose(arguments)
    plan = make_plan(composed.config, composed.dry_run)
    if composed.dry_run:
        print(plan.render())
        return 0
    if plan.survey.missing:
        raise ValueError("\n".join(plan.survey.missing))
    return lambda: start(plan, ["synthos", "submit", *arguments])


def make_plan(config: RunConfig, dry_run: bool) -> Plan:
    """Everything that can be known before the start; ValueError, in one message, for what can't work."""
    from synthos.build import count_parameters, last_step, recipe_class, recipe_config

    recipe = recipe_class(config.recipe.get("name", ""))
    problems = value_problems(config, recipe, recipe_config(config.recipe))
    if problems:
        raise ValueError("\n".join(problems))
    validate = dataclasses.replace(config.validate, requests=load_requests(config, recipe))
    config = dataclasses.replace(config, validate=validate, model=pinned(config.model))
    parameters = count_parameters(config)
    found = survey(config, recipe, dry_run, [*machine_problems(config)])
    samples, fingerprint = found.data.samples, found.data.fingerprint
    steps = last_step(config, samples or 0) if samples is not None or config.optim.steps else None
    if samples is not None and steps is not None and (problems := [*length_problems(config, samples, steps)]):
        raise ValueError("\n".join(problems))
    folder = run_folder(config, sig8(config, fingerprint)) if fingerprint else None
    return Plan(
        config=config,
        folder=folder,
        state=read_state(folder) if folder else None,
        survey=found,
        parameters=parameters,
        last_step=steps,
    )


def start(plan: Plan, command: list[str]) -> int:
    """Hold the run folder and run an attempt in it; returns its exit code."""
    folder = plan.folder
    assert folder is not None, "a submission without missing data has a folder"
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(hold(folder))
        except ValueError as error:  # the one fault of the user that only trying tells
            print(f"error: {error}", file=sys.stderr)
            return 2
        if lock is None:
            record = newest_record(folder)
            by = f" (attempt {record['attempt']}, process {record['pid']})" if record else ""
            print(f"{folder} is running already{by}", file=sys.stderr)
            return 1
        return run_attempt(plan, folder, command, lock)


def run_attempt(plan: Plan, folder: Path, command: list[str], lock: IO[str]) -> int:
    """Open the folder that `lock` holds, or go on in it, unless its run is done; returns the exit code."""
    state = read_state(folder)  # again: now nobody else can change it
    if state.done:
        print(f"{folder} is done; its weights are in {state.weights}")
        return 0
    print(plan.render())
    print(f"continues from step {state.step or 0}" if state.exists else "starts")
    open_folder(folder, plan.config, command, CHECKOUT)
    return backends.start(plan.config.cluster.backend, folder, lock)
