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
    # The first is Python's default. What torch loads starts no thread but OpenBLAS's, which ends them before a fork.
    context.set_forkserver_preload(["__main__", "torch"])
    return context
