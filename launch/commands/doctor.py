"""`synthos doctor`: what this cluster does to jobs, and a page of configs/cluster/ for it."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from launch.check import FILE_NAME, FILE_NAME_WORDS, cluster_problems
from launch.compose import CONFIGS
from launch.outlook import Ending, endings
from launch.render import NOTICE_SECONDS, limit_seconds, notice_seconds
from launch.site import Partition, Site, read_site
from launch.tell import Undone, console, duration, new_parser, print_json, table
from synthos.schema import ClusterConfig, JobConfig
from synthos.strict import DUMPER, dump, load, read_yaml

TIME = "24:00:00"  # of a proposed page, where the partition allows it
SPARE_MEMORY = 0.95  # of a node's: the rest is the system's


def main(arguments: list[str]) -> int:
    """Read the cluster's settings, say what they mean for runs, and propose a page; --write NAME writes it."""
    parser = new_parser("doctor", __doc__)
    parser.add_argument("--partition", help="to propose a page for; default: the cluster's own default")
    parser.add_argument("--write", metavar="NAME", help="write configs/cluster/NAME.yaml")
    args = parser.parse_args(arguments)
    if args.write is not None and not FILE_NAME.fullmatch(args.write):
        raise ValueError(f"--write: {args.write!r} is not allowed; expected {FILE_NAME_WORDS}")
    try:
        site = read_site()
    except RuntimeError as error:
        raise Undone(error) from None
    partition = site.partition(args.partition) or (
        site.partitions[0] if site.partitions and not args.partition else None
    )
    if partition is None:
        names = ", ".join(one.name for one in site.partitions) or "none"
        raise ValueError(f"--partition: {args.partition!r} is unknown; allowed: {names}")
    name = args.write or site.name or "site"
    page = propose(site, partition, name)
    file = CONFIGS / "cluster" / f"{name}.yaml"
    if args.write is not None:
        if file.exists():
            raise ValueError(f"--write: {file} is there already; expected another name")
        file.write_text(render(site, page))
    ends = endings(site, partition, notice_seconds(page), page.requeue)
    found = findings(site, partition, ends)
    if args.json:
        print_json(_as_json(site, partition, page, ends, found, file if args.write else None))
    else:
        _print(site, partition, page, ends, found, file if args.write else None)
    return 0


def findings(site: Site, partition: Partition, ends: list[Ending]) -> list[str]:
    """What a person should know, a line each."""
    found = []
    if site.signals_reach_ranks:
        found.append("signals reach every process of a job: ranks hear of its end by themselves as well")
    else:
        found.append("signals reach only the process that srun started: our agent passes them on to the ranks")
    if site.number("JobRequeue") == 0:
        found.append("JobRequeue is 0: no job is requeued that does not ask for it; ours do, by sbatch --requeue")
    if size := site.number("MaxArraySize"):
        found.append(f"an array has at most {size:,} jobs")
    if not site.accounting:
        found.append("there is no accounting (sacct knows nothing): `synthos status` needs none")
    if partition.limit and (limit_seconds(partition.limit) or 0) < 3600:
        found.append(f"jobs of {partition.name} end after {partition.limit} at the latest")
    if not partition.gpus:
        found.append(f"nodes of {partition.name} have no GPU that Slurm knows of")
    for ending in ends:
        if ending.cause == "preemption" and ending.seconds < 60:
            found.append(
                f"preemption leaves {duration(ending.seconds)} to save (GraceTime {partition.grace_seconds} s + "
                f"KillWait {site.kill_wait_seconds} s): where a save takes longer, checkpoint.every says what is lost"
            )
    return found


def propose(site: Site, partition: Partition, name: str) -> ClusterConfig:
    """A page for a partition, on the pattern of configs/cluster/slurm.yaml. Raises ValueError if it would not do."""
    plain = read_yaml(CONFIGS / "cluster" / "slurm.yaml")
    limit = limit_seconds(partition.limit) if partition.limit else None
    short = limit is not None and limit < (limit_seconds(TIME) or 0)
    time = partition.limit if short and partition.limit else TIME
    most = (limit_seconds(time) or 0) // 4  # of the job, that it may spend on its end
    plain |= {
        "name": name,
        "partition": partition.name,
        "gpu_flag": "gpus-per-node" if partition.gpus else None,
        "gpu_type": partition.gpu_type or None,
        "device": "auto" if partition.gpus else "cpu",
        "cpus_per_rank": max(1, partition.cpus // max(partition.gpus, 1)) if partition.gpus else 1,
        "mem": f"{int(partition.memory_mb * SPARE_MEMORY)}M" if partition.memory_mb else None,
        "time": time,
        "notice_seconds": None if most >= NOTICE_SECONDS else max(1, most),  # null goes by what saves take
    }
    cluster = load(ClusterConfig, plain)
    job = JobConfig("train", "doctor", "doctor", 1, max(partition.gpus, 1), "", "", cluster)
    if problems := [*cluster_problems(job)]:
        raise ValueError("\n".join(problems))
    return cluster


def render(site: Site, page: ClusterConfig) -> str:
    """The page as a file."""
    head = f"# {site.name}, Slurm {site.version}, as `synthos doctor` found it. docs/your_cluster.md explains the keys."
    return f"{head}\n{yaml.dump(dump(page), Dumper=DUMPER, sort_keys=False)}"


def _as_json(
    site: Site, partition: Partition, page: ClusterConfig, ends: list[Ending], found: list[str], file: Path | None
) -> dict[str, Any]:
    return {
        "cluster": site.name,
        "slurm": site.version,
        "settings": _settings(site),
        "partitions": [dataclasses.asdict(one) for one in site.partitions],
        "partition": partition.name,
        "endings": [dataclasses.asdict(one) for one in ends],
        "findings": found,
        "page": dump(page),
        "written": str(file) if file else None,
    }


def _settings(site: Site) -> dict[str, str]:
    names = "ProctrackType KillWait OverTimeLimit PreemptType PreemptMode PreemptParameters JobRequeue MaxArraySize"
    return {name: site.settings.get(name, "") for name in f"{names} AccountingStorageType".split()}


def _print(
    site: Site, partition: Partition, page: ClusterConfig, ends: list[Ending], found: list[str], file: Path | None
) -> None:
    show = console().print
    print(f"{site.name}, Slurm {site.version}")
    show(table(["setting", "value"], _settings(site).items()))
    columns = ["partition", ">nodes", ">CPUs", ">memory", ">GPUs", "limit", "preempt", ">grace"]
    show(table(columns, [_row(one) for one in site.partitions]))
    title = f"jobs of {partition.name}, with a notice of {notice_seconds(page)} s"
    show(table(["a job's end", "what arrives"], [_ending(one) for one in ends], title))
    for line in found:
        print(f"- {line}")
    print(
        f"\nwritten: {file}; submit with cluster={page.name}" if file else f"\n{render(site, page)}",
        end="\n" if file else "",
    )


def _row(one: Partition) -> tuple[object, ...]:
    gpus = f"{one.gpu_type} x {one.gpus}" if one.gpu_type else one.gpus
    limit = one.limit or "none"
    name = f"{one.name}{' (default)' if one.default else ''}{'' if one.up else ' (down)'}"
    return name, one.nodes, one.cpus, f"{one.memory_mb:,} MB", gpus, limit, one.preempt_mode, f"{one.grace_seconds} s"


def _ending(one: Ending) -> tuple[str, str]:
    return one.cause, one.words()
