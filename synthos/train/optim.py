"""Optimiser, learning-rate schedules and gradient norms."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from synthos.schema import OptimConfig
from synthos.strict import unknown
from synthos.train.distributed import whole

Groups = dict[str, list[nn.Parameter]]


def _linear(step: int, warmup: int, end: int) -> float:
    return max(0.0, (end - step) / max(1, end - warmup))


def _cosine(step: int, warmup: int, end: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, end - warmup))))


_AFTER_WARMUP: dict[str, Callable[[int, int, int], float]] = {
    "constant": lambda step, warmup, end: 1.0,
    "linear": _linear,
    "cosine": _cosine,
    "log_warmup_linear": _linear,
}


def lr_multiplier(schedule: str, step: int, warmup: int, end: int) -> float:
    """What the learning rate is multiplied by in the update that follows `step` updates.

    Warm-up rises linearly and reaches 1 at `step` = warmup - 1; `log_warmup_linear` rises as ln(s + 1) / ln(w + 1) and
    reaches 1 at `step` = warmup. `linear` and `cosine` reach 0 at `end`.
    """
    if step < warmup:
        if schedule == "log_warmup_linear":
            return math.log(step + 1) / math.log(warmup + 1)
        return (step + 1) / warmup
    return _AFTER_WARMUP[schedule](step, warmup, end)


def check_groups(config: OptimConfig, groups: Groups) -> None:
    """Raise ValueError for a learning rate of a group that does not exist."""
    for name in config.lr_groups:
        if name not in groups:
            raise ValueError(f"optim.lr_groups: no group {name!r}; {unknown(name, list(groups))}")


def build_optimizer(groups: Groups, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with one parameter group per name; its state exists from the start, so that a save is always whole."""
    check_groups(config, groups)
    settings = [
        {"params": parameters, "name": name, "base_lr": config.lr_groups.get(name, config.lr)}
        for name, parameters in groups.items()
    ]
    optimizer = torch.optim.AdamW(
        settings, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )
    for parameter in (p for group in groups.values() for p in group):
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        optimizer.state[parameter] = {
            "step": step,
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, last_step: int) -> dict[str, float]:
    """Set every group's learning rate for the update after `step`; returns them by group."""
    end = config.decay_steps or last_step
    factor = lr_multiplier(config.schedule, step, config.warmup_steps, end)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def clip_gradients(groups: Groups, limit: float | None) -> tuple[dict[str, float], float]:
    """Scale all gradients so that their joint L2 norm is at most `limit`; norms before it, by group and in all."""
    norms = {name: _norm(ps) for name, ps in groups.items() if any(p.grad is not None for p in ps)}
    total = torch.stack(list(norms.values())).square().sum().sqrt()
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_([p for ps in groups.values() for p in ps], limit, total)
    return {name: norm.item() for name, norm in norms.items()}, total.item()


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    return whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
