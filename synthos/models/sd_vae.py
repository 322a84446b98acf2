"""Pictures to latents and back: Stable Diffusion's autoencoder, whose latents are drawn from what it encodes to.

Latent diffusion: arXiv 2112.10752.
"""

from typing import Any

import torch
from torch import Tensor

from synthos.models.parts import Models
from synthos.models.tiny import Tiny

TINY_PATCH_KL = Tiny("PatchAutoencoderKL", {})
TINY_KL = Tiny(
    "AutoencoderKL",
    {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [8, 8, 8, 8],
        "norm_num_groups": 4,
        "layers_per_block": 1,
    },
)


def build_vae(models: Models) -> Any:
    """The part `vae`, an AutoencoderKL. Its weights should be filled as float32."""
    return models.build("vae", TINY_PATCH_KL)


@torch.no_grad()
def encode_moments(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the scaled latents, float32 [B, C, h, w] each, of `images` uint8 [B, 3, H, W].

    mean + std n with n ~ N(0, 1) is a draw; drawing belongs to the loss, so both can be cached.
    """
    assert not vae.training, "a frozen autoencoder is always in eval mode"
    pixels = images.to(next(vae.parameters())) / 127.5 - 1
    found = vae.encode(pixels).latent_dist
    scale = vae.config.scaling_factor
    return scale * found.mean, scale * found.std


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Images float32 [B, 3, H, W] in [0, 1] of scaled `latents` [B, C, h, w]."""
    pictures: Tensor = vae.decode(latents.to(next(vae.parameters())) / vae.config.scaling_factor).sample
    return (pictures / 2 + 0.5).clamp(0, 1)
