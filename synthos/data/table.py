"""Rows to write, from a CSV or JSONL table beside a folder of pictures, or from the folder alone."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from synthos.data.index import IMAGE_SUFFIXES
from synthos.data.write import Row

KNOWN_COLUMNS = (("image", "caption"), ("video", "prompt"))  # picture, caption


def read_folder(images: Path) -> list[Row]:
    """Every picture below `images`, in the order of paths, with the text of the .txt beside it; ValueError for none."""
    paths = sorted(p for p in images.rglob("*") if p.suffix.lower().lstrip(".") in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"--images: no .{', .'.join(IMAGE_SUFFIXES)} below {images}")
    return [Row(path, _text(path.with_suffix(".txt")), {"file": str(path.relative_to(images))}) for path in paths]


def read_table(images: Path, table: Path, image_column: str | None, caption_column: str | None) -> list[Row]:
    """The rows of a .csv or .jsonl; picture paths are relative to `images`; other columns go to each sample's .json.

    Raises ValueError naming line or column for what is no such table.
    """
    records = list(_records(table))
    if not records:
        raise ValueError(f"--table: {table} has no rows")
    image, caption = _find_columns(table, list(records[0]), image_column, caption_column)
    rows = []
    for record in records:
        file = str(record.get(image) or "")
        facts = {name: value for name, value in record.items() if name not in (image, caption)}
        rows.append(Row(images / file, str(record.get(caption) or ""), {**facts, "file": file}))
    return rows


def _records(table: Path) -> Iterator[dict[str, Any]]:
    readers = {".csv": _csv_records, ".jsonl": _jsonl_records}
    if table.suffix not in readers:
        raise ValueError(f"--table: {table} is of no known kind; allowed: {', '.join(readers)}")
    if not table.is_file():
        raise ValueError(f"--table: no such file: {table}")
    return readers[table.suffix](table)


def _csv_records(table: Path) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(_open(table))
    try:
        for record in reader:
            if None in record:  # where DictReader puts the cells beyond the header
                raise ValueError(
                    f"--table: {table} line {reader.line_num}: more cells than columns; quote captions that hold commas"
                )
            yield record
    except csv.Error as error:
        line = reader.reader.line_num  # DictReader's own counts only the lines that were read well
        raise ValueError(f"--table: {table} line {line} is no CSV: {error}; a quote may be left open") from None


def _jsonl_records(table: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_open(table), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"--table: {table} line {number} is no JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"--table: {table} line {number} is no JSON object")
        yield record


def _open(table: Path) -> io.StringIO:
    """The table's text, decoded as a whole: only so can the line be named that is not UTF-8."""
    try:
        return io.StringIO(table.read_bytes().decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        line = len(error.object[: error.start + 1].splitlines())
        raise ValueError(f"--table: {table} line {line} is not UTF-8; save the table as UTF-8") from None


def _find_columns(table: Path, columns: list[str], image: str | None, caption: str | None) -> tuple[str, str]:
    """The two columns as named by option, or else the first known pair."""
    for option, name in {"--image-column": image, "--caption-column": caption}.items():
        if name is not None and name not in columns:
            raise ValueError(f"{option}: {table} has no column {name!r}; allowed: {', '.join(columns)}")
    for known_image, known_caption in KNOWN_COLUMNS:
        pair = image or known_image, caption or known_caption
        if pair[0] in columns and pair[1] in columns:
            return pair
    known = " or ".join(",".join(pair) for pair in KNOWN_COLUMNS)
    raise ValueError(
        f"--table: {table} has the columns {', '.join(columns)}, not {known}; name them by --image-column and "
        "--caption-column"
    )


def _text(path: Path) -> str:
    """A caption; bytes that are no UTF-8 become lone surrogates, by which `write_shards` leaves out just this row."""
    return path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else ""
