"""What is the same experiment, and what is another."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from launch.compose import compose
from launch.identity import LEFT_OUT, sig8
from synthos.models import content
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


def test_large_weights_to_start_from_are_more_than_their_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "WHOLE_BELOW", 2**18)

    def signed(value: float, name: str = "one.safetensors") -> str:
        save_file({"projector": torch.full((2**17,), value)}, tmp_path / name)
        return sign(f"init_from={tmp_path / name}")

    assert signed(1.0) == signed(1.0, "two.safetensors") != signed(2.0)


def test_a_requested_picture_is_its_content(tmp_path: Path) -> None:
    def asked(name: str, colour: int) -> str:
        Image.new("RGB", (4, 4), (colour, 0, 0)).save(tmp_path / name)
        return sign(f"validate.requests=[{{name: a, reference: {tmp_path / name}}}]")

    assert asked("a.png", 1) == asked("b.png", 1) != asked("c.png", 2)
