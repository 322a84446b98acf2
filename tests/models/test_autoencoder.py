import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from synthos.models.autoencoder import TINY_WAN, build_autoencoder, decode_latents, encode_latents
from synthos.models.parts import Models
from tests.models.conftest import fill

PHOTOGRAPHS = ["astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket"]


@pytest.fixture(scope="module")
def vae(tiny: Models) -> Any:
    return fill(tiny, build_autoencoder(tiny))


def noise(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def photographs() -> dict[str, Tensor]:
    """Each uint8 [1, 3, H, W], cut to whole patches."""
    data = pytest.importorskip("skimage.data")
    arrays = {name: np.asarray(getattr(data, name)())[..., :3] for name in PHOTOGRAPHS}
    whole = {name: a[: a.shape[0] // 8 * 8, : a.shape[1] // 8 * 8] for name, a in arrays.items()}
    return {name: torch.from_numpy(a.copy()).permute(2, 0, 1)[None] for name, a in whole.items()}


def psnr(images: Tensor, pictures: Tensor) -> float:
    return -10 * math.log10((images / 255 - pictures).square().mean().item())


def test_latents_have_the_interfaces_shapes_and_range(vae: Any) -> None:
    latents = encode_latents(vae, noise(64, 48))
    images = decode_latents(vae, latents)
    assert (latents.shape, latents.dtype) == ((2, vae.config.z_dim, 1, 8, 6), torch.float32)
    assert (images.shape, images.dtype) == ((2, 3, 64, 48), torch.float32)
    assert images.min() >= 0
    assert images.max() <= 1


def test_patch_basis_is_orthonormal(vae: Any) -> None:
    rows = vae.basis.flatten(1).double()
    assert torch.allclose(rows @ rows.T, torch.eye(16, dtype=torch.float64), atol=1e-6)


def test_a_patch_channel_is_the_cosine_sum_of_its_patch(vae: Any) -> None:
    """Channel 7: brightness (R + G + B) / sqrt(3), one half-wave down and two across, over sqrt(1 / 3)."""
    images = noise(8, 16)
    expected = 0.0
    for y, x, c in itertools.product(range(8), range(8), range(3)):
        wave = math.cos(math.pi * (y + 0.5) / 8) * math.cos(2 * math.pi * (x + 0.5) / 8) / 4
        expected += (images[1, c, y, 8 + x].item() / 127.5 - 1) * wave / math.sqrt(3)
    found = encode_latents(vae, images)[1, 7, 0, 0, 1].item()
    assert found == pytest.approx(expected * math.sqrt(3), abs=1e-4)


def test_decoding_what_was_encoded_changes_nothing_more(vae: Any) -> None:
    latents = encode_latents(vae, noise(32, 32) // 4 + 96)  # faint, so that no pixel is clamped
    again = decode_latents(vae, latents)
    assert torch.allclose(encode_latents(vae, again * 255), latents, atol=1e-4)


def test_flat_colours_survive(vae: Any) -> None:
    colours = torch.tensor([[255, 0, 0], [30, 200, 90]], dtype=torch.uint8)
    images = colours[:, :, None, None].expand(2, 3, 16, 16)
    assert torch.allclose(decode_latents(vae, encode_latents(vae, images)), images / 255, atol=1e-5)


def test_photographs_survive(vae: Any, photographs: dict[str, Tensor]) -> None:
    found = {name: psnr(p, decode_latents(vae, encode_latents(vae, p))) for name, p in photographs.items()}
    assert min(found.values()) > 27, found


def test_latents_of_photographs_have_unit_scale(vae: Any, photographs: dict[str, Tensor]) -> None:
    latents = [encode_latents(vae, p).flatten(3)[0, :, 0] for p in photographs.values()]  # each [16, N]
    mean = torch.stack([x.mean(1) for x in latents]).mean(0)
    square = torch.stack([x.square().mean(1) for x in latents]).mean(0)  # every photograph counts the same
    assert (square - mean.square()).mean().item() == pytest.approx(1, abs=0.2)
    assert mean.abs().max() < 0.5
    assert square.max() / square.min() < 50  # half whitened: the deviations of the raw channels differ by 30


def test_patch_autoencoder_survives_saving(vae: Any, tmp_path: Path) -> None:
    from synthos.models.patch import PatchAutoencoder

    vae.save_pretrained(tmp_path)
    loaded = PatchAutoencoder.from_pretrained(tmp_path).eval()
    assert loaded.config.latents_std == vae.config.latents_std
    assert torch.equal(encode_latents(loaded, noise(16, 16)), encode_latents(vae, noise(16, 16)))


@pytest.fixture
def wan(tmp_path: Path) -> Any:
    """A random Wan autoencoder as diffusers saves it."""
    import diffusers

    torch.manual_seed(0)
    cls: Any = diffusers.AutoencoderKLWan
    cls(**TINY_WAN.config).save_pretrained(tmp_path / "saved" / "vae")
    return cls.from_pretrained(tmp_path / "saved" / "vae").eval()


def test_a_hub_folder_loads_as_diffusers_loads_it(open_part: Callable[..., Any], wan: Any, tmp_path: Path) -> None:
    vae = open_part(build_autoencoder, "vae", tmp_path / "saved", subfolder="vae")
    images = noise(32, 24)
    latents = encode_latents(vae, images)
    with torch.no_grad():
        mode = wan.encode(images[:, :, None] / 127.5 - 1).latent_dist.mode()
        decoded = wan.decode(mode).sample[:, :, 0]
    assert latents.shape == (2, 16, 1, 4, 3)
    for channel, (mean, std) in enumerate(zip(wan.config.latents_mean, wan.config.latents_std, strict=True)):
        assert torch.allclose(latents[:, channel], (mode[:, channel] - mean) / std, atol=1e-5)
    assert torch.allclose(decode_latents(vae, latents), (decoded + 1) / 2, atol=1e-5)


def test_an_autoencoder_in_train_mode_is_refused(vae: Any) -> None:
    vae.train()
    try:
        with pytest.raises(AssertionError, match="eval"):
            encode_latents(vae, noise(8, 8))
    finally:
        vae.eval()
