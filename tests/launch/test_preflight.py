"""What the nodes of an attempt find out before any rank starts, and how ranks end that never meet."""

import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from launch import agent, attempts, preflight
from launch.decision import decide
from launch.place import Meeting, Place
from launch.preflight import Findings, check, judge
from synthos.files import read_json, write_json
from synthos.run import arrivals, collective_file, failure_file
from synthos.strict import write_config
from tests.support import ROOT, compose_for_test

NAMES = ["node1", "node2", "node3"]
BASE = ("recipe=i2i", "model=tiny", "data=photos")
# A rank that goes the real way, but for the second one of node 0, which never comes to meet the others.
RANK = """
import os, sys, time
from pathlib import Path
from synthos import run
folder = Path({folder!r})
if os.environ["LOCAL_RANK"] == "1":
    {come}
    time.sleep(600)
run.main(folder, 1)
"""


def facts(name: str, ahead: float = 0.0, **other: Any) -> dict[str, Any]:
    same = {"code": "c0ffee", "python": "3.11.7", "torch": "2.13.0", "faults": [], "warnings": []}
    return {"name": name, "ahead": ahead, **same, **other}


def nodes(*said: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return dict(enumerate(said))


def prepare(folder: Path) -> None:
    """The parts of a run folder that agents and ranks need; its code is this checkout."""
    (folder / "control").mkdir()
    (folder / "provenance").mkdir()
    write_json(folder / "provenance" / "git.json", {"commit": "c0ffee", "changed": []})
    (folder / "code").symlink_to(ROOT)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of three nodes whose first attempt has begun."""
    monkeypatch.setattr(preflight, "NODES_SECONDS", 1)
    prepare(tmp_path)
    write_config(compose_for_test(*BASE, "cluster=slurm", "nodes=3", "batch.size=24"), tmp_path / "config.yaml")
    attempts.begin(tmp_path, [], job="7.0", nodes=NAMES)
    return tmp_path


def place(node: int) -> Place:
    return Place("7.0", node=node, nodes=3, step="0")


def fly(folder: Path, *present: int, signals: tuple[int, ...] = ()) -> Findings:
    """The first agent's preflight, with those of the other nodes `present` beside it."""
    config = compose_for_test(*BASE, "cluster=slurm", "nodes=3", "batch.size=24")
    meeting = Meeting("7.0.0", 1, "localhost", 1, time.time())
    answers: dict[int, Findings] = {}

    def agent_of(node: int) -> None:
        answers[node] = check(folder, config, place(node), meeting, signals)

    threads = [threading.Thread(target=agent_of, args=(node,)) for node in present]
    for thread in threads:
        thread.start()
    found = check(folder, config, place(0), meeting, signals)
    for thread in threads:
        thread.join()
    assert all(answer == found for answer in answers.values()) and len(answers) == len(present)
    return found


def test_nodes_that_agree_pass(folder: Path) -> None:
    assert fly(folder, 1, 2) == Findings()
    said = read_json(folder / "attempts/0001/preflight.json")
    assert said["passed"] and [node["node"] for node in said["nodes"]] == [0, 1, 2]
    assert {node["code"] for node in said["nodes"]} == {ROOT.name} and not failure_file(folder, 1).exists()


def test_a_node_that_is_not_seen_is_named_and_excluded(folder: Path) -> None:
    found = fly(folder, 1)
    assert found.bad_nodes == ["node3"] and not found.passed
    verdict = attempts.end(folder, 1)
    assert verdict["cause"] == "preflight"
    assert verdict["message"] == "preflight: node3: not seen in the shared folder for 1 s"
    assert attempts.newest_record(folder)["bad_nodes"] == ["node3"]


def test_no_rank_starts_where_a_node_is_not_seen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without scontrol, that is without the names of the nodes."""
    assert agent.run(folder, place(0)) == 1
    record = attempts.newest_record(folder)
    message = "preflight: node 1: not seen in the shared folder for 1 s; node 2: not seen in the shared folder for 1 s"
    assert (record["attempt"], record["cause"], record["message"]) == (2, "preflight", message)
    assert "ended" in record and "bad_nodes" not in record
    assert (folder / "attempts/0002/node-0.log").read_text() == f"{message}\n"
    assert f"attempt 2 failed: {message}" in capsys.readouterr().err
    assert agent.run(folder, place(2)) == 1  # it is told the same


def test_who_is_told_to_stop_does_not_wait(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "NODES_SECONDS", 10**6)
    assert fly(folder, signals=(15,)) == Findings()


def test_an_agent_that_gets_no_answer_says_whose(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "ANSWER_SECONDS", 0.3)
    config = compose_for_test(*BASE, "cluster=slurm", "nodes=3", "batch.size=24")
    with pytest.raises(TimeoutError, match=r"node 2 .* saw no answer of node 0"):
        check(folder, config, place(2), Meeting("7.0.0", 1, "localhost", 1), [])


@pytest.mark.parametrize(("offset", "ahead"), [(0.0, 0.0), (90.0, 90.0), (-90.0, -90.0)])
def test_a_clock_is_compared_with_the_moments_between_which_it_was_read(
    folder: Path, offset: float, ahead: float
) -> None:
    own = arrivals(folder, 1)
    own.mkdir()
    sent = time.time()
    write_json(own / "node-0.json", {"time": sent})
    write_json(own / "node-1.json", {"time": time.time() + offset})
    found = preflight._gather(own, replace(place(0), nodes=2), sent, [])
    assert found[0]["ahead"] == 0 and found[1]["ahead"] == pytest.approx(ahead, abs=5)
    assert abs(found[1]["ahead"]) <= abs(ahead)  # never more than there is


def test_clocks() -> None:
    found = judge(nodes(facts("node1"), facts("node2", 75.0), facts("node3", 0.4)), [])
    assert found.faults == {"node2": ["its clock is at least 75 s ahead"]} and found.bad_nodes == ["node2"]
    found = judge(nodes(facts("node1"), facts("node2"), facts("node3", -2.0)), [])
    assert found.passed and found.warnings == ["node3: its clock is at least 2 s behind"]
    found = judge(nodes(facts("node1"), facts("node2", 75.0), facts("node3", 76.0)), [])
    assert found.faults == {"node1": ["its clock is at least 76 s behind"]}
    found = judge(nodes(facts("node1"), facts("node2", 75.0)), [])  # nobody can say which of them is wrong
    assert not found.passed and [*found.faults] == ["node1", "node2"] and found.bad_nodes == []


def test_what_differs_is_no_nodes_fault(folder: Path) -> None:
    found = judge(nodes(facts("node1"), facts("node2", torch="2.12.1"), facts("node3")), [])
    assert found.differences == ["torch is not the same everywhere: 2.13.0 on node1 and node3, 2.12.1 on node2"]
    assert not found.passed and found.bad_nodes == []
    assert judge(nodes(facts("node1"), facts("node2", code="beef")), []).differences[0].startswith("code is not")


def test_what_all_of_several_nodes_show_is_no_nodes_fault() -> None:
    bad = {"faults": ["4 GPUs, gpus_per_node is 8"]}
    assert judge(nodes(facts("node1", **bad), facts("node2", **bad)), []).bad_nodes == []
    assert judge(nodes(facts("node1", **bad), facts("node2")), []).bad_nodes == ["node1"]
    assert judge(nodes(facts("node1", **bad)), []).bad_nodes == ["node1"]
    assert judge(nodes(facts("node1", **bad)), ["node2"]).bad_nodes == []
    # Without scontrol nobody knows the name of a node that says nothing.
    assert judge(nodes(facts("node1")), ["node 1"]).bad_nodes == []


def test_where_no_other_machine_is_to_be_had_faults_are_only_told() -> None:
    found = judge(nodes(facts("here", faults=["GPU 0: 2 uncorrected ECC errors"])), [], scheduled=False)
    assert found.passed and found.warnings == ["here: GPU 0: 2 uncorrected ECC errors"]


def test_fewer_cores_than_asked_for_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, cores = compose_for_test(*BASE, "cluster=slurm"), len(os.sched_getaffinity(0))
    for asked, told in ((cores, 0), (cores + 1, 1)):
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", str(asked))
        assert len(preflight.examine(folder, config, place(0), 0.0)["warnings"]) == told


def test_an_agent_imports_no_torch_for_it() -> None:
    code = "import sys, launch.preflight; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.fixture
def lonely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs an attempt of two ranks, of which the second does not go on; returns its record."""
    prepare(tmp_path)
    shape = ("cluster=local", "cluster.device=cpu", "gpus_per_node=2", "batch.size=8")
    write_config(compose_for_test(*BASE, *shape), tmp_path / "config.yaml")
    monkeypatch.setattr(agent, "PEER_SECONDS", 0.2)

    def run(come: str, **seconds: float) -> dict[str, Any]:
        for name, value in seconds.items():
            monkeypatch.setattr(preflight, name, value)
        script = tmp_path / "rank.py"
        script.write_text(RANK.format(come=come, folder=str(tmp_path)))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
        monkeypatch.setattr(agent, "ranks_command", lambda *_: command)
        assert agent.run(tmp_path) == 1
        assert not collective_file(tmp_path, 1).exists()
        record = attempts.newest_record(tmp_path)
        assert (record["status"], record["cause"]) == ("failed", "preflight")
        assert record["bad_nodes"] == record["nodes"]
        return record

    return run


@pytest.mark.slow
def test_a_rank_that_never_comes_is_ended_from_outside(lonely: Callable[..., dict[str, Any]]) -> None:
    record = lonely("pass", ARRIVAL_SECONDS=15)
    (name,) = record["nodes"]
    assert record["message"] in [f"ranks that came to the first collective: {n} of 2 on {name}" for n in (0, 1)]


@pytest.mark.slow
def test_a_collective_that_hangs_is_ended_from_outside(lonely: Callable[..., dict[str, Any]]) -> None:
    record = lonely("run._arrive(folder, 1)", COLLECTIVE_SECONDS=1)
    assert record["message"] == "the first collective hung for 1 s, after all ranks had come to it"


@pytest.mark.parametrize(
    ("came", "message", "bad_nodes"),
    [
        (["0-0", "0-1", "1-1"], "ranks that came to the first collective: 1 of 2 on node2", ["node2"]),
        ([], "ranks that came to the first collective: 0 of 2 on node1, 0 of 2 on node2", []),
        (["0-0", "0-1", "1-0", "1-1"], "the first collective hung for 0 s, after all ranks had come to it", []),
    ],
)
def test_nodes_whose_ranks_do_not_come_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, came: list[str], message: str, bad_nodes: list[str]
) -> None:
    arrivals(folder, 1).mkdir()
    watch = preflight.Watch(folder, 1, ["node1", "node2"], 2)
    for name in came:
        (arrivals(folder, 1) / f"rank-{name}").touch()
    watch.look()
    assert not failure_file(folder, 1).exists()  # there is time
    monkeypatch.setattr(preflight, "COLLECTIVE_SECONDS", 0)
    monkeypatch.setattr(preflight, "ARRIVAL_SECONDS", 0)
    write_json(collective_file(folder, 1), {"ranks": 4})
    preflight.Watch(folder, 1, ["node1", "node2"], 2).look()
    assert not failure_file(folder, 1).exists()  # they have met
    collective_file(folder, 1).unlink()
    watch.look()
    said = read_json(failure_file(folder, 1))
    assert (said["message"], said["bad_nodes"], said["cause"]) == (message, bad_nodes, "preflight")


def test_ranks_that_come_in_the_last_second_have_time_to_meet(folder: Path) -> None:
    arrivals(folder, 1).mkdir()
    watch = preflight.Watch(folder, 1, ["node1"], 1, began=-math.inf)
    (arrivals(folder, 1) / "rank-0-0").touch()
    watch.look()
    assert not failure_file(folder, 1).exists()
    watch.together = -math.inf
    watch.look()
    assert read_json(failure_file(folder, 1))["bad_nodes"] == ["node1"]


@pytest.mark.parametrize(("known", "refused"), [("node1", True), ("", False), (None, False)])
def test_a_node_that_slurm_gives_again_is_refused(
    folder: Path, tools: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, known: str | None, refused: bool
) -> None:
    """It starts a job again by itself after a lost node. Not where no other is left, or nobody can tell."""
    config = compose_for_test(*BASE, "cluster=slurm")
    write_config(config, folder / "config.yaml")
    monkeypatch.setenv("SLURMD_NODENAME", "node2")
    if known is not None:
        lines = [f"{name} (null) gpu:h100:8(S:0-1)" for name in (*known.split(), "node2")]
        tools(sinfo="\n".join(lines), scontrol="node2")
    attempts.end(folder, 1)
    attempts.amend(folder, 1, cause="node_failure", bad_nodes=["node2", "node2"], next={"decision": "requeue"})
    attempts.begin(folder, [], job="7.1", nodes=["node2"])
    found = check(folder, config, Place("7.1", step="0"), Meeting("7.1.0", 2, "localhost", 1, time.time()), [])
    assert found.passed != refused
    if refused:
        assert found.message == "preflight: node2: it has failed under this run before"
        assert attempts.end(folder, 2)["cause"] == "preflight" and found.bad_nodes == ["node2"]
        assert decide(attempts.records(folder), config.cluster, datetime.now(UTC)).exclude == ("node2",)
