"""Stable Diffusion's UNet that takes image tokens: a projector before its cross-attention.

Latent diffusion: arXiv 2112.10752. The projector is a submodule, so that both are one network; the UNet's own config
and tensors are untouched, so that diffusers reads what is exported and leaves the projector's tensors alone.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from synthos.models.fresh import fresh
from synthos.models.parts import Models
from synthos.models.projector import Projector
from synthos.models.tensors import Tensors, take_tensors, tensor_files
from synthos.models.tiny import Tiny

PROJECTOR = "projector"
UNITS = ("ResnetBlock2D", "BasicTransformerBlock")
Start = Literal["pretrained", "scratch"]


def _loud_context(module: nn.Module) -> None:
    """A random UNet hardly listens to its context; trained ones do."""
    for name, parameter in module.named_parameters():
        if "attn2.to_" in name and name.endswith("weight"):
            parameter.mul_(2)


TINY_UNET = Tiny(
    "UNet2DConditionModel",
    {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "cross_attention_dim": 64,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    },
    init=_loud_context,
    version=2,
)


def context_width(models: Models) -> int:
    """Width of the context that the UNet takes, without building it."""
    return int(models.settings("unet", TINY_UNET)["cross_attention_dim"])


def build_unet(models: Models, projector: Projector, start: Start) -> Any:
    """The part `unet`, a `UNet2DConditionModel` whose context is the projector's.

    A base model gets a fresh projector, an export of ours has its own. With `scratch` only the config counts: UNet and
    projector start afresh, and take no other weights. Raises ValueError for an export with another projector.
    """
    unet: Any = models.build("unet", TINY_UNET)
    unet.projector = projector
    unet.register_forward_pre_hook(_project, with_kwargs=True)
    where = {} if models.meta_only or start == "scratch" else tensor_files(models.folder("unet", TINY_UNET))
    stored = {name for name in where if name.startswith(f"{PROJECTOR}.")}
    if start == "scratch":
        models.extend(unet, fresh(unet, models.seed))
        models.added(unet).closed = "recipe.unet=from_scratch starts from no weights; expected recipe.unet=trained"
    else:
        models.extend(unet, _exported(unet, where, stored) if stored else _projector_init(projector, models.seed))
    return unet.requires_grad_(False)


def split_parameters(unet: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every parameter once: `projector`, and `unet`, the rest."""
    groups: dict[str, list[nn.Parameter]] = {PROJECTOR: [], "unet": []}
    for name, parameter in unet.named_parameters():
        groups[PROJECTOR if name.startswith(f"{PROJECTOR}.") else "unet"].append(parameter)
    return groups


def fsdp_units(unet: Any) -> list[nn.Module]:
    """Modules to shard on their own, inner before outer: the projector's, and the UNet's residual blocks."""
    blocks = [module for module in unet.modules() if type(module).__name__ in UNITS]
    return [*unet.projector.units(), *blocks]


def predict(network: nn.Module, x_t: Tensor, t: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The noise in `x_t` [B, C, h, w] at times `t` [B] in [0, 999], given image tokens [B, N, D]; float32 [B, C, h, w].

    Times stay as they are: bfloat16 cannot tell 998 from 999.
    """
    output: Tensor = network(x_t.to(dtype), t, encoder_hidden_states=tokens.to(dtype), return_dict=False)[0]
    return output.float()


def _project(unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the UNet's forward: its context from image tokens."""
    return args, {**kwargs, "encoder_hidden_states": unet.projector(kwargs["encoder_hidden_states"])}


def _projector_init(projector: nn.Module, seed: int) -> Tensors:
    return fresh(projector, seed, f"{PROJECTOR}.")


def _exported(unet: nn.Module, where: dict[str, Path], stored: set[str]) -> Tensors:
    wanted = {name for name, _ in unet.named_parameters() if name.startswith(f"{PROJECTOR}.")}
    if odd := sorted(wanted ^ stored):
        raise ValueError(
            f"model.parts.unet: an export with another projector, first difference {odd[0]!r}; expected the "
            "recipe.projector and recipe.projector_layers that it was trained with"
        )
    return take_tensors(unet, where, {name: name for name in wanted})
