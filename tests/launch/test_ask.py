"""From the words of `synthos generate` to requests."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launch.ask import ask, parse_fields, request_fields
from launch.compose import compose_generate, file_name
from launch.identity import sig8_of_generation
from launch.rundir import open_folder
from synthos.recipes.base import recipe_class
from synthos.recipes.i2i import I2IRequest
from synthos.schema import GenerateConfig, read_job

I2I = recipe_class("i2i")


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    Image.new("RGB", (20, 10)).save(tmp_path / "photo.jpg")
    Image.new("RGB", (20, 10), "red").save(tmp_path / "two, b.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photo.jpg"


def asked(*arguments: str, name: str | None = None, **fields: str) -> list[dict[str, Any]]:
    config, _ = compose_generate("weights/step_1", arguments)
    return ask(config, I2I, fields, name)


def test_no_word_at_all_asks_for_one_picture() -> None:
    (request,) = asked()
    assert request["name"] == "picture" and request["prompt"] == "" and request["reference"] is None
    assert asked(name="barn")[0]["name"] == "barn"


@pytest.mark.parametrize(
    ("reference", "names"),
    [
        ("photo.jpg", ["photo"]),
        ("two, b.png", ["two__b"]),
        ("photo.jpg,./photo2.jpg", ["photo", "photo2"]),
        ("[photo.jpg, photo2.jpg]", ["photo", "photo2"]),
        ('["photo.jpg", "two, b.png"]', ["photo", "two__b"]),
    ],
)
def test_references_make_a_picture_each(photo: Path, reference: str, names: list[str]) -> None:
    (photo.parent / "photo2.jpg").write_bytes(photo.read_bytes())
    requests = asked(reference=reference, prompt="a, b", steps="7", guidance_text="2")
    assert [request["name"] for request in requests] == names
    assert all((r["prompt"], r["steps"], r["guidance_text"]) == ("a, b", 7, 2.0) for r in requests)
    assert all(Path(r["reference"]).is_absolute() and Path(r["reference"]).is_file() for r in requests)


def test_fields_fill_in_what_requests_leave_unsaid(photo: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("elsewhere") / "ask.jsonl"
    Image.new("RGB", (20, 10)).save(file.parent / "own.jpg")
    file.write_text('{"name": "a"}\n\n{"name": "b", "prompt": "blue", "reference": "own.jpg", "steps": 3}\n')
    a, b = asked(f"requests={file}", prompt="red", reference="photo.jpg", steps="9")
    assert (a["prompt"], a["reference"], a["steps"]) == ("red", str(photo), 9)
    assert (b["prompt"], b["reference"], b["steps"]) == ("blue", str(file.parent / "own.jpg"), 3)
    (inline,) = asked("requests=[{name: c, prompt: green}]", seed="4")
    assert (inline["name"], inline["prompt"], inline["seed"]) == ("c", "green", 4)


def test_texts_become_what_the_request_wants() -> None:
    given = {"prompt": "1984", "height": "64", "guidance_text": "1e1", "reference": "a=b.jpg"}
    assert parse_fields(I2IRequest, given) == {
        "prompt": "1984",
        "height": 64,
        "guidance_text": 10.0,
        "reference": "a=b.jpg",
    }
    scales = recipe_class("siglip_projector").Request
    for text, value in {"6": 6.0, "6,7.5": [6.0, 7.5], "[6, 7.5]": [6.0, 7.5], "[6]": [6.0]}.items():
        assert parse_fields(scales, {"guidance": text}) == {"guidance": value}
    with pytest.raises(ValueError, match="guidance: 'x' is not allowed; expected a number"):
        parse_fields(scales, {"guidance": "6,x"})
    assert "name" not in request_fields(I2I) and {"prompt", "seed"} <= set(request_fields(I2I))


def test_file_names_are_ones() -> None:
    assert [file_name(text) for text in ("my photo", "..x", "фото", "a+b=c")] == ["my_photo", "x", "picture", "a+b=c"]


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ("runs/i2i/i2i-1a2b/weights/step_00000002", "i2i-1a2b-step_00000002"),
        ("runs/i2i/i2i-1a2b/checkpoints/step_00000002", "i2i-1a2b-step_00000002"),
        ("runs/i2i/i2i-1a2b/weights/step_00000002/transformer/trained.safetensors", "i2i-1a2b-step_00000002"),
        ("my weights.safetensors", "my_weights"),
    ],
)
def test_a_job_is_named_after_its_weights(weights: str, name: str, tmp_path: Path) -> None:
    config, once = compose_generate(weights, ["cluster=local"])
    assert (config.name, config.group, config.stage) == (name, "generate", "generate")
    assert config.weights == str(Path.cwd() / weights) and not once.dry_run
    assert compose_generate(weights, ["name=x", "group=y"])[0].name == "x"


def signed(folder: Path, *arguments: str, **fields: str) -> str:
    config, _ = compose_generate(str(folder), arguments)
    return sig8_of_generation(dataclasses.replace(config, requests=ask(config, I2I, fields, None)))


def test_identity_is_weights_requests_and_settings(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = photo.parent / "run" / "weights" / "step_1"
    weights.mkdir(parents=True)
    (weights / "a.safetensors").write_bytes(bytes(2**18))
    plain = signed(weights, prompt="a", reference="photo.jpg")
    elsewhere = ("cluster=slurm", "nodes=4", "gpus_per_node=8", "micro=4", "runs_dir=/x", "cache_dir=/x")
    assert signed(weights, *elsewhere, prompt="a", reference="photo.jpg") == plain
    others = [signed(weights, *words, prompt="a", reference="photo.jpg") for words in (["dtype=bf16"], ["grid=3"])]
    others += [signed(weights, prompt="b", reference="photo.jpg"), signed(weights, prompt="a")]
    monkeypatch.setattr("synthos.models.content.WHOLE_BELOW", 2**17)  # of a large file, some of the numbers
    (weights / "a.safetensors").write_bytes(bytes(2**18 - 1) + b"x")
    others.append(signed(weights, prompt="a", reference="photo.jpg"))
    Image.new("RGB", (20, 10), "blue").save(photo)
    others.append(signed(weights, prompt="a", reference="photo.jpg"))
    assert len({plain, *others}) == 1 + len(others)


def test_a_job_has_its_pictures_in_its_folder(photo: Path, checkout: Path) -> None:
    config, _ = compose_generate("w", [f"requests=[{{name: a, reference: {photo}}}, {{name: b}}]"])
    folder = photo.parent / "run"
    folder.mkdir()
    open_folder(folder, config, ["synthos", "generate"], checkout)
    frozen = read_job(folder / "config.yaml")
    assert isinstance(frozen, GenerateConfig) and isinstance(frozen.requests, list)
    assert frozen.requests[0]["reference"] == "requests/a.reference.jpg" and "reference" not in frozen.requests[1]
    assert (folder / "requests" / "a.reference.jpg").read_bytes() == photo.read_bytes()


def test_true_and_false_are_read_where_a_field_wants_them() -> None:
    request = recipe_class("decomposer").Request
    assert parse_fields(request, {"save_components": "true"}) == {"save_components": True}
    assert parse_fields(request, {"save_components": "false", "prompt": "true"}) == {
        "save_components": False, "prompt": "true"}  # fmt: skip
    with pytest.raises(ValueError, match="save_components: 'yes' is not allowed; expected true or false"):
        ask(compose_generate("weights/step_1", [])[0], recipe_class("decomposer"), {"save_components": "yes"}, None)
