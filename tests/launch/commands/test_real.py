"""The verbs on runs that really train."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from launch.agent import kill, parents
from launch.attempts import newest_record
from launch.cli import main
from launch.rundir import read_state
from synthos.data.index import open_index
from synthos.data.shards import ShardPlace
from tests.launch.conftest import Submit
from tests.support import ROOT, environment

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.slow


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that a test has started; what is left of them is killed in the end."""
    monkeypatch.setenv("SYNTHOS_RUNS", str(tmp_path / "runs"))
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            kill(process.pid)
            process.wait(timeout=20)


def start(started: list[subprocess.Popen[bytes]], *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "launch.cli", *words]
    started.append(subprocess.Popen(command, cwd=ROOT, env={**environment(), "OMP_NUM_THREADS": "1"}))
    return started[-1]


def without_end(arguments: list[str]) -> list[str]:
    """The same run on two ranks of this machine, that goes on until somebody ends it."""
    kept = [word for word in arguments if word.split("=")[0] not in ("cluster", "optim.steps")]
    return [*kept, "cluster=local", "optim.steps=100000", "gpus_per_node=2"]


def state(capsys: Capture, folder: Path) -> str:
    capsys.readouterr()
    main(["status", "--json", str(folder)])
    return str(json.loads(capsys.readouterr().out)["runs"][0]["state"])


def wait_for(process: subprocess.Popen[bytes], runs: Path, capsys: Capture, attempt: int) -> Path:
    """The only run's folder, once its attempt is running."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        for folder in runs.glob("i2i/i2i-*"):
            if newest_record(folder).get("attempt") == attempt and state(capsys, folder) == "running":
                return folder
        time.sleep(0.3)
    raise AssertionError(f"attempt {attempt} does not run; exit code {process.poll()}")


def test_cancel_resume_and_stop(
    started: list[subprocess.Popen[bytes]], arguments: list[str], tmp_path: Path, capsys: Capture
) -> None:
    first = start(started, "submit", *without_end(arguments))
    folder = wait_for(first, tmp_path / "runs", capsys, 1)
    assert main(["cancel", "i2i"]) == 0
    assert "got SIGTERM, saves and ends" in capsys.readouterr().out
    assert first.wait(timeout=60) == 0 and state(capsys, folder) == "cancelled"
    step = read_state(folder).step
    assert step is not None and step > 0 and newest_record(folder)["cause"] == "cancelled"

    second = start(started, "resume", "i2i", "gpus_per_node=1")
    wait_for(second, tmp_path / "runs", capsys, 2)
    assert main(["resume", "i2i"]) == 1
    assert "is running already" in capsys.readouterr().err
    assert main(["stop", "i2i"]) == 0
    assert second.wait(timeout=60) == 0 and state(capsys, folder) == "stopped"
    record = newest_record(folder)
    assert (record["start_step"], record["cause"]) == (step, "stop") and record["end_step"] > step
    assert main(["logs", "i2i", "--rank", "0"]) == 0


@pytest.mark.long
def test_the_rank_that_was_killed_is_named_and_not_the_one_that_missed_it(
    started: list[subprocess.Popen[bytes]], arguments: list[str], tmp_path: Path, capsys: Capture
) -> None:
    process = start(started, "submit", *without_end(arguments))
    folder = wait_for(process, tmp_path / "runs", capsys, 1)
    os.kill(process_of(folder, rank=1), signal.SIGKILL)
    assert process.wait(timeout=120) == 1
    record = newest_record(folder)
    assert (record["cause"], record["rank"], record["message"]) == ("killed", 1, "ended by SIGKILL")
    assert main(["logs", "i2i"]) == 0
    assert capsys.readouterr().out.startswith("attempt 1 failed first at rank 1: ended by SIGKILL\n")
    assert main(["status", "i2i"]) == 1 and "rank 1: ended by SIGKILL" in capsys.readouterr().out


def process_of(folder: Path, rank: int) -> int:
    """The process of a rank of a run; torchrun, which starts it, is told of none."""
    for pid, _ in parents():
        with suppress(OSError):  # it has just ended, or is not ours
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in variables and str(folder).encode() in words:
                return pid
    raise AssertionError(f"no process of rank {rank}")


def test_retry_once_the_fault_is_gone(
    submit: Submit, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Shards that go bad after they were indexed, and come back; other ones would be another run."""
    monkeypatch.setenv("SYNTHOS_RUNS", str(tmp_path / "runs"))
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    for file in data.glob("*.tar"):
        open_index(ShardPlace.beside(str(file)))
    whole = {file: (file.read_bytes(), file.stat()) for file in data.glob("*.tar")}
    for file, (content, _) in whole.items():
        file.write_bytes(b"\0" * len(content))
    with pytest.raises(RuntimeError, match="has changed since it was indexed"):
        submit(f"data.shards={data}")
    (folder,) = (tmp_path / "runs" / "i2i").iterdir()
    assert main(["status", "i2i"]) == 1 and "FAILED" in capsys.readouterr().out
    assert main(["logs", "i2i"]) == 0
    assert capsys.readouterr().out.startswith("attempt 1 failed first at rank 0: RuntimeError: ")
    for file, (content, before) in whole.items():
        file.write_bytes(content)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert main(["retry", "i2i", "--failed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": [{"run": folder.name, "started": True, "exit_code": 0}]}
    assert newest_record(folder)["attempt"] == 2 and read_state(folder).done
    assert main(["resume", "i2i", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["started"] is False
    for file in [*data.iterdir()][:2]:
        file.unlink(missing_ok=True)
    assert main(["resume", "i2i", "wandb.mode=off"]) != 0
