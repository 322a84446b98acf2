"""What is asked of Slurm, and what happens where there is none; tests/slurm has a real one."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import slurm
from launch.compose import compose
from synthos.files import write_json
from tests.launch.conftest import Submit
from tests.support import compose_for_test

BASE = ["recipe=i2i", "model=tiny", "data=photos"]


def on_path(folder: Path, monkeypatch: pytest.MonkeyPatch, *programs: str) -> None:
    """A PATH of one folder, with programs that do nothing."""
    for program in programs:
        (folder / program).write_text("#!/bin/sh\n")
        (folder / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def chosen(*overrides: str) -> str:
    return compose([*BASE, *overrides]).config.cluster.name


def test_without_a_choice_slurm_is_taken_where_it_is_or_where_one_node_is_not_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_path(tmp_path, monkeypatch)
    assert (chosen(), chosen("nodes=4"), chosen("nodes=4", "cluster=local")) == ("local", "slurm", "local")
    on_path(tmp_path, monkeypatch, "sbatch")
    assert (chosen(), chosen("cluster=local"), chosen("cluster=debug")) == ("slurm", "local", "debug")


def test_without_slurm_many_nodes_can_be_planned_but_not_submitted(
    submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").symlink_to(str(shutil.which("git")))
    on_path(tmp_path / "bin", monkeypatch)
    asked = ("cluster=slurm", "nodes=2", "batch.micro=1")
    needs = "cluster: slurm needs sbatch, which is not on PATH; submit from a login node of your cluster, or use "
    assert submit(*asked, "dry_run=true") == 0
    shown = capsys.readouterr().out
    assert f"missing: {needs}" in shown and "#SBATCH --nodes=2" in shown
    assert submit(*asked) == 2
    assert capsys.readouterr().err == f"error: {needs}cluster=local nodes=1 on this machine\n"
    assert not (tmp_path / "runs").exists()


def test_following_is_for_what_is_submitted(submit: Submit, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit("follow=true") == 2
    assert "follow: true has no effect with cluster.backend=debug; expected false" in capsys.readouterr().err


def test_a_preempted_job_is_in_the_queue_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path(tmp_path, monkeypatch, "squeue")
    for state in ("PREEMPTED", "REVOKED"):
        (tmp_path / "squeue").write_text(f"#!/bin/sh\necho '{state}|node1|None'\n")
        assert slurm.queued("2") is None


def test_nodes_are_not_known_to_be_down_where_slurm_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_path(tmp_path, monkeypatch, "sinfo")
    (tmp_path / "sinfo").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    monkeypatch.setattr(slurm, "TIMEOUT_SECONDS", 0.2)
    assert slurm.down(["node1"]) == []


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("sbatch: error: bad partition: x\nallocation failure: no\n", "bad partition: x; allocation failure: no"),
        ("sbatch: Job 3 to start at 2026-11-21T10:00:00\n", "Job 3 to start at 2026-11-21T10:00:00"),
        ("", ""),
    ],
)  # fmt: skip
def test_slurms_own_words(said: str, words: str) -> None:
    assert slurm.words(said) == words


@pytest.mark.parametrize(("preempts", "warned"), [("preempt/partition_prio", True), ("preempt/none", False)])
def test_a_site_without_preemption_is_not_warned_of(
    tools: Callable[..., Path], tmp_path: Path, preempts: str, warned: bool
) -> None:
    (tmp_path / "control").mkdir()
    write_json(tmp_path / "control" / "heartbeat.json", {"save_seconds": 31.0})
    tools(
        sbatch="Job 1 to start", scontrol=f"PartitionName=gpu GraceTime=0\nKillWait = 30 sec\nPreemptType = {preempts}"
    )
    problems, said = slurm.look(compose_for_test("recipe=i2i", "model=tiny", "data=photos", "cluster=slurm"), tmp_path)
    assert not problems and any("a preemption leaves 30 s" in line for line in said) == warned


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), 3),
        (("cluster.constraint=fast",), 2),
        (("cluster.constraint='fast&new'",), 1),
        (("cluster.constraint='[new|old]'",), 2),
        (("cluster.gpu_type=h100",), 2),
        (("cluster.gpu_type=h100", "gpus_per_node=8"), 1),
        (("cluster.gpu_flag=null",), 4),
    ],
)
def test_nodes_that_a_job_could_not_have_are_no_others(
    tools: Callable[..., Path], overrides: tuple[str, ...], expected: int
) -> None:
    nodes = [
        "n1 fast gpu:a100:4",
        "n2 fast,new gpu:h100:8(S:0-1)",
        "n3 old gpu:h100:4",
        "n4 (null) (null)",
        "n5 fast gpu:8",
    ]
    tools(sinfo="\n".join([*nodes, nodes[0]]), scontrol="n5")  # a node of two partitions is listed twice
    config = compose_for_test("recipe=i2i", "model=tiny", "data=photos", "cluster=slurm", "batch.size=8", *overrides)
    assert slurm.others(config, ["n5"]) == expected
