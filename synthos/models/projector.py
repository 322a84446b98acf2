"""From image tokens to the context of a UNet that was trained on text: four ways, and the null context in all of them.

Input [B, N, D] of the image encoder's width, output [B, T, C] of the UNet's cross-attention width. `mlp` keeps the
tokens it is given; the others ask them by learned tokens, of which there are always `CONTEXT`.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

CONTEXT = 77  # tokens of a text in CLIP, and so of the least context a Stable Diffusion UNet has met
HEADS = 8  # of `xattn` and `xattnffn`
TRANSFORMER_HEADS = 4
Mode = Literal["mlp", "xattn", "xattnffn", "transformer"]


class Projector(nn.Module):
    """A body and what every mode has around it.

    The context is padded with zeros to `CONTEXT` tokens, behind the body. A picture whose tokens are all zero is the
    null picture, and its context is all zero, padding included; a normalised token is never zero.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, tokens: Tensor) -> Tensor:
        """Context [B, max(T, 77), C] of `tokens` [B, N, D]."""
        context: Tensor = self.body(tokens)
        context = nn.functional.pad(context, (0, 0, 0, max(0, CONTEXT - context.shape[1])))
        present = tokens.ne(0).flatten(1).any(1)
        return torch.where(present[:, None, None], context, torch.zeros_like(context))  # a select: null has no gradient

    def units(self) -> list[nn.Module]:
        """What may be sharded on its own, inner before outer."""
        blocks = (Block, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
        return [*(module for module in self.modules() if isinstance(module, blocks)), self]


class Block(nn.Module):
    """Learned tokens look at the memory, each sum normalised afterwards; with `ffn`, then a feed-forward layer."""

    def __init__(self, width: int, ffn: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)) if ffn else None
        self.ffn_norm = nn.LayerNorm(width) if ffn else None

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """[B, T, C] from learned tokens `x` [B, T, C] and `memory` [B, N, C]."""
        x = self.norm(x + self.attention(x, memory, memory, need_weights=False)[0])
        return self.ffn_norm(x + self.ffn(x)) if self.ffn is not None and self.ffn_norm is not None else x


class CrossAttention(nn.Module):
    """`xattn` and `xattnffn`: learned tokens through a row of blocks."""

    def __init__(self, in_width: int, out_width: int, layers: int, ffn: bool) -> None:
        super().__init__()
        self.memory = nn.Sequential(nn.Linear(in_width, out_width), nn.LayerNorm(out_width))
        self.tokens = nn.Parameter(torch.empty(CONTEXT, out_width))
        self.blocks = nn.ModuleList([Block(out_width, ffn) for _ in range(layers)])

    def forward(self, tokens: Tensor) -> Tensor:
        memory = self.memory(tokens)
        x = self.tokens.expand(len(tokens), -1, -1)
        for block in self.blocks:
            x = block(x, memory)
        return x


class EncoderDecoder(nn.Module):
    """`transformer`: image tokens through a pre-norm encoder, learned tokens through the decoder."""

    def __init__(self, in_width: int, out_width: int, layers: int, hidden: int) -> None:
        super().__init__()
        shape = {"d_model": hidden, "nhead": TRANSFORMER_HEADS, "dim_feedforward": 4 * hidden, "dropout": 0.0}
        form = {"batch_first": True, "norm_first": True}
        self.before = nn.Linear(in_width, hidden)
        self.tokens = nn.Parameter(torch.empty(CONTEXT, hidden))
        encoder, decoder = nn.TransformerEncoderLayer(**shape, **form), nn.TransformerDecoderLayer(**shape, **form)  # type: ignore[arg-type]
        self.encoder = nn.TransformerEncoder(encoder, layers, nn.LayerNorm(hidden), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, layers, nn.LayerNorm(hidden))
        self.after = nn.Linear(hidden, out_width)

    def forward(self, tokens: Tensor) -> Tensor:
        memory = self.encoder(self.before(tokens))
        asked = self.decoder(self.tokens.expand(len(tokens), -1, -1), memory)
        projected: Tensor = self.after(asked)
        return projected


def build_projector(mode: Mode, in_width: int, out_width: int, layers: int, hidden: int | None) -> Projector:
    """A projector on the meta device.

    Args:
        mode: `mlp`, `xattn`, `xattnffn` (with a feed-forward layer in each block) or `transformer`.
        in_width: of the image encoder's tokens.
        out_width: of the UNet's cross-attention.
        layers: linear layers of `mlp`; blocks of the others, in encoder and decoder each.
        hidden: width inside `mlp` and `transformer`; None for the others, whose width is the UNet's.

    Raises ValueError where layers, hidden width or out_width do not suit the mode.
    """
    _check(mode, out_width, layers, hidden)
    makers: dict[Mode, Callable[[int], nn.Module]] = {
        "mlp": lambda hidden: _mlp([in_width, *[hidden] * (layers - 1), out_width]),
        "xattn": lambda _: CrossAttention(in_width, out_width, layers, ffn=False),
        "xattnffn": lambda _: CrossAttention(in_width, out_width, layers, ffn=True),
        "transformer": lambda hidden: EncoderDecoder(in_width, out_width, layers, hidden),
    }
    with torch.device("meta"):
        return Projector(makers[mode](hidden or 0)).eval()


def _mlp(widths: list[int]) -> nn.Sequential:
    """Linear layers, each normalised, with ReLU between."""
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [nn.ReLU()] if index else []
        layers += [nn.Linear(before, after), nn.LayerNorm(after)]
    return nn.Sequential(*layers)


def check_shape(mode: Mode, layers: int, hidden: int | None) -> None:
    """Raise ValueError for layers or a hidden width that mean nothing to the mode."""
    least = 2 if mode == "mlp" else 1
    if layers < least:
        raise ValueError(
            f"recipe.projector_layers: {layers} is not allowed with recipe.projector={mode}; expected {least} or more"
        )
    wide, multiple = mode in ("mlp", "transformer"), TRANSFORMER_HEADS if mode == "transformer" else 1
    if not wide and hidden is not None:
        raise ValueError(
            f"recipe.projector_hidden: {hidden} has no effect with recipe.projector={mode}, whose width is the "
            "UNet's; expected null"
        )
    if wide and (hidden is None or hidden < 1 or hidden % multiple):
        words = f"a multiple of its {multiple} heads" if multiple > 1 else "1 or more"
        found = "null" if hidden is None else hidden
        raise ValueError(
            f"recipe.projector_hidden: {found} is not allowed with recipe.projector={mode}; expected {words}"
        )


def _check(mode: Mode, out_width: int, layers: int, hidden: int | None) -> None:
    check_shape(mode, layers, hidden)
    if mode.startswith("xattn") and out_width % HEADS:
        raise ValueError(
            f"recipe.projector: {mode} is not allowed with model.parts.unet, whose cross-attention has width "
            f"{out_width}; expected one that its {HEADS} heads divide, or mlp or transformer"
        )
