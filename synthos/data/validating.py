"""Is a shard whole, and every sample of it? Its tar is walked and each member read again, whatever an index says."""

import io
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from synthos.data.index import IMAGE_SUFFIXES, MAX_TEXT_BYTES, Member, ShardIndex, load_index
from synthos.data.indexing import local_copy
from synthos.data.manifest import ShardLine
from synthos.data.shards import ShardPlace
from synthos.data.store.files import Storage
from synthos.data.store.location import masked
from synthos.data.store.retry import MissingFile
from synthos.data.tar import Span, walk
from synthos.data.write import check_picture

Sample = dict[str, Span]


@dataclass(frozen=True)
class Trouble:
    """What is wrong, with a shard as a whole where there is no key."""

    shard: str
    key: str
    member: str  # extension
    reason: str  # tar | index | manifest | checksum | missing | decode | caption
    error: str


@dataclass(frozen=True)
class Checked:
    """What became of one shard."""

    samples: int = 0
    bytes: int = 0
    indexed: bool = False  # there was an index to compare it with
    troubles: list[Trouble] = field(default_factory=list)


@dataclass(frozen=True)
class Checks:
    """What is looked at, sent to each process.

    Args:
        require: what every sample must have: `image`, `text`, or an extension.
        decode: read the pixels of every picture.
    """

    require: tuple[str, ...]
    decode: bool
    storage: Storage

    def __call__(self, place: ShardPlace) -> Checked:
        """Raises StorageError where a store or a disk fails."""
        with (
            tempfile.TemporaryDirectory(prefix="synthos-") as folder,
            local_copy(place, self.storage, Path(folder) / "shard.tar") as tar,
        ):
            return _Shard(place, tar, self).check()


class _Shard:
    """The check of one shard."""

    def __init__(self, place: ShardPlace, tar: Path, checks: Checks) -> None:
        self.place, self.tar, self.checks = place, tar, checks
        self.troubles: list[Trouble] = []

    def check(self) -> Checked:
        size = self.tar.stat().st_size
        with self.tar.open("rb") as file:
            try:
                samples = walk(file, self.place.name)
            except ValueError as error:
                self._add("", "", "tar", str(error))
                return Checked(0, size, False, self.troubles)
            index = self._index()
            if index is not None:
                self._compare_samples(index, samples)
            for row, (key, sample) in enumerate(samples.items()):
                self._check_sample(key, sample, index, row, file)
            self._compare_whole(index, ShardLine(self.place.name, size, len(samples), _checksum(file)))
        return Checked(len(samples), size, index is not None, self.troubles)

    def _index(self) -> ShardIndex | None:
        """The shard's index as it is now; None where there is none, or it can't be read."""
        try:
            data = self.checks.storage.read(self.place.index)
        except MissingFile:
            return None
        try:
            return load_index(io.BytesIO(data), masked(self.place.index))
        except ValueError as error:
            self._add("", "", "index", str(error))
            return None

    def _compare_whole(self, index: ShardIndex | None, found: ShardLine) -> None:
        told = {"index": index and index.line(self.place.name), "manifest": self.place.line}
        for reason, line in told.items():
            for what in ("bytes", "samples", "checksum"):
                if line is not None and getattr(line, what) != getattr(found, what):
                    error = f"{what} {getattr(line, what)} in the {reason}, {getattr(found, what)} in the tar"
                    self._add("", "", reason, error)

    def _compare_samples(self, index: ShardIndex, samples: dict[str, Sample]) -> None:
        indexed = [index.key(row) for row in range(len(index))]
        for key in indexed:
            if key not in samples:
                self._add(key, "", "index", "is in the index and not in the tar")
        known = set(indexed)
        for key in samples:
            if key not in known:
                self._add(key, "", "index", "is in the tar and not in the index")

    def _check_sample(
        self, key: str, sample: Sample, index: ShardIndex | None, row: int, file: io.BufferedReader
    ) -> None:
        known = _members_of(index, key, row)
        for extension in known.keys() - sample.keys():
            self._add(key, extension, "missing", "the index has this member, the tar has not")
        for name in self.checks.require:
            if not any(_serves(extension, name) for extension in sample):
                self._add(key, "", "missing", f"has no {name}, it has {', '.join(sample) or 'nothing'}")
        for extension, (offset, size) in sample.items():
            file.seek(offset)
            data = file.read(size)
            expected = known.get(extension)
            if expected is not None and expected.checksum != zlib.crc32(data):
                self._add(key, extension, "checksum", "has changed since it was indexed")
            elif expected is not None and (expected.offset, expected.size) != (offset, size):
                self._add(key, extension, "index", f"lies at byte {offset}, the index says {expected.offset}")
            self._check_content(key, extension, data)

    def _check_content(self, key: str, extension: str, data: bytes) -> None:
        suffix = extension.rsplit(".")[-1]
        if suffix in IMAGE_SUFFIXES and self.checks.decode:
            try:
                check_picture(data)
            except ValueError as error:
                self._add(key, extension, "decode", str(error))
        if suffix == "txt" and "text" in self.checks.require and not _readable(data):
            self._add(key, extension, "caption", "is empty, not UTF-8, or above 1 MB")

    def _add(self, key: str, member: str, reason: str, error: str) -> None:
        self.troubles.append(Trouble(masked(self.place.url), key, member, reason, error))


def check_required(names: list[str]) -> tuple[str, ...]:
    """What --require names; ValueError for what is neither a kind nor an extension."""
    wrong = [name for name in names if not name or name.startswith(".") or "/" in name]
    if wrong:
        raise ValueError(f"--require: {wrong[0]!r} is not allowed; expected image, text, or extensions as in mask.png")
    return tuple(names)


def _serves(extension: str, required: str) -> bool:
    """Whether a member is what --require names."""
    if required == "image":
        return extension.rsplit(".")[-1] in IMAGE_SUFFIXES
    return extension == ("txt" if required == "text" else required.lower())


def _members_of(index: ShardIndex | None, key: str, row: int) -> dict[str, Member]:
    """What the index says of a sample, which is most likely at `row`."""
    if index is None:
        return {}
    if row >= len(index) or index.key(row) != key:
        rows = np.flatnonzero(index.keys == key.encode())
        if not len(rows):
            return {}
        row = int(rows[0])
    members = {extension: index.member(row, column) for column, extension in enumerate(index.extensions)}
    return {extension: member for extension, member in members.items() if member.size >= 0}


def _readable(data: bytes) -> bool:
    try:
        return len(data) <= MAX_TEXT_BYTES and bool(data.decode().strip())
    except UnicodeDecodeError:
        return False


def _checksum(file: io.BufferedReader) -> int:
    """CRC-32 of the whole file."""
    file.seek(0)
    found = 0
    while chunk := file.read(1 << 20):
        found = zlib.crc32(chunk, found)
    return found
