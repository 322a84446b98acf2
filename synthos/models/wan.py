"""The Wan2.1 text-to-video transformer, and what lets it read CLIP tokens: a projector, and image keys and values.

Wan2.1: arXiv 2503.20314. Classes are diffusers'; what is added has the form and names of its Wan image-to-video models,
so that diffusers reads what is exported.
"""

import math
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from synthos.models.meta import meta_parameters
from synthos.models.parts import Models
from synthos.models.tensors import Shape, Tensors, seeded
from synthos.models.tiny import Tiny

PROJECTOR = "condition_embedder.image_embedder"
TEXT_LENGTH = 512  # diffusers takes what stands before the last 512 tokens for the image where attention is decoupled
NORM, KEY, VALUE = "norm_added_k", "add_k_proj", "add_v_proj"  # of a block's attn2, where attention is decoupled
IMAGE_ATTENTION = re.compile(rf"blocks\.(\d+)\.attn2\.({NORM}|{KEY}|{VALUE})\.(\w+)")
# Diffusers' names -> those of the original release, of which `img_emb.proj` is a Sequential.
ORIGINAL_PROJECTOR = {"norm1": "0", "ff.net.0.proj": "1", "ff.net.2": "3", "norm2": "4"}
ORIGINAL_ATTENTION = {NORM: "norm_k_img", KEY: "k_img", VALUE: "v_img"}
ORIGINAL_BODY = {  # parts of the names of all other parameters
    "condition_embedder.time_embedder.linear_1.": "time_embedding.0.",
    "condition_embedder.time_embedder.linear_2.": "time_embedding.2.",
    "condition_embedder.text_embedder.linear_1.": "text_embedding.0.",
    "condition_embedder.text_embedder.linear_2.": "text_embedding.2.",
    "condition_embedder.time_proj.": "time_projection.1.",
    "proj_out.": "head.head.",
    ".scale_shift_table": ".modulation",  # of a block
    "scale_shift_table": "head.modulation",
    ".attn1.": ".self_attn.",
    ".attn2.": ".cross_attn.",
    **{f".to_{name}.": f".{name}." for name in "qkv"},
    ".to_out.0.": ".o.",
    ".norm2.": ".norm3.",
    ".ffn.net.0.proj.": ".ffn.0.",
    ".ffn.net.2.": ".ffn.2.",
}
NO_VALUES = (
    "recipe.train: projector is not allowed here with recipe.attention=decoupled: image values would start at zero, "
    "and no gradient would pass them; expected image_attention, or init_from= weights with image keys and values"
)

TINY_TRANSFORMER = Tiny(
    "WanTransformer3DModel",
    {
        "patch_size": [1, 2, 2],
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 64,
        "ffn_dim": 256,
        "num_layers": 4,
        "rope_max_seq_len": 64,
    },
)


def build_transformer(models: Models, image_dim: int, attention: str, fresh_attention: bool = True) -> Any:
    """`WanTransformer3DModel` that takes image tokens of width `image_dim`.

    A text-to-video checkpoint gets a fresh projector; one that reads images already is taken as it is. (To load it with
    `image_dim=` given to `from_pretrained` would leave the new tensors on the meta device.)

    Args:
        models: has the part `transformer`.
        image_dim: of the image encoder's tokens.
        attention: `shared_kv`: image tokens are prepended to the text's and share its keys, values and softmax.
            `decoupled`: every block has keys and values of their own for them; with the keys copied from the text's and
            the values zero, it starts as exactly the text-to-video model.
        fresh_attention: image keys and values may start so; False: they must be given.

    Raises:
        ValueError: a checkpoint of another kind, or of another attention.
    """
    transformer: Any = models.build("transformer", TINY_TRANSFORMER)
    config = transformer.config
    _check_base(config, attention)
    if config.image_dim is None:
        from diffusers.models.transformers.transformer_wan import WanImageEmbedding

        width = config.num_attention_heads * config.attention_head_dim
        with meta_parameters():
            transformer.condition_embedder.image_embedder = WanImageEmbedding(image_dim, width).to("meta").eval()
        transformer.register_to_config(image_dim=image_dim)
        models.extend(transformer, _projector_init(transformer.get_submodule(PROJECTOR), models.seed))
        if attention == "decoupled":
            _add_image_attention(models, transformer, width, fresh_attention)
    elif config.image_dim != image_dim:
        raise ValueError(f"model.parts.transformer takes image tokens of width {config.image_dim}, "
                         f"the image encoder gives {image_dim}")  # fmt: skip
    models.added(transformer).adopt = partial(connector_keys, transformer)
    return transformer.requires_grad_(False)


def split_parameters(transformer: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every parameter once: `projector`, `image_attention` where it is decoupled, and `transformer`, the rest."""
    groups: dict[str, list[nn.Parameter]] = {"projector": [], "image_attention": [], "transformer": []}
    for name, parameter in transformer.named_parameters():
        groups[_group(name)].append(parameter)
    return {name: parameters for name, parameters in groups.items() if parameters}


def original_name(name: str) -> str | None:
    """A parameter's name in the original release, as in `img_emb.proj.1.weight` or `blocks.3.cross_attn.k_img.bias`;
    None for one that belongs to neither the projector nor the image keys and values."""
    if name.startswith(f"{PROJECTOR}."):
        layer, _, kind = name.removeprefix(f"{PROJECTOR}.").rpartition(".")
        return f"img_emb.proj.{ORIGINAL_PROJECTOR[layer]}.{kind}"
    if match := IMAGE_ATTENTION.fullmatch(name):
        return f"blocks.{match[1]}.cross_attn.{ORIGINAL_ATTENTION[match[2]]}.{match[3]}"
    return None


def connector_keys(transformer: nn.Module, stored: Mapping[str, Shape]) -> dict[str, str]:
    """The projector and, where attention is decoupled, the image keys and values, to their names among `stored`.

    Names may be diffusers' or the original's. Other tensors are left alone where they belong to another network, as
    those of an image-to-video model do, which has other channels. Raises ValueError where the projector is not there,
    or only a part of either is, or where the others would fit: a trained body must not be lost unnoticed.
    """
    wanted = {name: original for name, _ in transformer.named_parameters() if (original := original_name(name))}
    keys = {name: key for name, original in wanted.items() for key in (name, original) if key in stored}
    for group in ("projector", "image_attention"):
        lacking = [original for name, original in wanted.items() if _group(name) == group and name not in keys]
        partly = any(_group(name) == group for name in keys)
        if lacking and (partly or group == "projector"):
            raise ValueError(f"lacks {len(lacking)} tensors of the {group.replace('_', ' ')}, first {lacking[0]!r}")
    _check_body({name: p for name, p in transformer.named_parameters() if name not in wanted}, stored)
    return keys


def original_body_name(name: str) -> str:
    """The name in the original release of a parameter of neither the projector nor the image keys and values."""
    for ours, theirs in ORIGINAL_BODY.items():
        name = name.replace(ours, theirs)
    return name


def _check_body(body: Mapping[str, nn.Parameter], stored: Mapping[str, Shape]) -> None:
    """Raise ValueError for stored tensors of the `body`, unless the shape of one says that they are another model's."""
    found = [(key, p) for name, p in body.items() for key in {name, original_body_name(name)} if key in stored]
    if found and all(stored[key] == tuple(parameter.shape) for key, parameter in found):
        raise ValueError(
            f"holds {len(found)} tensors besides the projector and the image keys and values that would fit this "
            f"run's network and be lost, first {found[0][0]!r}; expected a file without them, or, as "
            "model.parts.transformer.path, the whole network in diffusers' layout"
        )


def _group(name: str) -> str:
    if name.startswith(f"{PROJECTOR}."):
        return "projector"
    return "image_attention" if IMAGE_ATTENTION.fullmatch(name) else "transformer"


def _check_base(config: Any, attention: str) -> None:
    kind = (config.image_dim is not None, config.added_kv_proj_dim is not None)
    if config.in_channels != 16 or kind == (False, True):
        raise ValueError(
            f"model.parts.transformer: in_channels {config.in_channels}, image_dim {config.image_dim} and "
            f"added_kv_proj_dim {config.added_kv_proj_dim} are not allowed; expected a text-to-video transformer "
            "(16, null and null) or one of our exports"
        )
    found = {(True, False): "shared_kv", (True, True): "decoupled"}.get(kind, attention)
    if found != attention:
        raise ValueError(
            f"recipe.attention: {attention} is not allowed, model.parts.transformer reads images by {found}; expected "
            f"{found}, or a text-to-video transformer"
        )


def _add_image_attention(models: Models, transformer: Any, width: int, fresh: bool) -> None:
    """Keys, values and the keys' norm for image tokens in every block, as `added_kv_proj_dim` would have made them."""
    for block in transformer.blocks:
        attention = block.attn2
        attention.add_k_proj = nn.Linear(width, attention.inner_dim, device="meta")
        attention.add_v_proj = nn.Linear(width, attention.inner_dim, device="meta")
        attention.norm_added_k = nn.RMSNorm(attention.inner_dim, eps=attention.norm_k.eps, device="meta")
        attention.added_kv_proj_dim = width
    transformer.register_to_config(added_kv_proj_dim=width)
    names = [name for name, _ in transformer.named_parameters() if IMAGE_ATTENTION.fullmatch(name)]
    if fresh:
        models.extend(transformer, _attention_init(models, transformer, names))
    else:
        added = models.added(transformer)
        added.names.update(names)
        added.waiting.update(dict.fromkeys(names, NO_VALUES))


def _attention_init(models: Models, transformer: nn.Module, names: Iterable[str]) -> Tensors:
    """Keys and their norm as the text's, values zero: the image adds nothing yet, and is looked at like text."""
    init: Tensors = {}
    for name in names:
        if VALUE in name:
            init[name] = partial(torch.zeros, transformer.get_parameter(name).shape)
        else:
            source = name.replace(KEY, "to_k").replace(NORM, "norm_k")
            init[name] = partial(_read, models, transformer, source)
    return init


def _read(models: Models, module: nn.Module, name: str) -> Tensor:
    return models.tensors(module)[name]()


def _projector_init(projector: nn.Module, seed: int) -> Tensors:
    """Linear weights N(0, 0.02) at CLIP ViT-H's width of 1280, scaled to keep that variance of outputs at others;
    biases zero, LayerNorms identity.

    The scale matters although a LayerNorm follows: small weights are turned over by Adam's first steps.
    """
    init: Tensors = {}
    for name, parameter in projector.named_parameters():
        full = f"{PROJECTOR}.{name}"
        if name.endswith("bias"):
            init[full] = partial(torch.zeros, parameter.shape)
        elif name.startswith("norm"):
            init[full] = partial(torch.ones, parameter.shape)
        else:
            init[full] = seeded(seed, full, partial(_normal, parameter.shape))
    return init


def _normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return 0.02 * math.sqrt(1280 / shape[1]) * torch.randn(shape, generator=generator)


def predict(network: nn.Module, x_t: Tensor, t: Tensor, text: Tensor, image: Tensor, dtype: torch.dtype) -> Tensor:
    """The velocity at noised latents `x_t` [B, C, 1, h, w] and times `t` [B] in [0, 1000]; float32 [B, C, 1, h, w].

    Times stay float32: bfloat16 cannot tell 998 from 999.
    """
    output: Tensor = network(
        hidden_states=x_t.to(dtype),
        timestep=t.float(),
        encoder_hidden_states=text.to(dtype),
        encoder_hidden_states_image=image.to(dtype),
        return_dict=False,
    )[0]
    return output.float()
