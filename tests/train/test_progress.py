"""What is said of pictures being made."""

import json
from pathlib import Path

import pytest

from synthos.train import progress
from synthos.train.progress import Beat, Countdown, write_heartbeat


def test_a_countdown_tells_rate_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    beats: list[Beat] = []
    countdown = Countdown(10, 2, beats.append)
    for seconds, made in ((2, 1), (20, 3), (30, 4)):
        now[0] = 100.0 + seconds
        countdown.add(made)
    countdown.close()
    assert [(b.step, b.last_step, b.unit) for b in beats] == [
        (3, 10, "picture"),
        (6, 10, "picture"),
        (10, 10, "picture"),
    ]
    assert [b.images_per_s for b in beats] == pytest.approx([0.5, 0.2, 8 / 30])
    assert [b.eta_s for b in beats] == pytest.approx([14, 20, 0])
    lines = capsys.readouterr().err.splitlines()  # one now and then, and always the last
    assert lines == ["picture 6/10  0.20 images/s  ETA 0:00:20", "picture 10/10  0.27 images/s  ETA 0:00:00"]


def test_a_heartbeat_is_read_back_by_its_names(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    beat = Beat(3, 10, 0.5, 2.0, 0.25, 61.0)
    write_heartbeat(tmp_path, 4, beat)
    told = json.loads((tmp_path / "control" / "heartbeat.json").read_text())
    assert told["attempt"] == 4 and Beat(**{name: told[name] for name in Beat.__dataclass_fields__}) == beat
    assert str(beat) == "loss 0.5000  2.0 images/s  data wait 25 %  ETA 0:01:01"
    assert [path.name for path in (tmp_path / "control").iterdir()] == ["heartbeat.json"]
