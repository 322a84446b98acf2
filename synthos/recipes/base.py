"""The contract between a recipe and the rest of the house.

Shape letters, here and in every recipe: B batch, C channels, H W pixels, h w latent pixels, N tokens, D width,
R requests.

Where a recipe's code runs: `encode` without gradients, from pixels or read back from a cache; `loss` inside the
training step; `sample` in validation and in `synthos generate`. `loss` and `sample` call `self.network(...)` only, so
that sharding may wrap it; both are collective under sharding, so the number of network calls depends on settings alone.
Encoders may be sharded too: `encode` calls each as a whole, and takes of its parameters no more than dtype and shape.
"""

import importlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from synthos.batch import Batch, Feature, Features, Input
from synthos.keys import Draws
from synthos.models.parts import Models
from synthos.models.tensors import save_tensors
from synthos.strict import load, unknown

# [P, 3, H, W], float32 in [0, 1]: the pictures of the first request, then those of the second, ...
Images = Tensor
FILES = ("reference", "embedding")  # fields of a Request so called, whatever follows, name files: pictures, arrays
# Settings that all requests of one batch share; those that a recipe's settings lack count as equal.
GROUP_BY = ("height", "width", "steps", "sampler", "guided", "max_sequence_length")


@dataclass
class Loss:
    """What `loss` returns; everything is float32 [B]."""

    per_sample: Tensor  # its mean over the global batch is minimised
    t: Tensor  # time of each sample in [0, 1], 1 is pure noise
    parts: dict[str, Tensor] = field(default_factory=dict)  # further terms, logged by name


@dataclass
class Encoded:
    """Requests as the network meets them; the settings of one request are plain JSON values.

    Every setting holds at least name, prompt, seed, height, width, steps, sampler and guided, the number of branches
    that guidance takes (0: none). Where several pictures answer a request, `pictures` lists their names.
    """

    conditions: Features  # each [R, ...]
    negatives: Features  # what stands for the null text in the unguided branches, each [R, ...]
    settings: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.settings)

    def select(self, rows: list[int], device: torch.device | str = "cpu") -> "Encoded":
        pick = {k: v[rows].to(device) for k, v in self.conditions.items()}
        negatives = {k: v[rows].to(device) for k, v in self.negatives.items()}
        return Encoded(pick, negatives, [self.settings[i] for i in rows])

    @staticmethod
    def join(parts: list["Encoded"]) -> "Encoded":
        """All requests of `parts` in one, on the CPU."""
        parts = [part.select(list(range(len(part)))) for part in parts]
        conditions, negatives = (
            {name: torch.cat([features[name] for features in rows]) for name in rows[0]} if rows else {}
            for rows in ([part.conditions for part in parts], [part.negatives for part in parts])
        )
        return Encoded(conditions, negatives, [setting for part in parts for setting in part.settings])

    def groups(self) -> list[list[int]]:
        """Rows that can share one batch."""
        return group_rows(self.settings)


class Recipe(Protocol):
    """One learning task. The file names its class in `RECIPE`; `build` finds it by the file's name."""

    Config: ClassVar[type]  # dataclass: every hyperparameter, its unit in a trailing comment
    # dataclass: what a picture, or a set of them, is asked with. See `FILES` for fields that name files, and
    # `is_encoded` for a property that it may have.
    Request: ClassVar[type]
    from_split: ClassVar[dict[str, Any]]  # of a Request that asks for a held-out sample, beside prompt and reference
    inputs: ClassVar[dict[str, Input]]
    features: ClassVar[dict[str, Feature]]
    size_multiple: ClassVar[int]  # what height and width of a picture must divide by

    network: (
        nn.Module
    )  # one module with a forward; sharded; its requires_grad parameters are optimised, averaged, saved
    encoders: nn.ModuleDict  # frozen; serve `encode` and `encode_requests` only
    frozen: nn.ModuleDict  # frozen; serve `encode`, `loss` and `sample`; never saved
    compute_dtype: torch.dtype  # set by build; the recipe casts what it passes to the network, times excepted

    def __init__(self, config: Any, models: Models, encoders: bool = True) -> None: ...

    def fsdp_units(self) -> list[nn.Module]:
        """Modules inside `network` that are sharded on their own, inner before outer."""
        ...

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trained parameters by group; each group may have its own learning rate."""
        ...

    def encode(self, batch: Batch, group: str) -> Features:
        """The features of one group. No gradients, no randomness but the sample's crop: cacheable."""
        ...

    def setting(self, request: Any, size: tuple[int, int]) -> dict[str, Any]:
        """A request's settings, its pictures unread; one without a size gets `size` = (H, W) of training.

        Raises ValueError for a value that the recipe can't work with. It is asked before anything starts, of a recipe
        on the meta device.
        """
        ...

    def encode_requests(self, requests: list[Any], size: tuple[int, int]) -> Encoded:
        """Conditions, negative conditions and settings of requests."""
        ...

    def null(self) -> Features:
        """The null condition of each dropped feature, [1, ...]; made once and kept with the weights."""
        ...

    def loss(self, features: Features, null: Features, draws: Draws) -> Loss: ...

    def sample(self, requests: Encoded, null: Features, draws: Draws) -> Images: ...


def is_encoded(request: Any) -> bool:
    """Whether nothing of a request needs an encoder, as its property `is_encoded` says; without one, something does."""
    return getattr(request, "is_encoded", False)


def count_pictures(settings: list[dict[str, Any]]) -> list[int]:
    """How many pictures answer each request."""
    return [len(setting.get("pictures", [""])) for setting in settings]


def name_pictures(settings: list[dict[str, Any]], alone: bool = False) -> list[list[str]]:
    """The name of each picture of each request, of which its file and its place in W&B are made.

    `<request>`, or `<request>_<picture>` where several answer it; `<picture>` where it is `alone`, the only request of
    a command. Raises ValueError where two pictures would have one name.
    """
    names = []
    for setting in settings:
        own, pictures = setting["name"], setting.get("pictures")
        before = "" if alone and len(settings) == 1 else f"{own}_"
        names.append([f"{before}{picture}" for picture in pictures] if pictures is not None else [own])
    flat = [name for own in names for name in own]
    if len(set(flat)) < len(flat):
        twice = next(name for name in flat if flat.count(name) > 1)
        raise ValueError(f"requests: two pictures would be called {twice!r}; expected other names of requests")
    return names


def file_fields(request: dict[str, Any]) -> dict[str, str]:
    """The fields of a request, or of its settings, that name files, with the paths they hold."""
    return {key: value for key, value in request.items() if key.startswith(FILES) and isinstance(value, str)}


def located(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A request's files were copied into the run folder at submission and are named relative to it."""
    return request | {key: str(folder / file) for key, file in file_fields(request).items()}


def check_setting(setting: dict[str, Any], multiple: int, scales: tuple[str, ...], largest: float = math.inf) -> None:
    """Raise ValueError for a size that is no multiple or too large, for no steps, and for a scale that is no number."""
    named = f"request {setting['name']!r}"
    for key in ("height", "width"):
        if setting[key] % multiple or setting[key] <= 0:
            raise ValueError(f"{named}: {key} {setting[key]} is no multiple of {multiple}")
        if setting[key] > largest:
            raise ValueError(f"{named}: {key} {setting[key]} is not allowed; expected at most {largest}")
    if setting["steps"] < 1:
        raise ValueError(f"{named}: steps {setting['steps']} is not allowed; expected 1 or more")
    for key in scales:
        for scale in setting[key] if isinstance(setting[key], list) else [setting[key]]:
            if not math.isfinite(scale):
                raise ValueError(f"{named}: {key} {scale} is not allowed; expected a finite number")


def group_rows(settings: list[dict[str, Any]]) -> list[list[int]]:
    """Rows of requests that can share one batch: equal in `GROUP_BY`, in first-seen order."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row, setting in enumerate(settings):
        groups.setdefault(tuple(setting.get(key) for key in GROUP_BY), []).append(row)
    return list(groups.values())


def save_encoded(path: Path, encoded: Encoded, null: Features) -> None:
    """Write encoded requests and null conditions to one safetensors file."""
    tensors = {f"condition.{k}": v for k, v in encoded.conditions.items()}
    tensors |= {f"negative.{k}": v for k, v in encoded.negatives.items()}
    tensors |= {f"null.{k}": v for k, v in null.items()}
    part = path.with_suffix(".part")
    save_tensors(
        {k: v.cpu().contiguous() for k, v in tensors.items()}, part, {"settings": json.dumps(encoded.settings)}
    )
    part.replace(path)


def load_encoded(path: Path) -> tuple[Encoded, Features]:
    """What `save_encoded` wrote."""
    kinds: dict[str, Features] = {"condition": {}, "negative": {}, "null": {}}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118  # safe_open is no mapping
            kind, name = key.split(".", 1)
            kinds[kind][name] = file.get_tensor(key)
        settings = json.loads(file.metadata()["settings"])
    return Encoded(kinds["condition"], kinds["negative"], settings), kinds["null"]


def recipe_class(name: str) -> Any:
    """The class that `synthos.recipes.<name>` names as its RECIPE."""
    known = sorted(f.stem for f in Path(__file__).parent.glob("*.py") if f.stem not in ("__init__", "base"))
    if name not in known:
        raise ValueError(f"recipe.name: no recipe {name!r}; {unknown(name, known)}")
    return importlib.import_module(f"synthos.recipes.{name}").RECIPE


def recipe_config(recipe: dict[str, Any]) -> Any:
    """The recipe's own Config from the config's `recipe` group."""
    values = {key: value for key, value in recipe.items() if key != "name"}
    return load(recipe_class(recipe["name"]).Config, values, "recipe")
