"""`synthos status` and `ls`: what is said of a run is what its files, its lock and its job say."""

import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from threading import Timer

import pytest

from launch import attempts
from launch.decision import decide
from launch.look import look_at
from launch.rundir import hold
from launch.runs import find_one, find_several
from synthos.run import write_verdict
from tests.launch.commands.conftest import BASE, Runs, age_heartbeat, squeue, synthos
from tests.support import compose_for_test

Capture = pytest.CaptureFixture[str]


def look(capsys: Capture, *words: str) -> tuple[int, dict[str, dict[str, object]]]:
    """The exit code of a status, and the runs it tells of by name."""
    capsys.readouterr()
    code = synthos("status", "--json", *words)
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"runs", "slurm"}
    return code, {run["name"]: run for run in told["runs"]}


def test_runs_that_are_over(runs: Runs, capsys: Capture) -> None:
    runs.finished("a-00000001", "done")
    runs.finished("b-00000002", "stopped", cause="notice", step=40)
    failed = runs.finished("c-00000003", "failed", cause="error", step=None, rank=3, message="RuntimeError: [odd] link")
    runs.add("d-00000004")
    code, told = look(capsys)
    assert code == 0  # nobody asked for one of them
    assert {name: run["state"] for name, run in told.items()} == {
        "a-00000001": "done", "b-00000002": "stopped", "c-00000003": "failed", "d-00000004": "prepared",
    }  # fmt: skip
    assert (told["b-00000002"]["detail"], told["b-00000002"]["step"]) == ("notice", 40)
    assert told["c-00000003"]["detail"] == "rank 3: RuntimeError: [odd] link"
    assert look(capsys, "a")[0] == 0 and look(capsys, str(failed))[0] == 1
    assert synthos("status", "c") == 1
    shown = capsys.readouterr().out
    assert "FAILED" in shown and "rank 3: RuntimeError: [odd] link" in shown


def test_a_run_with_a_process(runs: Runs, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = runs.add("a-00000001")
    number = runs.begin(folder)
    with hold(folder):
        assert look(capsys, "a")[1]["a-00000001"]["state"] == "starting"
        runs.begin(folder, 7)
        told = look(capsys, "a")[1]["a-00000001"]
        assert (told["state"], told["step"], told["last_step"], told["images_per_s"]) == ("running", 7, 100, 16.0)
        assert told["eta_s"] == 50.0 and told["attempt"] == number + 1
        age_heartbeat(monkeypatch, 59)
        assert look(capsys, "a")[1]["a-00000001"]["state"] == "running"
        age_heartbeat(monkeypatch, 3)
        code, stalled = look(capsys, "a")
        assert (code, stalled["a-00000001"]["state"], stalled["a-00000001"]["eta_s"]) == (1, "stalled", None)


def test_a_run_without_a_first_step_stalls_after_an_hour(
    runs: Runs, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs.add("a-00000001")
    runs.begin(folder)
    with hold(folder):
        for seconds, state in ((3500, "starting"), (200, "stalled")):
            age_heartbeat(monkeypatch, seconds)
            told = look(capsys, "a")[1]["a-00000001"]
            assert told["state"] == state and "no step of attempt 1 yet" in str(told["detail"])
        (folder / "control" / "stop").touch()
        assert str(look(capsys, "a")[1]["a-00000001"]["detail"]).endswith("after its start; is asked to stop")


def test_a_run_is_over_before_its_job_is(
    runs: Runs, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nodes may take long to complete."""
    folder = closed(runs, "a-00000001", "end", "the run is done")
    squeue(tmp_path, monkeypatch, f"echo '17 |0 |COMPLETING |None |node1 |N/A |{folder}/slurm/%j.out '")
    assert look(capsys, "a")[1]["a-00000001"]["state"] == "stopped"


def test_a_job_between_two_attempts_is_not_starting(
    runs: Runs, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What its ledger has decided, or has not yet, is what its owner sees; and that somebody has asked it to stop."""
    folder = closed(runs, "a-00000001", "requeue", "time_limit, by cluster.requeue=scontrol")
    squeue(tmp_path, monkeypatch, f"echo '17 |0 |COMPLETING |None |node1 |N/A |{folder}/slurm/%j.out '")

    def told() -> tuple[object, object]:
        one = look(capsys, "a")[1]["a-00000001"]
        return one["state"], one["detail"]

    assert told() == ("queued", "again after attempt 1: time_limit, by cluster.requeue=scontrol")
    again = {"decision": "restart", "reason": "crash 1 of at most 3 in 24 hours", "wait_seconds": 60}
    attempts.amend(folder, 1, next=again)
    state, detail = told()
    assert state == "starting"
    assert re.fullmatch(r"again after attempt 1 in (5\d|60) s: crash 1 of at most 3 in 24 hours", str(detail))
    age_heartbeat(monkeypatch, 60)
    (folder / "control" / "stop").write_text('{"cause": "terminate"}')  # of the attempt that is over
    assert told()[1] == "again after attempt 1: crash 1 of at most 3 in 24 hours"
    (folder / "control" / "stop").write_text('{"cause": "stop"}')
    assert told()[1] == "again after attempt 1: crash 1 of at most 3 in 24 hours; is asked to stop"
    record = folder / "attempts" / "0001" / "attempt.json"
    record.write_text(
        json.dumps({key: value for key, value in json.loads(record.read_text()).items() if key != "next"})
    )
    assert told() == ("ending", "attempt 1 is over, and what follows is being decided")
    squeue(tmp_path, monkeypatch, f"echo '17 |1 |COMPLETING |None |node1 |N/A |{folder}/slurm/%j.out '")
    assert told()[0] == "ending"  # requeued, and its processes still end
    squeue(tmp_path, monkeypatch, f"echo '17 |1 |PENDING |BeginTime | |N/A |{folder}/slurm/%j.out '")
    assert told() == ("queued", "BeginTime, again after attempt 1 (time_limit); is asked to stop")
    squeue(tmp_path, monkeypatch, f"echo '17 |1 |RUNNING |None |node1 |N/A |{folder}/slurm/%j.out '")
    assert told() == ("starting", "job 17 on node1; is asked to stop")


def test_slow_steps_are_no_stall(runs: Runs, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The median step takes 40 s, so 3 x 40 s may pass; one step that took far longer changes nothing."""
    folder = runs.add("a-00000001")
    lines = [{"step": 1, "train/samples_per_s": 8 / 4000}] + [
        {"step": s, "train/samples_per_s": 8 / 40} for s in (2, 3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "train/')
    runs.begin(folder, 3)
    with hold(folder):
        age_heartbeat(monkeypatch, 115)
        assert look(capsys, "a")[1]["a-00000001"]["state"] == "running"
        age_heartbeat(monkeypatch, 10)
        assert look(capsys, "a")[1]["a-00000001"]["state"] == "stalled"


def test_a_slow_save_is_no_stall(runs: Runs, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has to wait for one save before the next waits for two."""
    folder = runs.add("a-00000001")
    runs.begin(folder, 3)
    beat = folder / "control" / "heartbeat.json"
    beat.write_text(json.dumps(json.loads(beat.read_text()) | {"save_seconds": 60.0}))
    with hold(folder):
        age_heartbeat(monkeypatch, 115)
        assert look(capsys, "a")[1]["a-00000001"]["state"] == "running"
        age_heartbeat(monkeypatch, 10)
        assert look(capsys, "a")[1]["a-00000001"]["state"] == "stalled"


def test_a_first_save_may_be_slow(runs: Runs, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long one takes is not known yet."""
    folder = runs.add("a-00000001")
    runs.begin(folder, 3)
    beat = folder / "control" / "heartbeat.json"
    beat.write_text(json.dumps(json.loads(beat.read_text()) | {"doing": "saves"}))
    with hold(folder):
        for seconds, state, detail in (
            (1700, "running", "saves"),
            (200, "stalled", "no heartbeat for 1900 s, since it saves"),
        ):
            age_heartbeat(monkeypatch, seconds)
            told = look(capsys, "a")[1]["a-00000001"]
            assert (told["state"], told["detail"]) == (state, detail)


def test_a_record_that_nobody_closed(runs: Runs, capsys: Capture) -> None:
    folder = runs.add("a-00000001")
    runs.begin(folder, 5)
    code, told = look(capsys, "a")
    assert (code, told["a-00000001"]["state"]) == (1, "lost")
    assert "attempt 1 on " in str(told["a-00000001"]["detail"]) and "no process is left" in str(
        told["a-00000001"]["detail"]
    )


def test_a_run_that_saved_before_its_job_was_killed_is_no_lost_one(runs: Runs, capsys: Capture) -> None:
    """As by scancel, whose SIGKILL may come before its batch script has closed the record."""
    folder = runs.add("a-00000001")
    number = runs.begin(folder, 5)
    write_verdict(folder, {"status": "stopped", "cause": "terminate", "step": 6, "attempt": number, "message": ""})
    code, told = look(capsys, "a")
    assert (code, told["a-00000001"]["state"], told["a-00000001"]["detail"]) == (0, "stopped", "terminate")


def test_who_asked_a_run_to_stop_sees_that_it_has_heard(runs: Runs, capsys: Capture) -> None:
    folder = runs.add("a-00000001")
    runs.begin(folder, 5)
    with hold(folder):
        for content, detail in (
            ("", "is asked to stop"),
            ('{"cause": "cancelled"}', "is asked to stop"),
            ('{"cause": "terminate"}', "is told to stop (terminate)"),  # by Slurm: nobody asked
        ):
            (folder / "control" / "stop").write_text(content)
            told = look(capsys, "a")[1]["a-00000001"]
            assert (told["state"], told["detail"]) == ("running", detail)


def test_a_run_is_rather_meant_than_a_group_of_its_name(runs: Runs, capsys: Capture) -> None:
    for name in ("i2i-00000001", "other-00000002"):
        runs.finished(name, "done")
    capsys.readouterr()
    assert synthos("diff", "i2i", "other") == 0
    synthos("logs", "i2i")
    assert "i2i-00000001 has no logs yet" in capsys.readouterr().err
    assert len(look(capsys, "i2i")[1]) == 2  # who only looks sees all


def test_the_name_of_a_folder_means_no_other_run(runs: Runs, capsys: Capture) -> None:
    """As a generation that is named after the run whose weights it takes."""
    run, other = runs.add("a-00000001"), runs.add("a-00000001-00000002", "generate")
    assert find_one("a-00000001") == run and find_several(["a-00000001"]) == [run]
    assert find_one("i2i/a-00000001") == run and find_one("generate/a-00000001-00000002") == other
    assert synthos("status", "i2i/a") == 2 and "no such folder" in capsys.readouterr().err


def test_without_slurm_a_job_is_unknown_not_lost(
    runs: Runs, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = runs.add("a-00000001")
    (folder / "slurm").mkdir()
    (folder / "slurm" / "job").write_text("17")
    assert look(capsys, "a")[1]["a-00000001"]["state"] == "unknown"
    runs.begin(folder, 5, job="17.0")
    code, told = look(capsys, "a")
    assert (code, told["a-00000001"]["state"], told["a-00000001"]["job"]) == (1, "unknown", "17")
    with hold(folder):  # its lock tells that much
        assert look(capsys, "a")[1]["a-00000001"]["state"] == "running"
    synthos("status", "a")
    assert "there is no squeue on PATH here" in capsys.readouterr().err


def closed(runs: Runs, name: str, decision: str, reason: str, cause: str = "time_limit", **more: object) -> Path:
    """A run whose job ended, and what was decided to come next."""
    folder = runs.add(name)
    (folder / "slurm").mkdir()
    (folder / "slurm" / "job").write_text("17")
    runs.end(folder, runs.begin(folder, 40, job="17.0"), "stopped", cause=cause, step=40)
    attempts.amend(folder, 1, next={"decision": decision, "reason": reason, **more})
    return folder


def test_a_run_that_gave_up_is_no_stopped_one(
    runs: Runs, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    squeue(tmp_path, monkeypatch)
    stalled = closed(runs, "a-00000001", "requeue", "time_limit")
    attempts.amend(stalled, 1, checkpoint_in=5, checkpoint_out=5)
    record = attempts.newest_record(stalled)
    for number in (2, 3):
        again = {**record, "attempt": number, "job": f"17.{number}"}
        path = stalled / "attempts" / f"{number:04d}" / "attempt.json"
        path.parent.mkdir()
        path.write_text(json.dumps(again))
    cluster = compose_for_test(*BASE, "cluster=slurm").cluster
    decision = decide(attempts.records(stalled), cluster, datetime.now(UTC))
    assert decision.decision == "end"
    attempts.amend(stalled, 3, next={"decision": decision.decision, "reason": decision.reason})
    closed(runs, "b-00000002", "end", "time_limit; but scontrol is not on PATH on n1", failed=True)
    closed(runs, "c-00000003", "end", "cluster.requeue is none")
    closed(runs, "d-00000004", "requeue", "preempted, by cluster.requeue=scontrol", cause="preempted")
    closed(runs, "e-00000005", "end", "somebody asked it to stop", cause="stop")
    code, told = look(capsys, "i2i")
    assert code == 1
    said = {name: (run["state"], run["detail"]) for name, run in told.items()}
    assert said.pop("d-00000004") == (
        "lost",
        "attempt 1 was to be followed by another (preempted, by cluster.requeue=scontrol), and no job and no process "
        "is left",
    )
    assert said == {
        "a-00000001": ("failed", f"time_limit: {decision.reason}"),
        "b-00000002": ("failed", "time_limit: time_limit; but scontrol is not on PATH on n1"),
        "c-00000003": ("stopped", "time_limit"),
        "e-00000005": ("stopped", "stop"),
    }


def test_a_run_that_waits_for_slurm_can_be_stopped_though_slurm_says_nothing(
    runs: Runs, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    squeue(tmp_path, monkeypatch, "echo 'Unable to contact slurm controller' >&2; exit 1")
    waits = closed(runs, "a-00000001", "requeue", "time_limit")
    over = closed(runs, "b-00000002", "end", "cluster.requeue is none")
    assert {name: run["state"] for name, run in look(capsys)[1].items()} == {
        "a-00000001": "unknown", "b-00000002": "stopped",
    }  # fmt: skip
    assert [one.goes_on for one in look_at([waits, over])[0]] == [True, False]  # who watches it watches on
    assert synthos("stop", "a") == 0 and (waits / "control" / "stop").exists()
    assert synthos("stop", "b") == 1 and not (over / "control" / "stop").exists()


def test_one_damaged_folder_hides_no_other(runs: Runs, capsys: Capture) -> None:
    runs.finished("a-00000001", "done")
    damaged = runs.finished("b-00000002", "done")
    (damaged / "control" / "verdict.json").write_text('{"status": "do')
    code, told = look(capsys, "i2i")
    assert (code, told["a-00000001"]["state"], told["b-00000002"]["state"]) == (1, "done", "unreadable")
    assert f"{damaged / 'control' / 'verdict.json'} is damaged" in str(told["b-00000002"]["detail"])


def test_what_ended_long_ago_is_counted_and_listed(
    runs: Runs, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        runs.finished(f"a-0000000{number}", "done", group=f"group{number % 2}")
    now = time.time
    monkeypatch.setattr("launch.commands.status.time.time", lambda: now() + 2 * 86400)
    assert synthos("status") == 0
    assert "3 that ended before are not shown: synthos ls" in capsys.readouterr().out
    assert synthos("ls", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 3
    assert synthos("ls", "group1") == 0
    shown = capsys.readouterr().out
    assert "a-00000001" in shown and "a-00000000" not in shown
    assert synthos("ls", "group7") == 2
    assert "expected one of group0, group1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("status", "i2k"), "i2k: no run in "),
        (("status", "--watch", "--json"), "--watch, --json: one document is printed once"),
        (("stop", "a"), "a: means 2 runs; expected one of i2i/a-00000001, i2i/a-00000002"),
        (("logs", "i2i"), "i2i: means 3 runs; expected one of i2i/a-00000001, i2i/a-00000002, i2i/b-00000003"),
        (("logs", "/no/where"), "/no/where: no such folder"),
        (("logs", "/"), "/ is no run folder: it has no config.yaml"),
        (("logs", "424242"), "424242: no run in "),
        (("diff", "b", "c"), "c: no run in "),
    ],
)  # fmt: skip
def test_bad_input_is_one_message(runs: Runs, capsys: Capture, words: tuple[str, ...], expected: str) -> None:
    for name in ("a-00000001", "a-00000002", "b-00000003"):
        runs.add(name)
    assert synthos(*words) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {expected}")
    assert shown.out == ("" if "--json" not in words else f"{json.dumps({'error': shown.err[7:-1]})}\n")


def test_watching_ends_with_the_run(runs: Runs, capsys: Capture) -> None:
    runs.finished("a-00000001", "done")
    runs.finished("b-00000002", "failed", cause="error", step=None)
    assert synthos("status", "--watch", "a") == 0 and "a-00000001" in capsys.readouterr().out
    assert synthos("status", "--watch", "b", "--every", "0.1") == 1


def test_watching_into_a_file_prints_every_look(runs: Runs, capsys: Capture) -> None:
    folder = runs.add("a-00000001")
    number = runs.begin(folder, 3)
    with hold(folder):
        closing = Timer(1, lambda: runs.end(folder, number, "done"))
        closing.start()
        assert synthos("status", "--watch", "a", "--every", "0.2") == 0
    closing.join()
    states = re.findall(r"a-00000001 +(\w+)", capsys.readouterr().out)
    assert states[0] == "running" and states[-1] == "done" and len(states) > 2


def test_a_near_miss_is_named(runs: Runs, capsys: Capture) -> None:
    runs.add("photos-0000abcd")
    assert synthos("status", "fotos") == 2
    assert "did you mean 'photos'? `synthos ls` lists all 1" in capsys.readouterr().err


def test_every_name_of_a_run(runs: Runs, capsys: Capture) -> None:
    folder = runs.add("photos-0000abcd-g2", "mine")
    (folder / "slurm").mkdir()
    (folder / "slurm" / "31.out").touch()
    (folder / "slurm" / "job").write_text("32")
    (folder / "slurm" / "33_4.out").touch()
    for word in ("33", "33_4", "photos", "photos-0000abcd-g2", "0000abcd", "mine", "31", "32", str(folder)):
        assert list(look(capsys, word)[1]) == ["photos-0000abcd-g2"]


def test_no_folder_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("SYNTHOS_RUNS", str(tmp_path / "none"))
    assert synthos("status") == 2
    assert f"{tmp_path / 'none'} can't be read: No such file or directory" in capsys.readouterr().err
    monkeypatch.delenv("SYNTHOS_RUNS")
    monkeypatch.setattr("launch.runs.RUNS", tmp_path / "runs")  # of a new checkout
    assert synthos("status") == synthos("ls") == 0
    assert capsys.readouterr().out == 2 * f"no runs to show in {tmp_path / 'runs'}\n"
