"""What a generation will do, in words: the page that `dry_run=true` prints."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from launch.after import After, waiting
from launch.plan import describe_cluster, describe_job
from launch.rundir import read_state
from synthos.schema import GenerateConfig
from synthos.weights import Source


@dataclass(frozen=True)
class GeneratePlan:
    """Everything that is known of a generation before it starts.

    Attributes:
        config: composed and checked, its requests loaded.
        source: the weights.
        folder: its run folder.
        missing: a line for each thing that must be there first.
        notes: a line for each thing that Slurm says of it.
        after: what its job waits for.
    """

    config: GenerateConfig
    source: Source
    folder: Path
    missing: list[str]
    notes: list[str]
    after: After | None = None

    def render(self) -> str:
        """The plan, a line for each fact, and a `missing:` line for each thing to bring first."""
        config, source = self.config, self.source
        kind = "averaged" if source.averaged else "raw"
        rows = {
            "weights": f"{source.path}, {kind}, of recipe {source.recipe['name']}, model {source.model.name}",
            "run folder": str(self.folder),
            "holds": self._holds(),
            **({"after": self.after.describe()} if self.after else {}),
            "cluster": describe_cluster(config),
            "world size": f"{config.ranks} ranks = nodes {config.nodes} x gpus_per_node {config.gpus_per_node}",
            "requests": self._requests(),
        }
        lines = [f"{name + ':':<12}{text}" for name, text in rows.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, *(f"missing: {line}" for line in self.missing)])

    def job(self) -> str:
        """What Slurm will be given, word for word; empty where it is given nothing."""
        return describe_job(waiting(self.config, self.after), self.folder)

    def _holds(self) -> str:
        state = read_state(self.folder)
        if not state.exists:
            return "nothing yet"
        made = len(list((self.folder / "samples").glob("[!.]*.png")))
        return f"{state.attempts} attempts, {made} pictures, {state.verdict.get('status', 'no verdict')}"

    def _requests(self) -> str:
        requests = self.config.requests if isinstance(self.config.requests, list) else []
        sizes = Counter(
            (r.get("height") or self.source.size[0], r.get("width") or self.source.size[1]) for r in requests
        )
        counts = ", ".join(f"{count} of {height} x {width} pixels" for (height, width), count in sizes.items())
        return f"{len(requests)}, {-(-len(requests) // self.config.ranks)} on a rank: {counts}"
