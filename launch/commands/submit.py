"""`synthos submit`: the straight line from a command line to a run. Bad input ends it before anything is written."""

import dataclasses
from collections.abc import Callable

from launch import slurm
from launch.check import length_problems, machine_problems, value_problems
from launch.compose import CHECKOUT, choices, compose
from launch.identity import sig8
from launch.plan import UNKNOWN_SIG8, Plan
from launch.provenance import inputs_of
from launch.redact import problems as secrets
from launch.requests import load_requests
from launch.rundir import code_problems, open_folder, read_state, run_folder
from launch.start import start
from launch.survey import space_problems, survey
from synthos.models import initial
from synthos.models.parts import pinned
from synthos.schema import RunConfig
from synthos.strict import dump

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
    plan = make_plan(composed.config, composed.dry_run, composed.full, composed.new)
    if composed.dry_run:
        print(plan.render(), plan.job(), sep="\n", end="")
        return 0
    if plan.survey.missing:
        raise ValueError("\n".join(plan.survey.missing))
    return lambda: begin(plan, ["synthos", "submit", *arguments], composed.follow)


def make_plan(config: RunConfig, dry_run: bool, full: bool = False, new: bool = False) -> Plan:
    """Everything that can be known before the start; ValueError, in one message, for what can't work.

    A dry run builds the model if it is to be `full`, as a submission does. A `new` run is none that was begun before.
    """
    from synthos.build import last_step, measure, recipe_class, recipe_config

    recipe = recipe_class(config.recipe.get("name", ""))
    problems = [*value_problems(config, recipe, recipe_config(config.recipe)), *secrets(dump(config))]
    if problems:
        raise ValueError("\n".join(problems))
    validate = dataclasses.replace(config.validate, requests=load_requests(config, recipe))
    model, init_from = pinned(config.model), initial.pinned(config.init_from)
    config = dataclasses.replace(config, validate=validate, model=model, init_from=init_from)
    sizes = measure(config) if full or not dry_run else None
    found = survey(config, recipe, dry_run, [*machine_problems(config), *code_problems(config, CHECKOUT)])
    samples, fingerprint = found.data.samples, found.data.fingerprint
    steps = last_step(config, samples or 0) if samples is not None or config.optim.steps else None
    if samples is not None and steps is not None and (problems := [*length_problems(config, samples, steps)]):
        raise ValueError("\n".join(problems))
    folder = run_folder(config, sig8(config, fingerprint), new) if fingerprint else None
    missing, notes = slurm.look(config, folder or run_folder(config, UNKNOWN_SIG8))
    state = read_state(folder) if folder else None
    space = space_problems(config, sizes, folder) if sizes and not (state and state.done) else []
    found = dataclasses.replace(found, missing=[*found.missing, *space, *missing], notes=[*found.notes, *notes])
    return Plan(
        config=config,
        folder=folder,
        state=state,
        survey=found,
        sizes=sizes,
        last_step=steps,
    )


def begin(plan: Plan, command: list[str], following: bool) -> int:
    """Start the planned run; returns the exit code."""
    folder = plan.folder
    assert folder is not None, "a submission without missing data has a folder"

    def prepare() -> None:
        step = read_state(folder).step
        print(plan.render())
        print("starts" if step is None else f"continues from step {step}")
        open_folder(folder, plan.config, command, CHECKOUT, inputs_of(plan.config, plan.survey.data.fingerprint))

    return start(plan.config, folder, prepare, following)
