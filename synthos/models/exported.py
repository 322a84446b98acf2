"""The format of a run's exported weights, `weights/step_N/`: what is where, and reading it back."""

import json
from pathlib import Path
from typing import Any

FORMAT = 1
ABOUT_FILE = "synthos.json"
NULL_FILE = "null.safetensors"
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"  # of a whole network, beside its config.json
TRAINED_FILE = "trained.safetensors"  # of a network whose other tensors are those of its base


def read_about(folder: Path, key: str) -> dict[str, Any]:
    """`synthos.json` of an export, with every file that it implies present.

    Raises ValueError, under the config key or argument `key`, for what is no export of this version, or not whole.
    """
    if not (folder / ABOUT_FILE).is_file():
        raise ValueError(f"{key}: {folder} lacks {ABOUT_FILE}; expected a folder like weights/step_00002000 of a run")
    about: dict[str, Any] = json.loads((folder / ABOUT_FILE).read_text())
    if about.get("format") != FORMAT:
        raise ValueError(f"{key}: {folder} has format {about.get('format')}, this version reads {FORMAT}")
    files = ("config.json", DIFFUSERS_FILE) if about["complete"] else (TRAINED_FILE,)
    absent = [f for f in (*(f"{about['part']}/{f}" for f in files), NULL_FILE) if not (folder / f).is_file()]
    if absent:
        raise ValueError(f"{key}: {folder} lacks {', '.join(absent)}")
    return about


def network_file(folder: Path, about: dict[str, Any]) -> Path:
    """The safetensors file of an export's network, whole or what its base does not have."""
    return folder / str(about["part"]) / (DIFFUSERS_FILE if about["complete"] else TRAINED_FILE)
