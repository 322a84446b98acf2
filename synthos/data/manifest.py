"""manifest.json: what shards a data set consists of, and its fingerprint."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class ShardLine:
    """One shard as the fingerprint sees it."""

    name: str  # file name, without its folder
    bytes: int  # of the tar
    samples: int
    checksum: int  # CRC-32 of the tar


def fingerprint(lines: Iterable[ShardLine]) -> str:
    """The identity of a data set, 32 hex digits: its shards' names, sizes, counts and checksums, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for line in lines:
        digest.update(f"{line.name} {line.bytes} {line.samples} {line.checksum:08x}\n".encode())
    return digest.hexdigest()


def write_manifest(folder: Path, lines: list[ShardLine]) -> None:
    """Write manifest.json; a data set that has one is finished."""
    content = {"format": FORMAT, "fingerprint": fingerprint(lines), "shards": [asdict(line) for line in lines]}
    part = folder / f".{FILE}.part"
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(folder / FILE)


def read_manifest(folder: Path) -> dict[str, ShardLine] | None:
    """The shards of a data set by name, in order; None where the folder has no manifest.

    Raises ValueError for a manifest that is damaged or of another format.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        lines = [ShardLine(**line) for line in content["shards"]]
        sound = content["format"] == FORMAT and content["fingerprint"] == fingerprint(lines)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no manifest: {error!r}; delete it to go without one") from None
    if not sound:
        raise ValueError(f"{path} is of another format or was edited; delete it to go without one")
    return {line.name: line for line in lines}
