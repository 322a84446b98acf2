"""Tables: the same rows from CSV, JSON lines and Parquet, one at a time; what is wrong in them is said first."""

import csv
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet
import pytest

from synthos.data import parquet as reader
from synthos.data.table import open_table
from tests.data.make import parquet

ROWS = [{"path": f"ordner/ü {i}.jpg", "caption": f"Zeile {i}, „schön“\nzweite", "source": "coco"} for i in range(10)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        return parquet(path, rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_every_kind_holds_the_same_rows_and_can_be_read_again(tmp_path: Path, name: str) -> None:
    table = open_table(str(write(tmp_path / name, ROWS)))
    assert (table.columns, table.size) == (["path", "caption", "source"], 10)
    assert list(table.records()) == list(table.records()) == ROWS


def test_columns_of_json_lines_are_those_of_all_rows(tmp_path: Path) -> None:
    table = open_table(str(write(tmp_path / "t.jsonl", [{"a": 1}, {"b": None}, {"a": 2, "c": [3]}])))
    assert (table.columns, table.size) == (["a", "b", "c"], 3)


def test_a_folder_of_parquet_is_read_with_all_below_it_in_the_order_of_paths(tmp_path: Path) -> None:
    for name, part in {"b/0.parquet": ROWS[2:5], "a.parquet": ROWS[:2], "b/c/1.parquet": ROWS[5:]}.items():
        parquet(tmp_path / "set" / name, part)
    (tmp_path / "set" / "readme.txt").write_text("no table")
    table = open_table(str(tmp_path / "set"))
    assert table.size == 10 and list(table.records()) == ROWS
    assert [r["path"] for r in open_table(f"{tmp_path}/set/*.parquet").records()] == [
        "ordner/ü 0.jpg",
        "ordner/ü 1.jpg",
    ]
    assert list(open_table(f"file://{tmp_path}/set").records()) == ROWS  # an address, as one of the hub


def test_any_file_system_of_fsspec_is_read_the_same_way(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    name = f"/{tmp_path.name}/data/train-0.parquet"
    try:
        memory.pipe(name, write(tmp_path / "t.parquet", ROWS).read_bytes())
        assert reader.parquet_columns(memory, [name]) == (["path", "caption", "source"], 10)
        assert list(reader.parquet_records(memory, [name])) == ROWS
    finally:
        memory.rm(f"/{tmp_path.name}", recursive=True)


def test_rows_are_read_by_row_group_as_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "t.parquet", [{"n": n} for n in range(10_000)], group=500)
    groups: list[int] = []
    iter_batches = pyarrow.parquet.ParquetFile.iter_batches

    def watched(self: Any, size: int, row_groups: list[int], **options: Any) -> Any:
        groups.extend(row_groups)
        for batch in iter_batches(self, size, row_groups=row_groups, **options):
            assert len(batch) <= reader.BATCH
            yield batch

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", watched)
    table = open_table(str(path))
    assert table.size == 10_000 and groups == []  # known from the footer
    records = table.records()
    assert [r["n"] for r in itertools.islice(records, 500)] == list(range(500)) and groups == [0]
    assert next(records) == {"n": 500} and groups == [0, 1]
    assert sum(1 for _ in records) == 9_499 and groups == list(range(20))  # each once


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_text_tables_are_read_line_by_line(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [{"n": str(n), "text": "x" * 1000} for n in range(2000)])
    records = open_table(str(path)).records()
    assert next(records)["n"] == "0"
    with path.open("ab") as file:
        file.write(path.read_bytes().splitlines(keepends=True)[-1])
    assert sum(1 for _ in records) == 2000  # what was read ahead would not hold the line that is new


def test_a_parquet_file_that_is_none_or_is_cut_is_named(tmp_path: Path) -> None:
    good = parquet(tmp_path / "a.parquet", ROWS)
    for data in (b"no parquet", b"", good.read_bytes()[:-20]):
        (tmp_path / "b.parquet").write_bytes(data)
        with pytest.raises(ValueError, match=r"--table: .*/b\.parquet can't be read: "):
            open_table(str(tmp_path))


def test_a_parquet_file_with_a_damaged_page_is_named_when_it_is_met(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", ROWS)
    data = bytearray(path.read_bytes())
    data[20:60] = bytes(40)
    path.write_bytes(data)
    table = open_table(str(path))  # its footer is whole
    with pytest.raises(ValueError, match=r"--table: .*t\.parquet can't be read: "):
        list(table.records())


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "t.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"pyarrow, which is not installed: pip install -e '\.\[parquet\]'"):
        open_table(str(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pipe://ls", r"'pipe://ls' is not read; allowed: paths and hf://, s3://, gs://, file://"),
        ("simplecache::hf://datasets/a/b", "is not read; allowed"),
        ("file:///x::hf://datasets/a/b", "is not read; allowed"),
        ("https://example.org/t.parquet", "is not read; allowed"),
        ("hf://datasets/a", "names no data set; allowed: hf://datasets/OWNER/NAME"),
        ("/nowhere/t.parquet", r"there is no \.parquet at /nowhere/t\.parquet"),
        ("/nowhere", r"is of no known kind; allowed: \.csv, \.jsonl, \.parquet, a folder of \.parquet, hf://datasets"),
    ],
)
def test_what_is_no_table(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"--table: .*{message}"):
        open_table(name)


def test_a_hub_that_cannot_be_reached_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="--table: hf://datasets/owner/name can't be read: .*offline mode"):
        open_table("hf://datasets/owner/name")


def test_a_table_without_rows(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array([], pyarrow.string())}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="has no rows"):
        open_table(str(tmp_path / "t.parquet"))
