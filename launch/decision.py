"""What comes after an attempt, as its ledger says: again here, again by Slurm, or the end. Pure functions."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from synthos.schema import ClusterConfig

Record = dict[str, Any]  # attempt.json

ENDS = {  # causes after which nothing starts by itself
    "finished": "the run is done",
    "stop": "somebody asked it to stop",
    "interrupt": "it was interrupted",
    "terminate": "it was told to end",
    "cancelled": "it was cancelled",
    "config": "it would fail again in the same way",
}
CRASHES = ("crash", "killed")  # a restart in the same allocation
# This allocation is lost, or to be left.
MOVES = ("time_limit", "preempted", "drain", "requeued", "node_failure", "preflight")
STALLED_ATTEMPTS = 3
BAD_NODE_FAILURES = 2


@dataclass(frozen=True)
class Decision:
    """What comes next.

    Attributes:
        decision: `restart` in this allocation, `requeue` (Slurm starts the run again), or `end`.
        reason: of it, in words.
        wait_seconds: before a restart.
        exclude: nodes that failed too often to be used again.
    """

    decision: Literal["restart", "requeue", "end"]
    reason: str
    wait_seconds: int = 0
    exclude: tuple[str, ...] = ()


def decide(
    records: Sequence[Record],
    cluster: ClusterConfig,
    now: datetime,
    asked: bool = False,
    slurm: bool = True,
    seconds_left: float = math.inf,
) -> Decision:
    """What comes after the newest attempt.

    Budgets count within the attempts that followed each other by themselves: who submits a run again has seen how it
    ended.

    Args:
        records: of all attempts, oldest first; the newest one is closed.
        cluster: its budget of crashes, and how it requeues.
        now: with a time zone.
        asked: somebody wants the run to stop.
        slurm: the attempt had an allocation.
        seconds_left: until it is too late for another start there, because the limit of the allocation is near.
    """
    series, cause = _series(records), str(records[-1]["cause"])
    if asked and cause not in ENDS:
        return Decision("end", ENDS["stop"])
    if cause in ENDS:
        return Decision("end", ENDS[cause])
    if (stalled := _stalled(series)) >= STALLED_ATTEMPTS:
        return Decision("end", f"no_progress: {stalled} attempts in a row ended without a newer checkpoint")
    exclude = bad_nodes(records)
    here = set(records[-1].get("nodes", ()))
    if cause in CRASHES:
        crashes = _crashes(series, now)
        if crashes > cluster.max_crashes:
            limit = f"cluster.max_crashes is {cluster.max_crashes}"
            return Decision("end", f"{crashes} crashes within 24 hours, and {limit}")
        wait = cluster.backoff_seconds[min(crashes, len(cluster.backoff_seconds)) - 1]
        if not here & set(exclude) and wait < seconds_left:
            return Decision("restart", f"crash {crashes} of at most {cluster.max_crashes} in 24 hours", wait)
    if not slurm:
        return Decision("end", "there is no scheduler that would start it again")
    if cluster.requeue == "none":
        return Decision("end", "cluster.requeue is none")
    without = f" without {', '.join(exclude)}" if exclude else ""
    return Decision("requeue", f"{cause}, by cluster.requeue={cluster.requeue}{without}", exclude=exclude)


def bad_nodes(records: Sequence[Record]) -> tuple[str, ...]:
    """The nodes that failed too often, in whatever attempts: once where a preflight has found out why."""
    failures: Counter[str] = Counter()
    for record in records:
        for node in record.get("bad_nodes", ()):
            failures[node] += BAD_NODE_FAILURES if record.get("cause") == "preflight" else 1
    return tuple(sorted(node for node, count in failures.items() if count >= BAD_NODE_FAILURES))


def _series(records: Sequence[Record]) -> list[Record]:
    """The newest attempt and those before it that led to it without a person."""
    series = [records[-1]]
    for record in reversed(records[:-1]):
        if record.get("next", {}).get("decision") not in ("restart", "requeue"):
            break
        series.insert(0, record)
    return series


def _stalled(series: Sequence[Record]) -> int:
    """How many of the newest attempts ended with what they began with."""
    count = 0
    for before, record in zip(reversed([{}, *series[:-1]]), reversed(series), strict=True):
        if _advanced(record, before):
            break
        count += 1
    return count


def _advanced(record: Record, before: Record) -> bool:
    """Whether an attempt left a newer checkpoint; a job that saves none, but pictures, more than the one before it.

    What trained and saved nothing has to train it again, however far it came.
    """
    left, found = record.get("checkpoint_out"), record.get("checkpoint_in")
    if left is found is record.get("samples") is None:
        return (record.get("end_step") or 0) > (before.get("end_step") or 0)
    return (left or 0) > (found or 0)


def _crashes(series: Sequence[Record], now: datetime) -> int:
    since = now - timedelta(hours=24)
    return sum(r["cause"] in CRASHES and datetime.fromisoformat(r["ended"]) >= since for r in series)
