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
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from synthos.batch import Batch, Feature, Features, Input
from synthos.diffusion import densities
from synthos.diffusion.composition import mean_by
from synthos.diffusion.dropout import drop
from synthos.diffusion.noising import interpolate, velocity_target
from synthos.diffusion.sampling import sample_flow
from synthos.diffusion.timesteps import index_from_uniform, shifted_grid
from synthos.keys import Draws
from synthos.models import autoencoder_kl, sd3, sd3_text
from synthos.models.decomposer import mean_cosine
from synthos.models.parts import Models
from synthos.recipes.base import Encoded, Images, Loss, check_setting

PROMPT = ("text", "clip", "pooled")  # the features of a prompt, dropped together
MODE_SCALE = 1.75  # at most; the density has an inverse from -1 to 2 / (pi - 2) = 1.7519...


@dataclass(frozen=True)
class DecomposerConfig:
    num_components: int  # N
    num_tokens: int  # of each component
    width: int | Literal["t5"]  # of the resampler; t5: that of T5's states, and no other is possible
    num_heads: int  # of the resampler's attention
    num_layers: int  # of the resampler
    text_length: int  # T5 tokens; every prompt is cut or padded to exactly this many
    clip_text: Literal["cut", "segments"]  # CLIP sees the first 77 tokens, or every sentence by itself
    clip_length: int  # CLIP tokens in the transformer's context
    shift: float  # of the noise levels, in training and sampling
    density: Literal["logit_normal", "mode", "cosmap", "sigma_sqrt"]  # of the noise levels; the last two are weights
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
        if not -1 <= self.mode_scale <= MODE_SCALE:
            raise ValueError(f"recipe.mode_scale: {self.mode_scale} is not allowed; expected -1 to {MODE_SCALE}")
        if self.clip_text == "cut" and self.clip_length != sd3_text.CLIP_LENGTH:
            raise ValueError(
                f"recipe.clip_length: {self.clip_length} is not allowed with recipe.clip_text=cut; expected "
                f"{sd3_text.CLIP_LENGTH}, or recipe.clip_text=segments"
            )


@dataclass(frozen=True)
class DecomposerRequest:
    """One picture asked for. What is null is the recipe's default, or the training size."""

    name: str
    prompt: str = ""
    negative_prompt: str = ""  # decomposed like the prompt
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    steps: int = 20
    sampler: Literal["euler", "unipc"] = "euler"
    guidance: float | None = None
    seed: int = 0
    component: int | None = None  # 0 to N - 1: this component alone; null: all of them, composed
    save_components: bool = False  # beside the composition stands each component alone, from the same noise


class DecomposerRecipe:
    Config: ClassVar[type] = DecomposerConfig
    Request: ClassVar[type] = DecomposerRequest
    size_multiple: ClassVar[int] = 16  # 8 for the VAE, 2 for the transformer's patches
    inputs: ClassVar[dict[str, Input]] = {
        "image": Input("image", ("jpg", "jpeg", "png", "webp")),
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
        self.frozen = nn.ModuleDict({"vae": autoencoder_kl.build_autoencoder(models)})
        self.encoders = nn.ModuleDict()
        if encoders:
            self.encoders["clip_l"], self.encoders["clip_g"] = sd3_text.build_clips(models)
            self.encoders["t5"] = sd3_text.build_t5(models)
            self.tokenizers = None if models.meta_only else sd3_text.load_tokenizers(models)
        self.grid = shifted_grid(1000, config.shift)  # float64 [1000], descending
        weigh = {"cosmap": densities.cosmap_weights, "sigma_sqrt": densities.sigma_sqrt_weights}
        self.weight = weigh.get(config.density, torch.ones_like)(self.grid)  # float64 [1000]

    def fsdp_units(self) -> list[nn.Module]:
        decomposer, transformer = self.network.decomposer, self.network.transformer
        return [*decomposer.layers, decomposer, *transformer.transformer_blocks]

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"decomposer": list(self.network.decomposer.parameters())}

    def encode(self, batch: Batch, group: str) -> Features:
        if group == "target":
            return {"latents": autoencoder_kl.encode_latents(self.frozen["vae"], batch.images("image"))}
        return self._encode_text(batch.texts("text"))

    def encode_requests(self, requests: list[Any], size: tuple[int, int]) -> Encoded:
        settings = [self.setting(request, size) for request in requests]
        prompts, negatives = ([s[key] for s in settings] for key in ("prompt", "negative_prompt"))
        return Encoded(self._encode_text(prompts), self._encode_text(negatives), settings)

    def null(self) -> Features:
        """The empty prompt as each encoder has it, [1, ...]."""
        return self._encode_text([""])

    def loss(self, features: Features, null: Features, draws: Draws) -> Loss:
        latents, config = features["latents"], self.config
        index = index_from_uniform(self._level(draws.uniform("t")), len(self.grid))
        sigma, weight = (table.to(index.device)[index].to(latents) for table in (self.grid, self.weight))
        noise, dropped = draws.normal("noise", latents.shape[1:]), draws.uniform("drop_text")
        prompt = {name: drop(features[name], null[name], dropped, config.drop_text) for name in PROMPT}
        x_t = interpolate(latents, noise, sigma)
        targets = {"diff": velocity_target(latents, noise)}
        if config.kd_weight:
            targets["kd"] = self._teach(x_t, 1000 * sigma, prompt)
        components, velocities = sd3.predict(self.network, x_t, 1000 * sigma, prompt, self.compute_dtype)
        scale = weight * sigma.square() if config.space == "x0" else weight
        errors = {name: (velocities.mean(1) - target).square() for name, target in targets.items()}
        parts = {name: scale * error.flatten(1).mean(1) for name, error in errors.items()}  # each [B]
        total = sum((getattr(config, f"{name}_weight") * part for name, part in parts.items()), torch.zeros_like(sigma))
        if config.num_components > 1:
            parts["component_cosine"] = mean_cosine(components)
        return Loss(total, sigma, {name: part.detach() for name, part in parts.items()})

    def sample(self, requests: Encoded, null: Features, draws: Draws) -> Images:
        """Each request's picture; with `save_components`, the composition and then each component, side by side."""
        setting, settings, device = requests.settings[0], requests.settings, requests.conditions["text"].device
        shown = [(row, picked) for row, s in enumerate(settings) for picked in self._shown(s)]  # one trajectory each
        calls = [(number, row, i) for number, (row, picked) in enumerate(shown) for i in picked]
        trajectory, row, part = torch.tensor(calls, device=device).T  # each [K]
        branches = [requests.negatives, requests.conditions] if setting["guided"] else [requests.conditions]
        context = self._find(branches, row, part)
        scale = torch.tensor([s["guidance"] for s in settings], device=device)[row].view(-1, 1, 1, 1)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            x, t = (torch.cat([value[trajectory]] * len(branches)) for value in (x, t))
            v = sd3.predict(self.network, x, t, context, self.compute_dtype)[1].squeeze(1)
            if setting["guided"]:
                without, given = v.chunk(2)
                v = without + scale * (given - without)
            return mean_by(v, trajectory, len(shown))

        owner = torch.tensor([row for row, _ in shown], device=device)
        shape = (self.network.config.in_channels, setting["height"] // 8, setting["width"] // 8)
        noise = draws.normal("noise", shape)[owner]
        latents = sample_flow(velocity, noise, setting["steps"], self.config.shift, setting["sampler"])
        pictures = autoencoder_kl.decode_latents(self.frozen["vae"], latents)
        return torch.stack([torch.cat(list(pictures[owner == row]), dim=-1) for row in range(len(settings))])

    def _find(self, branches: list[Features], row: Tensor, part: Tensor) -> Features:
        """What the transformer is given for the component `part` of the request `row`, each [K], in every branch."""
        prompt = {name: torch.cat([branch[name] for branch in branches]).to(self.compute_dtype) for name in PROMPT}
        found = self.network(text=prompt["text"])[0]  # [branches x R, N, T, D]
        rows = torch.cat([row + index * len(found) // len(branches) for index in range(len(branches))])
        components = found[rows, part.repeat(len(branches))].unsqueeze(1)  # [branches x K, 1, T, D]
        return {"components": components, "clip": prompt["clip"][rows], "pooled": prompt["pooled"][rows]}

    def setting(self, request: DecomposerRequest, size: tuple[int, int]) -> dict[str, Any]:
        setting = dataclasses.asdict(request)
        defaults = {"height": size[0], "width": size[1], "guidance": self.config.guidance}
        setting |= {key: value for key, value in defaults.items() if setting[key] is None}
        named, last = f"request {request.name!r}", self.config.num_components - 1
        check_setting(setting, self.size_multiple, ("guidance",))
        if max(setting["height"], setting["width"]) > (largest := 16 * self.network.config.pos_embed_max_size):
            raise ValueError(f"{named}: height and width of more than {largest} are not allowed")
        if setting["negative_prompt"] and setting["guidance"] == 1:
            raise ValueError(f"{named}: negative_prompt has no effect with guidance 1; expected none, or another scale")
        if request.component is not None and (request.save_components or not 0 <= request.component <= last):
            allowed = "null with save_components" if request.save_components else f"0 to {last}, or null"
            raise ValueError(f"{named}: component {request.component} is not allowed; expected {allowed}")
        setting["guided"] = setting["guidance"] != 1
        setting["pictures"] = len(self._shown(setting))
        return setting

    def _shown(self, setting: dict[str, Any]) -> list[list[int]]:
        """The components that each picture of a request is composed of."""
        if setting["component"] is not None:
            return [[setting["component"]]]
        every = list(range(self.config.num_components))
        return [every, *([i] for i in every if setting["save_components"])]

    def _level(self, u: Tensor) -> Tensor:
        """Uniform numbers [B] to places on the grid in [0, 1): small ones are high noise."""
        if self.config.density == "logit_normal":
            return densities.logit_normal(u, self.config.logit_mean, self.config.logit_std)
        return densities.mode(u, self.config.mode_scale) if self.config.density == "mode" else u

    @torch.no_grad()
    def _teach(self, x_t: Tensor, t: Tensor, prompt: Features) -> Tensor:
        """The frozen transformer's velocity under the whole prompt, [B, C, h, w]."""
        whole = {"components": prompt["text"].unsqueeze(1), "clip": prompt["clip"], "pooled": prompt["pooled"]}
        return sd3.predict(self.network, x_t, t, whole, self.compute_dtype)[1].squeeze(1)

    def _encode_text(self, texts: list[str]) -> Features:
        assert self.tokenizers is not None
        text = sd3_text.encode_t5(self.encoders["t5"], self.tokenizers.t5, texts, self.config.text_length)
        clips = [self.encoders["clip_l"], self.encoders["clip_g"]], self.tokenizers.clips
        if self.config.clip_text == "cut":
            clip, pooled = sd3_text.encode_clips(*clips, texts)
        else:
            clip, pooled = sd3_text.encode_segments(*clips, texts, self.config.clip_length)
        return {"text": text, "clip": clip, "pooled": pooled}


RECIPE = DecomposerRecipe
