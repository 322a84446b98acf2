"""`synthos data write`: pictures in a folder or a table, with captions or without, become a data set."""

import argparse
import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from synthos.data.commands.screen import counted
from synthos.data.rows import (
    CAPTIONS,
    IMAGES,
    MASKS,
    OBJECTS,
    TARGETS,
    Reader,
    choose_columns,
    folder_pictures,
    folder_row,
    keep_sources,
    named_column,
    parse_sources,
)
from synthos.data.table import Table, open_table
from synthos.data.triplet import ROUNDED
from synthos.data.write import MAX_SHARD_SIZE, SKIPPED, Item, Written, write_shards

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Notes:
    """What was done to a table's rows on the way, and how often."""

    sources: Counter[str] = field(default_factory=Counter)  # of rows that --source leaves out
    masks: Counter[str] = field(default_factory=Counter)


def main(argv: list[str]) -> int:
    """Write the data set that `argv` asks for and return the exit code; ValueError for what was asked wrongly."""
    args = _parser().parse_args(argv)
    _check(args)
    notes = Notes()
    items = _folder_items(args) if args.table is None else _table_items(args, open_table(args.table), notes)
    written = write_shards(args.out, items, args.shard_size)
    print(_summary(args, written, notes))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="synthos data write", description=__doc__)
    parser.add_argument("--images", type=Path, help="folder of the pictures (JPEG, PNG, WebP, AVIF), the only one read")
    parser.add_argument("--table", help="pictures and captions: .csv, .jsonl, .parquet, a folder of .parquet, or "
                        "hf://datasets/OWNER/NAME; without it, a .txt beside each picture")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not hold anything")
    parser.add_argument("--image-column", help=f"column of pictures or paths; known are {', '.join(IMAGES)}")
    parser.add_argument("--caption-column", help=f"column of captions; known are {', '.join(CAPTIONS)}")
    parser.add_argument("--no-captions", action="store_true", help="write pictures only")
    parser.add_argument("--source", help="rows to take, by the column `source`: a list as in coco,laion; * takes all")
    parser.add_argument("--triplets", action="store_true", help=f"pictures for object insertion: columns {TARGETS[0]} "
                        f"(or {TARGETS[1]}), {OBJECTS[0]} (or {OBJECTS[1]}) and {MASKS[0]}")  # fmt: skip
    parser.add_argument("--seed", type=int, help="of the choice where a row has a list of captions; 0 if not given")
    parser.add_argument("--shard-size", type=int, default=1000, help=f"samples in a tar, at most {MAX_SHARD_SIZE}")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON and no progress")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that miss what they need or would be ignored."""
    if args.images is None and args.table is None:
        raise ValueError("--images or --table: one of them says what to write")
    if args.images is not None and not args.images.is_dir():
        raise ValueError(f"--images: no such folder: {args.images}")
    columns = ("image_column", "caption_column", "source", "triplets", "seed")
    for applies, options, reason in (
        (args.table is None, columns, "tells of the columns of a --table, and none is given"),
        (args.no_captions, ("caption_column", "seed"), "tells of captions, and --no-captions leaves them out"),
        (args.triplets, ("image_column",), "tells of a picture's column, and --triplets has names for its three"),
    ):
        given = [name for name in options if getattr(args, name) is not None and getattr(args, name) is not False]
        if applies and given:
            raise ValueError(f"--{given[0].replace('_', '-')} would be ignored: it {reason}")


def _folder_items(args: argparse.Namespace) -> Iterator[Item]:
    paths = folder_pictures(args.images)
    captions = not args.no_captions
    if captions and not any(path.with_suffix(".txt").is_file() for path in paths):
        raise ValueError(f"--images: no picture below {args.images} has a .txt beside it; give a --table of captions, "
                         "or leave them out by --no-captions")  # fmt: skip
    return (folder_row(path, args.images, captions) for path in _shown(args, paths, len(paths)))


def _table_items(args: argparse.Namespace, table: Table, notes: Notes) -> Iterator[Item]:
    """The table's rows; its columns are found, and options checked by them, before the first is read."""
    reader = Reader(
        args.images, _image_columns(args, table), _caption_columns(args, table), args.seed or 0, notes.masks
    )
    sources = parse_sources(table, args.source)
    records = enumerate(_shown(args, table.records(), table.size), 1)
    chosen = keep_sources(records, sources, notes.sources) if sources else records
    return itertools.starmap(reader.triplet if args.triplets else reader.row, chosen)


def _image_columns(args: argparse.Namespace, table: Table) -> list[tuple[str, ...]]:
    """The columns in which each picture of a row may be."""
    if args.triplets:
        return [choose_columns(table, known, "triplets", "") for known in (TARGETS, OBJECTS, MASKS)]
    named = named_column(table, "--image-column", args.image_column)
    return [named or choose_columns(table, IMAGES, "pictures", "; or --image-column")]


def _caption_columns(args: argparse.Namespace, table: Table) -> tuple[str, ...] | None:
    if args.no_captions:
        return None
    named = named_column(table, "--caption-column", args.caption_column)
    known = tuple(column for column in CAPTIONS if column in table.columns and column not in named)
    if named or known or args.triplets:
        return (*named, *known)
    return choose_columns(table, CAPTIONS, "captions", "; or --caption-column, or --no-captions")


def _shown(args: argparse.Namespace, things: Iterable[Thing], size: int) -> Iterable[Thing]:
    """The same things, with an estimate of the time left on stderr."""
    return track(things, "writing", size, console=Console(stderr=True), disable=args.json)


def _summary(args: argparse.Namespace, written: Written, notes: Notes) -> str:
    if args.json:
        told = {"sources_left_out": dict(notes.sources.most_common()), "masks_rounded": notes.masks[ROUNDED]}
        return json.dumps({"out": str(args.out), **dataclasses.asdict(written), **told})
    lines = [f"{args.out}: {counted(written.samples, 'sample')} in {counted(written.shards, 'shard')}"]
    if written.skipped:
        lines[0] += f"; {counted(written.skipped, 'row')} left out, see {args.out / SKIPPED}"
        lines += [f"  {count:,}: {reason}" for reason, count in written.reasons.items()]
    if notes.sources:
        lines.append(f"{counted(notes.sources.total(), 'row')} of other sources: {_counts(notes.sources)}")
    if notes.masks[ROUNDED]:
        lines.append(f"{counted(notes.masks[ROUNDED], 'mask')} held greys, which became black or white at half")
    return "\n".join([*lines, f"fingerprint {written.fingerprint}"])


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name or 'none named'} {count:,}" for name, count in counter.most_common(10))
