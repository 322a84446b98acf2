"""Resumable checkpoints: sharded by DCP, whole or absent, readable on any number of ranks."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

from synthos.train.distributed import World, reshard
from synthos.train.state import TrainState

MANIFEST, STATE = "manifest.json", "state.json"


class Checkpoints:
    """The checkpoints of one run folder.

    A checkpoint is written under another name and renamed when every rank has written its part and the manifest lists
    every file with its size; so a folder named `step_*` without a matching manifest is damaged.
    """

    def __init__(self, folder: Path, world: World, keep_last: int, keep_best: int) -> None:
        self.folder, self.world = folder, world
        self.keep_last, self.keep_best = keep_last, keep_best

    def save(self, state: TrainState, stream: dict[str, Any]) -> Path:
        """Write the state after `state.step`; collective. Older ones that need not be kept are removed."""
        final = self.folder / f"step_{state.step:08d}"
        counters = json.dumps({"train": state.counters(), "stream": stream})
        if self._newest() == state.step:  # its tensors are the same; a validation since may have moved the counters
            if self.world.is_main:
                _write_counters(final, counters)
            self.world.barrier()
            return final
        temporary = self.folder / f".{final.name}.part"
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.world.barrier()
        save_sharded(state.tensors(), checkpoint_id=temporary, process_group=self.world.cpu_group)
        if self.world.is_main:
            _write_counters(temporary, counters)
            _write_manifest(temporary)
            temporary.rename(final)
            self._prune(state)
        self.world.barrier()
        return final

    def restore(self, state: TrainState) -> dict[str, Any] | None:
        """Load the newest whole checkpoint into `state`; returns the stream's state, or None if there is none."""
        step = self._newest()
        if step is None:
            return None
        newest = self.folder / f"step_{step:08d}"
        load_sharded(state.tensors(), checkpoint_id=newest, process_group=self.world.cpu_group)
        reshard(state.network)
        saved = json.loads((newest / STATE).read_text())
        state.load_counters(saved["train"])
        stream: dict[str, Any] = saved["stream"]
        return stream

    def _newest(self) -> int | None:
        """Step of the newest whole checkpoint as rank 0 sees it: on a shared folder, ranks may see different ones."""
        found = -1
        if self.world.is_main:
            found = max((_step(f) for f in self.list() if is_whole(f)), default=-1)
        step = int(self.world.reduce(torch.tensor(found), dist.ReduceOp.MAX))
        return step if step >= 0 else None

    def list(self) -> list[Path]:
        """Every checkpoint folder, oldest first, whole or not."""
        return sorted(self.folder.glob("step_*"))

    def _prune(self, state: TrainState) -> None:
        """Keep the newest and the best; what is damaged goes first and never counts."""
        whole = [folder for folder in self.list() if is_whole(folder)]
        best = {step for _, step in state.best[: self.keep_best]}
        kept = {f for f in whole if _step(f) in best} | set(whole[-self.keep_last :])
        for folder in self.list():
            if folder not in kept:
                shutil.rmtree(folder)


def is_whole(folder: Path) -> bool:
    """Whether the counters, and every file that the manifest lists with its size, are there."""
    if not (folder / STATE).is_file():
        return False
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names start with `prefix`, whole, on the CPU, named without it.

    Each process reads for itself, whether it is one of several ranks or stands alone.
    """
    sizes = stored_sizes(folder, prefix)
    found: dict[str, Any] = {f"{prefix}{name}": torch.empty(size) for name, size in sizes.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # this is what is asked for
        load_sharded(found, checkpoint_id=folder, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def stored_sizes(folder: Path, prefix: str) -> dict[str, torch.Size]:
    """The shapes of the tensors that `read_tensors` would read; all of them are float32."""
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: about.size for name, about in stored.items() if isinstance(about, TensorStorageMetadata)}
    return {name.removeprefix(prefix): size for name, size in tensors.items() if name.startswith(prefix)}


def _write_counters(folder: Path, counters: str) -> None:
    part = folder / f".{STATE}.part"
    part.write_text(counters)
    part.replace(folder / STATE)


def _write_manifest(folder: Path) -> None:
    """The sizes of all files but the counters, which may be written again on their own."""
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != STATE}
    (folder / MANIFEST).write_text(json.dumps(sizes, indent=1))


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
