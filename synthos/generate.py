"""Trained weights and requests to pictures, in Python.

    import synthos

    generator = synthos.load("runs/i2i/i2i-1a2b3c4d/weights/step_00002000")
    picture = generator.generate("a red barn", reference="me.jpg", steps=30, seed=3)  # a PIL image

`synthos generate` is the same from the command line, here or as a job on a cluster (`synthos/generate_job.py`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from synthos.batch import Features
from synthos.build import build_recipe, fill_frozen
from synthos.models.parts import Models
from synthos.recipes.base import Encoded, Recipe, count_pictures, group_rows, is_encoded
from synthos.strict import load as load_schema
from synthos.train.distributed import choose_dtype, fill_whole
from synthos.train.pictures import to_image
from synthos.train.validate import sample
from synthos.weights import Source, find_source

CACHE = Path(__file__).parents[1] / ".cache"


@dataclass
class Generator:
    """A recipe with trained weights, ready to sample.

    Attributes:
        recipe: the recipe, its modules on `device`.
        null: its null conditions, as in training.
        size: (height, width) of training in pixels; the default of a request.
        device: where pictures are made.
    """

    recipe: Recipe
    null: Features
    size: tuple[int, int]
    device: torch.device

    def generate(self, prompt: str = "", reference: str | Path | None = None, **options: Any) -> Image.Image:
        """One picture, height x width, 8-bit RGB.

        Args:
            prompt: text condition; empty for none.
            reference: picture file that conditions the image branch; None for none.
            options: further fields of the recipe's Request (height and width in pixels, steps, seed, sampler,
                negative_prompt, guidance scales). The same seed gives the same initial noise.

        Raises:
            ValueError: an unknown option, or a value of the wrong type or outside what the recipe allows.
        """
        given = {"name": "picture", **({"prompt": prompt} if prompt else {}), **options}  # a recipe may read none
        if reference is not None:
            given["reference"] = str(reference)
        request = self.request(given, "request")
        if (count := count_pictures([self.recipe.setting(request, self.size)])[0]) != 1:
            raise ValueError(f"request: is answered by {count} pictures; expected one, or generate_all")
        return self.generate_all([request])[0]

    def generate_all(self, requests: list[Any], micro: int = 1) -> list[Image.Image]:
        """The pictures of every request, in order, each of its request's height x width, 8-bit RGB.

        A request is answered by one picture, or by several where it asks for that (the decomposer's `save_components`,
        a list of guidance scales): then these follow each other.

        Args:
            requests: of the recipe's Request, or mappings of its fields, of which `name` is the only one that must be
                given.
            micro: requests in one call of the network, all of equal size, steps and sampler. More than one may be
                faster where pictures are small, and may change a picture's last bits; alone, it is the same in
                whatever company it was asked for.

        Raises:
            ValueError: a field that is unknown, or whose value the recipe does not allow, as with `generate`.
        """
        asked = [self.request(request, f"requests[{row}]") for row, request in enumerate(requests)]
        pictures = dict(self.each(asked, micro))
        return [picture for row in range(len(asked)) for picture in pictures[row]]

    def each(self, requests: list[Any], micro: int = 1) -> Iterator[tuple[int, list[Image.Image]]]:
        """The pictures of `generate_all` as they are made: row of the request and its pictures, in an order of their
        own."""
        for group in group_rows([self.recipe.setting(request, self.size) for request in requests]):
            for rows in (group[i : i + micro] for i in range(0, len(group), micro)):
                for row, images in zip(rows, self.sample([requests[row] for row in rows]), strict=True):
                    yield row, [to_image(image) for image in images]

    def request(self, given: Any, path: str) -> Any:
        """A Request from a mapping of its fields; `path` names it in messages. A Request stays what it is."""
        return load_schema(self.recipe.Request, given, path) if isinstance(given, Mapping) else given

    @torch.no_grad()
    def sample(self, requests: list[Any]) -> list[Tensor]:
        """Each request's pictures, float32 [P, 3, H, W] in [0, 1], in one call of `recipe.sample` for all.

        Each request is encoded by itself, so that it means the same in any company.
        """
        if not self.recipe.encoders and (words := [r.name for r in requests if not is_encoded(r)]):
            raise ValueError(f"request {words[0]!r}: has to be encoded, and there are no encoders; expected embeddings")
        encoded = Encoded.join([self.recipe.encode_requests([request], self.size) for request in requests])
        rows = list(range(len(requests)))
        return sample(self.recipe, encoded.select(rows, self.device), self.null, self.device)


def load(
    path: str | Path,
    device: str | None = None,
    dtype: str | None = None,
    average: bool | None = None,
    encoders: bool = True,
) -> Generator:
    """Load trained weights for generation.

    Args:
        path: `weights/step_N` of a run, one of its safetensors files (elsewhere with synthos.json and
            null.safetensors beside it), or `checkpoints/step_N`.
        device: e.g. "cuda:1"; default: a GPU if there is one.
        dtype: "bf16" or "fp32" of network and encoders; default: bf16 on a GPU, fp32 on the CPU.
        average: True for averaged weights, False for raw ones; default: what an export holds, and a checkpoint's
            average if it has one.
        encoders: False to leave them out, where every request will bring its embeddings.

    Raises:
        ValueError: `path` is no such thing or lacks a file, or its tensors are not exactly those the recipe trains.
    """
    source = find_source(Path(path), average)
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    recipe, models = open_recipe(source, CACHE, encoders)
    return fill(source, recipe, models, place, kind)


def open_recipe(source: Source, cache_dir: Path, encoders: bool = True) -> tuple[Recipe, Models]:
    """The recipe that weights belong to, its network on the meta device and told what it starts from.

    `cache_dir` holds tiny parts where the folder that the run had is not on this machine; without `encoders` it can
    only answer requests that need none. Raises ValueError for tensors that are not exactly those the recipe trains.
    """
    models = Models(source.model, source.cache_dir if source.cache_dir.is_dir() else cache_dir)
    recipe = build_recipe(source.recipe, models, encoders)
    source.start(recipe.network, models)
    return recipe, models


def fill(source: Source, recipe: Recipe, models: Models, device: torch.device, dtype: torch.dtype) -> Generator:
    """Give an open recipe its weights: every tensor whole, on this process's device."""
    recipe.compute_dtype = dtype
    fill_whole(recipe.network, models.tensors(recipe.network), device, dtype)
    recipe.network.eval().requires_grad_(False)
    fill_frozen(recipe, models, device, dtype)
    null = {name: value.to(device) for name, value in source.null().items()}
    return Generator(recipe, null, source.size, device)


def choose_device(name: str | None) -> torch.device:
    """The named device, or a GPU if there is one. Raises ValueError for one that is not here."""
    gpus = torch.cuda.device_count()
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    allowed = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if name not in allowed:
        raise ValueError(f"device: {name!r} is not allowed; expected one of {', '.join(allowed)}")
    return torch.device(name)
