"""Where plain webdataset and fsspec lose data, time or bytes today; the same done with ours, which does not.

If a half that is about them fails with a newer release, they were mended: delete that half and keep ours.
"""

import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from webdataset.cache import FileCache
from webdataset.gopen import gopen
from webdataset.shardlists import SimpleShardList

from synthos.data.store.cache import ShardCache
from synthos.data.store.files import Storage
from synthos.data.store.location import check_location
from tests.data.faults import Fault, FaultServer, serving

PATH = "/a/00000.tar"
Make = Callable[..., ShardCache]


@pytest.fixture
def http() -> Any:
    """fsspec's file system as it comes."""
    return fsspec.filesystem("http", skip_instance_cache=True)


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads http by curl")
def test_a_cache_by_file_name_mixes_data_sets(
    server: FaultServer, storage: Storage, make_cache: Make, content: bytes, tmp_path: Path
) -> None:
    urls = [server.url("/a/00000.tar"), server.url("/b/00000.tar")]
    theirs = FileCache(str(tmp_path / "theirs"), validator=None)
    assert [Path(theirs.get_file(url)).read_bytes() for url in urls] == [content, content]  # the second is the first
    ours = make_cache()
    assert [ours.path(url, storage.facts(url)).read_bytes() for url in urls] == [content, content[::-1]]


def test_webdataset_has_no_s3_and_takes_a_chain_for_a_list(s3: FaultServer, storage: Storage, content: bytes) -> None:
    with pytest.raises(ValueError, match="no gopen handler"):
        gopen("s3://bucket/a/00000.tar")
    split = [entry["url"] for entry in SimpleShardList("simplecache::s3://bucket/a/00000.tar")]
    assert split == ["simplecache", "s3://bucket/a/00000.tar"]
    assert storage.read_spans("s3://bucket/a/00000.tar", [(0, len(content))]) == [content]
    with pytest.raises(ValueError, match="'::' chains addresses"):
        check_location("simplecache::s3://bucket/a/00000.tar", "data.shards")


def test_simplecache_serves_half_a_file_as_the_whole(
    server: FaultServer, storage: Storage, make_cache: Make, content: bytes, tmp_path: Path
) -> None:
    def theirs() -> bytes:
        options = {"cache_storage": str(tmp_path / "theirs")}
        found: bytes = fsspec.open(f"simplecache::{server.url(PATH)}", simplecache=options).open().read()
        return found

    half = Fault(keep=len(content) // 2)
    server.fail(PATH, half, half)
    with pytest.raises(Exception, match="payload is not completed"):
        theirs()
    assert theirs() == content[: len(content) // 2]  # the server is well again
    server.fail(PATH, half, half)
    path = make_cache().path(server.url(PATH), storage.facts(server.url(PATH)), zlib.crc32(content))
    assert path.read_bytes() == content


@pytest.mark.parametrize("fault", [Fault(503), Fault(keep=1000)], ids=["503", "cut body"])
def test_fsspec_asks_http_once(fault: Fault, server: FaultServer, storage: Storage, content: bytes, http: Any) -> None:
    server.fail(PATH, fault, fault)
    with pytest.raises(Exception, match="503|payload is not completed"):
        http.cat_file(server.url(PATH))
    server.fail(PATH, fault, fault)
    assert storage.read(server.url(PATH)) == content


def test_seek_and_read_moves_many_times_the_bytes(storage: Storage, http: Any) -> None:
    whole = os.urandom(107 << 20)
    spans = [(number * 5_400_000, 100_000) for number in range(20)]
    with serving({PATH: whole}) as server:
        with http.open(server.url(PATH)) as file:
            for offset, size in spans:
                file.seek(offset)
                assert file.read(size) == whole[offset : offset + size]
        theirs = server.sent(PATH)
        bodies = storage.read_spans(server.url(PATH), spans)
        ours = server.sent(PATH) - theirs
    assert bodies == [whole[offset : offset + size] for offset, size in spans]
    assert theirs > 40 * 2_000_000 and ours <= 1.2 * 2_000_000


CHILDREN = """
import multiprocessing, sys, fsspec
from synthos.data.store.files import Storage
from tests.data.store.processes import read_with

url, method = sys.argv[1:]
start = multiprocessing.get_context(method)
plain, storage, out = fsspec.filesystem(url.partition(":")[0]), Storage(), start.Queue()
before = plain.cat_file(url, start=5, end=15), storage.read_spans(url, [(5, 10)])[0]

def ask_plain():
    try:
        out.put(plain.cat_file(url, start=5, end=15))
    except RuntimeError as error:
        out.put(str(error))

def answer(target, *arguments):
    child = start.Process(target=target, args=arguments)
    child.start()
    found = out.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0
    return found

if method == "fork":
    assert answer(ask_plain) == "This class is not fork-safe"
process, found, requests = answer(read_with, storage, url, out)
assert (found, requests) == (before[1], 1)
assert (plain.cat_file(url, start=5, end=15), storage.read_spans(url, [(5, 10)])[0]) == before
"""


@pytest.mark.parametrize(
    ("scheme", "method"),
    [("http", "fork"), ("http", "spawn"), ("http", "forkserver"), ("s3", "fork"), ("s3", "forkserver")],
)
def test_a_file_system_dies_by_a_fork_and_a_storage_by_nothing(
    scheme: str, method: str, request: pytest.FixtureRequest
) -> None:
    server: FaultServer = request.getfixturevalue("server" if scheme == "http" else "s3")
    url = server.url(PATH) if scheme == "http" else "s3://bucket/a/00000.tar"
    command = [sys.executable, "-c", CHILDREN, url, method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
