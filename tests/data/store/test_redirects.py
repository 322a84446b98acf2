"""Redirects are followed, but for those that lead from outside into a private network."""

import asyncio
from collections.abc import Callable

import pytest

from synthos.data.store import redirects
from synthos.data.store.files import Storage
from synthos.data.store.redirects import is_inside
from synthos.data.store.retry import StorageError
from tests.data.faults import Fault, FaultServer

PATH, TARGET = "/a/00000.tar", "/b/00000.tar"


@pytest.mark.parametrize(
    ("host", "inside"),
    [
        ("127.0.0.1", True), ("localhost", True), ("10.1.2.3", True), ("172.16.0.1", True), ("192.168.1.1", True),
        ("169.254.169.254", True), ("0.0.0.0", True), ("::1", True), ("fd00::1", True), ("fe80::1%lo", True),
        ("::ffff:10.0.0.1", True), ("8.8.8.8", False), ("2606:4700::1111", False), ("no-such-host.invalid", False),
    ],
)  # fmt: skip
def test_what_is_inside(host: str, inside: bool) -> None:
    assert asyncio.run(is_inside(host)) is inside


def redirect(server: FaultServer, to: str, count: int = 9) -> None:
    for method in ("HEAD", "GET"):
        server.fail(PATH, *[Fault(302, headers={"Location": to})] * count, method=method)


@pytest.mark.parametrize("to", ["relative", "whole"])
def test_within_a_network_redirects_are_followed(
    server: FaultServer, storage: Storage, content: bytes, to: str
) -> None:
    redirect(server, TARGET if to == "relative" else server.url(TARGET))
    url = server.url(PATH)
    assert storage.read(url) == content[::-1]
    assert storage.read_spans(url, [(5, 10)], storage.facts(url)) == [content[::-1][5:15]]


@pytest.fixture
def outside(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server under a name that passes for one elsewhere; its number is of this machine as ever."""
    look = redirects.is_inside

    async def but_localhost(host: str) -> bool:
        return host != "localhost" and await look(host)

    monkeypatch.setattr(redirects, "is_inside", but_localhost)
    return server.url(PATH).replace("127.0.0.1", "localhost")


@pytest.mark.parametrize(
    "call", [Storage.facts, Storage.read, lambda storage, url: storage.read_spans(url, [(0, 10), (200_000, 10)])]
)
def test_none_leads_inside(
    server: FaultServer, storage: Storage, outside: str, call: Callable[[Storage, str], object]
) -> None:
    redirect(server, server.url(TARGET) + "?token=plantedtoken")
    with pytest.raises(
        StorageError, match=r"a redirect to http://127\.0\.0\.1:\d+/b/00000\.tar, .* not followed"
    ) as error:
        call(storage, outside)
    assert "1 try" in str(error.value) and "planted" not in str(error.value)
    assert server.asked(TARGET) == server.asked(TARGET, "HEAD") == []


def test_from_outside_to_outside_is_followed(
    server: FaultServer, storage: Storage, outside: str, content: bytes
) -> None:
    redirect(server, outside.replace(PATH, TARGET))
    assert storage.read(outside) == content[::-1]
