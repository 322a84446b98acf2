"""hf:// through huggingface_hub's own client, against a server that answers as the Hub does."""

import json
from collections.abc import Iterator

import fsspec.config
import pytest

from synthos.data.store.files import Storage
from synthos.data.store.retry import StorageError
from tests.data.faults import Fault, FaultServer, serving

FOLDER = "hf://datasets/me/set@main/a"
CONTENT_PATH = "/datasets/me/set/resolve/main/a/00000.tar"


@pytest.fixture
def hub(content: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    tree = [
        {"type": "file", "path": "a/00000.tar", "size": len(content), "oid": "0123abcd"},
        {"type": "file", "path": "a/notes.txt", "size": 5, "oid": "4567abcd"},
    ]
    files = {
        "/api/datasets/me/set/revision/main": {"id": "me/set"},
        "/api/datasets/me/set/tree/main": [{"type": "directory", "path": "a", "oid": "89ababcd"}],
        "/api/datasets/me/set/tree/main/a": tree,
    }
    answers = {path: json.dumps(value).encode() for path, value in files.items()}
    with serving(
        {**answers, CONTENT_PATH: content, CONTENT_PATH.replace("00000.tar", "notes.txt"): b"notes"}
    ) as server:
        options = {"endpoint": f"http://{server.address}", "token": "hf_plantedtoken"}
        monkeypatch.setitem(fsspec.config.conf, "hf", options)
        yield server


def test_the_hub_is_read_exactly_and_again_after_faults(hub: FaultServer, storage: Storage, content: bytes) -> None:
    url, spans = f"{FOLDER}/00000.tar", [(299_000, 1000), (10, 5), (0, 3)]
    assert (storage.facts(url).size, storage.facts(url).tag) == (len(content), "0123abcd")
    assert storage.read(f"{FOLDER}/notes.txt") == b"notes"
    assert storage.list(FOLDER) == [url] == storage.list(f"{FOLDER}/*.tar")
    assert storage.read_spans(url, spans) == [content[offset : offset + size] for offset, size in spans]
    assert hub.sent(CONTENT_PATH) == 1000 + 15  # no read-ahead
    hub.fail(CONTENT_PATH, Fault(keep=100))
    assert storage.read_spans(url, [(0, 1000)]) == [content[:1000]]
    assert hub.sent(CONTENT_PATH) == 1015 + 100 + 1000


def test_the_hub_denies_at_once(hub: FaultServer, storage: Storage) -> None:
    hub.fail(CONTENT_PATH, *[Fault(403)] * 9)
    with pytest.raises(StorageError, match=r"HTTP 403 Forbidden \(1 try") as raised:
        storage.read_spans(f"{FOLDER}/00000.tar", [(0, 3)])
    assert len(hub.asked(CONTENT_PATH)) == 1 and "planted" not in str(raised.value)
