"""Command-line overrides to one config of the right types: a RunConfig, or a GenerateConfig.

Only here does Hydra run: it writes nothing, and a rank never composes again.
"""

import dataclasses
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from launch.snapshot import is_copy
from synthos.schema import DataConfig, GenerateConfig, JobConfig, ModelConfig, PartConfig, RunConfig
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
    """

    config: RunConfig
    dry_run: bool
    full: bool
    follow: bool
    new: bool


def compose(arguments: Sequence[str], config_dir: Path = CONFIGS) -> Composed:
    """Compose `configs/run.yaml`, the chosen groups and the overrides in `arguments`.

    Relative paths are taken from the current folder, so that ranks may start anywhere. Raises ValueError, in one
    message, for what is no override, for an unknown choice, and for keys that are unknown, missing or of a wrong type.
    """
    known = choices(config_dir)
    overrides = [_parse(argument) for argument in arguments]
    optional = _optional_groups(config_dir)
    problems = [problem for override in overrides for problem in _override_problems(override, known, optional)]
    if not {"recipe", "experiment"} & {o.key_or_group for o in overrides if o.value() is not None}:
        problems.append(_missing_choice("recipe", known))
    if problems:
        raise ValueError("\n".join(problems))
    plain = _compose_for_here(overrides, config_dir)
    # The schema would only say that a group is missing, not what may be chosen.
    problems = [_missing_choice(group, known) for group in known if group not in plain]
    dry_run, follow, force = (plain.pop(key, None) for key in ("dry_run", "follow", "force"))
    if not isinstance(dry_run, bool) and dry_run != "full":
        problems.append(f"dry_run: {dry_run!r} is not allowed; expected true, false or full")
    if not isinstance(follow, bool):
        problems.append(f"follow: {follow!r} is not allowed; expected true or false")
    if force not in (None, "new"):
        problems.append(f"force: {force!r} is not allowed; expected null or new")
    if problems:
        raise ValueError("\n".join(problems))
    config = _anchor(load(RunConfig, plain), Path.cwd())
    _check_follow(config, bool(follow))
    return Composed(config, bool(dry_run), full=dry_run == "full", follow=bool(follow), new=force == "new")


@dataclass(frozen=True)
class Once:
    """What a command line of `synthos generate` says that is no part of a job: `out` and `device` without one."""

    out: str | None  # picture file or folder
    device: str | None
    dry_run: bool
    follow: bool
    force: Literal["new"] | None  # new: make the pictures anew, though they were made before


def compose_generate(weights: str, arguments: Sequence[str], config_dir: Path = CONFIGS) -> tuple[GenerateConfig, Once]:
    """Compose `configs/generate.yaml`, the chosen cluster and the overrides in `arguments`; raises as `compose`."""
    known = {"cluster": choices(config_dir)["cluster"]}
    overrides = [_parse(argument) for argument in arguments]
    problems = [problem for override in overrides for problem in _override_problems(override, known, set())]
    if problems:
        raise ValueError("\n".join(problems))
    composed = _compose(overrides, config_dir, "generate")
    plain = {**_finish(composed, {"name": _name_of_weights(weights)}), "weights": _absolute(weights, Path.cwd())}
    once = load(Once, {field.name: plain.pop(field.name, None) for field in dataclasses.fields(Once)})
    config = load(GenerateConfig, plain)
    _check_follow(config, once.follow)
    requests = _absolute(config.requests, Path.cwd()) if isinstance(config.requests, str) else config.requests
    return dataclasses.replace(config, requests=requests), once


def _check_follow(config: JobConfig, follow: bool) -> None:
    backend = config.cluster.backend
    if follow and backend != "submitit":
        raise ValueError(f"follow: true has no effect with cluster.backend={backend}; expected false")


def _name_of_weights(weights: str) -> str:
    """A job's name: the run and the step that its weights are of, or else what they are called."""
    path = Path(weights).absolute()
    step = next((p for p in (path, *path.parents) if p.parent.name in ("weights", "checkpoints")), None)
    return file_name(f"{step.parents[1].name}-{step.name}" if step else path.stem)


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


def _parse(argument: str) -> Override:
    """One override. What Hydra's grammar can't read (`shards=/data/{00..13}.tar`) is taken as text, braces and all."""
    parser = OverridesParser.create()
    key, equals, value = argument.partition("=")
    try:
        return parser.parse_override(argument)
    except HydraException:
        text = value.replace("\\", "\\\\").replace("'", "\\'")
    try:
        return parser.parse_override(f"{key}='{text}'" if equals else "")
    except HydraException:
        raise ValueError(f"{argument!r} is no override; write key=value, as in optim.lr=1e-4") from None


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


def _compose_for_here(overrides: list[Override], config_dir: Path) -> dict[str, Any]:
    """The composed values. Where nobody chose a cluster, it is Slurm if there is one here or if one node won't do."""
    composed = _compose(overrides, config_dir)
    chosen = composed.hydra.runtime.choices
    by_default = "cluster" not in {o.key_or_group for o in overrides} and chosen.cluster == "local"
    if by_default and (shutil.which("sbatch") or composed.get("nodes") not in (None, 1)):
        composed = _compose([*overrides, _parse("cluster=slurm")], config_dir)
    with open_dict(composed):
        composed.experiment = chosen.get("experiment")
    name = Path(composed.experiment or chosen.recipe).name
    return _finish(composed, {"name": name, "group": name})


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
            composed[key] = _absolute(str(composed[key]), Path.cwd())
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


def _anchor(config: RunConfig, folder: Path) -> RunConfig:
    """The same config with its relative paths taken from `folder`."""
    requests = config.validate.requests
    if isinstance(requests, str):
        requests = _absolute(requests, folder)
    return dataclasses.replace(
        config,
        data=_anchor_data(config.data, folder),
        model=_anchor_model(config.model, folder),
        init_from=_anchor_id(config.init_from, folder) if config.init_from is not None else None,
        validate=dataclasses.replace(config.validate, requests=requests),
    )


def _anchor_data(data: DataConfig, folder: Path) -> DataConfig:
    def anchored(shards: str | list[str]) -> str | list[str]:
        return _absolute(shards, folder) if isinstance(shards, str) else [_absolute(shard, folder) for shard in shards]

    mix = data.mix and {name: dataclasses.replace(s, shards=anchored(s.shards)) for name, s in data.mix.items()}
    known_bad, cache = (path and _absolute(path, folder) for path in (data.known_bad, data.cache))
    shards, validation = (shards and anchored(shards) for shards in (data.shards, data.validation))
    return dataclasses.replace(data, shards=shards, validation=validation, mix=mix, known_bad=known_bad, cache=cache)


def _anchor_model(model: ModelConfig, folder: Path) -> ModelConfig:
    def anchored(part: PartConfig) -> PartConfig:
        return dataclasses.replace(part, path=_anchor_id(part.path, folder))

    return dataclasses.replace(model, parts={name: anchored(part) for name, part in model.parts.items()})


def _anchor_id(name: str, folder: Path) -> str:
    """The path from `folder` of a file or folder that is there; anything else is a hub id."""
    path = _absolute(name, folder)
    return path if Path(path).exists() else name


def _absolute(path: str, folder: Path) -> str:
    """`path` from `folder`; addresses such as s3://bucket/a.tar stay as they are."""
    return path if "://" in path else str(folder / Path(path).expanduser())
