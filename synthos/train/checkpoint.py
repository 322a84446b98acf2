"""Resumable checkpoints: sharded by DCP, whole or absent, saved while training goes on, read on any number of ranks.

A save copies the state to the CPU while training waits, and writes the copy in a thread whose collectives run on a
process group of its own: on a shared one they would meet those of training. The thread of rank 0 names the checkpoint
when every rank has written. Training learns of the end at the next step at which it has come on every rank.
"""

import logging
import shutil
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

from synthos.train.checkpoint_files import (
    STEP,
    Facts,
    find_changes,
    find_damage,
    is_whole,
    part_of,
    read_counters,
    read_manifest,
    remove,
    write_counters,
)
from synthos.train.checkpoint_writer import FULL, Writer
from synthos.train.distributed import World, local, reshard
from synthos.train.state import TrainState

log = logging.getLogger(__name__)
GROUP_TIMEOUT = timedelta(hours=2)  # the rank that writes fastest waits for the slowest
CLOSE_SECONDS = 120.0  # that a run which ends by an error gives a save to become whole


@dataclass(frozen=True)
class News:
    """What became of a checkpoint: metrics, and a word for people where they should know."""

    metrics: dict[str, float | str]
    message: str = ""


@dataclass
class _Save:
    """A save under way."""

    step: int
    started: float
    waited: float  # seconds for the save before it to end
    stall: float  # seconds that training stood still, those included
    future: Future[Any]
    ended: float | None = None


@dataclass(frozen=True)
class _Failure:
    full: bool  # the disk is, and nothing else is wrong
    text: str


class Checkpoints:
    """The checkpoints of one run folder; all methods but `list` are collective.

    As a context manager it lets the save under way end, for a while, when a run fails.
    """

    def __init__(self, folder: Path, world: World, keep_last: int, keep_best: int) -> None:
        self.folder, self.world = folder, world
        self.keep_last, self.keep_best = keep_last, keep_best
        self.group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT))
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pinned = world.device.type == "cuda"
        self.stager = DefaultStager(StagingOptions(self.pinned, False, False, self.pinned))
        self.copies: dict[str, Tensor] = {}  # this rank's shards in host memory, kept for the next save
        self.writer = Writer
        self.saved: int | None = None  # step of the newest whole one
        self.damaged: set[str] = set()  # names of those that a checksum found so
        self.pending: _Save | None = None
        self.news: list[News] = []

    def save(self, state: TrainState, stream: dict[str, Any], wait: bool = True) -> Path:
        """Save the state after `state.step`, and what need not be kept is removed once this is whole.

        Without `wait` it returns as soon as the state is copied, and `settle` tells how it ended. A save still under
        way is waited for in either case. Raises RuntimeError for a save that failed; a full disk is an error with
        `wait` only.
        """
        asked = time.perf_counter()
        final = self.folder / f"step_{state.step:08d}"
        counters = {"train": state.counters(), "stream": stream}
        self._end()
        if self.saved == state.step:  # its tensors are the same; a validation since may have moved the counters
            self._renew(final, state.step, counters, wait)
            return final
        started = time.perf_counter()
        best = {f"step_{step:08d}" for _, step in state.best[: self.keep_best]}
        self.damaged.discard(final.name)
        writer = self.writer(final, counters, lambda: self._prune(best))
        copies = self._copy(state.tensors())
        future = self.thread.submit(save_sharded, copies, storage_writer=writer, process_group=self.group)
        pending = _Save(state.step, started, started - asked, time.perf_counter() - asked, future)
        self.pending = pending
        future.add_done_callback(lambda _: setattr(pending, "ended", time.perf_counter()))
        if wait:
            self._end(needed=True)
        return final

    def settle(self) -> list[News]:
        """What happened since the last call; called at every step, it never waits for a save.

        Raises RuntimeError on every rank where a save failed on any, but for a full disk, which is told.
        """
        if self.pending:
            ended = torch.tensor(self.pending.future.done(), dtype=torch.int32)
            if self.world.reduce(ended, dist.ReduceOp.MIN):
                self._end()
        news, self.news = self.news, []
        return news

    def restore(self, state: TrainState) -> dict[str, Any] | None:
        """Load the newest whole checkpoint into `state`; returns the stream's state, or None if there is none at all.

        A damaged one is passed over and told of by `settle`. Raises RuntimeError where all are damaged.
        """
        if self.world.is_main:
            for left in self.folder.glob(".step_*"):
                shutil.rmtree(left, ignore_errors=True)
        found = self.world.collect([folder.name for folder in reversed(self.list())])[0]
        problems = []
        for name in found:
            if not (damage := self._verify(self.folder / name)):
                return self._load(self.folder / name, state)
            self.damaged.add(name)
            problems.append(f"{name}: {damage}")
            message = f"checkpoint {name} is damaged and passed over: {damage}"
            log.warning("%s", message)
            self.news.append(News({"checkpoint_skipped": problems[-1]}, f"WARNING: {message}"))
        if found:
            raise RuntimeError(
                f"{self.folder}: no checkpoint is whole ({'; '.join(problems)}). Put a whole one back; or move this "
                "folder away, and the run begins again at step 0"
            )
        return None

    def list(self) -> "list[Path]":
        """Every checkpoint folder, oldest first, whole or not."""
        return sorted(path for path in self.folder.glob("step_*") if STEP.fullmatch(path.name))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.pending and kind and issubclass(kind, Exception):  # but not a second Ctrl-C
            wait([self.pending.future], timeout=CLOSE_SECONDS)
        if not self.pending or self.pending.future.done():
            self.stager.close()
        self.thread.shutdown(wait=False)

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now, in host memory. This is what training waits for.

        Torch's stager makes the copies, and takes about 0.2 ms for each; from then on only values are copied.
        """
        if not self.copies:
            self.copies = cast(dict[str, Tensor], self.stager.stage(tensors))
        else:
            into, values = ([local(group[name]) for name in tensors] for group in (self.copies, tensors))
            torch._foreach_copy_(into, values, non_blocking=self.pinned)
            if self.pinned:
                torch.cuda.synchronize()
        return self.copies

    def _load(self, folder: Path, state: TrainState) -> dict[str, Any]:
        load_sharded(state.tensors(), checkpoint_id=folder, process_group=self.world.cpu_group)
        reshard(state.network)
        saved = read_counters(folder)
        state.load_counters(saved["train"])
        self.saved = state.step
        stream: dict[str, Any] = saved["stream"]
        return stream

    def _verify(self, folder: Path) -> str:
        """What is wrong with a checkpoint, empty if nothing is: names and sizes on rank 0, checksums shared out."""
        facts: Facts = {}
        damage = ""
        if self.world.is_main and not (damage := find_damage(folder)):
            try:
                facts = read_manifest(folder)
                read_counters(folder)
            except ValueError as error:
                damage = str(error)
        damage, facts = self.world.collect((damage, facts))[0]
        if not damage:
            damage = find_changes(folder, facts, sorted(facts)[self.world.rank :: self.world.size])
        return next(filter(None, self.world.collect(damage)), "")

    def _renew(self, final: Path, step: int, counters: dict[str, Any], needed: bool) -> None:
        failure = None
        if self.world.is_main:
            try:
                write_counters(final, counters)
            except OSError as error:
                failure = _Failure(error.errno in FULL, str(error))
        if failure := self.world.collect(failure)[0]:
            self._tell(f"{final}: its counters can't be written again: {failure.text}", step, failure, needed)

    def _end(self, needed: bool = False) -> None:
        """Wait for the save under way, if any, and agree on how it ended."""
        pending, self.pending = self.pending, None
        if not pending:
            return
        wait([pending.future])
        seconds = (pending.ended or time.perf_counter()) - pending.started
        failures = [f for f in self.world.collect(_failure(pending.future.exception())) if f]
        if failures:
            self._fail(pending.step, min(failures, key=lambda failure: failure.full), needed)
            return
        self.saved = pending.step
        own = torch.tensor([pending.waited, pending.stall, seconds], dtype=torch.float64)
        waited, stall, seconds = self.world.reduce(own, dist.ReduceOp.MAX).tolist()
        log.info("checkpoint of step %d saved in %.2f s; training waited %.3f s", pending.step, seconds, stall)
        if waited > 1:
            log.warning("%.1f s of them for the save before it: checkpoint.every is shorter than a save", waited)
        names = ("step", "wait_seconds", "stall_seconds", "save_seconds")
        values = (pending.step, waited, stall, seconds)
        self.news.append(News({f"checkpoint/{n}": v for n, v in zip(names, values, strict=True)}))

    def _fail(self, step: int, failure: _Failure, needed: bool) -> None:
        if self.world.is_main:
            shutil.rmtree(part_of(self.folder / f"step_{step:08d}"), ignore_errors=True)
        kept = "there is none yet" if self.saved is None else f"that of step {self.saved} is kept"
        self._tell(f"the checkpoint of step {step} can't be saved: {failure.text}; {kept}", step, failure, needed)

    def _tell(self, message: str, step: int, failure: _Failure, needed: bool) -> None:
        """Raise RuntimeError for a failure, but of a full disk only where the save is `needed`."""
        if needed or not failure.full:
            raise RuntimeError(message)
        message = f"{message}, and training goes on"
        log.warning("%s", message)
        self.news.append(News({"checkpoint/failed_step": step}, f"WARNING: {message}"))

    def _prune(self, best: set[str]) -> None:
        """Keep the newest and the best; what is damaged goes first and never counts."""
        whole = [folder for folder in self.list() if folder.name not in self.damaged and is_whole(folder)]
        kept = {folder for folder in whole if folder.name in best} | set(whole[-self.keep_last :])
        for folder in self.list():
            if folder not in kept:
                try:
                    remove(folder)
                except OSError as error:  # the new one is whole all the same
                    log.warning("%s can't be removed: %s", folder, error)


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


def _failure(error: BaseException | None) -> _Failure | None:
    """What a save raised, in a word that travels between ranks."""
    if error is None:
        return None
    raised = {rank: e for rank, (e, _) in error.failures.items()} if isinstance(error, CheckpointException) else {}
    full = bool(raised) and all(isinstance(e, OSError) and e.errno in FULL for e in raised.values())
    text = "; ".join(f"rank {rank}: {type(e).__name__}: {e}" for rank, e in raised.items())
    return _Failure(full, text or f"{type(error).__name__}: {error}")
