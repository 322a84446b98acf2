"""What torchrun has seen of ranks that failed: the table at the end of each node's log."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from launch.attempts import attempt_folder
from synthos.files import tail

ENTRY = re.compile(r"^ *time +: (\S+)\n.*\n *rank +: (\d+) .*\n *exitcode +: (-?\d+) ", re.MULTILINE)
TABLE_BYTES = 65536
FAULTS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS)
TOGETHER_SECONDS = 10  # later it is torchrun that kills what outlives its SIGTERM


@dataclass(frozen=True)
class Failure:
    """A rank that ended, with its exit code, or by the signal that the negative one is."""

    time: datetime
    rank: int
    exit_code: int


def failures(log: Path) -> list[Failure]:
    """The ranks of a node that failed; of those the last entry is what torchrun saw first."""
    found = ENTRY.findall(tail(log, TABLE_BYTES))
    return [Failure(datetime.fromisoformat(time), int(rank), int(code)) for time, rank, code in found]


def killed_rank(folder: Path, attempt: int) -> dict[str, Any]:
    """For the ledger: the rank that was killed, of whom its peers can only tell that it is gone. Empty without one."""
    for log in sorted(attempt_folder(folder, attempt).glob("node-*.log")):
        if one := _killed(failures(log)):
            return {"cause": "killed", "rank": one.rank, "message": f"ended by {signal.Signals(-one.exit_code).name}"}
    return {}


def _killed(failed: Sequence[Failure]) -> Failure | None:
    """A fault of a rank that failed first, or one killed as others failed: who is missed may be seen after them."""
    for one in reversed(failed):
        late = (one.time - failed[-1].time).total_seconds() > TOGETHER_SECONDS
        if -one.exit_code in (FAULTS if one is failed[-1] else [signal.SIGKILL]) and not late:
            return one
    return None
