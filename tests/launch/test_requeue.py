"""What Slurm's word, as version 22.05 has it, makes of the end of an attempt; and what comes next."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from launch import attempts, preflight, render, requeue, slurm
from launch.notice import seconds_left
from launch.place import Meeting, Place
from launch.rundir import hold
from synthos.data.index import open_index
from synthos.data.shards import ShardPlace
from synthos.schema import read_job
from synthos.strict import write_config
from tests.launch.conftest import Submit
from tests.launch.test_agent import eventually
from tests.launch.test_attempts import leave_verdict
from tests.support import compose_for_test

RUNNING = (
    "JobId=2 JobName=x JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 "
    "RunTime=00:00:05 TimeLimit=365-00:00:00 StartTime=2026-11-27T16:38:40 EndTime=2027-11-27T16:38:40 "
    "PreemptEligibleTime=2026-11-27T16:38:40 PreemptTime=None NodeList=node2 NumNodes=2"
)
SOON = (datetime.now() + timedelta(seconds=30)).isoformat(timespec="seconds")
WORDS = {
    "as it runs": RUNNING,
    "near its limit": RUNNING.replace("2027-11-27T16:38:40", SOON),
    "to make room": RUNNING.replace("PreemptTime=None", "PreemptTime=2026-11-27T16:38:45"),
    "cancelled": RUNNING.replace("RUNNING", "COMPLETING").replace("2027-11-27T16:38:40", SOON)
    .replace("NumNodes=2", "NumNodes=1"),
    "beyond its limit": RUNNING.replace("JobState=RUNNING Reason=None", "JobState=COMPLETING Reason=TimeLimit")
    .replace("NumNodes=2", "NumNodes=1"),
    "requeued already": RUNNING.replace("RUNNING", "COMPLETING").replace("Restarts=0", "Restarts=1")
    .replace("EndTime=2027-11-27T16:38:40", "EndTime=Unknown").replace("PreemptTime=None ", ""),
}  # fmt: skip


def cause(record: dict[str, Any], told: str = "") -> str:
    job = slurm.show("2")
    known = requeue.refine(record, job, seconds_left(job, 300), told)
    return str(known.get("cause", record["cause"]))


@pytest.mark.parametrize(
    ("said", "signalled", "made"),
    [
        ("cancelled", "terminate", "cancelled"),
        ("cancelled", "notice", "cancelled"),
        ("to make room", "terminate", "preempted"),
        ("to make room", "notice", "preempted"),
        ("near its limit", "notice", "time_limit"),
        ("beyond its limit", "terminate", "time_limit"),
        ("as it runs", "notice", "drain"),
        ("as it runs", "terminate", "killed"),
        ("requeued already", "terminate", "requeued"),
        ("as it runs", "crash", "crash"),
        ("cancelled", "crash", "cancelled"),
        ("cancelled", "stop", "stop"),
        ("to make room", "cancelled", "cancelled"),
        ("requeued already", "config", "config"),
    ],
)
def test_slurm_tells_what_a_signal_meant(tools: Callable[..., Path], said: str, signalled: str, made: str) -> None:
    tools(scontrol=WORDS[said])
    record = {"status": "stopped", "cause": signalled, "job": "2.0", "nodes": ["node1", "node2"]}
    assert cause(record) == made


def test_a_node_that_is_down_is_named(tools: Callable[..., Path]) -> None:
    tools(scontrol=WORDS["requeued already"], sinfo="node1 mixed\nnode2 down*")
    record = {"status": "failed", "cause": "crash", "job": "2.0", "nodes": ["node1", "node2"]}
    known = requeue.refine(record, slurm.show("2"), 300)
    assert known == {"cause": "node_failure", "bad_nodes": ["node2"]}
    tools(scontrol=WORDS["cancelled"].replace("Reason=None", "Reason=NodeDown"))  # no job that may be requeued
    assert cause(record) == "node_failure"


def test_an_allocation_that_has_lost_a_node_is_left(tools: Callable[..., Path], ended: Any) -> None:
    """Though the node is back, and the job still runs: srun would refuse to start anything in what is left."""
    folder, _ = ended("crash")
    asked = tools(scontrol=WORDS["as it runs"].replace("NumNodes=2", "NumNodes=1"), sinfo="node1 mixed\nnode2 idle")
    assert requeue.main(folder) == 0 and asked.read_text().splitlines()[-1] == "scontrol requeue 2"
    record = attempts.newest_record(folder)
    assert (record["cause"], record["next"]["decision"]) == ("node_failure", "requeue")


def test_who_cancels_because_a_node_hangs_is_obeyed(tools: Callable[..., Path]) -> None:
    tools(scontrol=WORDS["cancelled"], sinfo="node1 mixed\nnode2 mixed*")
    assert cause({"status": "failed", "cause": "killed", "job": "2.0", "nodes": ["node1", "node2"]}) == "cancelled"


def test_ranks_that_had_to_be_ended_before_the_limit_met_it(tools: Callable[..., Path]) -> None:
    record = {"status": "failed", "cause": "killed", "job": "2.0", "nodes": []}
    tools(scontrol=WORDS["near its limit"])
    assert (cause(record, told="notice"), cause(record)) == ("time_limit", "killed")
    tools(scontrol=WORDS["as it runs"])
    assert cause(record, told="notice") == "killed"


def test_ranks_that_saved_after_their_agent_was_killed_go_on(tools: Callable[..., Path]) -> None:
    """Or the agent of another node, which makes srun end this one."""
    tools(scontrol=WORDS["as it runs"])
    assert cause({"status": "stopped", "cause": "terminate", "job": "2.0", "nodes": []}) == "killed"


def test_a_node_of_which_the_folder_shows_nothing_is_left_out(tools: Callable[..., Path], ended: Any) -> None:
    """Its agent could not even begin, and srun ended the others before they had compared."""
    folder, config = ended("terminate")
    first, meeting = Place("2.0", nodes=2), Meeting("2.0", 1, "localhost", 0)
    assert preflight.check(folder, config, first, meeting, [signal.SIGTERM]).passed  # what srun sends
    tools(scontrol=WORDS["as it runs"])
    assert requeue.main(folder) == 0
    record = attempts.newest_record(folder)
    assert (record["cause"], record["bad_nodes"], record["next"]["decision"]) == ("preflight", ["node2"], "requeue")


@pytest.mark.parametrize(("cause", "code"), [("drain", 1), ("stop", 0)])
def test_a_run_that_ends_undone_is_no_success(tools: Callable[..., Path], ended: Any, cause: str, code: int) -> None:
    """What waits for its job (afterok) must not start; but for who stopped it the job has done what it should."""
    folder, _ = ended(cause, "cluster.requeue=none")
    tools(scontrol=WORDS["as it runs"])
    assert requeue.main(folder) == code


def test_a_preempted_job_is_requeued_once(tools: Callable[..., Path], ended: Any) -> None:
    folder, _ = ended("terminate")
    asked = tools(scontrol=WORDS["to make room"])
    assert requeue.main(folder) == 0
    assert asked.read_text().splitlines()[-1] == "scontrol requeue 2"
    record = attempts.newest_record(folder)
    assert record["cause"] == "preempted" and record["next"]["decision"] == "requeue"
    # Nothing is passed on twice: this attempt has been decided on.
    assert requeue.main(folder) == 2 and asked.read_text().count("requeue") == 1


def test_what_slurm_has_requeued_is_left_alone(tools: Callable[..., Path], ended: Any) -> None:
    folder, _ = ended("terminate")
    asked = tools(scontrol=WORDS["requeued already"], sinfo="node1 idle\nnode2 idle")
    assert requeue.main(folder) == 0
    assert attempts.newest_record(folder)["cause"] == "requeued" and "scontrol requeue" not in asked.read_text()


def test_what_slurm_has_requeued_though_it_is_to_end_is_cancelled(tools: Callable[..., Path], ended: Any) -> None:
    folder, _ = ended("stop")
    asked = tools(scontrol=WORDS["requeued already"], scancel="")
    assert requeue.main(folder) == 0 and asked.read_text().splitlines()[-1] == "scancel 2"


def test_an_element_of_an_array_is_requeued_without_the_others(
    tools: Callable[..., Path], ended: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last element's own id is that of the whole array."""
    folder, _ = ended("terminate")
    attempts.amend(folder, 1, job="2_7.0")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    asked = tools(scontrol=WORDS["to make room"])
    assert requeue.main(folder) == 0 and asked.read_text().splitlines()[-1] == "scontrol requeue 2_7"


def test_a_node_without_scontrol_is_said_and_fails_the_job(
    tools: Callable[..., Path], ended: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = ended("drain")
    tools()
    assert requeue.main(folder) == 1
    said = attempts.newest_record(folder)["next"]
    assert said["decision"] == "end" and "scontrol is not on PATH" in said["reason"]
    assert "the run does not start again by itself" in capsys.readouterr().err


def test_a_crash_is_restarted_in_the_allocation(tools: Callable[..., Path], ended: Any) -> None:
    folder, _ = ended("crash")
    asked = tools(scontrol=WORDS["as it runs"])
    assert requeue.main(folder) == render.RESTART and "requeue" not in asked.read_text()


def test_a_crash_near_the_limit_leaves_the_allocation(tools: Callable[..., Path], ended: Any) -> None:
    folder, _ = ended("crash")
    asked = tools(scontrol=WORDS["near its limit"])
    assert requeue.main(folder) == 0 and asked.read_text().splitlines()[-1] == "scontrol requeue 2"
    assert attempts.newest_record(folder)["cause"] == "crash"


def test_a_notice_that_leaves_time_for_a_long_save_is_that_of_the_limit(tools: Callable[..., Path], ended: Any) -> None:
    """The last one took so long that the notice came 921 s before it."""
    folder, _ = ended("notice")
    (folder / "control" / "heartbeat.json").write_text(json.dumps({"save_seconds": 400.2}))
    tools(scontrol=RUNNING.replace("2027-11-27T16:38:40", (datetime.now() + timedelta(seconds=900)).isoformat()))
    assert requeue.main(folder) == 0 and attempts.newest_record(folder)["cause"] == "time_limit"


def test_the_notice_is_the_one_that_the_job_was_submitted_with(
    tools: Callable[..., Path], ended: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An element hears as early as the slowest of its array: what ends it after that is its limit."""
    in_ten_minutes = (datetime.now() + timedelta(minutes=10)).isoformat(timespec="seconds")
    for told, cause in (("", "drain"), ("1000", "time_limit")):
        folder, _ = ended("notice", f"seed={len(told)}")
        tools(scontrol=RUNNING.replace("2027-11-27T16:38:40", in_ten_minutes))
        monkeypatch.setenv(render.NOTICE, told)
        assert requeue.main(folder) == 0 and attempts.newest_record(folder)["cause"] == cause
        shutil.rmtree(folder)


def test_a_heartbeat_that_a_node_took_along_keeps_no_run_from_going_on(tools: Callable[..., Path], ended: Any) -> None:
    folder, _ = ended("notice")
    (folder / "control" / "heartbeat.json").touch()
    tools(scontrol=WORDS["as it runs"])
    assert requeue.main(folder) == 0 and attempts.newest_record(folder)["next"]["decision"] == "requeue"


def test_who_wants_a_run_to_stop_that_waits_again_is_heard(tools: Callable[..., Path], ended: Any) -> None:
    """The wish of a signal is over: what is touched now is meant for the attempt to come."""
    folder, _ = ended("notice")
    stop = folder / "control" / "stop"
    stop.write_text('{"cause": "notice"}')
    tools(scontrol=WORDS["as it runs"])
    assert requeue.main(folder) == 0 and not stop.exists()
    stop.touch()
    attempts.begin(folder, [], job="2.1")
    assert stop.exists() and attempts.asked_to_stop(folder)


def test_torchrun_whose_agent_was_killed_does_not_keep_a_run_that_has_saved(ended: Any) -> None:
    """It would wait five minutes for that of another node, which has been killed with its agent."""
    folder, _ = ended("terminate")
    wait = [sys.executable, "-c", "import time; time.sleep(60)", "-m", "torch.distributed.run"]
    with hold(folder) as lock:
        assert lock is not None
        orphan = subprocess.Popen(wait, pass_fds=[lock.fileno()])
    began = time.monotonic()
    requeue.end_orphans(folder)
    assert orphan.wait(10) == -signal.SIGKILL and time.monotonic() - began < 50


def test_a_question_without_an_answer_is_asked_again(tools: Callable[..., Path], ended: Any, tmp_path: Path) -> None:
    """Of the controller, which does not answer each at first."""
    folder, _ = ended("terminate")
    asked = tools(scontrol=WORDS["to make room"])
    tool, tried = tmp_path / "bin" / "scontrol", tmp_path / "tried"
    busy = f'[[ -e {tried}$1 ]] || {{ : >{tried}$1; echo "Unable to contact" >&2; exit 1; }}'
    tool.write_text(tool.read_text().replace("#!/bin/bash\n", f"#!/bin/bash\n{busy}\n"))
    assert requeue.main(folder) == 0
    assert asked.read_text().splitlines()[-1] == "scontrol requeue 2"
    assert attempts.newest_record(folder)["cause"] == "preempted"


def test_a_config_error_is_not_tried_again(tools: Callable[..., Path], ended: Any) -> None:
    folder, _ = ended("config")
    tools(scontrol=WORDS["as it runs"])
    assert requeue.main(folder) == 1 and attempts.newest_record(folder)["next"]["decision"] == "end"


def test_agents_that_refuse_fail_the_job(tools: Callable[..., Path], ended: Any) -> None:
    """What the newest record tells is of another start of the job."""
    folder, _ = ended("drain")
    attempts.amend(folder, 1, job="1.0")
    attempts.refuse(folder, "2.0", "nodes: the allocation has 1")
    assert requeue.main(folder) == 2 and "next" not in attempts.newest_record(folder)


def test_agents_that_could_not_be_started_are_started_again(tools: Callable[..., Path], ended: Any) -> None:
    """Slurm may fail to launch them, or end them as soon as it has; as often as a crash may happen."""
    folder, _ = ended("drain")
    attempts.refuse(folder, "1.0", "of an earlier job")
    attempts.amend(folder, 1, checkpoint_out=5)
    config = read_job(folder / "config.yaml")
    write_config(replace(config, cluster=replace(config.cluster, backoff_seconds=(0,))), folder / "config.yaml")
    tools(scontrol=WORDS["as it runs"].replace("NumNodes=2", ""))  # what it says of hostnames, too
    codes = []
    for number in (2, 3, 4):
        attempts.amend(folder, number - 1, job="2.0", next={"decision": "restart", "reason": ""})
        codes.append(requeue.main(folder))
        record = attempts.newest_record(folder)
        assert (record["attempt"], record["status"], record["cause"]) == (number, "failed", "killed")
    assert codes == [render.RESTART, render.RESTART, 1] and "no_progress" in record["next"]["reason"]


def test_an_excluded_node_is_told_to_slurm_when_the_job_is_pending_again(
    tools: Callable[..., Path], ended: Any
) -> None:
    folder, _ = ended("drain")
    attempts.amend(folder, 1, bad_nodes=["node2", "node2"])
    asked = tools(scontrol=WORDS["as it runs"])
    assert requeue.main(folder) == 0
    assert asked.read_text().splitlines()[-2:] == ["scontrol requeue 2", "scontrol update JobId=2 ExcNodeList=node2"]


@pytest.mark.parametrize("known", ["node2", "node2 node3"])
def test_no_node_is_excluded_where_too_few_others_are_left(
    tools: Callable[..., Path], ended: Any, capsys: pytest.CaptureFixture[str], known: str
) -> None:
    """The job would wait for ever."""
    folder, _ = ended("drain", "nodes=2", "batch.size=16")
    attempts.amend(folder, 1, bad_nodes=["node2", "node2"])
    asked = tools(scontrol=WORDS["as it runs"], sinfo="\n".join(f"{name} big gpu:1" for name in known.split()))
    with (asked.parent / "bin" / "scontrol").open("a") as tool:
        tool.write("[[ $2 == hostnames ]] && echo node2 || exit 0\n")
    assert requeue.main(folder) == 0 and "ExcNodeList" not in asked.read_text()
    assert "node2 stays: its partition has too few others" in capsys.readouterr().err
    assert "node2 stays" in attempts.newest_record(folder)["next"]["reason"]
    assert "exclude" not in render.flags(read_job(folder / "config.yaml"), folder)  # nor for who submits it again


def test_nodes_that_failed_come_beside_those_of_the_config(
    tools: Callable[..., Path], ended: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where Slurm does not take them, the job is requeued all the same."""
    folder, _ = ended("drain", "+cluster.sbatch.exclude=node9")
    attempts.amend(folder, 1, bad_nodes=["node2", "node2"])
    asked = tools(scontrol=WORDS["as it runs"])
    with (tmp_path / "bin" / "scontrol").open("a") as tool:
        tool.write("[[ $1 != update ]]\n")
    assert requeue.main(folder) == 0
    assert asked.read_text().splitlines()[-1] == "scontrol update JobId=2 ExcNodeList=node9,node2"
    assert attempts.newest_record(folder)["next"]["decision"] == "requeue"
    assert "may get the nodes again that failed" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_interrupts_the_wait_for_a_restart_ends_the_run(ended: Any, number: signal.Signals) -> None:
    folder, _ = ended("crash")
    attempts.amend(folder, 1, next={"decision": "restart", "reason": ""})
    attempts.begin(folder, [])
    leave_verdict(folder, status="failed", cause="crash", step=3, attempt=2, message="")
    attempts.end(folder, 2)
    former = signal.getsignal(number)

    def interrupt() -> None:
        if eventually(lambda: signal.getsignal(number) != former):
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    cluster = compose_for_test("recipe=i2i", "model=tiny", "data=photos", "cluster.max_crashes=3").cluster
    made = requeue.after(folder, cluster)
    thread.join()
    assert (made.decision, made.reason) == ("end", "somebody asked it to stop")
    assert attempts.newest_record(folder)["next"]["decision"] == "end" and signal.getsignal(number) == former


def test_the_notice_grows_with_the_measured_time_of_a_save(tmp_path: Path) -> None:
    cluster = compose_for_test("recipe=i2i", "model=tiny", "data=photos", "cluster=slurm").cluster
    assert render.save_seconds(tmp_path) is None and render.notice_seconds(cluster) == 300
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "heartbeat.json").write_text(json.dumps({"step": 3, "save_seconds": 400.2}))
    assert render.notice_seconds(cluster, render.save_seconds(tmp_path)) == 921
    assert render.notice_seconds(replace(cluster, notice_seconds=20), 400.2) == 20


def test_a_crash_on_this_machine_is_restarted_as_often_as_allowed(
    submit: Submit, tmp_path: Path, arguments: list[str]
) -> None:
    """A shard that is damaged after it was indexed: the world, which may be better next time."""
    copy = tmp_path / "copy"
    copy.mkdir()
    source = Path(next(a for a in arguments if a.startswith("data.shards=")).partition("=")[2])
    for file in source.glob("*.tar"):
        shutil.copy(file, copy / file.name)
        open_index(ShardPlace.beside(str(copy / file.name)))
        size = file.stat().st_size
        (copy / file.name).write_bytes(b"\0" * size)
    assert submit(f"data.shards={copy}", "cluster=local", "cluster.max_crashes=1") == 1
    (config,) = (tmp_path / "runs").glob("*/*/config.yaml")
    first, second = attempts.records(config.parent)
    assert (first["cause"], first["next"]["decision"]) == ("crash", "restart")
    assert (second["cause"], second["next"]["decision"]) == ("crash", "end") and "max_crashes" in second["next"][
        "reason"
    ]
