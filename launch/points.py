"""The points of a sweep: the command lines that one command line in Hydra's sweep syntax stands for.

`optim.lr=1e-4,3e-4 seed=range(3)` is six points, in the order written, the last key changing fastest.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from omegaconf import DictConfig, OmegaConf, open_dict

from launch.compose import (
    CONFIGS,
    LAUNCHER,
    Composed,
    Override,
    check,
    choices,
    compose_here,
    default_name,
    file_name,
    parse,
    sweep_values,
    typed,
)

NAMING = ("recipe", "experiment", "name")  # keys that give a run its name
Made = TypeVar("Made")


@dataclass(frozen=True)
class Point:
    """One point of a sweep.

    Attributes:
        values: of the swept keys, as text; empty where nothing is swept.
        composed: what its command line asks for.
    """

    values: dict[str, str]
    composed: Composed

    @property
    def title(self) -> str:
        return title(self.values)


def title(values: dict[str, str]) -> str:
    """A point by its overrides."""
    return " ".join(f"{key}={value}" for key, value in values.items())


def compose_points(arguments: Sequence[str], config_dir: Path = CONFIGS) -> list[Point]:
    """The points of a command line; one where it sweeps nothing.

    Their group, unless one is given, is named by what is swept, `i2i-optim.lr+seed`: more values of the same keys are
    more points of the same sweep. Raises ValueError as `compose`, each problem with the points that have it.
    """
    given = _last([parse(argument) for argument in arguments])
    swept = sorted(str(override.key_or_group) for override in given if override.is_sweep_override())
    if launchers := [key for key in swept if key in LAUNCHER]:
        raise ValueError("\n".join(f"{key}: one value is expected, the same for all points" for key in launchers))
    axes = [_axis(override, config_dir) for override in given]
    lines = [list(line) for line in itertools.product(*axes)]
    named = [
        {str(one.key_or_group): _text(one) for one, of in zip(line, given, strict=True) if of.is_sweep_override()}
        for line in lines
    ]
    for_all(named, [lambda line=line: check(line, config_dir) for line in lines])  # type: ignore[misc]
    composer = _Composer(config_dir, swept)
    composed = for_all(named, [lambda line=line: composer.compose(line) for line in lines])  # type: ignore[misc]
    return [Point(values, one) for values, one in zip(named, composed, strict=True)]


def _last(given: Sequence[Override]) -> list[Override]:
    """The overrides without those that a later sweep replaces. Raises ValueError for one that replaces a sweep."""
    kept: list[Override] = []
    for override in given:
        same = [other for other in kept if other.key_or_group == override.key_or_group]
        if any(other.is_sweep_override() for other in same):
            raise ValueError(f"{override.key_or_group}: is swept, and given again; expected all its values in one")
        if override.is_sweep_override():
            kept = [other for other in kept if other not in same or isinstance(other.value(), dict)]
        kept.append(override)
    return kept


def for_all(points: Sequence[dict[str, str]], work: Sequence[Callable[[], Made]]) -> list[Made]:
    """Do the work of every point; ValueError, in one message, with every problem and the points that have it."""
    made: list[Made] = []
    problems: dict[str, list[str]] = {}
    for values, do in zip(points, work, strict=True):
        try:
            made.append(do())
        except ValueError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, []).append(title(values))
    if problems:
        raise ValueError("\n".join(_where(line, titles, len(points)) for line, titles in problems.items()))
    return made


def _where(problem: str, titles: list[str], points: int) -> str:
    """A problem, and at which points unless it is at all of them."""
    if len(titles) == points:
        return problem
    more = f" and {len(titles) - 3} more" if len(titles) > 3 else ""
    return f"{', '.join(titles[:3])}{more}: {problem}"


def _axis(override: Override, config_dir: Path) -> list[Override]:
    """The overrides that one stands for, itself where it is no sweep."""
    if not override.is_sweep_override():
        return [override]
    return [parse(f"{override.get_key_element()}={value}") for value in sweep_values(override, config_dir)]


def _text(override: Override) -> str:
    return str(override.input_line).partition("=")[2]


class _Composer:
    """Composes points. Those with the same choices of groups differ in values only, which are set in a composed one:
    to compose takes a fifth of a second."""

    def __init__(self, config_dir: Path, swept: Sequence[str]) -> None:
        self.config_dir, self.swept = config_dir, swept
        self.groups = set(choices(config_dir))
        self.known: dict[str, DictConfig | ValueError] = {}

    def compose(self, line: list[Override]) -> Composed:
        values = [override for override in line if self._is_value(override, line)]
        key = [override.input_line for override in line if override not in values]
        composed = copy.deepcopy(self._composed(repr(key), line))
        with open_dict(composed):
            for override in values:
                OmegaConf.update(composed, str(override.key_or_group), override.value(), merge=True)
            if self.swept and composed.get("group") is None:
                composed.group = self._group(composed)
        return typed(composed, self.config_dir)

    def _composed(self, key: str, line: list[Override]) -> DictConfig:
        if key not in self.known:
            try:
                self.known[key] = compose_here(line, self.config_dir)
            except ValueError as error:
                self.known[key] = error
        found = self.known[key]
        if isinstance(found, ValueError):
            raise found
        return found

    def _is_value(self, override: Override, line: list[Override]) -> bool:
        """Whether an override only sets a swept value, which no other of the command line touches."""
        key = str(override.key_or_group)
        if key not in self.swept or key in self.groups or isinstance(override.value(), dict) or override.package:
            return False
        others = [str(other.key_or_group) for other in line if other is not override]
        return not any(f"{other}.".startswith(f"{key}.") or f"{key}.".startswith(f"{other}.") for other in others)

    def _group(self, composed: DictConfig) -> str:
        keys = "+".join(self.swept)
        name = composed.get("name") or default_name(composed)
        return file_name(keys if set(NAMING) & set(self.swept) else f"{name}-{keys}")
