"""`synthos submit` from end to end: what it refuses, what it plans, and real runs on one CPU."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.agent import kill
from launch.attempts import newest_record
from launch.compose import CHECKOUT
from launch.rundir import hold, read_state
from synthos.data.index import open_index
from synthos.data.shards import ShardPlace
from synthos.schema import RunConfig
from synthos.strict import read_config
from tests.launch.conftest import Submit, tree, write_shard
from tests.support import environment

Capture = pytest.CaptureFixture[str]
Start = Callable[..., subprocess.Popen[bytes]]
LONG = ("cluster=local", "optim.steps=100000")  # a run that only a stop ends


def only_run(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "runs" / "i2i").iterdir()
    return folder


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("force=old",), "force: 'old' is not allowed; expected null or new"),
        (("optim.lrr=1",), "optim.lrr: unknown key; did you mean 'lr'?"),
        (("recipe.drop_txt=0.1",), "recipe.drop_txt: unknown key; did you mean 'drop_text'?"),
        (("+recipe.drop_txt=0.1",), "recipe.drop_txt: unknown key; did you mean 'drop_text'?"),
        (("recipe=i2j",), "recipe: 'i2j' is unknown; did you mean 'i2i'? allowed: "),
        (("recipe.name=i2j",), "recipe.name: no recipe 'i2j'; did you mean 'i2i'? allowed: "),
        (
            ("batch.size=9",),
            "batch.size: 9 is not a multiple of batch.micro x ranks = 2 x 1 = 2; nearest legal: batch.size",
        ),
        (("data.height=40",), "data.height: 40 is not a multiple of 16; nearest: 32 or 48"),
        (("optim.epochs=1",), "optim.steps, optim.epochs: both are set (3 and 1.0)"),
        (("optim.steps=null",), "optim.steps, optim.epochs: neither is set"),
        (("data.lanes=3",), "data.lanes: 3 "),
        (
            ("optim.steps=null", "optim.epochs=0.1"),
            "optim.epochs: 0.1 epochs of ",
        ),
        (
            ("optim.steps=null", "optim.epochs=1", "optim.warmup_steps=50"),
            "optim.warmup_steps: 50 is more than the ",
        ),
        (("runs_dir=/dev/null/runs",), "runs_dir: /dev/null/runs/i2i/i2i-"),
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


@pytest.mark.parametrize("kind", ["true", "full"])
def test_a_dry_run_prints_the_plan_and_writes_nothing(
    submit: Submit, shards: Path, tmp_path: Path, capsys: Capture, kind: str
) -> None:
    folders = (tmp_path, shards, CHECKOUT / "runs", CHECKOUT / ".cache")
    before = tree(*folders)
    assert submit(f"dry_run={kind}") == 0
    assert tree(*folders) == before
    shown = capsys.readouterr().out
    assert "world size: 1 ranks = nodes 1 x gpus_per_node 1" in shown
    assert "batch:      size 4 = micro 2 x accumulation 2 x ranks 1" in shown
    assert "length:     3 steps = 12 samples" in shown
    assert ("trainable, " in shown) == (kind == "full") and f"run folder: {tmp_path / 'runs' / 'i2i' / 'i2i-'}" in shown
    assert "missing:" not in shown and "unknown" not in shown


def test_a_dry_run_indexes_nothing_and_says_so(submit: Submit, tmp_path: Path, capsys: Capture) -> None:
    write_shard(tmp_path / "00000.tar", {f"{key}": "words" for key in range(12)})
    before = tree(tmp_path)
    assert submit("dry_run=true", f"data.shards={tmp_path / '00000.tar'}") == 0
    assert tree(tmp_path) == before
    shown = capsys.readouterr().out
    assert "data:       unknown until indexed" in shown and "note: data: the shards of" in shown


def test_a_dry_run_lists_what_is_missing(submit: Submit, capsys: Capture) -> None:
    vae = "{path: no/where, class_name: AutoencoderKLWan, config: {base_dim: 4, num_res_blocks: 1}}"
    assert submit("dry_run=true", "data.shards=/no/where.tar", f"+model.parts.vae={vae}") == 0
    missing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing: ")]
    assert missing[0] == "missing: data.shards: no such shard: /no/where.tar"
    assert missing[1].startswith("missing: model.parts.vae: 'no/where' is no local folder")


def test_help_names_the_choices(submit: Submit, capsys: Capture) -> None:
    assert submit("--help") == 0
    assert any(line.startswith("recipe: ") and "i2i" in line for line in capsys.readouterr().out.splitlines())


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
    done = subprocess.run(
        [*command, "optim.lrr=1"], cwd="/", env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: optim.lrr: unknown key") and len(done.stderr.splitlines()) == 1


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
    assert submit("force=new", "dry_run=true") == 0
    assert f"run folder: {folder}-g2\nholds:      nothing yet\n" in capsys.readouterr().out


def test_a_run_that_is_alive_is_left_alone(submit: Submit, tmp_path: Path, capsys: Capture) -> None:
    assert submit("dry_run=true") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("run folder: "))
    with hold(Path(line.removeprefix("run folder: "))) as lock:
        assert lock is not None and submit() == 0
    assert "is running already" in capsys.readouterr().err
    assert not (only_run(tmp_path) / "config.yaml").exists()


@pytest.mark.slow
def test_faults_of_the_run_raise_in_debug_and_are_named_by_local(
    submit: Submit, shards: Path, tmp_path: Path, capsys: Capture
) -> None:
    """A shard that went bad after it was indexed; the ledger is closed either way."""
    (tmp_path / "copy").mkdir()
    for file in shards.glob("*.tar"):
        shutil.copy(file, tmp_path / "copy" / file.name)
        open_index(ShardPlace.beside(str(tmp_path / "copy" / file.name)))
    for file in (tmp_path / "copy").glob("*.tar"):
        size = file.stat().st_size
        file.write_bytes(b"\0" * size)
    with pytest.raises(RuntimeError, match="has changed since it was indexed"):
        submit(f"data.shards={tmp_path / 'copy'}")
    assert newest_record(only_run(tmp_path))["status"] == "failed"
    capsys.readouterr()
    assert submit(f"data.shards={tmp_path / 'copy'}", "cluster=local") == 1
    record = newest_record(only_run(tmp_path))
    assert (record["attempt"], record["status"], record["cause"]) == (2, "failed", "crash")
    err = capsys.readouterr().err
    assert err.startswith("attempt 2 failed at rank 0: RuntimeError: ") and "has changed since it was indexed" in err


@pytest.mark.slow
@pytest.mark.long
def test_an_interrupted_run_goes_on_with_other_ranks(start: Start, tmp_path: Path, capfd: Capture) -> None:
    process = start(*LONG, "gpus_per_node=2")
    folder = wait_for_steps(process, tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    step = check_stopped(folder, "interrupt")
    assert read_state(folder).step == step > 0
    assert read_config(RunConfig, folder / "config.yaml").ranks == 2

    again = start(*LONG)
    wait_for_steps(again, tmp_path, after=step)
    assert f"continues from step {step}" in capfd.readouterr().out
    again.send_signal(signal.SIGINT)
    assert again.wait(timeout=120) == 130
    record = newest_record(folder)
    assert (record["attempt"], record["start_step"]) == (2, step) and record["end_step"] > step


@pytest.mark.slow
@pytest.mark.parametrize(("cause", "code"), [("terminate", 143), ("stop", 0)])
def test_other_ways_to_end_a_run(start: Start, tmp_path: Path, cause: str, code: int) -> None:
    process = start(*LONG)
    folder = wait_for_steps(process, tmp_path)
    if cause == "terminate":
        process.send_signal(signal.SIGTERM)
    else:
        (folder / "control" / "stop").touch()
    assert process.wait(timeout=120) == code
    check_stopped(folder, cause)


@pytest.mark.slow
def test_a_run_whose_agent_was_killed_stays_locked_until_its_ranks_end(start: Start, tmp_path: Path) -> None:
    process = start(*LONG)
    folder = wait_for_steps(process, tmp_path)
    process.kill()
    process.wait(timeout=20)
    assert is_held(folder)
    (folder / "control" / "stop").touch()
    end = time.monotonic() + 60
    while is_held(folder) and time.monotonic() < end:
        time.sleep(0.2)
    assert not is_held(folder) and read_state(folder).verdict["cause"] == "stop"


@pytest.fixture
def start(arguments: list[str]) -> Iterator[Start]:
    """Runs the command in a process of its own, away from its folder; what is left of it is killed in the end."""
    processes: list[subprocess.Popen[bytes]] = []

    def run(*overrides: str) -> subprocess.Popen[bytes]:
        changed = {override.split("=")[0] for override in overrides}
        kept = [argument for argument in arguments if argument.split("=")[0] not in changed]
        command = [sys.executable, str(CHECKOUT / "launch" / "submit.py"), *kept, *overrides]
        processes.append(subprocess.Popen(command, cwd="/", env={**environment(), "OMP_NUM_THREADS": "1"}))
        return processes[-1]

    yield run
    for process in processes:
        if process.poll() is None:
            kill(process.pid)
            process.wait(timeout=20)


def wait_for_steps(process: subprocess.Popen[bytes], tmp_path: Path, after: int = 0) -> Path:
    """The run's folder as soon as it has logged a step beyond `after`."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        for metrics in (tmp_path / "runs").glob("*/*/metrics.jsonl"):
            lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
            if lines and json.loads(lines[-1])["step"] > after:
                return metrics.parent
        time.sleep(0.1)
    raise AssertionError(f"no step beyond {after}; exit code {process.poll()}")


def check_stopped(folder: Path, cause: str) -> int:
    """The first attempt and its verdict tell the same; returns the step it stopped at."""
    record, verdict = newest_record(folder), read_state(folder).verdict
    assert (verdict["status"], verdict["cause"], verdict["attempt"]) == ("stopped", cause, 1)
    assert (record["status"], record["cause"], record["end_step"]) == ("stopped", cause, verdict["step"])
    return int(verdict["step"])


def is_held(folder: Path) -> bool:
    with hold(folder) as lock:
        return lock is None
