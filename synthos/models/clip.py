"""CLIP's vision tower: pictures to penultimate hidden states, one token per patch and the class token."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from synthos.models.parts import Models
from synthos.models.tiny import Tiny
from synthos.strict import unknown

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def _loud_positions(module: nn.Module) -> None:
    """A random tower hardly tells positions apart; trained ones do."""
    module.get_parameter("embeddings.position_embedding.weight").mul_(6)


TINY_CLIP = Tiny(
    "CLIPVisionModel",
    {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
    },
    init=_loud_positions,
)


def build_image_encoder(models: Models) -> Any:
    """The part `image_encoder`, a CLIPVisionModel without its last block, whose output nobody reads."""
    encoder: Any = models.build("image_encoder", TINY_CLIP)
    del encoder.encoder.layers[-1]
    return encoder


def image_width(models: Models) -> int:
    """Width of the tokens that `encode_image` gives, without building the encoder."""
    settings = models.settings("image_encoder", TINY_CLIP)
    return int(settings.get("vision_config", settings)["hidden_size"])  # a CLIP folder describes both towers


def zero_tokens(encoder: Any) -> Tensor:
    """All-zero tokens in the shape of one picture's, [1, N, D]: the null image."""
    weight = encoder.embeddings.position_embedding.weight  # [N, D]
    return torch.zeros(1, *weight.shape, dtype=weight.dtype, device=weight.device)  # plain, though weight be sharded


@torch.no_grad()
def encode_image(encoder: Any, images: Tensor, preprocess: str = "squash") -> Tensor:
    """Hidden states before the tower's last block and final norm, [B, N, D], of `images` uint8 [B, 3, H, W].

    `squash` resizes the whole picture to the tower's square; `crop` resizes its shorter edge and takes the centre, as
    CLIP's own processor does. The two differ for any picture that is not square, so training and generating must agree.

    Raises ValueError for another `preprocess`.
    """
    assert not encoder.training, "a frozen encoder is always in eval mode"
    assert len(encoder.encoder.layers) == encoder.config.num_hidden_layers - 1, "made by build_image_encoder"
    if preprocess not in PREPROCESS:
        raise ValueError(f"image preprocess: {preprocess!r} is not allowed; {unknown(preprocess, list(PREPROCESS))}")
    weight = encoder.embeddings.patch_embedding.weight
    pixels = PREPROCESS[preprocess](images.to(weight.device), encoder.config.image_size) / 255
    mean, std = (torch.tensor(s, device=pixels.device).view(3, 1, 1) for s in (MEAN, STD))
    states: Tensor = encoder(pixel_values=((pixels - mean) / std).to(weight.dtype)).last_hidden_state
    return states


def squash(images: Tensor, size: int) -> Tensor:
    """The whole picture as a square: float32 [B, 3, size, size] in [0, 255], whatever its aspect."""
    return _resize(images, size, size)


def crop(images: Tensor, size: int) -> Tensor:
    """The central square of the picture, its shorter edge resized to `size`: float32 [B, 3, size, size] in [0, 255]."""
    height, width = images.shape[-2:]
    short = min(height, width)
    height, width = size * height // short, size * width // short
    top, left = (height - size) // 2, (width - size) // 2
    return _resize(images, height, width)[..., top : top + size, left : left + size]


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic as Pillow does it, on any device: rows, then columns, each rounded to 8-bit levels."""
    levels = images.float()
    for size in ((images.shape[-2], width), (height, width)):
        levels = nn.functional.interpolate(levels, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return levels


PREPROCESS: dict[str, Callable[[Tensor, int], Tensor]] = {"squash": squash, "crop": crop}
