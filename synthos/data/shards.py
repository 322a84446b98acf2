"""From what a config says about shards to an ordered list of local tar files.

This is the only module that knows how shards are named; object stores will enter here and in `reader.read_span`.
"""

import glob
import json
from collections.abc import Iterable
from pathlib import Path

from synthos.data.manifest import read_manifest

Spec = str | list[str] | None
FORMS = "a brace pattern, a glob, a folder, a .txt or .json list of tars, or a list of these"


class MissingShards(ValueError):
    """Shards that a config names and that do not exist; `lines` says which, one line for each."""

    def __init__(self, lines: list[str]) -> None:
        shown = lines[:3] + ([f"and {len(lines) - 3} more missing shards"] if len(lines) > 3 else [])
        super().__init__("\n".join(shown))
        self.lines = lines


def list_shards(spec: Spec, key: str = "data.shards") -> list[str]:
    """Paths of the tars that `spec` names, in its own order; folders and globs in the order of their names.

    Entries of a list file are relative to the file's folder. Raises MissingShards for what does not exist, and
    ValueError, naming the config key, for what can never be a shard.
    """
    if spec is None or spec == []:
        raise MissingShards([f"{key}: not set; expected {FORMS}"])
    paths = [path for entry in ([spec] if isinstance(spec, str) else spec) for path in _expand(entry, key)]
    missing = [f"{key}: no such shard: {path}" for path in paths if not path.is_file()]
    if missing:
        raise MissingShards(missing)
    _refuse_equal_names(paths, key)
    return [str(path) for path in paths]


def _expand(entry: str, key: str) -> list[Path]:
    _refuse_remote(entry, key)
    path = Path(entry).expanduser()
    if path.is_dir():
        return _list_folder(path, key)
    if path.suffix in (".txt", ".json"):
        return _read_list(path, key)
    found = [Path(p) for pattern in _expand_braces(str(path)) for p in _expand_glob(pattern, key)]
    for shard in found:
        if not shard.suffix and not shard.exists():
            raise MissingShards([f"{key}: no such folder: {shard}"])
        if shard.suffix != ".tar":
            raise ValueError(f"{key}: {str(shard)!r} is no .tar; expected {FORMS} (compressed tars are not read)")
    return found


def _refuse_remote(entry: str, key: str) -> None:
    """Shell commands and chained addresses never run from a config or a downloaded list."""
    for token in ("pipe:", "::", "://"):
        if token in entry:
            raise ValueError(f"{key}: {entry!r} contains {token!r}; only local paths are read: {FORMS}")


def _list_folder(folder: Path, key: str) -> list[Path]:
    """The manifest's shards where there is one, so that a lost shard is noticed; else every tar."""
    tars = sorted(folder.glob("*.tar"))
    manifest = read_manifest(folder)
    if manifest is None:
        if not tars:
            raise MissingShards([f"{key}: no .tar in the folder {folder}"])
        return tars
    stray = [tar.name for tar in tars if tar.name not in manifest]
    if stray:
        raise ValueError(f"{key}: {folder / stray[0]} is not in manifest.json; move it away or delete manifest.json")
    return [folder / name for name in manifest]


def _read_list(path: Path, key: str) -> list[Path]:
    if not path.is_file():
        raise MissingShards([f"{key}: no such list of shards: {path}"])
    text = path.read_text()
    if path.suffix == ".txt":
        entries = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        entries = _parse_json_list(text, path, key)
    if not entries:
        raise ValueError(f"{key}: the list {path} is empty")
    for entry in entries:
        _refuse_remote(entry, key)
    return [path.parent / Path(entry).expanduser() for entry in entries]


def _parse_json_list(text: str, path: Path, key: str) -> list[str]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{key}: {path} is no JSON: {error}") from None
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"{key}: {path} must hold a JSON list of tar paths")
    return entries


def _expand_braces(pattern: str) -> list[str]:
    from webdataset.shardlists import expand_urls

    return [str(path) for path in expand_urls(pattern)] if "{" in pattern else [pattern]


def _expand_glob(pattern: str, key: str) -> list[str]:
    if not glob.has_magic(pattern):
        return [pattern]
    found = sorted(glob.glob(pattern))
    if not found:
        raise MissingShards([f"{key}: nothing matches {pattern}"])
    return found


def _refuse_equal_names(paths: Iterable[Path], key: str) -> None:
    """A sample's id is made of its shard's file name, so two shards of one data set must not share one."""
    seen: dict[str, Path] = {}
    for path in paths:
        first = seen.setdefault(path.name, path)
        if first is not path:
            raise ValueError(f"{key}: {first} and {path} share a file name, of which sample ids are made; rename one")
