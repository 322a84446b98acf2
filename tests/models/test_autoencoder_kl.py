from typing import Any

import pytest
import torch

from synthos.models.autoencoder_kl import build_autoencoder, decode_latents, encode_latents
from synthos.models.parts import Models
from tests.models.conftest import fill


@pytest.fixture(scope="module")
def vae(tiny: Models) -> Any:
    return fill(tiny, build_autoencoder(tiny))


IMAGES = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_latents_are_the_mode_shifted_and_scaled(vae: Any) -> None:
    latents = encode_latents(vae, IMAGES)
    with torch.no_grad():
        expected = vae.encode(IMAGES / 127.5 - 1).latent_dist.mode()
    assert latents.shape == (2, 16, 4, 6)
    torch.testing.assert_close(latents, (expected - 0.0609) * 1.5305)


def test_decoding_undoes_the_normalisation(vae: Any) -> None:
    latents = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = (vae.decode(latents / 1.5305 + 0.0609).sample / 2 + 0.5).clamp(0, 1)
    pictures = decode_latents(vae, latents)
    torch.testing.assert_close(pictures, expected)
    assert pictures.shape == (2, 3, 32, 48)


def test_a_model_without_shift_has_none(vae: Any) -> None:
    shift = vae.config.shift_factor
    vae.register_to_config(shift_factor=None)
    try:
        with torch.no_grad():
            expected = vae.encode(IMAGES / 127.5 - 1).latent_dist.mode() * 1.5305
        torch.testing.assert_close(encode_latents(vae, IMAGES), expected)
    finally:
        vae.register_to_config(shift_factor=shift)
