"""What the agent does around torchrun, with real processes; whole runs are in test_submit.py."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import agent
from launch.attempts import attempt_folder
from launch.compose import compose
from launch.place import Meeting, Place, allocation_problems, announce
from synthos.files import create_json
from synthos.run import failure_file
from synthos.schema import JobConfig
from synthos.strict import write_config
from synthos.train.torchrun import torchrun_flags
from tests.support import ROOT

BASE = ("recipe=i2i", "model=tiny", "data=photos", "cluster=local")
CODE = Path("/runs/x/code")
# A parent whose child has a session of its own, as a rank of torchrun has; it prints the child's id.
FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def python(code: str, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **options)


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not waited for does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def eventually(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


def job(*overrides: str) -> JobConfig:
    return compose([*BASE, *overrides]).config


def test_the_command_starts_a_rank_per_device() -> None:
    command = agent.ranks_command(job("gpus_per_node=3"), Path("/runs/x"), Place(), Meeting("", 1, "localhost", 0))
    assert command[:4] == [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3"]
    assert command[-4:] == ["--standalone", "-m", "synthos.run", "/runs/x"]


def test_nodes_meet_where_the_first_says_and_only_in_their_own_start() -> None:
    meeting = Meeting("12.1.3", 4, "10.0.0.7", 4001)
    first, second = (
        agent.ranks_command(job("cluster=slurm", "nodes=2"), Path("/runs/x"), Place("12.1", node, 2, step="3"), meeting)
        for node in (0, 1)
    )
    assert {"--nnodes=2", "--rdzv-endpoint=10.0.0.7:4001", "--rdzv-id=12.1.3"} < set(first) & set(second)
    assert "--rdzv-conf=is_host=1" in first and "--rdzv-conf=is_host=0" in second


def test_torchrun_is_told_to_let_ranks_save() -> None:
    """Both flags are in the torch that is pinned; an older one is started without them."""
    assert torchrun_flags(600) == [
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2",
        "--shutdown-timeout=600",
    ]


def test_without_torchrun_the_agent_gives_a_rank_its_place() -> None:
    config = job("cluster=slurm", "cluster.launcher=srun", "nodes=2", "gpus_per_node=2")
    place, meeting = Place("12.0", node=1, nodes=2, task=1, tasks=2), Meeting("12.0", 4, "10.0.0.7", 4001)
    assert agent.ranks_command(config, Path("/runs/x"), place, meeting) == [
        sys.executable, "-m", "synthos.run", "/runs/x"
    ]  # fmt: skip
    made = agent.environment(config, place, meeting, CODE)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [made[name] for name in names] == ["3", "1", "4", "10.0.0.7", "4001"]


def test_ranks_share_the_cores_and_import_the_code_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    meeting = Meeting("", 7, "localhost", 0)
    made = agent.environment(job("cluster.threads=3"), Place(), meeting, CODE)
    assert made["OMP_NUM_THREADS"] == "3" and made["SYNTHOS_ATTEMPT"] == "7"
    assert made["PYTHONPATH"] == f"{CODE}{os.pathsep}/elsewhere"
    many = job("gpus_per_node=64", "batch={size: 64, micro: 1}")
    assert agent.environment(many, Place(), meeting, CODE)["OMP_NUM_THREADS"] == str(max(1, agent.cores(Place()) // 64))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "128")
    assert agent.environment(many, Place("12.0"), meeting, CODE)["OMP_NUM_THREADS"] == "2"


def test_an_allocation_that_is_not_the_configs_is_refused_by_name() -> None:
    config = job("cluster=slurm", "nodes=2", "gpus_per_node=4", "batch.micro=1")
    right = Place("12.0", nodes=2)
    assert allocation_problems(config, right, {"SLURM_GPUS_ON_NODE": "4"}) == []
    wrong = allocation_problems(config, Place("12.0", nodes=3, tasks=4), {"SLURM_GPUS_ON_NODE": "8"})
    assert [line.split(";")[0] for line in wrong] == [
        "nodes: the allocation has 3, config.yaml of the run says 2",
        "tasks per node: the allocation has 4, config.yaml of the run says 1",
        "gpus_per_node: the allocation has 8, config.yaml of the run says 4",
    ]
    assert allocation_problems(config, right, {})[0].startswith("gpus_per_node: the allocation has 0")


def test_output_is_shown_whole_while_it_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    code = (
        "import sys, time\n"
        "for piece in (b'first\\n', b'\\xc3', b'\\xa4 second\\n'):\n"
        "    sys.stdout.buffer.write(piece); sys.stdout.flush(); time.sleep(0.3)\n"
    )
    with log.open("wb") as output, log.open("rb") as shown:
        agent.wait(python(code, stdout=output), shown, [], tmp_path, 1)
    assert capsys.readouterr().out == "first\nä second\n"  # a letter cut in two by the reader is still one letter
    assert not (tmp_path / "control").exists()


@pytest.mark.parametrize(
    ("number", "cause"), [(signal.SIGINT, "interrupt"), (signal.SIGTERM, "terminate"), (signal.SIGUSR2, "notice")]
)
def test_a_signal_becomes_a_request_to_stop(tmp_path: Path, number: signal.Signals, cause: str) -> None:
    stop = tmp_path / "control" / "stop"
    stop.parent.mkdir()
    obedient = f"import os, time\nwhile not os.path.exists({str(stop)!r}):\n    time.sleep(0.02)"
    (tmp_path / "log").touch()
    with agent.listen() as signals, (tmp_path / "log").open("rb") as shown:
        process = python(obedient)
        os.kill(os.getpid(), number)
        agent.wait(process, shown, signals, tmp_path, 1)
    assert process.returncode == 0 and json.loads(stop.read_text()) == {"cause": cause}


def test_what_asks_already_is_left_to_say_why(tmp_path: Path) -> None:
    """Somebody, or the agent of another node, may have been faster."""
    stop = tmp_path / "control" / "stop"
    stop.parent.mkdir()
    stop.write_text('{"cause": "drain"}')
    (tmp_path / "log").touch()
    with (tmp_path / "log").open("rb") as shown:
        agent.wait(python("import time; time.sleep(0.5)"), shown, [signal.SIGTERM], tmp_path, 1)
    assert json.loads(stop.read_text()) == {"cause": "drain"}


def test_a_signal_before_the_ranks_start_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While an agent still waits for the first one to say where they meet."""
    stop, place = tmp_path / "control" / "stop", Place("12.0", node=1, nodes=2)
    stop.parent.mkdir()
    (tmp_path / "code").mkdir()
    attempt_folder(tmp_path, 1).mkdir(parents=True)
    write_config(job("cluster=slurm", "nodes=2", "batch.micro=1"), tmp_path / "config.yaml")
    obedient = f"import os, time\nend = time.time() + 20\nwhile not os.path.exists({str(stop)!r}):\n"
    obedient += "    assert time.time() < end\n    time.sleep(0.02)"
    monkeypatch.setattr(agent, "ranks_command", lambda *_: [sys.executable, "-c", obedient])
    former = signal.getsignal(signal.SIGTERM)

    def interrupt() -> None:
        if eventually(lambda: signal.getsignal(signal.SIGTERM) != former):
            os.kill(os.getpid(), signal.SIGTERM)
        announce(tmp_path, Meeting(place.start, 1, "localhost", 0))

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert agent.run(tmp_path, place) == 0
    thread.join()
    assert json.loads(stop.read_text()) == {"cause": "terminate"}


@pytest.mark.parametrize(("rank", "code"), [("os.kill(os.getpid(), 9)", 1), ("pass", 0)])
def test_an_agent_whose_rank_was_killed_fails_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, code: int
) -> None:
    """Else srun would leave the others to wait for it. The rank's temporary files go with it."""
    (tmp_path / "control").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "code").symlink_to(ROOT)
    attempt_folder(tmp_path, 1).mkdir(parents=True)
    write_config(job("cluster=slurm", "nodes=2", "batch.micro=1"), tmp_path / "config.yaml")
    place = Place("12.0", node=1, nodes=2)
    announce(tmp_path, Meeting(place.start, 1, "localhost", 0))
    rank = f"import os, tempfile\nopen({str(tmp_path / 'told')!r}, 'w').write(tempfile.mkdtemp())\n{rank}"
    monkeypatch.setattr(agent, "ranks_command", lambda *_: [sys.executable, "-c", rank])
    monkeypatch.setattr(agent, "slurm_place", lambda _: place)
    monkeypatch.setattr(agent.snapshot, "check_imported", lambda _: None)
    monkeypatch.setattr(agent.preflight, "check", lambda *_: agent.preflight.Findings())
    assert agent.main(tmp_path) == code
    assert Path((tmp_path / "told").read_text()).parents[1] == tmp_path / "temporary"
    assert not [*(tmp_path / "temporary").iterdir()]


def test_a_fault_of_one_node_does_not_speak_for_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "control").mkdir()
    for node, refused in ((1, False), (0, True)):
        monkeypatch.setattr(agent, "slurm_place", lambda _, n=node: Place("12.0", node=n, nodes=2))
        assert agent.main(tmp_path) == 2  # there is no config.yaml
        assert (tmp_path / "control" / "refused.json").exists() == refused


def test_a_second_interrupt_kills_and_a_second_sigterm_does_not(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    (tmp_path / "log").touch()
    with (tmp_path / "log").open("rb") as shown:
        killed = python("import time; time.sleep(600)")
        agent.wait(killed, shown, [signal.SIGTERM, signal.SIGINT], tmp_path, 1)
        spared = python("import time; time.sleep(0.5)")
        agent.wait(spared, shown, [signal.SIGTERM, signal.SIGTERM], tmp_path, 1)
    assert killed.returncode == -signal.SIGKILL and spared.returncode == 0


def test_peers_of_a_failed_rank_do_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "PEER_SECONDS", 0.2)
    (tmp_path / "log").touch()
    failure_file(tmp_path, 1).parent.mkdir(parents=True)
    assert create_json(failure_file(tmp_path, 1), {"rank": 3})
    with (tmp_path / "log").open("rb") as shown:
        of_an_earlier_attempt = python("import time; time.sleep(1)")
        agent.wait(of_an_earlier_attempt, shown, [], tmp_path, 2)
        stuck = python("import time; time.sleep(600)")
        agent.wait(stuck, shown, [], tmp_path, 1)
    assert of_an_earlier_attempt.returncode == 0 and stuck.returncode == -signal.SIGKILL


def test_former_signal_handlers_come_back() -> None:
    before = {number: signal.getsignal(number) for number in agent.CAUSES}
    with agent.listen() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert eventually(lambda: signals == [signal.SIGTERM])
    assert {number: signal.getsignal(number) for number in agent.CAUSES} == before


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="descendants are found in /proc")
def test_killing_reaches_descendants_in_other_sessions() -> None:
    process = python(FAMILY, stdout=subprocess.PIPE)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    assert alive(child) and alive(os.getpid())
    agent.kill(process.pid)
    assert process.wait(timeout=20) == -signal.SIGKILL
    process.stdout.close()
    assert eventually(lambda: not alive(child)) and alive(os.getpid())
