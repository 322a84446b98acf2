"""Names of files: plain paths and URLs alike. What a config may name, and how a name is shown without its secrets."""

import logging
import os
import re

SCHEMES = ("file", "http", "https", "s3", "gs", "hf")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SHELL = re.compile(r"pipe:", re.IGNORECASE)
_FILE = re.compile(r"(file|local):", re.IGNORECASE)
_IPV6 = re.compile(r"//\[[0-9A-Fa-f:.%]+\]")

_SECRET = (
    r"(?:[\w.%-]*(?:signature|credential|token|secret|passw(?:or)?d|api[-_]?key|access[-_]?key|auth)[\w.%-]*|sig|pwd)"
)
_MASKS = (
    (re.compile(r"(\w://)[^/\s?#]*@"), r"\1***@"),  # user:password@ in front of a host
    (re.compile(rf"((?<![\w.%-]){_SECRET}=)[^&\s'\"<>)\]]+", re.IGNORECASE), r"\1***"),  # of a query
    (re.compile(rf"(['\"]{_SECRET}['\"]\s*:\s*b?['\"])[^'\"]*", re.IGNORECASE), r"\1***"),  # of a printed mapping
    (re.compile(r"((?:authorization|x-amz-security-token|cookie)\s*:\s*)[^\r\n'\"]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"\b(Bearer\s+|hf_)[\w.~+/=-]{8,}"), r"\1***"),
)


def is_remote(url: str) -> bool:
    """Whether it has a scheme other than file."""
    return "://" in url and scheme_of(url) != "file"


def scheme_of(url: str) -> str:
    """The scheme in lower case; `file` for a plain path."""
    match = _SCHEME.match(url)
    return match[1].lower() if match else "file"


def local_path(url: str) -> str:
    """The path that a plain path or a `file://` URL names."""
    return url[len("file://") :] if url[: len("file://")].lower() == "file://" else url


def masked(text: str) -> str:
    """A URL, or any text that holds some, with user names, passwords, signatures and tokens replaced by ***."""
    for pattern, shown in _MASKS:
        text = pattern.sub(shown, text)
    return text


def check_location(url: str, key: str, listed: bool = False) -> None:
    """Raise ValueError, naming the config key and the masked value, for what is never read.

    That is a shell command (`pipe:`), a chained address (`::`) and an unknown scheme; and for an entry of a list file
    (`listed`), which may come from elsewhere, also `file:`, by which it could name any file of this machine. What a
    config names holds no secret, for the config is frozen in the run's folder.
    """
    found = _SCHEME.match(url)
    scheme = found[1] if found else None
    fault = None
    if _SHELL.search(url):
        fault = "'pipe:' runs a shell command"
    elif "::" in _IPV6.sub("//", url):
        fault = "'::' chains addresses"
    elif listed and _FILE.match(url):
        fault = "an entry of a list file is not allowed to begin with 'file:'"
    elif scheme not in (None, *SCHEMES) or (scheme is None and _FILE.match(url)):
        fault = f"unknown scheme {url.partition(':')[0]!r}"
    elif not listed and masked(url) != url:
        fault = "it holds a secret, and a config is kept: use the environment (docs/storage.md)"
    if fault:
        allowed = ", ".join(f"{s}://" for s in SCHEMES if not (listed and s == "file"))
        raise ValueError(
            f"{key}: {masked(url)!r}: {fault}; allowed are {'relative' if listed else 'plain'} paths, {allowed}"
        )


def join(folder: str, name: str) -> str:
    """`name` in the folder; the query of an http address stays at the end."""
    if not is_remote(folder):
        return os.path.join(folder, name)
    path, query = split_query(folder)
    return f"{path.rstrip('/')}/{name}{query}"


def file_name(url: str) -> str:
    """What follows the last slash, without a query."""
    return split_query(url)[0].rpartition("/")[2]


def parent(url: str) -> str:
    """The folder that a file lies in; the query of an http address stays at the end."""
    if not is_remote(url):
        return os.path.dirname(url) or "."
    path, query = split_query(url)
    host = path.index("://") + 3
    cut = path.rfind("/", host)
    return (path[:cut] if cut > 0 else path) + query


def mask_loggers() -> None:
    """Mask what the libraries below fsspec log themselves, in this process; they show URLs and headers at DEBUG."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(present, _Mask) for present in logger.filters):
            logger.addFilter(_Mask())


class _Mask(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = masked(record.getMessage()), ()
        if record.exc_info:
            record.exc_text = masked(_FORMATTER.formatException(record.exc_info))
        return True


_FORMATTER = logging.Formatter()
_LOGGERS = (
    "fsspec", "fsspec.http", "s3fs", "gcsfs", "gcsfs.credentials", "asyncio", "aiohttp.client", "aiobotocore",
    "aiobotocore.httpsession", "aiobotocore.endpoint", "botocore.auth", "botocore.endpoint", "botocore.hooks",
    "botocore.parsers", "botocore.httpsession", "urllib3.connectionpool", "httpx", "httpx2", "httpcore",
    "huggingface_hub", "huggingface_hub.utils._http",
)  # fmt: skip


def split_query(url: str) -> tuple[str, str]:
    """A name and its query, which only http has: elsewhere a question mark is part of a name or of a pattern."""
    if scheme_of(url) not in ("http", "https"):
        return url, ""
    path, mark, query = url.partition("?")
    return path, mark + query
