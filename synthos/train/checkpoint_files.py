"""The files of one checkpoint: a checksum of each, its own name when it is whole, and what is wrong with a damaged one.

manifest.json lists every file but the counters as {name: [bytes, crc32]}. The counters in state.json may be written
again on their own, and carry their checksum themselves.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MANIFEST, STATE = "manifest.json", "state.json"
STEP = re.compile(r"step_(\d+)")  # a checkpoint's own name; a person's copy has another
CHUNK = 1 << 22  # bytes read at a time
Facts = dict[str, tuple[int, int]]  # of files by name: bytes and crc32


def part_of(final: Path) -> Path:
    """Where a checkpoint is written."""
    return final.with_name(f".{final.name}.part")


def remove(folder: Path) -> None:
    """Remove a checkpoint: its name goes first, so that none is ever there by half."""
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def is_whole(folder: Path) -> bool:
    """Whether the counters, and every file that the manifest lists with its size, are there."""
    return not find_damage(folder)


def find_damage(folder: Path) -> str:
    """What names and sizes tell to be wrong with a checkpoint, empty if nothing is."""
    if not (folder / STATE).is_file():
        return f"{STATE} is missing"
    try:
        facts = read_manifest(folder)
    except ValueError as error:
        return str(error)
    for name, (size, _) in facts.items():
        try:
            found = (folder / name).stat().st_size
        except (OSError, ValueError):  # no file has such a name
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
    return ""


def find_changes(folder: Path, facts: Facts, names: Iterable[str]) -> str:
    """What the checksums of the named files tell to be wrong, empty if nothing is."""
    for name in names:
        crc = 0
        try:
            with (folder / name).open("rb", buffering=0) as file:
                while chunk := file.read(CHUNK):
                    crc = zlib.crc32(chunk, crc)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if crc != facts[name][1]:
            return f"{name} has other content than was written"
    return ""


def read_manifest(folder: Path) -> Facts:
    """Bytes and crc32 of each file. Raises ValueError for a manifest that is not there or damaged."""
    try:
        listed = json.loads((folder / MANIFEST).read_text())
        return {name: (int(size), int(crc)) for name, (size, crc) in listed.items()}
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, TypeError, AttributeError):
        raise ValueError(f"{MANIFEST} is damaged") from None


def write_counters(folder: Path, counters: dict[str, Any]) -> None:
    """Write the state besides tensors; readers see the old file or the new."""
    part = folder / f".{STATE}.part"
    counters = json.loads(json.dumps(counters))  # as they will be read: all keys are text
    write_text(part, json.dumps({**counters, "crc32": _crc(counters)}))
    part.replace(folder / STATE)


def read_counters(folder: Path) -> dict[str, Any]:
    """The state besides tensors. Raises ValueError where it is damaged."""
    try:
        counters: dict[str, Any] = json.loads((folder / STATE).read_text())
        if counters.pop("crc32") == _crc(counters):
            return counters
    except (OSError, ValueError, KeyError, AttributeError):
        pass
    raise ValueError(f"{STATE} is damaged")


def _crc(counters: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(counters, sort_keys=True).encode())


def write_text(path: Path, text: str) -> None:
    """Write a file that is on the disk when this returns."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
