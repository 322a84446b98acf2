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
    url: str | None = None  # where the tar lies, if not beside the manifest; no part of its identity


def fingerprint(lines: Iterable[ShardLine]) -> str:
    """The identity of a data set, 32 hex digits: its shards' names, sizes, counts and checksums, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for line in lines:
        digest.update(f"{line.name} {line.bytes} {line.samples} {line.checksum:08x}\n".encode())
    return digest.hexdigest()


def write_manifest(folder: Path, lines: list[ShardLine]) -> None:
    """Write manifest.json; a data set that has one is finished."""
    shards = [{key: value for key, value in asdict(line).items() if value is not None} for line in lines]
    content = {"format": FORMAT, "fingerprint": fingerprint(lines), "shards": shards}
    part = folder / f".{FILE}.part"
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(folder / FILE)


def read_manifest(folder: Path) -> dict[str, ShardLine] | None:
    """The shards of a data set by name, in order; None where the folder has no manifest.

    Raises ValueError for a manifest that is damaged or of another format.
    """
    path = folder / FILE
    return parse_manifest(path.read_bytes(), str(path)) if path.is_file() else None


def parse_manifest(content: bytes, where: str) -> dict[str, ShardLine]:
    """The shards by name, in order; ValueError, naming `where`, for a manifest that is damaged or of another format."""
    try:
        parsed = json.loads(content)
        lines = [ShardLine(**line) for line in parsed["shards"]]
        sound = parsed["format"] == FORMAT and parsed["fingerprint"] == fingerprint(lines)
        unsafe = [line.name for line in lines if "/" in line.name]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is no manifest: {error!r}; delete it to go without one") from None
    if not sound:
        raise ValueError(f"{where} is of another format or was edited; delete it to go without one")
    if unsafe:
        raise ValueError(f"{where}: the shard {unsafe[0]!r} would lie in another folder; expected file names")
    return {line.name: line for line in lines}
