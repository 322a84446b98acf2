"""The demo's autoencoder: a fixed linear transform of 8 x 8 patches behind the interface of `AutoencoderKLWan`."""

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

PATCH = 8  # pixels
# Orthonormal colour axes near the principal ones of photographs: brightness, red - blue, and magenta - green.
COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))
# The sixteen strongest coefficients of photographs: colour axis, vertical and horizontal frequency, standard deviation.
# Measured on the colour photographs of scikit-image; the brightness of natural pictures falls as 1 / frequency.
COEFFICIENTS = (
    (0, 0, 0, 6.5),
    *((0, u, v, 1 / (u + v)) for u, v in ((0, 1), (1, 0), (0, 2), (1, 1), (2, 0), (0, 3), (1, 2), (2, 1), (3, 0))),
    *((0, u, v, 1 / (u + v)) for u, v in ((2, 2), (1, 3))),
    (1, 0, 0, 2.7),
    (1, 0, 1, 0.28),
    (1, 1, 0, 0.28),
    (2, 0, 0, 0.9),
)
MEANS = {(0, 0, 0): -3.0, (1, 0, 0): 1.8, (2, 0, 0): 0.6}  # measured alike; every other coefficient has mean zero


class PatchAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Orthonormal DCT of colour patches, cut to sixteen coefficients: 27 dB or more on full-size photographs.

    The statistics whiten by half: a channel of standard deviation sd is divided by sqrt(sd), so that layout stays
    louder than texture. As the sixteen sd have mean 1, latents so normalised have overall variance 1.

    Args:
        z_dim: latent channels.
        scale_factor_spatial: pixels per latent pixel.
        latents_mean: what is taken from each channel before it is used.
        latents_std: what each channel is then divided by.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        z_dim: int = len(COEFFICIENTS),
        scale_factor_spatial: int = PATCH,
        latents_mean: tuple[float, ...] = tuple(MEANS.get(c[:3], 0.0) for c in COEFFICIENTS),
        latents_std: tuple[float, ...] = tuple(math.sqrt(c[3]) for c in COEFFICIENTS),
    ) -> None:
        super().__init__()
        self.basis = nn.Parameter(patch_basis())

    def encode(self, x: Tensor) -> AutoencoderKLOutput:
        """Pictures [B, 3, T, H, W] in [-1, 1] to a distribution without spread over latents [B, 16, T, h, w]."""
        mean = nn.functional.conv3d(x, self._kernel(), stride=(1, PATCH, PATCH))
        log_variance = torch.full_like(mean, -30.0)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(torch.cat([mean, log_variance], dim=1)))

    def decode(self, z: Tensor) -> DecoderOutput:
        """Latents [B, 16, T, h, w] to pictures [B, 3, T, H, W]: the transpose, as the basis is orthonormal."""
        return DecoderOutput(sample=nn.functional.conv_transpose3d(z, self._kernel(), stride=(1, PATCH, PATCH)))

    def _kernel(self) -> Tensor:
        return self.basis.unsqueeze(2)  # [16, 3, 1, 8, 8]


class PatchAutoencoderKL(PatchAutoencoder):
    """The same transform behind the interface of `AutoencoderKL`: pictures instead of films, its latents normalised.

    Args:
        coefficients: which of `COEFFICIENTS` are kept, by number: the latent channels.
        whitening: a channel of standard deviation sd is divided by sd to this power.
        latent_channels: as many as there are coefficients.
        scaling_factor: what latents are multiplied by before they are used; they have unit scale already.
        shift_factor: what is taken from them before that; they are centred already.
        block_out_channels: as many as an autoencoder would have that makes latents of 8 x 8 pixels.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        coefficients: tuple[int, ...] = tuple(range(len(COEFFICIENTS))),
        whitening: float = 0.5,
        latent_channels: int = len(COEFFICIENTS),
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        block_out_channels: tuple[int, ...] = (1, 1, 1, 1),
    ) -> None:
        ModelMixin.__init__(self)
        assert latent_channels == len(coefficients)
        self.basis = nn.Parameter(patch_basis()[list(coefficients)])

    def encode(self, x: Tensor) -> AutoencoderKLOutput:
        """Pictures [B, 3, H, W] in [-1, 1] to a distribution without spread over latents [B, C, h, w]."""
        raw = nn.functional.conv2d(x, self.basis, stride=PATCH)
        mean, std = (statistic.to(raw) for statistic in self._statistics())
        log_variance = torch.full_like(raw, -30.0)
        moments = torch.cat([(raw - mean) / std, log_variance], dim=1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    def decode(self, z: Tensor, return_dict: bool = True, generator: None = None) -> DecoderOutput | tuple[Tensor]:
        """Latents [B, C, h, w] to pictures [B, 3, H, W]."""
        mean, std = (statistic.to(z) for statistic in self._statistics())
        sample = nn.functional.conv_transpose2d(z * std + mean, self.basis, stride=PATCH)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and divisor of each channel, [C, 1, 1]."""
        kept = [COEFFICIENTS[number] for number in self.config.coefficients]
        mean = torch.tensor([MEANS.get(c[:3], 0.0) for c in kept])
        return mean.view(-1, 1, 1), torch.tensor([c[3] ** self.config.whitening for c in kept]).view(-1, 1, 1)


def patch_basis() -> Tensor:
    """The kept patches, orthonormal as vectors, [16, 3, 8, 8]."""
    colours = nn.functional.normalize(torch.tensor(COLOURS, dtype=torch.float64))
    k = torch.arange(PATCH, dtype=torch.float64)
    waves = nn.functional.normalize(torch.cos(math.pi / PATCH * (k + 0.5) * k[:, None]))  # DCT-II, [frequency, pixel]
    patches = [torch.einsum("c,y,x->cyx", colours[c], waves[u], waves[v]) for c, u, v, _ in COEFFICIENTS]
    return torch.stack(patches).float()
