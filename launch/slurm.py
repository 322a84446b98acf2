"""Questions to Slurm, in its own commands; none of them needs its accounting."""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from launch import render
from launch.compose import CHECKOUT
from synthos.schema import JobConfig

UNTOLD = ("Unknown", "NONE", "None")  # of a time
TIMEOUT_SECONDS = 60  # a busy controller answers late
# What a job can no longer leave: man squeue, JOB STATE CODES.
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip


@dataclass(frozen=True)
class Queued:
    """A job in the queue, as squeue tells."""

    job: str
    state: str  # as in PENDING, RUNNING
    detail: str  # its nodes, or why it is pending


def queued(job: str) -> Queued | None:
    """What the queue knows of a job; None once it has ended. Raises RuntimeError where Slurm does not answer."""
    done = ask(["squeue", "--noheader", f"--jobs={job}", "--format=%T|%N|%r", "--states=all"])
    if done.returncode and "Invalid job id" not in done.stderr:
        raise RuntimeError(f"squeue: {words(done.stderr)}")
    for line in done.stdout.splitlines():
        state, nodes, reason = line.split("|")
        if state not in ENDED:
            return Queued(job, state, nodes or reason)
    return None


@dataclass(frozen=True)
class Job:
    """A job as the controller tells of it.

    Attributes:
        state: as in RUNNING; COMPLETING as soon as it is cancelled or requeued, while its processes still end.
        reason: TimeLimit once that has ended it; as in BeginTime while it waits.
        restarts: how often it was requeued.
        preempted: it is to make room for another job.
        begins, ends: when it began, and when its time limit is reached, in this machine's time zone; None where that
            is not known, or there is none.
        nodes: how many it has left; None where that is not told.
    """

    state: str
    reason: str
    restarts: int
    preempted: bool
    begins: datetime | None
    ends: datetime | None
    nodes: int | None


def show(job: str) -> Job:
    """What the controller tells of a job. Raises RuntimeError where it tells nothing."""
    done = ask(["scontrol", "--oneliner", "show", "job", job])
    facts = dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
    if done.returncode or "JobState" not in facts:
        raise RuntimeError(f"scontrol show job {job}: {words(done.stderr)}")
    begins, ends = (facts.get(key, "Unknown") for key in ("StartTime", "EndTime"))
    return Job(
        state=facts["JobState"],
        reason=facts["Reason"],
        restarts=int(facts["Restarts"]),
        preempted=facts.get("PreemptTime", "None") != "None",
        begins=None if begins in UNTOLD else datetime.fromisoformat(begins),
        ends=None if ends in UNTOLD else datetime.fromisoformat(ends),
        nodes=int(facts["NumNodes"].split("-")[0]) if "NumNodes" in facts else None,
    )


def down(nodes: Sequence[str]) -> list[str]:
    """Those of `nodes` that are out of service, or don't answer; none where Slurm can't be asked here."""
    if not nodes or not shutil.which("sinfo"):
        return []
    try:
        done = ask(["sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N %T"])
    except RuntimeError:
        return []
    states = dict(line.split() for line in done.stdout.splitlines())
    return [node for node in nodes if re.match(r"(down|fail|error|unknown)|.*\*", states.get(node, ""))]


def look(config: JobConfig, folder: Path) -> tuple[list[str], list[str]]:
    """What keeps Slurm from taking the job of the run in `folder`, which need not exist; what else it says of it.

    What is not to be had only now, because nodes are down or a partition is closed for a while, is no obstacle: such a
    job may wait in the queue.
    """
    if config.cluster.backend not in ("submitit", "sbatch"):
        return [], []
    if not shutil.which("sbatch"):
        needs = (
            f"cluster: {config.cluster.name} needs sbatch, which is not on PATH; submit from a login node of your "
            "cluster, or use cluster=local nodes=1 on this machine"
        )
        return ([needs] if config.cluster.backend == "submitit" else []), []  # by hand it may be elsewhere
    try:
        taken, answer = would_take(config, folder)
        too_much = [] if taken else [*_too_much(config)]
    except RuntimeError as error:
        return [f"cluster: {error}"], []
    if re.search("configuration source|Unable to contact", answer):
        return [f"cluster: no Slurm controller answers here (cluster=local trains on this machine): {answer}"], []
    if taken or (not too_much and re.search("not available|busy", answer)):
        return [], [f"Slurm: {answer}", *_short_grace(config, folder)]
    return [*too_much, f"cluster: Slurm would not take this job: {answer}"], []


def _short_grace(config: JobConfig, folder: Path) -> Iterator[str]:
    """A warning where a preemption, which gives GraceTime and KillWait, is sooner over than the last save was."""
    save, partition = render.save_seconds(folder), config.cluster.partition
    if save is None:
        return
    shown = ask(["scontrol", "show", "partition", *([partition] if partition else [])]).stdout
    preempts = [int(seconds) for seconds in re.findall(r"GraceTime=(\d+)", shown)]
    site = ask(["scontrol", "show", "config"]).stdout
    waits = re.search(r"KillWait\s*=\s*(\d+)", site)
    seconds = min(preempts, default=0) + (int(waits[1]) if waits else 0)
    never = re.search(r"PreemptType\s*=\s*(preempt/none|\(null\))", site)
    if save > seconds and not never:
        yield (
            f"a preemption leaves {seconds} s (GraceTime and KillWait), and the last save took {save:.0f} s: what is "
            "not saved is trained again; a smaller checkpoint.every makes that less"
        )


def others(config: JobConfig, bad: Sequence[str]) -> int | None:
    """How many nodes there are besides the `bad` and those that the config excludes that a job of it could have, up or
    down; None where Slurm can't be asked here.
    """
    excluded = ",".join(str(node) for node in (config.cluster.sbatch.get("exclude"), *bad) if node)
    partition = config.cluster.partition or os.environ.get("SLURM_JOB_PARTITION")
    only = [f"--partition={partition}"] if partition else []
    try:
        known = order(["sinfo", "--noheader", "--Node", "--format=%N %f %G", *only])
        left_out = order(["scontrol", "show", "hostnames", excluded]).split()
    except RuntimeError:
        return None
    nodes = [[*line.split(maxsplit=2), "", ""][:3] for line in known.splitlines()]
    return len({name for name, features, gres in nodes if _serves(config, features, gres)} - set(left_out))


def _serves(config: JobConfig, features: str, gres: str) -> bool:
    """Whether a node has the features that the constraint asks for, by its words and signs & and |, and the GPUs."""
    cluster, has = config.cluster, features.split(",")
    ways = [re.findall(r"[\w.-]+", way) for way in (cluster.constraint or "").split("|")]
    kind = f":{re.escape(cluster.gpu_type)}" if cluster.gpu_type else r"(?::[^:,()\s]+)?"
    gpus = sum(int(count) for count in re.findall(rf"\bgpu{kind}:(\d+)", gres))
    return any(set(way) <= set(has) for way in ways) and (not cluster.gpu_flag or gpus >= config.gpus_per_node)


def _too_much(config: JobConfig) -> Iterator[str]:
    """What is asked for beyond all that the partition has, nodes that are down included."""
    cluster = config.cluster
    where = f"partition {cluster.partition}" if cluster.partition else "the cluster"
    only = [f"--partition={cluster.partition}"] if cluster.partition else []
    done = ask(["sinfo", "--noheader", "--format=%D %G", *only])
    groups = [line.split(maxsplit=1) for line in done.stdout.splitlines()] if done.returncode == 0 else []
    nodes = sum(int(count) for count, _ in groups)
    if only and 0 < nodes < config.nodes:  # of several partitions, sinfo counts a node once for each
        yield f"nodes: {config.nodes} are more than {where} has, {nodes}"
    counts = [int(n) for _, gres in groups for n in re.findall(r"\bgpu(?::[^:,()\s]+)?:(\d+)", gres)]
    if cluster.gpu_flag and counts and max(counts) < config.gpus_per_node:
        yield f"gpus_per_node: {config.gpus_per_node} is more than a node of {where} has, {max(counts)}"


def would_take(config: JobConfig, folder: Path) -> tuple[bool, str]:
    """Whether Slurm would take the job, and its own words, which tell where and when it would start."""
    by_hand = config.cluster.backend == "sbatch"
    command = render.sbatch(config, folder) if by_hand else ["sbatch"]
    if by_hand:  # the run may have no code yet
        command[-2] = str(CHECKOUT / "slurm" / "train.sbatch")
    script = "" if by_hand else render.batch_script(config, folder)
    done = ask([command[0], "--test-only", *command[1:]], script, render.clean(config.cluster, os.environ))
    return done.returncode == 0, words(done.stderr or done.stdout)


def words(text: str) -> str:
    """What a Slurm command says, in one line, without its own name in front."""
    lines = [
        re.sub(r"^(sbatch|squeue|srun|scontrol): (error: )?", "", line.strip()) for line in text.strip().splitlines()
    ]
    return "; ".join(line for line in lines if line)


def order(command: list[str], environment: dict[str, str] | None = None) -> str:
    """Have Slurm do something; returns what it prints. Raises RuntimeError, in its words, where it does not."""
    done = ask(command, environment=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])}: {words(done.stderr or done.stdout)}")
    return done.stdout.strip()


def ask(
    command: list[str], stdin: str = "", environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command. Raises RuntimeError where it is not there or does not answer."""
    plain = {**(os.environ if environment is None else environment), "SLURM_TIME_FORMAT": "standard"}
    try:
        return subprocess.run(command, input=stdin, env=plain, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not on PATH on {socket.gethostname()}") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} did not answer in {TIMEOUT_SECONDS} s") from None
