"""Where an agent stands among those of its job, and how they find each other."""

import json
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.attempts import write_json

MEETING_SECONDS = 300  # a shared folder may show a new file late


@dataclass(frozen=True)
class Place:
    """An agent's place; by default the only one, on this machine.

    Attributes:
        job: what Slurm calls this start of the job, id and restart count; empty outside of Slurm.
        node: index of this node.
        nodes: their number.
        task: index of this agent on its node.
        tasks: agents per node.
    """

    job: str = ""
    node: int = 0
    nodes: int = 1
    task: int = 0
    tasks: int = 1

    @property
    def first(self) -> bool:
        """Whether this agent keeps the ledger."""
        return self.node == self.task == 0

    @property
    def alone(self) -> bool:
        return self.nodes == self.tasks == 1


def slurm_place(environment: Mapping[str, str]) -> Place:
    """The place that srun gave this process. Raises ValueError where srun did not start it."""
    if "SLURM_PROCID" not in environment:
        raise ValueError("this is no task of a Slurm job: the agent is started by srun, as slurm/train.sbatch does")
    nodes = int(environment["SLURM_NNODES"])
    return Place(
        job=f"{environment['SLURM_JOB_ID']}.{environment.get('SLURM_RESTART_COUNT', '0')}",
        node=int(environment["SLURM_NODEID"]),
        nodes=nodes,
        task=int(environment["SLURM_LOCALID"]),
        tasks=int(environment["SLURM_NTASKS"]) // nodes,
    )


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of one start of a job meet, as its first agent says in `control/meeting.json`."""

    job: str
    attempt: int
    host: str
    port: int


def announce(folder: Path, meeting: Meeting) -> None:
    """Tell the other agents; one start of a job replaces what an earlier one said."""
    write_json(folder / "control" / "meeting.json", asdict(meeting))


def find_meeting(folder: Path, place: Place, timeout_seconds: float = MEETING_SECONDS) -> Meeting:
    """What the first agent of this start announces. Raises RuntimeError where nothing is seen of it."""
    path, deadline = folder / "control" / "meeting.json", time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        list(path.parent.iterdir())  # makes a network file system look again
        if path.is_file():
            meeting = Meeting(**json.loads(path.read_text()))
            if meeting.job == place.job:
                return meeting
        time.sleep(0.2)
    raise RuntimeError(
        f"node {place.node} ({socket.gethostname()}) saw nothing from node 0 in {path} for {timeout_seconds:g} s; "
        "runs_dir must lie on a file system that all nodes share"
    )


def free_port() -> int:
    """A port of this host that nobody uses now, so that two jobs on one node don't meet."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def own_address(environment: Mapping[str, str]) -> str:
    """The address by which other nodes of the job reach this one: that of its interface towards the launching node.

    A host name would be no better: on many clusters it is loopback's, or unknown to the other nodes.
    """
    launcher = environment.get("SLURM_LAUNCH_NODE_IPADDR")
    if launcher is None:
        return socket.gethostname()
    family = socket.AF_INET6 if ":" in launcher else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((launcher, 9))  # sends nothing; the kernel only chooses the interface
        return str(probe.getsockname()[0])
