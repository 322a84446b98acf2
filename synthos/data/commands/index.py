"""`synthos data index`: where every member of every shard lies, and what the data set consists of."""

import argparse
import os
from pathlib import Path
from typing import Any

from synthos.data.commands.screen import (
    add_workers,
    counted,
    megabytes,
    new_parser,
    print_json,
    print_list,
    shown,
    spec_of,
)
from synthos.data.indexing import Indexed, index_shards, processes_for, settle_manifest, unindexed
from synthos.data.manifest import fingerprint, read_manifest
from synthos.data.shards import ShardPlace, list_shards
from synthos.data.store.files import Storage
from synthos.data.store.location import is_remote, masked


def main(argv: list[str]) -> int:
    """Index the shards; 1 where some are damaged or are not what a manifest says; ValueError for what is no shard."""
    args = parser().parse_args(argv)
    storage = Storage()
    places = list_shards(spec_of(args.shards), "SHARDS", storage)
    _check(args, places)
    outcomes: list[Indexed | None] = [None] * len(places)
    for number, one in shown(index_shards(places, args.out, args.workers, storage), "indexing", len(places), args.json):
        outcomes[number] = one
    done = [one for one in outcomes if one is not None]
    damaged = [one for one in done if one.line is None]
    summary, faulty = _settle(args, done, damaged)
    if args.json:
        print_json(summary)
        return int(faulty)
    held = f"{counted(summary['samples'], 'sample')} in {counted(summary['shards'], 'shard')}"
    print(f"{held}, {megabytes(summary['bytes'])}; indexes: {summary['built']:,} built, {summary['kept']:,} were there")
    if damaged:
        print_list("Damaged shards", ["shard", "what"], [(d["shard"], d["error"]) for d in summary["damaged"]])
    if summary["note"]:
        print(summary["note"])
    if summary["fingerprint"]:
        print(f"{summary['manifest'] or 'no manifest'}, fingerprint {summary['fingerprint']}")
    return int(faulty)


def index_first(places: list[ShardPlace], storage: Storage, quiet: bool) -> None:
    """Build the indexes that shards lack, several at a time; a damaged shard is named when it is opened."""
    if absent := unindexed(places):
        for _ in shown(index_shards(absent, None, processes_for(absent), storage), "indexing", len(absent), quiet):
            pass


def parser() -> argparse.ArgumentParser:
    made = new_parser("index", __doc__)
    made.add_argument("--out", type=Path, help="folder for indexes and manifest.json; data.shards=FOLDER then reads "
                      "the shards from where they lie. Needed for shards elsewhere")  # fmt: skip
    add_workers(made)
    return made


def _check(args: argparse.Namespace, places: list[ShardPlace]) -> None:
    """Raise ValueError for shards elsewhere without --out, and for a folder that indexes other shards."""
    remote = [place.url for place in places if is_remote(place.url)]
    if args.out is None:
        if remote:
            raise ValueError(f"--out: needed, for {masked(remote[0])} lies elsewhere: a folder for its index")
        closed = [place.url for place in places if not os.access(Path(place.url).parent, os.W_OK)]
        if closed:
            raise ValueError(f"--out: needed, for nothing can be written beside {closed[0]}: a folder for its index")
        return
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out: {args.out} is no folder")
    if any(args.out.glob("*.tar")):
        raise ValueError(f"--out: {args.out} holds shards, which are indexed without --out; expected another folder")
    present = read_manifest(args.out)
    if present is not None and [*present] != [place.name for place in places]:
        raise ValueError(f"--out: {args.out} indexes other shards; expected another folder, or the same shards")


def _settle(args: argparse.Namespace, done: list[Indexed], damaged: list[Indexed]) -> tuple[dict[str, Any], bool]:
    """The summary, and whether something is wrong; the manifest is written if every shard is whole."""
    lines = [one.line for one in done if one.line is not None]
    folders = {args.out} if args.out else {Path(one.place.url).parent for one in done}
    folder = folders.pop() if len(folders) == 1 else None
    note, faulty = None, bool(damaged)
    if damaged:
        note = "no manifest.json is written while shards are damaged"
    elif folder is None:
        note = "the shards lie in several folders: no manifest.json is written"
    else:
        note = settle_manifest(folder, lines, own=args.out is not None)
        faulty = note is not None and read_manifest(folder) is not None
    built = sum(one.built for one in done if one.line is not None)
    return {
        "shards": len(done),
        "samples": sum(line.samples for line in lines),
        "bytes": sum(line.bytes for line in lines),
        "built": built,
        "kept": len(lines) - built,
        "damaged": [{"shard": masked(one.place.url), "error": one.error} for one in damaged],
        "manifest": str(folder / "manifest.json") if folder is not None and note is None else None,
        "fingerprint": None if damaged else fingerprint(lines),
        "note": note,
    }, faulty
