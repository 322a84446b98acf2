"""The Wan2.1 text-to-video transformer, and the image projector that lets it read CLIP tokens.

Wan2.1: arXiv 2503.20314. Classes are diffusers'; the projector has the form and names of its Wan image-to-video models.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from synthos.models.meta import meta_parameters
from synthos.models.parts import Models
from synthos.models.tensors import Tensors, seeded
from synthos.models.tiny import Tiny

PROJECTOR = "condition_embedder.image_embedder"

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


def build_transformer(models: Models, image_dim: int) -> Any:
    """`WanTransformer3DModel` that takes image tokens of width `image_dim`.

    A checkpoint without a projector (text-to-video) gets a fresh one; loading it with `image_dim=` given to
    `from_pretrained` would leave the new tensors on the meta device. Its tokens are prepended to the text tokens and
    share the text's keys, values and softmax.
    """
    transformer: Any = models.build("transformer", TINY_TRANSFORMER)
    if transformer.config.in_channels != 16 or transformer.config.added_kv_proj_dim is not None:
        raise ValueError(
            f"model.parts.transformer: in_channels {transformer.config.in_channels} and added_kv_proj_dim "
            f"{transformer.config.added_kv_proj_dim} are not allowed; expected a text-to-video transformer, 16 and null"
        )
    embedder = transformer.condition_embedder
    if embedder.image_embedder is None:
        from diffusers.models.transformers.transformer_wan import WanImageEmbedding

        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        with meta_parameters():
            embedder.image_embedder = WanImageEmbedding(image_dim, width).to("meta").eval()
        transformer.register_to_config(image_dim=image_dim)
        models.extend(transformer, _projector_init(embedder.image_embedder, models.seed))
    elif transformer.config.image_dim != image_dim:
        raise ValueError(f"model.parts.transformer takes image tokens of width {transformer.config.image_dim}, "
                         f"the image encoder gives {image_dim}")  # fmt: skip
    transformer.requires_grad_(False)
    return transformer


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
