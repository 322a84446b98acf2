"""The order of one source, and the batches planned of it, against plain loops that follow its definition."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

from synthos.data.mixture import Mixture
from synthos.data.order import Order
from synthos.data.plan import Planner, Position, check_lanes
from synthos.keys import hash64

GOLDEN = [0, 2, 9, 11, 14, 15, 21, 20, 3, 4, 10, 8, 17, 12, 18, 22, 1, 5, 7, 6, 16, 13, 19, 23]
GOLDEN += [4, 2, 11, 10, 23, 13, 18, 16]


class Plan:
    """The batches of one source, each asked for by its number."""

    def __init__(
        self, sizes: list[int], seed: int, name: str, batch: int, lanes: int | None = None, window: int = 16
    ) -> None:
        self.order = Order(sizes, seed, name, check_lanes(lanes, batch), window)
        self.planner = Planner([self.order], Mixture({0: [1.0]}), batch_size=batch)
        self.num_samples, self.next = sum(sizes), 0

    def batch(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and positions of global batch t."""
        if t != self.next:
            self.planner.go_to(Position(t * self.planner.batch_size, [np.empty(0, np.int64)]))
        self.next = t + 1
        planned = self.planner.next()
        assert planned.real.all() and not planned.sources.any() and planned.bucket == 0
        return planned.epochs, planned.positions


def reference(sizes: list[int], seed: int, name: str, lanes: int, window: int) -> Iterator[tuple[int, int]]:
    """(epoch, position) of the run's samples by number, dealt to queues one by one."""

    def shuffle(items: list, *key: int | str) -> list:
        raw = np.random.Philox(key=hash64(seed, name, *key)).random_raw(len(items))
        return [items[i] for i in sorted(range(len(items)), key=lambda i: raw[i])]

    total, number, epoch = sum(sizes), 0, 0
    queues: list[list[tuple[int, int]]] = [[] for _ in range(lanes)]
    while True:
        first = np.cumsum([0, *sizes])
        shards = [[(s, int(first[s]) + i) for i in range(size)] for s, size in enumerate(sizes) if size]
        line = [sample for shard in shuffle(shards, "shards", epoch) for sample in shard]
        shares = Counter(q % lanes for q in range(number, number + total))
        for lane in range(lanes):
            part, line = line[: shares[lane]], line[shares[lane] :]
            for index, group in enumerate(windows(part, window)):
                queues[lane] += [(epoch, position) for _, position in shuffle(group, "window", epoch, lane, index)]
        yield from (queues[q % lanes][q // lanes] for q in range(number, number + total))
        number, epoch = number + total, epoch + 1


def windows(part: list[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    """`part` cut after every `size` shards."""
    order = list(dict.fromkeys(shard for shard, _ in part))
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    return [[sample for sample in part if sample[0] in group] for group in groups]


def cases(count: int) -> list[tuple[list[int], int, int, int]]:
    """Random (sizes, batch, lanes, window), with empty, single and giant shards."""
    rng, found = np.random.default_rng(1), []
    for _ in range(count):
        sizes = [
            int(rng.choice([0, 1, rng.integers(2, 9), 60], p=[0.2, 0.3, 0.45, 0.05]))
            for _ in range(rng.integers(1, 12))
        ]
        batch = int(rng.integers(1, 25))
        lanes = int(rng.choice([k for k in range(1, batch + 1) if batch % k == 0]))
        found.append(([1, *sizes], batch, lanes, int(rng.integers(1, 5))))
    return found


@pytest.mark.parametrize("sizes, batch, lanes, window", cases(40))
def test_equals_plain_loops(sizes: list[int], batch: int, lanes: int, window: int) -> None:
    plan = Plan(sizes, 3, "set", batch, lanes, window)
    steps = 3 * sum(sizes) // batch + 2
    expected = [*islice(reference(sizes, 3, "set", lanes, window), steps * batch)]
    for t in range(steps):
        numbers = np.arange(t * batch, (t + 1) * batch).reshape(-1, lanes).T.ravel()  # lane after lane
        epochs, positions = plan.batch(t)
        assert [*zip(epochs.tolist(), positions.tolist(), strict=True)] == [expected[q] for q in numbers]


@pytest.mark.parametrize("sizes, batch, lanes, window", cases(25))
def test_every_epoch_is_a_permutation_and_begins_where_the_last_one_ends(
    sizes: list[int], batch: int, lanes: int, window: int
) -> None:
    plan, total = Plan(sizes, 5, "set", batch, lanes, window), sum(sizes)
    seen: dict[int, list[int]] = {}
    for t in range(4 * total // batch + 1):
        epochs, positions = plan.batch(t)
        assert sorted(epochs.tolist()) == [q // total for q in range(t * batch, (t + 1) * batch)]
        for epoch, position in zip(epochs.tolist(), positions.tolist(), strict=True):
            seen.setdefault(epoch, []).append(position)
    for epoch in range(4):
        assert sorted(seen[epoch]) == list(range(total))


def test_any_batch_needs_none_before_it() -> None:
    sizes = [7, 0, 30, 1, 12]
    going = Plan(sizes, 0, "set", 6)
    batches = [going.batch(t) for t in range(60)]
    for t in np.random.default_rng(0).permutation(60).tolist():
        np.testing.assert_array_equal(going.batch(t), batches[t])
        np.testing.assert_array_equal(Plan(sizes, 0, "set", 6).batch(t), batches[t])


def test_golden_order() -> None:
    """Changing this changes every run: it is a breaking change."""
    plan = Plan([5, 1, 0, 9, 6, 3], seed=11, name="golden", batch=8, lanes=4, window=2)
    epochs, positions = np.concatenate([plan.batch(t) for t in range(4)], axis=1)
    assert positions.tolist() == GOLDEN
    assert epochs.tolist() == [0] * 24 + [1] * 8


def test_order_depends_on_seed_and_data_and_epoch() -> None:
    orders = {tuple(Plan([50], seed, name, 50, 1).batch(t)[1]) for seed in (0, 1) for name in "ab" for t in (0, 1)}
    assert len(orders) == 8


def test_windows_mix_as_many_shards_as_asked() -> None:
    for window, least in ((1, 1.0), (8, 7.5), (16, 14.5)):
        plan = Plan([1000] * 200, 0, "set", 64, lanes=1, window=window)
        distinct = [len(set((plan.batch(t)[1] // 1000).tolist())) for t in range(0, 2000, 100)]
        assert least <= np.mean(distinct) <= window + 0.5


def test_the_middle_of_a_huge_data_set_is_near() -> None:
    plan = Plan([10_000] * 20_000, 0, "set", 256)
    epochs, positions = plan.batch(10**6)
    assert set(epochs.tolist()) == {1} and len(set(positions.tolist())) == 256
    held = sum(run.positions.nbytes for run in plan.order._latest)
    assert held < 0.1 * 8 * plan.num_samples


@pytest.mark.parametrize("batch, lanes", [(1, 1), (32, 32), (64, 64), (96, 48), (2048, 64), (131, 1), (100, 50)])
def test_default_lanes(batch: int, lanes: int) -> None:
    assert check_lanes(None, batch) == lanes


def test_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"data\.lanes: 5 does not divide batch\.size 32; 32 does"):
        check_lanes(5, 32)
