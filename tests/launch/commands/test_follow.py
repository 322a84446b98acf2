"""What `follow=true` says at the end: of a run that will not go on, though nobody wanted that, it fails."""

from pathlib import Path

import pytest

from launch.follow import follow
from tests.launch.commands.conftest import Runs, squeue
from tests.launch.commands.test_status import closed


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
