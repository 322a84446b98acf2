"""Image to image through CLIP tokens: Wan2.1-T2V-1.3B learns to redraw a picture it sees only as image tokens.

Learned: a projector from CLIP's penultimate states to the transformer's width (`train: projector`), with it every
block's keys and values for image tokens (`image_attention`), or the whole transformer (`full`). Image tokens share the
text's keys, values and softmax (`attention: shared_kv`) or have their own (`decoupled`, which starts as exactly the
base model). Frozen: umT5, CLIP, the VAE, and what of the transformer does not learn, through whose activations the
gradient still flows. Sampling starts from pure noise; no latent of the reference is ever given.

Flow matching (arXiv 2210.02747): x_t = (1 - s) x_0 + s n, target n - x_0, s uniform on 1000 points of the shift-5 grid,
loss w(t) mean((prediction - target)^2), w a bell of mean 1 or uniform. Text and image are dropped independently, to the
empty prompt's states and to zero tokens, so that guidance has two scales:
v = v(0, 0) + g_image [v(0, image) - v(0, 0)] + g_text [v(text, image) - v(0, image)].

    python launch/submit.py recipe=i2i data.shards='/data/contrastyles/{00000..00013}.tar'
    python launch/submit.py recipe=i2i model=tiny data=photos cluster=debug
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
from synthos.diffusion.dropout import drop
from synthos.diffusion.guidance import two_scale
from synthos.diffusion.noising import interpolate, velocity_target
from synthos.diffusion.sampling import sample_flow
from synthos.diffusion.timesteps import index_from_uniform, shifted_grid
from synthos.diffusion.weights import bell_weights
from synthos.keys import Draws
from synthos.models import autoencoder, clip, text, wan
from synthos.models.parts import Models
from synthos.recipes.base import Encoded, Images, Loss, check_setting


@dataclass(frozen=True)
class I2IConfig:
    train: Literal["projector", "image_attention", "full"]  # what learns
    attention: Literal["shared_kv", "decoupled"]  # image tokens share the text's keys and values, or have their own
    image_preprocess: Literal["squash", "crop"]  # of the training crop to the image encoder's square
    text_length: int  # tokens; every prompt is padded to exactly this many
    shift: float  # of the noise levels, in training and sampling
    loss_weight: Literal["bell", "uniform"]  # over time; the bell is zero at pure noise, where layout is decided
    drop_text: float  # probability
    drop_image: float  # probability, independent of drop_text
    guidance_text: float  # scale where a request names none
    guidance_image: float  # scale where a request names none

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise ValueError(f"recipe.shift: {self.shift} is not allowed; expected a number above 0")
        for key in ("guidance_text", "guidance_image"):
            if not math.isfinite(getattr(self, key)):
                raise ValueError(f"recipe.{key}: {getattr(self, key)} is not allowed; expected a finite number")
        if self.text_length < 1:
            raise ValueError(f"recipe.text_length: {self.text_length} is not allowed; expected 1 or more tokens")
        if self.attention == "decoupled" and self.text_length != wan.TEXT_LENGTH:
            raise ValueError(
                f"recipe.text_length: {self.text_length} is not allowed with recipe.attention=decoupled, whose blocks "
                f"take all but the last {wan.TEXT_LENGTH} tokens for the image; expected {wan.TEXT_LENGTH}"
            )
        if self.train == "image_attention" and self.attention != "decoupled":
            raise ValueError(
                f"recipe.train: image_attention is not allowed with recipe.attention={self.attention}, which has no "
                "keys and values for the image; expected recipe.attention=decoupled, or recipe.train=projector or full"
            )


@dataclass(frozen=True)
class I2IRequest:
    """One picture asked for. What is null is the recipe's default, or the training size."""

    name: str
    prompt: str = ""
    reference: str | None = None  # picture file
    negative_prompt: str = ""  # stands for the null text in the unguided branches
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    steps: int = 20
    sampler: Literal["euler", "unipc"] = "euler"
    guidance_text: float | None = None
    guidance_image: float | None = None
    seed: int = 0


class I2I:
    Config: ClassVar[type] = I2IConfig
    Request: ClassVar[type] = I2IRequest
    from_split: ClassVar[dict[str, Any]] = {}
    size_multiple: ClassVar[int] = 16  # 8 for the VAE, 2 for the transformer's patches
    inputs: ClassVar[dict[str, Input]] = {
        "image": Input("image", ("jpg", "jpeg", "png", "webp", "avif")),
        "text": Input("text", ("txt",)),
    }
    features: ClassVar[dict[str, Feature]] = {
        "latents": Feature("target", torch.float32),
        "image": Feature("image", torch.bfloat16),
        "text": Feature("text", torch.bfloat16, ragged=True),
    }

    def __init__(self, config: I2IConfig, models: Models, encoders: bool = True) -> None:
        self.config = config
        self.compute_dtype = torch.float32
        fresh = config.train != "projector"  # alone, the projector can't learn through values of zero
        self.network = wan.build_transformer(models, clip.image_width(models), config.attention, fresh)
        self.frozen = nn.ModuleDict({"vae": autoencoder.build_autoencoder(models)})
        self.encoders = nn.ModuleDict()
        if encoders:
            self.encoders["text"] = text.build_text_encoder(models)
            self.encoders["image"] = clip.build_image_encoder(models)
            self.tokenizer = None if models.meta_only else text.load_tokenizer(models)
        for parameters in self.param_groups().values():
            for parameter in parameters:
                parameter.requires_grad_(True)
        self.grid = shifted_grid(1000, config.shift)  # float64 [1000], descending
        bell = config.loss_weight == "bell"
        self.weight = bell_weights(1000 * self.grid) if bell else torch.ones_like(self.grid)  # float64 [1000]

    def fsdp_units(self) -> list[nn.Module]:
        return [self.projector, *self.network.blocks]

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        groups = wan.split_parameters(self.network)
        trained = {"projector": ["projector"], "image_attention": ["projector", "image_attention"], "full": [*groups]}
        return {name: groups[name] for name in trained[self.config.train]}

    @property
    def projector(self) -> nn.Module:
        found: nn.Module = self.network.get_submodule(wan.PROJECTOR)
        return found

    def encode(self, batch: Batch, group: str) -> Features:
        if group == "target":
            return {"latents": autoencoder.encode_latents(self.frozen["vae"], batch.images("image"))}
        if group == "image":
            return {"image": self._encode_image(batch.images("image"))}
        return {"text": self._encode_text(batch.texts("text"))}

    def encode_requests(self, requests: list[Any], size: tuple[int, int]) -> Encoded:
        settings = [self.setting(request, size) for request in requests]
        nothing = self.null()["image"]
        image = [self._encode_image(picture) if picture is not None else nothing for picture in map(_picture, settings)]
        conditions = {"text": self._encode_text([s["prompt"] for s in settings]), "image": torch.cat(image)}
        negatives = {"text": self._encode_text([s["negative_prompt"] for s in settings])}
        return Encoded(conditions, negatives, settings)

    def null(self) -> Features:
        """The empty prompt's states [1, N, D], and all-zero image tokens [1, N, D] as they enter the projector."""
        return {"text": self._encode_text([""]), "image": clip.zero_tokens(self.encoders["image"])}

    def loss(self, features: Features, null: Features, draws: Draws) -> Loss:
        latents = features["latents"]
        index = index_from_uniform(draws.uniform("t"), len(self.grid))
        sigma, weight = (table.to(index.device)[index].to(latents) for table in (self.grid, self.weight))
        noise = draws.normal("noise", latents.shape[1:])
        context = {
            name: drop(features[name], null[name], draws.uniform(f"drop_{name}"), probability)
            for name, probability in (("text", self.config.drop_text), ("image", self.config.drop_image))
        }
        x_t, target = interpolate(latents, noise, sigma), velocity_target(latents, noise)
        prediction = wan.predict(self.network, x_t, 1000 * sigma, **context, dtype=self.compute_dtype)
        squared = (prediction - target).square().flatten(1).mean(1)  # [B]
        return Loss(weight * squared, sigma, {"velocity_mse": squared.detach()})

    def sample(self, requests: Encoded, null: Features, draws: Draws) -> Images:
        setting, text, image = requests.settings[0], requests.conditions["text"], requests.conditions["image"]
        noise = draws.normal(
            "noise", (self.network.config.in_channels, 1, setting["height"] // 8, setting["width"] // 8)
        )
        no_text, no_image = requests.negatives["text"], null["image"].expand_as(image)
        branches = setting["guided"]
        if branches:
            text = torch.cat([no_text, no_text, text][-branches:])
            image = torch.cat([no_image, image, image][-branches:])
        scale_image, scale_text = (
            torch.tensor([s[key] for s in requests.settings], device=noise.device)
            for key in ("guidance_image", "guidance_text")
        )

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            if not branches:
                return wan.predict(self.network, x, t, text, image, self.compute_dtype)
            x, t = x.repeat(branches, 1, 1, 1, 1), t.repeat(branches)
            *v_null, v_image, v_both = wan.predict(self.network, x, t, text, image, self.compute_dtype).chunk(branches)
            return two_scale(v_null[0] if v_null else v_image, v_image, v_both, scale_image, scale_text)

        latents = sample_flow(velocity, noise, setting["steps"], self.config.shift, setting["sampler"])
        return autoencoder.decode_latents(self.frozen["vae"], latents)

    def _encode_image(self, images: Tensor) -> Tensor:
        return clip.encode_image(self.encoders["image"], images, self.config.image_preprocess)

    def _encode_text(self, texts: list[str]) -> Tensor:
        return text.encode_text(self.encoders["text"], self.tokenizer, texts, self.config.text_length)

    def setting(self, request: I2IRequest, size: tuple[int, int]) -> dict[str, Any]:
        setting = dataclasses.asdict(request)
        defaults = {"height": size[0], "width": size[1], "guidance_text": self.config.guidance_text,
                    "guidance_image": self.config.guidance_image}  # fmt: skip
        setting |= {key: value for key, value in defaults.items() if setting[key] is None}
        check_setting(setting, self.size_multiple, ("guidance_text", "guidance_image"))
        setting["guided"] = (
            3 if setting["guidance_image"] != 1 else 2 if setting["guidance_text"] != 1 else 0
        )  # branches
        if setting["negative_prompt"] and not setting["guided"]:
            raise ValueError(
                f"request {request.name!r}: negative_prompt has no effect where both guidance scales are 1; expected "
                "none, or guidance_text or guidance_image other than 1"
            )
        return setting


def _picture(setting: dict[str, Any]) -> Tensor | None:
    """The reference as training would have cropped it, uint8 [1, 3, H, W]."""
    if setting["reference"] is None:
        return None
    try:
        pixels = decode_image(Path(setting["reference"]).read_bytes(), setting["height"], setting["width"], "shared")
    except (OSError, ValueError) as error:
        raise ValueError(f"request {setting['name']!r}: reference {setting['reference']!r}: {error}") from None
    return torch.from_numpy(pixels)[None]


RECIPE = I2I
