"""The progress line that a person watches, and the heartbeat file that it travels in from a job."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


@dataclass(frozen=True)
class Beat:
    """How far a run is; also what its heartbeat file holds. Generating counts pictures and has no loss."""

    step: int
    last_step: int
    loss: float | None
    images_per_s: float
    data_wait: float | None  # share of the time
    eta_s: float
    unit: str = "step"
    save_seconds: float | None = None  # from the start of a checkpoint's save to its end, of the last one
    doing: str = ""  # what may take longer than a step, and does not beat: saves, exports

    def __str__(self) -> str:
        minutes, seconds = divmod(int(self.eta_s), 60)
        loss = "" if self.loss is None else f"loss {self.loss:.4f}  "
        wait = "" if self.data_wait is None else f"  data wait {100 * self.data_wait:.0f} %"
        eta = f"ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
        return f"{loss}{self.images_per_s:.{2 if self.loss is None else 1}f} images/s{wait}  {eta}"


class ProgressLine:
    """A live bar at the foot of a terminal; print through it while it lives."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.fields[unit]}"),
            MofNCompleteColumn(),
            BarColumn(None),
            TextColumn("{task.description}"),
        )
        self.bar = Progress(*columns, console=console, refresh_per_second=2)
        self.task = self.bar.add_task("starting", total=None, unit="")
        self.bar.start()

    def update(self, beat: Beat) -> None:
        told = {"completed": beat.step, "total": beat.last_step, "description": str(beat), "unit": beat.unit}
        self.bar.update(self.task, **told)  # type: ignore[arg-type]

    def print(self, text: str) -> None:
        self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True, end="")

    def stop(self) -> None:
        self.bar.stop()


class Countdown:
    """Shows pictures being made: a live line on a terminal, else a printed one now and then.

    Args:
        total: pictures asked for.
        done: of them, those that are there already.
        tell: is given every beat as well.
    """

    LINE_SECONDS = 15.0

    def __init__(self, total: int, done: int = 0, tell: Callable[[Beat], None] | None = None) -> None:
        self.total, self.before, self.done, self.tell = total, done, done, tell
        self.started = self.printed = time.monotonic()
        self.line = ProgressLine(Console(stderr=True)) if sys.stderr.isatty() else None

    def add(self, made: int) -> None:
        """So many more pictures are made."""
        self.done, now = self.done + made, time.monotonic()
        rate = (self.done - self.before) / max(now - self.started, 1e-9)
        beat = Beat(self.done, self.total, None, rate, None, (self.total - self.done) / rate if rate else 0, "picture")
        if self.tell:
            self.tell(beat)
        if self.line:
            self.line.update(beat)
        elif now - self.printed > self.LINE_SECONDS or self.done == self.total:
            self.printed = now
            print(f"picture {self.done}/{self.total}  {beat}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.line:
            self.line.stop()


def write_heartbeat(folder: Path, attempt: int, beat: Beat) -> None:
    """Say in the run folder how far the attempt is; readers see the old file or the new."""
    path = folder / "control" / "heartbeat.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"time": time.time(), "attempt": attempt, **dataclasses.asdict(beat)}))
    part.replace(path)
