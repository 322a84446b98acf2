"""`synthos data validate`: read every byte of every shard again, and list what is wrong."""

import argparse
import dataclasses
from collections import Counter

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
from synthos.data.indexing import over_shards
from synthos.data.shards import list_shards
from synthos.data.store.files import Storage
from synthos.data.validating import Checked, Checks, check_required


def main(argv: list[str]) -> int:
    """Check the shards; 1 where anything is wrong with them; ValueError for what is no shard."""
    args = parser().parse_args(argv)
    storage = Storage()
    places = list_shards(spec_of(args.shards), "SHARDS", storage)
    checks = Checks(check_required(args.require.split(",") if args.require else []), args.decode, storage)
    found = [Checked()] * len(places)
    for number, one in shown(over_shards(checks, places, args.workers), "validating", len(places), args.json):
        found[number] = one
    troubles = [trouble for one in found for trouble in one.troubles]
    unindexed = sum(not one.indexed for one in found)
    totals = {"shards": len(places), "unindexed": unindexed, "samples": sum(one.samples for one in found),
              "bytes": sum(one.bytes for one in found), "faults": len(troubles)}  # fmt: skip
    if args.json:
        reasons = Counter(trouble.reason for trouble in troubles)
        print_json({**totals, "reasons": reasons, "troubles": [dataclasses.asdict(trouble) for trouble in troubles]})
        return int(bool(troubles))
    print(
        f"{counted(totals['samples'], 'sample')} in {counted(len(places), 'shard')}, "
        f"{megabytes(totals['bytes'])} read: {counted(len(troubles), 'fault') if troubles else 'no faults'}"
    )
    if unindexed:
        print(f"without an index to be compared with: {counted(unindexed, 'shard')}")
    if troubles:
        columns = ["shard", "key", "member", "reason", "what"]
        print_list("Faults", columns, [dataclasses.astuple(trouble) for trouble in troubles])
    return int(bool(troubles))


def parser() -> argparse.ArgumentParser:
    made = new_parser("validate", __doc__)
    made.add_argument("--require", default="image", help="what every sample must have, by commas: image, text, or "
                      "extensions as in target.jpg,mask.png; image if not given, '' for nothing")  # fmt: skip
    made.add_argument("--decode", action="store_true", help="decode every picture; else only its header was read, "
                      "when it was indexed")  # fmt: skip
    add_workers(made)
    return made
