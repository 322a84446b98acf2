"""All that a training run is at one moment: weights, optimiser, average, and the one counter."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from synthos.train.ema import Ema


@dataclass
class TrainState:
    """`images_seen` drives learning rate, data position, file names and log axes; the step is derived from it.

    Trained parameters are held here as the shards they are: while weights are gathered for a forward pass, the
    network's own `named_parameters` are other objects.
    """

    network: nn.Module
    groups: dict[str, list[nn.Parameter]]  # trained parameters by the recipe's group
    trained: dict[str, nn.Parameter]  # the same, by name
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    batch_size: int
    images_seen: int = 0
    validation_due: bool = True  # also before the first step: the baseline
    best: list[tuple[float, int]] = field(default_factory=list)  # (validation loss, step), best first

    @property
    def step(self) -> int:
        """Optimiser updates made."""
        return self.images_seen // self.batch_size

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by a stable name; loading writes into these very tensors."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.trained.items():
            found[f"network.{name}"] = parameter.detach()
            found |= {f"optim.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
            if self.ema:
                found[f"ema.{name}"] = self.ema.averages[name]
        return found

    def counters(self) -> dict[str, Any]:
        """The rest of the state as plain JSON."""
        return {"images_seen": self.images_seen, "validation_due": self.validation_due, "best": self.best}

    def load_counters(self, counters: dict[str, Any]) -> None:
        self.images_seen = counters["images_seen"]
        self.validation_due = counters["validation_due"]
        self.best = [(loss, step) for loss, step in counters["best"]]


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}
