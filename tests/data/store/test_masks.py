"""Planted secrets are searched for in all that is said, at the most talkative level."""

import logging
import traceback
from collections.abc import Callable

import pytest

from synthos.data.store.cache import ShardCache
from synthos.data.store.files import Storage
from synthos.data.store.retry import RetryPolicy, StorageError
from tests.data.faults import Fault, FaultServer
from tests.data.store.conftest import SECRETS

PATH = "/a/00000.tar"


def said(caplog: pytest.LogCaptureFixture, raised: list[BaseException]) -> str:
    shown = "".join("".join(traceback.format_exception(error)) for error in raised)
    return caplog.text + shown + "".join(map(repr, raised))


@pytest.mark.parametrize("fault", [Fault(403), Fault(404), Fault(503), Fault(keep=3), Fault(delay=60)])
def test_a_signed_address_is_never_shown(fault: Fault, server: FaultServer, caplog: pytest.LogCaptureFixture) -> None:
    plain = server.url(PATH)
    url = plain.replace("://", "://me:plantedpassword@") + "?X-Amz-Signature=plantedsignature&token=plantedtoken"
    storage = Storage(RetryPolicy(tries=2, base_seconds=0.001, deadline_seconds=1.5))
    raised: list[BaseException] = []
    with caplog.at_level(logging.DEBUG):
        facts = storage.facts(url)
        server.fail(PATH, *[fault] * 9)
        for call in (lambda: storage.read(url), lambda: storage.read_spans(url, [(0, 10)], facts)):
            with pytest.raises(StorageError) as error:
                call()
            raised.append(error.value)
    text = said(caplog, raised)
    assert "***" in text and "fsspec.http" in text
    assert [secret for secret in SECRETS if secret in text] == []


@pytest.mark.parametrize("fault", [Fault(403), Fault(503), Fault(keep=3)])
def test_the_keys_of_s3_are_never_shown(fault: Fault, s3: FaultServer, caplog: pytest.LogCaptureFixture) -> None:
    storage = Storage(RetryPolicy(tries=2, base_seconds=0.001))
    raised: list[BaseException] = []
    with caplog.at_level(logging.DEBUG):
        storage.facts("s3://bucket/a/00000.tar")
        s3.fail("/bucket/a/00000.tar", *[fault] * 9)
        with pytest.raises(StorageError) as error:
            storage.read_spans("s3://bucket/a/00000.tar", [(0, 10)])
        raised.append(error.value)
    text = said(caplog, raised)
    assert "s3fs" in text and "botocore" in text
    assert [secret for secret in SECRETS if secret in text] == []


def test_the_cache_shows_none_either(
    server: FaultServer, caplog: pytest.LogCaptureFixture, make_cache: Callable[..., ShardCache], storage: Storage
) -> None:
    url = server.url(PATH) + "?sig=plantedsignature"
    cache = make_cache()
    facts = storage.facts(url)
    raised: list[BaseException] = []
    with caplog.at_level(logging.DEBUG):
        for checksum in (None, 7):
            server.fail(PATH, *[Fault(403)] * (checksum is None))
            with pytest.raises(StorageError) as error:
                cache.path(url, facts, checksum)
            raised.append(error.value)
    assert [secret for secret in SECRETS if secret in said(caplog, raised)] == []
    assert "plantedsignature" not in "".join(path.name for path in cache.folder.iterdir())
