"""Sweeps from the command line: what is refused, what is planned, and points that run on one CPU after another.

tests/slurm/test_sweep.py has them in a real array.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from launch import array
from launch.attempts import records
from launch.cli import main
from launch.plan import Plan
from launch.rundir import read_state
from launch.survey import Survey
from launch.sweep import Planned, check
from synthos.data.check import DataFacts
from synthos.schema import JobConfig
from tests.launch.conftest import Submit
from tests.support import compose_for_test

Capture = pytest.CaptureFixture[str]


def answers(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Programs of Slurm that print a text, first on PATH."""
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text("#!/bin/sh\n" + (f"echo '{text}'\n" if text else ""))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def configured(*overrides: str) -> JobConfig:
    return compose_for_test("recipe=i2i", "model=tiny", "data=photos", "cluster=slurm", "runs_dir=/runs", *overrides)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ("nodes=1,2", "cluster=slurm"),
            "nodes: is no part of what a run is, so its values can't be swept; expected one",
        ),
        (("batch.micro=1,2",), "batch.micro: is no part of what a run is, so its values can't be swept; expected one"),
        (("runs_dir=a,b",), "runs_dir: is no part of what a run is, so its values can't be swept; expected one"),
        (("seed=4,4",), "seed: seed=4 and seed=4 are the same experiment"),
        (("optim.lr=1e-3,-1,-2", "seed=0,1"), "optim.lr=-1 seed=0, optim.lr=-1 seed=1: optim.lr: -1.0 is not allowed"),
        (("optim.lr=1e-3,1e-4", "follow=true", "cluster=slurm"), "follow: true has no effect with a sweep"),
        (
            ("optim.lr=1e-3,1e-4", "array_parallelism=2"),
            "array_parallelism: 2 has no effect with cluster.backend=debug",
        ),
        (("array_parallelism=2",), "array_parallelism: 2 has no effect without a sweep; expected null"),
        (
            ("seed=1,2", "array_parallelism=2", "cluster=slurm", "cluster.requeue=chain"),
            "array_parallelism: 2 can't hold with cluster.requeue=chain",
        ),
    ],
)
def test_what_can_be_no_sweep_is_one_message_and_nothing_is_written(
    submit: Submit, overrides: tuple[str, ...], expected: str, tmp_path: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    answers(tmp_path / "bin", monkeypatch, sbatch="", scontrol="MaxArraySize = 1001", sinfo="", squeue="")
    assert submit(*overrides) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {expected}") and "Traceback" not in shown.err
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_shows_what_points_share_each_point_and_the_array(
    submit: Submit, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(tmp_path / "bin", monkeypatch, sbatch="", scontrol="MaxArraySize = 3", squeue="")
    swept = ("optim.lr=1e-3,1e-4", "seed=0,1", "cluster=slurm", "cluster.time=1:00:00", "array_parallelism=2")
    assert submit(*swept, "dry_run=true") == 0
    shown = capsys.readouterr().out
    assert shown.count("recipe:     i2i") == 1 and "\nrun folder:" not in shown
    rows = re.findall(r"(\d) +(0\.001|0\.0001) +([01]) +(i2i-[0-9a-f]{8}) +nothing yet", shown)
    assert [row[:3] for row in rows] == [
        ("0", "0.001", "0"), ("1", "0.001", "1"), ("2", "0.0001", "0"), ("3", "0.0001", "1"),
    ]  # fmt: skip
    assert len({row[3] for row in rows}) == 4
    group = tmp_path / "runs" / "i2i-optim.lr+seed"
    first, second = (line for line in shown.splitlines() if line.startswith("env -i"))
    assert f"--array=0-2%2 {group}/{rows[0][3]}/code/slurm/train.sbatch {group}/.sweep-0001" in first
    assert "--dependency" not in first and f"--output={group}/.sweep-0001/%a/slurm/%A_%a.out" in first
    assert "--array=0-0%2 '--dependency=afterany:<the array before>'" in second and ".sweep-0002" in second
    assert not (tmp_path / "runs").exists()


def test_the_points_of_an_array_ask_for_the_same(tmp_path: Path) -> None:
    def planned(number: int, config: Any) -> Planned:
        survey = Survey(DataFacts(100, 8, 1, "f", []), [], [])
        return Planned({"experiment": str(number)}, Plan(config, tmp_path / str(number), None, survey, None, 10))

    plain = configured()
    others = [configured("nodes=2", "cluster.time=1:00:00"), configured("+cluster.sbatch.exclusive=true"),
              configured("cluster.environment=[A]"), configured("cluster.requeue=none")]  # fmt: skip
    check([planned(0, plain), planned(1, plain)], None)
    with pytest.raises(ValueError) as caught:
        check([planned(0, plain), *(planned(n, config) for n, config in enumerate(others, start=1))], None)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "cluster.time", "nodes", "cluster.sbatch.exclusive", "cluster.environment", "cluster.requeue",
    ]  # fmt: skip
    assert lines[1].startswith("nodes: '1' at experiment=0, '2' at experiment=1; expected one value")


def test_an_array_hears_of_its_limit_as_early_as_the_slowest_and_leaves_out_every_bad_node(tmp_path: Path) -> None:
    runs = [(configured("+cluster.sbatch.exclude=node9"), tmp_path / "g" / name) for name in ("a", "b", "c")]
    for (_, run), save, bad in zip(runs, (10, 400, 30), (["node2"], ["node1"], []), strict=True):
        (run / "control").mkdir(parents=True)
        (run / "control" / "heartbeat.json").write_text(json.dumps({"save_seconds": save}))
        for number in (1, 2):
            attempt = run / "attempts" / f"{number:04d}"
            attempt.mkdir(parents=True)
            (attempt / "attempt.json").write_text(json.dumps({"attempt": number, "bad_nodes": bad}))
    command = array.command(runs, tmp_path / "g" / ".sweep-0001", None, "17")
    assert "--signal=USR2@920" in command and "--array=0-2" in command and "--job-name=g" in command
    assert "--exclude=node9,node2,node1" in command and "--dependency=afterany:17" in command
    assert not any(word.startswith("--dependency") for word in array.command(runs, tmp_path / "g" / "x", None))


def test_points_run_here_one_after_another_and_a_failed_one_keeps_no_other(
    submit: Submit, tmp_path: Path, capsys: Capture
) -> None:
    swept = ("seed=0,1", "optim.steps=1", "validate.samples=0", "data.holdout_fraction=0")
    assert submit(*swept, "dry_run=true") == 0
    first, second = (
        tmp_path / "runs" / "i2i-seed" / name for name in re.findall(r"i2i-\w{8}", capsys.readouterr().out)
    )
    first.mkdir(parents=True)
    (first / "checkpoints").touch()  # where a folder has to be
    assert submit(*swept) == 1
    shown = capsys.readouterr()
    assert not read_state(first).done and read_state(second).done
    assert re.search(rf"0 +{first.name} +FAILED|0 +{first.name} +failed", shown.out) and "Traceback" in shown.err
    assert re.search(rf"1 +{second.name} +done +1", shown.out)
    (first / "checkpoints").unlink()
    assert submit(*swept) == 0
    assert f"{second} is done" in capsys.readouterr().out
    assert read_state(first).done and len(records(first)) == 2 and len(records(second)) == 1
    assert submit("seed=range(3)", *swept[1:], "dry_run=true") == 0
    assert len(re.findall(r"step 1, done", capsys.readouterr().out)) == 2  # a third point leaves the two what they are


def test_a_run_is_waited_for_only_where_its_end_can_be_known(
    submit: Submit, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNTHOS_RUNS", str(tmp_path / "elsewhere"))
    answers(tmp_path / "bin", monkeypatch, sbatch="", scontrol="", sinfo="", squeue="")
    on_slurm = ("cluster=slurm", "cluster.backend=sbatch", "cluster.gpu_flag=null", "name=first")
    assert submit(*on_slurm) == 0
    (first,) = (tmp_path / "runs" / "i2i").iterdir()
    capsys.readouterr()
    assert submit("seed=1", "after=third") == 2
    assert f"third: no run in {tmp_path / 'runs'} has this name" in capsys.readouterr().err
    assert submit("seed=1", "after=first") == 2
    assert f"after: {first.name} is prepared (never started) and has no job; expected a run" in capsys.readouterr().err
    waits = f"41 |0 |PENDING |Priority | |N/A |{first}/slurm/%j.out "
    answers(tmp_path / "bin", monkeypatch, squeue=waits)
    assert submit("seed=1", "after=first") == 2
    assert "with cluster.backend=debug nothing waits for its job 41" in capsys.readouterr().err
    assert submit("seed=1,2", "after=first", *on_slurm, "name=second", "dry_run=true") == 0
    shown = capsys.readouterr().out
    assert f"after:      job 41 of {first.name}, once that is done" in shown and "--dependency=afterok:41" in shown
    assert submit("seed=1", "after=first", *on_slurm, "name=second") == 0
    assert "--dependency=afterok:41" in capsys.readouterr().out
    (second,) = (path for path in (tmp_path / "runs" / "i2i").iterdir() if path != first)
    assert "afterok" not in (second / "config.yaml").read_text()  # another attempt waits for nothing
    config = first / "config.yaml"
    config.write_text(config.read_text().replace("requeue: scontrol", "requeue: chain"))
    assert submit("seed=1", "after=first", *on_slurm) == 2
    assert f"after: {first.name} has cluster.requeue=chain" in capsys.readouterr().err


def test_a_generation_waits_for_the_weights_of_a_run(
    submit: Submit, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the same generation before and after they are there."""
    answers(tmp_path / "bin", monkeypatch, sbatch="", scontrol="", sinfo="", squeue="")
    on_slurm = ("cluster=slurm", "cluster.backend=sbatch", "cluster.gpu_flag=null")
    assert submit(*on_slurm, "name=first", "validate.samples=0", "data.holdout_fraction=0", "optim.steps=1") == 0
    (first,) = (tmp_path / "runs" / "i2i").iterdir()
    asked = ["generate", "prompt=a", "steps=1", *on_slurm[1:], "cluster=slurm", f"runs_dir={tmp_path / 'runs'}",
             f"cache_dir={tmp_path / 'cache'}"]  # fmt: skip
    capsys.readouterr()
    assert main([*asked, "weights=first"]) == 2
    assert f"weights: {first.name} is not done" in capsys.readouterr().err
    answers(tmp_path / "bin", monkeypatch, squeue=f"41 |0 |PENDING |Priority | |N/A |{first}/slurm/%j.out ")
    assert main([*asked, "weights=first", "after=first", "average=true"]) == 2
    assert f"average: true is not allowed, {first} holds raw weights only" in capsys.readouterr().err
    assert main([*asked, "weights=first", "after=first"]) == 0
    shown = capsys.readouterr().out
    assert "--dependency=afterok:41" in shown and f"weights:    {first}, raw, of recipe i2i" in shown
    (job,) = (tmp_path / "runs" / "generate").iterdir()
    answers(tmp_path / "bin", monkeypatch, squeue="")
    assert main(["resume", str(first), "cluster=debug", "cluster.device=cpu"]) == 0
    capsys.readouterr()
    assert main([*asked, "weights=first", "dry_run=true"]) == 0
    assert f"run folder: {job}" in capsys.readouterr().out
