"""What was found of a large source is kept, and found anew where anything that it depends on has changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthos.data import source
from synthos.data.source import Source, open_split
from synthos.schema import BucketConfig
from tests.data.make import INPUTS, config, data_set, parquet

SAMPLES = 12


@pytest.fixture(autouse=True)
def every_source_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "TABLE_SAMPLES", 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return data_set(tmp_path / "set", SAMPLES, shard_size=4)


def tables(cache: Path) -> set[str]:
    return {path.name for path in cache.rglob("*") if path.is_file()}


def same(one: Source, other: Source) -> bool:
    a, b = one.selection, other.selection
    assert a.buckets is not None and b.buckets is not None
    arrays = ((a.left_out, b.left_out), (a.held_out, b.held_out), (a.buckets, b.buckets))
    return all(np.array_equal(x, y) for x, y in arrays) and (a.num_rows, a.faults) == (b.num_rows, b.faults)


def test_what_is_kept_is_what_was_found_and_no_index_is_read_for_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = tmp_path / "known.jsonl"
    known.write_text(json.dumps({"source": "set", "shard": "00000.tar", "key": "000000001"}))
    asked = config(folder, cache=str(tmp_path / "cache"), known_bad=str(known), holdout_fraction=0.3,
                   buckets=BucketConfig(sizes=[(8, 8), (8, 16)]))  # fmt: skip
    (found,), (held,) = open_split(asked, INPUTS)
    monkeypatch.setattr(source, "open_index", None)  # calling it would fail
    (again,), (held_again,) = open_split(asked, INPUTS)
    assert same(found, again) and same(held, held_again) and len(held) > 0
    assert len(found) + len(held) == SAMPLES - 1 and len(tables(tmp_path / "cache")) == 1


CHANGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "name": lambda _: {"name": "other"},
    "holdout": lambda _: {"holdout_fraction": 0.5},
    "known bad": lambda folder: {"known_bad": str(folder / "known.jsonl")},
    "buckets": lambda _: {"buckets": BucketConfig(sizes=[(8, 8)])},
    "limits": lambda _: {"max_bad_per_shard": 3},
    "img2dataset": lambda folder: table(folder, 1),
}


def table(folder: Path, failed: int) -> dict[str, Any]:
    """img2dataset's of the first shard, one of whose rows failed."""
    keys = [f"{row:09d}" for row in range(4)]
    rows = [{"key": key, "status": "failed_to_resize" if row == failed else "success"} for row, key in enumerate(keys)]
    parquet(folder / "00000.parquet", rows)
    return {}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_is_found_anew_where_what_it_depends_on_has_changed(
    folder: Path, tmp_path: Path, change: Callable[[Path], dict[str, Any]]
) -> None:
    (folder / "known.jsonl").write_text(json.dumps({"source": "set", "shard": "00001.tar", "key": "000010000"}))
    usual = {"cache": str(tmp_path / "cache")}
    open_split(config(folder, **usual), INPUTS)
    before = tables(tmp_path / "cache")
    assert len(before) == 1
    open_split(config(folder, **usual, **change(folder)), INPUTS)
    assert tables(tmp_path / "cache") > before


def test_a_changed_table_of_failures_leaves_out_other_samples(folder: Path, tmp_path: Path) -> None:
    left_out = []
    for failed in (1, 3):
        table(folder, failed)
        (one,), _ = open_split(config(folder, cache=str(tmp_path / "cache")), INPUTS)
        left_out.append(one.selection.left_out.tolist())
    assert left_out == [[1], [3]]


def test_a_run_goes_on_where_nothing_can_be_kept(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    (one,), _ = open_split(config(folder, cache=str(tmp_path / "file")), INPUTS)
    assert len(one) == SAMPLES
    assert "data.cache: " in caplog.text and "is not kept: " in caplog.text and "Not a directory" in caplog.text


def test_a_disk_that_fills_up_keeps_no_part(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    (one,), _ = open_split(config(folder, cache=str(tmp_path / "cache")), INPUTS)
    assert len(one) == SAMPLES and "No space left on device" in caplog.text
    assert tables(tmp_path / "cache") == set()
