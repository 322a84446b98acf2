"""Traps 19 and 20: a shuffle buffer that a resume loses, and a resume that is right once and wrong the second time."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from synthos.batch import Fault
from synthos.data.index import open_index
from synthos.data.shards import ShardPlace
from synthos.data.stream import Stream
from synthos.schema import BucketConfig, DataConfig, SourceConfig
from tests.data.make import INPUTS, change, config, data_set, picture, tar


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two sources, two buckets, shuffled windows, and one bad sample that an index calls good."""
    root = tmp_path_factory.mktemp("mixed")
    for name, count in (("wide", 30), ("tall", 17)):
        (root / name).mkdir()
        for first in range(0, count, 7):
            members = []
            for i in range(first, min(first + 7, count)):
                size = (24, 16) if (name == "wide") ^ (i % 5 == 0) else (16, 24)
                members += [(f"{i:03d}.png", picture((i, 1, 2), size)), (f"{i:03d}.txt", f"{name} {i}".encode())]
            shard = tar(root / name / f"{first}.tar", members)
            open_index(ShardPlace.beside(str(shard)))
    mix = {name: SourceConfig(str(root / name)) for name in ("wide", "tall")}
    data = config(None, mix=mix, buckets=BucketConfig(sizes=[(8, 12), (12, 8)]), window=3, max_bad_fraction=0.2)
    change(root / "wide" / "7.tar", "009.png")
    return data


@pytest.mark.parametrize("stops", [(3,), (2, 5), (1, 2, 7, 11, 13)])
def test_rows_19_and_20_every_resume_is_exact_also_the_second_of_an_epoch(
    mixed: DataConfig, stops: tuple[int, ...]
) -> None:
    """Shuffled, with mixture, buckets and a replaced sample; ranks change at every stop; 47 samples make an epoch."""
    straight = Stream(mixed, INPUTS, batch_size=4, rank=0, world=1, seed=5)
    expected = []
    for _ in range(24):
        batch = straight.next()
        straight.count(batch.faults)
        expected.append((batch.ids.tolist(), batch.texts("text"), [asdict(f) for f in batch.faults]))
    found: list[Any] = []
    state = Stream(mixed, INPUTS, batch_size=4, rank=0, world=1, seed=5).state_dict()
    for world, stop in zip((1, 2, 4, 1, 2, 4), (*stops, 24), strict=False):
        ranks = [Stream(mixed, INPUTS, batch_size=4, rank=rank, world=world, seed=5) for rank in range(world)]
        for rank in ranks:
            rank.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(stop - len(found)):
            shares = [rank.next() for rank in ranks]
            faults: list[Fault] = [fault for share in shares for fault in share.faults]
            for rank in ranks:
                rank.count(faults)
            texts = [text for share in shares for text in share.texts("text")]
            found.append(([i for share in shares for i in share.ids.tolist()], texts, [asdict(f) for f in faults]))
        state = ranks[-1].state_dict()
    assert found == expected and any(faults for _, _, faults in found)
    assert state == straight.state_dict()


def test_row_20_what_is_counted_is_samples_of_the_sources(mixed: DataConfig) -> None:
    """Not batches, nor what waits in buckets: after any stop, what was drawn is what was consumed and what waits."""
    stream = Stream(mixed, INPUTS, batch_size=4, rank=0, world=1, seed=5)
    consumed: Counter[tuple[int, str]] = Counter()
    for step in range(1, 25):
        batch = stream.next()
        replaced = {fault.key: fault for fault in batch.faults}
        bad = batch.replaced.tolist()
        for row, text in enumerate(batch.texts("text")):
            consumed[int(batch.epochs[row]), f"wide {int(next(iter(replaced)))}" if bad[row] else text] += 1
        plan = stream.state_dict()["plan"]
        assert plan["drawn"] == 4 * step + sum(map(len, plan["waiting"]))
    first = {text: count for (epoch, text), count in consumed.items() if epoch == 0}
    assert first == {**{f"wide {i}": 1 for i in range(30)}, **{f"tall {i}": 1 for i in range(17)}}


def test_row_19_a_reservoir_loses_what_it_holds(tmp_path: Path) -> None:
    """Hugging Face's `datasets`: after a resume what the shuffle buffer held is gone."""
    import datasets

    def fresh() -> Any:
        rows = datasets.IterableDataset.from_generator(_rows, gen_kwargs={"count": 100})
        return rows.shuffle(seed=0, buffer_size=20)

    theirs = fresh()
    seen, state = [], {}
    for row in theirs:
        seen.append(row["number"])
        if len(seen) == 30:
            state = theirs.state_dict()
            break
    again = fresh()
    again.load_state_dict(state)
    seen += [row["number"] for row in again]
    assert set(seen) != set(range(100))
    folder = data_set(tmp_path / "set", 100, shard_size=10)
    stream = Stream(config(folder), INPUTS, batch_size=10, rank=0, world=1, seed=0)
    ours = [n for _ in range(3) for n in numbers(stream)]
    resumed = Stream(config(folder), INPUTS, batch_size=10, rank=0, world=1, seed=0)
    resumed.load_state_dict(stream.state_dict())
    ours += [n for _ in range(7) for n in numbers(resumed)]
    assert sorted(ours) == [*range(100)]


def _rows(count: int) -> Any:
    for number in range(count):
        yield {"number": number}


def numbers(stream: Stream) -> list[int]:
    return [int(text.removeprefix("caption ")) for text in stream.next().texts("text")]
