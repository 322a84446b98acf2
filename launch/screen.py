"""What the agent shows of a run: the ranks' output, and on a terminal a live progress line under it."""

import sys
from pathlib import Path

from rich.console import Console

from synthos.files import read_heartbeat
from synthos.train.progress import Beat, ProgressLine


class Screen:
    """The terminal, or whatever standard output is.

    Args:
        folder: of the run, whose heartbeat says how far it is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, read_heartbeat(folder)
        self.line = ProgressLine(Console()) if sys.stdout.isatty() else None

    def show(self, text: str) -> None:
        """Print new output, and bring the progress line up to date."""
        if self.line is None:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        if text:
            self.line.print(text)
        beat = read_heartbeat(self.folder)
        if beat and beat != self.before:  # what an earlier attempt left says nothing of this one
            names = Beat.__dataclass_fields__
            self.line.update(Beat(**{name: beat[name] for name in names}))

    def close(self) -> None:
        if self.line:
            self.line.stop()
