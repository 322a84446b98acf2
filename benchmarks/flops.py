"""Floating-point operations per image, in closed form from the models' own configs; a multiply-add counts as two.

Matrix products and convolutions are counted and nothing else, as `torch.utils.flop_counter` does, which the tests
compare with. A backward pass counts what its gradients need: twice the forward where inputs and weights have one, once
where only the inputs have (a frozen layer between the loss and what learns), and nothing in front of what learns.
Fused attention kernels compute more than that, since they make the scores a second time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any


@dataclass(frozen=True)
class Tokens:
    """What the transformer sees of one image."""

    patches: int
    text: int
    image: int


@dataclass(frozen=True)
class Flops:
    """Of one training step on one image."""

    forward: float
    backward: float
    recompute: float  # the second forward of activation checkpointing

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.recompute


def transformer_flops(config: Mapping[str, Any], tokens: Tokens, image_dim: int, train: str, recompute: bool) -> Flops:
    """One step of the Wan transformer with an image projector, whether attention to the image is shared or decoupled.

    Args:
        config: of the transformer.
        tokens: per image.
        image_dim: width of the image tokens before the projector.
        train: `full`, or `projector` or `image_attention` where the rest is frozen.
        recompute: projector and blocks are run again in the backward pass.
    """
    width, layers = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
    volume = prod(config["patch_size"])
    patches = _linear(tokens.patches, volume * config["in_channels"], width)
    time, text = _linear(1, config["freq_dim"], width), _linear(tokens.text, config["text_dim"], width)
    projector = _linear(tokens.image, image_dim, image_dim + width)
    second = _linear(1 + tokens.text, width, width) + _linear(1, width, 6 * width)  # further layers of time and text
    head = _linear(tokens.patches, width, volume * config["out_channels"])
    blocks = layers * _block(tokens, width, config["ffn_dim"])
    forward = patches + time + text + second + projector + blocks + head
    if train == "full":
        backward = 2 * forward - patches - time - text  # what meets the inputs themselves passes nothing on
    else:
        first, later = _frozen_block(tokens, width, config["ffn_dim"])
        weights = 2 * _linear(tokens.image, width, width) if train == "image_attention" else 0
        backward = 2 * projector + first + (layers - 1) * later + layers * weights + head
    return Flops(forward, backward, projector + blocks if recompute else 0)


def text_encoder_flops(config: Any, tokens: int) -> float:
    """Forward of a T5 encoder on `tokens` tokens."""
    inner = config.num_heads * config.d_kv
    matrices = 3 if config.is_gated_act else 2
    layer = 4 * _linear(tokens, config.d_model, inner) + _scores(tokens, tokens, inner)
    return float(config.num_layers * (layer + matrices * _linear(tokens, config.d_model, config.d_ff)))


def image_encoder_flops(config: Any, layers: int) -> float:
    """Forward of `layers` layers of a CLIP vision tower on one picture."""
    width, cells = config.hidden_size, (config.image_size // config.patch_size) ** 2
    tokens = cells + 1
    attention = 4 * _linear(tokens, width, width) + _scores(tokens, tokens, width)
    layer = attention + 2 * _linear(tokens, width, config.intermediate_size)
    return float(_linear(cells, 3 * config.patch_size**2, width) + layers * layer)


def autoencoder_flops(name: str, config: Mapping[str, Any], height: int, width: int) -> float:
    """Encoding one picture of `height` x `width` pixels with the autoencoder of the class `name`.

    The Wan encoder sees a film of one frame: its causal convolutions run all three frames deep, two of them padding.
    """
    if name == "PatchAutoencoder":
        return _linear(height * width / 64, 3 * 64, config["z_dim"])
    area = float(height * width)
    channels = [config["base_dim"] * factor for factor in (1, *config["dim_mult"])]
    count = _linear(area, 27 * config["in_channels"], channels[0])
    for level, (before, after) in enumerate(pairwise(channels)):
        inputs = [before] + (config["num_res_blocks"] - 1) * [after]
        count += sum(_residual(area, c, after) for c in inputs)
        if level < len(channels) - 2:  # a strided convolution halves height and width
            area /= 4
            count += _linear(area, 9 * after, after)
    last, latent = channels[-1], 2 * config["z_dim"]
    middle = 2 * _residual(area, last, last) + 4 * _linear(area, last, last) + _scores(area, area, last)
    return count + middle + _linear(area, 27 * last, latent) + _linear(area, latent, latent)


def _linear(rows: float, inputs: int, outputs: int) -> float:
    """A matrix product; a convolution has one row per output pixel and `inputs` = kernel size x channels."""
    return 2.0 * rows * inputs * outputs


def _scores(queries: float, keys: float, width: int) -> float:
    """Scores and weighted values of an attention."""
    return 4.0 * queries * keys * width


def _block(tokens: Tokens, width: int, ffn: int) -> float:
    """Forward of one transformer block."""
    s, context = tokens.patches, tokens.text + tokens.image
    linear = 6 * _linear(s, width, width) + 2 * _linear(context, width, width) + 2 * _linear(s, width, ffn)
    return linear + _scores(s, s, width) + _scores(s, context, width)


def _frozen_block(tokens: Tokens, width: int, ffn: int) -> tuple[float, float]:
    """Backward through the activations of the first block and of a later one.

    In the first, only the context's keys and values depend on what learns, not yet the queries. Text and image travel
    as one tensor, so that rows of text carry a gradient too, which nobody asks for.
    """
    s, context = tokens.patches, tokens.text + tokens.image
    behind = _linear(s, width, width) + 2 * _linear(s, width, ffn)  # attention's output projection, feed-forward
    first = behind + 2 * _linear(context, width, width) + 1.5 * _scores(s, context, width)
    queries = 5 * _linear(s, width, width) + 2 * _scores(s, s, width) + 0.5 * _scores(s, context, width)
    return first, first + queries


def _residual(area: float, inputs: int, outputs: int) -> float:
    shortcut = _linear(area, inputs, outputs) if inputs != outputs else 0
    return _linear(area, 27 * inputs, outputs) + _linear(area, 27 * outputs, outputs) + shortcut
