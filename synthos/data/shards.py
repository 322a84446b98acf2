"""From what a config says about shards to an ordered list of tars, on this machine or elsewhere.

This is the only module that knows how shards are named.
"""

import glob
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from synthos.data import manifest
from synthos.data.manifest import ShardLine
from synthos.data.store.files import Storage
from synthos.data.store.location import check_location, file_name, is_remote, join, masked, parent, split_query
from synthos.data.store.retry import MissingFile

Spec = str | list[str] | None
FORMS = "a brace pattern, a glob, a folder, a .txt or .json list of tars, or a list of these"


@dataclass(frozen=True)
class ShardPlace:
    """Where a shard lies, and its index."""

    url: str  # path or address of the tar
    index: str  # path or address of its index
    line: ShardLine | None = None  # as a manifest has it

    @classmethod
    def beside(cls, url: str) -> "ShardPlace":
        """A shard whose index lies beside it: NNNNN.tar and NNNNN.idx.npz."""
        return cls(url, index_path(url))

    @property
    def name(self) -> str:
        """The file's name, part of every sample's id."""
        return file_name(self.url)


class MissingShards(ValueError):
    """Shards that a config names and that do not exist; `lines` says which, one line for each."""

    def __init__(self, lines: list[str]) -> None:
        shown = lines[:3] + ([f"and {len(lines) - 3} more missing shards"] if len(lines) > 3 else [])
        super().__init__("\n".join(shown))
        self.lines = lines


def index_path(shard: str) -> str:
    """NNNNN.tar -> NNNNN.idx.npz, beside it."""
    path, query = split_query(shard)
    return f"{path.removesuffix('.tar')}.idx.npz{query}"


def identity_by_place(places: Iterable[ShardPlace]) -> str:
    """What tells shards that nobody has indexed from others: where they lie, and here their sizes; 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for place in places:
        size = 0 if is_remote(place.url) else Path(place.url).stat().st_size
        digest.update(f"{place.url.partition('?')[0]} {size}\n".encode())
    return digest.hexdigest()


def list_shards(spec: Spec, key: str = "data.shards", storage: Storage | None = None) -> list[ShardPlace]:
    """The tars that `spec` names, in its own order; folders and globs in the order of their names.

    Entries of a list file are relative to the file's folder. A folder may hold a manifest and indexes alone, of tars
    that lie elsewhere. Raises MissingShards for what does not exist, and ValueError, naming the config key, for what
    can never be a shard.
    """
    if spec is None or spec == []:
        raise MissingShards([f"{key}: not set; expected {FORMS}"])
    storage = storage or Storage()
    places = [place for entry in ([spec] if isinstance(spec, str) else spec) for place in _expand(entry, key, storage)]
    missing = [p.url for p in places if not is_remote(p.url) and not Path(p.url).is_file()]
    if missing:
        raise MissingShards([f"{key}: no such shard: {path}" for path in missing])
    _refuse_equal_names(places, key)
    return places


def _expand(entry: str, key: str, storage: Storage, listed: bool = False) -> list[ShardPlace]:
    """The shards of an entry of the config, or of a list (`listed`), which may be signed."""
    check_location(entry, key, listed)
    remote = is_remote(entry)
    path = entry if remote else str(Path(entry.removeprefix("file://")).expanduser())
    if Path(path).is_dir() or split_query(entry)[0].endswith("/"):
        return _list_folder(path, key, storage)
    if _is_list(path):
        return [place for each in _read_list(path, key, storage) for place in _expand(each, key, storage, True)]
    found = [shard for pattern in _expand_braces(path) for shard in _expand_glob(pattern, key, storage)]
    for shard in found:
        name = file_name(shard)
        if not name.endswith(".tar"):
            if not Path(name).suffix:
                raise MissingShards([f"{key}: no such folder: {masked(shard)}{' (end it by /)' if remote else ''}"])
            raise ValueError(f"{key}: {masked(shard)!r} is no .tar; expected {FORMS} (compressed tars are not read)")
    return [ShardPlace.beside(shard) for shard in found]


def _is_list(path: str) -> bool:
    return file_name(path).endswith((".txt", ".json"))


def _list_folder(folder: str, key: str, storage: Storage) -> list[ShardPlace]:
    """The manifest's shards where there is one, so that a lost shard is noticed; else every tar."""
    lines = _manifest(folder, storage)
    tars = storage.list(folder) if is_remote(folder) else sorted(str(tar) for tar in Path(folder).glob("*.tar"))
    if lines is None:
        if not tars:
            raise MissingShards([f"{key}: no .tar in the folder {masked(folder)}"])
        return [ShardPlace.beside(tar) for tar in tars]
    stray = [tar for tar in tars if file_name(tar) not in lines]
    if stray:
        raise ValueError(f"{key}: {masked(stray[0])} is not in manifest.json; move it away or delete manifest.json")
    for line in lines.values():
        if line.url is not None:
            check_location(line.url, key, listed=True)
            if is_remote(folder) and not is_remote(line.url):
                raise ValueError(
                    f"{key}: {masked(join(folder, manifest.FILE))} names {line.url!r}, which is no address; "
                    "a manifest that lies elsewhere names no file of this machine"
                )
    return [
        ShardPlace(line.url or join(folder, name), index_path(join(folder, name)), line) for name, line in lines.items()
    ]


def _manifest(folder: str, storage: Storage) -> dict[str, ShardLine] | None:
    if not is_remote(folder):
        return manifest.read_manifest(Path(folder))
    path = join(folder, manifest.FILE)
    try:
        return manifest.parse_manifest(storage.read(path), masked(path))
    except MissingFile:
        return None


def _read_list(path: str, key: str, storage: Storage) -> list[str]:
    """The entries of a list file; relative ones are relative to its folder."""
    try:
        text = storage.read(path).decode()
    except (MissingFile, FileNotFoundError):
        raise MissingShards([f"{key}: no such list of shards: {masked(path)}"]) from None
    except UnicodeDecodeError:
        raise ValueError(f"{key}: the list {masked(path)} is not UTF-8") from None
    if file_name(path).endswith(".txt"):
        entries = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        entries = _parse_json_list(text, path, key)
    if not entries:
        raise ValueError(f"{key}: the list {masked(path)} is empty")
    for entry in entries:
        check_location(entry, key, listed=True)
        if _is_list(entry):
            raise ValueError(f"{key}: {masked(path)} names another list, {masked(entry)!r}; expected tars or folders")
    return [entry if is_remote(entry) else _relative(entry, path, key) for entry in entries]


def _relative(entry: str, path: str, key: str) -> str:
    """An entry that is a path; a list that came from elsewhere names no file of this machine."""
    if not is_remote(path):
        return str(Path(path).parent / Path(entry).expanduser())
    if entry.startswith(("/", "~")) or ".." in entry.split("/"):
        raise ValueError(f"{key}: {entry!r} in {masked(path)} is no path below its folder, as a remote list needs")
    return join(parent(path), entry)


def _parse_json_list(text: str, path: str, key: str) -> list[str]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{key}: {masked(path)} is no JSON: {error}") from None
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"{key}: {masked(path)} must hold a JSON list of tar paths")
    return entries


def _expand_braces(pattern: str) -> list[str]:
    from webdataset.shardlists import expand_urls

    return [str(path) for path in expand_urls(pattern)] if "{" in pattern else [pattern]


def _expand_glob(pattern: str, key: str, storage: Storage) -> list[str]:
    remote = is_remote(pattern)
    if not glob.has_magic(pattern.partition("?")[0] if remote else pattern):  # behind ? an address has its query
        return [pattern]
    found = storage.list(pattern) if remote else sorted(glob.glob(pattern))
    if not found:
        raise MissingShards([f"{key}: nothing matches {masked(pattern)}"])
    return found


def _refuse_equal_names(places: Iterable[ShardPlace], key: str) -> None:
    """A sample's id is made of its shard's file name, so two shards of one data set must not share one."""
    seen: dict[str, str] = {}
    for place in places:
        first = seen.setdefault(place.name, place.url)
        if first is not place.url:
            raise ValueError(
                f"{key}: {masked(first)} and {masked(place.url)} share a file name, of which sample ids are made; "
                "name them as sources of their own (data.mix), or write them anew in one (`synthos data reshard`)"
            )
