"""What a run needs of the outside, its data and its pretrained weights: what is missing is said before it starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthos.data.check import DataFacts, facts
from synthos.models.parts import missing
from synthos.schema import DataConfig, RunConfig


@dataclass(frozen=True)
class Survey:
    """What was found.

    Attributes:
        data: counts and fingerprint, None inside where only an index tells that is not built yet.
        missing: a line for each thing that must be there before the run can start.
        notes: a line for each thing that a submission does first.
    """

    data: DataFacts
    missing: list[str]
    notes: list[str]


def survey(config: RunConfig, recipe: Any, dry_run: bool) -> Survey:
    """Look at weights and data. Unless it is a dry run, a built-in data set is written and absent indexes are built.

    Raises ValueError for samples that the recipe can't read.
    """
    data = facts(config.data, recipe.inputs, build=False)
    lines = [*data.missing, *missing(config.model)]
    notes = _notes(config.data) if data.samples is None and not data.missing else []
    if notes and not dry_run and not lines:  # no work for a run that can't start
        print(*notes, sep="\n", flush=True)
        data = facts(config.data, recipe.inputs, build=True)
        notes = []
    return Survey(data, lines, notes)


def _notes(data: DataConfig) -> list[str]:
    if data.prepare and isinstance(data.shards, str) and not Path(data.shards).exists():
        return [f"data: {data.name} will be written to {Path(data.shards).parent}"]
    return [f"data: the shards of {data.name} will be indexed, which reads each of them once"]
