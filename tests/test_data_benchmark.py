"""The data engine's benchmark: our side of it at toy size, and its arithmetic. No figure of a time is judged."""

import importlib.util
import io
import itertools
import json
import os
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import data, data_table, pictures
from benchmarks.rivals import bare, ours
from benchmarks.rivals.ranges import serve
from synthos.data.decode import decode_image

PHOTOGRAPHS = pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="no scikit-image: skipped")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("skimage")
    return pictures.shards(tmp_path_factory.mktemp("data"), 96, 72, 12, 6)


@pytest.mark.slow
@PHOTOGRAPHS
def test_our_side_at_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = os.sched_getaffinity(0)
    out = tmp_path / "data.json"
    assert data.main(["--quick", "--no-rivals", "--rounds", "1", "--data", str(tmp_path), "--out", str(out)]) == 0
    assert os.sched_getaffinity(0) == before
    record = json.loads(out.read_text())
    for key in ("device", "python", "commit", "effort", "reads", "plan", "resume", "http"):
        assert record[key], key
    for case in record["cases"]:
        assert set(case["images_per_s"]) == set(case["versions"]) == {"bare", "ours"}
        assert all(len(rates) == 1 and rates[0] > 0 for rates in case["images_per_s"].values())
    printed = capsys.readouterr().out
    assert "400 x 300 to 128 x 128" in printed and "**Synthos**" in printed
    assert [goal["goal"] for goal in record["goals"] if goal["figure"] is None][0].startswith("times webdataset")


def test_a_rival_without_environment_is_named(tmp_path: Path) -> None:
    absent = data.environments(tmp_path, make=False)
    assert set(absent) == set(data.RIVALS) and str(tmp_path / "mosaicml") in absent["mosaicml"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--core", "9999"], ["--out", "no/such/folder/x.json"]])
def test_what_cannot_be_asked_for_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        data.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_pictures_are_the_same_every_time(folder: Path) -> None:
    again = list(itertools.islice(pictures.rows(96, 72, 12), 3))
    assert [row.image for row in again] == bare.read(folder)[:3]
    assert Image.open(io.BytesIO(bare.read(folder)[0])).size == (96, 72)


def test_an_epoch_of_ours_holds_every_picture_once(folder: Path) -> None:
    batches = list(ours.epoch(folder, 72, 4))
    assert [tuple(batch.shape) for batch in batches] == [(4, 3, 72, 72)] * 3
    found = sorted(picture.numpy().tobytes() for batch in batches for picture in batch)
    assert found == sorted(decode_image(file, 72, 72, "shared").tobytes() for file in bare.read(folder))


def test_bare_decoding_makes_the_same_pictures(folder: Path) -> None:
    """To the pixel where no resize is left to do; elsewhere its box is half a pixel off."""
    for file in bare.read(folder):
        for edge in (72, 36):
            assert np.array_equal(bare.decode(file, edge), decode_image(file, edge, edge, "shared").transpose(1, 2, 0))
        small, reference = bare.decode(file, 24), decode_image(file, 24, 24, "shared")
        assert small.shape == (24, 24, 3) and abs(small.mean() - reference.mean()) < 3


def test_rows_read_what_they_say(folder: Path) -> None:
    sizes = [len(file) for file in bare.read(folder)]
    assert min(sizes) <= ours.reads(folder, 50)["mean_bytes"] <= max(sizes)
    assert ours.resume(folder, 24, 4)["samples"] == 12
    planned = ours.plan(200_000)
    assert planned["samples"] == 200_000 and planned["memory_mb"] >= 0
    moved = ours.http(folder, 4, 2)
    assert moved["moved_over_used"] >= 1


def test_the_server_counts_what_it_sends(folder: Path) -> None:
    shard = folder / "tar" / "00000.tar"
    with serve(folder / "tar") as server:
        request = urllib.request.Request(f"{server.url}/00000.tar", headers={"Range": "bytes=100-299"})
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 206 and answer.read() == shard.read_bytes()[100:300]
        with urllib.request.urlopen(f"{server.url}/00000.tar") as answer:
            assert answer.read() == shard.read_bytes()
        with urllib.request.urlopen(urllib.request.Request(f"{server.url}/00000.tar", method="HEAD")) as answer:
            assert int(answer.headers["Content-Length"]) == shard.stat().st_size
    assert (server.sent, server.requests) == (200 + shard.stat().st_size, 2)


def record() -> dict[str, Any]:
    rates = {"ours": [120.0, 90.0, 100.0], "bare": [100.0, 100.0, 100.0], "webdataset": [30.0, 30.0, 20.0]}
    versions = {name: {"package": "1.0"} for name in rates}
    case = {"width": 40, "height": 30, "edge": 10, "images_per_s": rates, "versions": versions}
    plan = {"samples": 1000, "first_batch_s": 0.1, "mean_batch_ms": 0.6, "median_batch_ms": 0.2, "resume_s": 2.0}
    figures = {"reads": {"reads_per_s": 50_000.0}, "plan": plan | {"memory_mb": 1.0}, "resume": {"resume_s": 0.5}}
    about = {"device": "a machine", "python": "3", "rounds": 3, "left_out": {"mosaicml": "no room"}}
    return {**about, "cases": [case, case], **figures, "http": {"moved_over_used": 1.1}}


def test_goals_are_judged_by_ratios_within_a_round() -> None:
    """1.2, 0.9 and 1.0 times bare decoding; 4, 3 and 5 times webdataset."""
    goals = data_table.judge(record())
    assert [goal["figure"] for goal in goals] == [4.0, 4.0, 1.0, 1.0, 50_000, 0.6, 2.0, 0.5, 1.1]
    assert [goal["met"] for goal in goals] == [True, True, True, True, True, False, True, True, True]


def test_the_table_shows_spread_and_what_is_not_met() -> None:
    found = record()
    text = data_table.markdown(found | {"goals": data_table.judge(found)})
    assert "| webdataset, Pillow BICUBIC | package 1.0 | 30 | 20 to 30 | 4.00 x (3.00 to 5.00) |" in text
    assert "| ms for a planned batch of 2,048 | <= 0.5 | 0.6 | **no** |" in text
    assert "mosaicml was left out: no room." in text
