"""What a run needs of the outside, its data and its pretrained weights: what is missing is said before it starts."""

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthos.data.check import DataFacts, facts
from synthos.models import initial
from synthos.models.parts import missing
from synthos.schema import DataConfig, RunConfig
from synthos.train.checkpoint_files import is_whole
from synthos.train.memory import Sizes, checkpoint_bytes, readable


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


def survey(config: RunConfig, recipe: Any, dry_run: bool, absent: Sequence[str] = ()) -> Survey:
    """Look at weights and data. Unless it is a dry run, a built-in data set is written and absent indexes are built.

    `absent` are further lines of what is missing. Raises ValueError for samples that the recipe can't read,
    and for weights to start from that do not belong to it.
    """
    absent = [*absent, *missing(config.model), *initial.missing(config)]
    unwritten = _unwritten(config.data)
    if unwritten:
        _check_home(config)
        absent += _module(config.data).missing()
    work = not dry_run and not absent  # no work for a run that can't start
    if unwritten:
        note = f"data: {config.data.title} will be written to {_home(config.data)}"
        if not work:
            return Survey(DataFacts(), absent, [note])
        print(note, flush=True)
        _module(config.data).prepare(_home(config.data))
    data = facts(config.data, recipe.inputs, build=False, ranks=config.ranks)
    notes = []
    if data.samples is None and not data.missing:
        notes = [f"data: the shards of {config.data.title} will be indexed, which reads each of them once"]
    if notes and work:
        print(*notes, sep="\n", flush=True)
        data, notes = facts(config.data, recipe.inputs, build=True), []
    return Survey(data, [*data.missing, *absent], notes)


def space_problems(runs: Sequence[tuple[RunConfig, Sizes, Path | None]]) -> list[str]:
    """What the disk of `runs_dir` lacks for all checkpoints that these runs ever have at once, beside those they have.

    Of a quota the disk says nothing. Each run is told by its config, shapes and folder.
    """
    if not runs:
        return []
    runs_dir = Path(runs[0][0].runs_dir).absolute()
    there = next(path for path in (runs_dir, *runs_dir.parents) if path.is_dir())
    counts = [_checkpoints_to_come(config, folder) for config, _, folder in runs]
    needed = sum(
        count * checkpoint_bytes(config, sizes) for count, (config, sizes, _) in zip(counts, runs, strict=True)
    )
    free = shutil.disk_usage(there).free
    if needed <= free:
        return []
    return [
        f"runs_dir: {readable(free)} are free in {runs_dir}, {readable(needed)} are needed for {sum(counts)} "
        "checkpoints; expected another runs_dir, or a smaller checkpoint.keep_last or keep_best"
    ]


def _checkpoints_to_come(config: RunConfig, folder: Path | None) -> int:
    count = config.checkpoint.keep_last + config.checkpoint.keep_best + 1  # the next is whole before one is deleted
    kept = sum(is_whole(path) for path in (folder / "checkpoints").glob("step_*")) if folder else 0
    return max(count - kept, 1)


def write_built_in(config: RunConfig) -> None:
    """Write a built-in data set that is not there yet; ValueError where it can't be."""
    if not _unwritten(config.data):
        return
    _check_home(config)
    module = _module(config.data)
    if lines := module.missing():
        raise ValueError("\n".join(lines))
    module.prepare(_home(config.data))


def _home(data: DataConfig) -> Path:
    """The folder of a built-in data set, which holds its splits."""
    if not isinstance(data.shards, str):
        raise ValueError(
            f"data.shards: {data.shards!r} is not allowed with data.prepare; expected one folder, or data.prepare=null"
        )
    return Path(data.shards).parent


def _unwritten(data: DataConfig) -> bool:
    return data.prepare is not None and not _home(data).exists()


def _check_home(config: RunConfig) -> None:
    """What Synthos writes by itself goes below `cache_dir`, and nowhere else."""
    home = _home(config.data)
    if Path(config.cache_dir).resolve() not in home.resolve().parents:
        raise ValueError(
            f"data.shards: {config.data.shards} is not there, and with data.prepare={config.data.prepare} would be "
            f"written outside of cache_dir {config.cache_dir}; expected cache_dir/<folder>/<split>, or existing shards"
        )


def _module(data: DataConfig) -> Any:
    """What writes a built-in data set."""
    module = f"synthos.data.{data.prepare}"
    if not importlib.util.find_spec(module):
        raise ValueError(
            f"data.prepare: {data.prepare!r} is unknown, there is no module {module}; expected null or photos"
        )
    return importlib.import_module(module)
