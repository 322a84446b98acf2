"""Reading exported weights back: what belongs to an export, and what is said of one that is not whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from synthos.models.exported import About, find_export
from synthos.schema import ModelConfig, PartConfig
from synthos.strict import dump

ABOUT = About(
    format=1,
    run="first-12345678",
    recipe={"name": "i2i", "train": "projector"},
    model=ModelConfig("mine", {"vae": PartConfig("lab/vae")}),
    cache_dir="/cache",
    part="transformer",
    complete=False,
    weights="raw",
    step=3,
    images_seen=12,
    height=32,
    width=48,
    content={"vae": "0123"},
)


def exported(folder: Path, **changes: Any) -> Path:
    """The files of an export, those of its tensors empty."""
    (folder / "transformer").mkdir(parents=True)
    about = dump(ABOUT) | changes
    (folder / "synthos.json").write_text(json.dumps(about))
    names = ["config.json", "diffusion_pytorch_model.safetensors"] if about["complete"] else ["trained.safetensors"]
    for name in ("null.safetensors", *(f"transformer/{name}" for name in names)):
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("complete", "name"), [(True, "diffusion_pytorch_model.safetensors"), (False, "trained.safetensors")]
)
def test_its_folder_its_part_and_its_file_are_the_same_export(
    tmp_path: Path, complete: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(tmp_path / "e", complete=complete)
    file = folder / "transformer" / name
    (tmp_path / "link").symlink_to(file)
    monkeypatch.chdir(folder / "transformer")
    for path in (folder, folder / "transformer", file, Path(name), Path(), Path(".."), tmp_path / "link"):
        export = find_export(path, "x")
        assert export and export.file.samefile(file) and export.folder.samefile(folder), path
        assert export.about.complete is complete and not export.alone
    export = find_export(folder, "x")
    assert export and export.about.model == ABOUT.model and export.about.content == {"vae": "0123"}


def test_a_file_taken_out_is_one_beside_copies_of_the_others(tmp_path: Path) -> None:
    folder = exported(tmp_path / "e", complete=True)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").rename(folder / "mine.safetensors")
    export = find_export(folder / "mine.safetensors", "x")
    assert export and export.alone and export.file == folder / "mine.safetensors" and export.folder == folder
    (folder / "null.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^x: .*/e lacks null\.safetensors$"):
        find_export(folder / "mine.safetensors", "x")


def test_other_files_belong_to_no_export(tmp_path: Path) -> None:
    folder = exported(tmp_path / "e")
    (folder / "vae").mkdir()
    (folder / "grid.png").touch()
    (folder / "transformer" / "other.safetensors").touch()
    for path in (tmp_path, folder / "vae", folder / "grid.png", folder / "transformer" / "other.safetensors"):
        assert find_export(path, "x") is None


def test_exports_made_before_the_content_of_parts_was_kept_are_read(tmp_path: Path) -> None:
    folder = exported(tmp_path / "e")
    about = json.loads((folder / "synthos.json").read_text())
    del about["content"]
    (folder / "synthos.json").write_text(json.dumps(about))
    export = find_export(folder, "x")
    assert export and export.about.content == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "has format None, this version reads 1"),
        ("{", "is no JSON: "),
        ('{"format": 99}', "has format 99, this version reads 1"),
        ('{"format": 1}', "synthos.json: run: missing; expected text; recipe: missing; expected mapping"),
        (json.dumps(dump(ABOUT) | {"recipe": {}}), "synthos.json: recipe.name: missing; expected text"),
        (json.dumps(dump(ABOUT) | {"weights": "mine"}), "weights: 'mine' is not allowed; expected one of ema, raw"),
        (json.dumps(dump(ABOUT) | {"part": "vae"}), "lacks vae/trained.safetensors"),
        (json.dumps(dump(ABOUT) | {"complete": True}), "lacks transformer/diffusion_pytorch_model.safetensors, "),
    ],
)
def test_what_is_damaged_is_one_message(tmp_path: Path, text: str, words: str) -> None:
    folder = exported(tmp_path / "e")
    (folder / "synthos.json").write_text(text)
    with pytest.raises(ValueError) as raised:
        find_export(folder, "init_from")
    message = str(raised.value)
    assert message.startswith(f"init_from: {folder}") and words in message and "\n" not in message
