"""What comes after an attempt: each cause, each budget, and random histories that must keep to all of them."""

import random
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from launch import attempts, start
from launch.decision import CRASHES, ENDS, MOVES, bad_nodes, decide
from synthos.files import CAUSES as ASKED
from synthos.files import read_json
from synthos.schema import ClusterConfig
from synthos.strict import write_config
from tests.launch.test_attempts import leave_verdict, make_checkpoint
from tests.support import compose_for_test

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
AGAIN = {"decision": "requeue", "reason": ""}


@pytest.fixture(scope="module")
def cluster() -> ClusterConfig:
    return compose_for_test("recipe=i2i", "model=tiny", "data=photos", "cluster=slurm").cluster


def record(cause: str, before: int | None = None, after: int | None = 5, hours_ago: float = 0, **more: Any) -> Any:
    ended = (NOW - timedelta(hours=hours_ago)).isoformat()
    return {"cause": cause, "checkpoint_in": before, "checkpoint_out": after, "ended": ended, "next": AGAIN, **more}


@pytest.mark.parametrize(
    ("cause", "decision"),
    [
        *[(cause, "end") for cause in ("finished", "stop", "interrupt", "cancelled", "config")],
        *[(cause, "restart") for cause in ("crash", "killed")],
        *[(cause, "requeue") for cause in ("time_limit", "preempted", "drain", "requeued", "node_failure")],
        ("preflight", "requeue"),
    ],
)
def test_each_cause(cluster: ClusterConfig, cause: str, decision: str) -> None:
    made = decide([record(cause)], cluster, NOW)
    assert made.decision == decision and made.wait_seconds == 0
    assert decide([record(cause)], cluster, NOW, asked=True).decision == "end"


def test_without_a_scheduler_or_a_wish_nothing_is_requeued(cluster: ClusterConfig) -> None:
    assert decide([record("drain")], cluster, NOW, slurm=False).decision == "end"
    assert decide([record("killed")], cluster, NOW, slurm=False).decision == "restart"
    none = decide([record("time_limit")], replace(cluster, requeue="none"), NOW)
    assert (none.decision, none.reason) == ("end", "cluster.requeue is none")


def test_how_long_a_restart_waits_is_the_sites_to_say(cluster: ClusterConfig) -> None:
    at_once = replace(cluster, backoff_seconds=(0,))
    series = [record("crash", n, n + 1) for n in range(1, 4)]
    assert (decide(series, at_once, NOW).wait_seconds, decide(series, cluster, NOW).wait_seconds) == (0, 120)


def test_crashes_are_few_and_their_restarts_wait_longer_and_longer(cluster: ClusterConfig) -> None:
    def after(count: int, hours_apart: float = 1.0) -> tuple[str, int]:
        series = [record("crash", n, n + 1, hours_apart * (count - n)) for n in range(1, count + 1)]
        made = decide(series, cluster, NOW)
        return made.decision, made.wait_seconds

    assert [after(count) for count in (1, 2, 3)] == [("restart", 0), ("restart", 30), ("restart", 120)]
    assert after(4) == ("end", 0)
    assert after(20, hours_apart=13) == ("restart", 30)  # two of them within a day
    assert decide([record("crash")], replace(cluster, max_crashes=0), NOW).decision == "end"


def test_time_outs_and_preemptions_are_free_while_checkpoints_advance(cluster: ClusterConfig) -> None:
    series = [record(random.Random(n).choice(MOVES), n, n + 1) for n in range(100)]
    assert decide(series, cluster, NOW).decision == "requeue"
    stuck = [*series, *[record("preempted", 100, 100)] * 2]
    assert decide(stuck, cluster, NOW).decision == "requeue"
    made = decide([*stuck, record("time_limit", 100, 100)], cluster, NOW)
    assert made.decision == "end" and made.reason.startswith("no_progress: 3 attempts")
    assert decide([*stuck, record("time_limit", 100, 101)], cluster, NOW).decision == "requeue"


def test_the_beginning_saved_again_and_again_is_no_progress(cluster: ClusterConfig) -> None:
    """A baseline validation that is longer than the limit: each attempt saves step 0."""
    assert decide([record("time_limit", None, 0)] * 3, cluster, NOW).reason.startswith("no_progress: 3 attempts")


def test_pictures_are_progress_where_no_checkpoint_is_saved(cluster: ClusterConfig) -> None:
    def after(*steps: int, **more: Any) -> str:
        series = [record("preempted", None, None, end_step=step, **more) for step in steps]
        return decide(series, cluster, NOW).decision

    assert after(4, 8, 12, 16) == after(4, 4, 4, 5) == after(0, 0) == "requeue"
    assert after(0, 0, 0) == after(4, 8, 8, 8, 8) == "end"
    # What trained without a checkpoint trains it again.
    assert after(4, 8, 12, samples=[0, 32]) == "end"


def test_near_its_limit_an_allocation_is_left(cluster: ClusterConfig) -> None:
    """There the notice would come before the ranks can hear it."""
    assert decide([record("crash")], cluster, NOW, seconds_left=0).decision == "requeue"
    assert decide([record("crash")], cluster, NOW, seconds_left=1).decision == "restart"
    twice = [record("crash", 1, 2), record("crash", 2, 3)]  # 30 s later
    assert decide(twice, cluster, NOW, seconds_left=30).decision == "requeue"
    assert decide(twice, cluster, NOW, seconds_left=31).decision == "restart"


def test_who_submits_again_begins_new_budgets(cluster: ClusterConfig) -> None:
    ended = record("crash", 1, 1, next={"decision": "end", "reason": ""})
    assert decide([record("crash", 1, 1)] * 3, cluster, NOW).decision == "end"
    assert decide([record("crash", 1, 1), ended, record("crash", 1, 1)], cluster, NOW).decision == "restart"


@pytest.mark.parametrize(("by_hand", "decision"), [(False, "end"), (True, "restart")])
def test_what_was_to_go_on_and_is_started_again_by_hand_begins_new_budgets(
    cluster: ClusterConfig, tmp_path: Path, by_hand: bool, decision: str
) -> None:
    """As where its job was cancelled while it waited."""
    for number in (1, 2, 3):
        if by_hand and number == 3:
            start.clear(tmp_path)
        attempts.begin(tmp_path, [])
        leave_verdict(tmp_path, status="failed", cause="crash", step=0, attempt=number, message="")
        attempts.end(tmp_path, number)
        if number < 3:
            attempts.amend(tmp_path, number, next=AGAIN)
    assert decide(attempts.records(tmp_path), cluster, datetime.now(UTC)).decision == decision


def test_a_node_that_failed_twice_is_excluded(cluster: ClusterConfig) -> None:
    once, other = record("node_failure", bad_nodes=["node2"]), record("node_failure", bad_nodes=["node3"])
    assert bad_nodes([once, other]) == decide([once, other], cluster, NOW).exclude == ()
    assert decide([once, other, once], cluster, NOW).exclude == ("node2",)
    # A crash there leaves the allocation; elsewhere it does not.
    assert decide([once, once, record("crash", nodes=["node1", "node2"])], cluster, NOW).decision == "requeue"
    assert decide([once, once, record("crash", nodes=["node1", "node3"])], cluster, NOW).decision == "restart"


def test_a_node_that_failed_a_preflight_is_excluded_at_once(cluster: ClusterConfig) -> None:
    unfit = record("preflight", 5, bad_nodes=["node2", "node4"], nodes=["node1", "node2", "node4"])
    made = decide([unfit], cluster, NOW)
    assert (made.decision, made.exclude) == ("requeue", ("node2", "node4"))
    assert made.reason.endswith("without node2, node4")
    assert decide([unfit, record("time_limit", bad_nodes=["node3"])], cluster, NOW).exclude == ("node2", "node4")
    # None is to blame: others may be had all the same, but not for ever.
    assert decide([record("preflight", 5)], cluster, NOW).decision == "requeue"
    assert decide([record("preflight", 5)] * 3, cluster, NOW).reason.startswith("no_progress")
    assert decide([unfit], replace(cluster, requeue="none"), NOW).decision == "end"


def test_every_cause_has_a_rule() -> None:
    """Also those that only ranks and agents know; `notice` is always refined, for only Slurm sends it."""
    assert set(ASKED) - {"", "notice"} <= {*ENDS, *CRASHES, *MOVES}
    assert len({*ENDS, *CRASHES, *MOVES}) == len(ENDS) + len(CRASHES) + len(MOVES)


@pytest.mark.parametrize("seed", range(20))
def test_random_histories_keep_to_every_budget(tmp_path: Path, cluster: ClusterConfig, seed: int) -> None:
    """Attempts begin, advance, end, or are lost without a word; their ledger is read after each event."""
    rng, step, now = random.Random(seed), 0, datetime.now(UTC)
    (tmp_path / "control").mkdir()
    write_config(compose_for_test("recipe=i2i", "model=tiny", "data=photos", "cluster=slurm"), tmp_path / "config.yaml")
    number, seen, person = 0, dict[int, dict[str, Any]](), 7
    for job in range(12):
        try:
            attempt = attempts.begin(tmp_path, [], job=f"{person}.{job}", nodes=["node1"])
        except RuntimeError:
            check_budgets(attempts.records(tmp_path), cluster)
            person += 1
            attempt = attempts.begin(tmp_path, [], job=f"{person}.{job}", nodes=["node1"])
        assert attempt == number + 1
        number = attempt
        seen = forward(tmp_path, seen)
        if rng.random() < 0.7:
            step += 5
            make_checkpoint(tmp_path, step)
        if rng.random() < 0.2:  # its node is lost: nobody closes the record
            continue
        cause = rng.choice([*CRASHES, *MOVES, *ENDS])
        leave_verdict(tmp_path, status="failed", cause=cause, step=step, attempt=number, message="")
        attempts.end(tmp_path, number)
        seen = forward(tmp_path, seen)
        decision = decide(attempts.records(tmp_path), cluster, now + timedelta(seconds=1))
        attempts.amend(tmp_path, number, next={"decision": decision.decision, "reason": decision.reason})
        seen = forward(tmp_path, seen)
        check_budgets(attempts.records(tmp_path), cluster)


def forward(folder: Path, seen: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """All records by number. None is gone, none that was closed has changed but by what comes next, one is open."""
    found = {record["attempt"]: record for record in attempts.records(folder)}
    assert [number for number, record in found.items() if "ended" not in record] in ([], [max(found)])
    for number, before in seen.items():
        assert all(found[number][key] == value for key, value in before.items())
        assert "ended" not in before or set(found[number]) - set(before) <= {"next", "bad_nodes"}
    return found


def check_budgets(records: list[dict[str, Any]], cluster: ClusterConfig) -> None:
    """Counted forwards, as `decide` does not: since a person last started the run, no budget was overdrawn."""
    crashes, still, nodes = 0, 0, Counter[str]()
    for record in records:
        crashes += record["cause"] in CRASHES
        still = 0 if record["checkpoint_out"] != record["checkpoint_in"] else still + 1
        nodes.update(record.get("bad_nodes", []))
        decision = record["next"]["decision"]
        if decision != "end":
            assert crashes <= cluster.max_crashes or record["cause"] not in CRASHES
            assert still < 3 and record["cause"] not in ENDS
        if decision == "restart":
            assert record["cause"] in CRASHES and not any(nodes[node] >= 2 for node in record["nodes"])
        if decision == "end":
            crashes = still = 0


def test_the_ledger_is_written_whole(tmp_path: Path) -> None:
    """A record that cannot be written again, for a full disk as for any other reason, is still the old one."""
    attempts.begin(tmp_path, [])
    path = attempts.attempt_folder(tmp_path, 1) / "attempt.json"
    before = path.read_text()
    with pytest.raises(TypeError):
        attempts.amend(tmp_path, 1, message=object())
    assert path.read_text() == before and read_json(path)["attempt"] == 1
