"""`synthos data reshard`: the same samples in shards of another size."""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from synthos.data.commands.index import index_first
from synthos.data.commands.screen import counted, megabytes, new_parser, positive, print_json, shown, spec_of
from synthos.data.index import open_index
from synthos.data.rewrite import Picked, Rewritten, rewrite
from synthos.data.shards import ShardPlace, list_shards
from synthos.data.store.files import Storage
from synthos.data.write import MAX_SHARD_SIZE

NEW_IDS = "Sample ids are made of shard names, so this is another data set: runs start anew on it."


def main(argv: list[str]) -> int:
    """Write the new shards; ValueError for what was asked wrongly, and for damaged shards."""
    args = parser().parse_args(argv)
    storage = Storage()
    places = list_shards(spec_of(args.shards), "SHARDS", storage)
    index_first(places, storage, args.json)
    picked = _all(shown(places, "resharding", len(places), args.json), storage)
    written = rewrite(args.out, picked, args.shard_size, storage)
    if args.json:
        print_json({"out": str(args.out), **dataclasses.asdict(written), "shards_before": len(places)})
        return 0
    print(f"{counted(len(places), 'shard')} became {describe(args.out, written)}")
    return 0


def parser() -> argparse.ArgumentParser:
    made = new_parser("reshard", __doc__)
    made.add_argument("--out", type=Path, required=True, help="folder to write; it must not hold anything")
    add_shard_size(made)
    return made


def add_shard_size(made: argparse.ArgumentParser) -> None:
    made.add_argument("--shard-size", type=positive, default=1000, help=f"samples in a tar, at most {MAX_SHARD_SIZE}")


def describe(out: Path, written: Rewritten) -> str:
    """What was written where, in words."""
    held = f"{counted(written.samples, 'sample')} in {counted(written.shards, 'shard')}"
    lines = [f"{out}: {held}, {megabytes(written.bytes)}"]
    if written.renamed:
        lines.append(
            f"keys that met an equal one in their new shard, and begin with their old shard's name: {written.renamed:,}"
        )
    return "\n".join([*lines, f"fingerprint {written.fingerprint}", NEW_IDS])


def _all(places: Iterator[ShardPlace], storage: Storage) -> Iterator[Picked]:
    for place in places:
        index = open_index(place, storage)
        yield Picked(place, index, np.arange(len(index)))
