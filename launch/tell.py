"""What the run commands share: their options, tables for people, one JSON document for programs."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from synthos.arguments import Parser

RUN = "a run: folder name, name, signature, Slurm job, path"
WIDTH = 200  # of tables that go to a file or a pipe


def new_parser(verb: str, about: str | None, runs: str = "") -> argparse.ArgumentParser:
    """A parser of a verb's options, beginning with `runs` of it: "one", "+" (some), "*" (some or none), or nothing."""
    parser = Parser(prog=f"synthos {verb}", description=about)
    if runs == "one":
        parser.add_argument("run", metavar="RUN", help=RUN)
    elif runs:
        parser.add_argument("runs", metavar="RUN", nargs=runs, help=f"{RUN}; or a group, which is all of its runs")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    return parser


class Undone(RuntimeError):
    """What a verb was asked for could not be done, through no fault of who asked: exit code 1."""


def print_json(content: Any) -> None:
    print(json.dumps(content, indent=1))


def warn(line: str) -> None:
    print(line, file=sys.stderr)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> Table:
    """Rows of text under column heads; a column that starts with > holds figures."""
    made = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def console() -> Console:
    """As wide as the terminal, or `WIDTH`; words of users are no markup."""
    own = Console(markup=False, highlight=False)
    return own if own.is_terminal else Console(markup=False, highlight=False, width=WIDTH)


def duration(seconds: float) -> str:
    """As in 45 s, 12:34 min, 3:04 h, 5 days."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 2 * 86400:
        return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
    return f"{whole // 86400} days"


def size(count: float) -> str:
    """Bytes in 10^6 or 10^9, as disks are sold."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
