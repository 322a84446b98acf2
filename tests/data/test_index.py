"""What an index holds, and the damage that must never pass in silence."""

import gzip
import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from synthos.data.index import build_index, load_index, open_index
from synthos.data.shards import ShardPlace, index_path
from synthos.data.tar import split_name
from tests.data.make import pairs, picture, tar


def test_members_lie_where_the_index_says(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "0.tar", pairs(["a", "b"]) + [("c.jpg", picture(size=(30, 20), kind="JPEG")), ("c.json", b"{}")]
    )
    index, whole = build_index(path), path.read_bytes()
    assert [index.key(row) for row in range(len(index))] == ["a", "b", "c"]
    assert index.extensions == ["jpg", "json", "png", "txt"]
    assert (index.bytes, index.checksum) == (len(whole), zlib.crc32(whole))
    with tarfile.open(path) as file:
        for row, key in enumerate("abc"):
            for column, extension in enumerate(index.extensions):
                entry = index.members[row, column]
                if f"{key}.{extension}" not in file.getnames():
                    assert entry["size"] == -1
                    continue
                reader = file.extractfile(f"{key}.{extension}")
                assert reader is not None
                data, member = reader.read(), index.member(row, column)
                assert whole[member.offset : member.offset + member.size] == data
                assert member.checksum == zlib.crc32(data)
    assert index.members["width"].tolist() == [[0, 0, 16, 0], [0, 0, 16, 0], [30, 0, 0, 0]]
    assert index.members["height"].max() == 20
    assert index.members["chars"][0, 3] == len("caption a")


def test_it_is_written_once_and_read_back(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", pairs(["a", "b"]))
    built = open_index(ShardPlace.beside(str(path)))
    written = Path(index_path(str(path))).read_bytes()
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["0.idx.npz", "0.tar"]
    read = open_index(ShardPlace.beside(str(path)))
    assert Path(index_path(str(path))).read_bytes() == written
    np.testing.assert_array_equal(read.members, built.members)
    assert read.line("0.tar") == built.line("0.tar") and read.extensions == built.extensions
    assert [read.key(0), read.key(1)] == ["a", "b"]


def test_a_shard_that_contradicts_its_index_is_an_error(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", pairs(["a", "b"]))
    open_index(ShardPlace.beside(str(path)))
    with path.open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(ValueError, match=r"0\.tar has \d+ bytes, its index says \d+"):
        open_index(ShardPlace.beside(str(path)))


@pytest.mark.parametrize("kept", [0, 10, 200, -1])
def test_a_damaged_index_is_an_error(tmp_path: Path, kept: int) -> None:
    path = tar(tmp_path / "0.tar", pairs(["a", "b"]))
    open_index(ShardPlace.beside(str(path)))
    Path(index_path(str(path))).write_bytes(Path(index_path(str(path))).read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"0\.idx\.npz is damaged"):
        load_index(Path(index_path(str(path))))


def test_an_index_with_objects_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "0.idx.npz", tar=np.array([1, 2, 3]), extensions=np.array([object()]), allow_pickle=True)
    with pytest.raises(ValueError, match="damaged"):
        load_index(tmp_path / "0.idx.npz")


def test_tar_cut_between_members(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", pairs(["a", "b", "c"]))
    with tarfile.open(path) as file:
        boundary = file.getmember("b.png").offset
    path.write_bytes(path.read_bytes()[:boundary])
    with pytest.raises(ValueError, match=rf"0\.tar is cut: it ends at byte {boundary} without an end mark"):
        build_index(path)


@pytest.mark.parametrize("zeros", [0, 3 << 20])
def test_tars_joined_in_one_file(tmp_path: Path, zeros: int) -> None:
    one, two = tar(tmp_path / "1.tar", pairs(["a"])), tar(tmp_path / "2.tar", pairs(["b"]))
    joined = tmp_path / "0.tar"
    joined.write_bytes(one.read_bytes() + bytes(zeros))
    assert len(build_index(joined)) == 1  # padding is no fault
    joined.write_bytes(joined.read_bytes() + two.read_bytes())
    with pytest.raises(ValueError, match=r"0\.tar goes on after its end mark at byte \d+.*one tar per file"):
        build_index(joined)


def test_tar_cut_inside_a_member(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", [("a.png", noise := bytes(range(256)) * 20), ("a.txt", b"caption")])
    path.write_bytes(path.read_bytes()[: 512 + len(noise) // 2])
    with pytest.raises(ValueError, match=r"0\.tar is cut"):
        build_index(path)


def test_one_flipped_byte_of_a_header(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", pairs(["a", "b", "c"]))
    with tarfile.open(path) as file:
        header = file.getmember("b.txt").offset
    data = bytearray(path.read_bytes())
    data[header + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"0\.tar is damaged: no readable header at byte {header}"):
        build_index(path)


def test_empty_file_and_empty_tar(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="cut or damaged: empty file"):
        build_index(tmp_path / "0.tar")
    assert len(build_index(tar(tmp_path / "1.tar", []))) == 0


def test_compressed_tar(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", pairs(["a"]))
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"0\.tar is compressed \(gzip\)"):
        build_index(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as file:
        info = tarfile.TarInfo("a.txt")
        info.type, info.linkname = kind, "/etc/hostname"
        file.addfile(info)
    with pytest.raises(ValueError, match=r"'a\.txt' is a link or a device"):
        build_index(tmp_path / "0.tar")


@pytest.mark.parametrize("name", ["/a.txt", "../a.txt", "x/../../a.txt", "a\nb.txt"])
def test_unsafe_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="unsafe member name"):
        build_index(tar(tmp_path / "0.tar", [(name, b"text")]))


def test_duplicate_members_and_split_samples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"duplicate member 'a\.txt'"):
        build_index(tar(tmp_path / "0.tar", [("a.txt", b"1"), ("a.png", b""), ("a.txt", b"2")]))
    with pytest.raises(ValueError, match="the key 'a' comes back"):
        build_index(tar(tmp_path / "0.tar", [("a.txt", b"1"), ("b.txt", b""), ("a.png", b"2")]))


def test_too_many_members(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sample 'a' has more than 16 members"):
        build_index(tar(tmp_path / "0.tar", [(f"a.{i}", b"") for i in range(17)]))


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_folders(tmp_path: Path, kind: int) -> None:
    key = "folder/" + "k" * 300
    with tarfile.open(tmp_path / "0.tar", "w", format=kind) as file:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
        for name, data in ((f"{key}.png", picture()), (f"./{key}.TXT", b"caption"), ("folder/.hidden", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    index = build_index(tmp_path / "0.tar")
    assert index.key(0) == key and index.extensions == ["png", "txt"] and len(index) == 1


@pytest.mark.parametrize(
    "name, expected",
    [
        ("a.txt", ("a", "txt")),
        ("dir.x/a.seg.PNG", ("dir.x/a", "seg.png")),
        ("./d/a.jpg", ("d/a", "jpg")),
        ("track 2.0.jpg", ("track 2", "0.jpg")),
        ("README", None),
        (".hidden", None),
        ("d/._a.jpg", None),
    ],
)
def test_names_are_split_at_the_first_dot(name: str, expected: tuple[str, str] | None) -> None:
    assert split_name(name) == expected
