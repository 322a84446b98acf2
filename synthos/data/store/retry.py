"""Trying again: which failures of the network pass by themselves, how long to wait, and when to give up.

The waits are exponential with full jitter (uniform between zero and the current bound), so that many processes that
fail together don't come back together: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
"""

import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException, responses
from typing import Any, Literal, NamedTuple, TypeVar

from synthos.data.store.location import masked

T = TypeVar("T")
log = logging.getLogger(__name__)


class StorageError(RuntimeError):
    """The world failed: a store, the network or a disk; never a fault of a sample. The text is masked."""


class MissingFile(StorageError, FileNotFoundError):
    """There is no such file."""


class NoRoom(StorageError):
    """A disk, or what a cache may use of it, is full; what was to be kept can still be read from where it is."""


class Passing(OSError):
    """A failure that asking again may mend: a short body, or bytes with a wrong checksum."""


@dataclass(frozen=True)
class RetryPolicy:
    tries: int = 8
    base_seconds: float = 0.5  # bound of the first wait; each further bound is twice the one before
    cap_seconds: float = 30.0  # of one wait
    deadline_seconds: float = 600.0  # of all tries of one call together
    stall_seconds: float = 60.0  # a connection that brings no byte for so long has failed


class Failure(NamedTuple):
    """What a failure means."""

    kind: Literal["missing", "denied", "changed", "passing", "lasting"]
    text: str  # masked
    retry_after: float = 0.0  # seconds that the server asks for


_HINTS = {
    "missing": "check the address",
    "denied": "check the credentials, which come from the environment or fsspec's config file (docs/storage.md)",
    "changed": "it was changed while it was in use: index it again, or restore it",
    "passing": "check the store and the network, then start again: a run goes on where it stopped",
    "lasting": "asking again can't help",
}


def retry(
    call: Callable[[], T],
    what: str,
    policy: RetryPolicy = RetryPolicy(),
    count: Callable[[], None] = lambda: None,
    stop: threading.Event | None = None,
) -> T:
    """What `call` returns, asked again while it fails in a way that may pass.

    Args:
        what: the URL that is asked for, shown masked.
        count: called once for each try after the first.
        stop: when set, waiting ends.

    Raises MissingFile, and StorageError for all else: what is denied or lasting at once, the rest when the tries or the
    time are used up, or would be before the server wants to be asked again.
    """
    began, failures = time.monotonic(), 0
    while True:
        try:
            result = call()
        except StorageError:
            raise
        except _failures() as error:
            failure = failure_of(error)
        else:
            if failures:
                log.info("%s: answers again; failed were %s", masked(what), _spent(failures, began))
            return result
        # Here, outside the handler, what is raised does not carry the library's error, whose text may hold secrets.
        failures += 1
        wait = _wait_seconds(policy, failures, failure.retry_after)
        left = policy.deadline_seconds - (time.monotonic() - began)
        if failure.kind != "passing" or failures >= policy.tries or wait >= left or (stop and stop.is_set()):
            kind = MissingFile if failure.kind == "missing" else StorageError
            raise kind(f"{masked(what)}: {failure.text} ({_spent(failures, began)}); {_HINTS[failure.kind]}")
        if failures == 1:
            log.warning("%s: %s; trying again for at most %.0f s", masked(what), failure.text, left)
        count()
        _sleep(wait, stop)


def failure_of(error: BaseException) -> Failure:
    """What an exception of fsspec, or of the libraries below it, means."""
    chain = list(_chain(error))
    garbled = any(type(link).__module__ == "aiohttp.http_exceptions" for link in chain)  # aiohttp calls it status 400
    status = None if garbled else next((code for link in chain if (code := _status(link)) is not None), None)
    text = masked(f"HTTP {status} {_phrase(status)}" if status else _describe(chain))[:300]
    retry_after = max(_retry_after(link) for link in chain)
    if isinstance(error, StorageError):
        return Failure("lasting", text)
    if garbled or any(isinstance(link, (Passing, TimeoutError)) for link in chain):
        return Failure("passing", text, retry_after)
    if status is not None and status >= 400:
        return Failure(_kind_of_status(status, chain), text, retry_after)
    return Failure(_kind_of_type(chain[-1]), text, retry_after)


def worst(errors: Sequence[Exception]) -> Exception:
    """Of what failed together: what can't pass, or else what the server wants the longest wait for."""
    return max(errors, key=lambda error: ((found := failure_of(error)).kind != "passing", found.retry_after))


def _kind_of_status(
    status: int, chain: list[BaseException]
) -> Literal["missing", "denied", "changed", "passing", "lasting"]:
    if status in (401, 403) or any(isinstance(link, PermissionError) for link in chain):  # S3: 400 for an old token
        return "denied"
    if status in (404, 410):
        return "missing"
    if status in (412, 416):  # another etag, or shorter than the range that is asked for
        return "changed"
    return "passing" if status in (408, 425, 429) or status >= 500 else "lasting"


def _kind_of_type(error: BaseException) -> Literal["missing", "denied", "passing", "lasting"]:
    """Of a failure without an HTTP status; the libraries' types are told by name, so that none need be imported."""
    name = type(error).__name__
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, PermissionError) or "Credential" in name or str(error).startswith("Forbidden"):  # gcsfs: 403
        return "denied"
    if name == "JSONDecodeError":  # a proxy's page where the store's answer should be
        return "passing"
    if isinstance(error, (NotADirectoryError, IsADirectoryError, ValueError)) or "Certificate" in name:
        return "lasting"
    return "passing"


def _describe(chain: list[BaseException]) -> str:
    """A failure without an HTTP status, in words."""
    if any(isinstance(link, TimeoutError) for link in chain):
        return "no answer in time"
    if isinstance(chain[-1], FileNotFoundError):
        return "no such file"
    text = " ".join(str(chain[-1]).split())
    return text if isinstance(chain[-1], Passing) else f"{type(chain[-1]).__name__}: {text}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from; fsspec's http says FileNotFoundError whatever a server answered."""
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """HTTP status of an error of aiohttp (.status), gcsfs (.code), botocore or httpx (.response)."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif response is not None:
        found = getattr(response, "status_code", None)
    else:
        found = getattr(error, "status", None) or getattr(error, "code", None)
    return int(found) if str(found).isdecimal() else None


def _retry_after(error: BaseException) -> float:
    """Seconds that the server asks to be left alone for; 0 where it does not say."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
    else:
        headers = getattr(response if response is not None else error, "headers", None)
    value = str((headers or {}).get("retry-after", "")).strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):  # absent or unreadable
        return 0.0


def _wait_seconds(policy: RetryPolicy, failures: int, retry_after: float) -> float:
    """Full jitter; on top of what the server asks for, so that not all come back in the same instant."""
    bound = min(policy.cap_seconds, policy.base_seconds * 2.0 ** (failures - 1))
    return retry_after + random.SystemRandom().uniform(0, bound)


def _sleep(seconds: float, stop: threading.Event | None) -> None:
    if stop is None:
        time.sleep(seconds)
    else:
        stop.wait(seconds)


def _spent(tries: int, began: float) -> str:
    return f"{tries} {'try' if tries == 1 else 'tries'} in {time.monotonic() - began:.1f} s"


def _phrase(status: int) -> str:
    return responses.get(status, "")


def _failures() -> tuple[type[Exception], ...]:
    """What the network's failures are raised as; of the libraries, those that are loaded by now."""
    found = [
        getattr(sys.modules[module], name)
        for module, name in _ERRORS
        if module in sys.modules and hasattr(sys.modules[module], name)
    ]
    return (OSError, EOFError, HTTPException, *found)


_ERRORS = (
    ("json", "JSONDecodeError"),
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("gcsfs.retry", "ChecksumError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
)
