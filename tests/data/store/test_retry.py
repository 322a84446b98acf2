"""What is asked again, how long it is waited for, and when it ends."""

import logging
from dataclasses import replace

import pytest

from synthos.data.store.files import Storage
from synthos.data.store.retry import MissingFile, Passing, RetryPolicy, StorageError, retry
from tests.data.faults import Fault, FaultServer
from tests.data.store.conftest import QUICK

PATH = "/a/00000.tar"
CUT = Fault(keep=1000)
PASSING = {
    "503": Fault(503),
    "500": Fault(500),
    "408": Fault(408),
    "429": Fault(429, headers={"Retry-After": "0"}),
    "cut body": CUT,
    "nothing of the body": Fault(keep=0),
    "too short by its own word": Fault(body=b"short"),
    "Content-Length too small": Fault(length=1000),
    "Content-Length too large": Fault(length=400_000),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_the_right_bytes_come_after_faults_that_pass(
    fault: Fault, server: FaultServer, storage: Storage, content: bytes
) -> None:
    server.fail(PATH, fault, fault)
    assert storage.read_spans(server.url(PATH), [(0, len(content))]) == [content]
    assert len(server.asked(PATH)) >= 3
    assert storage.counters.retries >= 1  # aiohttp itself asks again once where a used connection turns out closed


def test_a_silent_server_is_asked_again(server: FaultServer, content: bytes) -> None:
    storage = Storage(replace(QUICK, stall_seconds=2.0))
    server.fail(PATH, Fault(delay=60))
    assert storage.read_spans(server.url(PATH), [(5, 10)]) == [content[5:15]]
    assert (len(server.asked(PATH)), storage.counters.retries) == (2, 1)


def test_a_slow_server_is_waited_for(server: FaultServer, storage: Storage, content: bytes) -> None:
    server.fail(PATH, Fault(delay=0.3))
    assert storage.read_spans(server.url(PATH), [(5, 10)]) == [content[5:15]]
    assert (len(server.asked(PATH)), storage.counters.retries) == (1, 0)


@pytest.mark.parametrize(
    ("status", "kind"), [(401, StorageError), (403, StorageError), (404, MissingFile), (400, StorageError)]
)
def test_what_cannot_pass_is_asked_once(
    status: int, kind: type[StorageError], server: FaultServer, storage: Storage
) -> None:
    server.fail(PATH, *[Fault(status)] * 9)
    with pytest.raises(
        StorageError, match=rf"^{server.url(PATH)}: (HTTP {status} .*|no such file )\(1 try in "
    ) as raised:
        storage.read_spans(server.url(PATH), [(0, 10)])
    assert type(raised.value) is kind
    assert (len(server.asked(PATH)), storage.counters.retries) == (1, 0)


def test_what_only_the_head_says_is_final_too(server: FaultServer, storage: Storage) -> None:
    for method in ("HEAD", "GET"):  # fsspec asks by GET where a HEAD fails
        server.fail(PATH, *[Fault(403)] * 9, method=method)
    with pytest.raises(StorageError, match="HTTP 403 Forbidden .*credentials"):
        storage.facts(server.url(PATH))
    assert (len(server.asked(PATH)), len(server.asked(PATH, "HEAD"))) == (1, 1)
    with pytest.raises(MissingFile):
        storage.facts(server.url("/a/none.tar"))


def test_the_tries_end(server: FaultServer, caplog: pytest.LogCaptureFixture) -> None:
    storage = Storage(replace(QUICK, tries=5))
    server.fail(PATH, *[Fault(503)] * 9)
    with caplog.at_level(logging.INFO), pytest.raises(StorageError, match=r"HTTP 503 Service Unavailable \(5 tries in"):
        storage.read_spans(server.url(PATH), [(0, 10)])
    assert (len(server.asked(PATH)), storage.counters.retries) == (5, 4)
    assert len([r for r in caplog.records if r.name.startswith("synthos")]) == 1  # not one for each try


def test_an_incident_has_one_line_for_its_begin_and_one_for_its_end(
    server: FaultServer, storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    server.fail(PATH, *[Fault(503)] * 4)
    with caplog.at_level(logging.INFO):
        storage.read_spans(server.url(PATH), [(0, 10)])
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("synthos")]
    assert len(lines) == 2
    assert "HTTP 503 Service Unavailable; trying again" in lines[0] and "answers again" in lines[1]


def test_a_server_that_wants_to_be_left_alone_beyond_the_deadline_is_not_waited_for(server: FaultServer) -> None:
    storage = Storage(replace(QUICK, deadline_seconds=60.0))
    server.fail(PATH, *[Fault(429, headers={"Retry-After": "3600"})] * 9)
    with pytest.raises(StorageError, match=r"HTTP 429 Too Many Requests \(1 try in"):
        storage.read_spans(server.url(PATH), [(0, 10)])
    assert len(server.asked(PATH)) == 1


def test_the_deadline_ends_a_request_that_hangs(server: FaultServer) -> None:
    storage = Storage(replace(QUICK, deadline_seconds=3.0, stall_seconds=600.0))
    server.fail(PATH, *[Fault(delay=600)] * 9)
    with pytest.raises(StorageError, match="no answer in time"):
        storage.read_spans(server.url(PATH), [(0, 10)])
    assert len(server.asked(PATH)) == 1


def waits(policy: RetryPolicy, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> list[float]:
    """Seconds that are waited between the tries of a call which never succeeds."""
    slept: list[float] = []
    monkeypatch.setattr("synthos.data.store.retry.time.sleep", slept.append)

    def fail() -> None:
        raise error or Passing("x")

    with pytest.raises(StorageError):
        retry(fail, "x", policy)
    return slept


def test_waits_are_full_jitter_below_a_doubling_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = RetryPolicy(tries=8, base_seconds=0.5, cap_seconds=8.0)
    runs = [waits(policy, monkeypatch) for _ in range(300)]
    bounds = [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    for bound, seconds in zip(bounds, zip(*runs, strict=True), strict=True):
        assert 0 <= min(seconds) < 0.1 * bound and 0.9 * bound < max(seconds) <= bound
        assert abs(sum(seconds) / len(seconds) - bound / 2) < 0.1 * bound


class Busy(OSError):
    """As httpx and huggingface_hub show an answer."""

    def __init__(self, retry_after: str) -> None:
        self.response = type("Response", (), {"status_code": 429, "headers": {"retry-after": retry_after}})


def test_retry_after_is_waited_for_as_seconds_and_as_a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = RetryPolicy(tries=2, base_seconds=0.5)
    (seconds,) = waits(policy, monkeypatch, Busy("7"))
    assert 7 <= seconds <= 7.5
    monkeypatch.setattr("synthos.data.store.retry.time.time", lambda: 1_700_000_000.0)
    (seconds,) = waits(policy, monkeypatch, Busy("Tue, 14 Nov 2023 22:13:31 GMT"))  # 11 s after that
    assert 11 <= seconds <= 11.5
    (seconds,) = waits(policy, monkeypatch, Busy("soon"))
    assert seconds <= 0.5


def test_a_programming_error_is_no_failure_of_the_world() -> None:
    calls = []

    def wrong() -> None:
        calls.append(1)
        raise TypeError("a bug")

    with pytest.raises(TypeError):
        retry(wrong, "x", QUICK)
    assert len(calls) == 1
