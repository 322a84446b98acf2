"""Who failed, read from the tables that torch's own code makes of exit codes."""

from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from launch import failures
from launch.failures import killed_rank


def write_log(folder: Path, node: int, *entries: tuple[int, int, int]) -> None:
    """What torchrun leaves of the ranks of a node, each with its exit code and second, in the order it found them."""
    failed = {}
    for rank, exit_code, second in entries:
        failed[rank] = ProcessFailure(local_rank=rank % 4, pid=100 + rank, exitcode=exit_code, error_file="<N/A>")
        failed[rank].timestamp = 1_800_000_000 + second
    log = folder / "attempts" / "0001" / f"node-{node}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(f"step 3\nTraceback (most recent call last):\n{ChildFailedError('synthos.run', failed)}\n")


@pytest.mark.parametrize(
    ("entries", "killed"),
    [
        ([(2, -9, 0), (0, 1, 1), (1, -15, 1)], (2, "SIGKILL")),
        ([(0, 1, 0), (2, -9, 0)], (2, "SIGKILL")),  # found with the one that missed it
        ([(2, -9, 0), (0, -9, 601), (1, -9, 601), (3, -9, 601)], (2, "SIGKILL")),  # the rest by torchrun, at last
        ([(0, -6, 0), (1, -9, 600)], None),
        ([(1, -11, 0), (0, 1, 0)], (1, "SIGSEGV")),
        ([(0, 1, 0), (1, -11, 0)], None),  # as it tears down what the other had broken
        ([(0, 1, 0), (1, -15, 0)], None),
        ([(3, 1, 0)], None),
    ],
)
def test_the_rank_that_was_killed(
    tmp_path: Path, entries: list[tuple[int, int, int]], killed: tuple[int, str] | None
) -> None:
    write_log(tmp_path, 0, *entries)
    wanted = {"cause": "killed", "rank": killed[0], "message": f"ended by {killed[1]}"} if killed else {}
    assert killed_rank(tmp_path, 1) == wanted


def test_of_several_nodes_the_one_that_saw_it(tmp_path: Path) -> None:
    write_log(tmp_path, 0, (0, 1, 0), (1, 1, 0))
    write_log(tmp_path, 1, (5, -9, 0), (4, 1, 0))
    assert killed_rank(tmp_path, 1)["rank"] == 5
    (entry,) = [one for one in failures.failures(tmp_path / "attempts" / "0001" / "node-1.log") if one.rank == 4]
    assert entry.exit_code == 1


def test_without_a_table_nobody_is_named(tmp_path: Path) -> None:
    assert killed_rank(tmp_path, 1) == {}
    write_log(tmp_path, 0, (0, 1, 0))
    (tmp_path / "attempts" / "0001" / "node-0.log").write_text("step 3\n")
    assert killed_rank(tmp_path, 1) == {}
