"""A long prompt split into component prompts, for SD3.5-medium: the transformer runs on each, and they are averaged.

Learned: a resampler that maps one long T5 sequence to N short ones (`synthos/models/decomposer.py`), without labels of
what belongs to which. Frozen: the transformer, through which the gradient flows once for each component, the VAE, and
the three text encoders. CLIP's states and pooled vector are the same for every component.

Flow matching (arXiv 2210.02747) with SD3's noise levels (arXiv 2403.03206): x_t = (1 - s) x_0 + s n, s from a density
on the shifted grid. With components c_i of the prompt c, the prediction is a mean, as of a conjunction of concepts
(arXiv 2206.01714), which keeps the velocity's scale and is the base model's where all components agree:
v = 1/N sum_i v(x_t, s, c_i). Losses, weighted by w(s), both in velocities or both in latents x_t - s v (a factor s^2):
diff = mean (v - (n - x_0))^2, and kd = mean (v - v(x_t, s, c))^2 with the same transformer on the whole prompt.
A dropped prompt is the empty one, decomposed as well; guidance: v = 1/N sum_i [u_i + g (v_i - u_i)].

    python launch/submit.py recipe=decomposer data.shards='/data/captioned/{00000..00099}.tar'
    python launch/submit.py recipe=decomposer model=tiny data=photos cluster=debug recipe.num_heads=4
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from synthos.batch import Batch, Feature, Features, Input
from synthos.diffusion import densities
from synthos.diffusion.composition import guided_mean, trajectories
from synthos.diffusion.dropout import drop, replace
from synthos.diffusion.noising import interpolate, velocity_target
from synthos.diffusion.sampling import sample_flow
from synthos.diffusion.timesteps import index_from_uniform, shifted_grid
from synthos.keys import Draws
from synthos.models import autoencoder_kl, sd3, sd3_text
from synthos.models.decomposer import mean_cosine
from synthos.models.parts import Models
from synthos.recipes.base import Encoded, Images, Loss, check_setting

PROMPT = ("text", "clip", "pooled")  # the features of a prompt, dropped together
PROMPTS = {
    "prompt": "embedding",
    "negative_prompt": "embedding_negative",
}  # of a request: as text, or encoded in a file


@dataclass(frozen=True)
class DecomposerConfig:
    num_components: int  # N
    num_tokens: int  # of each component
    width: int | Literal["t5"]  # of the resampler; t5: that of T5's states, and no other is possible
    num_heads: int  # of the resampler's attention
    num_layers: int  # of the resampler
    text_length: int  # T5 tokens; every prompt is cut or padded to exactly this many
    clip_text: sd3_text.ClipText  # cut or segments: CLIP sees the first 77 tokens, or every sentence by itself
    clip_length: int  # CLIP tokens in the transformer's context
    shift: float  # of the noise levels, in training and sampling
    density: densities.Density  # logit_normal, mode, cosmap or sigma_sqrt: the noise levels; the last two are weights
    logit_mean: float  # of logit_normal
    logit_std: float  # of logit_normal
    mode_scale: float  # of mode
    space: Literal["velocity", "x0"]  # of both losses
    diff_weight: float  # of the loss against the data; 0: off
    kd_weight: float  # of that against the frozen transformer on the whole prompt; 0: off
    drop_text: float  # probability that a prompt becomes the empty one, for CLIP and T5
    guidance: float  # scale where a request names none

    def __post_init__(self) -> None:
        counts = "num_components num_tokens num_heads num_layers text_length clip_length shift logit_std"
        for name in (*counts.split(), "logit_mean", "guidance"):
            low, value = 0 if name in counts else -math.inf, getattr(self, name)
            if not low < value < math.inf:
                raise ValueError(f"recipe.{name}: {value} is not allowed; expected a number above {low}")
        weights = self.diff_weight, self.kd_weight
        if not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
            said = "{} and {} are not allowed; expected numbers 0 or more, one of them above 0".format(*weights)
            raise ValueError(f"recipe.diff_weight, recipe.kd_weight: {said}")
        if not -1 <= self.mode_scale <= densities.MODE_SCALE:
            raise ValueError(
                f"recipe.mode_scale: {self.mode_scale} is not allowed; expected -1 to {densities.MODE_SCALE}"
            )
        sd3_text.check_clip(self.clip_text, self.clip_length)


@dataclass(frozen=True)
class DecomposerRequest:
    """A picture asked for, or a set of them. What is null is the recipe's default, or the training size."""

    name: str
    prompt: str = ""
    negative_prompt: str = ""  # decomposed like the prompt
    embedding: str | None = None  # .safetensors file of the encoded prompt: t5, clip, pooled
    embedding_negative: str | None = None  # the same of the negative prompt; null: the empty one, as in training
    max_sequence_length: int | None = None  # T5 tokens, at most those of training, which are the default
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    steps: int = 20
    sampler: Literal["euler", "unipc"] = "euler"
    guidance: float | None = None
    seed: int = 0
    component: int | None = None  # 0 to N - 1: this component alone; null: all of them, composed
    save_components: bool = False  # beside the composition stands each component alone, from the same noise

    def __post_init__(self) -> None:
        for key, embedding in (*PROMPTS.items(), *(("max_sequence_length", e) for e in PROMPTS.values())):
            if getattr(self, key) and getattr(self, embedding) is not None:
                raise ValueError(f"request {self.name!r}: {key} and {embedding} are both set; expected one of them")

    @property
    def is_encoded(self) -> bool:
        return self.embedding is not None and not self.negative_prompt


class DecomposerRecipe:
    Config: ClassVar[type] = DecomposerConfig
    Request: ClassVar[type] = DecomposerRequest
    from_split: ClassVar[dict[str, Any]] = {"save_components": True}
    size_multiple: ClassVar[int] = 16  # 8 for the VAE, 2 for the transformer's patches
    inputs: ClassVar[dict[str, Input]] = {
        "image": Input("image", ("jpg", "jpeg", "png", "webp", "avif")),
        "text": Input("text", ("txt",)),
    }
    features: ClassVar[dict[str, Feature]] = {
        "latents": Feature("target", torch.float32),
        **{name: Feature("text", torch.bfloat16) for name in PROMPT},
    }

    def __init__(self, config: DecomposerConfig, models: Models, encoders: bool = True) -> None:
        self.config = config
        self.compute_dtype = torch.float32
        width = sd3_text.t5_width(models) if config.width == "t5" else config.width
        sizes = config.num_components, config.num_tokens, width, config.num_heads, config.num_layers
        self.network = sd3.build_network(models, *sizes)
        self.shapes = sd3_text.prompt_shapes(models, config.text_length, config.clip_length)
        self.frozen = nn.ModuleDict({"vae": autoencoder_kl.build_autoencoder(models)})
        self.encoders = nn.ModuleDict()
        if encoders:
            self.encoders["clip_l"], self.encoders["clip_g"] = sd3_text.build_clips(models)
            self.encoders["t5"] = sd3_text.build_t5(models)
            self.tokenizers = None if models.meta_only else sd3_text.load_tokenizers(models)
        self.grid = shifted_grid(1000, config.shift)  # float64 [1000], descending
        self.weight = densities.weights(config.density, self.grid)  # float64 [1000]

    def fsdp_units(self) -> list[nn.Module]:
        return [*self.network.decomposer.layers, self.network.decomposer, *self.network.transformer.transformer_blocks]

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"decomposer": list(self.network.decomposer.parameters())}

    def encode(self, batch: Batch, group: str) -> Features:
        if group == "target":
            return {"latents": autoencoder_kl.encode_latents(self.frozen["vae"], batch.images("image"))}
        return self._encode_text(batch.texts("text"))

    def encode_requests(self, requests: list[Any], size: tuple[int, int]) -> Encoded:
        settings = [self.setting(request, size) for request in requests]
        both = [[self._prompt(setting, key) for setting in settings] for key in PROMPTS]
        prompts, negatives = ({name: torch.cat([one[name] for one in side]) for name in PROMPT} for side in both)
        return Encoded(prompts, negatives, settings)

    def null(self) -> Features:
        """The empty prompt as each encoder has it, [1, ...]."""
        return self._encode_text([""])

    def loss(self, features: Features, null: Features, draws: Draws) -> Loss:
        latents, config = features["latents"], self.config
        form = config.logit_mean, config.logit_std, config.mode_scale
        index = index_from_uniform(densities.place(config.density, draws.uniform("t"), *form), len(self.grid))
        sigma, weight = (table.to(index.device)[index].to(latents) for table in (self.grid, self.weight))
        noise, dropped = draws.normal("noise", latents.shape[1:]), draws.uniform("drop_text")
        prompt = {name: drop(features[name], null[name], dropped, config.drop_text) for name in PROMPT}
        x_t, targets = interpolate(latents, noise, sigma), {"diff": velocity_target(latents, noise)}
        if config.kd_weight:
            targets["kd"] = sd3.teach(self.network, x_t, 1000 * sigma, prompt, self.compute_dtype)
        components, velocities = sd3.predict(self.network, x_t, 1000 * sigma, prompt, self.compute_dtype)
        scale = weight * sigma.square() if config.space == "x0" else weight
        errors = {name: (velocities.mean(1) - target).square() for name, target in targets.items()}
        parts = {name: scale * error.flatten(1).mean(1) for name, error in errors.items()}  # each [B]
        total = sum((getattr(config, f"{name}_weight") * part for name, part in parts.items()), torch.zeros_like(sigma))
        if config.num_components > 1:
            parts["component_cosine"] = mean_cosine(components)
        return Loss(total, sigma, {name: part.detach() for name, part in parts.items()})

    def sample(self, requests: Encoded, null: Features, draws: Draws) -> Images:
        setting, settings, device = requests.settings[0], requests.settings, requests.conditions["text"].device
        picture, row, part, owner = trajectories([s["shown"] for s in settings], device)
        branches, scale = [requests.conditions], None
        if setting["guided"]:
            trained = torch.tensor([s["as_trained"] for s in settings], device=device)
            branches.insert(0, {name: replace(v, null[name], trained) for name, v in requests.negatives.items()})
            scale = torch.tensor([s["guidance"] for s in settings], device=device)[row]
        branches = [branch | {"text": branch["text"][:, : setting["max_sequence_length"]]} for branch in branches]
        context = sd3.find_components(self.network, branches, row, part, self.compute_dtype)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            x, t = (torch.cat([value[picture]] * len(branches)) for value in (x, t))
            v = sd3.predict(self.network, x, t, context, self.compute_dtype)[1].squeeze(1)
            return guided_mean(v, scale, picture, len(owner))

        shape = (self.network.config.in_channels, setting["height"] // 8, setting["width"] // 8)
        noise = draws.normal("noise", shape)[owner]  # one for all pictures of a request
        latents = sample_flow(velocity, noise, setting["steps"], self.config.shift, setting["sampler"])
        return autoencoder_kl.decode_latents(self.frozen["vae"], latents)

    def setting(self, request: DecomposerRequest, size: tuple[int, int]) -> dict[str, Any]:
        setting, length, scale = dataclasses.asdict(request), self.config.text_length, self.config.guidance
        defaults = {"height": size[0], "width": size[1], "guidance": scale, "max_sequence_length": length}
        setting |= {key: value for key, value in defaults.items() if setting[key] is None}
        named, every = f"request {request.name!r}", list(range(self.config.num_components))
        check_setting(setting, self.size_multiple, ("guidance",), 16 * self.network.config.pos_embed_max_size)
        if not 1 <= (asked := setting["max_sequence_length"]) <= length:
            raise ValueError(f"{named}: max_sequence_length {asked} is not allowed; expected 1 to {length}, as trained")
        if request.component is not None and (request.save_components or request.component not in every):
            allowed = "null with save_components" if request.save_components else f"0 to {every[-1]}, or null"
            raise ValueError(f"{named}: component {request.component} is not allowed; expected {allowed}")
        setting["guided"] = setting["guidance"] != 1
        for key, embedding in PROMPTS.items():
            if key == "negative_prompt" and not setting["guided"] and (setting[key] or setting[embedding]):
                said = key if setting[key] else embedding
                raise ValueError(f"{named}: {said} has no effect with guidance 1; expected none, or another scale")
            self._load(setting, embedding)
        setting["as_trained"] = request.is_encoded and request.embedding_negative is None  # the negative prompt
        setting["shown"] = [every if request.component is None else [request.component]]  # components of each picture
        if request.save_components:
            setting["pictures"] = ["compose", *(f"component_{i}" for i in every)]
            setting["shown"] += [[i] for i in every]
        return setting

    def _prompt(self, setting: dict[str, Any], key: str) -> Features:
        """One of a request's two prompts, each [1, ...]; zeros for one that `sample` takes from training, or leaves."""
        if found := self._load(setting, PROMPTS[key]):
            return found
        if key == "negative_prompt" and (setting["as_trained"] or not setting["guided"]):
            return {name: torch.zeros(1, *shape) for name, shape in self.shapes.items()}
        return self._encode_text([setting[key]], setting["max_sequence_length"])

    def _load(self, setting: dict[str, Any], key: str) -> Features:
        """The prompt in the file that a request names; nothing where it names none."""
        try:
            return sd3_text.load_prompt(Path(setting[key]), self.shapes) if setting[key] is not None else {}
        except (OSError, ValueError) as error:
            raise ValueError(f"request {setting['name']!r}: {key} {setting[key]!r}: {error}") from None

    def _encode_text(self, texts: list[str], length: int | None = None) -> Features:
        assert self.tokenizers is not None
        full, clip = self.config.text_length, (self.config.clip_text, self.config.clip_length)
        return sd3_text.encode_prompts(self.encoders, self.tokenizers, texts, length or full, *clip, filled_to=full)


RECIPE = DecomposerRecipe
