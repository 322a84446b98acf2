"""Secrets are kept out of everything that is written of a run: command, config, script, provenance, journal."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from synthos.data.store.location import masked

SHORTEST = 8  # letters of a secret that is found by its value alone; a shorter one would be found in anything
_ENDING = r"(?:KEY|TOKEN|SECRET|PASS(?:WD|WORD|PHRASE)?|CREDENTIAL)S?"
_VARIABLE = re.compile(rf"{_ENDING}(?:_|$)")
_KEY = r"(?i:[\w.-]*(?:api[-_]?key|access[-_]?key|token|secret|passw(?:or)?d|passphrase))"
# A path, a reference to a variable, a small number or a switch is no secret, whatever its name.
_HARMLESS = r"['\"]?(?:[$/~]|(?:true|false|null|none|\d{1,5})\b)"
_VALUE = rf"(?!{_HARMLESS})(?:'[^']{{4,}}'|\"[^\"]{{4,}}\"|[^\s'\",;)}}\]]{{4,}})"
_ASSIGNED = re.compile(rf"(?<![\w.-])([A-Z0-9_]*{_ENDING}(?:_[A-Z0-9_]+)?|{_KEY})(['\"]?\s*[=:]\s*){_VALUE}")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]+")
_TOKEN = re.compile(r"\b(hf_|ghp_|github_pat_|sk-|wandb_v1_|Bearer\s+)[\w.~+/=-]{16,}")


def secret_values(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that hold secrets by their name (KEY, TOKEN, SECRET, PASS...); those that hold a path do not."""
    return {
        name: value
        for name, value in environment.items()
        if _VARIABLE.search(name.upper()) and len(value) >= SHORTEST and not value.startswith(("/", "~"))
    }


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """A text with *** for secrets: values of such variables, NAME=value, passwords and signatures in URLs, tokens."""
    return _hide(text, _values(environment))


def redact_bytes(content: bytes, environment: Mapping[str, str] = os.environ) -> bytes:
    """The same for a patch, by values alone: its lines are code, where `token=words[0]` is none."""
    for value in _values(environment):
        content = content.replace(value.encode(), b"***")
    return content


def problems(plain: Any) -> Iterator[str]:
    """A line for each value of a config that holds a secret: a config is frozen in the run's folder, as it is."""
    values = _values(os.environ)
    for path, text in _texts(plain, ""):
        said = f"{path.rpartition('.')[2]}={text}"
        if _hide(said, values) != said:
            shown = _hide(text, values)
            yield (
                f"{path}: {shown if shown != text else '***'!r} holds a secret, and a config is kept; put it into a "
                "file below your home"
            )


def _texts(plain: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every text of a config, with its key."""
    if isinstance(plain, Mapping):
        for key, value in plain.items():
            yield from _texts(value, f"{path}.{key}" if path else str(key))
    elif isinstance(plain, list | tuple):
        for number, value in enumerate(plain):
            yield from _texts(value, f"{path}[{number}]")
    elif isinstance(plain, str):
        yield path, plain


def _values(environment: Mapping[str, str]) -> list[str]:
    """Longest first: one may be part of another."""
    return sorted(secret_values(environment).values(), key=len, reverse=True)


def _hide(text: str, values: list[str]) -> str:
    for value in values:
        text = text.replace(value, "***")
    text = _URL.sub(lambda match: masked(match[0]), text)
    return _TOKEN.sub(r"\1***", _ASSIGNED.sub(r"\1\2***", text))
