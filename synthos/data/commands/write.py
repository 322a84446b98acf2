"""`synthos data write`: a folder of pictures with captions becomes a data set."""

import argparse
import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.progress import track

from synthos.data.table import read_folder, read_table
from synthos.data.write import MAX_SHARD_SIZE, SKIPPED, Row, Written, write_shards


def main(argv: list[str]) -> int:
    """Write the data set that `argv` asks for and return the exit code; ValueError for what was asked wrongly."""
    args = _parser().parse_args(argv)
    rows = _read_rows(args)
    shown = track(rows, "writing", console=Console(stderr=True), disable=args.json)  # with an estimate of the time left
    written = write_shards(args.out, shown, args.shard_size)
    print(_summary(args.out, written, args.json))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="synthos data write", description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of the pictures (JPEG, PNG, WebP, AVIF)")
    parser.add_argument("--table", type=Path, help="captions as .csv or .jsonl; without it, a .txt beside each picture")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not hold anything")
    parser.add_argument("--image-column", help="column of picture paths below --images (image or video are known)")
    parser.add_argument("--caption-column", help="column of captions (caption or prompt are known)")
    parser.add_argument("--shard-size", type=int, default=1000, help=f"samples in a tar, at most {MAX_SHARD_SIZE}")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON and no progress")
    return parser


def _read_rows(args: argparse.Namespace) -> list[Row]:
    if not args.images.is_dir():
        raise ValueError(f"--images: no such folder: {args.images}")
    if args.table is not None:
        return read_table(args.images, args.table, args.image_column, args.caption_column)
    if args.image_column or args.caption_column:
        raise ValueError("--image-column and --caption-column name columns of a --table, and none is given")
    return read_folder(args.images)


def _summary(out: Path, written: Written, as_json: bool) -> str:
    if as_json:
        return json.dumps({"out": str(out), **dataclasses.asdict(written)})
    skipped = f"; {written.skipped:,} rows left out, see {out / SKIPPED}" if written.skipped else ""
    return f"{out}: {written.samples:,} samples in {written.shards} shards{skipped}\nfingerprint {written.fingerprint}"
