"""Requests for pictures, as a list and as a JSONL file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launch.compose import compose
from launch.requests import load_requests
from synthos.recipes.base import file_fields, recipe_class


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (20, 10)).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def load(*overrides: str) -> list[dict[str, Any]]:
    return load_requests(compose(["recipe=i2i", "model=tiny", *overrides]).config, recipe_class("i2i"))


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return f"validate.requests={path}"


def faults(*overrides: str) -> list[str]:
    with pytest.raises(ValueError) as error:
        load(*overrides)
    return str(error.value).splitlines()


def test_none_are_asked_for_by_default() -> None:
    assert load() == []


def test_a_list_takes_its_pictures_from_the_current_folder(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photo.parent)
    one, two = load("validate.requests=[{name: a, prompt: red, reference: photo.jpg}, {name: b, height: 32}]")
    assert (one["name"], one["prompt"], one["reference"], one["height"]) == ("a", "red", str(photo), None)
    assert (two["name"], two["height"], two["reference"]) == ("b", 32, None)


def test_a_file_takes_its_pictures_from_its_own_folder(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"name": "a", "reference": "photo.jpg"}, "\n", {"name": "b", "reference": str(photo)}]
    override = write(photo.parent / "ask.jsonl", *rows)
    monkeypatch.chdir("/")
    assert [request["reference"] for request in load(override)] == [str(photo), str(photo)]
    assert file_fields(load(override)[0]) == {"reference": str(photo)}


def test_every_wrong_request_is_named_in_one_message(photo: Path) -> None:
    override = write(
        photo.parent / "ask.jsonl",
        {"name": "a", "promt": "x"},
        {"prompt": "x"},
        {"name": "no/slash"},
        {"name": "b", "height": 40},
        {"name": "c", "reference": "absent.jpg"},
        {"name": "d", "reference": "ask.jsonl"},
        {"name": "e", "sampler": "euler2"},
        {"name": "f", "steps": 0},
        {"name": "b"},
    )
    found = faults(override)
    expected = [
        "ask.jsonl:1.promt: unknown key; did you mean 'prompt'? allowed: guidance_image,",
        "ask.jsonl:2.name: missing; expected text",
        "ask.jsonl:3.name: 'no/slash' is not allowed; expected letters,",
        "ask.jsonl:4.height: 40 is not a multiple of 16; nearest: 32 or 48",
        f"ask.jsonl:5.reference: {photo.parent / 'absent.jpg'} can't be read as a picture: ",
        f"ask.jsonl:6.reference: {photo.parent / 'ask.jsonl'} can't be read as a picture: ",
        "ask.jsonl:7.sampler: 'euler2' is not allowed; expected one of euler, unipc",
        "ask.jsonl:8.steps: 0 is not allowed; expected 1 or more",
        "validate.requests: the name 'b' is used more than once",
    ]
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["gif", "tiff"])
def test_pictures_that_the_recipe_does_not_read(photo: Path, kind: str) -> None:
    picture = photo.with_suffix(f".{kind}")
    Image.new("RGB", (20, 10)).save(picture)
    (line,) = faults(f"validate.requests=[{{name: a, reference: {picture}}}]")
    assert line.startswith(f"validate.requests[0].reference: {picture} can't be read as a picture: not a readable JPEG")


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_half_a_picture(tmp_path: Path, kind: str) -> None:
    picture = tmp_path / f"half.{kind}"
    Image.effect_noise((64, 64), 50).save(picture)
    picture.write_bytes(picture.read_bytes()[: picture.stat().st_size // 2])
    (line,) = faults(f"validate.requests=[{{name: a, reference: {picture}}}]")
    assert line.startswith(f"validate.requests[0].reference: {picture} can't be read as a picture: ")


def test_a_png_with_broken_pixels(tmp_path: Path) -> None:
    picture = tmp_path / "broken.png"
    Image.effect_noise((64, 64), 50).save(picture)
    data = bytearray(picture.read_bytes())
    data[data.index(b"IDAT") + 500] ^= 255
    picture.write_bytes(data)
    (line,) = faults(f"validate.requests=[{{name: a, reference: {picture}}}]")
    assert line.startswith(f"validate.requests[0].reference: {picture} can't be read as a picture: ")


def test_names_of_the_held_out_samples_are_reserved_while_some_are_asked() -> None:
    rows = "validate.requests=[{name: split_000_text}, {name: splits}]"
    (line,) = faults(rows, "validate.from_split=1")
    assert line.startswith("validate.requests[0].name: 'split_000_text' is not allowed with validate.from_split=1,")
    assert [row["name"] for row in load(rows, "validate.from_split=0")] == ["split_000_text", "splits"]


@dataclasses.dataclass(frozen=True)
class BareRequest:
    """Of a recipe whose samplers are no choice, and which looks at two pictures."""

    name: str
    reference: str | None = None
    reference_depth: str | None = None
    reference_scale: float = 1.0
    embedding: str | None = None


class BareRecipe:
    Request, size_multiple = BareRequest, 1


def test_a_request_needs_no_field_but_its_name(photo: Path) -> None:
    row = f"{{name: a, reference: {photo}, reference_depth: {photo}}}"
    config = compose(["recipe=i2i", "model=tiny", f"validate.requests=[{row}]"]).config
    (request,) = load_requests(config, BareRecipe)
    assert request["reference_scale"] == 1.0
    assert file_fields(request) == {"reference": str(photo), "reference_depth": str(photo)}


def test_an_embedding_is_an_array_of_floats(tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "tokens.npy", np.ones((4, 8), np.float32))
    monkeypatch.chdir(tmp_path)
    config = compose(["recipe=i2i", "model=tiny", "validate.requests=[{name: a, embedding: tokens.npy}]"]).config
    assert file_fields(load_requests(config, BareRecipe)[0]) == {"embedding": str(tmp_path / "tokens.npy")}
    config = compose(["recipe=i2i", "model=tiny", "validate.requests=[{name: a, embedding: photo.jpg}]"]).config
    with pytest.raises(ValueError, match="embedding: .*photo.jpg can't be read as an embedding: is no .npy or"):
        load_requests(config, BareRecipe)


def test_a_prompt_of_question_marks_is_a_prompt(tmp_path: Path) -> None:
    rows = "{name: a, prompt: '???'}"
    assert load(f"validate.requests=[{rows}]")[0]["prompt"] == "???"
    assert load(write(tmp_path / "ask.jsonl", {"name": "a", "prompt": "???"}))[0]["prompt"] == "???"


def test_files_that_are_none(tmp_path: Path) -> None:
    assert faults(f"validate.requests={tmp_path / 'absent.jsonl'}")[0].endswith("expected a list, or a JSONL file")
    override = write(tmp_path / "ask.jsonl", {"name": "a"}, "{name: b}\n")
    assert faults(override)[0].startswith(f"validate.requests: {tmp_path / 'ask.jsonl'}, line 2 is no JSON: ")
