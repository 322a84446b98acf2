"""The format of a run's exported weights, `weights/step_N/`: what is where, and reading it back."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from synthos.models.tensors import read_json
from synthos.schema import ModelConfig
from synthos.strict import load

FORMAT = 1
ABOUT_FILE = "synthos.json"
NULL_FILE = "null.safetensors"
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"  # of a whole network, beside its config.json
TRAINED_FILE = "trained.safetensors"  # of a network whose other tensors are those of its base


@dataclass(frozen=True)
class About:
    """What `synthos.json` says of an export."""

    format: int
    run: str
    recipe: dict[str, Any]  # its name, and the fields of its Config
    model: ModelConfig
    cache_dir: str  # of the run, where its tiny parts are
    part: str  # of the model: which one the network is
    complete: bool  # the whole network was written
    weights: Literal["ema", "raw"]
    step: int
    images_seen: int
    height: int  # pixels
    width: int  # pixels
    content: dict[str, str] = field(default_factory=dict)  # digest of each part's files


@dataclass(frozen=True)
class Export:
    """Exported weights on this machine.

    Attributes:
        folder: holds synthos.json and null.safetensors.
        about: what the first of them says.
        file: the tensors of the network: all of them, or what its base does not have.
    """

    folder: Path
    about: About
    file: Path

    @property
    def alone(self) -> bool:
        """The file was taken out of its folder, with copies of the two others beside it."""
        return self.file.parent == self.folder


def find_export(path: Path, key: str) -> Export | None:
    """The export that `path` is or belongs to; None for what no run exported.

    It is named by its folder, by the folder of its network or by the file of it. A `.safetensors` file elsewhere is one
    if copies of the export's synthos.json and null.safetensors lie beside it. Raises ValueError, under the config key
    or argument `key`, for an export of another version or one that is not whole.
    """
    for place in (path.absolute(), path.resolve()):
        folder = next((f for f in (place, *place.parents[:2]) if (f / ABOUT_FILE).is_file()), None)
        if folder is None:
            continue
        about = _read_about(folder, key)
        file = folder / about.part / (DIFFUSERS_FILE if about.complete else TRAINED_FILE)
        if place in (folder, file.parent, file):
            return _whole(Export(folder, about, file), key)
        if place.parent == folder and place.is_file() and place.suffix == ".safetensors":
            return _whole(Export(folder, about, place), key)
    return None


def _read_about(folder: Path, key: str) -> About:
    try:
        plain = read_json(folder / ABOUT_FILE)
        found = plain.get("format") if isinstance(plain, dict) else None
        if found != FORMAT:
            raise ValueError(f"{folder} has format {found}, this version reads {FORMAT}")
        about = _load(plain, folder / ABOUT_FILE)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return about


def _load(plain: dict[str, Any], file: Path) -> About:
    try:
        about = load(About, plain)
    except ValueError as error:
        raise ValueError(f"{file}: {'; '.join(str(error).splitlines())}") from None
    if not isinstance(about.recipe.get("name"), str):
        raise ValueError(f"{file}: recipe.name: missing; expected text")
    return about


def _whole(export: Export, key: str) -> Export:
    """The export, if every file that it implies is there."""
    files = [export.folder / NULL_FILE, export.file]
    if export.about.complete and not export.alone:
        files.append(export.file.parent / "config.json")
    absent = [str(file.relative_to(export.folder)) for file in files if not file.is_file()]
    if absent:
        raise ValueError(f"{key}: {export.folder} lacks {', '.join(absent)}")
    return export
