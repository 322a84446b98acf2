"""Questions to Slurm, in its own commands; none of them needs its accounting."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch import render
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


def newest_job(folder: Path) -> Queued | None:
    """The job that was last submitted for a run, while it is in the queue."""
    path = folder / "slurm" / "job"
    return queued(path.read_text()) if path.is_file() and shutil.which("squeue") else None


def look(config: JobConfig, folder: Path) -> tuple[list[str], list[str]]:
    """What keeps Slurm from taking the job of the run in `folder`, which need not exist; what else it says of it."""
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
        others = [] if taken else [*_too_many_gpus(config)]
    except RuntimeError as error:
        return [f"cluster: {error}"], []
    if taken:
        return [], [f"Slurm: {answer}"]
    return [*others, f"cluster: Slurm would not take this job: {answer}"], []


def _too_many_gpus(config: JobConfig) -> Iterator[str]:
    """Of all refusals the one whose key can be told."""
    gpus = gpus_of_a_node(config.cluster.partition) if config.cluster.gpu_flag else None
    if gpus is not None and gpus < config.gpus_per_node:
        where = f"partition {config.cluster.partition}" if config.cluster.partition else "this cluster"
        yield f"gpus_per_node: {config.gpus_per_node} is more than a node of {where} has, {gpus}"


def would_take(config: JobConfig, folder: Path) -> tuple[bool, str]:
    """Whether Slurm would take the job, and its own words, which tell where and when it would start."""
    by_hand = config.cluster.backend == "sbatch"
    command = render.sbatch(config, folder) if by_hand else ["sbatch"]
    command = [*render.clean(config.cluster, os.environ), command[0], "--test-only", *command[1:]]
    done = ask(command, stdin="" if by_hand else render.batch_script(config, folder))
    return done.returncode == 0, words(done.stderr or done.stdout)


def gpus_of_a_node(partition: str | None) -> int | None:
    """Most GPUs that a node of the partition has, or of the whole cluster; None where Slurm does not tell."""
    only = [f"--partition={partition}"] if partition else []
    done = ask(["sinfo", "--noheader", "--format=%G", *only])
    counts = [int(n) for n in re.findall(r"\bgpu(?::[^:,()\s]+)?:(\d+)", done.stdout)]
    return max(counts, default=None) if done.returncode == 0 else None


def words(text: str) -> str:
    """What a Slurm command says, in one line, without its own name in front."""
    lines = [re.sub(r"^(sbatch|squeue|srun): (error: )?", "", line.strip()) for line in text.strip().splitlines()]
    return "; ".join(line for line in lines if line)


def ask(command: list[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a Slurm command. Raises RuntimeError where it does not answer."""
    try:
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} did not answer in {TIMEOUT_SECONDS} s") from None
