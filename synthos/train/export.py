"""Weights for others: a folder in diffusers' layout with `synthos.json`, enough to generate without the run."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from synthos.batch import Features
from synthos.models.exported import ABOUT_FILE, DIFFUSERS_FILE, FORMAT, NULL_FILE, TRAINED_FILE, About
from synthos.models.tensors import Tensors, save_tensors
from synthos.schema import RunConfig
from synthos.strict import dump
from synthos.train.distributed import World, whole
from synthos.train.state import TrainState


def exporter(
    folder: Path, config: RunConfig, world: World, part: str, null: Features, added: Tensors, content: Mapping[str, str]
) -> Callable[[TrainState], Path]:
    """A function that writes `folder/step_N/` from a training state; collective, and whole or absent.

    Written is what the base model's files do not give: what learned, and of the parameters `added` the others, as they
    are where the run has them from: the network computes with rounded ones. If that is the whole network, it is a
    diffusers model `part/`; else it is in `part/trained.safetensors`, and `synthos.json` names the base it belongs to,
    with the `content` of its parts. Averaged weights are preferred.
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
            save_tensors({k: v.cpu().contiguous() for k, v in null.items()}, temporary / NULL_FILE)
            about = _about(config, folder.parent.name, state, part, complete, content)
            (temporary / ABOUT_FILE).write_text(json.dumps(dump(about), indent=2))
            temporary.rename(final)
        world.barrier()
        return final

    return export


def _gather(state: TrainState, world: World, added: Tensors) -> dict[str, Tensor]:
    """The tensors to write, whole, on rank 0's CPU; other ranks take part and keep nothing."""
    learned = state.ema.averages if state.ema else {name: p.detach() for name, p in state.trained.items()}
    gathered = {}
    for name, tensor in learned.items():
        value = whole(tensor)
        if world.is_main:
            gathered[name] = value.cpu().clone().contiguous()
    if world.is_main:
        gathered |= {name: read().contiguous() for name, read in added.items() if name not in learned}
    return gathered


def _write_part(folder: Path, network: Any, tensors: dict[str, Tensor], complete: bool) -> None:
    if not complete:
        save_tensors(tensors, folder / TRAINED_FILE)
        return
    settings = json.loads(network.to_json_string())
    settings["_class_name"] = type(network).__name__.removeprefix("FSDP")  # sharding renames the class
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    save_tensors(tensors, folder / DIFFUSERS_FILE, {"format": "pt"})


def _about(
    config: RunConfig, run: str, state: TrainState, part: str, complete: bool, content: Mapping[str, str]
) -> About:
    return About(
        format=FORMAT,
        run=run,
        recipe=config.recipe,
        model=config.model,
        cache_dir=config.cache_dir,
        part=part,
        complete=complete,
        weights="ema" if state.ema else "raw",
        step=state.step,
        images_seen=state.images_seen,
        height=config.data.height,
        width=config.data.width,
        content=dict(content),
    )
