"""SigLIP's vision tower: pictures to one token per patch, as another model would predict them.

SigLIP: arXiv 2303.15343. Tokens are the last block's output before the tower's final norm, resized as a map, each
scaled to length 1.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from synthos.data.embedding import read_embedding
from synthos.models.clip import squash
from synthos.models.parts import Models
from synthos.models.tiny import Tiny


def _loud_positions(module: nn.Module) -> None:
    """A random tower hardly tells positions apart; trained ones do."""
    module.get_parameter("embeddings.position_embedding.weight").mul_(6)


TINY_SIGLIP = Tiny(
    "SiglipVisionModel",
    {
        "image_size": 36,
        "patch_size": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    init=_loud_positions,
)


def build_image_encoder(models: Models) -> Any:
    """The part `image_encoder`, a SiglipVisionModel that ends with its last block: no final norm, no pooling head."""
    encoder: Any = models.build("image_encoder", TINY_SIGLIP)
    encoder.post_layernorm = nn.Identity()
    encoder.head = None
    encoder.use_head = False
    return encoder


def token_shape(models: Models) -> tuple[int, int]:
    """Number and width of the tower's own tokens, without building it: 729 and 1152 of so400m-patch14-384."""
    settings = models.settings("image_encoder", TINY_SIGLIP)
    settings = settings.get("vision_config", settings)  # a SigLIP folder describes both towers
    return (int(settings["image_size"]) // int(settings["patch_size"])) ** 2, int(settings["hidden_size"])


@torch.no_grad()
def encode_image(encoder: Any, images: Tensor, num_tokens: int) -> Tensor:
    """Tokens of length 1, [B, num_tokens, D], of `images` uint8 [B, 3, H, W], squashed to the tower's square."""
    assert not encoder.training, "a frozen encoder is always in eval mode"
    assert isinstance(encoder.post_layernorm, nn.Identity), "made by build_image_encoder"
    weight = encoder.embeddings.patch_embedding.weight
    pixels = squash(images.to(weight.device), encoder.config.image_size) / 127.5 - 1
    states: Tensor = encoder(pixel_values=pixels.to(weight.dtype)).last_hidden_state
    return resize_tokens(states, num_tokens)


def resize_tokens(states: Tensor, num_tokens: int) -> Tensor:
    """Tokens of length 1, [B, num_tokens, D] in the dtype of `states` [B, N, D], which are a square map row by row."""
    count, side = states.shape[1], math.isqrt(num_tokens)
    tokens = states.float()
    if count != num_tokens:
        grid = math.isqrt(count)
        maps = tokens.transpose(1, 2).reshape(len(tokens), -1, grid, grid)  # [B, D, grid, grid]
        maps = nn.functional.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
        tokens = maps.flatten(2).transpose(1, 2)
    return nn.functional.normalize(tokens, dim=-1).to(states.dtype)


def load_tokens(path: Path, num_tokens: int, shape: tuple[int, int]) -> Tensor:
    """Tokens of length 1, float32 [1, num_tokens, D], from a file of [N, D] or [1, N, D].

    N is `num_tokens`, or that of the tower's own tokens, which are resized as those of a picture. `shape` is what
    `token_shape` gives. Raises ValueError for another shape, and for what is not finite.
    """
    tokens = torch.from_numpy(read_embedding(path)).float()
    tokens = tokens[0] if tokens.ndim == 3 and len(tokens) == 1 else tokens
    counts = sorted({num_tokens, shape[0]})
    if tokens.ndim != 2 or len(tokens) not in counts or tokens.shape[1] != shape[1]:
        words = " or ".join(f"[{count}, {shape[1]}]" for count in counts)
        raise ValueError(f"has shape {list(tokens.shape)}; expected {words}, or that with a 1 before it")
    if not tokens.isfinite().all():
        raise ValueError("holds values that are not finite")
    return resize_tokens(tokens[None], num_tokens)
