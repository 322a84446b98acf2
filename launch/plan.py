"""What a submission will do, in words: the page that `dry_run=true` prints."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch import render
from launch.after import After, waiting
from launch.rundir import RunState, run_folder
from launch.sizes import counted_rows, stated_rows
from launch.survey import Survey
from synthos.data.buckets import bucket_sizes
from synthos.data.commands.screen import counted
from synthos.schema import JobConfig, RunConfig
from synthos.train.memory import Sizes

UNKNOWN = "unknown until indexed"
UNKNOWN_SIG8 = "unindexed"  # in the run folder's name, until the data is indexed


@dataclass(frozen=True)
class Plan:
    """Everything that is known of a run before it starts.

    Attributes:
        config: composed and checked.
        folder: its run folder; None until the data is there, which is part of a run's identity.
        state: what the folder holds.
        survey: data, and what is missing.
        sizes: shapes of all parameters; None in a plain dry run, which builds nothing.
        last_step: the step at which it is done; None until `epochs` can be counted.
        after: what its job waits for.
    """

    config: RunConfig
    folder: Path | None
    state: RunState | None
    survey: Survey
    sizes: Sizes | None
    last_step: int | None
    after: After | None = None

    def render(self) -> str:
        """The plan, a line for each fact, and a `missing:` line for each thing to bring first."""
        return page(self.rows(), self.survey)

    def rows(self) -> dict[str, str]:
        """The facts by name."""
        config, batch = self.config, self.config.batch
        factors = f"micro {batch.micro} x accumulation {config.accumulation} x ranks {config.ranks}"
        return {
            "recipe": f"{config.recipe['name']}, model {config.model.name}, data {config.data.title}",
            **({"init_from": config.init_from} if config.init_from else {}),
            "run folder": str(self.folder or f"{self._folder()}, {UNKNOWN}"),
            "holds": describe_state(self.state),
            **({"after": self.after.describe()} if self.after else {}),
            "cluster": describe_cluster(config),
            "world size": f"{config.ranks} ranks = nodes {config.nodes} x gpus_per_node {config.gpus_per_node}",
            "batch": f"size {batch.size} = {factors}",
            "length": self._length(),
            **(counted_rows(config, self.sizes) if self.sizes else stated_rows(config)),
            "data": self._data(),
            "size": self._size(),
        }

    def _folder(self) -> Path:
        """The run folder, or where it will be."""
        return self.folder or run_folder(self.config, UNKNOWN_SIG8)

    def job(self) -> str:
        """What Slurm will be given, word for word; empty where it is given nothing."""
        return describe_job(waiting(self.config, self.after), self._folder())

    def _length(self) -> str:
        if self.last_step is None:
            return f"{self.config.optim.epochs:g} epochs, steps {UNKNOWN}"
        images = self.last_step * self.config.batch.size
        samples = self.survey.data.samples
        epochs = f"{images / samples:.3g} epochs" if samples else f"epochs {UNKNOWN}"
        return f"{self.last_step} steps = {images:,} samples = {epochs}"

    def _size(self) -> str:
        data = self.config.data
        if data.buckets is None:
            return f"{data.height} x {data.width} pixels"
        return f"{len(bucket_sizes(data))} buckets; validation at {data.height} x {data.width} pixels"

    def _data(self) -> str:
        data = self.survey.data
        if data.samples is None:
            return UNKNOWN
        held = f"{counted(data.samples, 'sample')} to train on and {data.held_out:,} held out"
        return f"{held}, in {counted(data.shards or 0, 'shard')}"


def page(rows: Mapping[str, str], survey: Survey) -> str:
    """Rows of a plan, and what was found of the outside."""
    lines = [f"{name + ':':<12}{text}" for name, text in rows.items()]
    lines += [f"note: {note}" for note in survey.notes]
    return "\n".join([*lines, *(f"missing: {line}" for line in survey.missing)])


def describe_cluster(config: JobConfig) -> str:
    """Where a job will run, and what it may cost."""
    cluster = config.cluster
    limit = render.limit_seconds(cluster.time) if cluster.time else None
    unit = "rank" if cluster.device == "cpu" else "GPU"
    hours = f", at most {config.ranks * limit / 3600:.3g} {unit} hours until its limit" if limit else ""
    return f"{cluster.name}, backend {cluster.backend}{hours}"


def describe_job(config: JobConfig, folder: Path) -> str:
    """What Slurm will be given of the job in `folder`, word for word; empty where it is given nothing."""
    if config.cluster.backend == "submitit":
        return f"\nbatch script:\n{render.batch_script(config, folder)}"
    if config.cluster.backend == "sbatch":
        return f"\ncommand:\n{render.sbatch_line(config, folder, os.environ)}\n"
    return ""


def describe_state(state: RunState | None) -> str:
    """What a run folder holds, in a line."""
    if state is None or not state.exists:
        return "nothing yet"
    at = f"checkpoint of step {state.step}" if state.step is not None else "no checkpoint"
    status = state.verdict.get("status", "no verdict")
    weights = f", weights {state.weights.name}" if state.weights else ""
    return f"{counted(state.attempts, 'attempt')}, {at}, {status}{weights}"
