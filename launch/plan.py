"""What a submission will do, in words: the page that `dry_run=true` prints."""

from dataclasses import dataclass
from pathlib import Path

from launch.rundir import RunState
from launch.survey import Survey
from synthos.schema import RunConfig

UNKNOWN = "unknown until indexed"


@dataclass(frozen=True)
class Plan:
    """Everything that is known of a run before it starts.

    Attributes:
        config: composed and checked.
        folder: its run folder; None until the data is there, which is part of a run's identity.
        state: what the folder holds.
        survey: data, and what is missing.
        parameters: counts of trainable and of all parameters.
        last_step: the step at which it is done; None until `epochs` can be counted.
    """

    config: RunConfig
    folder: Path | None
    state: RunState | None
    survey: Survey
    parameters: dict[str, int]
    last_step: int | None

    def render(self) -> str:
        """The plan, a line for each fact, and a `missing:` line for each thing to bring first."""
        config, batch = self.config, self.config.batch
        factors = f"micro {batch.micro} x accumulation {config.accumulation} x ranks {config.ranks}"
        rows = {
            "recipe": f"{config.recipe['name']}, model {config.model.name}, data {config.data.name}",
            "run folder": str(self.folder or self._future_folder()),
            "holds": describe_state(self.state),
            "cluster": config.cluster.name,
            "world size": f"{config.ranks} ranks = nodes {config.nodes} x gpus_per_node {config.gpus_per_node}",
            "batch": f"size {batch.size} = {factors}",
            "length": self._length(),
            "parameters": "{trainable:,} trainable, {total:,} in all".format_map(self.parameters),
            "data": self._data(),
            "size": f"{config.data.height} x {config.data.width} pixels",
        }
        lines = [f"{name + ':':<12}{text}" for name, text in rows.items()]
        lines += [f"note: {note}" for note in self.survey.notes]
        return "\n".join([*lines, *(f"missing: {line}" for line in self.survey.missing)])

    def _future_folder(self) -> str:
        config = self.config
        return f"{Path(config.runs_dir) / config.group / config.name}-<8 digits, {UNKNOWN}>"

    def _length(self) -> str:
        if self.last_step is None:
            return f"{self.config.optim.epochs:g} epochs, steps {UNKNOWN}"
        images = self.last_step * self.config.batch.size
        samples = self.survey.data.samples
        epochs = f"{images / samples:.3g} epochs" if samples else f"epochs {UNKNOWN}"
        return f"{self.last_step} steps = {images:,} samples = {epochs}"

    def _data(self) -> str:
        data = self.survey.data
        if data.samples is None:
            return UNKNOWN
        return f"{data.samples:,} samples to train on and {data.held_out:,} held out, in {data.shards} shards"


def describe_state(state: RunState | None) -> str:
    """What a run folder holds, in a line."""
    if state is None or not state.exists:
        return "nothing yet"
    at = f"checkpoint of step {state.step}" if state.step is not None else "no checkpoint"
    status = state.verdict.get("status", "no verdict")
    weights = f", weights {state.weights.name}" if state.weights else ""
    return f"{state.attempts} attempts, {at}, {status}{weights}"
