"""The reading processes of a rank."""

import logging
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterable

import pytest

from synthos.data import loader
from synthos.data.indexing import over_shards
from synthos.data.loader import open_loader
from synthos.data.processes import usable_cores
from synthos.data.shards import ShardPlace
from tests.support import ROOT, environment

STOPPED = """
import os, signal, sys, time
from multiprocessing.forkserver import _forkserver
from synthos.data.loader import open_loader

heard = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda number, _: heard.append(number))
loader = open_loader(list(range(64)), 1, False, batch_size=None)
os.killpg(0, signal.SIGTERM)
rows = iter(loader)
first = next(rows)
for number in (signal.SIGTERM, signal.SIGUSR2):
    os.killpg(0, number)
time.sleep(1)
assert [first, *rows] == list(range(64))
assert os.waitpid(_forkserver._forkserver_pid, os.WNOHANG) == (0, 0), "the server of readers is dead"
assert list(open_loader(list(range(8)), 1, False, batch_size=None)) == list(range(8))
assert heard == [signal.SIGTERM, signal.SIGTERM, signal.SIGUSR2], heard
"""


@pytest.mark.parametrize(("more", "tell", "lines"), [(0, True, 0), (1, True, 1), (1, False, 0)])
def test_more_readers_than_cores_are_one_line_of_rank_0(
    caplog: pytest.LogCaptureFixture, more: int, tell: bool, lines: int
) -> None:
    """Where PyTorch would warn on each rank; no reader starts before the loader is gone through."""
    cores = usable_cores()
    with caplog.at_level(logging.INFO, loader.__name__), warnings.catch_warnings():
        warnings.simplefilter("error")
        open_loader([], cores + more, tell)  # type: ignore[arg-type]
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"data.workers: {cores + 1} readers share {cores} cores"] * lines


def test_a_stop_that_reaches_the_whole_group_leaves_the_readers_alive() -> None:
    """As without cgroups, where Slurm sends it to every process of a job; each of them is heard by the rank."""
    command = [sys.executable, "-c", STOPPED]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, start_new_session=True
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_what_works_beside_this_process_hears_signals() -> None:
    """Or nobody could end it; and this process has blocked none, either."""
    here = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    there = dict(over_shards(blocked, [ShardPlace.beside("a.tar"), ShardPlace.beside("b.tar")], 2))
    assert there == {0: [], 1: []} and not here & {signal.SIGTERM, signal.SIGUSR2}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == here


def blocked(place: ShardPlace) -> Iterable[int]:
    """The signals that this process does not hear."""
    return [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())]
