"""The verbs that act on a run or look into it: logs, stop, cancel, retry, diff, explain, gc, wandb sync, doctor."""

import errno
import fcntl
import json
import logging
import os
import socket
import stat
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import attempts, provenance, snapshot
from launch.commands import gc
from launch.rundir import hold, holders
from launch.runs import is_held
from launch.start import start
from synthos.files import write_json
from synthos.run import _open_log, write_verdict
from synthos.schema import JobConfig, read_job
from synthos.train.checkpoint_files import MANIFEST, write_counters
from tests.launch.commands.conftest import Runs, squeue, synthos

Capture = pytest.CaptureFixture[str]


def write_logs(folder: Path, attempt: int, lines: dict[str, list[str]]) -> None:
    for name, text in lines.items():
        (folder / "attempts" / f"{attempt:04d}" / name).write_text("".join(f"{line}\n" for line in text))


def test_logs_of_an_attempt_that_failed_before_it_had_ranks(runs: Runs, capsys: Capture) -> None:
    folder = runs.add("a-00000001")
    number = runs.begin(folder)
    write_logs(folder, number, {"node-0.log": ["more of it"]})
    write_verdict(folder, {"status": "failed", "cause": "preflight", "attempt": number, "message": "node2: no GPU"})
    assert synthos("logs", "a") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("attempt 1 failed: node2: no GPU\n") and "more of it" in shown


def test_logs_show_the_first_failing_rank_on_top(runs: Runs, capsys: Capture) -> None:
    folder = runs.add("a-00000001")
    runs.end(folder, runs.begin(folder, 4), "stopped", cause="notice", step=4)
    number = runs.begin(folder, 5)
    write_logs(folder, 1, {"node-0.log": ["old"]})
    write_logs(folder, number, {"node-0.log": ["n0"], "node-1.log": ["n1"], "rank-00000.log": ["r0"]})
    handler = _open_log(folder / "attempts" / "0002" / "rank-00002.log")
    logging.getLogger("synthos").error("the cause of it all")
    logging.getLogger("synthos").removeHandler(handler)
    handler.close()
    said = {"cause": "error", "step": None, "rank": 2, "message": "RuntimeError: disk gone"}
    runs.end(folder, number, "failed", **said)
    assert synthos("logs", "a") == 0
    shown = capsys.readouterr().out
    marks = ["attempt 2 failed first at rank 2: RuntimeError: disk gone", "the cause of it all", "n0", "n1"]
    assert [shown.index(mark) for mark in marks] == sorted(shown.index(mark) for mark in marks)
    assert "r0" not in shown and "old" not in shown
    assert synthos("logs", "a", "--rank", "0") == 0 and "r0" in capsys.readouterr().out
    assert synthos("logs", "a", "--attempt", "1", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["attempt"], told["failure"], told["logs"][0]["lines"]) == (1, None, ["old"])
    assert synthos("logs", "a", "--rank", "7") == 2
    assert "--rank: 7 has no log in attempt 2; expected one of 0, 2" in capsys.readouterr().err
    assert synthos("logs", "a", "--attempt", "3") == 2
    assert "expected one of 1, 2" in capsys.readouterr().err
    assert synthos("logs", "-f", "a") == 1  # over already: everything is shown, then how it ended
    shown = capsys.readouterr().out
    assert "n0" in shown and shown.splitlines()[-1] == "a-00000001: failed, rank 2: RuntimeError: disk gone"


def test_logs_show_the_last_lines_only(runs: Runs, capsys: Capture) -> None:
    folder = runs.finished("a-00000001", "done")
    write_logs(folder, 1, {"node-0.log": [f"line {number}" for number in range(500)]})
    assert synthos("logs", "a", "--lines", "3") == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["line 497", "line 498", "line 499"]
    assert synthos("logs", "a", "--lines", "0") == 0
    assert len(capsys.readouterr().out.splitlines()) == 501
    assert synthos("logs", "-f", "a", "--lines", "2") == 0
    assert capsys.readouterr().out.splitlines()[1:-1] == ["line 498", "line 499"]
    runs.add("b-00000002")
    assert synthos("logs", "b") == 1 and "has no logs yet" in capsys.readouterr().err


def test_stop_asks_those_that_run(runs: Runs, capsys: Capture) -> None:
    running, done = runs.add("a-00000001"), runs.finished("b-00000002", "done")
    runs.begin(running, 3)
    with hold(running):
        assert synthos("stop", "i2i") == 1  # one of them could not be stopped
    assert json.loads((running / "control" / "stop").read_text()) == {"cause": "stop"}
    assert not (done / "control" / "stop").exists()
    shown = capsys.readouterr()
    assert shown.out == "a-00000001: it saves and ends\n" and shown.err == "b-00000002: is done; nothing was done\n"
    runs.begin(running)  # a person's wish outlives the attempt that it was not meant for
    assert (running / "control" / "stop").exists()


def test_a_run_that_can_not_be_asked_to_stop_keeps_no_other_from_it(
    runs: Runs, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, running = runs.add("a-00000001"), runs.add("b-00000002")

    def write(path: Path, value: object) -> None:
        if full in path.parents:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_json(path, value)

    monkeypatch.setattr("launch.commands.stop.write_json", write)
    for folder in (full, running):
        runs.begin(folder)
    with hold(full), hold(running):
        assert synthos("stop", "i2i") == 1
    assert (running / "control" / "stop").exists()
    assert capsys.readouterr().err == f"a-00000001: can't be asked: {full}/control/stop: No space left on device\n"


def test_who_looks_at_a_lock_does_not_hold_it(runs: Runs) -> None:
    """A look has the file open, and locks it for a moment: it is not killed, and keeps nothing from starting."""
    folder = runs.add("a-00000001")
    with hold(folder):
        pass
    prepared: list[Path] = []

    def prepare() -> None:
        prepared.append(folder)
        raise RuntimeError("that is far enough")

    with (folder / "control" / "lock").open() as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        assert list(holders(folder)) == []
        release = threading.Timer(0.3, fcntl.flock, (look, fcntl.LOCK_UN))
        release.start()
        assert start(read_job(folder / "config.yaml"), folder, prepare, following=False) == 1 and prepared
        release.join()
        with hold(folder):
            assert list(holders(folder)) == [os.getpid()]


def test_cancel_of_what_does_not_run(runs: Runs, capsys: Capture) -> None:
    folder = runs.add("a-00000001")
    runs.begin(folder, 3)
    assert synthos("cancel", "a", "--json") == 1
    (told,) = json.loads(capsys.readouterr().out)["runs"]
    assert told["done"] is False and told["what"].startswith("is lost (attempt 1 on ")
    assert not (folder / "control" / "cancelled.json").exists()


def test_who_could_not_cancel_has_changed_nothing(
    runs: Runs, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = runs.add("a-00000001")
    (folder / "slurm").mkdir()
    squeue(tmp_path, monkeypatch, f"echo '17 |0 |PENDING |Priority | |N/A |{folder}/slurm/%j.out '")
    (tmp_path / "bin" / "scancel").write_text("#!/bin/sh\necho 'scancel: error: Access denied' >&2\nexit 1\n")
    (tmp_path / "bin" / "scancel").chmod(0o755)
    assert synthos("cancel", "a") == 1 and "Access denied" in capsys.readouterr().err
    assert not {"stop", "cancelled.json"} & {*os.listdir(folder / "control")}
    (tmp_path / "bin" / "scancel").write_text("#!/bin/sh\n")
    assert synthos("cancel", "a") == 0 and (folder / "control" / "cancelled.json").exists()


def test_retry_is_for_failures(runs: Runs, capsys: Capture) -> None:
    runs.finished("a-00000001", "done")
    assert synthos("retry", "a") == 1
    assert "a-00000001: is done, it has not failed" in capsys.readouterr().err
    assert synthos("retry", "i2i", "--failed") == 0
    assert capsys.readouterr().out == "no failed run among 1\n"


def test_retry_starts_the_others_though_one_cannot(
    runs: Runs, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of these say that their data was another; what starts and fails by itself keeps its traceback."""
    for number in (1, 2):
        runs.finished(f"a-0000000{number}", "failed", group="mine", cause="crash", step=3)
    assert synthos("retry", "mine", "--json") == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {
        "runs": [{"run": f"a-0000000{number}", "started": False, "exit_code": 2} for number in (1, 2)]
    }
    for number in (1, 2):
        assert f"error: a-0000000{number}: data, weights or requests behind its paths have changed" in shown.err
    started: list[Path] = []

    def plan(folder: Path, config: JobConfig, command: list[str], following: bool) -> Callable[[], int]:
        def work() -> int:
            started.append(folder)
            raise ValueError("of the training")

        return work

    monkeypatch.setattr("launch.commands.retry.plan_again", plan)
    monkeypatch.setattr("launch.commands.resume.plan_again", plan)
    with pytest.raises(ValueError, match="of the training"):
        synthos("retry", "a-00000001")
    with pytest.raises(ValueError, match="of the training"):
        synthos("resume", "a-00000002")
    assert [folder.name for folder in started] == ["a-00000001", "a-00000002"]


def test_resume_changes_machines_only(runs: Runs, capsys: Capture) -> None:
    folder = runs.finished("a-00000001", "stopped", cause="notice")
    before = (folder / "config.yaml").read_bytes()
    assert synthos("resume", "a", "optim.lr=1", "nodez=2", "cluster.tme=x", "word") == 2
    err = capsys.readouterr().err
    assert "error: optim.lr: is part of what this run is" in err and "nodez: unknown key; did you mean 'nodes'?" in err
    assert "'word' is no override" in err
    assert synthos("resume", "a", "cluster.tme=1:00:00") == 2
    assert "cluster.tme: unknown key; did you mean 'time'?" in capsys.readouterr().err
    assert synthos("resume", "a", "cluster=slum") == 2
    assert "cluster: 'slum' is unknown; did you mean 'slurm'?" in capsys.readouterr().err
    assert synthos("resume", "a", "gpus_per_node=3") == 2
    assert "batch.size: 8 is not a multiple of batch.micro x ranks" in capsys.readouterr().err
    with hold(folder):
        runs.begin(folder, 1)
        assert synthos("resume", "a") == 1
    assert "a-00000001 is running already" in capsys.readouterr().err
    assert (folder / "config.yaml").read_bytes() == before


def test_diff_names_what_differs(runs: Runs, capsys: Capture) -> None:
    first = runs.add("a-00000001")
    second = runs.add("b-00000002", "i2i", "optim.lr=3e-4", "seed=5")
    for folder, version in ((first, "1.0"), (second, "2.0")):
        (folder / "provenance").mkdir()
        (folder / "provenance" / "packages.txt").write_text(f"same==1\nother=={version}\n")
        (folder / "provenance" / "inputs.json").write_text(json.dumps({"data": {"fingerprint": f"f{version}"}}))
    assert synthos("diff", "a", "b", "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert set(told["config"]) == {"optim.lr", "seed"} and told["config"]["seed"] == [0, 5]
    assert told["packages"] == {"other": ["1.0", "2.0"]} and told["data"] == {"data.fingerprint": ["f1.0", "f2.0"]}
    assert synthos("diff", "a", "b") == 1
    shown = capsys.readouterr().out
    assert "optim.lr" in shown and "code: equal" in shown
    assert synthos("diff", "a", "a") == 0


def test_diff_compares_the_code_that_ran(runs: Runs, capsys: Capture) -> None:
    """Of a run that has begun its newest attempt tells it, of another its provenance."""
    began, prepared = runs.add("a-00000001"), runs.add("b-00000002")
    facts = {"commit": "c0ffee", "changed": [], "tree": "1" * 40}
    runs.begin(began)
    attempts.amend(began, 1, **facts)
    (prepared / "provenance").mkdir()
    write_json(prepared / "provenance" / "git.json", {**facts, "branch": "topic"})
    assert synthos("diff", "a", "b") == 0 and "code: equal" in capsys.readouterr().out
    write_json(prepared / "provenance" / "git.json", {**facts, "tree": "2" * 40})
    assert synthos("diff", "a", "b", "--json") == 1
    assert json.loads(capsys.readouterr().out)["code"] == {"tree": ["1" * 40, "2" * 40]}


def test_explain_says_what_is_known(runs: Runs, capsys: Capture) -> None:
    folder = runs.finished("a-00000001", "stopped", cause="stop")
    (folder / "metrics.jsonl").write_text('{"step": 1, "train/samples_per_s": 16.0}\n')
    assert synthos("explain", "a") == 0
    shown = capsys.readouterr().out
    assert "a-00000001: stopped, stop" in shown and "no time limit and no preemption with cluster=local" in shown
    assert "a step: 0.50 s, a save: not measured yet" in shown


def fill(folder: Path, size: int = 1000) -> Path:
    """A checkpoint of that step, whole: counters, a file, and the manifest that lists it."""
    folder.mkdir(parents=True)
    write_counters(folder, {})
    content = b"x" * size
    (folder / "a.distcp").write_bytes(content)
    (folder / MANIFEST).write_text(json.dumps({"a.distcp": [size, zlib.crc32(content)]}))
    return folder


def test_gc_deletes_only_what_nobody_needs(runs: Runs, capsys: Capture) -> None:
    done, stopped, live = (
        runs.finished("a-00000001", "done"),
        runs.finished("b-00000002", "stopped"),
        runs.add("c-00000003"),
    )
    old = [fill(folder / "checkpoints" / "step_00000001") for folder in (done, stopped, live)]
    new = [fill(folder / "checkpoints" / "step_00000002") for folder in (done, stopped, live)]
    parts = [fill(folder / "checkpoints" / ".step_00000003.part") for folder in (done, stopped, live)]
    gone = fill(stopped / "checkpoints" / ".step_00000000.gone")
    weights = fill(done / "weights" / "step_00000001")
    empty = stopped / "attempts" / "0002"
    empty.mkdir()
    used, unused, young = (runs.root / ".code" / name for name in ("used", "unused", "young"))
    for tree in (used, unused, young):
        (tree / "launch").mkdir(parents=True)
        (tree / "launch" / "cli.py").write_text("code")
        (tree / "launch").chmod(stat.S_IRUSR | stat.S_IXUSR)
        if tree != young:
            os.utime(tree, (0, 0))
        tree.with_name(f"{tree.name}.json").write_text("{}")
    (live / "code").symlink_to(used)
    provenance.record(live, ["test"], runs.root, {})
    runs.begin(live, 3)
    with hold(live):
        assert synthos("gc", "--json") == 0
        told = json.loads(capsys.readouterr().out)
        paths = {waste["path"] for waste in told["waste"]}
        assert paths == {str(path) for path in (old[0], parts[0], parts[1], gone, empty, unused)}
        assert told["deleted"] is False and told["bytes"] > 3000
        assert all(Path(path).exists() for path in paths)
        assert synthos("gc", "--yes") == 0
    assert not any(Path(path).exists() for path in paths)
    assert all(path.exists() for path in (*old[1:], *new, parts[2], weights, used, young))
    left = {"used", "used.json", "young", "young.json"}
    assert {path.name for path in (runs.root / ".code").iterdir()} == left
    capsys.readouterr()
    assert synthos("gc", "a") == 0 and capsys.readouterr().out == "nothing to delete\n"


def test_gc_leaves_a_copy_of_code_that_a_submission_takes(
    runs: Runs, capsys: Capture, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At first its run has no config, by which gc would know it; also between its look and its deletion."""
    store = runs.root / ".code"
    kept = snapshot.take(checkout, store)
    os.utime(kept, (0, 0))
    assert snapshot.take(checkout, store) == kept
    assert synthos("gc", "--yes") == 0 and kept.exists()
    os.utime(kept, (0, 0))
    delete = gc._delete

    def late(waste: gc.Waste) -> str:
        assert snapshot.take(checkout, store) == kept
        return delete(waste)

    monkeypatch.setattr(gc, "_delete", late)
    capsys.readouterr()
    assert synthos("gc", "--yes") == 1
    assert f"{kept}: left alone, a run was just submitted with it" in capsys.readouterr().err
    assert {path.name for path in store.iterdir()} == {kept.name, f"{kept.name}.json"}


def test_gc_touches_nothing_that_it_cannot_judge(runs: Runs, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = runs.finished("a-00000001", "done")
    (folder / "slurm").mkdir()
    part = fill(folder / "checkpoints" / ".step_00000003.part")
    monkeypatch.setenv("PATH", str(runs.root))
    assert synthos("gc", "--yes") == 1
    assert "there is no squeue on PATH here" in capsys.readouterr().err and part.exists()


def test_wandb_sync_has_nothing_to_send(runs: Runs, capsys: Capture) -> None:
    folder = runs.finished("a-00000001", "done")
    assert synthos("wandb", "sync", "a") == 0
    assert capsys.readouterr().out == "a-00000001: logged nothing offline that is not sent yet\n"
    runs.begin(folder, 1)
    with hold(folder):
        assert synthos("wandb", "sync", "a") == 1
    assert "is running: what it logs can be sent when it has ended" in capsys.readouterr().err


def test_doctor_without_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert synthos("doctor") == 1
    assert capsys.readouterr().err == f"error: scontrol is not on PATH on {socket.gethostname()}\n"
    assert synthos("doctor", "--write", "a/b") == 2


def test_looking_at_a_lock_leaves_it_free(tmp_path: Path) -> None:
    with hold(tmp_path):
        assert is_held(tmp_path)
    assert not is_held(tmp_path)
    with hold(tmp_path) as lock:
        assert lock is not None
