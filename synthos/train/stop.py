"""One stop protocol: whatever asks a run to end sets a flag; the ranks agree on the step at which they obey."""

import json
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from synthos.train.distributed import World

# Of rising rank, so that a wish of a person is not lost in a signal; an index travels between ranks.
CAUSES = ("", "drain", "notice", "terminate", "stop", "interrupt")
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


def read_cause(file: Path) -> str:
    """The cause that `control/stop` names, or "" where there is no such file; what is none is the wish of a person."""
    try:
        cause = json.loads(file.read_text() or "{}").get("cause", "stop")
    except FileNotFoundError:
        return ""
    except (ValueError, AttributeError):
        cause = "stop"
    return cause if cause in CAUSES[1:] else "stop"
