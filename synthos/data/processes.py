"""How processes are started that read beside this one, and how many are of use."""

import multiprocessing
import os
from multiprocessing.context import ForkServerContext


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def forkserver() -> ForkServerContext:
    """Starts processes from one that has imported torch, and nothing of ours: in milliseconds, where each would need
    seconds for it. Forked from this one they would inherit the locks of CUDA and of our threads.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "torch"])  # the first is Python's default
    return context
