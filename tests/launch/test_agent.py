"""What the agent does around torchrun, with real processes; whole runs are in test_submit.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import agent
from launch.compose import CHECKOUT, compose

BASE = ("recipe=i2i", "model=tiny", "data=photos", "cluster=local")
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


def test_the_command_starts_a_rank_per_device() -> None:
    config = compose([*BASE, "gpus_per_node=3"]).config
    command = agent.torchrun(config, Path("/runs/x"))
    assert command[:4] == [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    assert command[4:] == ["--nproc-per-node=3", "-m", "synthos.run", "/runs/x"]


def test_ranks_share_the_cores_and_import_this_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    made = agent.environment(compose([*BASE, "cluster.threads=3"]).config, 7)
    assert made["OMP_NUM_THREADS"] == "3" and made["SYNTHOS_ATTEMPT"] == "7"
    assert made["PYTHONPATH"] == f"{CHECKOUT}{os.pathsep}/elsewhere"
    many = agent.environment(compose([*BASE, "gpus_per_node=64", "batch={size: 64, micro: 1}"]).config, 1)
    assert many["OMP_NUM_THREADS"] == str(max(1, agent.cores() // 64))


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
    assert not (tmp_path / "stop").exists()


@pytest.mark.parametrize(("number", "cause"), [(signal.SIGINT, "interrupt"), (signal.SIGTERM, "terminate")])
def test_a_signal_becomes_a_request_to_stop(tmp_path: Path, number: signal.Signals, cause: str) -> None:
    stop = tmp_path / "stop"
    obedient = f"import os, time\nwhile not os.path.exists({str(stop)!r}):\n    time.sleep(0.02)"
    (tmp_path / "log").touch()
    with agent.listen() as signals, (tmp_path / "log").open("rb") as shown:
        process = python(obedient)
        os.kill(os.getpid(), number)
        agent.wait(process, shown, signals, tmp_path, 1)
    assert process.returncode == 0 and json.loads(stop.read_text()) == {"cause": cause}


def test_a_second_interrupt_kills_and_a_second_sigterm_does_not(tmp_path: Path) -> None:
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
    verdict = {"status": "failed", "attempt": 1}
    (tmp_path / "verdict.json").write_text(json.dumps(verdict))
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
