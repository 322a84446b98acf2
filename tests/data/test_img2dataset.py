"""img2dataset's files beside a shard: which keys failed, and whether the shard is finished."""

import json
import sys
from pathlib import Path

import pytest

from synthos.data.img2dataset import failed_keys, incomplete, is_complete
from tests.data.make import pairs, parquet, tar


def shard(folder: Path, number: int, status: dict[str, str], stats: bool = True) -> Path:
    """A shard as img2dataset lays it out: rows of all addresses, members of those that were fetched."""
    folder.mkdir(exist_ok=True)
    path = tar(folder / f"{number:05d}.tar", pairs([key for key in status if status[key] == "success"]))
    rows = [
        {"url": f"https://example.org/{key}", "caption": key, "key": key, "status": said, "error_message": None}
        for key, said in status.items()
    ]
    parquet(path.with_suffix(".parquet"), rows)
    if stats:
        (folder / f"{number:05d}_stats.json").write_text(json.dumps({"count": len(status), "end_time": 1.0}))
    return path


STATUS = {
    "000000000": "success",
    "000000001": "failed_to_download",
    "000000002": "success",
    "000000003": "failed_to_resize",
}


def test_keys_that_are_no_success_are_failures(tmp_path: Path) -> None:
    assert failed_keys(shard(tmp_path, 0, STATUS)) == {"000000001", "000000003"}
    assert failed_keys(shard(tmp_path, 1, {"000010000": "success"})) == set()


def test_a_shard_with_no_table_or_someone_elses_has_no_failures(tmp_path: Path) -> None:
    path = tar(tmp_path / "00000.tar", pairs(["a"]))
    assert failed_keys(path) == set()
    parquet(path.with_suffix(".parquet"), [{"key": "a", "note": "of another make"}])
    assert failed_keys(str(path)) == set()


@pytest.mark.parametrize("data", [b"", b"half a table", None])
def test_a_damaged_table_is_named(tmp_path: Path, data: bytes | None) -> None:
    path = shard(tmp_path, 0, STATUS)
    table = path.with_suffix(".parquet")
    table.write_bytes(table.read_bytes()[:-20] if data is None else data)
    with pytest.raises(ValueError, match=r"00000\.parquet is damaged: .*; move it away to use 00000\.tar without it"):
        failed_keys(path)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard(tmp_path, 0, STATUS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"pip install -e '\.\[parquet\]'"):
        failed_keys(path)
    assert failed_keys(tar(tmp_path / "00007.tar", pairs(["a"]))) == set()  # where there is no table, none is needed


def test_a_shard_without_stats_among_others_is_incomplete(tmp_path: Path) -> None:
    paths = [shard(tmp_path / "one", number, {f"{number:09d}": "success"}, stats=number != 1) for number in range(3)]
    plain = [tar(tmp_path / f"{number}.tar", pairs(["a"])) for number in range(2)]  # no img2dataset: no stats at all
    assert [is_complete(path) for path in paths] == [True, False, True]
    assert all(is_complete(str(path)) for path in plain)
    assert incomplete([*paths, *plain]) == [str(paths[1])]
