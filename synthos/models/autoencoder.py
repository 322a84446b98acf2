"""Pictures to latents and back: the Wan autoencoder (8 x 8 pixels to 16 channels), or the demo's patch transform."""

from typing import Any

import torch
from torch import Tensor

from synthos.models.parts import Models
from synthos.models.tiny import Tiny

TINY_PATCH = Tiny("PatchAutoencoder", {"z_dim": 16, "scale_factor_spatial": 8})
TINY_WAN = Tiny("AutoencoderKLWan", {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1})


def build_autoencoder(models: Models) -> Any:
    """The part `vae`. Its weights should be filled as float32: the decoder loses visible detail in bfloat16."""
    return models.build("vae", TINY_PATCH)


@torch.no_grad()
def encode_latents(vae: Any, images: Tensor) -> Tensor:
    """Normalised latents float32 [B, C, 1, h, w] of `images` uint8 [B, 3, H, W].

    The mode of the encoder's distribution, (mode - mean) / std by channel: nothing is drawn, so they can be cached.
    """
    mean, std = _statistics(vae)
    pictures = (images.to(mean) / 127.5 - 1).unsqueeze(2)  # [B, 3, 1, H, W], a film of one frame
    mode: Tensor = vae.encode(pictures).latent_dist.mode()
    return (mode - mean) / std


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Images float32 [B, 3, H, W] in [0, 1] of normalised `latents` [B, C, 1, h, w]."""
    mean, std = _statistics(vae)
    pictures: Tensor = vae.decode(latents.to(mean) * std + mean).sample  # [B, 3, 1, H, W]
    return (pictures.squeeze(2) / 2 + 0.5).clamp(0, 1)


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latent channels, on the autoencoder's device, float32 [C, 1, 1, 1]."""
    assert not vae.training, "a frozen autoencoder is always in eval mode"
    device = next(vae.parameters()).device
    mean, std = (
        torch.tensor(s, device=device).view(-1, 1, 1, 1) for s in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
