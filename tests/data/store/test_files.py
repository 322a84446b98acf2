"""Bytes by URL: local, over http, of a real S3 API, and of the Hub's API."""

import os
import pickle
import random
from pathlib import Path

import pytest

from synthos.data.store.files import MERGE_BYTES, FileFacts, Storage, merge
from synthos.data.store.retry import MissingFile, StorageError
from tests.data.faults import Fault, FaultServer, serving

PATH = "/a/00000.tar"


def expect(content: bytes, spans: list[tuple[int, int]]) -> list[bytes]:
    return [content[offset : offset + size] for offset, size in spans]


def some_spans(size: int, count: int) -> list[tuple[int, int]]:
    """Unordered, overlapping, doubled and empty ones."""
    chance = random.Random(0)
    spans = [(chance.randrange(size - 500), chance.randrange(500)) for _ in range(count)]
    return [*spans, spans[0], (0, 0), (size - 1, 1), (size, 0), (0, size)]


def test_local_files_are_read_by_path_and_by_url(tmp_path: Path, storage: Storage, content: bytes) -> None:
    path = tmp_path / "a b?.tar"
    path.write_bytes(content)
    (tmp_path / "notes.txt").write_text("x")
    spans = some_spans(len(content), 50)
    for url in (str(path), f"file://{path}"):
        assert storage.read_spans(url, spans) == expect(content, spans)
        assert storage.read(url) == content
        assert storage.facts(url).size == len(content)
    assert storage.list(str(tmp_path)) == [str(path)] == storage.list(f"file://{tmp_path}/*.tar")
    assert storage.counters.requests == 0


def test_local_files_that_are_missing_or_short(tmp_path: Path, storage: Storage) -> None:
    path = tmp_path / "x.tar"
    for call in (storage.read, storage.facts, storage.list, lambda url: storage.read_spans(url, [(0, 1)])):
        with pytest.raises(MissingFile, match=r"x\.tar"):
            call(str(path))
    path.write_bytes(b"0123456789")
    with pytest.raises(StorageError, match="ends at byte 10, before byte 12"):
        storage.read_spans(str(path), [(8, 4)])
    with pytest.raises(MissingFile, match="folder"):
        storage.facts(str(tmp_path))


def test_a_local_file_that_was_replaced_is_opened_anew(tmp_path: Path, storage: Storage) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"old")
    old = storage.facts(str(path))
    assert storage.read_spans(str(path), [(0, 3)], old) == [b"old"]
    (tmp_path / "new").write_bytes(b"new content")
    (tmp_path / "new").replace(path)
    assert storage.read_spans(str(path), [(0, 3)], storage.facts(str(path))) == [b"new"]
    with pytest.raises(StorageError, match="changed while it was in use: 3 bytes before, 11 now"):
        storage.read_spans(str(path), [(0, 3)], old)


def test_few_descriptors_stay_open_and_none_of_a_deleted_file(
    tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthos.data.store.local.SWEEP_SECONDS", 0.0)
    descriptors = storage._here().descriptors
    descriptors.limit = 4
    before = set(os.listdir("/proc/self/fd"))
    paths = [tmp_path / f"{number}.tar" for number in range(10)]
    for path in paths:
        path.write_bytes(path.name.encode())
        assert storage.read_spans(str(path), [(0, 1)]) == [path.name[:1].encode()]
    assert len(set(os.listdir("/proc/self/fd")) - before) == 4
    paths[9].unlink()
    paths[8].unlink()
    storage.read_spans(str(paths[0]), [(0, 1)])
    assert len(set(os.listdir("/proc/self/fd")) - before) == 2


def test_neighbours_are_merged_and_others_are_not() -> None:
    assert merge([(500, 10), (0, 10), (20, 0), (505, 2), (10, 5)]) == [(0, 510)]
    gap = 10 + MERGE_BYTES
    assert merge([(0, 10), (gap, 5)]) == [(0, gap + 5)]
    assert merge([(0, 10), (gap + 1, 5)]) == [(0, 10), (gap + 1, 5)]
    assert merge([(0, 100), (10, 5), (50, 60)]) == [(0, 110)]
    assert merge([]) == merge([(7, 0)]) == []


def test_spans_over_http(server: FaultServer, storage: Storage, content: bytes) -> None:
    url, spans = server.url(PATH), some_spans(len(content), 50)
    facts = storage.facts(url)
    assert facts == FileFacts(len(content), server.etags[PATH])
    assert storage.read_spans(url, spans) == expect(content, spans) == storage.read_spans(url, spans, facts)
    assert storage.read(url) == content
    assert storage.list(server.url("/a")) == [url] == storage.list(server.url("/a/*.tar"))
    assert storage.read_spans(url, []) == []


def test_twenty_scattered_spans_move_little_more_than_themselves(storage: Storage) -> None:
    whole = os.urandom(20 << 20)
    with serving({"/x.tar": whole}) as server:
        spans = [(number << 20, 100_000) for number in range(20)]
        assert storage.read_spans(server.url("/x.tar"), spans) == expect(whole, spans)
        assert server.sent("/x.tar") <= 1.2 * 20 * 100_000
        assert storage.counters.bytes_fetched == server.sent("/x.tar")


def test_a_file_that_changes_is_not_mixed(server: FaultServer, storage: Storage) -> None:
    url = server.url(PATH)
    facts = storage.facts(url)
    server.etags[PATH] = '"another"'
    with pytest.raises(StorageError, match="HTTP 412 .*changed while it was in use"):
        storage.read_spans(url, [(0, 10)], facts)
    with pytest.raises(StorageError, match="ends at byte 300000, before byte 300001"):
        storage.read_spans(url, [(300_000, 1)], facts)


def test_a_server_without_ranges_is_named(server: FaultServer, storage: Storage, content: bytes) -> None:
    server.fail(PATH, *[Fault(body=content)] * 3)
    with pytest.raises(StorageError, match="300000 bytes came where 10 were asked for: .*does not serve ranges"):
        storage.read_spans(server.url(PATH), [(5, 10)])
    assert len(server.asked(PATH)) == 1


def test_an_extra_that_is_missing_is_named(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(StorageError, match=r"gs:// can't be read here .*pip install 'synthos\[gs\]'"):
        storage.read("gs://bucket/x.tar")


def test_s3_through_faults(s3: FaultServer, storage: Storage, content: bytes) -> None:
    url, path, spans = "s3://bucket/a/00000.tar", "/bucket/a/00000.tar", some_spans(len(content), 50)
    s3.fail(path, Fault(503), Fault(500), method="HEAD")
    facts = storage.facts(url)
    assert facts.size == len(content) and facts.tag
    for fault in (Fault(503), Fault(429, headers={"Retry-After": "0"}), Fault(keep=1000), Fault(length=1000)):
        s3.fail(path, fault)
        assert storage.read_spans(url, spans, facts) == expect(content, spans)
    assert storage.counters.retries == 6
    assert storage.list("s3://bucket/b") == ["s3://bucket/b/00000.tar"] == storage.list("s3://bucket/b/*.tar")
    assert storage.read("s3://bucket/b/notes.txt") == b"notes"


@pytest.mark.parametrize("status", [401, 403])
def test_s3_denies_at_once(status: int, s3: FaultServer, storage: Storage) -> None:
    s3.fail("/bucket/a/00000.tar", *[Fault(status)] * 9)
    with pytest.raises(StorageError, match=rf"^s3://bucket/a/00000.tar: HTTP {status} .*1 try.*credentials"):
        storage.read_spans("s3://bucket/a/00000.tar", [(0, 10)])
    assert len(s3.asked("/bucket/a/00000.tar")) == 1


def test_s3_says_what_is_missing(s3: FaultServer, storage: Storage) -> None:
    for call in (storage.read, storage.facts, lambda url: storage.read_spans(url, [(0, 1)])):
        with pytest.raises(MissingFile, match=r"^s3://bucket/a/none\.tar: "):
            call("s3://bucket/a/none.tar")
    with pytest.raises(MissingFile):
        storage.list("s3://bucket/none/")
    with pytest.raises(MissingFile):
        storage.list("s3://no-such-bucket/")
    assert storage.counters.retries == 0


def test_it_travels_to_other_processes_as_its_policy_only(
    server: FaultServer, storage: Storage, content: bytes
) -> None:
    storage.read(server.url(PATH))
    other = pickle.loads(pickle.dumps(storage))
    assert other.policy == storage.policy and other.counters.requests == 0
    assert other.read(server.url(PATH)) == content
