"""Stable Diffusion 3's transformer (arXiv 2403.03206), as the frozen half of a network that decomposes its text.

The class is diffusers'; what is trained stands beside it, not in it.
"""

from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from synthos.batch import Features
from synthos.models.decomposer import Decomposer, initial_values
from synthos.models.meta import meta_parameters
from synthos.models.parts import Models
from synthos.models.tensors import tensor_files
from synthos.models.tiny import Tiny

POSITIONS = "pos_embed.pos_embed"  # a table in the files that is no parameter


def _loud_texts(module: nn.Module) -> None:
    """A random transformer hardly listens to its text; trained ones do."""
    for name, parameter in module.named_parameters():
        if name.endswith(("norm1.linear.weight", "attn.add_v_proj.weight")):
            parameter.mul_(5)


TINY_TRANSFORMER = Tiny(
    "SD3Transformer2DModel",
    {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 3,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "joint_attention_dim": 32,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 24,
        "pos_embed_max_size": 32,
        "dual_attention_layers": [0, 1],
        "qk_norm": "rms_norm",
    },
    init=_loud_texts,
)


class ComponentTransformer(nn.Module):
    """A transformer that is run on each component of a text, and the decomposer that finds them.

    Attributes:
        transformer: SD3Transformer2DModel, frozen; its config is that of this module too.
        decomposer: maps a text's states [B, L, D] to components [B, N, T, D].
    """

    def __init__(self, transformer: Any, decomposer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        self.decomposer = decomposer

    @property
    def config(self) -> Any:
        return self.transformer.config

    def forward(
        self,
        text: Tensor | None = None,
        components: Tensor | None = None,
        x_t: Tensor | None = None,
        t: Tensor | None = None,
        clip: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Components [B, N, T, D] and the velocity under each of them [B, N, C, h, w].

        Either a `text` to decompose, or `components` that are found already: a whole text [B, 1, L, D] is one.

        Args:
            text: T5 states [B, L, D].
            components: [B, N, T, D].
            x_t: noised latents [B, C, h, w]; None to find the components alone.
            t: times in [0, 1000], float32 [B].
            clip: CLIP states [B, M, at most D], which stand before every component, filled up with zeros.
            pooled: [B, P].
        """
        found: Tensor = self.decomposer(text) if components is None else components
        if x_t is None:
            return found, None
        assert t is not None and clip is not None and pooled is not None
        count = found.shape[1]
        clip = nn.functional.pad(clip, (0, found.shape[-1] - clip.shape[-1]))  # [B, M, D]
        context = torch.cat([clip.unsqueeze(1).expand(-1, count, -1, -1), found], dim=2)  # [B, N, M + T, D]
        x_t, t, pooled = (value.repeat_interleave(count, 0) for value in (x_t, t, pooled))  # [B N, ...]
        velocity = self.transformer(
            hidden_states=x_t,
            timestep=t,
            encoder_hidden_states=context.flatten(0, 1),
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return found, velocity.unflatten(0, (-1, count))


def build_network(
    models: Models, num_components: int, num_tokens: int, width: int, num_heads: int, num_layers: int
) -> Any:
    """The part `transformer` behind a fresh decomposer (see `Decomposer` for its sizes), which alone is trainable.

    Raises ValueError for a width that is not the transformer's.
    """
    transformer = build_transformer(models)
    expected = transformer.config.joint_attention_dim
    if width != expected:
        raise ValueError(f"recipe.width: {width} is not allowed; model.parts.transformer reads texts of width "
                         f"{expected}")  # fmt: skip
    with meta_parameters():
        decomposer = Decomposer(num_components, num_tokens, width, num_heads, num_layers)
    network = ComponentTransformer(transformer, decomposer.to("meta")).eval()
    models.compose("decomposer", network)
    models.extend(network, initial_values(decomposer, models.seed, "decomposer."))
    decomposer.requires_grad_(True)
    return network


def build_transformer(models: Models) -> Any:
    """The part `transformer`, frozen. Its table of positions is the files', and on the meta device without them."""
    folder = None if models.meta_only else models.folder("transformer", TINY_TRANSFORMER)
    with torch.device("meta"):  # else the table would be computed: for SD3.5, seconds and gigabytes
        transformer: Any = models.build("transformer", TINY_TRANSFORMER)
    if folder is not None:
        with safe_open(tensor_files(folder)[POSITIONS], "pt") as file:
            transformer.pos_embed.pos_embed = file.get_tensor(POSITIONS)
    return transformer


def find_components(
    network: nn.Module, prompts: list[Features], row: Tensor, part: Tensor, dtype: torch.dtype
) -> Features:
    """What `predict` is given for the component `part` of the prompt `row`, each int64 [K], under all of `prompts`.

    Args:
        prompts: features of as many prompts each: one for every branch of guidance.
        dtype: of the computation.

    Returns:
        `components` [branches x K, 1, T, D], `clip` and `pooled`, one branch after the other.
    """
    prompt = {name: torch.cat([branch[name] for branch in prompts]).to(dtype) for name in prompts[0]}
    found = network(text=prompt["text"])[0]  # [branches x R, N, T, D]
    rows = torch.cat([row + index * len(found) // len(prompts) for index in range(len(prompts))])
    components = found[rows, part.repeat(len(prompts))].unsqueeze(1)
    return {"components": components, "clip": prompt["clip"][rows], "pooled": prompt["pooled"][rows]}


def predict(
    network: nn.Module,
    x_t: Tensor,
    t: Tensor,
    condition: dict[str, Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Components [B, N, T, D] and velocities float32 [B, N, C, h, w] at `x_t` [B, C, h, w] and times `t` [B].

    Args:
        condition: `clip`, `pooled`, and either `text` or `components`, as `ComponentTransformer` takes them.
        dtype: of the computation; times stay float32, since bfloat16 cannot tell 998 from 999.
    """
    inputs = {name: value.to(dtype) for name, value in condition.items()}
    components, velocities = network(x_t=x_t.to(dtype), t=t.float(), **inputs)
    return components, velocities.float()


@torch.no_grad()
def teach(network: nn.Module, x_t: Tensor, t: Tensor, prompt: Features, dtype: torch.dtype) -> Tensor:
    """The frozen transformer's velocity under the whole prompt, float32 [B, C, h, w]; arguments as of `predict`."""
    whole = {"components": prompt["text"].unsqueeze(1), "clip": prompt["clip"], "pooled": prompt["pooled"]}
    return predict(network, x_t, t, whole, dtype)[1].squeeze(1)
