"""What a terminal shows of a run: the output, and the newest heartbeat under it; a pipe gets the output alone."""

import dataclasses
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from launch.screen import Screen
from synthos.train.progress import Beat

BEAT = {**dataclasses.asdict(Beat(7, 20, 0.5, 12.0, 0.03, 75.0)), "time": 0.0}
SHOW = """
import json, sys
from pathlib import Path
from launch.screen import Screen
folder = Path(sys.argv[1])
screen = Screen(folder)
screen.show("a line\\n")
(folder / "control" / "heartbeat.json").write_text(sys.argv[2])
screen.show("")
screen.close()
"""


def beat(folder: Path, content: object) -> None:
    (folder / "control").mkdir()
    (folder / "control" / "heartbeat.json").write_text(json.dumps(content))


def test_a_pipe_gets_the_output_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beat(tmp_path, BEAT)
    screen = Screen(tmp_path)
    screen.show("a line\n")
    screen.close()
    assert capsys.readouterr().out == "a line\n"


def test_a_terminal_gets_the_heartbeat_too(tmp_path: Path) -> None:
    beat(tmp_path, {**BEAT, "step": 3})  # of an earlier attempt
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-c", SHOW, str(tmp_path), json.dumps(BEAT)]
    subprocess.run(command, stdout=theirs, env=environment, check=True, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "a line" in shown and "step" in shown and "7/20" in shown and "3/20" not in shown
    assert "loss 0.5000  12.0 images/s  data wait 3 %  ETA 0:01:15" in shown
