"""From a table's records to what is written: which picture, which caption, and which records are left out.

Pictures are read below one folder only, whatever a table says: a table from elsewhere must not reach other files.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from synthos.data.index import IMAGE_SUFFIXES
from synthos.data.table import Record, Table
from synthos.data.triplet import Triplet
from synthos.data.write import Lost, Picture, Row
from synthos.keys import hash64

# Of several columns the first that is not empty counts, row by row.
IMAGES = ("image", "image_path", "path", "video", "file_name")
CAPTIONS = ("captions", "caption", "text", "prompt")
TARGETS = ("target_image", "image_path")
OBJECTS = ("object_image", "object_image_path")
MASKS = ("mask",)
SOURCE = "source"

Numbered = tuple[int, Record]  # a record and its row in the table, from 1


class Found(NamedTuple):
    """A picture of a record."""

    picture: Picture
    column: str | None
    file: str  # its path as the table has it; "" where it has none

    @property
    def facts(self) -> dict[str, str]:
        return {"file": self.file} if self.file else {}


@dataclass(frozen=True)
class Reader:
    """How a record becomes a row."""

    root: Path | None  # folder of the pictures
    images: Sequence[tuple[str, ...]]  # columns of the picture, or of target, object and mask
    captions: tuple[str, ...] | None  # columns; None: no captions are written
    seed: int = 0  # of the choice among several captions
    masks: Counter[str] = field(default_factory=Counter)  # what was done to masks, and how often

    def row(self, number: int, record: Record) -> Row:
        """A record of one picture."""
        found = find_picture(record, self.images[0], self.root)
        caption, facts = self._caption(record, found)
        return Row(found.picture, caption, {**facts, **found.facts}, number)

    def triplet(self, number: int, record: Record) -> Triplet:
        """A record of target, object and mask; a caption may be there or not."""
        found = [find_picture(record, columns, self.root) for columns in self.images]
        caption, facts = self._caption(record, *found)
        target, other, mask = (picture.picture for picture in found)
        return Triplet(target, other, mask, caption or None, {**facts, **found[0].facts}, number, self.masks)

    def _caption(self, record: Record, *found: Found) -> tuple[str | None, dict[str, Any]]:
        """The caption, and the record's other columns as JSON can hold them."""
        taken = {picture.column for picture in found}
        if self.captions is None:
            return None, _facts(record, taken)
        column, captions = find_captions(record, self.captions)
        facts = _facts(record, {*taken, column})
        if column is None:
            return "", facts
        if isinstance(record[column], list):
            facts["captions"] = captions
        return captions[hash64("caption", self.seed, _identity(found[0])) % len(captions)], facts


def folder_pictures(folder: Path) -> list[Path]:
    """Every picture below the folder, in the order of paths; ValueError for none."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower().lstrip(".") in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"--images: no .{', .'.join(IMAGE_SUFFIXES)} below {folder}")
    return paths


def folder_row(path: Path, folder: Path, captions: bool) -> Row:
    """A picture with the text of the .txt beside it, if `captions` are wanted."""
    text = _read_text(path.with_suffix(".txt")) if captions else None
    return Row(path, text, {"file": str(path.relative_to(folder))})


def choose_columns(table: Table, known: tuple[str, ...], what: str, advice: str) -> tuple[str, ...]:
    """Those of the `known` columns that the table has; ValueError, with the advice, for none."""
    there = tuple(column for column in known if column in table.columns)
    if not there:
        columns = ", ".join(table.columns)
        raise ValueError(
            f"--table: {table.name} has the columns {columns}; {what} need one of {', '.join(known)}{advice}"
        )
    return there


def named_column(table: Table, option: str, name: str | None) -> tuple[str, ...]:
    """The column that an option names, if it does; ValueError for one that the table lacks."""
    if name is not None and name not in table.columns:
        raise ValueError(f"{option}: {table.name} has no column {name!r}; allowed: {', '.join(table.columns)}")
    return (name,) if name is not None else ()


def parse_sources(table: Table, text: str | None) -> frozenset[str]:
    """The sources that --source lists, in lower case; none, for all of them, where it is `*` or not given."""
    words = frozenset(word.strip().lower() for word in (text or "*").split(",") if word.strip())
    if "*" in words:
        return frozenset()
    if not words:
        raise ValueError(f"--source: {text!r} names none; allowed: a list as in coco,laion, or * for all")
    if SOURCE not in table.columns:
        columns = ", ".join(table.columns)
        raise ValueError(f"--source: {table.name} has no column {SOURCE!r} to choose by; it has {columns}")
    return words


def keep_sources(records: Iterable[Numbered], wanted: frozenset[str], left_out: Counter[str]) -> Iterator[Numbered]:
    """Records of the `wanted` sources; others are counted in `left_out`. ValueError at the end if there was none."""
    kept = 0
    for number, record in records:
        source = str(record.get(SOURCE) or "").strip().lower()
        if source in wanted:
            kept += 1
            yield number, record
        else:
            left_out[source] += 1
    if not kept:
        there = ", ".join(repr(source) for source, _ in left_out.most_common(10))
        raise ValueError(f"--source: no row is of {', '.join(sorted(wanted))}; the table has {there}")


def find_picture(record: Record, columns: tuple[str, ...], root: Path | None) -> Found:
    """Embedded bytes, or {"bytes": ..., "path": ...} as the hub has them, or a path below `root`.

    Raises ValueError for a path where `root` is None.
    """
    for column in columns:
        value = record.get(column)
        data, file = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
        file = file if isinstance(file, str) else ""
        if isinstance(data, bytes) and data:
            return Found(data, column, file)
        if file.strip():
            return Found(_locate(file, root), column, file)
    return Found(Lost("", "no picture"), None, "")


def _locate(file: str, root: Path | None) -> Picture:
    """Where the picture lies: below `root`, or as the path stands if it leads there too.

    Paths are compared as they are written, with `..` resolved: links below `root` are its owner's, and are followed.
    """
    if root is None:
        raise ValueError(f"--images: needed, for the table names pictures by path, as in {file!r}")
    if "://" in file:
        return Lost(file, "an address; pictures are fetched first, as img2dataset does")
    top = os.path.abspath(root)
    candidates = [Path(os.path.abspath(path)) for path in (os.path.join(top, file), file)]
    inside = [path for path in candidates if path.is_relative_to(top)]
    if not inside:
        return Lost(file, "leads out of --images")
    return next((path for path in inside if os.path.exists(path)), inside[0])


def find_captions(record: Record, columns: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """The first column that has a caption, and all of its captions."""
    for column in columns:
        value = record.get(column)
        captions = [text for text in map(_text, value if isinstance(value, list) else [value]) if text]
        if captions:
            return column, captions
    return None, []


def _text(value: Any) -> str:
    """A caption as one paragraph: an empty line becomes a space, as in the prompts of LongAlign (arXiv 2410.11817)."""
    return re.sub(r"\s*\n\s*\n\s*", " ", "" if value is None else str(value)).strip()


def _identity(found: Found) -> bytes:
    """What a choice is keyed by: it stays the same wherever in a table the picture stands."""
    if found.file or not isinstance(found.picture, bytes):
        return found.file.encode("utf-8", "surrogatepass")
    return found.picture


def _facts(record: Record, without: set[str | None]) -> dict[str, Any]:
    return {name: _plain(value) for name, value in record.items() if name not in without}


def _plain(value: Any) -> Any:
    """A table's value as JSON can hold it; bytes, which it can't, become null."""
    if isinstance(value, bytes) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | None) else str(value)  # dates, decimals


def _read_text(path: Path) -> str:
    """A caption; bytes that are no UTF-8 become lone surrogates, by which `write_shards` leaves out just this row."""
    return path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else ""
