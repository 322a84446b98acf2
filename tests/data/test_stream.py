"""The stream: the same samples for any number of ranks and readers, and after any stop."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from synthos.batch import Batch, Input
from synthos.data.stream import HeldOut, Stream
from synthos.data.write import Row, write_shards
from synthos.keys import sample_id, signed64
from synthos.schema import BucketConfig, DataConfig, SourceConfig
from tests.data.make import INPUTS, config, data_set, picture

SAMPLES, BATCH = 23, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_set(tmp_path_factory.mktemp("data") / "set", SAMPLES, shard_size=5)


def stream(data: Path | DataConfig, rank: int = 0, world: int = 1, seed: int = 0, batch: int = BATCH) -> Stream:
    data = data if isinstance(data, DataConfig) else config(data)
    return Stream(data, INPUTS, batch_size=batch, rank=rank, world=world, seed=seed)


def take(one: Stream, count: int) -> list[Batch]:
    return [one.next() for _ in range(count)]


def ids(batches: list[Batch]) -> list[list[int]]:
    return [batch.ids.tolist() for batch in batches]


def test_a_batch_is_what_its_ids_say(folder: Path) -> None:
    expected = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as file:
            for name in (n for n in file.getnames() if n.endswith(".json")):
                reader = file.extractfile(name)
                assert reader is not None
                number = json.load(reader)["number"]
                expected[signed64(sample_id("set", path.name, name.removesuffix(".json")))] = number
    one = stream(folder)
    assert len(one) == SAMPLES == len(expected)
    for batch in take(one, 7):
        assert batch.images("image").shape == (BATCH, 3, 8, 8) and batch.images("image").dtype == torch.uint8
        for row, identity in enumerate(batch.ids.tolist()):
            number = expected[identity]
            assert batch.texts("text")[row] == f"caption {number}"
            assert batch.images("image")[row, :, 3, 4].tolist() == [number % 256, number // 256, 7]


def test_every_epoch_has_every_sample_once(folder: Path) -> None:
    batches = take(stream(folder), SAMPLES)  # eight epochs
    seen: dict[int, list[int]] = {}
    for batch in batches:
        for epoch, identity in zip(batch.epochs.tolist(), batch.ids.tolist(), strict=True):
            seen.setdefault(epoch, []).append(identity)
    assert sorted(seen) == list(range(BATCH))
    assert len({tuple(sorted(group)) for group in seen.values()}) == 1 and len(set(seen[0])) == SAMPLES


@pytest.mark.parametrize("world", [2, 4, 8])
def test_any_number_of_ranks_shares_the_same_batches(folder: Path, world: int) -> None:
    whole = stream(folder)
    ranks = [stream(folder, rank, world) for rank in range(world)]
    for _ in range(6):
        batch, shares = whole.next(), [rank.next() for rank in ranks]
        assert torch.equal(batch.ids, torch.cat([share.ids for share in shares]))
        assert torch.equal(batch.epochs, torch.cat([share.epochs for share in shares]))
        assert {rank.digest() for rank in ranks} == {whole.digest()}
        assert all(rank.state_dict() == whole.state_dict() for rank in ranks)


def test_digests_differ_from_batch_to_batch(folder: Path) -> None:
    one = stream(folder)
    digests = [one.next() and one.digest() for _ in range(5)]
    assert len(set(digests)) == 5 and all(len(digest) == 16 for digest in digests)


def test_resume_at_every_step(folder: Path) -> None:
    """The order does not depend on what is read of a sample; captions are read soonest."""

    def stream(folder: Path) -> Stream:
        return Stream(config(folder), {"text": INPUTS["text"]}, batch_size=BATCH, rank=0, world=1, seed=0)

    straight, states = stream(folder), []
    states.append(straight.state_dict())
    batches = []
    for _ in range(100):
        batches.append(straight.next())
        states.append(straight.state_dict())
    for step, state in enumerate(states):
        again = stream(folder)
        again.load_state_dict(json.loads(json.dumps(state)))
        assert again.state_dict() == state and again.cursor == step
        expected = batches[step : step + 3] if step % 10 else batches[step:]
        assert ids(take(again, len(expected))) == ids(expected)


def test_two_stops_within_one_epoch_and_on_other_ranks(folder: Path) -> None:
    expected = ids(take(stream(folder, batch=4), 12))
    found: list[list[int]] = []
    state = stream(folder, batch=4).state_dict()
    for world, stop in ((1, 2), (2, 4), (4, 5), (2, 12)):  # three stops in the first epoch of 23
        ranks = [stream(folder, rank, world, batch=4) for rank in range(world)]
        for rank in ranks:
            rank.load_state_dict(state)
        for _ in range(stop - len(found)):
            found.append([i for rank in ranks for i in rank.next().ids.tolist()])
        state = ranks[-1].state_dict()
    assert found == expected


def test_reading_processes_change_nothing(folder: Path) -> None:
    direct, parallel = stream(folder), stream(config(folder, workers=2))
    for _ in range(4):
        one, two = direct.next(), parallel.next()
        assert torch.equal(one.ids, two.ids) and torch.equal(one.images("image"), two.images("image"))
        assert one.texts("text") == two.texts("text") and direct.digest() == parallel.digest()
        assert direct.state_dict() == parallel.state_dict()  # what is fetched ahead does not count
    state = parallel.state_dict()
    take(parallel, 3)
    parallel.load_state_dict(state)
    assert ids(take(parallel, 3)) == ids(take(direct, 3))
    parallel.close()


def test_readers_outlive_a_signal_meant_for_training(folder: Path) -> None:
    one = stream(config(folder, workers=1))
    found = take(one, 1)
    for reader in multiprocessing.active_children():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(reader.pid or 0, number)
    found += take(one, 5)
    assert ids(found) == ids(take(stream(folder), 6))
    one.close()
    assert not multiprocessing.active_children()


def test_an_error_ends_a_process_with_readers(folder: Path, tmp_path: Path) -> None:
    """No `close`, and the error's traceback holds everything until the end."""
    script = tmp_path / "script.py"
    script.write_text(
        "from tests.data.make import INPUTS, config\n"
        "from synthos.data.stream import Stream\n"
        "if __name__ == '__main__':\n"
        f"    data = config({str(folder)!r}, workers=1)\n"
        "    stream = Stream(data, INPUTS, batch_size=8, rank=0, world=1, seed=0)\n"
        "    stream.next()\n"
        "    raise SystemError('on purpose')\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, timeout=60
    )
    assert done.returncode == 1 and b"on purpose" in done.stderr


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two sources of equal shard names and keys, of which each has pictures of three shapes."""
    home = tmp_path_factory.mktemp("mixed")
    for number, name in enumerate(("one", "two")):
        sizes = [(32, 16), (16, 32), (20, 20)]
        rows = [Row(picture((i, number, 7), sizes[i % 3]), f"{name} {i}") for i in range(20 + 9 * number)]
        write_shards(home / name, rows, shard_size=4)
    mix = {"one": SourceConfig(str(home / "one"), 3.0), "two": SourceConfig(str(home / "two"), {"0": 1.0, "6": 9.0})}
    buckets = BucketConfig(sizes=[(12, 12), (8, 16), (16, 8)])
    return config(None, mix=mix, buckets=buckets, holdout_fraction=0.1)


def test_sources_and_shapes_are_the_same_on_any_ranks_and_after_any_stop(mixed: DataConfig) -> None:
    straight = stream(mixed)
    batches = take(straight, 24)
    shapes = {tuple(batch.images("image").shape[2:]) for batch in batches}
    assert shapes == {(12, 12), (8, 16), (16, 8)}
    names = [text.split()[0] for batch in batches for text in batch.texts("text")]
    assert (
        names[:48].count("one") / 48 > 0.5 and names[96:].count("two") / 96 > 0.6
    )  # as weighted, as far as shapes let
    found: list[list[int]] = []
    state = stream(mixed).state_dict()
    for world, workers, stop in ((2, 0, 3), (8, 0, 5), (1, 2, 11), (4, 0, 24)):
        ranks = [stream(replace(mixed, workers=workers), rank, world) for rank in range(world)]
        for rank in ranks:
            rank.load_state_dict(json.loads(json.dumps(state)))
        for step in range(len(found), stop):
            shares = [rank.next() for rank in ranks]
            assert {share.images("image").shape[2:] for share in shares} == {batches[step].images("image").shape[2:]}
            found.append([i for share in shares for i in share.ids.tolist()])
        state = ranks[-1].state_dict()
        for rank in ranks:
            rank.close()
    assert found == ids(batches)


def test_two_data_sets_of_equal_file_names_never_mix(mixed: DataConfig) -> None:
    seen: dict[int, str] = {}
    for batch in take(stream(mixed), 12):
        for identity, text in zip(batch.ids.tolist(), batch.texts("text"), strict=True):
            assert seen.setdefault(identity, text) == text
    held_out = HeldOut(mixed, INPUTS)
    assert not set(held_out.ids.tolist()) & set(seen)
    assert {text.split()[0] for text in held_out.batch(list(range(len(held_out)))).texts("text")} <= {"one", "two"}


def test_a_padded_tail_has_the_weight_of_what_is_real(folder: Path) -> None:
    one = stream(config(folder, tail="pad"))
    weights = [batch.weights.tolist() for batch in take(one, 3)]
    assert weights[:2] == [[1.0] * 8] * 2 and weights[2] == pytest.approx([8 / 7] * 7 + [0.0])
    ranks = [stream(config(folder, tail="pad"), rank, 4) for rank in range(4)]
    shares = [[rank.next() for _ in range(3)][2].weights.tolist() for rank in ranks]
    assert [w for share in shares for w in share] == weights[2]


def test_what_only_fills_up_is_never_a_bad_sample(tmp_path: Path) -> None:
    """One sample of nine is left for the second batch of eight, and it is cut: one fault, not eight."""
    folder = data_set(tmp_path / "set", 9, shard_size=9)
    one = stream(config(folder, tail="pad"))
    last = int(one.planner.next().positions[0]), int(one.planner.next().positions[0])
    shard = folder / "00000.tar"
    shard.write_bytes(shard.read_bytes().replace(f"caption {last[1]}".encode(), b"caption x"))
    batches = take(stream(config(folder, tail="pad")), 2)
    assert [len(batch.faults) for batch in batches] == [0, 1]
    assert batches[1].weights.tolist() == [8.0] + [0.0] * 7 and batches[1].replaced.tolist() == [True] + [False] * 7


def test_a_bad_held_out_sample_is_told_and_another_stands_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, own = data_set(tmp_path / "set", 4, 4), data_set(tmp_path / "own", 5, shard_size=5, first=100)
    data = config(folder, validation=str(own))
    held_out = HeldOut(data, INPUTS)
    shard = own / "00000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"caption 102", b"caption xyz"))
    batch = HeldOut(data, INPUTS).batch(list(range(5)))
    assert len(held_out) == 5 and batch.replaced.sum() == 1 and not any("xyz" in text for text in batch.texts("text"))
    assert '{"source": "set/validation", "shard": "00000.tar", "key": "000000002"}' in caplog.text


def test_shards_that_lie_here_need_no_room_in_the_cache(folder: Path, tmp_path: Path) -> None:
    """A folder that can't be made is not missed, nor is one left where nothing was brought."""
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file" / "cache", tmp_path / "cache"):
        one = stream(config(folder, cache=str(cache)))
        assert one.next().ids.tolist() == stream(folder).next().ids.tolist()
        one.close()
    assert not (tmp_path / "cache").exists()


def test_order_depends_on_the_seed(folder: Path) -> None:
    assert ids(take(stream(folder, seed=0), 2)) != ids(take(stream(folder, seed=1), 2))


def test_another_order_is_refused(folder: Path, tmp_path: Path) -> None:
    state = stream(folder).state_dict()
    with pytest.raises(ValueError, match="samples: seed is 1, the checkpoint has 0. Restore what was changed"):
        stream(folder, seed=1).load_state_dict(state)
    with pytest.raises(
        ValueError, match="batch_size is 4, the checkpoint has 8; lanes is 4, the checkpoint has 8. Restore"
    ):
        stream(folder, batch=4).load_state_dict(state)
    with pytest.raises(ValueError, match="holdout_fraction is 0.5, the checkpoint has 0.0"):
        stream(config(folder, holdout_fraction=0.5)).load_state_dict(state)
    grown = data_set(tmp_path / "grown", SAMPLES + 1, shard_size=5)
    with pytest.raises(ValueError, match="sources is .*'samples': 24.*, the checkpoint has .*'samples': 23"):
        stream(grown).load_state_dict(state)
    for broken in ({}, {**state, "version": 1}):
        with pytest.raises(ValueError, match="the checkpoint belongs to another order of samples"):
            stream(folder).load_state_dict(broken)
    for position in ({"cursor": None}, {"plan": {"drawn": 8, "waiting": [[9]]}}, {"plan": {}}, {"bad": None}):
        with pytest.raises(ValueError, match="the checkpoint's position is damaged: .* remove this checkpoint"):
            stream(folder).load_state_dict({**state, **position})


@pytest.mark.parametrize("batch, world, near", [(8, 3, "6 and 9"), (2, 4, "4 and 8")])
def test_ranks_must_divide_the_batch(folder: Path, batch: int, world: int, near: str) -> None:
    with pytest.raises(ValueError, match=rf"batch\.size: {batch} does not divide among {world} ranks; {near} do"):
        stream(folder, 0, world, batch=batch)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_changed_is_named(tmp_path: Path, workers: int) -> None:
    folder = data_set(tmp_path / "set", 1, shard_size=1)
    one = stream(config(folder, workers=workers), batch=1)
    shard = folder / "00000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"caption 0", b"caption 1"))
    with pytest.raises(
        RuntimeError, match=r"00000\.tar: sample '000000000' has changed since it was indexed, and no other"
    ):
        one.next()
    one.close()


def test_one_member_may_serve_two_inputs(folder: Path) -> None:
    inputs = {"a": Input("image", ("png",)), "b": Input("image", ("png",), crop="whole")}
    batch = Stream(config(folder, height=4), inputs, batch_size=2, rank=0, world=1, seed=0).next()
    assert batch.images("a").shape == batch.images("b").shape == (2, 3, 4, 8)


def test_held_out_samples_are_never_trained_on(folder: Path) -> None:
    data = config(folder, holdout_fraction=0.3)
    held_out, one = HeldOut(data, INPUTS), stream(data)
    trained = {i for batch in ids(take(one, 6)) for i in batch}
    everything = {i for batch in ids(take(stream(folder), 3)) for i in batch}
    kept: Tensor = held_out.ids
    assert 1 <= len(held_out) < SAMPLES and len(held_out) + len(one) == SAMPLES
    assert not trained & set(kept.tolist()) and trained | set(kept.tolist()) == everything
    batch = held_out.batch([1, 0])
    assert batch.ids.tolist() == kept[[1, 0]].tolist() and batch.epochs.tolist() == [0, 0]
    assert all(a < b for a, b in pairwise(kept.numpy().view(np.uint64).tolist()))


def test_a_larger_fraction_keeps_what_was_held_out(folder: Path) -> None:
    small, large = (set(HeldOut(config(folder, holdout_fraction=f), INPUTS).ids.tolist()) for f in (0.2, 0.6))
    assert small < large


def test_held_out_shards_of_their_own(folder: Path, tmp_path: Path) -> None:
    own = data_set(tmp_path / "own", 7, shard_size=3, first=200)
    data = config(folder, validation=str(own))
    held_out = HeldOut(data, INPUTS)
    assert len(held_out) == 7 and len(stream(data)) == SAMPLES
    assert sorted(held_out.batch(list(range(7))).texts("text")) == [f"caption {i}" for i in range(200, 207)]
    trained = {i for batch in ids(take(stream(data), 3)) for i in batch}
    assert not trained & set(held_out.ids.tolist())  # the same shard names and keys, yet other ids
    assert len(HeldOut(replace(data, validation=None), INPUTS)) == 0
