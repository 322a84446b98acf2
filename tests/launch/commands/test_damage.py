"""A run folder with a damaged file: every verb says which, in one message, with exit code 1, and changes nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import attempts
from launch.cli import VERBS
from launch.render import save_seconds
from launch.runs import find_several
from launch.screen import Screen
from launch.start import clear
from tests.launch.commands.conftest import Runs, squeue, synthos

Capture = pytest.CaptureFixture[str]

CONFIG, RECORD = "config.yaml", "attempts/0001/attempt.json"


def damaged_run(runs: Runs, file: str, content: str | None) -> Path:
    """A stopped run in which a file is empty, cut short, or gone."""
    folder = runs.finished("damaged-00000001", "stopped", cause="notice", step=40)
    path = folder / file
    path.unlink() if content is None else path.write_text(content)
    return path


@pytest.mark.parametrize(
    "content", ["", None, "stage: train\nbatch: {", "- a list\n", "stage: train\n", "\xff"], ids=repr
)
@pytest.mark.parametrize("verb", ["resume", "explain", "diff", "retry"])
def test_a_lost_config_is_named(
    runs: Runs, capsys: Capture, monkeypatch: pytest.MonkeyPatch, verb: str, content: str | None
) -> None:
    path = damaged_run(runs, CONFIG, content)
    if content == "\xff":
        path.write_bytes(b"\xff")
    if verb == "retry":  # of what has failed; also what a glance takes for whole
        monkeypatch.setattr("launch.look._check_config", lambda path: None)
        attempts.amend(path.parent, 1, status="failed")
    other = [str(runs.add("other-00000002"))] if verb == "diff" else []
    capsys.readouterr()
    assert synthos(verb, "damaged", *other) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and f"{path} is damaged: " in shown.err and shown.err.startswith("error: ")
    assert synthos(verb, "damaged", *other, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert verb == "retry" or told["error"].startswith(f"{path} is damaged: ")


def test_damage_that_is_met_at_work_is_one_message_too(
    runs: Runs, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a start of the run; what else goes wrong there is a fault of the code, and has a traceback."""
    path = damaged_run(runs, RECORD, "{")
    monkeypatch.setattr("launch.cli.find", lambda verb: lambda words: lambda: clear(path.parents[2]))
    assert synthos("resume", "damaged") == 1
    assert capsys.readouterr().err.startswith(f"error: {path} is damaged: ")


def test_a_heartbeat_that_a_node_took_along_is_no_damage(runs: Runs, capsys: Capture) -> None:
    path = damaged_run(runs, "control/heartbeat.json", "")
    assert synthos("status", "damaged") == 0 and "stopped" in capsys.readouterr().out
    assert save_seconds(path.parents[1]) is None
    Screen(path.parents[1]).show("")


@pytest.mark.parametrize("content", ["", None, "a: [1,\nb: {", "- 1\n"], ids=repr)
def test_a_run_without_its_config_is_not_lost_from_sight(runs: Runs, capsys: Capture, content: str | None) -> None:
    path = damaged_run(runs, CONFIG, content)
    runs.finished("other-00000002", "done")
    for words, code in ((("ls",), 0), (("status",), 0), (("status", "damaged"), 1), (("status", str(path.parent)), 1)):
        capsys.readouterr()
        assert synthos(*words, "--json") == code
        told = {run["name"]: run for run in json.loads(capsys.readouterr().out)["runs"]}
        assert told["damaged-00000001"]["state"] == "unreadable"
        lacks = {None: "it is gone", "": "it is empty"}.get(content, "it is not what was written")
        assert told["damaged-00000001"]["detail"] == f"{path} is damaged: {lacks}"
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


def unprivileged(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """A verb in a process for which closed folders are closed, also where the tests run as root."""
    drop = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if drop and not shutil.which(drop[0]):
        pytest.skip("root reads everything here: there is no setpriv")
    return subprocess.run([*drop, sys.executable, "-m", "launch.cli", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("closed", ["run", "group"])
def test_what_is_closed_to_us_keeps_no_other_from_sight(runs: Runs, closed: str) -> None:
    """Nor does its code look unused, which nobody here can tell."""
    other = runs.finished("other-00000002", "done")
    folder = runs.finished("theirs-00000001", "done", "theirs")
    code = runs.root / ".code" / ("0" * 40)
    code.mkdir(parents=True)
    os.utime(code, (0, 0))
    (folder / "code").symlink_to(code)
    shut = folder if closed == "run" else folder.parent
    shut.chmod(0)
    try:
        for words, exit_code in (
            (("ls", "--json"), 0),
            (("status", "other", "--json"), 0),
            (("gc", "--yes", "--json"), 1),
        ):
            done = unprivileged(*words)
            assert done.returncode == exit_code, done.stderr
            if words[0] == "gc":
                assert str(shut) in done.stderr and "can't be read: Permission denied" in done.stderr
                assert f"{runs.root / '.code'}: left alone" in json.loads(done.stdout)["problems"][0]
                continue
            states = {run["name"]: run["state"] for run in json.loads(done.stdout)["runs"]}
            assert states[other.name] == "done"
            if closed == "run" and words[0] == "ls":
                assert states[folder.name] == "unreadable"
            if closed == "group":
                assert f"warning: the runs of {shut} are not seen: Permission denied" in done.stderr
    finally:
        shut.chmod(0o755)
    assert code.exists()


def test_a_group_can_be_meant_where_runs_have_its_name(runs: Runs, capsys: Capture) -> None:
    own, other = runs.finished("a-00000001", "done"), runs.finished("i2i-00000002", "done", "mine")
    assert synthos("retry", "i2i") == 2
    assert (
        "means 2 runs; expected one of i2i/a-00000001, mine/i2i-00000002, or i2i/ for the group"
        in capsys.readouterr().err
    )
    for word in ("i2i/", str(own.parent), f"{own.parent}/"):
        assert find_several([word]) == [own]
    assert find_several(["mine/i2i-00000002"]) == [other]
    (runs.root / "empty").mkdir()
    assert synthos("logs", "empty/") == 2 and "empty has no runs" in capsys.readouterr().err


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
    for words, told in ((("status", "--bogus"), "unrecognized arguments: --bogus"), (("stop",), "required: RUN")):
        assert synthos(*words, "--json") == 2
        assert told in json.loads(capsys.readouterr().out)["error"]
    for verb in ("status", "logs", "stop", "cancel", "resume", "retry", "explain", "gc", "wandb sync"):
        assert verb in VERBS
        assert synthos(*verb.split(), "none", "--json") == 2
        shown = capsys.readouterr()
        assert json.loads(shown.out)["error"].startswith("none: no run in ") and shown.err.startswith("error: none: ")
