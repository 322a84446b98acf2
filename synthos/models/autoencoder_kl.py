"""Pictures to latents and back by Stable Diffusion's autoencoders: 8 x 8 pixels to one position of C channels.

Latent diffusion: arXiv 2112.10752. SD1.5 has 4 channels and a scale; SD3.5 has 16, a shift and a scale.
"""

from typing import Any

import torch
from torch import Tensor

from synthos.models.parts import Models
from synthos.models.tiny import Tiny

TINY_KL_16 = Tiny("PatchAutoencoderKL", {})
# Brightness and both colours of a patch, and one edge: as many channels as SD1.5's. A loss of noise weighs all channels
# alike, however little a condition tells of them.
TINY_KL_4 = Tiny("PatchAutoencoderKL", {"coefficients": [0, 12, 15, 1], "latent_channels": 4, "whitening": 1.0})


def build_autoencoder(models: Models, tiny: Tiny = TINY_KL_16) -> Any:
    """The part `vae`, an AutoencoderKL. Its weights should be filled as float32."""
    return models.build("vae", tiny)


@torch.no_grad()
def encode_moments(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the normalised latents, float32 [B, C, h, w] each, of `images` uint8 [B, 3, H, W].

    Normalised is (z - shift) * scale. mean + std n with n ~ N(0, 1) is a draw; drawing belongs to the loss, so both can
    be cached.
    """
    shift, scale = _normalisation(vae)
    pictures = images.to(next(vae.parameters())) / 127.5 - 1
    found = vae.encode(pictures).latent_dist
    return (found.mean - shift) * scale, found.std * scale


def encode_latents(vae: Any, images: Tensor) -> Tensor:
    """Normalised latents float32 [B, C, h, w] of `images` uint8 [B, 3, H, W]: the mean, and nothing is drawn."""
    return encode_moments(vae, images)[0]


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Images float32 [B, 3, H, W] in [0, 1] of normalised `latents` [B, C, h, w]."""
    shift, scale = _normalisation(vae)
    pictures: Tensor = vae.decode(latents.to(next(vae.parameters())) / scale + shift).sample
    return (pictures / 2 + 0.5).clamp(0, 1)


def _normalisation(vae: Any) -> tuple[float, float]:
    assert not vae.training, "a frozen autoencoder is always in eval mode"
    return vae.config.shift_factor or 0.0, vae.config.scaling_factor  # Stable Diffusion 1 and 2 have no shift
