"""Bad samples from end to end: left out where an index tells, replaced alike everywhere where only reading does."""

import json
import re
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from synthos.batch import Fault
from synthos.data.bad import WINDOW, Budget
from synthos.data.index import open_index
from synthos.data.shards import ShardPlace
from synthos.data.store.retry import StorageError
from synthos.data.stream import HeldOut, Stream
from synthos.keys import sample_id, signed64
from synthos.schema import BucketConfig, DataConfig, SourceConfig
from tests.data.faults import Fault as Answer
from tests.data.faults import serving
from tests.data.make import INPUTS, change, config, data_set, encoded, noise, parquet, picture, tar

SAMPLES, BATCH = 24, 8


def cut(size: tuple[int, int] = (16, 16)) -> bytes:
    """A picture whose header is whole."""
    data = encoded(noise(size[1], size[0]), "PNG")
    return data[: len(data) // 2]


def write(folder: Path, samples: int = SAMPLES, bad: dict[int, str] | None = None, size: Any = None) -> Path:
    """Indexed shards of six; `bad` says what is wrong with which: cut, changed, or without its caption."""
    folder.mkdir(parents=True)
    bad = bad or {}
    for first in range(0, samples, 6):
        members = []
        for i in range(first, min(first + 6, samples)):
            shape = size(i) if size else (16, 16)
            members.append((f"{i:03d}.png", cut(shape) if bad.get(i) == "cut" else picture((i, 0, 7), shape)))
            members += [(f"{i:03d}.txt", f"caption {i}".encode())] if bad.get(i) != "mute" else []
        shard = tar(folder / f"{first // 6:05d}.tar", members)
        open_index(ShardPlace.beside(str(shard)))
        for i in range(first, first + 6):
            if bad.get(i) == "changed":
                change(shard, f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("bad") / "set", bad={3: "cut", 13: "changed", 20: "changed"})


def identity(i: int, source: str = "set") -> int:
    return signed64(sample_id(source, f"{i // 6:05d}.tar", f"{i:03d}"))


def stream(data: Path | DataConfig, rank: int = 0, world: int = 1, batch: int = BATCH) -> Stream:
    data = data if isinstance(data, DataConfig) else config(data)
    return Stream(data, INPUTS, batch_size=batch, rank=rank, world=world, seed=1)


def steps(ranks: list[Stream], count: int) -> list[Any]:
    """What each global batch holds: ids, captions, which were replaced, and for what."""
    found = []
    for _ in range(count):
        shares = [rank.next() for rank in ranks]
        faults = [fault for share in shares for fault in share.faults]
        for rank in ranks:
            rank.count(faults)
        columns = [(s.ids.tolist(), s.texts("text"), s.replaced.tolist()) for s in shares]
        ids, texts, replaced = ([value for column in part for value in column] for part in zip(*columns, strict=True))
        found.append((ids, texts, replaced, sorted(map(str, faults))))
    return found


@pytest.mark.parametrize("world, workers", [(1, 0), (2, 0), (4, 0), (1, 2), (2, 1)])
def test_a_substitute_is_the_same_on_any_rank_and_reader(folder: Path, world: int, workers: int) -> None:
    expected = steps([stream(folder)], 7)
    ranks = [stream(config(folder, workers=workers), rank, world) for rank in range(world)]
    assert steps(ranks, 7) == expected
    for rank in ranks:
        rank.close()
    assert sum(sum(replaced) for _, _, replaced, _ in expected[:6]) == 6  # three in each of two epochs


def test_nor_does_a_resume_change_it(folder: Path) -> None:
    straight = stream(folder)
    expected = steps([straight], 7)
    found: list[Any] = []
    state = stream(folder).state_dict()
    for world, stop in ((2, 1), (4, 2), (1, 5), (2, 7)):
        ranks = [stream(folder, rank, world) for rank in range(world)]
        for rank in ranks:
            rank.load_state_dict(json.loads(json.dumps(state)))
        found += steps(ranks, stop - len(found))
        state = ranks[0].state_dict()
    assert found == expected and state == straight.state_dict() and state["bad"]["recent"]


def test_a_fault_says_what_lies_where(folder: Path) -> None:
    batches = [stream(folder, batch=SAMPLES).next()]
    faults = {fault.key: fault for batch in batches for fault in batch.faults}
    assert set(faults) == {"003", "013", "020"}
    for key, reason, error in (("003", "decode", "can't be decoded: image: damaged PNG"),
                               ("013", "checksum", "has changed since it was indexed"),
                               ("020", "checksum", "has changed since it was indexed")):  # fmt: skip
        fault, shard = faults[key], f"{int(key) // 6:05d}.tar"
        with tarfile.open(folder / shard) as file:
            member = file.getmember(f"{key}.png")
        assert (fault.source, fault.shard, fault.member, fault.epoch) == ("set", shard, "png", 0)
        assert (fault.offset, fault.size) == (member.offset_data, member.size)
        assert fault.reason == reason and fault.error.startswith(error)
        assert fault.id == sample_id("set", shard, key)
    (batch,) = batches
    good = {identity(i): f"caption {i}" for i in range(SAMPLES) if i not in (3, 13, 20)}
    assert [good[i] for i in batch.ids.tolist()] == batch.texts("text") and int(batch.replaced.sum()) == 3


def test_a_substitute_is_of_the_same_source_and_bucket(tmp_path: Path) -> None:
    """Tall pictures of the first source are rare, and one more of them is bad than is good."""

    def tall(i: int) -> tuple[int, int]:
        return (16, 32) if i % 6 == 0 else (32, 16)

    write(tmp_path / "one", bad={0: "cut", 6: "changed", 8: "changed"}, size=tall)
    write(tmp_path / "two", bad={1: "cut"}, size=tall)
    mix = {name: SourceConfig(str(tmp_path / name)) for name in ("one", "two")}
    data = config(None, mix=mix, buckets=BucketConfig(sizes=[(8, 16), (16, 8)]))
    one = stream(data, batch=4)
    ids = {identity(i, name): (name, i) for name in mix for i in range(SAMPLES)}
    met = []
    for _ in range(12):
        batch = one.next()
        bad = [ids[signed64(fault.id)] for fault in batch.faults]
        instead = [ids[i] for i, new in zip(batch.ids.tolist(), batch.replaced.tolist(), strict=True) if new]
        height = batch.images("image").shape[2]
        assert all((i % 6 == 0) == (height == 16) for _, i in [*bad, *instead])
        assert sorted(name for name, _ in bad) == sorted(name for name, _ in instead)
        met += bad
    assert sorted(met) == [("one", 0), ("one", 6), ("one", 8), ("two", 1)]


def test_where_a_bucket_has_no_other_any_sample_of_the_source_stands_in(tmp_path: Path) -> None:
    write(tmp_path / "set", 12, bad={0: "cut"}, size=lambda i: (16, 32) if i == 0 else (32, 16))
    data = config(tmp_path / "set", buckets=BucketConfig(sizes=[(8, 16), (16, 8)]), tail="pad")
    one = stream(data, batch=1)
    (batch,) = [b for b in (one.next() for _ in range(12)) if b.faults]
    assert batch.images("image").shape[2:] == (16, 8) and batch.replaced.tolist() == [True]


def test_the_index_tells_some_before_anything_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", bad=dict.fromkeys((2, 7, 8, 19), "mute"))
    with pytest.raises(ValueError) as caught:
        stream(folder)
    lines = str(caught.value).splitlines()
    for line, (shard, key) in zip(lines, (("00000", "002"), ("00001", "007"), ("00001", "008")), strict=False):
        assert line.startswith(f"data.shards: {folder}/{shard}.tar: sample '{key}' is without a caption: text needs")
    assert lines[3] == "and 1 more" and len(lines) == 5
    assert lines[4].startswith("4 of 24 samples can't be used: more than data.max_bad_fraction 0.001 (here 0)")
    one = stream(config(folder, max_bad_fraction=0.2))
    texts = [text for _, texts, _, _ in steps([one], 5) for text in texts]
    assert len(one) == 20 and sorted(texts[:20]) == sorted(f"caption {i}" for i in range(24) if i not in (2, 7, 8, 19))
    with pytest.raises(
        ValueError, match=r"(?s)00001\.tar: sample '007'.*00001\.tar: sample '008'.*max_bad_per_shard 1"
    ):
        stream(config(folder, max_bad_fraction=0.2, max_bad_per_shard=1))


def test_samples_known_to_be_bad_leave_and_the_order_is_another(folder: Path, tmp_path: Path) -> None:
    known = tmp_path / "quarantine.jsonl"
    met = stream(folder, batch=SAMPLES).next().faults
    known.write_text("".join(json.dumps(asdict(fault)) + "\n" for fault in met))
    data = config(folder, known_bad=str(known))
    one, before = stream(data), stream(folder)
    assert len(one) == 21 and not any(replaced for _, _, row, _ in steps([one], 6) for replaced in row)
    with pytest.raises(ValueError, match="another order of samples: sources is"):
        stream(data).load_state_dict(before.state_dict())
    elsewhere = config(folder, known_bad=str(known), name="other")
    assert len(stream(elsewhere)) == SAMPLES  # they are named by source
    for text in ("{", '{"shard": "0.tar"}', "[]"):
        known.write_text(text)
        with pytest.raises(ValueError, match=r"data\.known_bad: .* is no list of samples"):
            stream(data)


def test_what_img2dataset_calls_a_failure_is_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", 6)
    rows = [{"key": f"{i:03d}", "status": "failed_to_resize" if i in (1, 4) else "success"} for i in range(6)]
    parquet(folder / "00000.parquet", rows)
    one = stream(folder, batch=4)
    assert len(one) == 4 and sorted(one.next().texts("text")) == [f"caption {i}" for i in (0, 2, 3, 5)]


def test_a_held_out_sample_that_is_bad_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    held = HeldOut(config(folder, holdout_fraction=0.5), INPUTS)
    bad = {identity(i) for i in (3, 13, 20)}
    rows = [row for row, identity in enumerate(held.ids.tolist()) if identity in bad]
    assert rows
    assert held.batch(rows[:1]).replaced.all()
    assert re.search(r"held out: sample '0\d\d' (has changed|can't be decoded).*data\.known_bad: \{", caplog.text)


def fault(number: int, shard: str = "0.tar") -> Fault:
    return Fault(number, 0, "set", shard, f"{number:03d}", "jpg", 512, 99, "decode", "can't be decoded: image: cut")


def test_the_budget_of_a_window() -> None:
    """A thousandth of 100,000 in a row is 100; the 101st ends the run, unless the first ones lie far enough back."""
    budget = Budget(0.001, 10_000)
    for number in range(100):
        budget.count(1000 * (number + 1), [fault(number, f"{number}.tar")])
    again = Budget(0.001, 10_000)
    again.load_state_dict(json.loads(json.dumps(budget.state_dict())))
    assert again.state_dict() == budget.state_dict()
    for one in (budget, again):
        with pytest.raises(RuntimeError) as caught:
            one.count(100_500, [fault(100 + i, "x.tar") for i in range(5)])
        text = str(caught.value)
        assert text.startswith("105 of the last 100000 samples were bad, more than data.max_bad_fraction 0.001 allows")
        assert "data/quarantine.jsonl" in text and text.count("set/x.tar: sample") == 3
    late = Budget(0.001, 10_000)
    for number in range(300):
        late.count((number + 1) * WINDOW // 100, [fault(number, f"{number}.tar")])
    assert len(late.recent) == 100


def test_the_budget_of_a_shard() -> None:
    """Twenty samples of one shard; the same one met in every epoch counts once."""
    budget = Budget(0.5, 20)
    for epoch in range(50):
        budget.count(10 * epoch, [fault(number) for number in range(20)])
    again = Budget(0.5, 20)
    again.load_state_dict(json.loads(json.dumps(budget.state_dict())))
    again.count(600, [fault(21, "1.tar")])
    with pytest.raises(RuntimeError, match=r"shard set/0\.tar has 21 bad samples, more than .*max_bad_per_shard 20"):
        again.count(610, [fault(20)])


def test_a_stream_ends_when_its_budget_does(folder: Path) -> None:
    one = stream(config(folder, max_bad_fraction=0.0))
    with pytest.raises(RuntimeError, match=r"of the last \d+ samples were bad, .*max_bad_fraction 0 allows"):
        steps([one], 3)
    one = stream(config(folder, max_bad_per_shard=0, max_bad_fraction=0.5))
    with pytest.raises(RuntimeError, match=r"shard set/0000\d\.tar has 1 bad samples, more than .*max_bad_per_shard 0"):
        steps([one], 3)


def test_a_failure_of_the_network_is_no_bad_sample(tmp_path: Path) -> None:
    folder = data_set(tmp_path / "set", 12, shard_size=6)
    files = {f"/set/{file.name}": file.read_bytes() for file in folder.iterdir()}
    expected = steps([stream(folder, batch=6)], 2)
    with serving(files) as server:
        one = stream(config(f"{server.url('/set')}/"), batch=6)
        server.fail("/set/00000.tar", Answer(503), Answer(keep=100))
        assert steps([one], 2) == expected and len(server.asked("/set/00000.tar")) > 2  # and nothing was replaced
    for status in (403, 404):
        with serving(files) as server:
            one = stream(config(f"{server.url('/set')}/"), batch=6)
            for shard in ("/set/00000.tar", "/set/00001.tar"):
                server.fail(shard, Answer(status))
            with pytest.raises(StorageError, match=r"0000[01]\.tar"):
                one.next()
            assert one.state_dict()["bad"] == {"recent": [], "shards": {}} and one.cursor == 0
