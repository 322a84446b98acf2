"""`synthos data validate` finds every kind of damage, and nothing in what is whole."""

from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from synthos.data.index import load_index
from synthos.data.shards import index_path
from tests.data.commands.conftest import Command, overwrite
from tests.data.faults import serving
from tests.data.make import pairs, picture, tar


def faults(said: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    return [(Path(t["shard"]).name, t["key"], t["member"], t["reason"]) for t in said["troubles"]]


def test_whole_shards_have_no_faults(folder: Path, command: Command) -> None:
    code, said = command("validate", folder, "--require", "image,text,json", "--decode", "--workers", 2)
    assert code == 0 and said["samples"] == 11 and said["shards"] == 3 and said["unindexed"] == 0
    assert said["troubles"] == [] and said["bytes"] == sum(p.stat().st_size for p in folder.glob("*.tar"))


def test_a_flipped_byte_of_a_picture(folder: Path, command: Command) -> None:
    index = load_index(folder / "00001.idx.npz")
    member = index.member(2, index.extensions.index("png"))
    overwrite(folder / "00001.tar", member.offset + 40, b"\xff\xfe\xfd")
    code, said = command("validate", folder)
    assert code == 1
    assert ("00001.tar", index.key(2), "png", "checksum") in faults(said)
    assert {reason for *_, reason in faults(said)} == {"checksum", "index", "manifest"}  # of the tar as a whole, too
    code, said = command("validate", folder, "--decode")
    assert ("00001.tar", index.key(2), "png", "decode") in faults(said)


def test_a_flipped_byte_of_a_header(folder: Path, command: Command) -> None:
    index = load_index(folder / "00000.idx.npz")
    overwrite(folder / "00000.tar", index.member(1, 0).offset - 512 + 3, b"\xff")
    code, said = command("validate", folder)
    assert code == 1 and ("00000.tar", "", "", "tar") in faults(said)


@pytest.mark.parametrize("cut", [0.5, 1024])
def test_a_cut_shard(folder: Path, command: Command, cut: float) -> None:
    """Within a member, and exactly between two."""
    path = folder / "00002.tar"
    data = path.read_bytes()
    index = load_index(folder / "00002.idx.npz")
    between = int(index.members["offset"][1].min()) - 512
    path.write_bytes(data[: int(len(data) * cut) if cut < 1 else between])
    code, said = command("validate", folder)
    assert code == 1 and ("00002.tar", "", "", "tar") in faults(said)
    assert said["samples"] == 8  # of the others


def test_another_shard_of_the_same_size(folder: Path, command: Command) -> None:
    path = folder / "00000.tar"
    size = path.stat().st_size
    tar(path, pairs([*"abcdef"]))
    assert path.stat().st_size == size  # both are padded to one record
    code, said = command("validate", folder)
    found = faults(said)
    assert code == 1
    assert ("00000.tar", "a", "", "index") in found and ("00000.tar", "000000000", "", "index") in found
    assert ("00000.tar", "", "", "manifest") in found


def test_members_that_are_required(tmp_path: Path, command: Command) -> None:
    members = [("a.png", picture()), ("a.txt", b"a"), ("b.png", picture()), ("c.png", picture()), ("c.txt", b"  ")]
    tar(tmp_path / "a.tar", members)
    assert command("validate", tmp_path / "a.tar")[0] == 0
    code, said = command("validate", tmp_path / "a.tar", "--require", "image,text")
    assert code == 1 and said["unindexed"] == 1
    assert faults(said) == [("a.tar", "b", "", "missing"), ("a.tar", "c", "txt", "caption")]
    code, said = command("validate", tmp_path / "a.tar", "--require", "mask.png")
    assert [fault[1] for fault in faults(said)] == ["a", "b", "c"]
    assert not Path(index_path(str(tmp_path / "a.tar"))).exists()  # nothing is written


def test_a_cut_picture_is_found_by_decoding(tmp_path: Path, command: Command) -> None:
    data = picture(size=(300, 200), kind="JPEG")
    tar(tmp_path / "a.tar", [("a.jpg", data[: len(data) // 2]), ("b.jpg", data)])
    assert command("validate", tmp_path / "a.tar")[0] == 0
    code, said = command("validate", tmp_path / "a.tar", "--decode")
    assert code == 1 and faults(said) == [("a.tar", "a", "jpg", "decode")]


def test_triplets_hold_images(tmp_path: Path, command: Command) -> None:
    tar(
        tmp_path / "a.tar",
        [("a.target.jpg", picture(kind="JPEG")), ("a.object.png", picture()), ("a.mask.png", picture())],
    )
    assert command("validate", tmp_path / "a.tar", "--require", "image,target.jpg,mask.png", "--decode")[0] == 0


def test_over_http(folder: Path, command: Command) -> None:
    files = {f"/data/{path.name}": path.read_bytes() for path in folder.iterdir()}
    broken = bytearray(files["/data/00001.tar"])
    index = load_index(folder / "00001.idx.npz")
    broken[index.member(0, 0).offset + 5] ^= 255
    with serving(files) as server:
        assert command("validate", server.url("/data/"), "--workers", 1)[0] == 0
        server.files["/data/00001.tar"] = bytes(broken)
        code, said = command("validate", server.url("/data/"), "--workers", 1)
    assert code == 1 and ("00001.tar", index.key(0), index.extensions[0], "checksum") in faults(said)


def test_on_the_screen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe gets whole lines, however long the names are."""
    folder = folder.rename(folder.with_name("long" * 50))
    assert main(["data", "validate", str(folder), "--workers", "1"]) == 0
    assert "11 samples in 3 shards" in capsys.readouterr().out
    overwrite(folder / "00001.tar", 520, b"\xff\xff")
    assert main(["data", "validate", str(folder), "--workers", "1"]) == 1
    said = capsys.readouterr()
    assert "checksum" in said.out and str(folder / "00001.tar") in said.out and "validating" in said.err


def test_what_is_asked_wrongly(folder: Path, refused: Any) -> None:
    assert "--require: '.png'" in refused("validate", folder, "--require", ".png")
    assert "no such folder" in refused("validate", folder / "nothing")
