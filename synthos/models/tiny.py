"""Parts small enough for a CPU, of the real classes, written to disk in the hub's layout and loaded like real ones."""

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from synthos.keys import hash64, signed64
from synthos.models.meta import construct


@dataclass(frozen=True)
class Tiny:
    """A part small enough for a CPU test, of the same class as the real one."""

    class_name: str
    config: dict[str, Any]
    init: Callable[[nn.Module], None] | None = None  # changes the freshly initialised module in place
    version: int = 1  # raised when `init` or `save` changes what is written
    save: Callable[[Path], None] | None = None  # writes what is no module (a tokenizer) into the part's folder


def tiny_folder(cache_dir: Path, part: str, tiny: Tiny) -> Path:
    """Write a tiny part once; processes that meet here write the same bytes and one rename wins."""
    key = hash64(part, tiny.class_name, tiny.version, json.dumps(tiny.config, sort_keys=True))
    folder = cache_dir / "tiny" / f"{part}-{key:016x}"
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.part")
    temporary.mkdir(parents=True, exist_ok=True)
    if tiny.save:
        tiny.save(temporary)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(signed64(hash64("tiny", part)))
            module = construct(tiny.class_name, tiny.config)
        if tiny.init:
            with torch.no_grad():
                tiny.init(module)
        with _quiet():
            module.save_pretrained(temporary)  # type: ignore[operator]
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(temporary)  # another was first
    return folder


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for files of a few kilobytes."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
