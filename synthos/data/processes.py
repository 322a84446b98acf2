"""How processes are started that read beside this one, and how many are of use."""

import multiprocessing
import os
import signal
from multiprocessing import forkserver as server
from multiprocessing import resource_tracker
from multiprocessing.context import ForkServerContext

STOPS = (signal.SIGTERM, signal.SIGUSR2)  # by which a run is asked to stop


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def forkserver() -> ForkServerContext:
    """Starts processes from one that has imported torch, and nothing of ours: in milliseconds, where each would need
    seconds for it. Forked from this one they would inherit the locks of CUDA and of our threads.

    `STOPS` are blocked in that one, and in what it starts, until `hear_stops`: Slurm may send them to every process of
    a job, and with the server's death its processes count as dead.
    """
    context = multiprocessing.get_context("forkserver")
    # The first is Python's default. What torch loads starts no thread but OpenBLAS's, which ends them before a fork.
    context.set_forkserver_preload(["__main__", "torch"])
    former = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # not ignored: what comes now is for this process, too
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # again: the tracker's start lets SIGTERM in
        server.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
    return context


def hear_stops() -> None:
    """In a process that the server has started: what is sent to it reaches it, as by who waits for its end."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
