"""Stable Diffusion's autoencoders against diffusers, SD1.5's kind and SD3.5's, and the tiny one that keeps pictures."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from synthos.models.autoencoder_kl import (
    TINY_KL_4,
    TINY_KL_16,
    build_autoencoder,
    decode_latents,
    encode_latents,
    encode_moments,
)
from synthos.models.parts import Models
from tests.models.conftest import fill

SMALL = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8, 8, 8, 8],
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
KINDS: dict[str, dict[str, Any]] = {  # channels, scale and shift as published
    "sd1.5": {"latent_channels": 4, "scaling_factor": 0.18215},
    "sd3.5": {
        "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}  # fmt: skip
SCALES = {"sd1.5": (0.0, 0.18215), "sd3.5": (0.0609, 1.5305)}
IMAGES = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def save(folder: Path, kind: str) -> Any:
    """A random AutoencoderKL as diffusers saves it in `vae`, and reads it back."""
    import diffusers

    cls: Any = diffusers.AutoencoderKL
    torch.manual_seed(0)
    cls(**SMALL, **KINDS[kind]).save_pretrained(folder / "vae")
    return cls.from_pretrained(folder / "vae").eval()


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_diffusers_distribution_normalised(
    kind: str, open_part: Callable[..., Any], tmp_path: Path
) -> None:
    saved, (shift, scale) = save(tmp_path, kind), SCALES[kind]
    vae = open_part(build_autoencoder, "vae", tmp_path / "vae")
    mean, std = encode_moments(vae, IMAGES)
    with torch.no_grad():
        expected = saved.encode(IMAGES / 127.5 - 1).latent_dist
        decoded = saved.decode(mean / scale + shift).sample / 2 + 0.5
    assert mean.shape == std.shape == (2, KINDS[kind]["latent_channels"], 4, 6)
    torch.testing.assert_close(mean, (expected.mean - shift) * scale)
    torch.testing.assert_close(std, expected.logvar.exp().sqrt() * scale)
    torch.testing.assert_close(encode_latents(vae, IMAGES), (expected.mode() - shift) * scale)
    torch.testing.assert_close(decode_latents(vae, mean), decoded.clamp(0, 1))


def test_old_names_of_attention_are_read_as_diffusers_reads_them(open_part: Callable[..., Any], tmp_path: Path) -> None:
    saved, file = save(tmp_path, "sd1.5"), tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, name in old.items():
        tensors = {key.replace(f".{new}.", f".{name}."): value for key, value in tensors.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in tensors
    save_file(tensors, file, {"format": "pt"})
    mean, _ = encode_moments(open_part(build_autoencoder, "vae", tmp_path / "vae"), IMAGES)
    with torch.no_grad():
        assert torch.allclose(mean, 0.18215 * saved.encode(IMAGES / 127.5 - 1).latent_dist.mean, atol=1e-6)


@pytest.fixture(scope="module", params=[TINY_KL_4, TINY_KL_16], ids=["sd1.5", "sd3.5"])
def tiny_vae(request: pytest.FixtureRequest, tiny: Models) -> Any:
    return fill(tiny, build_autoencoder(tiny, request.param))


def test_the_tiny_autoencoder_keeps_what_it_can_show(tiny_vae: Any) -> None:
    mean, std = encode_moments(tiny_vae, IMAGES // 8 + 100)
    assert mean.shape == (2, tiny_vae.config.latent_channels, 4, 6) and std.max() < 1e-5
    again = encode_latents(tiny_vae, 255 * decode_latents(tiny_vae, mean))
    assert torch.allclose(again, mean, atol=1e-4)


def test_photographs_survive_the_tiny_autoencoder(tiny_vae: Any) -> None:
    data = pytest.importorskip("skimage.data")
    least = {4: 20, 16: 25}[tiny_vae.config.latent_channels]
    for name in ("astronaut", "chelsea", "rocket"):
        pixels: Tensor = torch.from_numpy(getattr(data, name)()[:256, :256].copy()).permute(2, 0, 1)[None]
        error = decode_latents(tiny_vae, encode_latents(tiny_vae, pixels)) - pixels / 255
        assert -10 * math.log10(error.square().mean().item()) > least, name


def test_an_autoencoder_in_train_mode_is_refused(tiny_vae: Any) -> None:
    tiny_vae.train()
    try:
        with pytest.raises(AssertionError, match="eval"):
            encode_moments(tiny_vae, IMAGES)
    finally:
        tiny_vae.eval()
