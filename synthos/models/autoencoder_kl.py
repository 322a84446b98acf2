"""Pictures to latents and back by Stable Diffusion's autoencoders: 8 x 8 pixels to one position of C channels."""

from typing import Any

import torch
from torch import Tensor

from synthos.models.parts import Models
from synthos.models.tiny import Tiny

TINY_KL = Tiny(
    "AutoencoderKL",
    {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [8, 8, 8, 8],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
)


def build_autoencoder(models: Models, tiny: Tiny = TINY_KL) -> Any:
    """The part `vae`, an AutoencoderKL."""
    return models.build("vae", tiny)


@torch.no_grad()
def encode_latents(vae: Any, images: Tensor) -> Tensor:
    """Normalised latents float32 [B, C, h, w] of `images` uint8 [B, 3, H, W].

    The mode of the encoder's distribution, (mode - shift) * scale: nothing is drawn, so they can be cached.
    """
    shift, scale = _normalisation(vae)
    pictures = images.to(next(vae.parameters())) / 127.5 - 1
    mode: Tensor = vae.encode(pictures).latent_dist.mode()
    return (mode - shift) * scale


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Images float32 [B, 3, H, W] in [0, 1] of normalised `latents` [B, C, h, w]."""
    shift, scale = _normalisation(vae)
    pictures: Tensor = vae.decode(latents.to(next(vae.parameters())) / scale + shift).sample
    return (pictures / 2 + 0.5).clamp(0, 1)


def _normalisation(vae: Any) -> tuple[float, float]:
    assert not vae.training, "a frozen autoencoder is always in eval mode"
    return vae.config.shift_factor or 0.0, vae.config.scaling_factor  # Stable Diffusion 1 and 2 have no shift
