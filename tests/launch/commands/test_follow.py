"""What `follow=true` says at the end: of a run that will not go on, though nobody wanted that, it fails. `logs -f`."""

from pathlib import Path
from threading import Timer

import pytest

from launch import attempts
from launch.follow import follow
from launch.rundir import hold
from tests.launch.commands.conftest import Runs, squeue, synthos
from tests.launch.commands.test_status import closed
from tests.launch.commands.test_verbs import write_logs

FAILED = {"cause": "error", "step": None, "rank": 2, "message": "RuntimeError: disk gone"}


@pytest.mark.parametrize(
    ("cause", "decision", "code"),
    [("time_limit", "end", 1), ("stop", "end", 0), ("time_limit", "requeue", 0)],  # a chain goes on in another job
)
def test_who_follows_hears_whether_it_goes_on(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    cause: str, decision: str, code: int,
) -> None:  # fmt: skip
    squeue(tmp_path, monkeypatch)  # the job has left the queue
    folder = closed(runs, "a-00000001", decision, "what was decided", cause)
    assert follow(folder, "17") == code
    assert f"job 17: stopped at step 40; {decision}: what was decided" in capsys.readouterr().out


def test_a_job_that_left_no_verdict_has_failed(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    squeue(tmp_path, monkeypatch)
    folder = runs.add("a-00000001")
    runs.begin(folder, 3, job="17.0")
    assert follow(folder, "17") == 1 and "left the queue without a verdict" in capsys.readouterr().err


def test_logs_follow_one_attempt_until_it_is_closed(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs.add("a-00000001")
    number = runs.begin(folder, 3)
    logs = {"node-0.log": [f"line {n}" for n in range(300)], "rank-00000.log": ["r0"], "rank-00002.log": ["its cause"]}
    write_logs(folder, number, logs)
    with hold(folder):  # the run goes on; the attempt does not
        Timer(1, runs.end, (folder, number, "failed"), FAILED).start()
        assert synthos("logs", "a", "-f", "--attempt", "1") == 1
        shown = capsys.readouterr().out.splitlines()
        assert shown[1:301] == logs["node-0.log"]
        assert shown[301] == "attempt 1 failed first at rank 2: RuntimeError: disk gone"
        assert shown[302].endswith("rank-00002.log <==") and shown[303] == "its cause"
        assert shown[304:] == ["a-00000001, attempt 1: failed, error"]
        runs.begin(folder, 5)
        assert synthos("logs", "a", "-f", "--attempt", "1", "--rank", "0") == 1  # at once: it is closed
        shown = capsys.readouterr().out.splitlines()
        assert shown[1:3] == ["r0", "attempt 1 failed first at rank 2: RuntimeError: disk gone"]
        assert synthos("logs", "a", "-f", "--attempt", "1", "--rank", "2") == 1
        assert capsys.readouterr().out.count("its cause") == 1
        assert synthos("logs", "a", "-f", "--attempt", "1", "--rank", "7") == 2
        assert "--rank: 7 has no log in attempt 1; expected one of 0, 2" in capsys.readouterr().err


def test_logs_follow_from_a_failure_into_the_next_attempt(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs.add("a-00000001")
    number = runs.begin(folder, 3)
    write_logs(folder, number, {"node-0.log": ["n0"], "rank-00002.log": ["its cause"]})

    def go_on() -> None:
        runs.end(folder, number, "failed", **FAILED)
        following = runs.begin(folder, 5)
        write_logs(folder, following, {"node-0.log": ["anew"]})
        runs.end(folder, following, "done")

    Timer(1, go_on).start()
    with hold(folder):
        assert synthos("logs", "a", "-f") == 0
    shown = capsys.readouterr().out
    marks = ["n0\n", "attempt 1 failed first at rank 2", "its cause", "anew", "a-00000001: done"]
    assert [shown.index(mark) for mark in marks] == sorted(shown.index(mark) for mark in marks)
    assert shown.count("failed first") == 1


def test_logs_wait_for_the_word_on_who_was_killed(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank that misses another says so at once; that the other was killed, the batch script finds out after that."""
    folder = runs.add("a-00000001")
    (folder / "slurm").mkdir()
    squeue(tmp_path, monkeypatch, f"echo '17 |0 |RUNNING |None |node1 |N/A |{folder}/slurm/%j.out '")
    number = runs.begin(folder, 3, job="17.0")
    write_logs(folder, number, {"rank-00001.log": ["cut short"], "rank-00002.log": ["connection closed by peer"]})
    Timer(0.5, runs.end, (folder, number, "failed"), FAILED).start()
    killed = {
        "cause": "killed",
        "rank": 1,
        "message": "ended by SIGKILL",
        "next": {"decision": "restart", "reason": ""},
    }
    Timer(2, attempts.amend, (folder, number), killed).start()
    assert synthos("logs", "a", "-f", "--attempt", "1") == 1
    shown = capsys.readouterr().out
    assert "attempt 1 failed first at rank 1: ended by SIGKILL\n" in shown and "failed first at rank 2" not in shown
    assert shown.endswith("a-00000001, attempt 1: failed, killed\n")


def test_logs_of_an_attempt_end_though_its_batch_script_decided_nothing(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was killed, and Slurm has requeued the job, which may wait for days."""
    folder = runs.add("a-00000001")
    (folder / "slurm").mkdir()
    squeue(tmp_path, monkeypatch, f"echo '17 |1 |PENDING |BeginTime | |N/A |{folder}/slurm/%j.out '")
    number = runs.begin(folder, 3, job="17.0")
    write_logs(folder, number, {"node-0.log": ["saved"]})
    runs.end(folder, number, "stopped", cause="terminate", step=5)
    assert synthos("logs", "a", "-f", "--attempt", "1") == 0
    assert capsys.readouterr().out.endswith("a-00000001, attempt 1: stopped, terminate\n")
