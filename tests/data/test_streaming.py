"""Streaming: what it promises, and that it says what it does not."""

import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from synthos.data import lane
from synthos.data.check import facts
from synthos.data.reader import READERS
from synthos.data.store.files import Storage
from synthos.data.stream import HeldOut
from synthos.data.streaming import Streaming
from synthos.keys import sample_id, signed64
from synthos.schema import BucketConfig, SourceConfig, StreamingConfig
from tests.data.faults import Fault as Answer
from tests.data.faults import serving
from tests.data.make import INPUTS, black_png, config, data_set, encoded, noise, pairs, picture, tar
from tests.data.store.conftest import QUICK

SHARDS, EACH = 8, 3
SAMPLES = SHARDS * EACH


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight shards of three, without an index."""
    path = data_set(tmp_path_factory.mktemp("streaming") / "set", SAMPLES, shard_size=EACH)
    for extra in [*path.glob("*.npz"), path / "manifest.json"]:
        extra.unlink()
    return path


def ranks(
    shards: Any, world: int = 1, workers: int = 0, batch: int = 4, block: int = 5, **changes: Any
) -> list[Streaming]:
    """All ranks in this process: what one says is what they all hear."""
    data = config(shards, workers=workers, streaming=StreamingConfig(SAMPLES, block), **changes)
    found: list[Streaming] = []

    def collect(own: Any) -> list[Any]:
        return [[vars(place) for place in one._places] for one in found]

    for rank in range(world):
        found.append(Streaming(data, INPUTS, batch_size=batch, rank=rank, world=world, seed=3, collect=collect))
    return found


def steps(streams: list[Streaming], count: int) -> list[Any]:
    """Epochs, ids and captions of each global batch."""
    found = []
    for _ in range(count):
        shares = [stream.next() for stream in streams]
        found.append([
            row for s in shares for row in zip(s.epochs.tolist(), s.ids.tolist(), s.texts("text"), strict=True)
        ])  # fmt: skip
    return found


@pytest.mark.parametrize("world, workers", [(1, 0), (2, 0), (4, 0), (1, 2), (2, 2)])
def test_every_pass_has_every_sample_once(folder: Path, world: int, workers: int) -> None:
    streams = ranks(folder, world, workers)
    batches = steps(streams, 3 * SAMPLES // 4)
    for stream in streams:
        stream.close()
    assert all(len(batch) == 4 for batch in batches) and {len(stream) for stream in streams} == {SAMPLES}
    passes: dict[int, list[Any]] = {}
    for epoch, *sample in (row for batch in batches for row in batch):
        passes.setdefault(epoch, []).append(tuple(sample))
    expected = sorted(
        (signed64(sample_id("set", f"{i // EACH:05d}.tar", f"{i // EACH * 10_000 + i % EACH:09d}")), f"caption {i}")
        for i in range(SAMPLES)
    )
    assert [sorted(samples) for samples in passes.values()] == [expected] * 3 and [*passes] == [0, 1, 2]
    assert len({str(samples) for samples in passes.values()}) == 3
    assert not [*folder.glob("*.npz")]


@pytest.mark.parametrize("world, workers, block", [(1, 0, 5), (2, 0, 7), (2, 0, 100), (2, 0, 1)])
def test_resume_at_every_step(folder: Path, world: int, workers: int, block: int) -> None:
    straight, states, batches = ranks(folder, world, workers, block=block), [], []
    for _ in range(14):  # more than two passes
        states.append(straight[0].state_dict())
        batches += steps(straight, 1)
    for step, state in enumerate(states):
        again = ranks(folder, world, workers, block=block)
        for stream in again:
            stream.load_state_dict(json.loads(json.dumps(state)))
        assert again[0].state_dict() == state
        assert steps(again, min(3, 14 - step)) == batches[step : step + 3]


def test_resume_with_readers(folder: Path) -> None:
    (straight,) = ranks(folder, workers=2)
    batches = steps([straight], 3)
    state = straight.state_dict()
    batches += steps([straight], 4)
    straight.close()
    (again,) = ranks(folder, workers=2)
    again.load_state_dict(json.loads(json.dumps(state)))
    assert steps([again], 4) == batches[3:]
    again.close()


def test_ranks_are_as_long_as_each_other_whatever_their_shards_hold(tmp_path: Path) -> None:
    for number, count in enumerate((9, 1, 2, 5)):
        tar(tmp_path / f"{number}.tar", pairs([f"{number}{i}" for i in range(count)]))
    batches = steps(ranks(tmp_path, 4), 40)
    assert all(len(batch) == 4 for batch in batches)
    first = Counter(key for batch in batches for epoch, _, key in batch if epoch == 0)
    assert set(first.values()) == {1} and len(first) == 17  # none is lost, though some ranks are ahead by passes


def test_it_says_what_it_can_not_promise(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ranks(folder, 4, block=50)
    (said,) = [record.getMessage() for record in caplog.records]
    for words in (
        "without an index",
        "(4 x 1)",
        "Not promised",
        f"that {SAMPLES} samples",
        "up to 50 samples",
        "lifts",
    ):
        assert words in said


def test_another_number_of_ranks_or_readers_does_not_go_on(folder: Path) -> None:
    state = ranks(folder, 2)[0].state_dict()
    with pytest.raises(ValueError, match=r"ranks is 4, the checkpoint has 2\. Restore what was changed"):
        ranks(folder, 4)[0].load_state_dict(state)
    with pytest.raises(ValueError, match="readers is 2, the checkpoint has 1"):
        ranks(folder, 2, workers=2)[0].load_state_dict(state)
    with pytest.raises(ValueError, match="block is 9, the checkpoint has 5"):
        ranks(folder, 2, block=9)[0].load_state_dict(state)


@pytest.mark.parametrize("changes, message", [
    ({"holdout_fraction": 0.1}, r"data\.holdout_fraction: 0\.1 would be ignored, .* without an index; expected 0"),
    ({"buckets": BucketConfig(areas=[4096])}, r"data\.buckets: .* would be ignored.* expected null"),
    ({"lanes": 2}, r"data\.lanes: 2 would be ignored"),
    ({"window": 4}, r"data\.window: 4 would be ignored, .* expected 16, or data\.streaming=null"),
    ({"tail": "drop"}, r"data\.tail: drop would be ignored, .* expected carry"),
    ({"read": "shards"}, r"data\.read: shards would be ignored"),
    ({"block": 0}, r"data\.streaming\.block: 0 is not allowed; at least 1"),
    ({"world": 4, "workers": 3}, r"8 shards are too few for 4 ranks of 3 readers"),
    ({"world": 3}, r"batch\.size: 4 does not divide among 3 ranks"),
])  # fmt: skip
def test_what_needs_an_index_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranks(folder, **changes)


def test_too_few_shards_are_told_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    """Those of validation have no part in it, indexed or not."""
    (own := tmp_path / "own").mkdir()
    tar(own / "0.tar", pairs(["a"]))
    data = config(folder, workers=3, validation=str(own), streaming=StreamingConfig(SAMPLES))
    assert facts(data, INPUTS, build=False, ranks=2).shards == SHARDS + 1 and not [*own.glob("*.npz")]
    assert facts(data, INPUTS, build=True, ranks=2).held_out == 1
    assert [*own.glob("*.npz")] and not [*folder.glob("*.npz")]  # what streams has none
    with pytest.raises(ValueError, match=r"data\.streaming: 8 shards are too few for 3 ranks of 3 readers.*lower"):
        facts(data, INPUTS, build=False, ranks=3)


def test_readers_tell_what_they_spent_their_time_on(tmp_path: Path) -> None:
    large = encoded(noise(256, 256), "JPEG")
    tar(tmp_path / "0.tar", [m for i in range(4) for m in ((f"{i}.jpg", large), (f"{i}.txt", b"x"))])
    here = ranks(tmp_path)[0].next().seconds
    with serving({"/0.tar": (tmp_path / "0.tar").read_bytes()}) as server:
        elsewhere = ranks(server.url("/0.tar"))[0].next().seconds
    for seconds, idle in ((here, "fetch"), (elsewhere, "read")):
        assert {name for name, spent in seconds.items() if not spent} == {idle}
        assert set(seconds) == {*READERS} and min(seconds.values()) == 0


def test_shards_of_one_name_elsewhere_are_other_shards(tmp_path: Path) -> None:
    found = set()
    for name in ("a", "b"):
        data_set(tmp_path / name, 4, 4)
        found.add(facts(config(tmp_path / name, streaming=StreamingConfig(4)), INPUTS, build=False).fingerprint)
    assert len(found) == 2


def test_a_mixture_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.mix: .* would be ignored"):
        ranks(None, mix={"one": SourceConfig(str(folder))})


def test_validation_has_shards_of_its_own(folder: Path, tmp_path: Path) -> None:
    own = data_set(tmp_path / "own", 5, shard_size=5, first=100)
    data = config(folder, validation=str(own), streaming=StreamingConfig(SAMPLES))
    assert len(HeldOut(data, INPUTS)) == 5
    known = facts(data, INPUTS, build=False)
    assert (known.samples, known.held_out, known.shards) == (SAMPLES, 5, SHARDS + 1) and not known.missing
    other = facts(config(folder, streaming=StreamingConfig(SAMPLES)), INPUTS, build=False)
    assert other.fingerprint and other.fingerprint != known.fingerprint and not [*folder.glob("*.npz")]


def test_what_can_not_be_used_is_passed_over_and_told(tmp_path: Path) -> None:
    members = [m for m in pairs([f"{i}" for i in range(12)]) if m[0] != "3.txt"]
    members = [(name, data[:40] if name == "5.png" else data) for name, data in members]
    members = [(name, b"x" * 2_000_000 if name == "8.txt" else data) for name, data in members]
    members = [(name, black_png(8200) if name == "10.png" else data) for name, data in members]
    tar(tmp_path / "0.tar", members)
    (one,) = ranks(tmp_path, batch=2)
    batches = [one.next() for _ in range(5)]  # a pass, and what is met after its last good sample
    faults = {fault.key: fault for batch in batches for fault in batch.faults}
    assert {key: (fault.member, fault.reason) for key, fault in faults.items()} == {
        "3": ("", "missing"), "5": ("png", "decode"), "8": ("txt", "limits"), "10": ("png", "limits"),
    }  # fmt: skip
    whole = (tmp_path / "0.tar").read_bytes()
    fault = faults["5"]
    assert whole[fault.offset : fault.offset + fault.size] == picture()[:40]
    assert sorted(t for b in batches[:4] for t in b.texts("text")) == sorted(
        f"caption {i}" for i in (0, 1, 2, 4, 6, 7, 9, 11)
    )
    one.count(batches[0].faults)
    with pytest.raises(RuntimeError, match="no sample in|samples in a row can't be used"):
        tar(tmp_path / "0.tar", [m for m in members if m[0].endswith("png")])
        ranks(tmp_path, batch=3)[0].next()


def test_bad_samples_end_a_run_only_where_no_good_one_lies_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "MAX_FAULTS", 2)
    keys = [f"{i}" for i in range(12)]
    order = [one["__key__"] for one, _ in itertools.islice(samples_of(tar(tmp_path / "0.tar", pairs(keys))), 12)]
    for good, met in (("ggbbgbbgbbgb", 7), ("ggbbbggggggg", None)):
        bad = {key for key, mark in zip(order, good, strict=True) if mark == "b"}
        tar(tmp_path / "0.tar", [(n, b"" if n.removesuffix(".txt") in bad else data) for n, data in pairs(keys)])
        (one,) = ranks(tmp_path, batch=6, block=100)
        if met is None:
            with pytest.raises(RuntimeError, match="3 samples in a row can't be used: .*has an empty text"):
                one.next()
        else:
            assert len(one.next().faults) == met  # more than two, but never three in a row


def samples_of(shard: Path) -> Iterator[Any]:
    """The samples of one reader's lane, in the order in which it meets them."""
    (one,) = ranks(shard.parent, block=100)
    return one._lane._samples(0)


def test_damage_is_an_error_when_it_is_met(tmp_path: Path) -> None:
    import tarfile

    path = tar(tmp_path / "0.tar", pairs(["a", "b", "c"]))
    whole = path.read_bytes()
    with tarfile.open(path) as file:
        boundary = file.getmember("b.png").offset
    flipped = bytearray(whole)
    flipped[boundary + 3] ^= 1
    for data in (whole[:boundary], whole[: boundary + 600], bytes(flipped), b"\x1f\x8b" + whole[2:], b""):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"0\.tar is cut or damaged"):
            steps(ranks(tmp_path, batch=1), 4)
    for members, fault in (
        (sorted(pairs(["a", "b"]), key=lambda m: m[0][-3:]), "comes back: a duplicate, or a split sample"),
        ([*pairs(["a"]), ("a.txt", b"")], r"duplicate member 'a\.txt'"),
        ([*pairs(["a"]), ("../b.txt", b"")], r"unsafe member name '\.\./b\.txt'"),
    ):
        tar(path, members)
        with pytest.raises(ValueError, match=rf"0\.tar: .*{fault}"):
            steps(ranks(tmp_path, batch=1), 4)


def test_shards_elsewhere_are_read_through_faults(folder: Path) -> None:
    files = {f"/set/{file.name}": file.read_bytes() for file in folder.glob("*.tar")}
    expected = steps(ranks(folder), 6)
    with serving(files) as server:
        for shard in (*files,):
            server.fail(shard, Answer(503), Answer(keep=100))
        (one,) = ranks(f"{server.url('/set')}/")
        one._lane.storage = Storage(QUICK)  # which waits as often, but not as long
        assert steps([one], 6) == expected and sum(r.status == 503 for r in server.log) > 1
