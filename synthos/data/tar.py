"""A strict walk through a tar shard: what is damaged or ambiguous is an error, where other readers go on silently.

tarfile stops at the first header that it cannot read, as if the shard ended there; so the walk checks the end mark.
"""

import re
import tarfile
from typing import IO

MAX_MEMBER_BYTES = 64 << 20
MAX_MEMBERS = 16  # of one sample
MAX_EXTENSIONS = 256  # of one shard: an index has a column for each
MAX_NAME = 1024  # characters: an index has as much room for every key
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}

Span = tuple[int, int]  # offset and size of a member's bytes in the tar


def walk(file: IO[bytes], path: str) -> dict[str, dict[str, Span]]:
    """The samples of a shard in order: key -> extension -> span.

    A key is a member's path up to the first dot of its file name; the extension is the rest, in lower case. Raises
    ValueError naming `path` for compressed, cut or damaged tars, links, unsafe names, doubled or split samples, and
    for more of anything than the limits above.
    """
    members, end = _members(file, path)
    _check_end(file, path, end)
    samples: dict[str, dict[str, Span]] = {}
    extensions: set[str] = set()
    latest = None
    for member in members:
        named = split_name(member.name)
        if named is None:
            continue
        key, extension = named
        if key in samples and key != latest:
            raise ValueError(f"{path}: the key {key!r} comes back after other samples: a duplicate, or a split sample")
        sample = samples.setdefault(key, {})
        if extension in sample:
            raise ValueError(f"{path}: duplicate member {member.name!r}")
        sample[extension] = (member.offset_data, member.size)
        extensions.add(extension)
        if len(sample) > MAX_MEMBERS:
            raise ValueError(f"{path}: sample {key!r} has more than {MAX_MEMBERS} members")
        if len(extensions) > MAX_EXTENSIONS:
            raise ValueError(
                f"{path}: more than {MAX_EXTENSIONS} kinds of members, as {extension!r} of {member.name!r}: "
                "a key ends at the first dot of its file name; write the shard with keys without dots"
            )
        latest = key
    return samples


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member, as webdataset splits them; None for a file that belongs to no sample."""
    match = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]+)", name.removeprefix("./"))
    return (match[1], match[2].lower()) if match else None


def _members(file: IO[bytes], path: str) -> tuple[list[tarfile.TarInfo], int]:
    """The regular files of a tar, and where the last one ends."""
    magic = file.read(2)
    file.seek(0)
    if magic in COMPRESSED:
        raise ValueError(f"{path} is compressed ({COMPRESSED[magic]}); shards are read as plain tars: decompress it")
    members = []
    try:
        with tarfile.open(fileobj=file, mode="r:", errors="strict") as tar:
            for member in tar:  # one by one: a negative size would lead tarfile back to headers it has read
                check_member(member, path)
                members.append(member)
    except (tarfile.TarError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is cut or damaged: {error}") from None
    end = max((m.offset_data + -(-m.size // 512) * 512 for m in members), default=0)
    return [m for m in members if m.isfile()], end


def check_member(member: tarfile.TarInfo, path: str) -> None:
    """Raise ValueError, naming `path`, for a member that is never read."""
    if not (member.isfile() or member.isdir()) or member.issparse():
        raise ValueError(f"{path}: {member.name!r} is a link or a device; only regular files are read")
    if len(member.name) > MAX_NAME:
        raise ValueError(f"{path}: a member's name has {len(member.name)} characters; at most {MAX_NAME} are read")
    if member.name.startswith("/") or ".." in member.name.split("/") or {"\n", "\0"} & {*member.name}:
        raise ValueError(f"{path}: unsafe member name {member.name!r}")
    if member.size < 0:
        raise ValueError(f"{path} is damaged: {member.name!r} has {member.size} bytes")
    if member.size > MAX_MEMBER_BYTES:
        raise ValueError(f"{path}: {member.name!r} has {member.size} bytes; at most {MAX_MEMBER_BYTES} are read")


def _check_end(file: IO[bytes], path: str, end: int) -> None:
    """A whole tar ends with two blocks of zeros, and only zeros may pad the file behind them."""
    file.seek(end)
    mark = file.read(1024)
    if any(mark):
        raise ValueError(f"{path} is damaged: no readable header at byte {end}; what follows would be lost")
    if len(mark) < 1024:
        raise ValueError(f"{path} is cut: it ends at byte {end + len(mark)} without an end mark")
    while chunk := file.read(1 << 20):
        if chunk.count(0) < len(chunk):
            raise ValueError(
                f"{path} goes on after its end mark at byte {end}, as tars joined by `cat` do; what follows would be "
                "lost: write one tar per file"
            )
