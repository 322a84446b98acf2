"""Where plain webdataset loses samples, repeats them or runs code today; the same shards in ours, which does not.

One test for each trap of the field, by its number; 19 and 20 are in test_traps_resume.py, those of caches and stores
in tests/data/store/test_today.py:

| trap | test there |
| --- | --- |
| 1 a cache keyed by file name mixes data sets | test_a_cache_by_file_name_mixes_data_sets (ids: below) |
| 11 no s3, and `::` splits an address | test_webdataset_has_no_s3_and_takes_a_chain_for_a_list |
| 14 simplecache serves half a file | test_simplecache_serves_half_a_file_as_the_whole |
| 15 http is asked once | test_fsspec_asks_http_once |
| 16 a small read moves 5 MB | test_seek_and_read_moves_many_times_the_bytes |
| 17 a file system does not outlive a fork | test_a_file_system_dies_by_a_fork_and_a_storage_by_nothing |

If a half that is about webdataset fails with a newer release, it was mended: delete that half and keep ours.
"""

import pickle
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from torch.utils.data import DataLoader

from synthos.data.decode import MAX_PIXELS, decode_image
from synthos.data.index import build_index
from synthos.data.store.location import check_location
from synthos.data.store.retry import StorageError
from synthos.data.stream import Stream
from synthos.schema import DataConfig, SourceConfig
from tests.data.make import INPUTS, Payload, black_png, change, config, data_set, encoded, noise, pairs, picture, tar

KEYS = [f"{i:03d}" for i in range(10)]


def captions(data: DataConfig | Path, samples: int = len(KEYS)) -> list[str]:
    """What an epoch of ours reads, in order."""
    return [text for batch in batches(data, samples, 1) for text in batch.texts("text")]


def batches(data: DataConfig | Path, batch: int, count: int, **share: int) -> list[Any]:
    data = data if isinstance(data, DataConfig) else config(data)
    stream = Stream(data, INPUTS, batch_size=batch, **{"rank": 0, "world": 1, "seed": 0, **share})
    found = [stream.next() for _ in range(count)]
    stream.close()
    return found


def plain(path: Path | list[str], handler: Callable[[Exception], Any] = wds.reraise_exception, **options: Any) -> Any:
    urls = [str(path)] if isinstance(path, Path) else path
    return wds.WebDataset(urls, shardshuffle=False, handler=handler, **options)


def keys(pipeline: Any) -> list[str]:
    return [sample["__key__"] for sample in pipeline]


def offset(path: Path, member: str) -> int:
    """Where the member's header begins."""
    with tarfile.open(path) as file:
        return file.getmember(member).offset


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A folder's only shard: ten captioned pictures."""
    (tmp_path / "set").mkdir()
    return tar(tmp_path / "set" / "0.tar", pairs(KEYS))


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Ten shards of ten captioned pictures."""
    folder = data_set(tmp_path / "ten", 100, shard_size=10)
    return sorted(map(str, folder.glob("*.tar")))


def folder_of(shards: list[str]) -> Path:
    return Path(shards[0]).parent


def test_row_01_two_data_sets_of_equal_file_names_never_mix(tmp_path: Path) -> None:
    """The same shard names, keys and even bytes: other samples all the same, as noise and dropout are keyed by."""
    one, two = data_set(tmp_path / "one", 6, 2), data_set(tmp_path / "two", 6, 2, first=50)
    mix = {"one": SourceConfig(str(one)), "two": SourceConfig(str(two))}
    data = config(None, mix=mix)
    (batch,) = batches(data, 12, 1)
    assert sorted(batch.texts("text")) == sorted(f"caption {i}" for i in [*range(6), *range(50, 56)])
    assert len(set(batch.ids.tolist())) == 12
    alone = {name: set(batches(config(folder, name=name), 6, 1)[0].ids.tolist()) for name, folder in
             (("one", one), ("two", two), ("copy", one))}  # fmt: skip
    assert alone["one"] | alone["two"] == set(batch.ids.tolist()) and not alone["one"] & alone["copy"]
    with pytest.raises(ValueError, match=r"one/00000\.tar and .*two/00000\.tar share a file name"):
        batches(config([str(one), str(two)]), 12, 1)


def test_row_02_cut_at_a_member_boundary(shard: Path) -> None:
    before = captions(shard.parent)
    boundary = offset(shard, "003.png")
    shard.write_bytes(shard.read_bytes()[:boundary])
    assert keys(plain(shard)) == KEYS[:3]  # and no error
    with pytest.raises(ValueError, match=r"0\.tar has \d+ bytes, its index says \d+: the shard is cut"):
        captions(shard.parent)
    shard.with_name("0.idx.npz").unlink()
    with pytest.raises(ValueError, match=rf"0\.tar is cut: it ends at byte {boundary} without an end mark"):
        captions(shard.parent)
    assert len(before) == len(KEYS)


def test_row_02_cut_while_it_is_read(shard: Path) -> None:
    stream = Stream(config(shard.parent), INPUTS, batch_size=5, rank=0, world=1, seed=0)
    stream.next()
    shard.write_bytes(shard.read_bytes()[: offset(shard, "003.png")])
    with pytest.raises(StorageError, match=r"0\.tar"):
        stream.next()


def test_row_03_a_flipped_byte_of_a_header(shard: Path) -> None:
    before = captions(shard.parent)
    header = offset(shard, "004.png")
    data = bytearray(shard.read_bytes())
    data[header + 2] ^= 1
    shard.write_bytes(data)
    assert keys(plain(shard)) == KEYS[:4]  # and no error
    assert captions(shard.parent) == before  # headers are not what an index reads by
    shard.with_name("0.idx.npz").unlink()
    with pytest.raises(ValueError, match=rf"0\.tar is damaged: no readable header at byte {header}"):
        captions(shard.parent)


def test_row_04_cut_inside_a_member_leaves_half_a_sample(tmp_path: Path) -> None:
    members = [m for key in KEYS for m in ((f"{key}.png", picture()), (f"{key}.txt", key.encode() * 600))]
    (tmp_path / "set").mkdir()
    shard = tar(tmp_path / "set" / "0.tar", members)
    shard.write_bytes(shard.read_bytes()[: offset(shard, "009.txt") + 1000])
    *whole, last = plain(shard, wds.ignore_and_continue)
    assert len(whole) == 9 and last["__key__"] == "009" and "txt" not in last
    with pytest.raises(ValueError, match=r"0\.tar is cut"):
        captions(shard.parent)


def test_row_04_a_picture_without_its_caption(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    members = [member for member in pairs(KEYS) if member[0] != "005.txt"]
    shard = tar(tmp_path / "set" / "0.tar", members)
    assert [s["__key__"] for s in plain(shard) if "txt" not in s] == ["005"]  # as good a sample as any
    with pytest.raises(ValueError, match=r"0\.tar: sample '005' is without a caption: text needs a member txt"):
        captions(shard.parent)
    found = captions(config(shard.parent, max_bad_fraction=0.1), 9)
    assert sorted(found) == [f"caption {key}" for key in KEYS if key != "005"]


def test_row_05_the_same_order_every_epoch(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(rank: int, seed: int) -> list[str]:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        pipeline = wds.WebDataset(shards, shardshuffle=100, seed=seed, nodesplitter=wds.split_by_node)
        epochs = [[s["__url__"] for s in pipeline] for _ in range(2)]
        assert epochs[0] == epochs[1]
        return epochs[0]

    assert {*theirs(0, 0)} == {*theirs(0, 1)}  # a rank sees the same half for ever, whatever the seed
    assert not {*theirs(0, 0)} & {*theirs(1, 0)}
    monkeypatch.undo()
    ours = [_numbers(batch) for batch in batches(folder_of(shards), 100, 2, rank=1, world=2)]
    assert len(ours[0]) == 50 and ours[0] != ours[1] and set(ours[0]) != set(ours[1])


def _numbers(batch: Any) -> list[int]:
    return [int(text.removeprefix("caption ")) for text in batch.texts("text")]


def test_row_06_an_epoch_counter_that_dies_with_its_worker(shards: list[str]) -> None:
    pipeline = wds.WebDataset(shards, shardshuffle=100, detshuffle=True, seed=0)
    loader = DataLoader(pipeline, batch_size=None, num_workers=1, multiprocessing_context="fork")
    first, second = ([sample["__key__"] for sample in loader] for _ in range(2))
    assert first == second
    stream = Stream(config(folder_of(shards), workers=1), INPUTS, batch_size=100, rank=0, world=1, seed=0)
    ours = []
    for _ in range(2):
        ours.append(_numbers(stream.next()))
        stream.close()  # its workers end with every epoch
    assert ours[0] != ours[1] and sorted(ours[0]) == sorted(ours[1]) == [*range(100)]


def test_row_07_ranks_of_unequal_length(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "4")
        counts.append(len(keys(plain(shards, nodesplitter=wds.split_by_node))))
    assert counts == [30, 30, 20, 20]  # the third rank leaves, and the others wait for it
    monkeypatch.undo()
    ours = [[_numbers(batch) for batch in batches(folder_of(shards), 20, 5, rank=r, world=4)] for r in range(4)]
    assert all([len(numbers) for numbers in rank] == [5] * 5 for rank in ours)
    assert sorted(n for rank in ours for numbers in rank for n in numbers) == [*range(100)]


def test_row_08_an_epoch_per_worker(shards: list[str]) -> None:
    loader = DataLoader(
        plain(shards).repeat().with_epoch(100), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    assert sum(1 for _ in loader) == 200
    lengths, read = set(), []
    for workers in (0, 2):
        stream = Stream(config(folder_of(shards), workers=workers), INPUTS, batch_size=50, rank=0, world=1, seed=0)
        lengths.add(len(stream))
        read.append([_numbers(stream.next()) for _ in range(2)])
        stream.close()
    assert lengths == {100} and read[0] == read[1] and sorted(sum(read[0], [])) == [*range(100)]


def test_row_09_an_epoch_with_replacement(shards: list[str]) -> None:
    sampled = wds.WebDataset(shards * 3, resampled=True, shardshuffle=False, seed=0).with_epoch(100)
    assert len({(s["__url__"], s["__key__"]) for s in sampled}) < 100
    assert len(set(captions(folder_of(shards), 100))) == 100


def test_row_10_half_a_second_for_each_bad_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = data_set(tmp_path / "set", 40, shard_size=40)
    shard = folder / "00000.tar"
    for number in (3, 17, 30):
        change(shard, f"{number:09d}.png")
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.warns(UserWarning, match="DecodingError"):
        assert len(list(plain(shard).decode("pil", handler=wds.warn_and_continue))) == 37
    assert slept == [0.5, 0.5, 0.5]
    slept.clear()
    (batch,) = batches(folder, 40, 1)
    assert len(batch) == 40 and sorted(fault.key[-2:] for fault in batch.faults) == ["03", "17", "30"] and not slept


def test_row_12_decoding_runs_code(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "set").mkdir()
    shard = tar(tmp_path / "set" / "0.tar", [*pairs(["a"]), ("a.pyd", pickle.dumps(Payload(ran)))])
    assert len(list(plain(shard).decode("pil"))) == 1 and ran.is_dir()
    ran.rmdir()
    assert captions(shard.parent, 1) == ["caption a"] and not ran.exists()


def test_row_12_an_address_runs_a_command(shard: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    address = f"pipe:mkdir {ran}; cat {shard}"
    assert keys(plain([address])) == KEYS and ran.is_dir()
    ran.rmdir()
    with pytest.raises(ValueError, match=r"data\.shards: .*'pipe:' runs a shell command"):
        captions(config(address))
    assert not ran.exists()
    with pytest.raises(ValueError, match="'pipe:' runs a shell command"):
        check_location(address, "data.shards", listed=True)


def test_row_13_a_key_ends_at_the_first_dot(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    members = pairs([f"track {i}.{part}" for i in range(2) for part in range(2)])
    shard = tar(tmp_path / "set" / "0.tar", members)
    theirs = [*plain(shard)]
    assert keys(theirs) == ["track 0", "track 1"] and not any("png" in sample for sample in theirs)  # two of four
    with pytest.raises(ValueError, match=r"sample 'track 0' is without an image: .* it has 0\.png, 0\.txt, 1\.png"):
        captions(shard.parent, 4)


def test_row_13_members_apart_split_a_sample(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    apart = sorted(pairs(KEYS[:3]), key=lambda member: member[0].rpartition(".")[2])  # all pictures, then all captions
    shard = tar(tmp_path / "set" / "0.tar", apart)
    assert [sorted({"png", "txt"} & {*sample}) for sample in plain(shard)] == [["png"]] * 3 + [["txt"]] * 3
    with pytest.raises(ValueError, match="the key '000' comes back after other samples: a duplicate, or a split"):
        build_index(shard)


def test_row_18_a_bomb_is_decoded_without_a_word(tmp_path: Path) -> None:
    import cv2

    bomb = black_png(8008)
    pixels = cv2.imdecode(np.frombuffer(bomb, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert len(bomb) < 64_000 and pixels.nbytes > MAX_PIXELS
    with pytest.raises(ValueError, match=f"more than {MAX_PIXELS} pixels: 8008 x 8008"):
        decode_image(bomb, 8, 8, "shared")
    (tmp_path / "set").mkdir()
    tar(tmp_path / "set" / "0.tar", [("a.png", bomb), ("a.txt", b"caption")])
    with pytest.raises(ValueError, match="sample 'a' has an unreadable image, or one above 64 megapixels"):
        captions(tmp_path / "set", 1)


def test_row_18_a_cut_jpeg_is_none() -> None:
    import cv2

    data = encoded(noise(64, 64), "JPEG")
    assert cv2.imdecode(np.frombuffer(data[:100], np.uint8), cv2.IMREAD_COLOR) is None  # no error
    for kept in (100, len(data) // 2, len(data) - 60):
        with pytest.raises(ValueError, match="damaged JPEG|not a readable"):
            decode_image(data[:kept], 8, 8, "shared")
