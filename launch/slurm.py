"""Questions to Slurm, in its own commands; none of them needs its accounting."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch import render
from launch.compose import CHECKOUT
from synthos.schema import JobConfig

TIMEOUT_SECONDS = 60  # a busy controller answers late
# What a job can no longer leave: man squeue, JOB STATE CODES.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}


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


def job_of(folder: Path) -> Queued | None:
    """The job of a run, while it is in the queue, however it was submitted: known by its name and its output."""
    if not (folder / "slurm").is_dir() or not shutil.which("squeue"):  # never submitted, or Slurm is elsewhere
        return None
    listed = ask(["squeue", "--noheader", f"--name={folder.name}", "--format=%i", "--states=all"])
    if listed.returncode:
        raise RuntimeError(f"squeue: {words(listed.stderr)}")
    for job in listed.stdout.split():
        shown = ask(["scontrol", "show", "job", job]).stdout
        if f"StdOut={render.output(folder, job)}\n" in shown and (found := queued(job)):
            return found
    return None


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
        return [], [f"Slurm: {answer}"]
    return [*too_much, f"cluster: Slurm would not take this job: {answer}"], []


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
    lines = [re.sub(r"^(sbatch|squeue|srun): (error: )?", "", line.strip()) for line in text.strip().splitlines()]
    return "; ".join(line for line in lines if line)


def ask(
    command: list[str], stdin: str = "", environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command. Raises RuntimeError where it does not answer."""
    try:
        return subprocess.run(
            command, input=stdin, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} did not answer in {TIMEOUT_SECONDS} s") from None
