"""Weights for others: a folder in diffusers' layout with `synthos.json`, enough to generate without the run."""

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from synthos.batch import Features
from synthos.models.exported import ABOUT_FILE, DIFFUSERS_FILE, FORMAT, NULL_FILE, TRAINED_FILE
from synthos.schema import RunConfig
from synthos.strict import dump
from synthos.train.distributed import World, whole
from synthos.train.state import TrainState


def exporter(
    folder: Path, config: RunConfig, world: World, part: str, null: Features, added: Collection[str] = ()
) -> Callable[[TrainState], Path]:
    """A function that writes `folder/step_N/` from a training state; collective, and whole or absent.

    Written is what the base model's files do not give: what learned, and the parameters `added`. If that is the whole
    network, it is a diffusers model `part/`; else it is in `part/trained.safetensors`, and `synthos.json` names the
    base it belongs to. Averaged weights are preferred.
    """

    def export(state: TrainState) -> Path:
        final = folder / f"step_{state.step:08d}"
        tensors = _gather(state, world, added)
        if world.is_main and not final.exists():
            temporary = folder / f".{final.name}.part"
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / part).mkdir(parents=True)
            complete = len(tensors) == len(list(state.network.parameters()))
            _write_part(temporary / part, state.network, tensors, complete)
            save_file({k: v.cpu().contiguous() for k, v in null.items()}, temporary / NULL_FILE)
            about = {"format": FORMAT, "run": folder.parent.name, **_about(config, state, part, complete)}
            (temporary / ABOUT_FILE).write_text(json.dumps(about, indent=2))
            temporary.rename(final)
        world.barrier()
        return final

    return export


def _gather(state: TrainState, world: World, added: Collection[str]) -> dict[str, Tensor]:
    """The tensors to write, whole, on rank 0's CPU; other ranks take part and keep nothing."""
    learned = state.ema.averages if state.ema else {name: p.detach() for name, p in state.trained.items()}
    kept = {n: p.detach() for n, p in state.network.named_parameters() if n in added and n not in learned}
    source = learned | kept
    gathered = {}
    for name, tensor in source.items():
        value = whole(tensor)
        if world.is_main:
            gathered[name] = value.cpu().clone().contiguous()
    return gathered


def _write_part(folder: Path, network: Any, tensors: dict[str, Tensor], complete: bool) -> None:
    if not complete:
        save_file(tensors, folder / TRAINED_FILE)
        return
    settings = json.loads(network.to_json_string())
    settings["_class_name"] = type(network).__name__.removeprefix("FSDP")  # sharding renames the class
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    save_file(tensors, folder / DIFFUSERS_FILE, {"format": "pt"})


def _about(config: RunConfig, state: TrainState, part: str, complete: bool) -> dict[str, Any]:
    return {
        "recipe": config.recipe,
        "model": dump(config.model),
        "cache_dir": config.cache_dir,
        "part": part,
        "complete": complete,
        "weights": "ema" if state.ema else "raw",
        "step": state.step,
        "images_seen": state.images_seen,
        "height": config.data.height,
        "width": config.data.width,
    }
