"""What one node does for a run: starts torchrun, shows its output, passes on the wish to stop, closes the ledger."""

import codecs
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from launch import attempts
from launch.compose import CHECKOUT
from launch.screen import Screen
from synthos.schema import RunConfig, read_config

CAUSES = {signal.SIGINT: "interrupt", signal.SIGTERM: "terminate"}
POLL_SECONDS = 0.1
PEER_SECONDS = 30  # from the failure of one rank to the end of the others
SHUTDOWN_SECONDS = 600  # torchrun's patience with ranks that save after a signal; its own default is 30


def run(folder: Path, keep_open: Sequence[int] = ()) -> int:
    """Run one attempt of the run in `folder` on this machine and return its exit code.

    The first Ctrl-C or SIGTERM asks the ranks to stop, by `control/stop`: they finish the step, save and leave. A
    second Ctrl-C kills them. `keep_open` are file descriptors that torchrun inherits: with the run's lock among them,
    the run stays locked should this process be killed while its ranks go on.
    """
    config = read_config(RunConfig, folder / "config.yaml")
    command = torchrun(config, folder)
    attempt = attempts.begin(folder, command)
    log = attempts.attempt_folder(folder, attempt) / "node-0.log"
    with listen() as signals, log.open("wb") as output:
        # A session of its own: Ctrl-C on the terminal reaches this process only, and the ranks stop in step.
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=CHECKOUT,
            env=environment(config, attempt),
            start_new_session=True,
            pass_fds=keep_open,
        )
        with log.open("rb") as shown:
            wait(process, shown, signals, folder / "control", attempt)
    verdict = attempts.end(folder, attempt)
    if verdict["status"] == "failed":
        print(f"attempt {attempt} failed: {verdict['message']}\nlog: {log}", file=sys.stderr)
    return attempts.exit_code(verdict)


def torchrun(config: RunConfig, folder: Path) -> list[str]:
    """The command that starts one rank per device of this node."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={config.gpus_per_node}", "-m", "synthos.run", str(folder)]


def environment(config: RunConfig, attempt: int) -> dict[str, str]:
    """What the ranks inherit: this checkout before any installed one, and their share of the cores."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(config.cluster.threads or max(1, cores() // config.gpus_per_node)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS),
        "SYNTHOS_ATTEMPT": str(attempt),
    }


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    process: subprocess.Popen[bytes], log: BinaryIO, signals: list[signal.Signals], control: Path, attempt: int
) -> None:
    """Show the log as it grows until the process ends; hand on the first signal, and kill on a second Ctrl-C.

    The log is a file that is read back, no pipe, so that the ranks outlive this process. Once a rank has failed, its
    peers get a while to notice: on a GPU they may wait for it in a collective, where no signal reaches them.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    asked, patience = False, float("inf")
    screen = Screen(control / "heartbeat.json")
    while True:
        ended = process.poll() is not None
        screen.show(decoder.decode(log.read()))
        if ended:
            screen.close()
            return
        if signals and not asked:
            asked = True
            attempts.write_json(control / "stop", {"cause": CAUSES[signals[0]]})
            print("stopping: the ranks finish their step and save; Ctrl-C again kills them", file=sys.stderr)
        if patience == float("inf") and failed(control / "verdict.json", attempt):
            patience = time.monotonic() + PEER_SECONDS
        if signal.SIGINT in signals[1:] or time.monotonic() > patience:
            kill(process.pid)
        time.sleep(POLL_SECONDS)


def failed(verdict: Path, attempt: int) -> bool:
    """Whether a rank of this attempt has said that it failed."""
    try:
        told = json.loads(verdict.read_text())
    except FileNotFoundError:
        return False
    return bool(told["status"] == "failed" and told["attempt"] == attempt)


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
