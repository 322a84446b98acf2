"""Small JSON files by which the processes of a run tell each other things, also over a network file system."""

import json
import os
import socket
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """What the file holds; empty where there is none."""
    if path.parent.is_dir():
        os.listdir(path.parent)  # makes a network file system look again: it remembers that a file was absent
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a file that readers see whole or not at all."""
    _part(path, value).replace(path)


def create_json(path: Path, value: Any) -> bool:
    """The same, of several processes that try it for the first one only; whether this is it."""
    part = _part(path, value)
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    finally:
        part.unlink()
    return True


def _part(path: Path, value: Any) -> Path:
    """The content under another name, of which other nodes have one each."""
    part = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=1))
    return part
