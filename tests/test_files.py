"""Files by which processes tell each other things."""

import multiprocessing
from pathlib import Path

from synthos.files import create_json, read_json, write_json


def test_what_is_written_is_read_and_what_is_absent_is_empty(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    assert read_json(file) == {} and read_json(tmp_path / "nowhere" / "a.json") == {}
    write_json(file, {"step": 1})
    write_json(file, {"step": 2})
    assert read_json(file) == {"step": 2} and [path.name for path in tmp_path.iterdir()] == ["a.json"]


def _claim(file: Path, name: int) -> bool:
    return create_json(file, {"name": name})


def test_of_many_processes_one_creates_the_file(tmp_path: Path) -> None:
    file = tmp_path / "failure.json"
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        won = pool.starmap(_claim, [(file, name) for name in range(40)])
    assert won.count(True) == 1 and read_json(file) == {"name": won.index(True)}
    assert [path.name for path in tmp_path.iterdir()] == ["failure.json"]
