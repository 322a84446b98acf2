"""What stays in the cache and what goes, a full disk, and what is brought ahead of use."""

import errno
import os
import shutil
import subprocess
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from synthos.data.store import cache as cache_module
from synthos.data.store.cache import NoRoom, ShardCache
from synthos.data.store.files import Storage
from synthos.data.store.retry import MissingFile, StorageError
from tests.data.faults import Fault, FaultServer, serving
from tests.data.store.look import Make, parts, shards, wait_for
from tests.data.store.processes import SPAWN, pin_and_wait

PATH = "/a/00000.tar"


@pytest.fixture
def five() -> Iterator[FaultServer]:
    """Five shards of 100 kB: /0.tar to /4.tar."""
    with serving({f"/{number}.tar": bytes([number]) * 100_000 for number in range(5)}) as server:
        yield server


def bring(cache: ShardCache, server: FaultServer, *numbers: int) -> None:
    for number in numbers:
        url = server.url(f"/{number}.tar")
        cache.path(url, cache.storage.facts(url))


def kept(cache: ShardCache) -> list[int]:
    return [content[0] for content in shards(cache)]


def test_the_least_recently_used_goes_first(five: FaultServer, make_cache: Make) -> None:
    cache = make_cache(300_000)
    bring(cache, five, 0, 1, 2, 0, 3)
    assert kept(cache) == [0, 2, 3]
    bring(cache, five, 4)
    assert kept(cache) == [0, 3, 4]
    locks = {path.name.strip(".").removesuffix(".lock") for path in cache.folder.glob(".*.lock")} - {"folder"}
    assert locks == {path.name.partition("-")[0] for path in cache.folder.glob("*.shard")}


def test_what_is_pinned_stays(five: FaultServer, make_cache: Make) -> None:
    cache, other = make_cache(300_000), make_cache(300_000)
    bring(cache, five, 0, 1, 2)
    cache.pin([five.url("/0.tar"), five.url("/4.tar")])
    other.pin([five.url("/1.tar")])
    bring(cache, five, 3)
    assert kept(cache) == [0, 1, 3]
    bring(cache, five, 4)
    assert kept(cache) == [0, 1, 4]
    with pytest.raises(NoRoom, match=r"full of shards that are in use \(0\.0003 of 0\.0003 GB\).*data\.cache_gb"):
        bring(cache, five, 2)
    assert kept(cache) == [0, 1, 4] and parts(cache) == []
    cache.pin([])
    bring(cache, five, 2)
    assert kept(cache) == [1, 2, 4]


def test_pins_end_with_their_process(five: FaultServer, make_cache: Make) -> None:
    cache = make_cache(200_000)
    bring(cache, five, 0, 1)
    ready = SPAWN.Event()
    child = SPAWN.Process(target=pin_and_wait, args=(cache.folder, [five.url("/0.tar"), five.url("/1.tar")], ready))
    child.start()
    try:
        assert ready.wait(60)
        with pytest.raises(NoRoom):
            bring(cache, five, 2)
    finally:
        child.kill()
        child.join(60)
    bring(cache, five, 2)
    assert kept(cache) == [1, 2]


def test_a_limit_below_one_shard_is_the_users_fault(server: FaultServer, storage: Storage, make_cache: Make) -> None:
    url = server.url(PATH)
    with pytest.raises(ValueError, match=r"^data\.cache_gb: 0\.0001 GB hold no single shard: .* has 0\.0003 GB"):
        make_cache(100_000).path(url, storage.facts(url))
    assert server.asked(PATH) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_makes_room_and_then_ends_in_a_message(
    small_disk: Path, storage: Storage, make_cache: Make
) -> None:
    sizes = {"/0.tar": 600_000, "/1.tar": 600_000, "/2.tar": 2_000_000}
    with serving({path: os.urandom(size) for path, size in sizes.items()}) as server:
        cache = make_cache(None, small_disk)
        bring(cache, server, 0, 1)  # the second in place of the first
        assert shards(cache) == [server.files["/1.tar"]]
        url = server.url("/2.tar")
        with pytest.raises(
            NoRoom, match=rf"^{small_disk}: No space left on device; 2000000 bytes are needed for {url}"
        ):
            cache.path(url, storage.facts(url))
        assert server.asked("/2.tar") == [] and parts(cache) == []
        assert storage.read_spans(url, [(1_999_999, 1)]) == [server.files["/2.tar"][-1:]]  # in its place
        with pytest.raises(NoRoom, match=r"No space left on device; 2000000 bytes"):
            storage.download(url, small_disk / "x", storage.facts(url))


def test_only_a_full_disk_or_quota_makes_shards_give_way(
    five: FaultServer, make_cache: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails otherwise has room: deleting what is cached would not mend it."""
    cache = make_cache()
    bring(cache, five, 0, 1, 2)
    failing, take = [errno.EIO], os.posix_fallocate

    def fallocate(descriptor: int, offset: int, size: int) -> None:
        if failing:
            raise OSError(failing[0], os.strerror(failing.pop()))
        take(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(StorageError, match="Input/output error; 100000 bytes are needed") as caught:
        bring(cache, five, 3)
    assert not isinstance(caught.value, NoRoom) and kept(cache) == [0, 1, 2] and parts(cache) == []
    failing += [errno.ENOSPC, errno.EDQUOT]
    bring(cache, five, 3)
    assert kept(cache) == [2, 3]


@pytest.mark.parametrize("checked", [False, True])
def test_what_gives_way_while_it_is_checked_is_brought_again(
    checked: bool, server: FaultServer, storage: Storage, make_cache: Make, content: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Another process makes room, before its checksum is known or after."""
    cache, url, measure = make_cache(), server.url(PATH), cache_module._checksum
    unchecked = cache.path(url, storage.facts(url))

    def give_way(path: Path) -> int:
        if path != unchecked:
            return measure(path)
        found = measure(path) if checked else 0
        path.unlink()
        return found if checked else measure(path)

    monkeypatch.setattr(cache_module, "_checksum", give_way)
    assert cache.path(url, storage.facts(url), zlib.crc32(content)).read_bytes() == content
    assert len(server.asked(PATH)) == 2 and shards(cache) == [content]


def test_what_was_brought_ahead_is_used(
    server: FaultServer, storage: Storage, make_cache: Make, content: bytes
) -> None:
    cache, urls = make_cache(), [server.url("/a/00000.tar"), server.url("/b/00000.tar")]
    cache.prefetch(dict.fromkeys(["/local.tar", *urls]))
    wait_for(lambda: len(shards(cache)) == 2)
    assert cache.path(urls[0], storage.facts(urls[0]), zlib.crc32(content)).read_bytes() == content
    assert cache.path(urls[1], storage.facts(urls[1])).read_bytes() == content[::-1]
    assert [len(server.asked(path)) for path in ("/a/00000.tar", "/b/00000.tar")] == [1, 1]


def test_two_processes_that_know_a_shard_bring_it_once(
    server: FaultServer, storage: Storage, make_cache: Make, content: bytes
) -> None:
    """One brings ahead what the other uses, again and again, as training and its readers do."""
    training, reader, url = make_cache(), make_cache(), server.url(PATH)
    for _ in range(3):
        training.prefetch({url: zlib.crc32(content)})
        wait_for(lambda: shards(training))
        assert reader.path(url, storage.facts(url), zlib.crc32(content)).read_bytes() == content
    training.close()
    assert len(server.asked(PATH)) == 1 and shards(reader) == [content]


def test_what_was_brought_ahead_wrongly_is_brought_again(
    server: FaultServer, storage: Storage, make_cache: Make, content: bytes
) -> None:
    cache, url = make_cache(), server.url(PATH)
    server.fail(PATH, Fault(body=b"x" * len(content)))
    cache.prefetch(dict.fromkeys([url]))
    wait_for(lambda: shards(cache))
    assert cache.path(url, storage.facts(url), zlib.crc32(content)).read_bytes() == content
    assert shards(cache) == [content]


def test_what_another_brings_is_not_waited_for_ahead_of_use(
    server: FaultServer, storage: Storage, make_cache: Make, content: bytes
) -> None:
    cache, other, url = make_cache(), make_cache(), server.url(PATH)
    server.fail(PATH, Fault(delay=600))
    first = threading.Thread(target=cache.path, args=(url, storage.facts(url)), daemon=True)
    first.start()
    wait_for(lambda: server.asked(PATH))
    other.prefetch(dict.fromkeys([url, server.url("/b/00000.tar")]))
    wait_for(lambda: shards(other) == [content[::-1]])
    assert len(parts(other)) == 1 == len(server.asked(PATH))
    server.closing.set()  # the first goes on
    first.join(60)
    assert len(shards(cache)) == 2


def test_failing_ahead_of_use_is_left_to_the_use(server: FaultServer, storage: Storage, make_cache: Make) -> None:
    cache, url = make_cache(), server.url("/b/00000.tar")
    cache.prefetch(dict.fromkeys([server.url("/none.tar"), url]))
    wait_for(lambda: shards(cache))
    with pytest.raises(MissingFile):
        storage.facts(server.url("/none.tar"))


def test_closing_ends_a_download_ahead(server: FaultServer, make_cache: Make) -> None:
    cache = make_cache()
    server.fail(PATH, *[Fault(429, headers={"Retry-After": "20"})] * 9)
    cache.prefetch(dict.fromkeys([server.url(PATH)]))
    wait_for(lambda: server.asked(PATH))
    cache.close()
    assert [thread.name for thread in threading.enumerate() if thread.name == "prefetch"] == []
    assert parts(cache) == []


def test_a_folder_that_is_deleted_meanwhile_is_named(server: FaultServer, storage: Storage, make_cache: Make) -> None:
    cache, url = make_cache(), server.url(PATH)
    shutil.rmtree(cache.folder)
    with pytest.raises(StorageError, match=rf"^{cache.folder}: No such file or directory; 300000 bytes are needed"):
        cache.path(url, storage.facts(url))


def test_a_folder_that_cannot_be_is_named(tmp_path: Path, storage: Storage) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file/cache: no cache can be kept here: Not a directory"):
        ShardCache(tmp_path / "file" / "cache", None, storage)
