"""`synthos resume`: a run goes on from its own frozen config, perhaps on other machines.

Only what is no part of its identity may change. The global batch is part of it, so `nodes=2` is the same training.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from launch import squeue
from launch.attempts import newest_record
from launch.commands import generate, submit
from launch.compose import CONFIGS, choices
from launch.identity import GENERATION_LEFT_OUT, LEFT_OUT
from launch.look import look
from launch.rundir import read_state
from launch.runs import find_one, signature
from launch.tell import Undone, new_parser, print_json
from synthos.recipes.base import located
from synthos.schema import GenerateConfig, JobConfig, RunConfig, read_job
from synthos.strict import LOADER, dump, load, read_yaml, unknown

FIXED = ("runs_dir", "cache_dir")  # no part of the identity, but the folder lies where it lies


def main(arguments: list[str]) -> int | Callable[[], int]:
    """Check the run and what shall change; returns the start of the job.

    Raises ValueError for what would be another run.
    """
    parser = new_parser("resume", "Go on with a run from its newest checkpoint, on other machines if asked.", "one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as in nodes=2, cluster.time=2:00:00")
    parser.add_argument("-f", "--follow", action="store_true", help="show a submitted job until it ends")
    args = parser.parse_args(arguments)
    folder = find_one(args.run)
    config = changed_config(folder, args.overrides)
    if args.follow and (args.json or config.cluster.backend != "submitit"):
        why = "--json" if args.json else f"cluster.backend={config.cluster.backend}"
        raise ValueError(f"--follow: has no effect with {why}")
    one = look(folder, squeue.ask([folder]))
    if one.alive:
        raise Undone(f"{folder.name} is {one.state} already" + (f" ({one.detail})" if one.detail else ""))
    with quietly(args.json):
        work = plan_again(folder, config, ["synthos", "resume", *arguments], args.follow)
    return (lambda: _as_json(folder, work)) if args.json else work


def _as_json(folder: Path, work: Callable[[], int]) -> int:
    before = last_start(folder)
    with quietly(True):
        code = work()
    started = last_start(folder) != before
    print_json({"run": folder.name, "folder": str(folder), "started": started, "exit_code": code})
    return code


def last_start(folder: Path) -> tuple[int, int]:
    """What tells one start of a run from the next: when it was submitted, and its attempts. A line to type is none."""
    job = folder / "slurm" / "job"
    return job.stat().st_mtime_ns if job.exists() else 0, newest_record(folder).get("attempt", 0)


def changed_config(folder: Path, overrides: Sequence[str]) -> JobConfig:
    """The frozen config of a run with `key=value` overrides, its requests' files by absolute path.

    `cluster=<name>` takes a page of configs/cluster. Raises ValueError for what would make another run of it, and for
    keys and values that the schema does not know.
    """
    config = read_job(folder / "config.yaml")
    plain = dump(config)
    left_out = GENERATION_LEFT_OUT if isinstance(config, GenerateConfig) else LEFT_OUT
    allowed = [key for key in left_out if key not in FIXED]
    problems = []
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign:
            problems.append(f"{override!r} is no override; write key=value, as in nodes=2")
        elif not any(key == name or key.startswith(f"{name}.") for name in allowed):
            problems.append(_refusal(key, plain, allowed))
        else:
            _set(plain, key, _page(text) if key == "cluster" else _value(text))
    if problems:
        raise ValueError("\n".join(problems))
    return _with_files(load(type(config), plain), folder)


def plan_again(folder: Path, config: JobConfig, command: list[str], following: bool) -> Callable[[], int]:
    """Check the run in `folder` with a config from `changed_config`; returns its start, which has an exit code.

    Raises ValueError, in one message, for what keeps it from starting, and for data or weights that are not those it
    began with.
    """
    if isinstance(config, GenerateConfig):
        from synthos.weights import find_source

        job = generate.make_plan(config, find_source(Path(config.weights), config.average))
        _check_same(folder, job.folder)
        return generate.as_job(dataclasses.replace(job, folder=folder), command, following)
    assert isinstance(config, RunConfig)
    plan = submit.make_plan(config, dry_run=False)
    if plan.survey.missing:
        raise ValueError("\n".join(plan.survey.missing))
    assert plan.folder is not None, "nothing is missing"
    _check_same(folder, plan.folder)
    plan = dataclasses.replace(plan, folder=folder, state=read_state(folder))
    return lambda: submit.begin(plan, command, following)


def _check_same(folder: Path, planned: Path) -> None:
    """Raise ValueError where a submission of the same config would be another run by now."""
    if signature(planned) != signature(folder):
        raise ValueError(
            "data, weights or requests behind its paths have changed: a submission would now be "
            f"{planned.name}; expected those it began with"
        )


def _refusal(key: str, plain: Mapping[str, Any], allowed: list[str]) -> str:
    node: Any = plain
    for part in key.split("."):
        node = node.get(part, _refusal) if isinstance(node, Mapping) else _refusal
    if node is _refusal:
        return f"{key}: unknown key; {unknown(key, allowed)}"
    return (
        f"{key}: is part of what this run is, so it can't change; `synthos submit` makes another run with it; "
        f"allowed: {', '.join(sorted(allowed))}"
    )


def _set(plain: dict[str, Any], key: str, value: Any) -> None:
    *groups, last = key.split(".")
    for group in groups:
        plain = plain[group] if isinstance(plain.get(group), dict) else plain.setdefault(group, {})
    plain[last] = value


def _value(text: str) -> Any:
    """A value as YAML reads it, but for times: 2:00:00 would be a number to base 60."""
    try:
        return text if ":" in text and text[0].isdigit() else yaml.load(text, LOADER)
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} is no value: {error}") from None


def _page(name: str) -> Any:
    """The values of configs/cluster/NAME.yaml."""
    if name not in choices()["cluster"]:
        raise ValueError(f"cluster: {name!r} is unknown; {unknown(name, choices()['cluster'])}")
    return read_yaml(CONFIGS / "cluster" / f"{name}.yaml")


def _with_files(config: JobConfig, folder: Path) -> JobConfig:
    """The config as a submission has it: files of requests are named from the run folder only in the frozen one."""
    if isinstance(config, GenerateConfig):
        return dataclasses.replace(config, requests=_located(config.requests, folder))
    assert isinstance(config, RunConfig)
    requests = _located(config.validate.requests, folder)
    return dataclasses.replace(config, validate=dataclasses.replace(config.validate, requests=requests))


def _located(requests: Any, folder: Path) -> list[dict[str, Any]]:
    return [located(dict(request), folder) for request in requests or []]


@contextlib.contextmanager
def quietly(quiet: bool) -> Iterator[None]:
    """What is printed meanwhile goes to stderr: stdout is for one document."""
    with contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext():
        yield
