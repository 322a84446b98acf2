"""How the agents of one job find each other, without a scheduler; tests/slurm has one."""

import socket
import threading
import time
from pathlib import Path

import pytest

from launch.place import Meeting, Place, announce, find_meeting, free_port, interface_of, own_address, slurm_place

TASK = {
    "SLURM_JOB_ID": "12", "SLURM_PROCID": "5", "SLURM_NODEID": "2", "SLURM_LOCALID": "1", "SLURM_NNODES": "4",
    "SLURM_NTASKS": "8", "SLURM_STEP_ID": "1",
}  # fmt: skip


def test_srun_tells_the_place() -> None:
    assert slurm_place(TASK) == Place("12.0", node=2, nodes=4, task=1, tasks=2, step="1")
    assert slurm_place({**TASK, "SLURM_RESTART_COUNT": "3"}).job == "12.3"
    element = {**TASK, "SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "4"}
    assert slurm_place(element).job == "11_4.0"
    assert not slurm_place(TASK).first and slurm_place({**TASK, "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}).first
    with pytest.raises(ValueError, match="no task of a Slurm job"):
        slurm_place({"SLURM_JOB_ID": "12"})


def test_agents_wait_for_the_first_of_their_own_start(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    announce(tmp_path, Meeting("12.1.0", 1, "node1", 4000))  # of the attempt before a crash, in the same allocation
    mine = Meeting("12.1.1", 2, "node1", 4001)
    later = threading.Timer(0.5, lambda: announce(tmp_path, mine))
    later.start()
    started = time.monotonic()
    assert find_meeting(tmp_path, Place("12.1", node=1, nodes=2, step="1"), timeout_seconds=20) == mine
    assert time.monotonic() - started > 0.4
    later.join()


def test_a_folder_that_is_not_shared_is_named(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    with pytest.raises(TimeoutError, match="node 1 .* saw nothing from node 0 .* runs_dir must lie on a file system"):
        find_meeting(tmp_path, Place("12.0", node=1, nodes=2), timeout_seconds=0.3)


def test_a_free_port_can_be_bound() -> None:
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port := free_port()))
    assert 1024 < port < low  # none that an outgoing connection may get


def test_the_address_is_that_of_the_interface_towards_the_launcher() -> None:
    assert own_address({"SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}) == "127.0.0.1"
    assert own_address({}) == socket.gethostname()
    assert interface_of("127.0.0.1") == "lo" and interface_of("198.51.100.7") is None
