"""Bad samples: which are known beforehand, how many a source may have, and how many a run may meet."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synthos.batch import Fault
from synthos.data.selection import Selection
from synthos.data.shards import ShardPlace
from synthos.data.store.location import masked
from synthos.schema import DataConfig

WINDOW = 100_000  # samples in a row of which `max_bad_fraction` may be bad


def read_known_bad(path: str | None, source: str) -> dict[str, set[str]]:
    """The keys that `data.known_bad` names of a source, by file name of the shard; ValueError for another file."""
    found: dict[str, set[str]] = {}
    if path is None:
        return found
    try:
        records = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
        for record in records:
            if record["source"] == source:
                found.setdefault(record["shard"], set()).add(record["key"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"data.known_bad: {path} is no list of samples: {error!r}; expected JSON lines with source, shard and key"
        ) from None
    return found


def check_faults(config: DataConfig, key: str, selection: Selection, places: Iterable[ShardPlace]) -> None:
    """Raise ValueError, naming the first three, where more samples can't be used than the config allows."""
    faults, urls = selection.faults, {place.name: masked(place.url) for place in places}
    allowed = int(config.max_bad_fraction * selection.num_rows)
    counts = Counter(fault.shard for fault in faults)
    crowded = [shard for shard, count in counts.items() if count > config.max_bad_per_shard]
    if len(faults) <= allowed and not crowded:
        return
    shown = [f for f in faults if not crowded or len(faults) > allowed or f.shard == crowded[0]][:3]
    lines = [f"{key}: {urls[fault.shard]}: sample {fault.key!r} {fault.error}" for fault in shown]
    if len(faults) > len(shown):
        lines.append(f"and {len(faults) - len(shown)} more")
    lines.append(
        f"{len(faults)} of {selection.num_rows} samples can't be used: more than data.max_bad_fraction "
        f"{config.max_bad_fraction:g} (here {allowed}) or data.max_bad_per_shard {config.max_bad_per_shard} allows; "
        "mend the data, raise the limits, or name them in data.known_bad"
    )
    raise ValueError("\n".join(lines))


@dataclass
class Budget:
    """The bad samples that a run has met, counted alike on every rank.

    Args:
        max_fraction: of any `WINDOW` samples in a row.
        max_per_shard: of a shard, over the whole run.
    """

    max_fraction: float
    max_per_shard: int
    recent: list[tuple[int, int]] = field(default_factory=list)  # samples consumed when they were met, and how many
    shards: dict[str, set[str]] = field(default_factory=dict)  # source and shard -> keys

    def count(self, consumed: int, faults: Sequence[Fault]) -> None:
        """Take in what the latest global batch met, after `consumed` samples. Raises RuntimeError beyond the limits."""
        self.recent = [*(r for r in self.recent if r[0] > consumed - WINDOW), (consumed, len(faults))]
        for fault in faults:
            self.shards.setdefault(f"{fault.source}/{fault.shard}", set()).add(fault.key)
        met, allowed = sum(count for _, count in self.recent), int(self.max_fraction * WINDOW)
        crowded = [shard for shard, keys in self.shards.items() if len(keys) > self.max_per_shard]
        if met <= allowed and not crowded:
            return
        over = (
            f"{met} of the last {min(consumed, WINDOW)} samples were bad, more than data.max_bad_fraction "
            f"{self.max_fraction:g} allows ({allowed} of {WINDOW})"
            if met > allowed
            else f"shard {crowded[0]} has {len(self.shards[crowded[0]])} bad samples, more than data.max_bad_per_shard "
            f"{self.max_per_shard} allows"
        )
        shown = [f"{f.source}/{f.shard}: sample {f.key!r} {f.error}" for f in faults[:3]]
        raise RuntimeError(
            "\n".join([f"{over}; all are in data/quarantine.jsonl. The run goes on with a higher limit", *shown])
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        shards = {shard: sorted(keys) for shard, keys in sorted(self.shards.items())}
        return {"recent": [list(pair) for pair in self.recent], "shards": shards}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.recent = [(consumed, count) for consumed, count in state["recent"]]
        self.shards = {shard: set(keys) for shard, keys in state["shards"].items()}
