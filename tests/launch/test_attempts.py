"""The ledger of attempts."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from launch import attempts
from synthos.strict import write_config
from tests.launch.conftest import git
from tests.support import run_config


def leave_verdict(folder: Path, **verdict: Any) -> dict[str, Any]:
    (folder / "control").mkdir(exist_ok=True)
    (folder / "control" / "verdict.json").write_text(json.dumps(verdict))
    return verdict


def test_an_attempt_is_recorded_from_start_to_end(tmp_path: Path) -> None:
    assert attempts.begin(tmp_path, ["a", "b"]) == 1
    record = attempts.newest_record(tmp_path)
    assert record["pid"] == os.getpid() and record["command"] == ["a", "b"] and record["start_step"] == 0
    verdict = leave_verdict(tmp_path, status="stopped", cause="stop", step=7, attempt=1, message="")
    assert attempts.end(tmp_path, 1) == verdict
    closed = attempts.newest_record(tmp_path)
    assert (closed["status"], closed["cause"], closed["end_step"]) == ("stopped", "stop", 7)
    assert all(closed[key] == value for key, value in record.items()) and closed["started"] <= closed["ended"]


def test_every_attempt_records_the_code_it_ran(tmp_path: Path, checkout: Path) -> None:
    """The first with a change, the second with that change committed."""
    attempts.begin(tmp_path, [], checkout)
    first = attempts.newest_record(tmp_path)
    assert (first["commit"], first["changed"]) == (git(checkout, "rev-parse", "HEAD"), True)
    git(checkout, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "second")
    attempts.begin(tmp_path, [], checkout)
    second = attempts.newest_record(tmp_path)
    assert (second["commit"], second["changed"]) == (git(checkout, "rev-parse", "HEAD"), False)
    assert second["commit"] != first["commit"]


def test_the_verdict_of_an_earlier_attempt_is_not_taken_for_this_one(tmp_path: Path) -> None:
    leave_verdict(tmp_path, status="done", cause="finished", step=7, attempt=1, message="")
    attempts.begin(tmp_path, [])
    assert attempts.begin(tmp_path, []) == 2
    verdict = attempts.end(tmp_path, 2)
    assert (verdict["status"], verdict["cause"]) == ("failed", "killed")
    assert attempts.newest_record(tmp_path)["status"] == "failed"


def test_a_signal_of_an_earlier_attempt_is_forgotten_and_a_wish_is_not(tmp_path: Path) -> None:
    stop = tmp_path / "control" / "stop"
    stop.parent.mkdir()
    for text in ("", "{}", '{"cause": "stop"}'):  # `touch` may have met a job that was still waiting
        stop.write_text(text)
        attempts.begin(tmp_path, [])
        assert stop.exists()
    stop.write_text('{"cause": "notice"}')
    attempts.begin(tmp_path, [])
    assert not stop.exists()


def test_one_attempt_at_most_is_open(tmp_path: Path) -> None:
    """What nobody closed is closed by the next: by the same job, which Slurm has started again, or by another."""
    (tmp_path / "control").mkdir()
    write_config(run_config(), tmp_path / "config.yaml")
    attempts.begin(tmp_path, [], job="12.0", nodes=["node1"])
    attempts.begin(tmp_path, [], job="12.1", nodes=["node2"])
    (tmp_path / "control" / "stop").write_text('{"cause": "terminate"}')
    attempts.begin(tmp_path, [], job="12.2", nodes=["node1", "node2"])
    attempts.begin(tmp_path, [], job="13.0")
    lost, slow, gone, live = attempts.records(tmp_path)
    assert (lost["cause"], lost["bad_nodes"], lost["next"]["decision"]) == ("node_failure", ["node1"], "requeue")
    assert (slow["cause"], slow["next"]["decision"]) == ("requeued", "requeue") and "terminate" in slow["message"]
    assert gone["cause"] == "killed" and "next" not in gone and "ended" not in live


def test_what_the_batch_script_could_not_decide_is_told_by_the_next_start_of_the_job(tmp_path: Path) -> None:
    """It was killed after the agent had closed the record."""
    (tmp_path / "control").mkdir()
    write_config(run_config(), tmp_path / "config.yaml")
    attempts.begin(tmp_path, [], job="12.0", nodes=["node1", "node2"])
    leave_verdict(tmp_path, status="stopped", cause="terminate", step=7, attempt=1, message="")
    attempts.end(tmp_path, 1)
    attempts.begin(tmp_path, [], job="12.1")
    first, _ = attempts.records(tmp_path)
    assert (first["status"], first["cause"], first["next"]["decision"]) == ("stopped", "requeued", "requeue")
    assert first["end_step"] == 7


def test_what_takes_its_node_down_each_time_is_not_started_for_ever(tmp_path: Path) -> None:
    """Slurm starts it again by itself; nobody else decides."""
    write_config(run_config("cluster=slurm", "cluster.requeue=none"), tmp_path / "config.yaml")
    for restart in range(3):
        attempts.begin(tmp_path, [], job=f"12.{restart}", nodes=["node1"])
    with pytest.raises(RuntimeError, match="does not go on: no_progress: 3 attempts"):
        attempts.begin(tmp_path, [], job="12.3", nodes=["node1"])
    *before, last = attempts.records(tmp_path)
    assert [record["next"]["decision"] for record in (*before, last)] == ["requeue", "requeue", "end"]
    assert last["bad_nodes"] == ["node1"]
    assert attempts.begin(tmp_path, [], job="13.0", nodes=["node1"]) == 4  # somebody submits it again


def test_a_damaged_checkpoint_is_neither_where_an_attempt_began_nor_what_it_left(tmp_path: Path) -> None:
    write_config(run_config("batch.size=8"), tmp_path / "config.yaml")
    for step in (5, 10):
        make_checkpoint(tmp_path, step)
    attempts.begin(tmp_path, [])
    rows = ['{"step": 5, "attempt": 1, "attempt/restart_step": 5}', '{"step": 6, "train/loss": 1.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    attempts.end(tmp_path, 1)
    record = attempts.newest_record(tmp_path)
    assert (record["start_step"], record["end_step"], record["samples"]) == (5, 6, [40, 48])
    assert record["checkpoint_in"] == record["checkpoint_out"] == 5
    leave_verdict(tmp_path, status="stopped", cause="notice", step=12, attempt=2, message="")
    make_checkpoint(tmp_path, 12)
    attempts.begin(tmp_path, [])
    attempts.end(tmp_path, 2)
    assert attempts.newest_record(tmp_path)["checkpoint_out"] == 12


def make_checkpoint(folder: Path, step: int) -> None:
    made = folder / "checkpoints" / f"step_{step:08d}"
    made.mkdir(parents=True)
    (made / "state.json").write_text("{}")
    (made / "manifest.json").write_text("{}")


def test_a_record_tells_steps_samples_and_checkpoints(tmp_path: Path) -> None:
    write_config(run_config("batch.size=8"), tmp_path / "config.yaml")
    attempts.begin(tmp_path, [])
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "attempt": 1, "attempt/restart_step": 0}\n{"step": 4, "train/loss": 1.0}\n{"step": 5, "tr'
    )
    attempts.end(tmp_path, 1)
    record = attempts.newest_record(tmp_path)
    assert (record["start_step"], record["end_step"], record["samples"]) == (0, 4, [0, 32])
    assert record["checkpoint_in"] is record["checkpoint_out"] is record["wandb"] is None
    assert record["logs"] == ["attempts/0001/node-*.log", "attempts/0001/rank-*.log"]


@pytest.mark.parametrize(
    ("status", "cause", "code"),
    [
        ("done", "finished", 0),
        ("stopped", "stop", 0),
        ("stopped", "interrupt", 130),
        ("stopped", "terminate", 143),
        ("failed", "config", 1),
        ("failed", "crash", 1),
    ],
)
def test_exit_codes(status: str, cause: str, code: int) -> None:
    assert attempts.exit_code({"status": status, "cause": cause}) == code


def test_a_cancelled_attempt_is_called_so_however_it_ended(tmp_path: Path) -> None:
    """Its signal may have been heard before its file; or a job had to end before it had saved."""
    said = tmp_path / "control" / attempts.CANCELLED
    said.parent.mkdir()
    attempts.begin(tmp_path, [])
    said.write_text(json.dumps({"job": "", "attempt": 1}))
    leave_verdict(tmp_path, status="stopped", cause="terminate", step=7, attempt=1, message="")
    assert attempts.end(tmp_path, 1)["cause"] == "cancelled"
    attempts.begin(tmp_path, [], job="12.0")
    said.write_text(json.dumps({"job": "12", "attempt": 2}))
    attempts.begin(tmp_path, [], job="13.0")
    record = attempts.records(tmp_path)[1]
    assert (record["cause"], record["message"]) == ("cancelled", "gone before it had saved")
    leave_verdict(tmp_path, status="stopped", cause="terminate", step=7, attempt=3, message="")
    assert attempts.end(tmp_path, 3)["cause"] == "terminate"  # who was cancelled was another


def test_no_record_where_nothing_was_attempted(tmp_path: Path) -> None:
    assert attempts.newest_record(tmp_path) == {}
