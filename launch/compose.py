"""Command-line overrides to one config of the right types: a RunConfig, or a GenerateConfig.

Only here does Hydra run: it writes nothing, and a rank never composes again.
"""

import dataclasses
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.core.override_parser.types import Override as Override  # for who enumerates sweeps
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from launch.anchor import absolute, anchor
from launch.snapshot import is_copy
from synthos.schema import GenerateConfig, JobConfig, RunConfig
from synthos.strict import load, unknown

CHECKOUT = Path(__file__).resolve().parents[1]
CONFIGS = CHECKOUT / "configs"
RUNS = CHECKOUT.parents[1] if is_copy(CHECKOUT) else CHECKOUT / "runs"  # a job may submit another, from its copy


@dataclass(frozen=True)
class Composed:
    """What one command line asks for.

    Attributes:
        config: of the run.
        dry_run: only print the plan.
        full: and build the model for it, without weights.
        follow: after submitting, show the run until it ends.
        new: run it anew, though it was run before.
        after: the run that must be done first.
        array_parallelism: how many points of a sweep may run at a time; None: no limit.
    """

    config: RunConfig
    dry_run: bool
    full: bool
    follow: bool
    new: bool
    after: str | None
    array_parallelism: int | None


LAUNCHER = ("dry_run", "follow", "force", "after", "array_parallelism")  # root keys that are no part of a config


def compose(arguments: Sequence[str], config_dir: Path = CONFIGS) -> Composed:
    """Compose `configs/run.yaml`, the chosen groups and the overrides in `arguments`.

    Relative paths are taken from the current folder, so that ranks may start anywhere. Raises ValueError, in one
    message, for what is no override, for an unknown choice, and for keys that are unknown, missing or of a wrong type.
    """
    overrides = [parse(argument) for argument in arguments]
    check(overrides, config_dir)
    return typed(compose_here(overrides, config_dir), config_dir)


def check(overrides: Sequence[Override], config_dir: Path) -> None:
    """Raise ValueError, in one message, for overrides of which no config can be composed."""
    known, optional = choices(config_dir), _optional_groups(config_dir)
    problems = [problem for override in overrides for problem in _override_problems(override, known, optional)]
    if not {"recipe", "experiment"} & {o.key_or_group for o in overrides if o.value() is not None}:
        problems.append(_missing_choice("recipe", known))
    if problems:
        raise ValueError("\n".join(problems))


def typed(composed: DictConfig, config_dir: Path) -> Composed:
    """What `compose_here` has composed as a config of the right types, and the launcher's own keys."""
    plain, known = _finish(composed, dict.fromkeys(("name", "group"), default_name(composed))), choices(config_dir)
    # The schema would only say that a group is missing, not what may be chosen.
    problems = [_missing_choice(group, known) for group in known if group not in plain]
    dry_run, follow, force, after, parallelism = (plain.pop(key, None) for key in LAUNCHER)
    if not isinstance(dry_run, bool) and dry_run != "full":
        problems.append(f"dry_run: {dry_run!r} is not allowed; expected true, false or full")
    if not isinstance(follow, bool):
        problems.append(f"follow: {follow!r} is not allowed; expected true or false")
    if force not in (None, "new"):
        problems.append(f"force: {force!r} is not allowed; expected null or new")
    if not isinstance(after, str | None):
        problems.append(f"after: {after!r} is not allowed; expected null or a run")
    if parallelism is not None and (type(parallelism) is not int or parallelism < 1):
        problems.append(f"array_parallelism: {parallelism!r} is not allowed; expected null, or 1 or more")
    if problems:
        raise ValueError("\n".join(problems))
    config = anchor(load(RunConfig, plain), Path.cwd())
    _check_follow(config, bool(follow))
    return Composed(config, bool(dry_run), dry_run == "full", bool(follow), force == "new", after, parallelism)


@dataclass(frozen=True)
class Once:
    """What a command line of `synthos generate` says that is no part of a job: `out` and `device` without one."""

    out: str | None  # picture file or folder
    device: str | None
    dry_run: bool
    follow: bool
    force: Literal["new"] | None  # new: make the pictures anew, though they were made before
    after: str | None  # the run that must be done first


def compose_generate(weights: str, arguments: Sequence[str], config_dir: Path = CONFIGS) -> tuple[GenerateConfig, Once]:
    """Compose `configs/generate.yaml`, the chosen cluster and the overrides in `arguments`; raises as `compose`."""
    known = {"cluster": choices(config_dir)["cluster"]}
    overrides = [parse(argument) for argument in arguments]
    problems = [problem for override in overrides for problem in _override_problems(override, known, set())]
    if problems:
        raise ValueError("\n".join(problems))
    composed = _compose(overrides, config_dir, "generate")
    plain = {**_finish(composed, {"name": _name_of_weights(weights)}), "weights": absolute(weights, Path.cwd())}
    once = load(Once, {field.name: plain.pop(field.name, None) for field in dataclasses.fields(Once)})
    config = load(GenerateConfig, plain)
    _check_follow(config, once.follow)
    requests = absolute(config.requests, Path.cwd()) if isinstance(config.requests, str) else config.requests
    return dataclasses.replace(config, requests=requests), once


def _check_follow(config: JobConfig, follow: bool) -> None:
    backend = config.cluster.backend
    if follow and backend != "submitit":
        raise ValueError(f"follow: true has no effect with cluster.backend={backend}; expected false")


def _name_of_weights(weights: str) -> str:
    """A job's name: the run and the step that its weights are of, or else what they are called."""
    path = Path(weights).absolute()
    step = next((p for p in (path, *path.parents) if p.parent.name in ("weights", "checkpoints")), None)
    return file_name(f"{step.parents[1].name}-{step.name}" if step else path.name if path.is_dir() else path.stem)


def file_name(text: str) -> str:
    """The nearest to `text` that the name of a job or a request may be."""
    return re.sub(r"[^A-Za-z0-9._+=-]", "_", text).lstrip("._+=-") or "picture"


def choices(config_dir: Path = CONFIGS) -> dict[str, list[str]]:
    """The names that each config group offers."""
    folders = sorted(folder for folder in config_dir.iterdir() if folder.is_dir())
    return {f.name: sorted(p.relative_to(f).with_suffix("").as_posix() for p in f.rglob("*.yaml")) for f in folders}


def _optional_groups(config_dir: Path) -> set[str]:
    """The config groups of which none is chosen by default."""
    page: Any = OmegaConf.to_container(OmegaConf.load(config_dir / "run.yaml"))
    entries = [entry for entry in page["defaults"] if isinstance(entry, Mapping)]
    return {str(group) for entry in entries for group, choice in entry.items() if choice is None}


def parse(argument: str) -> Override:
    """One override. What Hydra's grammar can't read (`shards=/data/{00..13}.tar`) is taken as text, braces and all."""
    parser = OverridesParser.create()
    key, equals, value = argument.partition("=")
    with suppress(HydraException):
        if key != "after" or value == "null":  # a run's name may look like a number: 17_3 would be 173
            return parser.parse_override(argument)
    text = value.replace("\\", "\\\\").replace("'", "\\'")
    try:
        return parser.parse_override(f"{key}='{text}'" if equals else "")
    except HydraException:
        raise ValueError(f"{argument!r} is no override; write key=value, as in optim.lr=1e-4") from None


def sweep_values(override: Override, config_dir: Path) -> list[str]:
    """The values, as text, that an override in sweep syntax lists. Raises ValueError where it lists none."""
    key, sweep = str(override.key_or_group), override.value()
    if isinstance(sweep, Glob):
        values = sweep.filter(choices(config_dir).get(key, []))
    elif override.is_discrete_sweep():
        values = list(override.sweep_string_iterator())
    else:
        raise ValueError(f"{override.input_line}: has no list of values; expected choice(...) or range(...)")
    if not values:
        raise ValueError(f"{override.input_line}: stands for no value; expected at least one")
    return values


def _override_problems(override: Override, known: Mapping[str, list[str]], optional: set[str]) -> list[str]:
    key, line = override.key_or_group, override.input_line
    if key == "hydra" or key.startswith("hydra."):
        return [f"{line}: Hydra's own settings have no effect here"]
    if override.is_sweep_override():
        return [f"{line}: one value is expected; a list is written {key}=[a,b], a text with commas {key}='\"a,b\"'"]
    choice = override.value()
    if choice is None and key in optional:
        return []
    if key in known and not isinstance(choice, dict) and choice not in known[key]:  # a dict sets keys of the group
        return [f"{key}: {choice!r} is unknown; {unknown(str(choice), known[key])}"]
    return []


def _missing_choice(group: str, known: Mapping[str, list[str]]) -> str:
    return f"{group}: missing; choose one with {group}=<name>, known: {', '.join(known.get(group, []))}"


def compose_here(overrides: list[Override], config_dir: Path) -> DictConfig:
    """The composed values. Where nobody chose a cluster, it is Slurm if there is one here or if one node won't do."""
    composed = _compose(overrides, config_dir)
    chosen = composed.hydra.runtime.choices
    by_default = "cluster" not in {o.key_or_group for o in overrides} and chosen.cluster == "local"
    if by_default and (shutil.which("sbatch") or composed.get("nodes") not in (None, 1)):
        composed = _compose([*overrides, parse("cluster=slurm")], config_dir)
    with open_dict(composed):
        composed.experiment = chosen.get("experiment")
    return composed


def default_name(composed: DictConfig) -> str:
    """A run is called by its experiment, or else by its recipe."""
    return Path(composed.experiment or composed.hydra.runtime.choices.recipe).name


def _compose(overrides: list[Override], config_dir: Path, page: str = "run") -> DictConfig:
    try:
        return _run_hydra(overrides, config_dir, page)
    except (HydraException, OmegaConfBaseException) as error:
        chosen = [override for override in overrides if override.key_or_group in choices(config_dir)]
        try:
            base = OmegaConf.to_container(_run_hydra(chosen, config_dir, page))
        except (HydraException, OmegaConfBaseException) as first:  # the choice of groups itself is at fault
            raise ValueError(_first_paragraph(first)) from None
        problems = [problem for o in overrides if not o.is_add() and (problem := _key_problem(o.key_or_group, base))]
        raise ValueError("\n".join(problems) or _first_paragraph(error)) from None


def _run_hydra(overrides: list[Override], config_dir: Path, page: str) -> DictConfig:
    with hydra.initialize_config_dir(str(config_dir), version_base="1.3"):
        return hydra.compose(page, _lines(overrides, set(choices(config_dir))), return_hydra_config=True)


def _lines(overrides: list[Override], groups: set[str]) -> list[str]:
    """The overrides for Hydra, which knows no null as choice of a group: where it is the last, the group is deleted."""
    last = {override.key_or_group: override for override in overrides}
    lines = []
    for override in overrides:
        key = override.key_or_group
        if key not in groups or override.value() is not None:
            lines.append(str(override.input_line))
        elif last[key] is override:
            lines.append(f"~{key}")
    return lines


def _key_problem(key: str, base: Any) -> str | None:
    """What is wrong with a dotted key that should exist in `base`."""
    node, walked = base, ""
    for part in key.split("."):
        if not isinstance(node, Mapping):
            return f"{key}: unknown key; {walked} is a value, not a group of keys"
        if part not in node:
            allowed = [str(name) for name in node if name != "hydra"]
            add = f"entries are added with +{key}=<value>"
            return f"{key}: unknown key; {unknown(part, allowed) if allowed else add}"
        node, walked = node[part], f"{walked}.{part}".lstrip(".")
    return None


def _first_paragraph(error: Exception) -> str:
    return str(error).split("\nConfig search path")[0].strip()


def _finish(composed: DictConfig, names: Mapping[str, str]) -> dict[str, Any]:
    """Plain values: `names` and folders filled in where none are set, interpolations resolved, Hydra's part removed."""
    folders = {"runs_dir": RUNS, "cache_dir": RUNS.parent / ".cache"}
    with open_dict(composed):
        del composed["hydra"]
        for key, value in {**names, **folders}.items():
            composed[key] = str(value) if composed.get(key) is None else composed[key]
        for key in ("runs_dir", "cache_dir"):  # before they are interpolated into other paths
            composed[key] = absolute(str(composed[key]), Path.cwd())
    try:
        plain = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(_first_paragraph(error)) from None
    assert isinstance(plain, dict)
    return _without_missing(plain)


def _without_missing(group: Mapping[Any, Any]) -> dict[str, Any]:
    """The keys that have a value: `???`, Hydra's mark of one to be set, means nothing to the schema.

    Lists are left alone: what stands in them was written by the user, word for word.
    """
    return {
        str(key): _without_missing(value) if isinstance(value, Mapping) else value
        for key, value in group.items()
        if value != "???"
    }
