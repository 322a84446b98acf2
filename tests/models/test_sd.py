"""Stable Diffusion's UNet with a projector, against diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from synthos.models import sd_unet
from synthos.models.parts import Models
from synthos.models.projector import build_projector
from synthos.schema import ModelConfig, PartConfig
from tests.models.conftest import fill


def build(models: Models, start: sd_unet.Start = "pretrained", layers: int = 2) -> Any:
    projector = build_projector("mlp", 24, sd_unet.context_width(models), layers, 32)
    return fill(models, sd_unet.build_unet(models, projector, start))


def tokens() -> Tensor:
    return torch.nn.functional.normalize(torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_the_network_is_diffusers_unet_given_the_projected_context(tiny: Models) -> None:
    from diffusers import UNet2DConditionModel

    network = build(tiny)
    plain: Any = UNet2DConditionModel.from_pretrained(tiny.folder("unet", sd_unet.TINY_UNET)).eval()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 998])
    with torch.no_grad():
        context = network.projector(tokens())
        expected = plain(x, t, context).sample
        found = sd_unet.predict(network, x, t, tokens(), torch.float32)
        nothing = sd_unet.predict(network, x, t, torch.zeros_like(tokens()), torch.float32)
        assert torch.allclose(nothing, plain(x, t, torch.zeros(2, 77, 64)).sample, atol=1e-6)
    assert context.shape == (2, 77, 64)
    assert torch.allclose(found, expected, atol=1e-6)
    assert (found - nothing).abs().max() > 1e-4


def test_every_parameter_is_in_one_group(tiny: Models) -> None:
    network = build(tiny)
    groups = sd_unet.split_parameters(network)
    assert set(map(id, groups["projector"])) == set(map(id, network.projector.parameters()))
    assert sum(map(len, groups.values())) == len(list(network.parameters()))


def test_units_are_disjoint_but_for_the_projectors_own(tiny: Models) -> None:
    network = build(tiny)
    blocks = [u for u in sd_unet.fsdp_units(network) if type(u).__name__ in sd_unet.UNITS]
    inside = [id(p) for block in blocks for p in block.parameters()]
    assert blocks and len(set(inside)) == len(inside)


def test_from_scratch_is_another_network_with_torchs_spread(tiny: Models) -> None:
    from diffusers import UNet2DConditionModel

    pretrained, scratch = build(tiny), build(tiny, "scratch")
    torch.manual_seed(1)
    theirs: Any = UNet2DConditionModel.from_config(sd_unet.TINY_UNET.config)
    for name, parameter in theirs.named_parameters():
        ours = scratch.get_parameter(name)
        if parameter.numel() > 2000:
            assert not torch.equal(ours, pretrained.get_parameter(name))
            assert ours.std().item() == pytest.approx(parameter.std().item(), rel=0.1), name
        if "norm" in name:
            assert torch.equal(ours, parameter.data), name


def test_an_export_gives_projector_and_unet(tiny: Models, tmp_path: Path) -> None:
    network = build(tiny, "scratch")
    tensors = {name: p + 1.0 for name, p in network.state_dict().items()}
    (tmp_path / "config.json").write_text(network.to_json_string())
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    parts = {"unet": PartConfig(str(tmp_path))}
    again = build(Models(ModelConfig("local", parts), tmp_path))
    assert all(torch.equal(p, tensors[name]) for name, p in again.named_parameters())
    scratch = build(Models(ModelConfig("local", parts), tmp_path), "scratch")
    assert all(
        torch.equal(p, network.get_parameter(name)) for name, p in scratch.named_parameters()
    )  # of the seed alone
    with pytest.raises(ValueError, match="an export with another projector, first difference 'projector.body.6"):
        build(Models(ModelConfig("local", parts), tmp_path), layers=3)
