"""What the data commands share: their options, progress on stderr, and one table or one JSON object on stdout."""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from synthos.arguments import Parser
from synthos.data.processes import usable_cores

Thing = TypeVar("Thing")
SHOWN = 20  # lines of a list of faults on the screen; --json has all


def new_parser(verb: str, about: str | None, shards: bool = True) -> argparse.ArgumentParser:
    """A parser of a verb's options; with `shards` it begins with the shards to work on."""
    parser = Parser(prog=f"synthos data {verb}", description=about)
    if shards:
        parser.add_argument("shards", nargs="+", help="as data.shards: a folder (of an address: end it by /), a glob, "
                            "a brace pattern, or a .txt or .json list; paths or addresses")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object and no progress")
    return parser


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=positive, default=usable_cores(), help="processes; default: one per core")


def positive(text: str) -> int:
    """A whole number above 0; for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not allowed; expected 1 or more")
    return number


def spec_of(shards: list[str]) -> str | list[str]:
    """What data.shards would be."""
    return shards[0] if len(shards) == 1 else shards


def shown(things: Iterable[Thing], what: str, total: int, quiet: bool) -> Iterator[Thing]:
    """The same things, with an estimate of the time left on stderr unless `quiet`."""
    yield from track(things, what, total, console=Console(stderr=True), disable=quiet)


def counted(count: int, thing: str) -> str:
    """How many there are of something, in words: 1 shard, 2,000 shards."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """The first column holds names, the others figures."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    _console().print(table)


def print_list(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """The first `SHOWN` of some rows of text, and how many more there are."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows[:SHOWN]:
        table.add_row(*(str(cell) for cell in row))
    _console().print(table)
    if len(rows) > SHOWN:
        print(f"and {len(rows) - SHOWN:,} more; --json lists all")


def megabytes(size: float) -> str:
    """Bytes in 10^6 or 10^9, as disks are sold."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"


def _console() -> Console:
    """As wide as the terminal; a pipe or a file gets whole lines, and no markup is read in keys and captions."""
    console = Console(markup=False, highlight=False)
    return console if console.is_terminal else Console(markup=False, highlight=False, width=10_000)
