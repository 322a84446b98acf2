"""Before the ranks start: each node says what it is, and the first decides whether they are fit to train together.

Every agent writes `preflight/node-<k>.json` into the folder of its attempt, which no other attempt ever has; that the
first agent reads it, and all of them its answer `preflight.json`, shows that they share the folder. Without torch.
"""

import math
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch import attempts, provenance, slurm, snapshot
from launch.decision import bad_nodes
from launch.gpus import RELEASE_SECONDS, gpu_faults
from launch.place import Meeting, Place, allowed_cores
from synthos.files import read_json, write_json
from synthos.run import arrivals, collective_file, write_verdict
from synthos.schema import JobConfig

Facts = dict[str, Any]  # node-<k>.json

NODES_SECONDS = 300  # for what the other nodes say: srun starts all agents at once, but a shared folder may be late
ANSWER_SECONDS = NODES_SECONDS + 180  # for what the first says, which may itself have to wait for its GPUs
SKEW_SECONDS = (1, 60)  # between two clocks: from the first on it is said, beyond the second the node is unfit
ARRIVAL_SECONDS = 540  # for all ranks to have imported everything; torchrun's own patience is 600
COLLECTIVE_SECONDS = 180  # for their first collective, once all are there
SAME = ("code", "python", "torch")
UNNAMED = re.compile(r"node \d+")


@dataclass(frozen=True)
class Findings:
    """What was found on the nodes of an attempt.

    Attributes:
        faults: by the name of a node, why it is unfit.
        differences: between the nodes, which are no node's fault.
        warnings: what is worth a word.
        bad_nodes: those to be avoided: the ones with faults, unless it is all of several, which shows another cause.
    """

    faults: dict[str, list[str]] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    bad_nodes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not (self.faults or self.differences)

    @property
    def message(self) -> str:
        told = [*self.differences, *(f"{name}: {', '.join(lines)}" for name, lines in self.faults.items())]
        return f"preflight: {'; '.join(told)}"


def check(folder: Path, config: JobConfig, place: Place, meeting: Meeting, signals: Sequence[Any]) -> Findings:
    """Whether the ranks of this attempt may start; on the first agent, else only what it has found.

    A failure is its attempt's verdict already. A signal to stop ends the waiting, and who was not seen by then is not
    judged: the ranks start, and hear of it in their first step.

    Raises TimeoutError where the first agent does not answer.
    """
    heard, began = time.time(), time.monotonic()
    own = arrivals(folder, meeting.attempt)
    if place.task == 0:
        own.mkdir(exist_ok=True)
        write_json(own / f"node-{place.node}.json", examine(folder, config, place, heard))
    answer = attempts.attempt_folder(folder, meeting.attempt) / "preflight.json"
    if not place.first:
        return _await(answer, place, signals)
    nodes = _gather(own, place, meeting.time, signals)
    names = _names(folder, place)
    absent = [] if signals else [names[index] for index in range(place.nodes) if index not in nodes]
    shunned = _shunned(folder, config) if place.job else ()
    for node in nodes.values():
        node["faults"] += ["it has failed under this run before"] if node["name"] in shunned else []
    found = judge(nodes, absent, scheduled=bool(place.job))
    if not found.passed:
        # Different code or packages would be found again, with whatever nodes.
        cause = "config" if found.differences else "preflight"
        write_verdict(folder, _failed(meeting.attempt, cause, found.message, found.bad_nodes))
    seconds = round(time.monotonic() - began, 3)
    write_json(
        answer,
        {**asdict(found), "passed": found.passed, "seconds": seconds, "nodes": [nodes[n] for n in sorted(nodes)]},
    )
    return found


def _shunned(folder: Path, config: JobConfig) -> Sequence[str]:
    """The nodes to be excluded that Slurm, which starts a job again after a lost node, was not told of.

    None where too few others would be left: a job that nobody could start would wait for ever.
    """
    bad = bad_nodes(attempts.records(folder)[:-1])
    others = slurm.others(config, bad) if bad else None
    return bad if others is not None and others >= config.nodes else ()


def examine(folder: Path, config: JobConfig, place: Place, heard: float) -> Facts:
    """What this node says of itself; `heard` is its clock when it saw that the attempt had begun."""
    machine, allowed = provenance.environment_facts(), allowed_cores()
    asked = int(os.environ.get("SLURM_CPUS_PER_TASK", "0")) if place.job else 0
    few = [f"bound to {allowed} CPUs of the {asked} that it asked for: everything will be slow"]
    return {
        "name": os.environ.get("SLURMD_NODENAME", socket.gethostname()) if place.job else socket.gethostname(),
        "node": place.node,
        "time": heard,
        "code": snapshot.tree_name(folder),
        "python": machine["python"],
        "torch": machine["torch"],
        "cpus": allowed,
        # On a machine of its own nobody is about to leave.
        "faults": gpu_faults(config.cluster, config.gpus_per_node, os.environ, RELEASE_SECONDS if place.job else 0),
        "warnings": few if allowed < asked else [],
    }


def judge(nodes: Mapping[int, Facts], absent: Sequence[str], scheduled: bool = True) -> Findings:
    """What all nodes together show.

    Args:
        nodes: what each said, by its index, with `ahead`, the seconds that its clock is ahead of the first's at least.
        absent: the names of those that said nothing.
        scheduled: others may be had. Where there is only this machine, its faults are worth a word and no more.
    """
    facts = [nodes[index] for index in sorted(nodes)]
    faults = {str(node["name"]): list(node["faults"]) for node in facts}
    warnings = [f"{node['name']}: {line}" for node in facts for line in node["warnings"]]
    for name, seconds in _skews(facts):
        line = f"its clock is at least {abs(seconds):.0f} s {'ahead' if seconds > 0 else 'behind'}"
        if abs(seconds) > SKEW_SECONDS[1]:
            faults[name].append(line)
        elif abs(seconds) > SKEW_SECONDS[0]:
            warnings.append(f"{name}: {line}")
    faults |= {name: [f"not seen in the shared folder for {NODES_SECONDS} s"] for name in absent}
    faults = {name: lines for name, lines in faults.items() if lines}
    if not scheduled:
        warnings += [f"{name}: {line}" for name, lines in faults.items() for line in lines]
        faults = {}
    return Findings(faults, [*_differences(facts)], warnings, _avoid([*faults], len(nodes) + len(absent)))


def _skews(facts: Sequence[Facts]) -> Iterator[tuple[str, float]]:
    """Clocks that differ from the first's; where most do, it is the first's that is wrong. Of two, either may be."""
    first, others = facts[0], facts[1:]
    wrong = [node for node in others if abs(node["ahead"]) > SKEW_SECONDS[0]]
    if len(wrong) == len(others) == 1:
        yield from ((first["name"], -wrong[0]["ahead"]), (wrong[0]["name"], wrong[0]["ahead"]))
    elif len(wrong) > 1 and 2 * len(wrong) > len(others):
        yield first["name"], -sorted(node["ahead"] for node in wrong)[len(wrong) // 2]
    else:
        yield from ((node["name"], node["ahead"]) for node in wrong)


def _differences(facts: Sequence[Facts]) -> Iterator[str]:
    for key in SAME:
        holders: dict[str, list[str]] = {}
        for node in facts:
            holders.setdefault(str(node[key]), []).append(str(node["name"]))
        if len(holders) > 1:
            listed = ", ".join(f"{value[:12]} on {' and '.join(names)}" for value, names in holders.items())
            yield f"{key} is not the same everywhere: {listed}"


def _failed(attempt: int, cause: str, message: str, bad_nodes: Sequence[str]) -> dict[str, Any]:
    """The verdict of an attempt that ends here."""
    said = {"message": message, "bad_nodes": [*bad_nodes]}
    return {"status": "failed", "cause": cause, "step": None, "attempt": attempt, **said}


def _avoid(bad: Sequence[str], nodes: int) -> list[str]:
    """Those of the `bad` nodes to be excluded: not all of several, and none whose name only Slurm knows."""
    return [] if nodes > 1 and len(bad) == nodes else [name for name in bad if not UNNAMED.fullmatch(name)]


def _gather(own: Path, place: Place, sent: float, signals: Sequence[Any]) -> dict[int, Facts]:
    """What the nodes say, by index, as far as it comes; the first's clock showed `sent` when it called them."""
    nodes: dict[int, Facts] = {}
    deadline = time.monotonic() + NODES_SECONDS
    while True:
        present = {path.name for path in own.iterdir()}
        for index in set(range(place.nodes)) - set(nodes):
            if f"node-{index}.json" in present:
                node, seen = read_json(own / f"node-{index}.json"), time.time()
                # It looked at its clock after it was called and before it was seen; what lies outside is wrong.
                late = 0.0 if index == 0 else max(node["time"] - seen, 0.0) - max(sent - node["time"], 0.0)
                nodes[index] = {**node, "ahead": round(late, 3)}
        if len(nodes) == place.nodes or signals or time.monotonic() > deadline:
            return nodes
        time.sleep(0.1)


def _await(answer: Path, place: Place, signals: Sequence[Any]) -> Findings:
    deadline = time.monotonic() + ANSWER_SECONDS
    while not (said := read_json(answer)) and not signals:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"node {place.node} ({socket.gethostname()}) saw no answer of node 0 in {answer} for {ANSWER_SECONDS} s"
            )
        time.sleep(0.2)
    return Findings(**{key: said[key] for key in Findings.__dataclass_fields__}) if said else Findings()


def unseen(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """The nodes of an attempt whose agents did not begin: of them the folder shows nothing."""
    number, names = record["attempt"], record["nodes"]
    own = arrivals(folder, number)
    if not own.is_dir():
        return []
    absent = [name for index, name in enumerate(names) if not (own / f"node-{index}.json").exists()]
    return _avoid(absent, len(names))


def watch(folder: Path, config: JobConfig, place: Place, attempt: int) -> Callable[[], None] | None:
    """What the first agent looks after until all ranks have met; one rank meets nobody."""
    if not place.first or config.ranks == 1:
        return None
    return Watch(folder, attempt, _names(folder, place), config.gpus_per_node).look


def _names(folder: Path, place: Place) -> list[str]:
    """Of all nodes, by index; without scontrol the record holds none but its own."""
    names = attempts.newest_record(folder)["nodes"]
    return names if len(names) == place.nodes else [f"node {index}" for index in range(place.nodes)]


@dataclass
class Watch:
    """Ends ranks that wait for each other for ever, from outside: a collective that hangs can't end itself.

    Attributes:
        folder: of the run.
        attempt: its number.
        nodes: their names.
        ranks: on each node.
        began: when the ranks were started.
        together: when all of them had come.
        over: there is nothing more to look after.
    """

    folder: Path
    attempt: int
    nodes: Sequence[str]
    ranks: int
    began: float = field(default_factory=time.monotonic)
    together: float = math.inf
    over: bool = False

    @property
    def patience_seconds(self) -> int:
        """With the first collective: every rank connects to every other."""
        return COLLECTIVE_SECONDS * (1 + self.ranks * len(self.nodes) // 128)

    def look(self) -> None:
        """See how far they are; too late, it leaves the verdict of an attempt that has failed."""
        if self.over or read_json(collective_file(self.folder, self.attempt)):
            self.over = True
            return
        came = self._came()
        late = {name: count for name, count in came.items() if count < self.ranks}
        now = time.monotonic()
        if not late:
            self.together = min(self.together, now)
        if now < (self.began + ARRIVAL_SECONDS if late else self.together + self.patience_seconds):
            return
        if late:
            few = ", ".join(f"{count} of {self.ranks} on {name}" for name, count in late.items())
            message, bad = f"ranks that came to the first collective: {few}", _avoid([*late], len(self.nodes))
        else:  # of several nodes, none can be told from the others
            message = f"the first collective hung for {self.patience_seconds} s, after all ranks had come to it"
            bad = [*self.nodes] if len(self.nodes) == 1 else []
        write_verdict(self.folder, _failed(self.attempt, "preflight", message, bad))
        self.over = True

    def _came(self) -> dict[str, int]:
        """How many ranks of each node have come."""
        own = arrivals(self.folder, self.attempt)
        indexes = [path.name.split("-")[1] for path in own.iterdir() if path.name.startswith("rank-")]
        return {name: indexes.count(str(index)) for index, name in enumerate(self.nodes)}
