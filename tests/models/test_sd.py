"""Stable Diffusion's parts against diffusers: the autoencoder, old names in its files, the UNet with a projector."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from synthos.models import sd_unet
from synthos.models.parts import Models
from synthos.models.projector import build_projector
from synthos.models.sd_vae import TINY_KL, build_vae, decode_latents, encode_moments
from synthos.schema import ModelConfig, PartConfig
from tests.models.conftest import fill


def pictures(size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """A random AutoencoderKL as diffusers saves it in `vae`."""
    import diffusers

    torch.manual_seed(0)
    diffusers.AutoencoderKL(**TINY_KL.config).save_pretrained(tmp_path / "vae")  # type: ignore[attr-defined]
    return diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").eval()  # type: ignore[attr-defined]


def test_latents_are_diffusers_distribution_scaled(saved: Any, open_part: Callable[..., Any], tmp_path: Path) -> None:
    vae = open_part(build_vae, "vae", tmp_path / "vae")
    mean, std = encode_moments(vae, pictures())
    with torch.no_grad():
        expected = saved.encode(pictures() / 127.5 - 1).latent_dist
        decoded = saved.decode(mean / 0.18215).sample / 2 + 0.5
    assert mean.shape == (2, 4, 4, 4)
    assert torch.allclose(mean, 0.18215 * expected.mean, atol=1e-6)
    assert torch.allclose(std, 0.18215 * expected.logvar.exp().sqrt(), atol=1e-6)
    assert torch.allclose(decode_latents(vae, mean), decoded.clamp(0, 1), atol=1e-6)


def test_old_names_of_attention_are_read_as_diffusers_reads_them(
    saved: Any, open_part: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, name in old.items():
        tensors = {key.replace(f".{new}.", f".{name}."): value for key, value in tensors.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in tensors
    save_file(tensors, file, {"format": "pt"})
    mean, _ = encode_moments(open_part(build_vae, "vae", tmp_path / "vae"), pictures())
    with torch.no_grad():
        assert torch.allclose(mean, 0.18215 * saved.encode(pictures() / 127.5 - 1).latent_dist.mean, atol=1e-6)


def test_the_tiny_autoencoder_returns_faint_pictures_whole(tiny: Models) -> None:
    vae = fill(tiny, build_vae(tiny))
    mean, std = encode_moments(vae, pictures() // 8 + 100)
    assert mean.shape == (2, 16, 4, 4) and std.max() < 1e-5
    again, _ = encode_moments(vae, 255 * decode_latents(vae, mean))
    assert torch.allclose(again, mean, atol=1e-4)


def build(models: Models, start: sd_unet.Start = "pretrained", layers: int = 2) -> Any:
    projector = build_projector("mlp", 24, sd_unet.context_width(models), layers, 32)
    return fill(models, sd_unet.build_unet(models, projector, start))


def tokens() -> Tensor:
    return torch.nn.functional.normalize(torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_the_network_is_diffusers_unet_given_the_projected_context(tiny: Models) -> None:
    from diffusers import UNet2DConditionModel

    network = build(tiny)
    plain: Any = UNet2DConditionModel.from_pretrained(tiny.folder("unet", sd_unet.TINY_UNET)).eval()
    x, t = torch.randn(2, 16, 8, 8), torch.tensor([3, 998])
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
