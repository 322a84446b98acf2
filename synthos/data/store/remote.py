"""The file systems of fsspec: how they are opened, and how they are asked for ranges within a deadline.

Ranges go through `cat_ranges` only: what `open` returns reads 5 to 50 MB ahead of each seek.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from synthos.data.store.local import FileFacts, Span
from synthos.data.store.location import mask_loggers
from synthos.data.store.redirects import watched
from synthos.data.store.retry import RetryPolicy, StorageError

CONNECTIONS = 8  # of one process to one store at a time
EXTRAS = {"http": "http", "https": "http", "s3": "s3", "gs": "gs"}  # hf comes with huggingface_hub

# Where the libraries say what tells one content from another: s3 and http, gs, hf; then times.
_TAGS = ("ETag", "generation", "etag", "blob_id", "xet_hash", "Content-MD5", "Digest", "Last-Modified", "LastModified")


def open_file_system(scheme: str, policy: RetryPolicy) -> Any:
    """A file system of this process alone: fsspec's own are shared, and neither survive a fork nor a closed loop."""
    import fsspec

    try:
        system = fsspec.filesystem(scheme, skip_instance_cache=True, **_options(scheme, policy))
    except ImportError as error:
        hint = f"pip install 'synthos[{EXTRAS[scheme]}]'" if scheme in EXTRAS else "pip install huggingface-hub"
        raise StorageError(f"{scheme}:// can't be read here ({error}): {hint}") from None
    if scheme == "s3":
        system.retries = 1  # there is one layer that tries again, and it is ours
    mask_loggers()
    return system


def _options(scheme: str, policy: RetryPolicy) -> dict[str, Any]:
    """What we set beside fsspec's config (which wins): one try, no time limit but for silence, bytes as they are."""
    from fsspec.config import conf

    if scheme == "s3":
        config = {"retries": {"max_attempts": 0}, "read_timeout": policy.stall_seconds, "connect_timeout": 30}
        return {"config_kwargs": {**config, **conf.get("s3", {}).get("config_kwargs", {})}}
    if scheme == "gs":
        return {"use_listings_cache": False}
    if scheme == "hf":
        return {}
    from aiohttp import ClientTimeout

    given = {**conf.get("http", {}), **conf.get("https", {})}.get("client_kwargs", {})
    timeout = ClientTimeout(total=None, sock_connect=30, sock_read=policy.stall_seconds)
    headers = {"Accept-Encoding": "identity", **given.get("headers", {})}
    # trust_env: proxies, and the names and passwords of ~/.netrc
    ours = {"timeout": timeout, "trust_env": True, "trace_configs": [watched()]}
    return {"client_kwargs": {**ours, **given, "headers": headers}}


def ask(system: Any, method: str, *args: Any, until: float, **kwargs: Any) -> Any:
    """Call a method of a file system; TimeoutError if it has not answered at `until`, on the monotonic clock."""
    if not system.async_impl:
        return getattr(system, method)(*args, **kwargs)
    from fsspec.asyn import sync

    return sync(
        system.loop, getattr(system, f"_{method}"), *args, timeout=max(until - time.monotonic(), 0.01), **kwargs
    )


def cat_ranges(
    system: Any, path: str, spans: Sequence[Span], expected: FileFacts | None, until: float
) -> list[bytes | Exception]:
    """The bytes of each span, or why there are none; several connections at a time."""
    starts, ends = [offset for offset, _ in spans], [offset + size for offset, size in spans]
    paths = [path] * len(spans)
    if system.async_impl:
        kwargs = _only_if(system, expected)
        found: list[bytes | Exception] = ask(
            system, "cat_ranges", paths, starts, ends, until=until, batch_size=CONNECTIONS, on_error="return", **kwargs
        )
        return found
    # Without a cache, or the file that is opened below reads ahead.
    with ThreadPoolExecutor(min(CONNECTIONS, len(spans))) as pool:
        return [
            answer
            for answers in pool.map(lambda a, b: system.cat_ranges([path], [a], [b], cache_type="none"), starts, ends)
            for answer in answers
        ]


def _only_if(system: Any, expected: FileFacts | None) -> dict[str, Any]:
    """By If-Match an http server itself refuses to serve another content; a weak tag never matches."""
    if expected is None or "http" not in system.protocol or not expected.tag.startswith('"'):
        return {}
    return {"headers": {**system.kwargs.get("headers", {}), "If-Match": expected.tag}}


def size_and_tag(info: dict[str, Any]) -> tuple[int | None, str]:
    """From what a file system says of a file."""
    tag = next((str(info[name]) for name in _TAGS if info.get(name)), "")
    return (None if info.get("size") is None else int(info["size"])), tag
