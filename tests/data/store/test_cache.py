"""A shard is in the cache whole and right, or not at all."""

import os
import shutil
import signal
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from synthos.data.store import files
from synthos.data.store.cache import NoRoom, ShardCache
from synthos.data.store.files import FileFacts, Storage
from synthos.data.store.retry import MissingFile, StorageError
from tests.data.faults import Fault, FaultServer, serving
from tests.data.store.conftest import QUICK
from tests.data.store.processes import SPAWN, fetch, pin_and_wait

PATH = "/a/00000.tar"
Make = Callable[..., ShardCache]


def shards(cache: ShardCache) -> list[bytes]:
    return sorted(path.read_bytes() for path in cache.folder.glob("*.shard"))


def parts(cache: ShardCache) -> list[Path]:
    return list(cache.folder.glob(".*.part"))


def wait_for(happened: Callable[[], object]) -> None:
    """Until something happens in another thread or process; a minute at most."""
    until = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def test_a_shard_comes_once(server: FaultServer, storage: Storage, make_cache: Make, content: bytes) -> None:
    url, cache = server.url(PATH), make_cache()
    for _ in range(3):
        assert cache.path(url, storage.facts(url), zlib.crc32(content)).read_bytes() == content
    assert len(server.asked(PATH)) == 1
    assert (storage.counters.cache_hits, storage.counters.cache_misses) == (2, 1)
    again = make_cache()  # of a later run
    assert again.path(url, storage.facts(url), zlib.crc32(content)).read_bytes() == content
    assert len(server.asked(PATH)) == 1 and parts(cache) == []
    assert cache.path("/data/x.tar", FileFacts(1, "")) == cache.path("file:///data/x.tar", FileFacts(1, ""))


def test_a_large_shard_comes_in_ranges(storage: Storage, make_cache: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RANGE_BYTES", 1 << 20)
    whole = os.urandom((20 << 20) + 77)
    with serving({PATH: whole}) as server:
        server.fail(PATH, Fault(503), Fault(keep=1000), *[Fault(delay=0.2)] * 8)
        path = make_cache().path(server.url(PATH), storage.facts(server.url(PATH)), zlib.crc32(whole))
        assert path.read_bytes() == whole
        assert len(server.asked(PATH)) == 21 + 2 and 1 < server.most_at_once[PATH] <= 8


def test_two_data_sets_of_equal_file_names_stay_apart(
    server: FaultServer, storage: Storage, make_cache: Make, content: bytes
) -> None:
    cache = make_cache()
    urls = [server.url("/a/00000.tar"), server.url("/b/00000.tar")]
    found = [cache.path(url, storage.facts(url)) for url in urls]
    assert [path.read_bytes() for path in found] == [content, content[::-1]]


def test_a_new_version_of_a_shard_is_another_entry(
    server: FaultServer, storage: Storage, make_cache: Make, content: bytes
) -> None:
    url, cache = server.url(PATH), make_cache()
    old = cache.path(url, storage.facts(url))
    server.files[PATH], server.etags[PATH] = content[::-1], '"new"'
    assert cache.path(url, storage.facts(url)).read_bytes() == content[::-1]
    assert old.read_bytes() == content


POISON = {
    "cut body": Fault(keep=1000),
    "half a body that says it is whole": Fault(body=b"x" * 150_000),
    "Content-Length too small": Fault(length=1000),
    "right length, wrong bytes": Fault(body=b"x" * 300_000),
    "an error": Fault(503),
}


@pytest.mark.parametrize("fault", POISON.values(), ids=POISON)
def test_a_fault_does_not_poison_the_cache(
    fault: Fault, server: FaultServer, storage: Storage, make_cache: Make, content: bytes
) -> None:
    url, cache = server.url(PATH), make_cache()
    server.fail(PATH, fault, fault if fault.body is None else Fault(503))
    assert cache.path(url, storage.facts(url), zlib.crc32(content)).read_bytes() == content
    assert shards(cache) == [content] and parts(cache) == []


@pytest.mark.parametrize("fault", POISON.values(), ids=POISON)
def test_a_fault_that_stays_leaves_nothing(
    fault: Fault, server: FaultServer, storage: Storage, make_cache: Make, content: bytes
) -> None:
    url, cache = server.url(PATH), make_cache()
    facts = storage.facts(url)
    server.fail(PATH, *[fault] * 40)
    with pytest.raises(StorageError, match=rf"^{url}: "):
        cache.path(url, facts, zlib.crc32(content))
    assert shards(cache) == [] and parts(cache) == []


def test_content_that_is_not_what_was_indexed_is_named(
    server: FaultServer, storage: Storage, make_cache: Make, content: bytes
) -> None:
    url = server.url(PATH)
    with pytest.raises(StorageError, match=rf"checksum is {zlib.crc32(content):08x}, 00000007 was expected.*indexed"):
        make_cache().path(url, storage.facts(url), 7)
    assert len(server.asked(PATH)) == 2  # the same twice is no accident


def test_a_changed_etag_is_an_error(server: FaultServer, storage: Storage, make_cache: Make) -> None:
    url, cache = server.url(PATH), make_cache()
    facts = storage.facts(url)
    server.etags[PATH] = '"new"'
    with pytest.raises(StorageError, match="changed"):
        cache.path(url, facts)
    assert shards(cache) == [] and parts(cache) == []


def test_s3_is_cached_through_faults_and_a_changed_object_is_an_error(
    s3: FaultServer, storage: Storage, make_cache: Make, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "RANGE_BYTES", 100_000)
    url, path, cache = "s3://bucket/a/00000.tar", "/bucket/a/00000.tar", make_cache()
    facts = storage.facts(url)
    s3.fail(path, Fault(503), Fault(keep=1000), Fault(429, headers={"Retry-After": "0"}))
    assert cache.path(url, facts, zlib.crc32(content)).read_bytes() == content
    old = replace(facts, tag='"an older etag"')
    with pytest.raises(StorageError, match=r"^s3://bucket/a/00000\.tar: it was changed: .*an older etag"):
        cache.path(url, old)
    assert shards(cache) == [content] and parts(cache) == []


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_eight_processes_download_once(
    scheme: str, request: pytest.FixtureRequest, storage: Storage, tmp_path: Path, content: bytes
) -> None:
    server: FaultServer = request.getfixturevalue("server" if scheme == "http" else "s3")
    url, path = (server.url(PATH), PATH) if scheme == "http" else ("s3://bucket/a/00000.tar", "/bucket/a/00000.tar")
    server.fail(path, Fault(delay=1.0))  # long enough for the others to ask in between
    start, out = SPAWN.Barrier(8), SPAWN.Queue()
    arguments = (tmp_path, QUICK, url, storage.facts(url), zlib.crc32(content), start, out)
    children = [SPAWN.Process(target=fetch, args=arguments) for _ in range(8)]
    for child in children:
        child.start()
    found = [out.get(timeout=120) for _ in children]
    for child in children:
        child.join(60)
    assert [checksum for checksum, _ in found] == [zlib.crc32(content)] * 8
    assert len(server.asked(path)) == 1 == sum(counters.cache_misses for _, counters in found)
    assert sum(counters.cache_hits for _, counters in found) == 7


def test_a_killed_download_leaves_nothing_that_is_served_and_no_lock(
    server: FaultServer, storage: Storage, tmp_path: Path, content: bytes, make_cache: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    url, folder = server.url(PATH), tmp_path / "cache"
    facts = storage.facts(url)
    server.fail(PATH, Fault(delay=600))
    arguments = (folder, QUICK, url, facts, zlib.crc32(content), SPAWN.Barrier(1), SPAWN.Queue())
    child = SPAWN.Process(target=fetch, args=arguments)
    child.start()
    wait_for(lambda: server.asked(PATH))
    (part,) = folder.glob(".*.part")
    assert f".{child.pid}.part" in part.name and part.stat().st_size == len(content)  # its place is taken, no more
    make_cache()
    assert part.exists()  # of a living process
    os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    cache = make_cache()
    assert not part.exists() and shards(cache) == []
    assert cache.path(url, facts, zlib.crc32(content)).read_bytes() == content
    assert len(server.asked(PATH)) == 2


def test_nobody_sees_a_shard_before_it_is_whole(
    server: FaultServer, storage: Storage, make_cache: Make, content: bytes
) -> None:
    url, cache, other = server.url(PATH), make_cache(), make_cache()
    facts = storage.facts(url)
    server.fail(PATH, Fault(delay=1.0))
    first = threading.Thread(target=cache.path, args=(url, facts))
    first.start()
    wait_for(lambda: parts(cache))
    assert shards(cache) == []
    assert other.path(url, facts).read_bytes() == content  # waited for
    first.join()
    assert len(server.asked(PATH)) == 1


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
    assert ready.wait(60)
    with pytest.raises(NoRoom):
        bring(cache, five, 2)
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


def test_what_was_brought_ahead_is_used(
    server: FaultServer, storage: Storage, make_cache: Make, content: bytes
) -> None:
    cache, urls = make_cache(), [server.url("/a/00000.tar"), server.url("/b/00000.tar")]
    cache.prefetch(["/local.tar", *urls])
    wait_for(lambda: len(shards(cache)) == 2)
    assert cache.path(urls[0], storage.facts(urls[0]), zlib.crc32(content)).read_bytes() == content
    assert cache.path(urls[1], storage.facts(urls[1])).read_bytes() == content[::-1]
    assert [len(server.asked(path)) for path in ("/a/00000.tar", "/b/00000.tar")] == [1, 1]


def test_what_was_brought_ahead_wrongly_is_brought_again(
    server: FaultServer, storage: Storage, make_cache: Make, content: bytes
) -> None:
    cache, url = make_cache(), server.url(PATH)
    server.fail(PATH, Fault(body=b"x" * len(content)))
    cache.prefetch([url])
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
    other.prefetch([url, server.url("/b/00000.tar")])
    wait_for(lambda: shards(other) == [content[::-1]])
    assert len(parts(other)) == 1 == len(server.asked(PATH))
    server.closing.set()  # the first goes on
    first.join(60)
    assert len(shards(cache)) == 2


def test_failing_ahead_of_use_is_left_to_the_use(server: FaultServer, storage: Storage, make_cache: Make) -> None:
    cache, url = make_cache(), server.url("/b/00000.tar")
    cache.prefetch([server.url("/none.tar"), url])
    wait_for(lambda: shards(cache))
    with pytest.raises(MissingFile):
        storage.facts(server.url("/none.tar"))


def test_closing_ends_a_download_ahead(server: FaultServer, make_cache: Make) -> None:
    cache = make_cache()
    server.fail(PATH, *[Fault(429, headers={"Retry-After": "20"})] * 9)
    cache.prefetch([server.url(PATH)])
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
