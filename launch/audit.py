"""Was every sample of a run consumed, and none twice? The plan is made anew and compared with what each rank traced."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from launch.rundir import read_state
from synthos.batch import Input
from synthos.data.index import ShardIndex, open_index
from synthos.data.plan import Planned
from synthos.data.reader import TRIES, candidate
from synthos.data.source import open_split
from synthos.data.store.files import Storage
from synthos.data.stream import build_planner, digest, instruct
from synthos.keys import sample_id
from synthos.schema import RunConfig
from synthos.train.report import PADDING, SUBSTITUTE, TRACE

Ids = NDArray[np.uint64]
Ints = NDArray[np.int64]
NAMED = 200  # wrong rows whose sample is searched in all shards
Row = tuple[int, int, bool]  # id, epoch, whether it only fills its batch up


class Place(NamedTuple):
    source: int
    shard: int
    row: int


@dataclass(frozen=True)
class Wrong:
    """A sample that was not consumed as planned."""

    kind: Literal["lost", "repeated", "unplanned"]
    step: int
    source: str  # "" with shard and key for an id that is none of this run's samples
    shard: str
    key: str
    id: int
    epoch: int
    rows_by_rank: dict[int, int]  # traced for this step


@dataclass(frozen=True)
class Coverage:
    """How much of one epoch of a source was consumed."""

    source: str
    epoch: int
    consumed: int
    samples: int


@dataclass
class Findings:
    steps: int  # audited: those that every rank has traced
    beyond: int  # rows of later steps, which an attempt still works at or a next one will repeat
    samples: int = 0  # consumed as planned
    padding: int = 0  # rows that only filled up their batch
    substituted: int = 0  # of the samples: bad ones that another one stood for, as quarantine.jsonl tells
    wrong: list[Wrong] = field(default_factory=list)
    other_order: list[int] = field(default_factory=list)  # steps whose digest in metrics.jsonl is not the plan's
    coverage: list[Coverage] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(wrong.kind for wrong in self.wrong)
        return {kind: found[kind] for kind in ("lost", "repeated", "unplanned")}

    @property
    def clean(self) -> bool:
        return not self.wrong and not self.other_order


class Auditor:
    """The audit of one run; ValueError where its data can't be opened any more.

    Args:
        folder: of the run.
        config: frozen there.
        inputs: what its recipe reads of a sample.
    """

    def __init__(
        self, folder: Path, config: RunConfig, inputs: Mapping[str, Input], storage: Storage | None = None
    ) -> None:
        if config.data.streaming is not None:
            raise ValueError(f"{folder}: a run with data.streaming has no plan to hold its traces against")
        self.storage = storage or Storage()
        self.batch_size = config.batch.size
        self.sources, _ = open_split(config.data, inputs, self.storage)
        self.planner = build_planner(config.data, self.sources, config.batch.size, config.seed)
        self.ranks, self.rows = read_traces(folder)
        self.bad = _read_bad(folder)
        self.digests = _read_digests(folder)
        last = self._last_step(folder)
        self.findings = Findings(last, int((self.rows["step"] > last).sum()))
        self._ids: dict[tuple[int, int], Ids] = {}
        self._seen: dict[tuple[int, int], NDArray[np.bool_]] = {}  # source and epoch -> positions consumed
        self._index = lru_cache(maxsize=16)(self._open)

    def run(self) -> Iterator[int]:
        """Audit step after step, telling each one; `findings` are whole at the end."""
        edges = self.rows["step"].searchsorted(np.arange(1, self.findings.steps + 2))
        for step in range(1, self.findings.steps + 1):
            planned = self.planner.next()
            if self.digests.get(step, digest(planned)) != digest(planned):
                self.findings.other_order.append(step)
            self._audit(step, planned, slice(edges[step - 1], edges[step]))
            yield step
        for (source, epoch), seen in sorted(self._seen.items()):
            name = self.sources[source].name
            self.findings.coverage.append(Coverage(name, epoch, int(seen.sum()), len(seen)))

    def _last_step(self, folder: Path) -> int:
        """The last step that all ranks have done: in a checkpoint, told by the last verdict, or whole in the traces.

        Where it is logged, that is: a kill may have come between a step's trace and its bad samples.
        """
        steps, counts = np.unique(self.rows["step"], return_counts=True)
        whole = steps[(counts >= self.batch_size) & (steps <= max(self.digests, default=np.inf))]
        state = read_state(folder)
        ended = state.verdict.get("attempt") == state.attempts and state.verdict.get("step") or 0
        return max(int(whole.max()) if len(whole) else 0, state.step or 0, int(ended))

    def _audit(self, step: int, planned: Planned, rows: slice) -> None:
        asked = instruct(planned, self.sources, slice(None))
        expected = np.empty(len(asked.rows), [("id", "<u8"), ("epoch", "<u4"), ("padding", "?")])
        expected["id"] = self._ids_of(asked.sources, asked.shards, asked.rows)
        expected["epoch"], expected["padding"] = planned.epochs, ~planned.real
        traced = np.empty(rows.stop - rows.start, expected.dtype)
        traced["id"], traced["epoch"] = self.rows["id"][rows], self.rows["epoch"][rows]
        traced["padding"] = self.rows["kind"][rows] == PADDING
        done = np.ones(len(expected), bool)
        usual = not (self.rows["kind"][rows] == SUBSTITUTE).any()
        same = np.array_equal(expected, traced) or np.array_equal(np.sort(expected), np.sort(traced))
        if not (usual and same):
            places = [*map(Place._make, zip(asked.sources.tolist(), asked.shards.tolist(), asked.rows.tolist(),
                                            strict=True))]  # fmt: skip
            done = self._match(step, expected.tolist(), places, traced.tolist(), rows)
        self.findings.padding += int((done & ~planned.real).sum())
        self._mark(step, planned, done & planned.real, expected["id"], rows)

    def _match(
        self, step: int, expected: list[Row], places: list[Place], traced: list[Row], rows: slice
    ) -> NDArray[np.bool_]:
        """Which of the expected samples were consumed; the others, and rows that no sample asked for, are wrong."""
        kinds = self.rows["kind"][rows].tolist()
        free: dict[Row, list[int]] = defaultdict(list)
        for number, row in enumerate(traced):
            if kinds[number] != SUBSTITUTE:
                free[row].append(number)
        done = np.zeros(len(expected), bool)
        left = set(range(len(traced)))
        for number, row in enumerate(expected):
            if free[row]:
                left.discard(free[row].pop())
                done[number] = True
        for number, row in enumerate(expected):
            identity, epoch, padding = row
            if done[number]:
                continue
            wanted = PADDING if padding else SUBSTITUTE
            likely = [r for r in sorted(left) if kinds[r] == wanted and traced[r][1] == epoch]
            named = self.bad[step, identity, epoch] > 0
            stands = next((r for r in likely if named and self._stands(traced[r][0], row, places[number])), None)
            if stands is not None:
                self.bad[step, identity, epoch] -= 1
                left.discard(stands)
                done[number] = True
                self.findings.substituted += 1
            else:
                self._add("lost", step, identity, epoch, places[number], rows)
        planned = {row[:2]: place for row, place in zip(expected, places, strict=True)}
        for number in sorted(left):
            identity, epoch, _ = traced[number]
            place = planned.get((identity, epoch))
            self._add("repeated" if place else "unplanned", step, identity, epoch, place or self._find(identity), rows)
        return done

    def _stands(self, identity: int, bad: Row, place: Place) -> bool:
        """Whether the sample of an id is one that the reader tries in place of a bad one."""
        source = self.sources[place.source]
        for attempt in range(2 * TRIES):
            found = candidate(source, bad[0], bad[1], attempt)
            if found is not None:
                key = self._index(place.source, found[0]).key(found[1])
                if sample_id(source.name, source.places[found[0]].name, key) == identity:
                    return True
        return False

    def _mark(self, step: int, planned: Planned, done: NDArray[np.bool_], ids: Ids, rows: slice) -> None:
        """Note what was consumed of each epoch; a plan that names a sample twice is found here."""
        self.findings.samples += int(done.sum())
        for source in np.unique(planned.sources).tolist():
            for epoch in np.unique(planned.epochs[planned.sources == source]).tolist():
                own = np.flatnonzero(done & (planned.sources == source) & (planned.epochs == epoch))
                positions = planned.positions[own]
                if (source, epoch) not in self._seen:
                    self._seen[source, epoch] = np.zeros(len(self.sources[source]), bool)
                seen = self._seen[source, epoch]
                first = np.zeros(len(own), bool)
                first[np.unique(positions, return_index=True)[1]] = True
                for number in np.flatnonzero(seen[positions] | ~first).tolist():
                    shard, row = self.sources[source].find(positions[number : number + 1])
                    place = Place(source, int(shard[0]), int(row[0]))
                    self._add("repeated", step, int(ids[own[number]]), epoch, place, rows)
                seen[positions] = True

    def _ids_of(self, sources: Ints, shards: Ints, rows: Ints) -> Ids:
        found = np.empty(len(rows), np.uint64)
        for source, shard in {*zip(sources.tolist(), shards.tolist(), strict=True)}:
            own = (sources == source) & (shards == shard)
            found[own] = self._shard_ids(source, shard)[rows[own]]
        return found

    def _shard_ids(self, source: int, shard: int) -> Ids:
        """Of every sample of a shard, used or not."""
        if (source, shard) not in self._ids:
            place, name = self.sources[source].places[shard], self.sources[source].name
            index = self._index(source, shard)
            ids = [sample_id(name, place.name, index.key(row)) for row in range(len(index))]
            self._ids[source, shard] = np.array(ids, np.uint64)
        return self._ids[source, shard]

    def _find(self, identity: int) -> Place | None:
        """Where a sample lies; None for an id that no sample of the run has, and where very many were looked for."""
        if len(self.findings.wrong) > NAMED:
            return None
        for number, source in enumerate(self.sources):
            for shard in range(len(source.places)):
                rows = np.flatnonzero(self._shard_ids(number, shard) == identity)
                if len(rows):
                    return Place(number, shard, int(rows[0]))
        return None

    def _open(self, source: int, shard: int) -> ShardIndex:
        return open_index(self.sources[source].places[shard], self.storage)

    def _add(
        self,
        kind: Literal["lost", "repeated", "unplanned"],
        step: int,
        identity: int,
        epoch: int,
        place: Place | None,
        rows: slice,
    ) -> None:
        by_rank = {int(r): int(c) for r, c in zip(*np.unique(self.ranks[rows], return_counts=True), strict=True)}
        named = ("", "", "")
        if place is not None:
            source = self.sources[place.source]
            shard = source.places[place.shard]
            named = (source.name, shard.name, self._index(place.source, place.shard).key(place.row))
        self.findings.wrong.append(Wrong(kind, step, *named, identity, epoch, by_rank))


def read_traces(folder: Path) -> tuple[NDArray[np.int64], NDArray[np.void]]:
    """The rank, and the row, of every sample that was traced, by step; a row that a kill has cut is left out."""
    ranks, rows = [np.empty(0, np.int64)], [np.empty(0, TRACE)]
    for path in sorted((folder / "data").glob("trace-rank-*.bin")):
        found = np.fromfile(path, TRACE, count=path.stat().st_size // TRACE.itemsize)
        ranks.append(np.full(len(found), int(path.stem.rpartition("-")[2])))
        rows.append(found)
    rank, row = np.concatenate(ranks), np.concatenate(rows)
    order = row["step"].argsort(kind="stable")
    return rank[order], row[order]


def _read_bad(folder: Path) -> Counter[tuple[int, int, int]]:
    """How often each sample was met as a bad one: by step, id and epoch."""
    return Counter((line["step"], line["id"], line["epoch"]) for line in _lines(folder / "data" / "quarantine.jsonl"))


def _read_digests(folder: Path) -> dict[int, str]:
    return {line["step"]: line["data/digest"] for line in _lines(folder / "metrics.jsonl") if "data/digest" in line}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON file; one that a kill has cut is left out."""
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]
