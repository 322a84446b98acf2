"""Tables of captions and pictures: CSV and JSON lines here, Parquet in `parquet.py`; rows are read one at a time.

A text table is read once to the end before the first row is used, so that what is wrong in it is said before anything
is written, and the number of its rows is known.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthos.data.parquet import find_parquet, parquet_columns, parquet_records

Record = dict[str, Any]
KINDS = ".csv, .jsonl, .parquet, a folder of .parquet, hf://datasets/OWNER/NAME"


@dataclass(frozen=True)
class Table:
    """Named columns, and rows that can be gone through again."""

    name: str
    columns: list[str]
    size: int  # rows
    records: Callable[[], Iterator[Record]]


def open_table(name: str) -> Table:
    """The table that --table names; ValueError naming file, line or column for what is no such table or has no rows."""
    path = Path(name)
    if "://" in name or path.suffix == ".parquet" or path.is_dir():
        system, files = find_parquet(name)
        columns, size = parquet_columns(system, files)
        table = Table(name, columns, size, lambda: parquet_records(system, files))
    else:
        table = _open_text(path)
    if not table.size:
        raise ValueError(f"--table: {name} has no rows")
    return table


def _open_text(path: Path) -> Table:
    readers = {".csv": _csv_records, ".jsonl": _jsonl_records}
    if path.suffix not in readers:
        raise ValueError(f"--table: {path} is of no known kind; allowed: {KINDS}")
    if not path.is_file():
        raise ValueError(f"--table: no such file: {path}")
    read = readers[path.suffix]
    columns: dict[str, None] = {}
    size = 0
    for record in read(path):
        size += 1
        columns |= dict.fromkeys(record)
    return Table(str(path), list(columns), size, lambda: read(path))


def _csv_records(table: Path) -> Iterator[Record]:
    reader = csv.DictReader(_lines(table))
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


def _jsonl_records(table: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(table), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"--table: {table} line {number} is no JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"--table: {table} line {number} is no JSON object")
        yield record


def _lines(table: Path) -> Iterator[str]:
    """The table's lines with their ends; the first that is not UTF-8 is named."""
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        for number, line in enumerate(file, 1):
            try:
                line.encode()
            except UnicodeEncodeError:  # a surrogate stands for each byte that is not UTF-8
                raise ValueError(f"--table: {table} line {number} is not UTF-8; save the table as UTF-8") from None
            yield line
