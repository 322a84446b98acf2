"""`synthos data reshard`: the same members, byte for byte."""

import tarfile
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from synthos.data import rewrite
from tests.data.commands.conftest import Command, overwrite
from tests.data.faults import serving
from tests.data.make import pairs, tar


def members(paths: list[Path]) -> list[tuple[str, bytes]]:
    found = []
    for path in paths:
        with tarfile.open(path) as file:
            for member in file.getmembers():
                reader = file.extractfile(member)
                assert reader is not None
                found.append((member.name, reader.read()))
    return found


@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize(("size", "shards"), [(1, 11), (3, 4), (11, 1), (100, 1)])
def test_members_and_their_order_stay(
    folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, size: int, shards: int, block: int
) -> None:
    monkeypatch.setattr(rewrite, "BLOCK_BYTES", block)
    code, said = command("reshard", folder, "--out", tmp_path / "out", "--shard-size", size)
    assert (code, said["samples"], said["shards"], said["renamed"]) == (0, 11, shards, 0)
    assert members(sorted((tmp_path / "out").glob("*.tar"))) == members(sorted(folder.glob("*.tar")))
    assert command("validate", tmp_path / "out", "--decode", "--workers", 1)[0] == 0


def test_there_and_back_gives_the_same_bytes(folder: Path, tmp_path: Path, command: Command) -> None:
    command("reshard", folder, "--out", tmp_path / "large", "--shard-size", 100)
    command("reshard", tmp_path / "large", "--out", tmp_path / "back", "--shard-size", 4)
    for path in folder.iterdir():
        if path.suffix in (".tar", ".json"):
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_equal_keys_of_two_shards(tmp_path: Path, command: Command) -> None:
    tar(tmp_path / "part.a.tar", pairs(["0", "1"]))
    tar(tmp_path / "part.b.tar", [*pairs(["1", "part_c-1", "2"]), ("2.Mask.PNG", b"m"), ("x._meta", b"kept")])
    tar(tmp_path / "part.c.tar", pairs(["1"]))
    code, said = command("reshard", tmp_path / "part.*.tar", "--out", tmp_path / "out")
    assert code == 0 and said["renamed"] == 2
    names = {name for name, _ in members([tmp_path / "out" / "00000.tar"])}
    assert {"1.png", "part_b-1.png", "part_c-1.png", "part_c-1-1.png", "2.mask.png", "x._meta"} <= names
    code, said = command("reshard", tmp_path / "part.*.tar", "--out", tmp_path / "apart", "--shard-size", 2)
    assert said["renamed"] == 0  # equal keys are fine in shards of their own


def test_over_http(folder: Path, tmp_path: Path, command: Command) -> None:
    files = {f"/data/{path.name}": path.read_bytes() for path in folder.iterdir()}
    with serving(files) as server:
        assert command("reshard", server.url("/data/"), "--out", tmp_path / "out", "--shard-size", 6)[0] == 0
    assert members(sorted((tmp_path / "out").glob("*.tar"))) == members(sorted(folder.glob("*.tar")))


def test_a_changed_member_is_not_copied(folder: Path, tmp_path: Path, refused: Any) -> None:
    overwrite(folder / "00001.tar", 520, b"\xff\xff")
    assert "has changed since it was indexed" in refused("reshard", folder, "--out", tmp_path / "out", "--json")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*.part"))
    assert "shard size" in refused("reshard", folder, "--out", tmp_path / "out", "--shard-size", 10_001)


def test_on_the_screen(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "reshard", str(folder), "--out", str(tmp_path / "out"), "--shard-size", "6"]) == 0
    said = capsys.readouterr()
    assert "3 shards became" in said.out and "runs start anew" in said.out and "resharding" in said.err
