"""`synthos explain`: why a run waits, when it is expected to start, and what will happen at its end."""

import dataclasses
from pathlib import Path
from statistics import median
from typing import Any

from launch import slurm, squeue
from launch.look import Look, look, step_rates
from launch.outlook import Ending, endings
from launch.render import notice_seconds, save_seconds
from launch.runs import find_one
from launch.site import read_site
from launch.tell import console, duration, new_parser, print_json, table, warn
from synthos.schema import JobConfig, RunConfig, read_job

# Slurm's words for why a job is pending (man squeue, JOB REASON CODES).
REASONS = {
    "None": "Slurm has not looked at it yet",
    "Priority": "jobs of a higher priority come first",
    "Resources": "it is next, and the nodes it asks for are busy",
    "BeginTime": "it may not start before its begin time; after a requeue that is about two minutes",
    "Dependency": "it waits for another job to end",
    "DependencyNeverSatisfied": "the job that it waits for ended in another way; cancel it",
    "JobHeldUser": "a person holds it: scontrol release lets it go",
    "JobHeldAdmin": "an administrator holds it",
    "ReqNodeNotAvail": "a node that it asks for is down, drained or reserved",
    "Reservation": "it waits for its reservation",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition takes jobs, and starts none now",
    "PartitionNodeLimit": "it asks for more nodes than its partition allows: it will never start so",
    "PartitionTimeLimit": "it asks for more time than its partition allows: it will never start so",
    "PartitionConfig": "it asks for what no node of its partition has: it will never start so",
    "BadConstraints": "no node has what it asks for: it will never start so",
    "AssociationJobLimit": "your account has as many jobs as it may",
    "AssocGrpGRES": "your account uses as many GPUs as it may",
    "JobArrayTaskLimit": "as many jobs of its array run as may at a time",
    "NodeDown": "a node that it needs is down",
    "JobLaunchFailure": "it could not be started on its nodes, and was held",
    "Licenses": "licences are in use",
    "Cleaning": "what is left of its last start is being removed",
}  # fmt: skip
LIMITS = (
    ("QOS", "a limit of your quality of service"),
    ("Assoc", "a limit of your account"),
    ("MaxMem", "a limit of memory"),
)


def main(arguments: list[str]) -> int:
    """Explain a run; returns 1 where Slurm would have to say more and does not answer."""
    args = new_parser("explain", __doc__, "one").parse_args(arguments)
    folder = find_one(args.run)
    config = read_job(folder / "config.yaml")
    queue = squeue.ask([folder])
    one = look(folder, queue)
    jobs = queue.of(folder)
    said: dict[str, Any] = {"run": one.name, "state": one.state, "detail": one.detail, "job": one.job}
    problem = queue.problem
    if jobs and jobs[0].pending:
        said |= {"reason": jobs[0].reason, "why": reason(jobs[0].reason), "expected_start": jobs[0].begins or None}
    steps, saves = step_seconds(folder, config), save_seconds(folder)
    said |= {"step_seconds": steps, "save_seconds": saves}
    found: list[Ending] = []
    if config.cluster.backend in ("submitit", "sbatch") and not problem:
        try:
            site = read_site()
            notice = notice_seconds(config.cluster, saves)
            found = endings(site, site.partition(config.cluster.partition), notice, config.cluster.requeue)
            if one.state != "queued" and not one.alive:
                said["if_submitted"] = slurm.would_take(config, folder)[1]
        except RuntimeError as error:
            problem = str(error)
    said["endings"] = [dataclasses.asdict(e) | {"save_fits": e.fits(saves, steps)} for e in found]
    if args.json:
        print_json({**said, "slurm": problem})
    else:
        _print(one, config, said, found)
        if problem:
            warn(f"Slurm: {problem}")
    return int(bool(problem))


def reason(word: str) -> str:
    """Why a job is pending, in plain words."""
    if word in REASONS:
        return REASONS[word]
    for start, words in LIMITS:
        if word.startswith(start):
            return f"{words} is reached ({word})"
    return f"Slurm says {word}; see JOB REASON CODES of `man squeue`"


def step_seconds(folder: Path, config: JobConfig) -> float | None:
    """Median time of the newest steps; None before the first."""
    rates = step_rates(folder / "metrics.jsonl")
    return config.batch.size / median(rates) if rates and isinstance(config, RunConfig) else None


def _print(one: Look, config: JobConfig, said: dict[str, Any], found: list[Ending]) -> None:
    print(f"{one.name}: {one.state}" + (f", {one.detail}" if one.detail else ""))
    if "why" in said:
        print(f"job {one.job} waits: {said['why']}")
        print(f"expected start: {said['expected_start'] or 'Slurm has planned none yet'}")
    if "if_submitted" in said:
        print(f"if submitted now: {said['if_submitted']}")
    if config.cluster.backend in ("debug", "local"):
        print(f"no time limit and no preemption with cluster={config.cluster.name}; SIGTERM and Ctrl-C make it save")
    known = {"a step": said["step_seconds"], "a save": said["save_seconds"]}
    print(*(f"{what}: {'not measured yet' if s is None else f'{s:.2f} s'}" for what, s in known.items()), sep=", ")
    if found:
        rows = [(e.cause, e.words(), _fit(e, said)) for e in found]
        console().print(table(["its end by", "what arrives", "step and save fit"], rows))


def _fit(ending: Ending, said: dict[str, Any]) -> str:
    if not ending.signal:
        return "goes on from the newest checkpoint"
    fits = ending.fits(said["save_seconds"], said["step_seconds"])
    if fits is None:
        return "unknown until a checkpoint was saved"
    return (
        "yes"
        if fits
        else f"NO: within {duration(ending.seconds)}; the newest periodic checkpoint counts (checkpoint.every)"
    )
