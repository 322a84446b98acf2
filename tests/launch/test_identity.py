"""What is the same experiment, and what is another."""

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launch import identity
from launch.compose import compose
from launch.identity import LEFT_OUT, digest_folder, sig8
from synthos.schema import PartConfig, RunConfig

BASE = ("recipe=i2i", "model=tiny", "data=photos")


def sign(*overrides: str, fingerprint: str = "f") -> str:
    return sig8(compose([*BASE, *overrides]).config, fingerprint)


def test_it_is_eight_hex_digits_and_stable() -> None:
    assert sign() == sign() and len(sign()) == 8 and int(sign(), 16) >= 0


@pytest.mark.parametrize(
    "override",
    [
        "cluster=debug",
        "cluster.threads=3",
        "nodes=4",
        "gpus_per_node=8",
        "batch.micro=16",
        "mesh=full",
        "activation_checkpointing=true",
        "data.workers=3",
        "wandb.project=other",
        "wandb.mode=off",
        "runs_dir=/elsewhere",
        "cache_dir=/elsewhere",
        "data.shards=/elsewhere/{00..09}.tar",
        "data.validation=/elsewhere/held.tar",
    ],
)
def test_other_machines_and_paths_are_the_same_experiment(override: str) -> None:
    assert sign(override) == sign()


@pytest.mark.parametrize(
    "override",
    [
        "optim.lr=2e-4",
        "batch.size=32",
        "seed=1",
        "precision=fp32",
        "recipe.drop_text=0.2",
        "ema.decay=0.9",
        "data.height=128",
        "data.name=other",
        "data.window=8",
        "validate.requests=[{name: a}]",
        "+model.parts.vae.path=some/id",
    ],
)
def test_other_numbers_are_another_experiment(override: str) -> None:
    assert sign(override) != sign()


def test_other_data_are_another_experiment_whatever_they_are_called() -> None:
    assert sign(fingerprint="g") != sign()


def test_every_key_that_is_left_out_exists() -> None:
    for key in LEFT_OUT:
        value: Any = compose(BASE).config
        for name in key.split("."):
            assert hasattr(value, name), key
            value = getattr(value, name)


def test_a_hub_model_is_its_id_and_revision() -> None:
    def part(**values: Any) -> str:
        return sign_parts(vae=PartConfig(**{"path": "some/id", **values}))

    assert part() == part(parameters=5, class_name="X", config={"a": 1})
    assert len({part(), part(path="other/id"), part(revision="abc"), part(subfolder="vae")}) == 4


def sign_parts(**parts: PartConfig) -> str:
    config: RunConfig = compose(BASE).config
    return sig8(dataclasses.replace(config, model=dataclasses.replace(config.model, parts=parts)), "f")


def test_a_local_model_is_its_content_wherever_it_lies(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "vae").mkdir(parents=True)
        (tmp_path / name / "vae" / "config.json").write_text("{}")
    one, two = (PartConfig(str(tmp_path / name), "vae") for name in ("one", "two"))
    assert sign_parts(vae=one) == sign_parts(vae=two)
    (tmp_path / "two" / "vae" / "config.json").write_text("[]")
    assert sign_parts(vae=one) != sign_parts(vae=two)


def test_small_files_enter_whole_and_large_ones_by_their_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "WHOLE_BELOW", 100)
    header = json.dumps({"a": {"dtype": "F32", "shape": [50], "data_offsets": [0, 200]}}).encode()
    file = tmp_path / "model.safetensors"

    def digest(header: bytes, body: bytes) -> str:
        file.write_bytes(struct.pack("<Q", len(header)) + header + body)
        return digest_folder(tmp_path)

    first = digest(header, b"a" * 200)
    assert digest(header, b"b" * 200) == first  # large: the weights themselves are not read
    assert digest(header.replace(b"F32", b"F64"), b"a" * 200) != first
    assert digest(header, b"a" * 201) != first
    assert digest(b"{}", b"a") != digest(b"{}", b"b")  # small: every byte counts
    digest(header, b"b" * 200)
    file.rename(tmp_path / "other.bin")
    first = digest_folder(tmp_path)
    (tmp_path / "other.bin").write_bytes(b"a" * (tmp_path / "other.bin").stat().st_size)
    assert digest_folder(tmp_path) == first


def test_renamed_files_count_and_hidden_ones_do_not(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    first = digest_folder(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "download.lock").write_text("x")
    assert digest_folder(tmp_path) == first
    (tmp_path / "a.json").rename(tmp_path / "b.json")
    assert digest_folder(tmp_path) != first


def test_a_requested_picture_is_its_content(tmp_path: Path) -> None:
    def asked(name: str, colour: int) -> str:
        Image.new("RGB", (4, 4), (colour, 0, 0)).save(tmp_path / name)
        return sign(f"validate.requests=[{{name: a, reference: {tmp_path / name}}}]")

    assert asked("a.png", 1) == asked("b.png", 1) != asked("c.png", 2)
