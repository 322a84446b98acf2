"""A shard is in the cache whole and right, or not at all."""

import os
import signal
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from synthos.data.store import files
from synthos.data.store.files import FileFacts, Storage
from synthos.data.store.retry import StorageError
from tests.data.faults import Fault, FaultServer, serving
from tests.data.store.conftest import QUICK
from tests.data.store.look import Make, parts, shards, wait_for
from tests.data.store.processes import SPAWN, fetch

PATH = "/a/00000.tar"


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
