"""What one node does for a run: starts its ranks, shows their output, passes on the wish to stop, closes the ledger.

On Slurm, srun starts one agent per node: python -m launch.agent RUN_DIR
"""

import codecs
import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from launch import attempts, preflight, requeue, snapshot
from launch.notice import GIVEN, Limit
from launch.place import (
    Meeting,
    Place,
    allocation_problems,
    allowed_cores,
    announce,
    find_meeting,
    free_port,
    interface_of,
    job_start,
    node_names,
    own_address,
    slurm_place,
)
from launch.rundir import hold
from launch.screen import Screen
from synthos.files import create_json, read_json
from synthos.run import failure_file, read_verdict
from synthos.schema import JobConfig, read_job
from synthos.train.torchrun import torchrun_flags

CAUSES = {signal.SIGINT: "interrupt", signal.SIGTERM: "terminate", signal.SIGUSR2: "notice"}
POLL_SECONDS = 0.1
LOOK_SECONDS = 1  # between two looks into the run folder, which may be far away
LATE_SECONDS = 60  # how late a shared folder may show what another node has written
PEER_SECONDS = 10  # from the failure of one rank to the end of the others
LOCK_SECONDS = 60  # a job may start before the command that submitted it has let go of the run
SHUTDOWN_SECONDS = 600  # torchrun's patience with ranks that save after a signal; its own default is 30


def main(folder: Path) -> int:
    """A Slurm task's part of an attempt of the run in `folder`; 0 if that is done or stopped, else 1 or 2.

    The first task refuses an allocation that is not the one the run's config asks for.
    """
    first = True  # unless it is known to be another
    try:
        first = (place := slurm_place(os.environ)).first
        config = read_job(folder / "config.yaml")
        snapshot.check_imported(folder)
        if not first:
            return int(run(folder, place) == 1)
        problems = allocation_problems(config, place, os.environ)
        if problems:
            raise ValueError("\n".join(problems))
        if attempts.is_left_open(folder, place.job):  # by a node that Slurm misses, while its ranks may live on
            requeue.end_orphans(folder)
        with hold(folder, LOCK_SECONDS) as lock:
            if lock is None:
                raise ValueError(f"{folder} is running already")
            return int(run(folder, place, [lock.fileno()]) == 1)  # a run that was stopped is no failed job
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if first:  # else it is a fault of this node
            attempts.refuse(folder, job_start(os.environ), str(error))
        return 2


def run(folder: Path, place: Place | None = None, keep_open: Sequence[int] = ()) -> int:
    """Run this node's part of one attempt of the run in `folder` and return its exit code.

    The first Ctrl-C, SIGTERM or SIGUSR2 asks the ranks to stop, by `control/stop`: they finish the step, save and
    leave. A second Ctrl-C kills them. `keep_open` are file descriptors that torchrun inherits: with the run's lock
    among them, the run stays locked should this process be killed while torchrun goes on.
    """
    config, place = read_job(folder / "config.yaml"), place or Place()
    code = snapshot.code_of(folder)
    name = f"node-{place.node}.log" if place.tasks == 1 else f"node-{place.node}.{place.task}.log"
    with listen() as signals:
        meeting, command = meet(folder, config, place)
        log = attempts.attempt_folder(folder, meeting.attempt) / name
        found = preflight.check(folder, config, place, meeting, signals)
        if not found.passed:
            log.write_text(f"{found.message}\n")
            return close(folder, place, meeting.attempt, log, 0) if place.first else 1
        with log.open("wb") as output, log.open("rb") as shown, scratch() as temporary:
            output.writelines(f"preflight: {line}\n".encode() for line in found.warnings if place.first)
            output.flush()
            # A session of its own: Ctrl-C on the terminal reaches this process only, and the ranks stop in step.
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=code,
                env=environment(config, place, meeting, code) | {"TMPDIR": temporary},
                start_new_session=True,
                pass_fds=keep_open,
            )
            keeps_time = place.first and place.job  # its end is that of the whole step
            watch = preflight.watch(folder, config, place, meeting.attempt)
            limit = Limit(folder, config.cluster) if keeps_time else None
            wait(process, shown, signals, folder, meeting.attempt, limit, watch)
    if place.first:
        late = LATE_SECONDS if process.returncode == 0 and not place.alone else 0
        return close(folder, place, meeting.attempt, log, late)
    verdict = read_verdict(folder)  # torchrun returns 1 also where a signal ended it
    return attempts.exit_code(verdict) if verdict.get("attempt") == meeting.attempt else int(process.returncode != 0)


def meet(folder: Path, config: JobConfig, place: Place) -> tuple[Meeting, list[str]]:
    """Open an attempt, or find the one that the first agent of this job has opened; also what to start here."""
    if not place.first:
        meeting = find_meeting(folder, place)
        return meeting, ranks_command(config, folder, place, meeting)
    host, port = ("localhost", 0) if place.alone else (own_address(os.environ), free_port())
    meeting = Meeting(place.start, 0, host, port)
    command = ranks_command(config, folder, place, meeting)
    nodes = node_names(os.environ) if place.job else []
    attempt = attempts.begin(folder, command, job=place.job, nodes=nodes)
    meeting = dataclasses.replace(meeting, attempt=attempt, time=time.time())
    if not place.alone:
        announce(folder, meeting)
    return meeting, command


def close(folder: Path, place: Place, attempt: int, log: Path, patience_seconds: float) -> int:
    """Close the ledger of an attempt that has ended, and say how; returns its exit code."""
    verdict = attempts.end(folder, attempt, patience_seconds)
    if verdict["status"] == "failed":
        where = f" at rank {verdict['rank']}" if "rank" in verdict else ""
        print(f"attempt {attempt} failed{where}: {verdict['message']}\nlogs: {log.parent}", file=sys.stderr)
    else:
        print(attempts.describe(verdict, by_hand=not place.job))
    return attempts.exit_code(verdict)


def ranks_command(config: JobConfig, folder: Path, place: Place, meeting: Meeting) -> list[str]:
    """The command that starts this agent's ranks: torchrun, or the one rank itself where there is no torchrun."""
    rank = ["-m", "synthos.run", str(folder)]
    if config.cluster.launcher == "srun":
        return [sys.executable, *rank]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={config.gpus_per_node}"]
    if place.alone:
        return [*launcher, *torchrun_flags(SHUTDOWN_SECONDS), "--standalone", *rank]
    return [
        *launcher,
        *torchrun_flags(SHUTDOWN_SECONDS),
        f"--nnodes={place.nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={meeting.host}:{meeting.port}",
        f"--rdzv-id={place.start}",  # another one for each start: what is left of an earlier one can't join
        f"--rdzv-conf=is_host={int(place.first)}",  # else each would compare host names
        f"--local-addr={own_address(os.environ)}",
        *rank,
    ]


def environment(config: JobConfig, place: Place, meeting: Meeting, code: Path) -> dict[str, str]:
    """What the ranks inherit: the run's code before any that is installed, and their share of the cores."""
    inherited = {
        **_gloo_interface(place),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        # The warnings of torch's own C++: at the end of a run its agents may find each other gone, and print stacks.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        "OMP_NUM_THREADS": str(config.cluster.threads or max(1, cores(place) * place.tasks // config.gpus_per_node)),
        "SYNTHOS_ATTEMPT": str(meeting.attempt),
        "SYNTHOS_NODE": str(place.node),
    }
    if config.cluster.launcher == "srun":
        inherited |= {
            "RANK": str(place.node * place.tasks + place.task),
            "LOCAL_RANK": str(place.task),
            "WORLD_SIZE": str(place.nodes * place.tasks),
            "MASTER_ADDR": meeting.host,
            "MASTER_PORT": str(meeting.port),
        }
    return inherited


def scratch() -> TemporaryDirectory[str]:
    """A folder for temporary files of the ranks, torchrun and W&B, which they leave behind even where all goes well."""
    return TemporaryDirectory(prefix="synthos-", ignore_cleanup_errors=True)


def _gloo_interface(place: Place) -> dict[str, str]:
    """Gloo would bind to what the host's own name stands for, which other nodes may not reach."""
    interface = None if place.nodes == 1 else interface_of(own_address(os.environ))
    return {"GLOO_SOCKET_IFNAME": interface} if interface else {}


def cores(place: Place) -> int:
    """CPU cores that this agent and its ranks may use; Slurm need not bind processes to what it gave them."""
    if place.job and "SLURM_CPUS_PER_TASK" in os.environ:
        return int(os.environ["SLURM_CPUS_PER_TASK"])
    return allowed_cores()


@contextmanager
def listen() -> Iterator[list[signal.Signals]]:
    """Collects signals to stop instead of obeying them; puts the former handlers back."""
    received: list[signal.Signals] = []
    former = {number: signal.signal(number, lambda n, _: received.append(signal.Signals(n))) for number in CAUSES}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def wait(
    process: subprocess.Popen[bytes],
    log: BinaryIO,
    signals: list[signal.Signals],
    folder: Path,
    attempt: int,
    limit: Limit | None = None,
    watch: Callable[[], None] | None = None,
) -> None:
    """Show the log as it grows until the process ends; hand on the first signal, and kill on a second Ctrl-C.

    The log is a file that is read back, no pipe, so that the ranks outlive this process. Once a rank has failed, its
    peers get a while to notice: on a GPU they may wait for it in a collective, where no signal reaches them. The
    `limit` may ask for a notice of its own, and tells after one how long the ranks have to save. `watch` may find that
    they fail.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    asked, looked, patience, end = False, -math.inf, math.inf, math.inf
    given: dict[str, float] = {}
    screen = Screen(folder)
    while True:
        ended = process.poll() is not None
        screen.show(decoder.decode(log.read()))
        if ended:
            screen.close()
            return
        if signals and not asked:
            asked = True
            said = {"cause": CAUSES[signals[0]], **given}
            create_json(folder / "control" / "stop", said)  # what is there may say more
            if limit and signals[0] is signal.SIGUSR2:
                end = time.monotonic() + limit.seconds_to_save()
            again = "; Ctrl-C again kills them" if signals[0] is signal.SIGINT else ""
            print(f"stopping: the ranks finish their step and save{again}", file=sys.stderr)
        if patience == math.inf and time.monotonic() - looked > LOOK_SECONDS:
            looked = time.monotonic()
            if watch:
                watch()
            if limit and not signals and (seconds := limit.due()):
                given = {GIVEN: seconds}
                signals.append(signal.SIGUSR2)
            if read_json(failure_file(folder, attempt)):  # of the first rank to fail, on whatever node
                patience = looked + PEER_SECONDS
        if signal.SIGINT in signals[1:] or time.monotonic() > min(patience, end):
            kill(process.pid)
        time.sleep(POLL_SECONDS)


def kill(root: int) -> None:
    """Kill a process and its descendants: torchrun gives every rank a session of its own, so no group holds them all.

    They are found in /proc; on a system without it only `root` is killed, and the ranks end when they miss it.
    """
    children: dict[int, list[int]] = {}
    for pid, parent in parents():
        children.setdefault(parent, []).append(pid)
    doomed = [root]
    for pid in doomed:  # grows while it is walked
        doomed += children.get(pid, [])
    for pid in doomed:
        with suppress(ProcessLookupError):  # it was faster
            os.kill(pid, signal.SIGKILL)


def parents() -> Iterator[tuple[int, int]]:
    """Every process of this machine with its parent."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            yield int(entry.parent.name), int(entry.read_text().rpartition(")")[2].split()[1])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m launch.agent RUN_DIR")
    sys.exit(main(Path(sys.argv[1])))
