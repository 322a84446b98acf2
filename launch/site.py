"""What a Slurm cluster does to jobs: settings that decide which signals arrive, how long a save has, limits."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from launch import slurm

UNSET = ("(null)", "NONE", "N/A", "UNLIMITED", "")


@dataclass(frozen=True)
class Partition:
    """One of its partitions.

    Attributes:
        limit: of a job's time, as Slurm writes it; None: no limit.
        grace_seconds: from the word of preemption to the kill.
        preempt_mode: what becomes of its jobs when others need the nodes: OFF, REQUEUE, CANCEL, SUSPEND, GANG.
        tier: jobs of a higher one preempt those of a lower.
        cpus, memory_mb, gpus: of a node that has most of them.
        gpu_type: as in h200; empty where GPUs have none, or several.
    """

    name: str
    default: bool
    up: bool
    limit: str | None
    grace_seconds: int
    preempt_mode: str
    tier: int
    nodes: int
    cpus: int = 0
    memory_mb: int = 0
    gpus: int = 0
    gpu_type: str = ""


@dataclass(frozen=True)
class Site:
    """A cluster.

    Attributes:
        settings: of `scontrol show config`, by their names.
        partitions: in the order in which Slurm lists them.
    """

    settings: dict[str, str]
    partitions: list[Partition]

    @property
    def name(self) -> str:
        return self.settings.get("ClusterName", "")

    @property
    def version(self) -> str:
        return self.settings.get("SLURM_VERSION", "")

    @property
    def signals_reach_ranks(self) -> bool:
        """Whether a signal for a job's tasks reaches their children too: with cgroups only a KILL does."""
        return "cgroup" not in self.settings.get("ProctrackType", "")

    @property
    def kill_wait_seconds(self) -> int:
        """From SIGTERM to SIGKILL at a time limit or a cancel."""
        return self.number("KillWait") or 0

    @property
    def user_signal(self) -> bool:
        """Whether preemption sends the job's own signal, as a time limit does."""
        text = f"{self.settings.get('PreemptParameters', '')},{self.settings.get('SlurmctldParameters', '')}"
        return "preempt_send_user_signal" in text or "send_user_signal" in self.settings.get("PreemptParameters", "")

    @property
    def accounting(self) -> bool:
        """Whether sacct can answer."""
        return not self.settings.get("AccountingStorageType", "").endswith("none")

    def number(self, name: str) -> int | None:
        """The whole number at the start of a setting."""
        match = re.match(r"\d+", self.settings.get(name, ""))
        return int(match[0]) if match else None

    def partition(self, name: str | None) -> Partition | None:
        """A partition by name; of None or several the default one, or the first of them."""
        names = name.split(",") if name else []
        for one in self.partitions:
            if one.name in names or (not names and one.default):
                return one
        return None


def read_site() -> Site:
    """Ask the cluster for its settings. Raises RuntimeError where there is no Slurm, or it does not answer."""
    settings = parse_settings(_answer(["scontrol", "show", "config"]))
    shown = _answer(["scontrol", "show", "partition", "--oneliner"])
    nodes = _answer(["sinfo", "--noheader", "--format=%R|%c|%m|%G"])
    return Site(settings, [_partition(line, nodes) for line in shown.splitlines() if line.startswith("PartitionName=")])


def parse_settings(text: str) -> dict[str, str]:
    """The `Name = value` lines of `scontrol show config`."""
    pairs = (line.split("=", 1) for line in text.splitlines() if " = " in line or line.endswith(" ="))
    return {name.strip(): "" if value.strip() in ("(null)", "N/A") else value.strip() for name, value in pairs}


def _answer(command: list[str]) -> str:
    done = slurm.ask(command)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {slurm.words(done.stderr)}")
    return done.stdout


def _partition(line: str, nodes: str) -> Partition:
    """One line of `scontrol show partition --oneliner`, and what `sinfo` says of its nodes."""
    said = dict(word.split("=", 1) for word in line.split() if "=" in word)
    cpus = memory = gpus = 0
    kinds: set[str] = set()
    for group in nodes.splitlines():
        name, own_cpus, own_memory, gres = group.split("|", 3)
        if name == said["PartitionName"]:
            cpus, memory = max(cpus, _first(own_cpus)), max(memory, _first(own_memory))
            for kind, count in _gpus(gres):
                gpus, kinds = max(gpus, count), kinds | {kind}
    return Partition(
        name=said["PartitionName"],
        default=said.get("Default") == "YES",
        up=said.get("State") == "UP",
        limit=None if said.get("MaxTime", "") in UNSET else said["MaxTime"],
        grace_seconds=_first(said.get("GraceTime", "0")),
        preempt_mode=said.get("PreemptMode", "OFF"),
        tier=_first(said.get("PriorityTier", "1")),
        nodes=_first(said.get("TotalNodes", "0")),
        cpus=cpus,
        memory_mb=memory,
        gpus=gpus,
        gpu_type=next(iter(kinds)) if len(kinds) == 1 else "",
    )


def _gpus(gres: str) -> Iterator[tuple[str, int]]:
    """Kind and number of a node's GPUs, as in gpu:2, gpu:h200:8(S:0-1)."""
    for match in re.finditer(r"\bgpu(?::([^:,()\s]*[A-Za-z_][^:,()\s]*))?:(\d+)", gres):
        yield match[1] or "", int(match[2])


def _first(text: str) -> int:
    match = re.match(r"\d+", text)
    return int(match[0]) if match else 0
