"""The progress line that a person watches: loss, images per second, data wait, and the time left."""

from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


@dataclass(frozen=True)
class Beat:
    """How far a run is; also what its heartbeat file holds."""

    step: int
    last_step: int
    loss: float
    images_per_s: float
    data_wait: float  # share of the time
    eta_s: float

    def __str__(self) -> str:
        minutes, seconds = divmod(int(self.eta_s), 60)
        return (
            f"loss {self.loss:.4f}  {self.images_per_s:.1f} images/s  data wait {100 * self.data_wait:.0f} %"
            f"  ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
        )


class ProgressLine:
    """A live bar at the foot of a terminal; print through it while it lives."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(None), TextColumn("{task.description}"))
        self.bar = Progress(*columns, console=console, refresh_per_second=2)
        self.task = self.bar.add_task("starting", total=None)
        self.bar.start()

    def update(self, beat: Beat) -> None:
        self.bar.update(self.task, completed=beat.step, total=beat.last_step, description=str(beat))

    def print(self, text: str) -> None:
        self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True, end="")

    def stop(self) -> None:
        self.bar.stop()
