"""`synthos data stats`, `filter` and `preview`, against counts made from the members themselves."""

import io
import json
import statistics
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launch.cli import main
from synthos.data import indexing
from synthos.data.preview import CELL, GAP, TEXT, draw_rows
from synthos.data.processes import usable_cores
from synthos.data.shards import list_shards
from synthos.data.stats import Counts
from synthos.data.stream import Stream
from synthos.data.write import Row, write_shards
from tests.data.commands.conftest import Command
from tests.data.make import INPUTS, config, encoded, noise, picture, tar

SIZES = [
    (256, 256),
    (255, 300),
    (480, 640),
    (512, 2000),
    (720, 720),
    (1000, 719),
    (40, 30),
    (513, 480),
]  # width, height


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Noise of these sizes, with captions of 1, 3, 5, ... characters; in shards of three."""
    rows = [Row(encoded(noise(h, w, seed=i), "JPEG"), "x" * (2 * i + 1)) for i, (w, h) in enumerate(SIZES)]
    write_shards(tmp_path / "set", rows, 3)
    return tmp_path / "set"


def members(folder: Path) -> dict[tuple[str, str], bytes]:
    """By shard and name."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as file:
            for member in file.getmembers():
                reader = file.extractfile(member)
                assert reader is not None
                found[path.name, member.name] = reader.read()
    return found


def seen(folder: Path) -> list[tuple[int, int]]:
    return [Image.open(io.BytesIO(data)).size for (_, name), data in members(folder).items() if name.endswith(".jpg")]


def test_stats(folder: Path, command: Command) -> None:
    code, said = command("stats", folder)
    sides = [min(size) for size in SIZES]
    assert code == 0 and said["samples"] == 8 and said["shards"] == 3
    assert said["bytes"] == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert said["extensions"] == {"jpg": 8, "json": 8, "txt": 8}
    assert said["shorter_side"] == {"min": 30, "median": statistics.median_low(sides), "max": 720}
    assert said["width"]["max"] == 1000 and said["height"]["max"] == 2000
    assert said["caption"] == {"min": 1, "median": 7, "max": 15}
    assert said["at_least"] == {str(n): sum(side >= n for side in sides) for n in (256, 480, 512, 720)}
    assert said["at_least"] == {"256": 6, "480": 5, "512": 3, "720": 1}
    assert sum(said["aspects"].values()) == 8 and said["aspects"]["to 0.5"] == 1 and said["aspects"]["0.8 to 1"] == 3
    assert said["doubles"] == said["without_picture"] == said["without_caption"] == 0


def test_stats_of_what_lacks_something(tmp_path: Path, command: Command) -> None:
    same = picture(size=(20, 10))
    rows = [("a.png", same), ("b.png", same), ("c.txt", b"only words"), ("d.png", b"no picture"), ("d.txt", b"d")]
    tar(tmp_path / "a.tar", rows)
    code, said = command("stats", tmp_path / "a.tar")
    assert (said["samples"], said["without_picture"], said["without_caption"], said["doubles"]) == (4, 2, 2, 1)
    assert said["width"] == {"min": 20, "median": 20, "max": 20}
    assert command("stats", tmp_path / "a.tar", "--image", "webp")[1]["width"] is None


def test_a_running_count_is_a_sorted_list() -> None:
    values = np.random.default_rng(0).integers(0, 900, 1001)
    counts = Counts()
    for part in np.array_split(values, 7):
        counts.add(part)
    kept = [int(v) for v in values if v > 0]
    assert counts.spread() == {"min": min(kept), "median": statistics.median_low(kept), "max": max(kept)}
    assert counts.at_least(300) == sum(v >= 300 for v in kept) and counts.at_least(5000) == 0


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--min-side", 256], [0, 2, 3, 4, 5, 7]),
        (["--min-side", 512], [3, 4, 5]),
        (["--max-aspect", 1.5], [0, 1, 2, 4, 5, 6, 7]),
        (["--min-caption", 5, "--max-caption", 11], [2, 3, 4, 5]),
        (["--min-side", 256, "--max-aspect", 1.2, "--min-caption", 2], [4, 7]),
    ],
)
def test_filter_keeps_what_is_within_limits(
    folder: Path, tmp_path: Path, command: Command, options: list[Any], kept: list[int]
) -> None:
    code, said = command("filter", folder, "--out", tmp_path / "out", "--shard-size", 2, *options)
    assert code == 0 and said["samples"] == 8 and said["kept"] == len(kept) == said["written"]["samples"]
    assert sum(said["left_out"].values()) == 8 - len(kept)
    before, after = members(folder), members(tmp_path / "out")
    keys = [f"{number // 3 * 10_000 + number % 3:09d}" for number in kept]
    assert {name: data for (_, name), data in after.items()} == {
        name: data for (_, name), data in before.items() if name.split(".")[0] in keys
    }
    assert seen(tmp_path / "out") == [SIZES[number] for number in kept]
    assert said["at_least"]["after"]["480"] == sum(min(SIZES[number]) >= 480 for number in kept)
    assert said["at_least"]["before"]["480"] == 5
    assert command("validate", tmp_path / "out", "--require", "image,text", "--decode", "--workers", 1)[0] == 0


def test_the_limit_that_is_asked_for_is_a_row_of_the_table(
    folder: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    told = command("filter", folder, "--out", tmp_path / "out", "--min-side", 500)[1]["at_least"]
    assert told["before"] == {"256": 6, "480": 5, "500": 3, "512": 3, "720": 1}
    assert told["after"] == {"256": 3, "480": 3, "500": 3, "512": 3, "720": 1}
    assert main(["data", "filter", str(folder), "--list", str(tmp_path / "l"), "--name", "x", "--min-side", "500"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith(">=")]
    assert [row[1] for row in rows] == ["256", "480", "500", "512", "720"] and rows[2][2:] == [
        "3",
        "37.5%",
        "3",
        "100.0%",
    ]


@pytest.mark.parametrize("alone", [indexing.ALONE_BYTES, 0])
def test_shards_without_an_index_are_indexed_first_and_together(
    folder: Path, command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, alone: int
) -> None:
    """By processes of their own where they hold much."""
    _, expected = command("stats", folder)
    monkeypatch.setattr(indexing, "ALONE_BYTES", alone)
    assert indexing.processes_for(list_shards(str(folder))) == (1 if alone else usable_cores())
    for path in (*folder.glob("*.npz"), folder / "manifest.json"):
        path.unlink()
    assert main(["data", "stats", str(folder)]) == 0
    said = capsys.readouterr().err
    assert "indexing" in said and len([*folder.glob("*.npz")]) == 3
    assert main(["data", "stats", str(folder)]) == 0
    assert "indexing" not in capsys.readouterr().err and command("stats", folder)[1] == expected


def test_filter_is_reproducible_and_overwrites_nothing(
    folder: Path, tmp_path: Path, command: Command, refused: Any
) -> None:
    for name in ("one", "two"):
        command("filter", folder, "--out", tmp_path / name, "--min-side", 256)
    ones, twos = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert ones == twos and "manifest.json" in ones
    assert "not empty" in refused("filter", folder, "--out", tmp_path / "one", "--min-side", 256, "--json")
    assert "no sample is left" in refused("filter", folder, "--out", tmp_path / "three", "--min-side", 9999, "--json")
    assert not (tmp_path / "three").exists() and not list(tmp_path.glob(".*.part"))


def test_filter_to_a_list_that_a_run_reads(folder: Path, tmp_path: Path, command: Command, refused: Any) -> None:
    path = tmp_path / "bad.jsonl"
    code, said = command("filter", folder, "--list", path, "--name", "set", "--min-side", 256)
    assert code == 0 and said["left_out"] == {"shorter side below 256": 2}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["source"], line["shard"], line["key"]) for line in lines] == [
        ("set", "00000.tar", "000000001"),
        ("set", "00002.tar", "000020000"),
    ]
    stream = Stream(config(folder, known_bad=str(path)), INPUTS, batch_size=2, rank=0, world=1, seed=0)
    captions = [caption for _ in range(3) for caption in stream.next().texts("text")]
    assert sorted(map(len, captions)) == [1, 5, 7, 9, 11, 15]
    assert "exists" in refused("filter", folder, "--list", path, "--name", "set")
    assert "--name" in refused("filter", folder, "--list", tmp_path / "b")
    assert "--out or --list" in refused("filter", folder)
    assert "--max-aspect" in refused("filter", folder, "--out", tmp_path / "b", "--max-aspect", 0.5)
    assert "--max-caption" in refused("filter", folder, "--out", tmp_path / "b", "--min-caption", 5, "--max-caption", 4)


def test_filter_on_the_screen(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "filter", str(folder), "--out", str(tmp_path / "out"), "--min-side", "480"]) == 0
    said = capsys.readouterr()
    row = next(line.split() for line in said.out.splitlines() if line.strip().startswith(">= 480"))
    assert row == [">=", "480", "5", "62.5%", "5", "100.0%"]
    assert "Sample ids" in said.out and "filtering" in said.err


def test_preview_shows_samples_of_all_shards(folder: Path, tmp_path: Path, command: Command) -> None:
    code, said = command("preview", folder, "--out", tmp_path / "sheet.png", "--columns", 3)
    assert code == 0 and said["of"] == 8 and said["unreadable"] == 0
    assert [len(sample["caption"]) for sample in said["samples"]] == [1, 3, 5, 7, 9, 11, 13, 15]
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (3 * (CELL + GAP) + GAP, 3 * (CELL + TEXT + GAP) + GAP)
    colours = np.asarray(sheet.crop((GAP, GAP, GAP + CELL, GAP + CELL)))
    assert colours.std() > 20  # noise, not paper
    first = (tmp_path / "sheet.png").read_bytes()
    command("preview", folder, "--out", tmp_path / "sheet.png", "--columns", 3)
    assert (tmp_path / "sheet.png").read_bytes() == first


def test_preview_names_what_it_can_not_show(tmp_path: Path, command: Command, refused: Any) -> None:
    data = picture(size=(30, 20), kind="JPEG")
    tar(tmp_path / "a.tar", [("a.jpg", data[:200]), ("b.jpg", data), ("c.txt", b"words")])
    code, said = command("preview", tmp_path / "a.tar", "--out", tmp_path / "sheet.png")
    assert code == 0 and said["unreadable"] == 2
    assert [bool(sample["error"]) for sample in said["samples"]] == [True, False, True]
    assert "--out" in refused("preview", tmp_path / "a.tar", "--out", tmp_path / "sheet.gif")


@pytest.mark.parametrize("count", [1, 7, 100])
def test_draws_are_even(count: int) -> None:
    sizes = [50, 0, 3, 947]
    drawn = draw_rows(sizes, count, seed=1)
    starts = np.cumsum([0, *sizes])
    rows = [int(starts[shard]) + row for shard, row in drawn]
    assert all(0 <= row < sizes[shard] for shard, row in drawn)
    for number, row in enumerate(rows):
        assert 1000 * number // count <= row < 1000 * (number + 1) // count
    assert drawn == draw_rows(sizes, count, seed=1) != draw_rows(sizes, count, seed=2)


def test_all_are_drawn_where_they_are_few() -> None:
    assert draw_rows([2, 1], 10, 0) == [(0, 0), (0, 1), (1, 0)] and draw_rows([], 10, 0) == []
