"""Servers on loopback: ours, and a real S3 API behind it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from synthos.data.store.cache import ShardCache
from synthos.data.store.files import Storage
from synthos.data.store.retry import RetryPolicy
from tests.data.faults import FaultServer, serving

QUICK = RetryPolicy(base_seconds=0.001, cap_seconds=0.02, deadline_seconds=30.0, stall_seconds=20.0)
SECRETS = ("plantedpassword", "plantedsignature", "plantedsecretkey", "plantedsessiontoken", "plantedtoken")


@pytest.fixture
def storage() -> Storage:
    return Storage(QUICK)


@pytest.fixture
def content() -> bytes:
    return os.urandom(300_000)


@pytest.fixture
def server(content: bytes) -> Iterator[FaultServer]:
    """One that serves the folders /a and /b, each with a 00000.tar of its own."""
    with serving({"/a/00000.tar": content, "/b/00000.tar": content[::-1]}) as faults:
        yield faults


@pytest.fixture
def make_cache(tmp_path: Path, storage: Storage) -> Iterator[Callable[..., ShardCache]]:
    """Caches in one folder, closed afterwards."""
    made: list[ShardCache] = []

    def make(limit_bytes: int | None = None, folder: Path = tmp_path / "cache") -> ShardCache:
        made.append(ShardCache(folder, limit_bytes, storage))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


@pytest.fixture(scope="session")
def s3_api() -> Iterator[tuple[str, Any]]:
    """Address of an S3 API, and a client that puts objects there."""
    import boto3
    from moto.server import ThreadedMotoServer

    environment = {
        "AWS_ACCESS_KEY_ID": "AKIAPLANTED",
        "AWS_SECRET_ACCESS_KEY": "plantedsecretkey",
        "AWS_SESSION_TOKEN": "plantedsessiontoken",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        api = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        api.start()
        address = f"127.0.0.1:{api.get_host_and_port()[1]}"
        patch.setenv("AWS_ENDPOINT_URL", f"http://{address}")  # so that nothing here can ask the real one
        client = boto3.client("s3", endpoint_url=f"http://{address}")
        client.create_bucket(Bucket="bucket")
        yield address, client
        client.close()
        api.stop()


@pytest.fixture
def s3(s3_api: tuple[str, Any], content: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    """A server in front of the API, which s3:// then means; s3://bucket/a/00000.tar holds `content`."""
    address, client = s3_api
    client.put_object(Bucket="bucket", Key="a/00000.tar", Body=content)
    client.put_object(Bucket="bucket", Key="b/00000.tar", Body=content[::-1])
    client.put_object(Bucket="bucket", Key="b/notes.txt", Body=b"notes")
    with serving(upstream=address) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{faults.address}")
        yield faults
