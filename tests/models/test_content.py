"""What a digest of files sees and what it does not."""

import shutil
from pathlib import Path

import pytest

from synthos.models import content
from synthos.models.content import digest


def test_a_file_is_its_content_and_a_folder_its_names_too(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.json").write_text("{}")
    copy = shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert digest(copy) == digest(tmp_path / "one") and len(digest(copy)) == 64
    renamed = (copy / "a.json").rename(copy / "b.json")
    assert digest(copy) != digest(tmp_path / "one")
    assert digest(renamed) == digest(tmp_path / "one" / "a.json")
    renamed.write_text("[]")
    assert digest(renamed) != digest(tmp_path / "one" / "a.json")


def test_hidden_files_are_no_part_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    first = digest(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "download.lock").write_text("x")
    assert digest(tmp_path) == first


def test_of_a_large_file_blocks_are_read_from_its_first_byte_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "WHOLE_BELOW", 100)
    monkeypatch.setattr(content, "BLOCKS", 3)
    monkeypatch.setattr(content, "BLOCK", 10)
    file, blank = tmp_path / "model.safetensors", bytes(211)

    def seen(size: int, at: int) -> bool:
        """Whether a byte changed at `at` changes the digest of a file of `size` bytes."""
        file.write_bytes(blank[:size])
        before = digest(file)
        file.write_bytes(blank[:at] + b"x" + blank[at + 1 : size])
        return digest(file) != before

    assert all(seen(99, at) for at in range(99))
    assert [at for at in range(211) if seen(211, at)] == [*range(10), *range(100, 110), *range(201, 211)]
    file.write_bytes(blank)
    longer = digest(file)
    file.write_bytes(blank[:210])
    assert digest(file) != longer
