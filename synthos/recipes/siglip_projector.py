"""SigLIP tokens into Stable Diffusion 1.5: the UNet learns to render what an image embedding means.

Learned: a projector from a picture's SigLIP tokens to the context that the UNet knew as text and, unless `unet` is
frozen, the UNet itself, pretrained or from scratch. Frozen: SigLIP, the VAE, and a frozen UNet, through whose
activations the gradient still flows. Training is autoencoding, no caption is read; another model that predicts such
tokens can then be seen (MetaMorph, arXiv 2412.14164).

Denoising diffusion (arXiv 2006.11239): t uniform on 0 .. 999 of SD1.5's schedule a(t), latents x_0 drawn by the VAE,
x_t = sqrt(a) x_0 + sqrt(1 - a) e, loss mean((prediction - e)^2), where e = n + noise_offset r with one r for each
picture and channel. Tokens are the tower's states before its final norm, resized to `num_tokens`, each of length 1. The
null condition is a context of zeros, not the empty prompt: null + guidance (image - null).

`drop_image` is the probability of losing the image. The usual 0.1 suits a projector alone, or a long training. The
published training, of a pretrained UNet, drops 0.8: mostly unconditional steps keep the quality of its pictures, while
the rest adapt it to tokens of another kind.

    python launch/submit.py recipe=siglip_projector data.shards='/data/images/{00000..00099}.tar'
    python launch/submit.py recipe=siglip_projector model=tiny data=photos cluster=debug
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from synthos.batch import Batch, Feature, Features, Input
from synthos.data.decode import decode_image
from synthos.diffusion.ddpm import NUM_TIMES, add_noise, offset_noise, scaled_linear_alphas
from synthos.diffusion.dropout import drop
from synthos.diffusion.sampling import sample_noise
from synthos.diffusion.timesteps import index_from_uniform
from synthos.keys import Draws
from synthos.models import autoencoder_kl, projector, sd_unet, siglip
from synthos.models.parts import Models
from synthos.recipes.base import Encoded, Images, Loss, check_setting

PICTURES = ("jpg", "jpeg", "png", "webp", "avif")


@dataclass(frozen=True)
class SigLIPConfig:
    projector: projector.Mode  # mlp | xattn | xattnffn | transformer
    projector_layers: int  # linear layers of mlp, blocks of the others
    projector_hidden: int | None  # width inside mlp and transformer; null for the others
    num_tokens: int  # of a picture, a square number
    image_view: Literal["crop", "whole"]  # what SigLIP sees: the VAE's crop, or the whole picture
    unet: Literal["frozen", "trained", "from_scratch"]  # whether it learns, and from what
    noise_offset: float  # of the noise and of its target alike; 0: none
    drop_image: float  # probability
    guidance: float  # scale where a request names none

    def __post_init__(self) -> None:
        projector.check_shape(self.projector, self.projector_layers, self.projector_hidden)
        root = math.isqrt(max(0, self.num_tokens))
        if self.num_tokens < 1 or root**2 != self.num_tokens:
            near = " or ".join(str(r * r) for r in (root, root + 1) if r)
            raise ValueError(f"recipe.num_tokens: {self.num_tokens} is no square number; nearest: {near}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"recipe.guidance: {self.guidance} is not allowed; expected a finite number")
        if not 0 <= self.noise_offset < math.inf:
            raise ValueError(f"recipe.noise_offset: {self.noise_offset} is not allowed; expected 0 or more")


@dataclass(frozen=True)
class SigLIPRequest:
    """A picture asked for, or one at each of several scales. What is null is the default of recipe or training."""

    name: str
    reference: str | None = None  # picture file
    embedding: str | None = None  # .npy or .safetensors file of tokens, in place of a picture
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    steps: int = 50
    sampler: Literal["pndm", "ddim", "euler", "dpm"] = "pndm"
    guidance: float | list[float] | None = None  # several: a picture at each, from the same noise
    seed: int = 0

    @property
    def is_encoded(self) -> bool:
        return self.reference is None

    def __post_init__(self) -> None:
        if not 1 <= self.steps < NUM_TIMES:  # the samplers' times are moved by one
            raise ValueError(f"request {self.name!r}: steps {self.steps} is not allowed; expected 1 to {NUM_TIMES - 1}")
        if self.guidance == []:
            raise ValueError(f"request {self.name!r}: guidance [] is not allowed; expected a number, or a list of them")
        if self.reference is not None and self.embedding is not None:
            raise ValueError(f"request {self.name!r}: reference and embedding are both set; expected one of them")


class SigLIPProjector:
    Config: ClassVar[type] = SigLIPConfig
    Request: ClassVar[type] = SigLIPRequest
    from_split: ClassVar[dict[str, Any]] = {}
    size_multiple: ClassVar[int] = 8  # of the VAE; the UNet pads what its own levels do not divide
    inputs: dict[str, Input] = {"image": Input("image", PICTURES)}  # with image_view=whole, also `whole`
    features: ClassVar[dict[str, Feature]] = {
        "latents_mean": Feature("target", torch.float32),
        "latents_std": Feature("target", torch.float32),
        "image": Feature("image", torch.bfloat16),
    }

    def __init__(self, config: SigLIPConfig, models: Models, encoders: bool = True) -> None:
        self.config = config
        self.compute_dtype = torch.float32
        self.token_shape = siglip.token_shape(models)
        if config.image_view == "whole":
            self.inputs = {**self.inputs, "whole": Input("image", PICTURES, crop="whole")}
        made = projector.build_projector(
            config.projector, self.token_shape[1], sd_unet.context_width(models), config.projector_layers,
            config.projector_hidden,
        )  # fmt: skip
        self.network = sd_unet.build_unet(models, made, "scratch" if config.unet == "from_scratch" else "pretrained")
        self.frozen = nn.ModuleDict({"vae": autoencoder_kl.build_autoencoder(models, autoencoder_kl.TINY_KL_4)})
        self.encoders = nn.ModuleDict({"image": siglip.build_image_encoder(models)} if encoders else {})
        for parameters in self.param_groups().values():
            for parameter in parameters:
                parameter.requires_grad_(True)
        self.alphas = scaled_linear_alphas()  # float64 [1000]

    def fsdp_units(self) -> list[nn.Module]:
        return sd_unet.fsdp_units(self.network)

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        groups = sd_unet.split_parameters(self.network)
        return {name: groups[name] for name in groups if name == "projector" or self.config.unet != "frozen"}

    def encode(self, batch: Batch, group: str) -> Features:
        if group == "target":
            mean, std = autoencoder_kl.encode_moments(self.frozen["vae"], batch.images("image"))
            return {"latents_mean": mean, "latents_std": std}
        return {"image": self._encode_image(batch.images("whole" if "whole" in batch.columns else "image"))}

    def encode_requests(self, requests: list[Any], size: tuple[int, int]) -> Encoded:
        settings = [self.setting(request, size) for request in requests]
        return Encoded({"image": torch.cat([self._tokens(setting) for setting in settings])}, {}, settings)

    def null(self) -> Features:
        """All-zero tokens [1, N, D], which the projector turns to an all-zero context."""
        return {"image": torch.zeros(1, self.config.num_tokens, self.token_shape[1])}

    def loss(self, features: Features, null: Features, draws: Draws) -> Loss:
        mean, std = features["latents_mean"], features["latents_std"]
        latents = mean + std * draws.normal("latents", mean.shape[1:])
        t = index_from_uniform(draws.uniform("t"), NUM_TIMES)
        shift = draws.normal("noise_offset", (mean.shape[1], 1, 1))
        noise = offset_noise(draws.normal("noise", mean.shape[1:]), shift, self.config.noise_offset)
        tokens = drop(features["image"], null["image"], draws.uniform("drop_image"), self.config.drop_image)
        x_t = add_noise(latents, noise, self.alphas.to(t.device)[t])
        prediction = sd_unet.predict(self.network, x_t, t, tokens, self.compute_dtype)
        return Loss((prediction - noise).square().flatten(1).mean(1), t.float() / NUM_TIMES)

    def sample(self, requests: Encoded, null: Features, draws: Draws) -> Images:
        setting, scales = requests.settings[0], [s["guidance"] for s in requests.settings]
        shape = (self.network.config.in_channels, setting["height"] // 8, setting["width"] // 8)
        owner = [row for row, own in enumerate(scales) for _ in own]  # a picture for every scale
        noise, tokens = draws.normal("noise", shape)[owner], requests.conditions["image"][owner]
        scale = torch.tensor([scale for own in scales for scale in own], device=noise.device).view(-1, 1, 1, 1)
        both = torch.cat([null["image"].to(tokens).expand_as(tokens), tokens])

        def epsilon(x: Tensor, t: Tensor) -> Tensor:
            if not setting["guided"]:
                return sd_unet.predict(self.network, x, t, tokens, self.compute_dtype)
            stacked = sd_unet.predict(self.network, x.repeat(2, 1, 1, 1), t.repeat(2), both, self.compute_dtype)
            without, with_image = stacked.chunk(2)
            return without + scale * (with_image - without)

        latents = sample_noise(epsilon, noise, setting["steps"], setting["sampler"])
        return autoencoder_kl.decode_latents(self.frozen["vae"], latents)

    def setting(self, request: SigLIPRequest, size: tuple[int, int]) -> dict[str, Any]:
        setting = {**dataclasses.asdict(request), "prompt": ""}
        defaults = {"height": size[0], "width": size[1], "guidance": self.config.guidance}
        setting |= {key: value for key, value in defaults.items() if setting[key] is None}
        if isinstance(request.guidance, list):
            setting["pictures"] = [f"scale_{scale:g}" for scale in request.guidance]
        else:
            setting["guidance"] = [setting["guidance"]]
        check_setting(setting, self.size_multiple, ("guidance",))
        if request.embedding is not None:
            self._load(setting)
        setting["guided"] = any(scale != 1 for scale in setting["guidance"])
        return setting

    def _tokens(self, setting: dict[str, Any]) -> Tensor:
        """What a request shows, [1, N, D]: its picture as training would have seen it, its embedding, or the null."""
        if setting["embedding"] is not None:
            return self._load(setting)
        if setting["reference"] is None:
            return self.null()["image"]
        crop: Literal["shared", "whole"] = "whole" if self.config.image_view == "whole" else "shared"
        try:
            pixels = decode_image(Path(setting["reference"]).read_bytes(), setting["height"], setting["width"], crop)
        except (OSError, ValueError) as error:
            raise _unreadable(setting, "reference", error) from None
        return self._encode_image(torch.from_numpy(pixels)[None]).cpu().float()

    def _load(self, setting: dict[str, Any]) -> Tensor:
        try:
            return siglip.load_tokens(Path(setting["embedding"]), self.config.num_tokens, self.token_shape)
        except (OSError, ValueError) as error:
            raise _unreadable(setting, "embedding", error) from None

    def _encode_image(self, images: Tensor) -> Tensor:
        return siglip.encode_image(self.encoders["image"], images, self.config.num_tokens)


def _unreadable(setting: dict[str, Any], key: str, error: Exception) -> ValueError:
    return ValueError(f"request {setting['name']!r}: {key} {setting[key]!r}: {error}")


RECIPE = SigLIPProjector
