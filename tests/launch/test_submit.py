"""`synthos submit` from end to end: what it refuses, what it plans, and real runs on one CPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launch.attempts import newest_record
from launch.compose import CHECKOUT
from launch.rundir import hold, read_state
from synthos.data.index import open_index
from tests.launch.conftest import Submit, tree, write_shard
from tests.support import environment

Capture = pytest.CaptureFixture[str]
LONG = ("cluster=local", "optim.steps=100000")  # a run that only a stop ends


def only_run(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "runs" / "i2i").iterdir()
    return folder


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("optim.lrr=1",), "optim.lrr: unknown key; did you mean 'lr'?"),
        (("recipe.drop_txt=0.1",), "recipe.drop_txt: unknown key; did you mean 'drop_text'?"),
        (("+recipe.drop_txt=0.1",), "recipe.drop_txt: unknown key; did you mean 'drop_text'?"),
        (("recipe=i2j",), "recipe: 'i2j' is unknown; did you mean 'i2i'? allowed: i2i"),
        (("recipe.name=i2j",), "recipe.name: no recipe 'i2j'; did you mean 'i2i'? allowed: i2i"),
        (
            ("batch.size=9",),
            "batch.size: 9 is not a multiple of batch.micro x ranks = 2 x 1 = 2; nearest legal: batch.size",
        ),
        (("data.height=40",), "data.height: 40 is not a multiple of 16; nearest: 32 or 48"),
        (("optim.epochs=1",), "optim.steps, optim.epochs: both are set (3 and 1.0)"),
        (("optim.steps=null",), "optim.steps, optim.epochs: neither is set"),
        (("data.lanes=3",), "data.lanes: 3 "),
        (("validate.requests=[{prompt: x}]",), "validate.requests[0].name: missing"),
        (
            ("+model.parts.vae.path=no/where",),
            "model.parts.vae: 'no/where' is no local folder and not in the hub cache",
        ),
        (("data.shards=/no/where.tar",), "data.shards: no such shard: /no/where.tar"),
        (("data.shards=null",), "data.shards: not set"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(
    submit: Submit, overrides: tuple[str, ...], expected: str, tmp_path: Path, capsys: Capture
) -> None:
    assert submit(*overrides) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith(f"error: {expected}") and "Traceback" not in shown.err
    assert list(tmp_path.iterdir()) == []


def test_absent_weights_say_what_to_download(submit: Submit, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert submit("model=wan2.1_t2v_1.3b") == 2
    err = capsys.readouterr().err
    assert "run `hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --include 'vae/*'`, or use model=tiny" in err


def test_a_weights_folder_that_lacks_a_file(submit: Submit, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    assert submit(f"+model.parts.vae.path={tmp_path / 'vae'}") == 2
    assert f"model.parts.vae: {tmp_path / 'vae'} lacks diffusion_pytorch_model.safetensors" in capsys.readouterr().err


def test_a_sample_without_a_caption(submit: Submit, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "bad").mkdir()
    write_shard(tmp_path / "bad" / "00000.tar", {"a": "words", "b": None})
    assert submit(f"data.shards={tmp_path / 'bad'}") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: data.shards: ") and "sample 'b' is without a caption" in err
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    submit: Submit, shards: Path, tmp_path: Path, capsys: Capture
) -> None:
    folders = (tmp_path, shards, CHECKOUT / "runs", CHECKOUT / ".cache")
    before = tree(*folders)
    assert submit("dry_run=true") == 0
    assert tree(*folders) == before
    shown = capsys.readouterr().out
    assert "world size: 1 ranks = nodes 1 x gpus_per_node 1" in shown
    assert "batch:      size 4 = micro 2 x accumulation 2 x ranks 1" in shown
    assert "length:     3 steps = 12 samples" in shown
    assert "trainable, " in shown and f"run folder: {tmp_path / 'runs' / 'i2i' / 'i2i-'}" in shown
    assert "missing:" not in shown and "unknown" not in shown


def test_a_dry_run_indexes_nothing_and_says_so(submit: Submit, tmp_path: Path, capsys: Capture) -> None:
    write_shard(tmp_path / "00000.tar", {f"{key}": "words" for key in range(12)})
    before = tree(tmp_path)
    assert submit("dry_run=true", f"data.shards={tmp_path / '00000.tar'}") == 0
    assert tree(tmp_path) == before
    shown = capsys.readouterr().out
    assert "data:       unknown until indexed" in shown and "note: data: the shards of" in shown


def test_a_dry_run_lists_what_is_missing(submit: Submit, capsys: Capture) -> None:
    assert submit("dry_run=true", "data.shards=/no/where.tar", "+model.parts.vae.path=no/where") == 0
    missing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing: ")]
    assert missing[0] == "missing: data.shards: no such shard: /no/where.tar"
    assert missing[1].startswith("missing: model.parts.vae: 'no/where' is no local folder")


def test_help_names_the_choices(submit: Submit, capsys: Capture) -> None:
    assert submit("--help") == 0
    assert "recipe: i2i" in capsys.readouterr().out


@pytest.mark.slow
def test_from_any_folder_and_from_a_second_clone(arguments: list[str], tmp_path: Path) -> None:
    """The shim imports the clone it lies in, though the environment has another one installed."""
    clone = tmp_path / "clone"
    for package in ("launch", "synthos", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / package, clone / package, ignore=ignored)
    page = clone / "configs" / "recipe" / "i2i.yaml"
    page.write_text(page.read_text().replace("drop_text: 0.1", "drop_text: 0.25"))
    plan = (clone / "launch" / "plan.py").read_text()
    (clone / "launch" / "plan.py").write_text(plan.replace('"recipe": f"', '"recipe": f"of the clone: '))
    own_folders = [argument for argument in arguments if not argument.startswith("runs_dir=")]
    for root, cwd, mark in ((clone, "/", "of the clone: i2i"), (CHECKOUT, str(clone), "i2i")):
        command = [sys.executable, str(root / "launch" / "submit.py"), *own_folders, "dry_run=true"]
        done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert f"recipe:     {mark}, model tiny" in done.stdout and f"run folder: {root / 'runs'}" in done.stdout
    assert not (clone / "runs").exists()


@pytest.mark.slow
def test_a_run_is_done_once(submit: Submit, arguments: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert submit() == 0
    folder = only_run(tmp_path)
    state, record = read_state(folder), newest_record(folder)
    assert state.done and state.step == 3 and state.weights is not None
    assert (record["status"], record["start_step"], record["end_step"]) == ("done", 0, 3)
    assert "submit recipe=i2i" in (folder / "provenance" / "command.txt").read_text()
    before = tree(folder / "checkpoints", folder / "attempts")
    capsys.readouterr()
    assert submit("batch.micro=4") == 0  # other machines' settings are the same experiment
    assert capsys.readouterr().out == f"{folder} is done; its weights are in {state.weights}\n"
    assert tree(folder / "checkpoints", folder / "attempts") == before


def test_a_run_that_is_alive_is_left_alone(submit: Submit, tmp_path: Path, capsys: Capture) -> None:
    assert submit("dry_run=true") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("run folder: "))
    with hold(Path(line.removeprefix("run folder: "))) as lock:
        assert lock is not None and submit() == 1
    assert "is running already" in capsys.readouterr().err
    assert not (only_run(tmp_path) / "config.yaml").exists()


@pytest.mark.slow
def test_errors_of_the_code_raise_in_debug(submit: Submit, shards: Path, tmp_path: Path) -> None:
    """A shard that goes bad after the plan: the fault surfaces here, and the ledger is closed."""
    (tmp_path / "copy").mkdir()
    for file in shards.glob("*.tar"):
        shutil.copy(file, tmp_path / "copy" / file.name)
        open_index(str(tmp_path / "copy" / file.name))
    assert submit("dry_run=true", f"data.shards={tmp_path / 'copy'}") == 0
    for file in (tmp_path / "copy").glob("*.tar"):
        size = file.stat().st_size
        file.write_bytes(b"\0" * size)
    with pytest.raises((RuntimeError, ValueError, OSError)):
        submit(f"data.shards={tmp_path / 'copy'}")
    assert newest_record(only_run(tmp_path))["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ask", "cause", "code"),
    [
        (lambda process, folder: process.send_signal(signal.SIGINT), "interrupt", 130),
        (lambda process, folder: process.send_signal(signal.SIGTERM), "terminate", 143),
        (lambda process, folder: (folder / "control" / "stop").touch(), "stop", 0),
    ],
)
def test_a_run_that_is_stopped_goes_on(
    arguments: list[str], tmp_path: Path, ask: Callable[..., object], cause: str, code: int, capfd: Capture
) -> None:
    process = start(arguments, *LONG, "gpus_per_node=2")
    folder = wait_for_steps(tmp_path)
    ask(process, folder)
    assert process.wait(timeout=120) == code
    record, verdict = newest_record(folder), json.loads((folder / "control" / "verdict.json").read_text())
    assert (verdict["status"], verdict["cause"], verdict["attempt"]) == ("stopped", cause, 1)
    assert (record["status"], record["cause"], record["end_step"]) == ("stopped", cause, verdict["step"])
    assert read_state(folder).step == verdict["step"] > 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["gpus_per_node"] == 2

    again = start(arguments, *LONG)  # on one rank now
    wait_for_steps(tmp_path, after=verdict["step"])
    assert f"continues from step {verdict['step']}" in capfd.readouterr().out
    again.send_signal(signal.SIGINT)
    assert again.wait(timeout=120) == 130
    record = newest_record(folder)
    assert (record["attempt"], record["start_step"]) == (2, verdict["step"]) and record["end_step"] > verdict["step"]


@pytest.mark.slow
def test_a_run_whose_agent_was_killed_stays_locked_until_its_ranks_end(arguments: list[str], tmp_path: Path) -> None:
    process = start(arguments, *LONG)
    folder = wait_for_steps(tmp_path)
    process.kill()
    process.wait(timeout=20)
    with hold(folder) as lock:
        assert lock is None
    (folder / "control" / "stop").touch()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with hold(folder) as lock:
            if lock is not None:
                break
        time.sleep(0.2)
    assert lock is not None and json.loads((folder / "control" / "verdict.json").read_text())["cause"] == "stop"


def start(arguments: list[str], *overrides: str) -> subprocess.Popen[bytes]:
    """The command in a process of its own, away from its folder."""
    changed = {override.split("=")[0] for override in overrides}
    kept = [argument for argument in arguments if argument.split("=")[0] not in changed]
    command = [sys.executable, str(CHECKOUT / "launch" / "submit.py"), *kept, *overrides]
    return subprocess.Popen(command, cwd="/", env={**environment(), "OMP_NUM_THREADS": "1"})


def wait_for_steps(tmp_path: Path, after: int = 0, seconds: float = 120) -> Path:
    """The run's folder as soon as it has logged a step beyond `after`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for metrics in (tmp_path / "runs").glob("*/*/metrics.jsonl"):
            lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
            if lines and json.loads(lines[-1])["step"] > after:
                return metrics.parent
        time.sleep(0.1)
    raise AssertionError(f"no step within {seconds} s: {os.listdir(tmp_path)}")
