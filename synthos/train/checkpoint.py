"""Resumable checkpoints: sharded by DCP, whole or absent, readable on any number of ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

from synthos.train.distributed import World, reshard
from synthos.train.state import TrainState

MANIFEST = "manifest.json"


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
        if is_whole(final):
            return final
        temporary = self.folder / f".{final.name}.part"
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.world.barrier()
        save_sharded(state.tensors(), checkpoint_id=temporary, process_group=self.world.cpu_group)
        if self.world.is_main:
            (temporary / "state.json").write_text(json.dumps({"train": state.counters(), "stream": stream}))
            _write_manifest(temporary)
            temporary.rename(final)
            self._prune(state)
        self.world.barrier()
        return final

    def restore(self, state: TrainState) -> dict[str, Any] | None:
        """Load the newest whole checkpoint into `state`; returns the stream's state, or None if there is none."""
        newest = next((f for f in reversed(self.list()) if is_whole(f)), None)
        if newest is None:
            return None
        load_sharded(state.tensors(), checkpoint_id=newest, process_group=self.world.cpu_group)
        reshard(state.network)
        saved = json.loads((newest / "state.json").read_text())
        state.load_counters(saved["train"])
        stream: dict[str, Any] = saved["stream"]
        return stream

    def list(self) -> list[Path]:
        """Every checkpoint folder, oldest first, whole or not."""
        return sorted(self.folder.glob("step_*"))

    def _prune(self, state: TrainState) -> None:
        best = {step for _, step in state.best[: self.keep_best]}
        old = self.list()[: -self.keep_last] if self.keep_last else []
        for folder in old:
            if int(folder.name.removeprefix("step_")) not in best:
                shutil.rmtree(folder)


def is_whole(folder: Path) -> bool:
    """Whether every file that the manifest lists is there with its size."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def _write_manifest(folder: Path) -> None:
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(sizes, indent=1))
