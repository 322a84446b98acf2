"""One stop protocol: whatever asks a run to end sets a flag; the ranks agree on the step at which they obey."""

import signal
import time
from pathlib import Path
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from synthos.files import CAUSES, read_cause
from synthos.train.distributed import World

SIGNALS = {  # SIGUSR2 is Slurm's notice of the time limit, and on some sites of preemption
    signal.SIGINT: "interrupt",
    signal.SIGTERM: "terminate",
    signal.SIGUSR2: "notice",
}


class Stop:
    """Watches for signals to this rank and, on rank 0, for `control/stop`, a JSON file {"cause": ...}.

    Used as a context manager, which puts the former signal handlers back. A second Ctrl-C raises KeyboardInterrupt.
    """

    POLL_SECONDS = 0.25  # how often the file is looked for: shared folders are slow

    def __init__(self, file: Path, world: World) -> None:
        self.file, self.world = file, world
        self.code = 0
        self.interrupted = False
        self.polled = 0.0
        self.former: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> "Stop":
        self.former = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def agreed(self) -> str:
        """The cause all ranks stop for now, or "" to go on; collective."""
        if self.world.is_main and time.monotonic() - self.polled > self.POLL_SECONDS:
            self.polled = time.monotonic()
            self.code = max(self.code, CAUSES.index(read_cause(self.file)))
        code = self.world.reduce(torch.tensor(self.code), dist.ReduceOp.MAX)
        return CAUSES[int(code)]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        cause = SIGNALS[signal.Signals(number)]
        if cause == "interrupt" and self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = cause == "interrupt" or self.interrupted
        self.code = max(self.code, CAUSES.index(cause))
