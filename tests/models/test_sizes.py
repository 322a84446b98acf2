"""The known models of `configs/model/` have the classes, shapes and sizes of the papers; nothing is downloaded."""

from pathlib import Path

import pytest
import torch
import yaml

from synthos.models.autoencoder import build_autoencoder
from synthos.models.clip import image_width
from synthos.models.parts import Models
from synthos.models.tiny import Tiny
from synthos.schema import ModelConfig
from synthos.strict import load

FOLDER = Path(__file__).parents[2] / "configs" / "model"
CONFIGS = {path.stem: load(ModelConfig, yaml.safe_load(path.read_text())) for path in sorted(FOLDER.glob("*.yaml"))}
SIZED = [(name, part) for name, config in CONFIGS.items() for part, spec in config.parts.items() if spec.parameters]


def plan(name: str) -> Models:
    return Models(CONFIGS[name], Path("no/such/folder"), meta_only=True)


@pytest.mark.parametrize(("name", "part"), SIZED)
def test_the_number_of_parameters_is_as_stated(name: str, part: str) -> None:
    with torch.device("meta"):  # tables of positions too, which for SD3.5 would take gigabytes
        module = plan(name).build(part, Tiny("", {}))
    assert sum(p.numel() for p in module.parameters()) == CONFIGS[name].parts[part].parameters
    assert {p.device for p in module.parameters()} == {torch.device("meta")}
    assert not module.training


def test_wan_has_the_sizes_of_its_release() -> None:
    sizes = {part: spec.parameters for part, spec in CONFIGS["wan2.1_t2v_1.3b"].parts.items()}
    assert sizes["transformer"] == 1_418_996_800
    assert sizes["vae"] == 126_892_531
    assert sizes["text_encoder"] == pytest.approx(5.68e9, rel=1e-3)
    assert sizes["image_encoder"] == pytest.approx(630.8e6, rel=1e-3)


def test_wan_sees_257_tokens_of_width_1280_and_16_latent_channels() -> None:
    models = plan("wan2.1_t2v_1.3b")
    tower = models.build("image_encoder", Tiny("", {}))
    assert tower.get_parameter("embeddings.position_embedding.weight").shape == (257, image_width(models))
    assert image_width(models) == 1280
    vae = build_autoencoder(models)
    assert vae.config.latents_mean[0] == -0.7571
    assert vae.config.latents_std[0] == 2.8184
    assert (vae.config.latents_mean[15], vae.config.latents_std[15]) == (-0.2921, 1.9160)
