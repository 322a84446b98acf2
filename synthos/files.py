"""Files by which the processes of a run tell each other things, also over a network file system: small JSON, logs."""

import json
import os
import socket
from pathlib import Path
from typing import Any

# Why a run is asked to stop. Of rising rank, so that a wish of a person is not lost in a signal; ranks send the index.
CAUSES = ("", "drain", "notice", "terminate", "cancelled", "stop", "interrupt")


class DamagedFile(ValueError):
    """A file of a run folder can't be read as what it is; nothing that a user has written now is wrong."""

    def __init__(self, path: Path, why: object) -> None:
        super().__init__(f"{path} is damaged: {why}")


def read_json(path: Path) -> dict[str, Any]:
    """What the file holds; empty where there is none. Raises DamagedFile for what is no JSON object."""
    if path.parent.is_dir():
        os.listdir(path.parent)  # makes a network file system look again: it remembers that a file was absent
    return parse_object(path)


def parse_object(path: Path) -> dict[str, Any]:
    """The same without listing the folder: with thousands of runs that is most of the time."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise DamagedFile(path, error) from None
    if not isinstance(value, dict):
        raise DamagedFile(path, f"{value!r} is no object")
    return value


def read_heartbeat(folder: Path) -> dict[str, Any]:
    """What a run folder's heartbeat says; nothing where it was lost with a node, for the next one is soon there."""
    try:
        return parse_object(folder / "control" / "heartbeat.json")
    except DamagedFile:
        return {}


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


def read_cause(file: Path) -> str:
    """The cause that `control/stop` names, or "" where there is no such file; what is none is the wish of a person."""
    try:
        cause = json.loads(file.read_text() or "{}").get("cause", "stop")
    except FileNotFoundError:
        return ""
    except (ValueError, AttributeError):
        cause = "stop"
    return cause if cause in CAUSES[1:] else "stop"


def tail(path: Path, size: int) -> str:
    """The last `size` bytes of a text file; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def _part(path: Path, value: Any) -> Path:
    """The content under another name, of which other nodes have one each."""
    part = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=1))
    return part
