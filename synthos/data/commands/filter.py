"""`synthos data filter`: the samples within limits, as new shards, or the others as a list for data.known_bad."""

import argparse
import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from synthos.data.commands.index import index_first
from synthos.data.commands.reshard import add_shard_size, describe
from synthos.data.commands.screen import counted, new_parser, print_json, print_table, shown, spec_of
from synthos.data.commands.stats import add_extensions, print_distribution
from synthos.data.index import ShardIndex, open_index
from synthos.data.rewrite import Picked, rewrite
from synthos.data.shards import ShardPlace, list_shards
from synthos.data.stats import Facts, Limits, Statistics, facts_of
from synthos.data.store.files import Storage


class Sieve:
    """Tells what passes, and counts it."""

    def __init__(self, args: argparse.Namespace, storage: Storage) -> None:
        self.args, self.storage = args, storage
        self.limits = Limits(args.min_side, args.max_aspect, args.min_caption, args.max_caption)
        self.limits.check()
        self.before, self.after = Statistics(), Statistics()
        self.reasons: Counter[str] = Counter()

    def picked(self, places: Iterable[ShardPlace]) -> Iterator[Picked]:
        for place in places:
            index, faults = self.faults(place)
            yield Picked(place, index, np.flatnonzero(~np.logical_or.reduce([*faults.values()])))

    def lines(self, places: Iterable[ShardPlace], source: str) -> Iterator[str]:
        """What data.known_bad reads, a line for each sample left out."""
        for place in places:
            index, faults = self.faults(place)
            reasons = {row: reason for reason, rows in faults.items() for row in np.flatnonzero(rows).tolist()}
            for row in sorted(reasons):
                known = {"source": source, "shard": place.name, "key": index.key(row), "reason": reasons[row]}
                yield json.dumps(known) + "\n"

    def faults(self, place: ShardPlace) -> tuple[ShardIndex, dict[str, Any]]:
        index = open_index(place, self.storage)
        facts = facts_of(index, self.args.image, self.args.caption)
        faults = self.limits.faults(facts)
        kept = ~np.logical_or.reduce([*faults.values()])
        self.before.count(facts)
        self.after.count(Facts(facts.width[kept], facts.height[kept], facts.chars[kept], facts.content[kept]))
        self.reasons.update({reason: int(rows.sum()) for reason, rows in faults.items() if rows.any()})
        return index, faults

    def as_json(self) -> dict[str, Any]:
        tables = {name: {str(side): count for side, count in found.distribution(self.args.min_side).items()}
                  for name, found in (("before", self.before), ("after", self.after))}  # fmt: skip
        counts = {"samples": self.before.samples, "kept": self.after.samples}
        return {**counts, "left_out": dict(self.reasons.most_common()), "at_least": tables}


def main(argv: list[str]) -> int:
    """Write shards or a list; ValueError for what was asked wrongly, and for damaged shards."""
    args = parser().parse_args(argv)
    _check(args)
    sieve = Sieve(args, Storage())
    places = list_shards(spec_of(args.shards), "SHARDS", sieve.storage)
    index_first(places, sieve.storage, args.json)
    steps = shown(places, "filtering", len(places), args.json)
    if args.list is not None:
        _write_list(args.list, sieve.lines(steps, args.name))
        told: dict[str, Any] = {"list": str(args.list)}
        said = f"{args.list}: {counted(sieve.reasons.total(), 'sample')} to leave out by data.known_bad"
    else:
        written = rewrite(args.out, sieve.picked(steps), args.shard_size, sieve.storage)
        told = {"out": str(args.out), "written": dataclasses.asdict(written)}
        said = describe(args.out, written)
    if args.json:
        print_json({**sieve.as_json(), **told})
        return 0
    print_distribution({"before": sieve.before, "after": sieve.after}, args.min_side)
    if sieve.reasons:
        print_table("Left out", ["reason", "samples"], sieve.reasons.most_common())
    print(said)
    return 0


def parser() -> argparse.ArgumentParser:
    made = new_parser("filter", __doc__)
    made.add_argument("--out", type=Path, help="folder for new shards of what passes; it must not hold anything")
    made.add_argument("--list", type=Path, help="instead: a file for data.known_bad that names what does not pass")
    made.add_argument("--name", help="with --list: data.name of the run, or the source's name in data.mix")
    made.add_argument("--min-side", type=int, default=0, help="pixels of the shorter side")
    made.add_argument("--max-aspect", type=float, default=math.inf, help="longer side / shorter side")
    made.add_argument("--min-caption", type=int, default=0, help="characters; 1 asks for any caption")
    made.add_argument("--max-caption", type=int, help="characters")
    add_shard_size(made)
    add_extensions(made)
    return made


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError where it isn't clear what to write."""
    if (args.out is None) == (args.list is None):
        raise ValueError("--out or --list: one of them says what to write")
    if args.list is not None and not args.name:
        raise ValueError("--name: needed with --list: data.name of the run, or the source's name in data.mix")
    if args.name and args.list is None:
        raise ValueError("--name would be ignored: it is for --list")
    if args.list is not None and args.list.exists():
        raise ValueError(f"--list: {args.list} exists; it is never overwritten: choose another name")


def _write_list(path: Path, lines: Iterable[str]) -> None:
    """The file appears when it is finished."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w") as file:
            file.writelines(lines)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
