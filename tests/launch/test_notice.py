"""A job's notice of its time limit: Slurm's own where that is early enough, else the first agent's."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from launch import agent, notice, slurm
from launch.notice import Limit
from launch.render import NOTICE
from tests.support import compose_for_test

CLUSTER = compose_for_test("recipe=i2i", "model=tiny", "data=photos", "cluster=slurm", "cluster.time=12:00:00").cluster
Tools = Callable[..., Path]


def ends_in(seconds: float, preempted: str = "None", of: float = 12 * 3600) -> str:
    """What scontrol says of a job that has so long of its time."""
    end = datetime.now() + timedelta(seconds=seconds)
    times = f"StartTime={(end - timedelta(seconds=of)).isoformat()} EndTime={end.isoformat()} PreemptTime={preempted}"
    return f"JobId=2 JobState=RUNNING Reason=None Restarts=0 {times} NumNodes=1"


def due(limit: Limit) -> float:
    """What it says once Slurm has answered."""
    limit.due()
    if limit.asking.ident:
        limit.asking.join()
    return limit.due()


def limit_of(folder: Path, save: float | None = None) -> Limit:
    """The limit of a run whose last save took so long."""
    (folder / "control").mkdir(exist_ok=True)
    (folder / "control" / "heartbeat.json").write_text(json.dumps({"save_seconds": save}))
    return Limit(folder, CLUSTER)


def test_ranks_may_save_until_a_minute_before_the_limit(tools: Tools, tmp_path: Path) -> None:
    tools(scontrol=ends_in(300))
    assert 230 < Limit(tmp_path, CLUSTER).seconds_to_save() <= 240
    assert 280 < Limit(tmp_path, replace(CLUSTER, notice_seconds=20)).seconds_to_save() <= 290
    tools(scontrol=ends_in(30, preempted="2026-11-27T16:38:45"))
    assert Limit(tmp_path, CLUSTER).seconds_to_save() == math.inf
    tools(scontrol="nothing")
    assert Limit(tmp_path, CLUSTER).seconds_to_save() == math.inf


@pytest.mark.parametrize(
    ("left", "save", "expected"),
    [
        (310, None, 0),  # Slurm's notice of 300 s is early enough, and to come
        (290, 100, 0),  # or has come: 60 + 2 * 100 + 60 are 320 s, of which at least half a minute has passed
        (930, 400, 0),  # not yet
        (910, 400, 920),
        (910, 40_000, 21_600),  # half of the job's time at most
    ],
)
def test_a_save_that_got_slower_is_told_of_earlier(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: float, save: float | None, expected: float
) -> None:
    monkeypatch.setenv(NOTICE, "320" if save == 100 else "300")
    tools(scontrol=ends_in(left))
    assert due(limit_of(tmp_path, save)) == expected


def test_slurm_is_asked_when_it_matters_and_not_each_second(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NOTICE, "300")
    asked = tools(scontrol=ends_in(5000))
    limit = limit_of(tmp_path, 10)
    assert due(limit) == 0 and not asked.exists()  # its own notice is early enough
    limit_of(tmp_path, 400)
    assert [due(limit) for _ in range(5)] == [0] * 5 and len(asked.read_text().splitlines()) == 1
    tools(scontrol=ends_in(900))  # an administrator has taken some of its time
    limit.asked -= 61
    assert due(limit) == 920
    tools(scontrol="slurm_load_jobs error: Unable to contact slurm controller")
    limit.asked -= 61
    assert due(limit) == 920 and 0 < limit.seconds_to_save() <= 840  # what it has told before still holds


def test_the_agent_has_other_things_to_do_than_to_wait_for_slurm(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NOTICE, "300")
    tools(scontrol=ends_in(900))
    script, waits = tmp_path / "bin" / "scontrol", f"{shutil.which('sleep', path=os.defpath)} 1"
    script.write_text(script.read_text().replace("#!/bin/bash", f"#!/bin/bash\n{waits}"))
    limit = limit_of(tmp_path, 400)
    began = time.monotonic()
    assert limit.due() == 0 and limit.asking.is_alive() and time.monotonic() - began < 0.5
    assert due(limit) == 920


def test_half_of_a_job_is_for_training(tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its limit may be the partition's own, of which the config says nothing."""
    monkeypatch.setenv(NOTICE, "300")
    limit = limit_of(tmp_path, 900)
    limit.cluster = replace(CLUSTER, time=None)
    tools(scontrol=ends_in(1790, of=1800))
    assert due(limit) == 0
    tools(scontrol=ends_in(890, of=1800))
    limit.asked -= 61
    assert due(limit) == 900


def test_without_an_answer_only_slurm_gives_notice(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NOTICE, "300")
    limit = limit_of(tmp_path, 400)
    assert due(limit) == 0  # there is no scontrol
    tools(scontrol=ends_in(900, preempted="2026-11-27T16:38:45"))
    assert due(Limit(tmp_path, CLUSTER)) == 0


def test_the_agent_gives_the_notice_and_what_follows_knows_it(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks hear of it as of any wish to stop; that their last save was fast makes no drain of it."""
    monkeypatch.setenv(NOTICE, "300")
    tools(scontrol=ends_in(800))
    limit, stop = limit_of(tmp_path, 400), tmp_path / "control" / "stop"
    (tmp_path / "log").touch()
    waits = f"import os, time\nwhile not os.path.exists({str(stop)!r}): time.sleep(0.05)"
    with (tmp_path / "log").open("rb") as shown:
        process = subprocess.Popen([sys.executable, "-c", waits], start_new_session=True)
        agent.wait(process, shown, [], tmp_path, 1, limit)
    assert process.returncode == 0
    assert json.loads(stop.read_text()) == {"cause": "notice", "seconds_before_limit": 920}
    limit_of(tmp_path, 100)
    assert notice.notice_seconds(tmp_path, CLUSTER) == 920
    assert notice.seconds_left(slurm.show("2"), 920) < 0 < notice.seconds_left(slurm.show("2"), 320)


def test_a_wish_of_a_person_says_nothing_of_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NOTICE, raising=False)
    for content in ("", "now", "[]", '{"cause": "stop"}'):
        limit_of(tmp_path)
        (tmp_path / "control" / "stop").write_text(content)
        assert notice.notice_seconds(tmp_path, CLUSTER) == 300


def test_ranks_that_do_not_save_before_the_limit_are_ended(tools: Tools, tmp_path: Path) -> None:
    tools(scontrol=ends_in(10.5))
    (tmp_path / "log").touch()
    (tmp_path / "control").mkdir()
    limit = Limit(tmp_path, replace(CLUSTER, notice_seconds=20))  # half of it is for what follows
    code = [sys.executable, "-c", "import time; time.sleep(600)"]
    with (tmp_path / "log").open("rb") as shown:
        slow = subprocess.Popen(code, start_new_session=True)
        agent.wait(slow, shown, [agent.signal.SIGUSR2], tmp_path, 1, limit)
        cancelled = subprocess.Popen([*code[:2], "import time; time.sleep(0.5)"], start_new_session=True)
        agent.wait(cancelled, shown, [agent.signal.SIGTERM], tmp_path, 1, limit)
    assert slow.returncode == -agent.signal.SIGKILL and cancelled.returncode == 0
