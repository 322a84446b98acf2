"""Where an agent stands among those of its job, and how they find each other."""

import fcntl
import ipaddress
import os
import random
import socket
import struct
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.render import tasks_per_node
from synthos.files import read_json, write_json
from synthos.schema import JobConfig

SIOCGIFADDR = 0x8915  # man netdevice
MEETING_SECONDS = 900  # longer than the first agent waits for the others, so that it is the one to judge


@dataclass(frozen=True)
class Place:
    """An agent's place; by default the only one, on this machine.

    Attributes:
        job: what Slurm calls this start of the job, id and restart count; empty outside of Slurm.
        step: of the job, by which srun started this agent: one job may start several attempts, one after another.
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
    step: str = ""

    @property
    def start(self) -> str:
        """What is common to the agents of one attempt, and to no others."""
        return f"{self.job}.{self.step}" if self.step else self.job

    @property
    def first(self) -> bool:
        """Whether this agent keeps the ledger."""
        return self.node == self.task == 0

    @property
    def alone(self) -> bool:
        return self.nodes == self.tasks == 1


def job_id(environment: Mapping[str, str]) -> str:
    """This job as Slurm's commands take it: an element of an array by its own name, which says which run it is."""
    if "SLURM_ARRAY_TASK_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def job_start(environment: Mapping[str, str]) -> str:
    """This start of the job, as attempts record it; empty outside of Slurm."""
    if "SLURM_JOB_ID" not in environment:
        return ""
    return f"{job_id(environment)}.{environment.get('SLURM_RESTART_COUNT', '0')}"


def slurm_place(environment: Mapping[str, str]) -> Place:
    """The place that srun gave this process. Raises ValueError where srun did not start it."""
    if "SLURM_PROCID" not in environment:
        raise ValueError("this is no task of a Slurm job: the agent is started by srun, as slurm/train.sbatch does")
    nodes = int(environment["SLURM_NNODES"])
    return Place(
        job=f"{job_id(environment)}.{environment.get('SLURM_RESTART_COUNT', '0')}",
        node=int(environment["SLURM_NODEID"]),
        nodes=nodes,
        task=int(environment["SLURM_LOCALID"]),
        tasks=int(environment["SLURM_NTASKS"]) // nodes,
        step=environment["SLURM_STEP_ID"],
    )


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of one attempt meet, as its first agent says in `control/meeting.json`."""

    start: str  # Place.start
    attempt: int
    host: str
    port: int
    time: float = 0.0  # of the first agent's clock, in seconds since 1970


def announce(folder: Path, meeting: Meeting) -> None:
    """Tell the other agents; one attempt replaces what an earlier one said."""
    write_json(folder / "control" / "meeting.json", asdict(meeting))


def find_meeting(folder: Path, place: Place, timeout_seconds: float = MEETING_SECONDS) -> Meeting:
    """What the first agent of this start announces. Raises TimeoutError where nothing is seen of it."""
    path, deadline = folder / "control" / "meeting.json", time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        said = read_json(path)
        if said.get("start") == place.start:
            return Meeting(**said)
        time.sleep(0.2)
    raise TimeoutError(
        f"node {place.node} ({socket.gethostname()}) saw nothing from node 0 in {path} for {timeout_seconds:g} s; "
        "runs_dir must lie on a file system that all nodes share"
    )


def free_port() -> int:
    """A port of this host that nobody uses now, so that two jobs on one node don't meet.

    It is none of those that the kernel gives to outgoing connections, which may take it before it is used.
    """
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = list(range(min(20000, low // 2), low))
    random.shuffle(candidates)
    for port in candidates:
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port))
            return port
    raise RuntimeError(f"all ports from {min(candidates)} to {max(candidates)} are in use on {socket.gethostname()}")


def own_address(environment: Mapping[str, str]) -> str:
    """The address by which other nodes of the job reach this one: that of its interface towards them.

    A host name would be no better: on many clusters it is loopback's, or unknown to the other nodes.
    """
    launcher = environment.get("SLURM_LAUNCH_NODE_IPADDR")
    if launcher is None:
        return socket.gethostname()
    address = _towards(launcher)
    for other in node_names(environment) if ipaddress.ip_address(address).is_loopback else []:  # the launcher is here
        with suppress(OSError):
            address = _towards(socket.gethostbyname(other))
        if not ipaddress.ip_address(address).is_loopback:
            break
    return address


def interface_of(address: str) -> str | None:
    """The name of the network interface that has an IPv4 address; None where none of this host has it."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _towards(address: str) -> str:
    """This host's address on the network on which it reaches another."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing; the kernel only chooses the interface
        return str(probe.getsockname()[0])


def allowed_cores() -> int:
    """The CPU cores that this process is bound to."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def node_names(environment: Mapping[str, str]) -> list[str]:
    """The host names of the job's nodes; empty where there is no scontrol."""
    try:
        command = ["scontrol", "show", "hostnames", environment.get("SLURM_JOB_NODELIST", "")]
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split()
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []


def allocation_problems(config: JobConfig, place: Place, environment: Mapping[str, str]) -> list[str]:
    """A line for each way in which a job differs from the config that it is to run."""
    compared = [("nodes", "nodes", place.nodes, config.nodes)]
    compared += [("tasks per node", "ntasks-per-node", place.tasks, tasks_per_node(config))]
    if config.cluster.gpu_flag:
        gpus = int(environment.get("SLURM_GPUS_ON_NODE", "0"))
        compared += [("gpus_per_node", config.cluster.gpu_flag, gpus, config.gpus_per_node)]
    return [
        f"{name}: the allocation has {found}, config.yaml of the run says {asked}; expected sbatch with "
        f"--{flag}={'gpu:' if flag == 'gres' else ''}{asked}, or a new submission"
        for name, flag, found, asked in compared
        if found != asked
    ]
