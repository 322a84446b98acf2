"""A run folder with a damaged file: every verb says which, in one message, with exit code 1, and changes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import VERBS
from tests.launch.commands.conftest import Runs, squeue, synthos

Capture = pytest.CaptureFixture[str]

CONFIG, RECORD = "config.yaml", "attempts/0001/attempt.json"


def damaged_run(runs: Runs, file: str, content: str | None) -> Path:
    """A stopped run in which a file is empty, cut short, or gone."""
    folder = runs.finished("damaged-00000001", "stopped", cause="notice", step=40)
    path = folder / file
    path.unlink() if content is None else path.write_text(content)
    return path


@pytest.mark.parametrize("content", ["", None, "stage: train\nbatch: {", "- a list\n"], ids=repr)
@pytest.mark.parametrize("verb", ["resume", "explain", "diff"])
def test_a_lost_config_is_named(runs: Runs, capsys: Capture, verb: str, content: str | None) -> None:
    path = damaged_run(runs, CONFIG, content)
    other = [str(runs.add("other-00000002"))] if verb == "diff" else []
    capsys.readouterr()
    assert synthos(verb, "damaged", *other) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith(f"error: {path} is damaged: ")
    assert synthos(verb, "damaged", *other, "--json") == 1
    assert json.loads(capsys.readouterr().out)["error"].startswith(f"{path} is damaged: ")


@pytest.mark.parametrize("content", ["", None], ids=repr)
def test_a_run_without_its_config_is_not_lost_from_sight(runs: Runs, capsys: Capture, content: str | None) -> None:
    path = damaged_run(runs, CONFIG, content)
    runs.finished("other-00000002", "done")
    for words, code in ((("ls",), 0), (("status",), 0), (("status", "damaged"), 1), (("status", str(path.parent)), 1)):
        capsys.readouterr()
        assert synthos(*words, "--json") == code
        told = {run["name"]: run for run in json.loads(capsys.readouterr().out)["runs"]}
        assert told["damaged-00000001"]["state"] == "unreadable"
        assert told["damaged-00000001"]["detail"] == f"{path} is damaged: it is empty, or gone"
        assert len(words) > 1 or told["other-00000002"]["state"] == "done"


@pytest.mark.parametrize(("file", "content"), [(CONFIG, ""), (CONFIG, None), (RECORD, '{"attempt": 1, "star')])
def test_what_can_not_be_read_is_left_alone(
    runs: Runs, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str, content: str | None
) -> None:
    path = damaged_run(runs, file, content)
    squeue(tmp_path, monkeypatch)
    code = runs.root / ".code" / ("0" * 40)
    code.mkdir(parents=True)
    os.utime(code, (0, 0))
    (path.parents[0 if file == CONFIG else 2] / "code").symlink_to(code)
    before = sorted(tmp_path.rglob("*"))
    for words in (("stop", "damaged"), ("cancel", "damaged"), ("retry", "damaged"), ("gc", "damaged"), ("gc", "--yes")):
        capsys.readouterr()
        assert synthos(*words) == 1
        shown = capsys.readouterr()
        assert f"{path} is damaged: " in shown.err and shown.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before  # also the code of a run whose config is gone


def test_a_folder_that_never_was_a_run_is_no_run(runs: Runs, capsys: Capture) -> None:
    """As where a submission failed before it had written anything."""
    (runs.root / "i2i" / "a-00000001" / "control").mkdir(parents=True)
    assert synthos("ls") == 0 and "a-00000001" not in capsys.readouterr().out
    assert synthos("logs", str(runs.root / "i2i" / "a-00000001")) == 2
    assert "is no run folder: it has no config.yaml" in capsys.readouterr().err


def test_whoever_reads_may_leave_early(runs: Runs) -> None:
    """As `synthos ls | head -1`: no traceback, and no complaint of the interpreter's at its end."""
    for number in range(40):
        runs.add(f"a-000000{number:02d}")
    command = [sys.executable, "-m", "launch.cli", "ls"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 1


def test_every_error_is_a_document_for_programs(runs: Runs, capsys: Capture) -> None:
    for verb in ("status", "logs", "stop", "cancel", "resume", "retry", "explain", "gc", "wandb sync"):
        assert verb in VERBS
        assert synthos(*verb.split(), "none", "--json") == 2
        shown = capsys.readouterr()
        assert json.loads(shown.out)["error"].startswith("none: no run in ") and shown.err.startswith("error: none: ")
