"""`synthos data stats`: what a data set is made of, from its indexes alone."""

import argparse
from typing import Any

from synthos.data.commands.index import index_first
from synthos.data.commands.screen import counted, megabytes, new_parser, print_json, print_table, shown, spec_of
from synthos.data.index import open_index
from synthos.data.shards import list_shards
from synthos.data.stats import CAPTIONS, PICTURES, Statistics, facts_of
from synthos.data.store.files import Storage

Cells = list[tuple[Any, ...]]


def main(argv: list[str]) -> int:
    """Tell of the shards; ValueError for what is no shard, and for damaged ones."""
    args = parser().parse_args(argv)
    storage, found = Storage(), Statistics()
    places = list_shards(spec_of(args.shards), "SHARDS", storage)
    index_first(places, storage, args.json)
    for place in shown(places, "reading indexes", len(places), args.json):
        index = open_index(place, storage)
        found.add(index, facts_of(index, args.image, args.caption))
    told = found.as_json()
    if args.json:
        print_json(told)
        return 0
    print(f"{counted(found.samples, 'sample')} in {counted(found.shards, 'shard')}, {megabytes(found.bytes)}; "
          f"pictures that are doubles of earlier ones: {told['doubles']:,}")  # fmt: skip
    print(f"without a readable picture {told['without_picture']:,}, without a caption {told['without_caption']:,}")
    print_table("Members", ["extension", "samples"], [*told["extensions"].items()])
    spreads = {name: told[name] for name in ("shorter_side", "width", "height", "caption") if told[name]}
    print_table("Pixels, and characters", ["", "min", "median", "max"],
                [(name.replace("_", " "), *spread.values()) for name, spread in spreads.items()])  # fmt: skip
    print_distribution({"samples": found})
    print_table("Width / height", ["", "samples"], [*told["aspects"].items()])
    return 0


def print_distribution(columns: dict[str, Statistics], also: int = 0) -> None:
    """Samples by the least length of their shorter side, of several sets side by side; `also`: of this length too."""
    rows: Cells = [("all", *(cell for found in columns.values() for cell in _cells(found.samples, found.samples)))]
    for side in next(iter(columns.values())).distribution(also):
        cells = [cell for found in columns.values() for cell in _cells(found.sides.at_least(side), found.samples)]
        rows.append((f">= {side}", *cells))
    print_table("Shorter side", ["pixels", *(head for name in columns for head in (name, "share"))], rows)


def parser() -> argparse.ArgumentParser:
    made = new_parser("stats", __doc__)
    add_extensions(made)
    return made


def add_extensions(made: argparse.ArgumentParser) -> None:
    """Which members are looked at."""
    made.add_argument("--image", type=_words, default=PICTURES, help="extensions of the picture that is measured, the "
                      "first that a sample has; default: jpg,jpeg,png,webp, then target.jpg and so on")  # fmt: skip
    made.add_argument("--caption", type=_words, default=CAPTIONS, help="extensions of the caption; default: txt")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip().removeprefix(".").lower() for word in text.split(",") if word.strip())


def _cells(count: int, total: int) -> tuple[int, str]:
    return count, f"{count / total:.1%}" if total else ""
