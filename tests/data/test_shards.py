"""Every way to name shards, and what is said of one that is not there."""

import json
from pathlib import Path

import pytest

from synthos.data.manifest import fingerprint, read_manifest
from synthos.data.shards import MissingShards, ShardPlace, list_shards
from tests.data.make import data_set, pairs, tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        tar(tmp_path / f"{number:05d}.tar", pairs([str(number)]))
    return tmp_path


def names(places: list[ShardPlace]) -> list[str]:
    return [place.name for place in places]


ALL = ["00000.tar", "00001.tar", "00002.tar"]


@pytest.mark.parametrize("spec", ["", "{00000..00002}.tar", "*.tar", "0000[0-2].tar", "{00000,0000[12]}.tar"])
def test_folder_braces_and_globs(folder: Path, spec: str) -> None:
    assert [place.url for place in list_shards(f"{folder}/{spec}")] == [str(folder / name) for name in ALL]


def test_lists_keep_their_order(folder: Path) -> None:
    chosen = ["00002.tar", "00000.tar"]
    (folder / "some.txt").write_text("00002.tar\n\n  00000.tar \n")
    (folder / "some.json").write_text(json.dumps([str(folder / name) for name in chosen]))
    assert names(list_shards(str(folder / "some.txt"))) == chosen
    assert names(list_shards(str(folder / "some.json"))) == chosen
    assert names(list_shards([str(folder / "00001.tar"), str(folder / "some.txt")])) == ["00001.tar", *chosen]


def test_all_missing_shards_are_named_at_once(folder: Path) -> None:
    with pytest.raises(MissingShards) as caught:
        list_shards(f"{folder}/{{00001..00007}}.tar", "data.validation")
    assert len(caught.value.lines) == 5
    assert str(caught.value).splitlines()[0] == f"data.validation: no such shard: {folder}/00003.tar"
    assert "2 more" in str(caught.value)


@pytest.mark.parametrize("spec", [None, [], "absent", "absent/*.tar", "absent.txt", "absent.tar"])
def test_nothing_there(tmp_path: Path, spec: str | list[str] | None) -> None:
    with pytest.raises(MissingShards, match=r"data\.shards"):
        list_shards(str(tmp_path / spec) if isinstance(spec, str) else spec)


@pytest.mark.parametrize("spec", ["pipe:cat x.tar", "a.tar::b.tar", "ftp://host/0.tar", "simplecache::s3://b/0.tar"])
def test_commands_and_chained_addresses_are_refused(tmp_path: Path, spec: str) -> None:
    (tmp_path / "list.json").write_text(json.dumps([spec]))
    for given in (spec, str(tmp_path / "list.json")):
        with pytest.raises(ValueError, match=r"data\.shards: .*allowed are"):
            list_shards(given)


@pytest.mark.parametrize("text", ["{}", "[1]", "[", "[]"])
def test_a_list_must_hold_paths(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(ValueError, match=r"data\.shards: .*list"):
        list_shards(str(tmp_path / "list.json"))


def test_other_files_are_no_shards(tmp_path: Path) -> None:
    (tmp_path / "0.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no \.tar.*compressed tars are not read"):
        list_shards(str(tmp_path / "0.tar.gz"))


def test_equal_names_would_make_equal_ids(folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    tar(other / "00001.tar", pairs(["x"]))
    with pytest.raises(ValueError, match="share a file name"):
        list_shards([str(folder), str(other)])


def test_the_manifest_of_a_folder_tells_lost_and_stray_shards(tmp_path: Path) -> None:
    folder = data_set(tmp_path / "set", samples=6, shard_size=2)
    manifest = read_manifest(folder)
    assert manifest is not None and list(manifest) == ALL and len(fingerprint(manifest.values())) == 32
    (folder / "00001.tar").rename(folder / "00009.tar")
    with pytest.raises(ValueError, match=r"00009\.tar is not in manifest\.json"):
        list_shards(str(folder))
    (folder / "00009.tar").unlink()
    with pytest.raises(MissingShards, match=r"no such shard: .*00001\.tar"):
        list_shards(str(folder))


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": 1}', "edited"])
def test_a_damaged_manifest_is_an_error(tmp_path: Path, damage: str) -> None:
    path = data_set(tmp_path / "set", samples=2, shard_size=2) / "manifest.json"
    path.write_text(path.read_text().replace('"samples": 2', '"samples": 3') if damage == "edited" else damage)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        read_manifest(path.parent)
