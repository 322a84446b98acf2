"""The plan of batches, of mixtures, buckets and tails together, against a simulation that moves samples one by one."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from synthos.data.mixture import Mixture
from synthos.data.order import Order
from synthos.data.plan import Planned, Planner, Position, first_slot
from tests.data.test_order import reference

Row = tuple[int, int, int, bool]  # source, epoch, position, real


@dataclass
class Case:
    """A random plan."""

    sizes: list[list[int]]  # of the shards of each source
    schedule: dict[int, list[float]]
    buckets: list[np.ndarray] | None
    num_buckets: int
    batch: int
    lanes: int
    window: int
    tail: Any

    def planner(self) -> Planner:
        orders = [Order(sizes, 7, f"set {i}", self.lanes, self.window) for i, sizes in enumerate(self.sizes)]
        return Planner(
            orders,
            Mixture(self.schedule),
            batch_size=self.batch,
            buckets=self.buckets,
            num_buckets=self.num_buckets,
            tail=self.tail,
        )


def case(seed: int) -> Case:
    """Shards that are empty, single and giant; one to four sources; every tail."""
    rng = np.random.default_rng(seed)
    sources, num_buckets = int(rng.integers(1, 5)), int(rng.choice([1, 1, 2, 5]))
    sizes = [
        [
            1,
            *(
                int(rng.choice([0, 1, rng.integers(2, 9), 60], p=[0.2, 0.3, 0.45, 0.05]))
                for _ in range(rng.integers(1, 9))
            ),
        ]
        for _ in range(sources)
    ]
    total = sum(map(sum, sizes))
    batch = int(rng.integers(1, min(24, total) + 1))
    lanes = int(rng.choice([k for k in range(1, batch + 1) if batch % k == 0]))
    schedule = {step: [float(w) for w in rng.uniform(0.01, 1, sources)] for step in {0, int(rng.integers(1, 300))}}
    buckets = [rng.integers(0, num_buckets, sum(s)).astype(np.uint8) for s in sizes] if num_buckets > 1 else None
    tail = "carry" if num_buckets > 1 and rng.random() < 0.3 else rng.choice(["carry", "drop", "pad"])
    return Case(sizes, schedule, buckets, num_buckets, batch, lanes, int(rng.integers(1, 5)), str(tail))


def rows(planned: Planned) -> list[Row]:
    columns = (planned.sources, planned.epochs, planned.positions, planned.real)
    return [*zip(*(column.tolist() for column in columns), strict=True)]


def simulate(case: Case, steps: int) -> list[list[Row]]:
    """The first batches, by lists."""
    epoch = sum(map(sum, case.sizes))
    mixture, count = Mixture(case.schedule), [0] * len(case.sizes)
    orders = [reference(s, 7, f"set {i}", case.lanes, case.window) for i, s in enumerate(case.sizes)]
    queues: list[list[tuple[int, int, int, int, int]]] = [[] for _ in range(case.num_buckets)]
    batches: list[list[Row]] = []

    def emit(queue: list[tuple[int, int, int, int, int]]) -> None:
        taken = sorted(queue[: case.batch], key=lambda item: item[2] % case.lanes)
        del queue[: case.batch]
        filled = [taken[i % len(taken)] for i in range(case.batch)]
        batches.append([(s, e, p, i < len(taken)) for i, (_, s, _, e, p) in enumerate(filled)])

    slot, before = 0, mixture.counts(0)
    while len(batches) < steps:
        for _ in range(case.batch if case.tail == "carry" else min(case.batch, epoch - slot % epoch)):
            after = mixture.counts(slot + 1)
            source = next(s for s in range(len(count)) if after[s] > before[s])
            before, number, count[source] = after, count[source], count[source] + 1
            at, position = next(orders[source])
            bucket = int(case.buckets[source][position]) if case.buckets else 0
            queues[bucket].append((slot, source, number, at, position))
            slot += 1
        while full := [queue for queue in queues if len(queue) >= case.batch]:
            emit(min(full, key=lambda queue: queue[case.batch - 1][0]))
        if case.tail != "carry" and slot % epoch == 0:
            while case.tail == "pad" and (waiting := [queue for queue in queues if queue]):
                emit(min(waiting, key=lambda queue: queue[0][0]))
            for queue in queues:
                queue.clear()
    return batches[:steps]


@pytest.mark.parametrize("seed", range(40))
def test_equals_a_simulation_and_survives_stops(seed: int) -> None:
    one = case(seed)
    try:
        straight = [rows(one.planner().next())]
    except (RuntimeError, ValueError) as error:  # buckets that never fill
        assert one.tail == "drop" and "data.tail: drop" in str(error)
        return
    steps, rng = 30, np.random.default_rng(seed + 1000)
    expected = simulate(one, steps)
    planner, found = one.planner(), []
    stops = set(rng.integers(0, steps, 6).tolist())
    for step in range(steps):
        if step in stops:  # planning goes on in a process that knows nothing else
            position = Position.from_json(json.loads(json.dumps(planner.position().as_json())))
            planner = one.planner()
            planner.go_to(position)
            assert planner.position().as_json() == position.as_json()
        found.append(rows(planner.next()))
    assert found == expected and straight == expected[:1]


@pytest.mark.parametrize("seed", range(40, 70))
def test_nothing_is_lost_or_repeated(seed: int) -> None:
    """Batches and what waits are what was drawn, and every epoch of a source is a permutation."""
    one = case(seed)
    planner, used = one.planner(), Counter[tuple[int, int, int]]()
    try:
        for _ in range(60):
            used.update((s, e, p) for s, e, p, real in rows(planner.next()) if real)
    except RuntimeError as error:
        assert one.tail == "drop" and "a whole epoch" in str(error)
        return
    assert set(used.values()) == {1}
    counts = planner.mixture.counts(planner.drawn)
    for source, count in enumerate(counts):
        size = planner.orders[source].num_samples
        epochs, positions = planner.orders[source].places(np.arange(count))
        drawn = {*zip(epochs.tolist(), positions.tolist(), strict=True)}
        assert len(drawn) == count
        by_epoch = Counter(e for e, _ in drawn)
        assert all(by_epoch[epoch] == size for epoch in range(count // size))
        waiting = {(int(e), int(p)) for q in planner.queues for s, e, p in q[[1, 3, 4]].T.tolist() if s == source}
        taken = {(e, p) for s, e, p in used if s == source}
        assert taken <= drawn and not taken & waiting
        if one.tail != "drop":
            assert taken | waiting == drawn


@pytest.mark.parametrize("seed", range(70, 90))
def test_any_ranks_and_micro_batches_share_a_batch(seed: int) -> None:
    one = case(seed)
    divisors = [w for w in range(1, one.batch + 1) if one.batch % w == 0]
    try:
        batch = rows(one.planner().next())
    except (RuntimeError, ValueError):
        assert one.tail == "drop"
        return
    plans = [rows(one.planner().next()) for _ in range(3)]  # each rank's is made by itself
    for world in divisors:
        share = one.batch // world
        dealt = [plans[rank % 3][rank * share : (rank + 1) * share] for rank in range(world)]
        assert [row for part in dealt for row in part] == batch


def test_a_tail_is_dropped_or_filled_up() -> None:
    def plan(tail: Any, steps: int) -> list[list[Row]]:
        one = Planner([Order([7, 3], 0, "set", 2, 4)], Mixture({0: [1.0]}), batch_size=4, tail=tail)
        return [rows(one.next()) for _ in range(steps)]

    dropped, padded = plan("drop", 4), plan("pad", 6)
    assert [{e for _, e, _, _ in batch} for batch in dropped] == [
        {0},
        {0},
        {1},
        {1},
    ]  # the epoch's last two are left out
    assert [sum(real for *_, real in batch) for batch in padded] == [4, 4, 2, 4, 4, 2]
    for epoch in (0, 1):
        kept = [p for batch in padded for _, e, p, real in batch if real and e == epoch]
        assert sorted(kept) == list(range(10))
    fill = [row for row in padded[2] if not row[3]]
    assert {row[:3] for row in fill} <= {row[:3] for row in padded[2] if row[3]}


@pytest.mark.parametrize("tail", ["carry", "drop", "pad"])
@pytest.mark.parametrize(("samples", "batch"), [(257, 256), (511, 256), (64, 8), (23, 8), (9, 4)])
def test_a_schedule_changes_at_its_step_whatever_the_tail(samples: int, batch: int, tail: Any) -> None:
    step = 7
    start = first_slot(step, 2 * samples, batch, tail)
    orders = [Order([samples], 0, name, 1, 4) for name in ("a", "b")]
    one = Planner(orders, Mixture({0: [1, 0], start: [0, 1]}), batch_size=batch, tail=tail)
    served = [set(one.next().sources.tolist()) for _ in range(2 * step)]
    assert served == [{0}] * step + [{1}] * step


def test_buckets_share_a_shape_and_starving_ones_wait() -> None:
    buckets = np.array([0] * 30 + [1] * 3, np.uint8)
    one = Planner([Order([33], 0, "set", 4, 4)], Mixture({0: [1.0]}), batch_size=4, buckets=[buckets], num_buckets=2)
    batches = [one.next() for _ in range(40)]
    assert all(set(buckets[b.positions].tolist()) == {b.bucket} for b in batches)
    assert {b.bucket for b in batches} == {0, 1}
    first = next(b for b in batches if b.bucket == 1)
    assert set(first.epochs.tolist()) == {0, 1}  # three of the first epoch and one of the next


def test_says_what_can_never_be() -> None:
    order = Order([3], 0, "set", 1, 1)
    with pytest.raises(
        ValueError, match=r"data\.tail: drop would leave out every sample: an epoch has 3, batch.size is 4"
    ):
        Planner([order], Mixture({0: [1.0]}), batch_size=4, tail="drop")
    starving = [np.array([0, 1, 2], np.uint8)]
    with pytest.raises(RuntimeError, match="none of 3 buckets had 2 of its 3 samples"):
        Planner([order], Mixture({0: [1.0]}), batch_size=2, tail="drop", buckets=starving, num_buckets=3).next()
    with pytest.raises(ValueError, match="slots drawn"):
        Position.from_json({"drawn": 4, "waiting": [[7]]})
