"""What a run says of itself: metrics.jsonl, W&B, pictures, a progress line, a heartbeat, the trace of its samples."""

import dataclasses
import json
import netrc
import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, cast

import numpy as np
from rich.console import Console

from synthos.batch import Batch, Fault
from synthos.files import read_heartbeat
from synthos.recipes.base import name_pictures
from synthos.schema import RunConfig
from synthos.strict import dump
from synthos.train.distributed import World
from synthos.train.pictures import card, to_image
from synthos.train.progress import Beat, ProgressLine, write_heartbeat
from synthos.train.validate import Validation
from synthos.train.waiting import ADVICE, advise

# One row per consumed sample, in data/trace-rank-*.bin: its id, and whether it only filled up its batch or stood for a
# bad sample (which data/quarantine.jsonl names).
TRACE = np.dtype([("step", "<u8"), ("id", "<u8"), ("epoch", "<u4"), ("kind", "<u4")])
USUAL, PADDING, SUBSTITUTE = range(3)


class Report:
    """The report of one attempt. Every rank writes its trace; rank 0 writes all else.

    The same numbers go to metrics.jsonl and to W&B. What lies beyond the restored step is cut from metrics.jsonl and
    from the traces, so that they tell one uninterrupted story; W&B keeps it, and sees the steps logged again.
    """

    HEARTBEAT_SECONDS = 2.0
    LINE_SECONDS = 15.0  # between progress lines where the output is no terminal
    ADVICE_SECONDS = 60.0  # of steps that a word about waits is drawn from

    def __init__(self, folder: Path, config: RunConfig, world: World, attempt: int) -> None:
        self.folder, self.config, self.world, self.attempt = folder, config, world, attempt
        self.wandb: Any = None
        self.progress: ProgressLine | None = None
        self.last_step = 0
        self.beat = self.line = 0.0
        self.told: Beat | None = None  # the last heartbeat
        self.save_seconds: float | None = None  # of the last checkpoint, by whatever attempt
        self.rate = 0.0  # images per second, smoothed
        self.waits: dict[str, list[float]] | None = None  # metrics of waits for data since the last word about them
        self.advised = time.monotonic()

    def start(self, step: int, last_step: int, validation_due: bool) -> None:
        """Open everything at the step the run goes on from; `validation_due` if it will be validated (again)."""
        self.last_step = last_step
        (self.folder / "data").mkdir(exist_ok=True)
        self._cut_traces(step)
        self.trace_file = self._trace_path(self.world.rank).open("ab", buffering=0)
        if not self.world.is_main:
            return
        self._cut_lines(step, validation_due)
        self.save_seconds = read_heartbeat(self.folder).get("save_seconds")
        self.metrics_file = (self.folder / "metrics.jsonl").open("a", buffering=1)
        self._open_wandb()
        self._log({"attempt": self.attempt, "attempt/restart_step": step}, step)
        if sys.stdout.isatty():
            self.progress = ProgressLine(Console())

    def step(self, step: int, metrics: dict[str, float | str]) -> None:
        """Log one optimiser step."""
        if not self.world.is_main:
            return
        self._log(metrics, step)
        self._show(step, metrics)

    def alive(self) -> None:
        """Renew the heartbeat, where a step takes long as well; before the first step there is none."""
        now = time.monotonic()
        if self.told and now - self.beat > self.HEARTBEAT_SECONDS:
            self.beat = now
            write_heartbeat(self.folder, self.attempt, self.told)

    @contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """Say for the time of a block what it does, which may take long without a beat: `saves`, `exports`."""
        self._beat_again(doing=doing)
        yield
        self._beat_again(doing="")

    def validation(self, step: int, validation: Validation, settings: list[dict[str, Any]]) -> None:
        """Log a validation and save its pictures, those of a request on one card with its reference and prompt."""
        if not self.world.is_main:
            return
        folder = self.folder / "samples" / f"step_{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {}
        for setting, names in zip(settings, name_pictures(settings), strict=True):
            made = validation.pictures[setting["name"]]
            reference = self.folder / setting["reference"] if setting.get("reference") else None
            for name, picture in zip(names, made, strict=True):
                to_image(picture).save(folder / f"{name}.png")
            shown = card(made, reference, setting["prompt"])
            (folder / "cards").mkdir(exist_ok=True)
            shown.save(folder / "cards" / f"{setting['name']}.png")
            pictures[f"val/samples/{setting['name']}"] = (shown, setting["prompt"])
        self._log(validation.losses, step)
        if self.wandb:
            import wandb

            images = {key: wandb.Image(shown, caption=prompt) for key, (shown, prompt) in pictures.items()}
            self.wandb.log({**images, "step": step})
        if "val/loss" in validation.losses:
            self._say(f"step {step}: validation loss {validation.losses['val/loss']:.4f}")

    def checkpoint(self, step: int, metrics: dict[str, float | str], message: str) -> None:
        """Log what became of a checkpoint, and say the message, if any; the heartbeat tells how long saving takes."""
        if not self.world.is_main:
            return
        self._log(metrics, step)
        if message:
            self._say(message)
        if "checkpoint/save_seconds" in metrics:
            self.save_seconds = float(metrics["checkpoint/save_seconds"])
            self._beat_again(save_seconds=self.save_seconds)

    def trace(self, step: int, batch: Batch) -> None:
        """Append this rank's consumed samples."""
        rows = np.empty(len(batch), TRACE)
        rows["step"], rows["id"], rows["epoch"] = step, batch.ids.numpy().view(np.uint64), batch.epochs.numpy()
        rows["kind"] = np.where(batch.replaced.numpy(), SUBSTITUTE, USUAL)
        rows["kind"][batch.weights.numpy() == 0] = PADDING
        left = memoryview(rows.tobytes())
        while left:  # a disk that fills up takes a part of them, and only then says so
            left = left[self.trace_file.write(left) :]

    def quarantine(self, step: int, faults: list[list[Fault]]) -> None:
        """Write down the bad samples that each rank met at a step."""
        if not self.world.is_main:
            return
        with self._quarantine_path.open("a") as file:
            for rank, own in enumerate(faults):
                for fault in own:
                    file.write(json.dumps({"step": step, "rank": rank, **asdict(fault)}) + "\n")
                    self._say(f"step {step}: bad sample {fault.source}/{fault.shard} {fault.key!r} {fault.error}")

    def close(self, verdict: dict[str, Any]) -> None:
        """Close everything; the verdict ends the W&B run's summary."""
        if self.progress:
            self.progress.stop()
        if self.wandb:
            self.wandb.summary.update({"status": verdict["status"], "cause": verdict["cause"]})
            self.wandb.finish(exit_code=0 if verdict["status"] != "failed" else 1)
        for name in ("trace_file", "metrics_file"):
            if hasattr(self, name):
                getattr(self, name).close()

    def _beat_again(self, **changed: Any) -> None:
        if self.told:
            self.told = dataclasses.replace(self.told, **changed)
            write_heartbeat(self.folder, self.attempt, self.told)

    def _trace_path(self, rank: int) -> Path:
        return self.folder / "data" / f"trace-rank-{rank:05d}.bin"

    def _cut_traces(self, step: int) -> None:
        """Forget what was consumed beyond the restored step: our own rows, and on rank 0 those of ranks now absent."""
        paths = {self._trace_path(self.world.rank)}
        if self.world.is_main:
            ours = {self._trace_path(rank) for rank in range(self.world.size)}
            paths |= set((self.folder / "data").glob("trace-rank-*.bin")) - ours
        for path in paths:
            if path.exists():
                whole = path.stat().st_size // TRACE.itemsize
                rows = np.fromfile(path, TRACE, count=whole)  # a kill may have cut the last row
                _write_whole(path, rows[rows["step"] <= step].tobytes())

    @property
    def _quarantine_path(self) -> Path:
        return self.folder / "data" / "quarantine.jsonl"

    def _cut_lines(self, step: int, validation_due: bool) -> None:
        """Forget what was logged of later steps, and the validation of this one if it is due (again)."""
        for path in (self.folder / "metrics.jsonl", self._quarantine_path):
            if path.exists():
                kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
                if validation_due and path.name == "metrics.jsonl":
                    kept = [line for line in kept if _step_of(line) < step or '"val/' not in line]
                _write_whole(path, "".join(f"{line}\n" for line in kept).encode())

    def _log(self, metrics: dict[str, Any], step: int) -> None:
        self.metrics_file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.wandb:
            numbers = {key: value for key, value in metrics.items() if not isinstance(value, str)}
            self.wandb.log({"step": step, **numbers})

    def _open_wandb(self) -> None:
        mode = wandb_mode(self.config.wandb.mode)
        if mode == "off":
            return
        import wandb

        settings = self.config.wandb
        self.wandb = wandb.init(
            id=_wandb_id(self.folder),
            resume="allow" if mode == "online" else None,
            mode=cast(Literal["online", "offline"], mode),
            dir=self.folder,
            project=settings.project,
            entity=settings.entity,
            name=settings.name or self.folder.name,
            group=settings.group or self.config.group,
            job_type=self.config.recipe["name"],
            tags=[*settings.tags],
            config=dump(self.config),
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )
        self.wandb.define_metric("*", step_metric="step")

    def _show(self, step: int, metrics: dict[str, float | str]) -> None:
        now, current = time.monotonic(), float(metrics["train/samples_per_s"])
        self.rate = 0.95 * self.rate + 0.05 * current if self.rate else current
        eta = (self.last_step - step) * self.config.batch.size / self.rate
        loss, wait = float(metrics["train/loss"]), float(metrics["data/wait"])
        self.told = beat = Beat(step, self.last_step, loss, self.rate, wait, eta, save_seconds=self.save_seconds)
        if self.progress:
            self.progress.update(beat)
        elif now - self.line > self.LINE_SECONDS or step == self.last_step:
            self.line = now
            self._say(f"step {step}/{self.last_step}  {beat}")
        self._advise(metrics)
        self.alive()

    def _advise(self, metrics: dict[str, float | str]) -> None:
        """A word about waits for data, at most one in `ADVICE_SECONDS`, of all steps since the last one.

        The first step waits for readers to start, which nothing can help.
        """
        if self.waits is None:
            self.waits, self.advised = {}, time.monotonic()
            return
        for name in ("data/wait", *(f"data/wait_{kind}_s" for kind in ADVICE)):
            self.waits.setdefault(name, []).append(float(metrics.get(name, 0.0)))
        if time.monotonic() - self.advised > self.ADVICE_SECONDS:
            self.advised = time.monotonic()
            means = {name: fmean(values) for name, values in self.waits.items()}
            self.waits = {}
            if line := advise(means.pop("data/wait"), means):
                self._say(line)

    def _say(self, line: str) -> None:
        if self.progress:
            self.progress.print(line + "\n")
        else:
            print(line, flush=True)


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.replace(path)


def wandb_mode(mode: str) -> str:
    """`auto` is online where a key is at hand, else offline; a missing key never becomes a prompt."""
    if mode != "auto":
        return mode
    return "online" if os.environ.get("WANDB_API_KEY") or _netrc_key() else "offline"


def _netrc_key() -> bool:
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb_id(folder: Path) -> str:
    """One W&B run through every attempt of a run folder."""
    path = folder / "wandb" / "run_id"
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:16])
    return path.read_text()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")  # a line that a kill cut short
