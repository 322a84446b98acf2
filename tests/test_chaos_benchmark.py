"""What the soak says of two runs: equal only where every byte that counts is; its table; and whom its faults hit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos import compare, main, table
from benchmarks.faults import Victim


def run(folder: Path, loss: float = 0.5, weights: bytes = b"w", seconds: float = 1.0) -> Path:
    for path, content in {
        "checkpoints/step_00000005/__0_0.distcp": b"older, and pruned in the other run",
        "checkpoints/step_00000009/__0_0.distcp": b"c",
        "weights/step_00000009/transformer/a.safetensors": weights,
        "data/trace-rank-00000.bin": b"t",
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    row = {
        "step": 9,
        "train/loss": loss,
        "train/grad_norm/projector": 1.0,
        "data/digest": "d",
        "train/samples_per_s": seconds,
    }
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 9, "attempt": 1}) + "\n" + json.dumps(row) + "\n")
    return folder


def test_runs_are_equal_but_for_their_times_and_their_attempts(tmp_path: Path) -> None:
    hit, alone = run(tmp_path / "hit", seconds=2.0), run(tmp_path / "alone")
    (alone / "checkpoints" / "step_00000005" / "__0_0.distcp").unlink()
    assert set(compare(hit, alone).values()) == {True}


@pytest.mark.parametrize(("what", "change"), [("losses", {"loss": 0.25}), ("weights", {"weights": b"W"})])
def test_a_difference_is_told(tmp_path: Path, what: str, change: dict[str, Any]) -> None:
    same = compare(run(tmp_path / "hit", **change), run(tmp_path / "alone"))
    assert [name for name, equal in same.items() if not equal] == [what]


def test_the_table_adds_up_each_kind() -> None:
    rows = [
        {"fault": "drain", "cause": "drain", "lost_steps": 0, "seconds": 9.0},
        {"fault": "slow_save", "cause": "requeued", "lost_steps": 4, "seconds": 31.0},
        {"fault": "slow_save", "cause": "preempted", "lost_steps": 1, "seconds": 29.0},
    ]
    same = {"losses": True, "weights": False}
    said = table({"faults": rows, "steps": 70, "same": same, "audit": {"lost": 0}})
    assert "| drain | 1 | drain | 0 | 9, 9 |" in said and "| slow_save | 2 | preempted, requeued | 4 | 31, 31 |" in said
    assert said.endswith("3 faults in 70 steps: losses equal, weights **differ**. Audit: lost 0.")


def test_stored_figures_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for number, (backend, fault) in enumerate((("submitit", "drain"), ("sbatch", "requeue"))):
        row = {"fault": fault, "cause": "drain", "lost_steps": number, "seconds": 9.0}
        about = {"backend": backend, "tracking": "cgroup (as the freezer is writable)", "steps": 7}
        figures = {**about, "faults": [row], "same": {"losses": True}, "audit": {}}
        files.append(tmp_path / f"{backend}.json")
        files[-1].write_text(json.dumps(figures))
    assert main(["--show", *map(str, files)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("| submitit, cgroup | sbatch, cgroup |")
    assert lines[2:4] == ["| drain | drain, 0, 9 |  |", "| requeue |  | drain, 1, 9 |"]
    assert lines[-1].startswith("- sbatch, cgroup: 1 faults in 7 steps: losses equal.")


def test_a_node_loses_its_power_in_one_cluster_only(tmp_path: Path) -> None:
    """Two on one machine have a job 4 on a node2 each, when the back ends are tried side by side."""
    lives = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    here = {"SLURM_JOB_ID": "4", "SLURMD_NODENAME": "node2", "SLURM_CONF": f"{tmp_path}/a/slurm.conf"}
    others = ({"SLURM_CONF": f"{tmp_path}/b/slurm.conf"}, {"SLURMD_NODENAME": "node1"}, {"SLURM_JOB_ID": "5"})
    processes = [
        subprocess.Popen(lives, env=here | other, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for other in ({}, *others)
    ]
    try:
        for process in processes:
            assert process.stdout and process.stdout.readline()
        victim = Victim(tmp_path / "run", "4", tmp_path / "a", {})
        assert victim.processes_on("node2") == [processes[0].pid]
    finally:
        for process in processes:
            process.communicate()
