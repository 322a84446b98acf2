"""Exported weights and requests to pictures: `synthos.load(path).generate(...)` and `synthos generate`.

synthos generate weights=runs/i2i/i2i-1a2b3c4d/weights/step_00002000 reference=me.jpg prompt='a red barn' out=barn.png
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from PIL import Image
from safetensors.torch import load_file

from synthos.batch import Features
from synthos.build import build_recipe, fill_frozen, recipe_class
from synthos.models.parts import Models
from synthos.recipes.base import Recipe
from synthos.schema import ModelConfig, unknown
from synthos.schema import load as load_schema
from synthos.train.distributed import fill_whole
from synthos.train.export import ABOUT_FILE, DIFFUSERS_FILE, FORMAT, NULL_FILE, TRAINED_FILE
from synthos.train.pictures import to_image
from synthos.train.validate import sample

CACHE = Path(__file__).parents[1] / ".cache"


@dataclass
class Generator:
    """A recipe with trained weights, ready to sample.

    Attributes:
        recipe: the recipe, its modules on `device`.
        null: its null conditions, as in training.
        size: (height, width) of training in pixels; the default of a request.
    """

    recipe: Recipe
    null: Features
    size: tuple[int, int]
    device: torch.device

    @torch.no_grad()
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
        given = {"name": "picture", "prompt": prompt, **options}
        if reference is not None:
            given["reference"] = str(reference)
        return self.generate_all([load_schema(self.recipe.Request, given, "request")])[0]

    @torch.no_grad()
    def generate_all(self, requests: list[Any]) -> list[Image.Image]:
        """One picture per request, in order; requests of equal settings share a batch."""
        for request in requests:
            if getattr(request, "reference", None) is not None and not Path(request.reference).is_file():
                raise ValueError(f"request {request.name!r}: reference {request.reference!r} is no file")
        encoded = self.recipe.encode_requests(requests, self.size)
        pictures: dict[int, Image.Image] = {}
        for rows in encoded.groups():
            images = sample(self.recipe, encoded.select(rows, self.device), self.null, self.device)
            pictures |= {row: to_image(image) for row, image in zip(rows, images, strict=True)}
        return [pictures[row] for row in range(len(requests))]


def load(path: str | Path, device: str | None = None, dtype: str | None = None) -> Generator:
    """Load exported weights (`weights/step_N`) for generation.

    Args:
        path: the folder that holds synthos.json.
        device: e.g. "cuda:1"; default: a GPU if there is one.
        dtype: "bf16" or "fp32" of network and encoders; default: bf16 on a GPU, fp32 on the CPU.

    Raises:
        ValueError: the folder lacks a file, or its tensors are not exactly those the recipe trains.
    """
    folder = Path(path)
    about = _read_about(folder)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = _dtype(dtype, place)
    model = load_schema(ModelConfig, _with_export(about, folder))
    cache = Path(about["cache_dir"])
    models = Models(model, cache if cache.is_dir() else CACHE)
    recipe = build_recipe(about["recipe"], models)
    recipe.compute_dtype = kind
    tensors = models.tensors(recipe.network)
    if not about["complete"]:
        trained = load_file(folder / about["part"] / TRAINED_FILE)
        _check_names(folder, set(trained), {n for n, p in recipe.network.named_parameters() if p.requires_grad})
        tensors |= {name: lambda value=value: value for name, value in trained.items()}  # type: ignore[misc]
    fill_whole(recipe.network, tensors, place, kind)
    recipe.network.eval().requires_grad_(False)
    fill_frozen(recipe, models, place, kind)
    null = {name: value.to(place) for name, value in load_file(folder / NULL_FILE).items()}
    return Generator(recipe, null, (about["height"], about["width"]), place)


def main(argv: list[str]) -> int:
    """`synthos generate key=value ...`: weights, out, device, dtype, and the fields of the recipe's Request."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    given = dict(_split(argument) for argument in argv)
    for key in ("weights", "out"):
        if key not in given:
            raise ValueError(
                f"{key}: missing; synthos generate weights=FOLDER out=FILE.png [prompt=...] [reference=FILE]"
            )
    weights, out = Path(given.pop("weights")), Path(given.pop("out"))
    if out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"out: {str(out)!r} is not allowed; expected a picture file, as in {out.stem}.png")
    device, dtype = given.pop("device", None), given.pop("dtype", None)
    request = parse_request(recipe_class(_read_about(weights)["recipe"]["name"]).Request, {"name": out.stem, **given})
    picture = load(weights, device, dtype).generate_all([request])[0]
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)
    print(f"{out}  {picture.width} x {picture.height}", file=sys.stderr)
    return 0


def parse_request(cls: Any, given: dict[str, str]) -> Any:
    """A Request from texts: numbers where its fields are numbers, all else verbatim."""
    hints = get_type_hints(cls)
    allowed = [f.name for f in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    for key, text in given.items():
        if key not in allowed:
            raise ValueError(f"{key}: unknown; {unknown(key, ['weights', 'out', 'device', 'dtype', *allowed])}")
        kinds = {hints[key], *get_args(hints[key])}
        number = next((kind for kind in (int, float) if kind in kinds), None)
        try:
            values[key] = number(text) if number else text
        except ValueError:
            raise ValueError(f"{key}: {text!r} is not allowed; expected a number") from None
    return load_schema(cls, values, "request")


def _split(argument: str) -> tuple[str, str]:
    key, sign, value = argument.partition("=")
    if not sign:
        raise ValueError(f"{argument!r}: expected key=value")
    return key, value


def _read_about(folder: Path) -> dict[str, Any]:
    """synthos.json of an export, with every file that it implies present."""
    if not (folder / ABOUT_FILE).is_file():
        raise ValueError(f"weights: {folder} lacks {ABOUT_FILE}; expected a folder like weights/step_00002000 of a run")
    about: dict[str, Any] = json.loads((folder / ABOUT_FILE).read_text())
    if about.get("format") != FORMAT:
        raise ValueError(f"weights: {folder} has format {about.get('format')}, this version reads {FORMAT}")
    files = ("config.json", DIFFUSERS_FILE) if about["complete"] else (TRAINED_FILE,)
    absent = [f for f in (*(f"{about['part']}/{f}" for f in files), NULL_FILE) if not (folder / f).is_file()]
    if absent:
        raise ValueError(f"weights: {folder} lacks {', '.join(absent)}")
    return about


def _with_export(about: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The model's parts with the exported network in place of its base, where it was exported whole."""
    if not about["complete"]:
        return dict(about["model"])
    parts = {**about["model"].get("parts", {}), about["part"]: {"path": str(folder / about["part"])}}
    return {**about["model"], "parts": parts}


def _check_names(folder: Path, found: set[str], expected: set[str]) -> None:
    if found != expected:
        odd = sorted(found ^ expected)
        raise ValueError(f"weights: {folder} does not hold exactly what the recipe trains; first difference {odd[0]!r}")


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    kinds = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if name is not None and name not in kinds:
        raise ValueError(f"dtype: {name!r} is not allowed; expected one of {', '.join(kinds)}")
    return kinds[name or ("bf16" if device.type == "cuda" else "fp32")]
