"""What Slurm is told of a job: flags, the batch script, the line for sbatch by hand.

Pure functions, but that the measured time of a save, and which nodes failed, are read from the run folder; where some
did, Slurm is asked whether enough others are left.
"""

import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.compose import CHECKOUT
from launch.decision import bad_nodes
from synthos.files import read_heartbeat, read_json
from synthos.schema import ClusterConfig, JobConfig

# Flags that a job depends on, or that would make another kind of job of it.
NOT_TO_SET = """
    array chdir error export export-file input job-name ntasks open-mode output parsable signal test-only wait wrap
"""
Flags = dict[str, str]  # long name -> value; empty for a bare flag
OWN_KEYS = {  # flags that have a key of their own
    "nodes": "nodes",
    "ntasks-per-node": "gpus_per_node",
    "partition": "cluster.partition",
    "account": "cluster.account",
    "qos": "cluster.qos",
    "constraint": "cluster.constraint",
    "gpus-per-node": "gpus_per_node and cluster.gpu_type",
    "cpus-per-task": "cluster.cpus_per_rank",
    "mem": "cluster.mem",
    "time": "cluster.time",
}
# Variables of the submitting shell that a job may need and that hold no secret.
TRAVELS = """
    HOME USER LOGNAME SHELL PATH LANG LC_ALL LC_CTYPE TZ LD_LIBRARY_PATH MODULEPATH MODULESHOME LMOD_CMD
    LMOD_DIR LMOD_PKG BASH_ENV CUDA_HOME CUDA_PATH VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV XDG_CACHE_HOME HF_HOME
    HF_HUB_CACHE HF_HUB_OFFLINE TORCH_HOME SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE SLURM_CONF
"""
NOTICE_SECONDS = 300  # at least: who sets less knows the site
DECISION_SECONDS = 60  # before the limit, for launch.requeue: Slurm requeues no job that has reached it
NOTICE = "SYNTHOS_NOTICE_SECONDS"  # which this job was submitted with: its run may have been measured anew since
RESTART = 75  # exit code of launch.requeue: once more, in this allocation; EX_TEMPFAIL of sysexits.h
NOTHING_LEFT = 3  # of launch.requeue --chain
ATTEMPTS = """
attempts() {{
    # Slurm's signals reach the ranks by srun. This shell outlives them, to have it decided what comes next; a handler
    # that does nothing, because what a shell ignores its commands ignore too.
    trap : TERM CONT USR2
    while true; do
        "$@" &
        while wait $!; kill -0 $! 2>/dev/null; do :; done
        next=0
        (trap '' TERM USR2; exec {code} {run}) || next=$?
        ((next == {again})) || exit $next
    done
}}
"""
CHAIN = "{code} --chain {run} || exit $(($? == {nothing_left} ? 0 : 1))"


def flags(config: JobConfig, folder: Path) -> Flags:
    """Every sbatch flag of a job whose run folder is `folder`; `cluster.sbatch` has the last word."""
    cluster = config.cluster
    ours: dict[str, str | None] = {
        "job-name": folder.name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "nodes": str(config.nodes),
        "ntasks-per-node": str(tasks_per_node(config)),
        **_gpus(config),
        "cpus-per-task": str(cpus) if (cpus := cpus_per_task(config)) else None,
        "mem": cluster.mem,
        "time": cluster.time,
        "signal": f"USR2@{planned_notice(config, folder)}",
        # By it Slurm itself starts a job again after a failed node; a successor would be a second one.
        "requeue" if cluster.requeue == "scontrol" else "no-requeue": "",
        "chdir": str(CHECKOUT),
        "output": str(output(folder)),
        "open-mode": "append",
    }
    ours |= {key: _text(value) for key, value in cluster.sbatch.items()}
    ours["exclude"] = excluded(config, folder)
    return {key: value for key, value in ours.items() if value is not None}


def excluded(config: JobConfig, folder: Path) -> str | None:
    """The nodes that a job may not get: those of the config, and those that failed under the run too often, unless too
    few others would be left, as far as Slurm tells: who waited for them would wait for ever.
    """
    from launch import slurm  # not above: it renders

    records = [read_json(path) for path in (folder / "attempts").glob("[0-9]*/attempt.json")]
    bad = bad_nodes(records)
    if bad and (others := slurm.others(config, bad)) is not None and others < config.nodes:
        bad = ()
    return ",".join(filter(None, [_text(config.cluster.sbatch.get("exclude")), *bad])) or None


def planned_notice(config: JobConfig, folder: Path) -> int:
    """The notice that a job of a run folder is submitted with."""
    return notice_seconds(config.cluster, save_seconds(folder))


def seconds_to_save(notice: float) -> float:
    """How long ranks may go on after a notice: what follows needs the rest of the time before the limit."""
    return notice - min(DECISION_SECONDS, notice / 2)


def notice_seconds(cluster: ClusterConfig, save: float | None = None) -> int:
    """How long before the limit a job hears of it: the config's word, or by the seconds that a `save` took.

    Two saves, since one may be under way, a minute for the step and for what is slow on a bad day, and the time that
    what follows needs. But half of the limit at most, or nothing would be trained.
    """
    if cluster.notice_seconds is not None:
        return cluster.notice_seconds
    wanted = max(NOTICE_SECONDS, math.ceil(60 + 2 * (save or 0) + DECISION_SECONDS))
    limit = limit_seconds(cluster.time or "")
    return wanted if limit is None else min(wanted, limit // 2)


def limit_seconds(time: str) -> int | None:
    """Seconds of a Slurm time limit (man sbatch, --time); None for what is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:  # minutes, minutes:seconds
        numbers = [0, *numbers]
    hours, minutes, seconds = [*numbers, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def save_seconds(folder: Path) -> float | None:
    """How long the last checkpoint of a run took, where one has been measured."""
    seconds = read_heartbeat(folder).get("save_seconds")
    return None if seconds is None else float(seconds)


def tasks_per_node(config: JobConfig) -> int:
    """One agent, or one task per rank where torchrun may not be used."""
    return config.gpus_per_node if config.cluster.launcher == "srun" else 1


def cpus_per_task(config: JobConfig) -> int | None:
    """Cores of one task; None: the site's default."""
    each = config.cluster.cpus_per_rank
    return None if each is None else each * config.gpus_per_node // tasks_per_node(config)


def output(folder: Path, job: str = "%j") -> Path:
    """What a job prints; Slurm puts its id for %j."""
    return folder / "slurm" / f"{job}.out"


def batch_script(config: JobConfig, folder: Path) -> str:
    """The script that submitit submits. It does what `slurm/train.sbatch` does, in an environment that is clean."""
    lines = [
        f"#SBATCH {flag(key, value and shlex.quote(value))}" for key, value in sorted(flags(config, folder).items())
    ]
    told = f'echo -n "$SLURM_JOB_ID" >{shlex.quote(str(folder / "slurm" / "job"))}'
    command = shlex.join([*srun(config), python(config.cluster), "-u", "-m", "launch.agent", str(folder)])
    run = [*config.cluster.setup, *enter(folder), *attempts(config, folder), f"attempts {command}", ""]
    return "\n".join(["#!/bin/bash", *lines, "", "set -eo pipefail", told, *run])


def attempts(config: JobConfig, folder: Path, notice: int | None = None) -> list[str]:
    """The shell function that runs its arguments, srun and its command, once for each attempt of this allocation."""
    told = f"export {NOTICE}={planned_notice(config, folder) if notice is None else notice}"
    code, run = shlex.join([python(config.cluster), "-m", "launch.requeue"]), shlex.quote(str(folder))
    chain = [CHAIN.format(code=code, run=run, nothing_left=NOTHING_LEFT)] if config.cluster.requeue == "chain" else []
    return ["", told, *chain, ATTEMPTS.format(code=code, run=run, again=RESTART).strip(), ""]


def sbatch_line(config: JobConfig, folder: Path, environment: Mapping[str, str]) -> str:
    """The whole line to type where submitit is not used. It starts `slurm/train.sbatch`, in a clean environment."""
    return typed(config.cluster, sbatch(config, folder), environment)


def typed(cluster: ClusterConfig, command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The line by which a person gives a command in a clean environment."""
    names = [f'{name}="${name}"' for name in travelling(cluster, environment)]
    return " ".join(["env -i", *names, shlex.join(command)])


def sbatch(config: JobConfig, folder: Path) -> list[str]:
    """The sbatch command that starts `slurm/train.sbatch`."""
    given = [flag(key, value) for key, value in flags(config, folder).items()]
    return ["sbatch", *given, str(folder / "code" / "slurm" / "train.sbatch"), str(folder)]


def enter(folder: Path) -> list[str]:
    """Shell lines, after those of the site: from here on it is the run's code that is imported, wherever they went."""
    code = shlex.quote(str(folder / "code"))
    return [f"cd {code}", f'export PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}"']


def job_file(config: JobConfig, folder: Path, notice: int | None = None) -> str:
    """What `slurm/train.sbatch` reads in the run folder: set-up lines, srun's flags, interpreter, cores, `attempts`.

    `notice` is that of the job's submission, where it is not the run's own.
    """
    cluster = config.cluster
    lines = [f"cd {shlex.quote(str(CHECKOUT))}", *cluster.setup, f"SRUN=({shlex.join(srun(config))})"]
    values = [f"PYTHON={shlex.quote(python(cluster))}", f"CPUS={cpus_per_task(config) or ''}"]
    return "\n".join([*lines, *enter(folder), *values, *attempts(config, folder, notice)])


def srun(config: JobConfig) -> list[str]:
    """srun without its command. Since Slurm 22.05 it does not inherit sbatch's --cpus-per-task.

    Not --unbuffered: it gives every task a terminal, for which progress bars would be drawn into the log.
    """
    cpus = cpus_per_task(config)
    repeated = [f"--cpus-per-task={cpus}"] if cpus else []
    return ["srun", "--kill-on-bad-exit=1", *repeated]


def clean(cluster: ClusterConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """What a job gets of `environment`: no secret, and nothing of a job that this shell itself is part of."""
    return {name: environment[name] for name in travelling(cluster, environment)}


def travelling(cluster: ClusterConfig, environment: Mapping[str, str]) -> list[str]:
    """The names of the variables of `environment` that a job gets."""
    return [name for name in dict.fromkeys([*TRAVELS.split(), *cluster.environment]) if name in environment]


def python(cluster: ClusterConfig) -> str:
    return cluster.python or sys.executable


def _gpus(config: JobConfig) -> dict[str, str | None]:
    cluster = config.cluster
    if cluster.gpu_flag is None:
        return {}
    kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
    return {cluster.gpu_flag: f"{'gpu:' if cluster.gpu_flag == 'gres' else ''}{kind}{config.gpus_per_node}"}


def flag(key: str, value: str) -> str:
    """A flag as sbatch takes it."""
    return f"--{key}={value}" if value else f"--{key}"


def _text(value: object) -> str | None:
    if value is None or value is False:
        return None
    return "" if value is True else str(value)
