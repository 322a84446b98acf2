"""`synthos diff`: how two runs differ, in config, code, packages and data."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch.attempts import newest_record
from launch.rundir import read_state
from launch.runs import find_one
from launch.tell import RUN, console, new_parser, print_json, table
from synthos.files import parse_object
from synthos.schema import read_job
from synthos.strict import dump

ABSENT = "-"
CODE = ("commit", "changed", "tree")  # of an attempt's record


def main(arguments: list[str]) -> int:
    """Compare two runs; returns 1 where they differ, as diff does."""
    parser = new_parser("diff", __doc__)
    parser.add_argument("a", metavar="A", help=RUN)
    parser.add_argument("b", metavar="B", help="another one")
    args = parser.parse_args(arguments)
    folders = find_one(args.a), find_one(args.b)
    parts = {
        part: differences(*(read(folder) for folder in folders))
        for part, read in (("config", config), ("code", code), ("packages", packages), ("data", data))
    }
    names = [folder.name for folder in folders]
    if args.json:
        print_json({"runs": names, **{part: _as_json(found) for part, found in parts.items()}})
    else:
        _print(names, parts)
    return int(any(parts.values()))


def config(folder: Path) -> dict[str, Any]:
    """Every key of the frozen config by its dotted path."""
    return dict(flat(dump(read_job(folder / "config.yaml"))))


def code(folder: Path) -> dict[str, Any]:
    """What git and the ledger say of the code that the newest attempt ran."""
    record, patch = newest_record(folder), folder / "provenance" / "changes.patch"
    said = record if "tree" in record else parse_object(folder / "provenance" / "git.json")  # of one that has not begun
    facts = {key: said[key] for key in CODE if key in said}
    changes = patch.read_bytes() if patch.is_file() else b""
    return {**facts, "changes": hashlib.sha256(changes).hexdigest()[:12] if changes else ""}


def packages(folder: Path) -> dict[str, Any]:
    """Versions of the installed packages by their names."""
    file = folder / "provenance" / "packages.txt"
    lines = file.read_text().splitlines() if file.is_file() else []
    return dict(line.split("==", 1) for line in lines if "==" in line)


def data(folder: Path) -> dict[str, Any]:
    """What provenance/ says of the inputs, and the fingerprints of the sources that the newest checkpoint has read."""
    said = dict(flat(parse_object(folder / "provenance" / "inputs.json")))
    step = read_state(folder).step
    if step is None:
        return said
    stream = parse_object(folder / "checkpoints" / f"step_{step:08d}" / "state.json").get("stream", {})
    sources = {s["name"]: s["fingerprint"] for s in stream.get("sources", []) if isinstance(s, Mapping)}
    return said | {f"sources.{name}.fingerprint": value for name, value in sources.items()}


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Key, value in `a`, value in `b` where they are not equal."""
    keys = dict.fromkeys([*a, *b])
    return [(k, a.get(k, ABSENT), b.get(k, ABSENT)) for k in keys if a.get(k, ABSENT) != b.get(k, ABSENT)]


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by their dotted paths."""
    if not isinstance(value, Mapping) or (not value and path):
        yield path, value
        return
    for key, inner in value.items():
        yield from flat(inner, f"{path}.{key}" if path else str(key))


def _as_json(found: list[tuple[str, Any, Any]]) -> dict[str, list[Any]]:
    return {key: [a, b] for key, a, b in found}


def _print(names: list[str], parts: Mapping[str, list[tuple[str, Any, Any]]]) -> None:
    for part, found in parts.items():
        if found:
            console().print(table([part, *names], found))
        else:
            print(f"{part}: equal")
