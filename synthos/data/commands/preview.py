"""`synthos data preview`: a contact sheet of a data set as one PNG."""

import argparse
from functools import lru_cache
from pathlib import Path

from synthos.data.commands.index import index_first
from synthos.data.commands.screen import counted, new_parser, positive, print_json, shown, spec_of
from synthos.data.commands.stats import add_extensions
from synthos.data.index import ShardIndex, open_index
from synthos.data.preview import draw_rows, draw_sheet, read_shown
from synthos.data.shards import list_shards
from synthos.data.store.files import Storage


def main(argv: list[str]) -> int:
    """Write the sheet; ValueError for what was asked wrongly, and for damaged shards."""
    args = parser().parse_args(argv)
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out: {args.out} is no picture file; expected a name that ends in .png")
    storage = Storage()
    places = list_shards(spec_of(args.shards), "SHARDS", storage)
    index_first([place for place in places if place.line is None], storage, args.json)

    @lru_cache(maxsize=2)  # samples are drawn shard after shard
    def index(shard: int) -> ShardIndex:
        return open_index(places[shard], storage)

    counting = shown(places, "reading indexes", len(places), args.json)
    sizes = [place.line.samples if place.line else len(index(n)) for n, place in enumerate(counting)]
    drawn = draw_rows(sizes, args.count, args.seed)
    if not drawn:
        raise ValueError(f"SHARDS: {', '.join(args.shards)} hold no sample")
    reading = shown(drawn, "reading samples", len(drawn), args.json)
    cells = [*read_shown(places, index, reading, args.image, args.caption, storage)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(cells, args.columns).save(args.out)
    unreadable = sum(cell.picture is None for cell in cells)
    if args.json:
        samples = [{"shard": c.shard, "key": c.key, "caption": c.caption, "error": c.error or None} for c in cells]
        print_json({"out": str(args.out), "of": sum(sizes), "unreadable": unreadable, "samples": samples})
    else:
        unread = f", {unreadable} unreadable" if unreadable else ""
        print(f"{args.out}: {len(cells)} of {counted(sum(sizes), 'sample')}{unread}")
    return 0


def parser() -> argparse.ArgumentParser:
    made = new_parser("preview", __doc__)
    made.add_argument("--out", type=Path, required=True, help="the picture to write, .png")
    made.add_argument("--count", type=positive, default=48, help="samples, drawn evenly from all shards")
    made.add_argument("--columns", type=positive, default=8, help="pictures in a row")
    made.add_argument("--seed", type=int, default=0, help="another number draws other samples")
    add_extensions(made)
    return made
