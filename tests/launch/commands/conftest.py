"""Run folders as the code writes them, each made by the functions that a real attempt calls."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from launch import attempts
from launch.cli import main
from synthos.run import write_verdict
from synthos.strict import write_config
from synthos.train.progress import Beat, write_heartbeat
from tests.support import compose_for_test

BASE = (
    "recipe=i2i",
    "model=tiny",
    "data=photos",
    "cluster=local",
    "cluster.device=cpu",
    "batch.size=8",
    "wandb.mode=off",
)


class Runs:
    """A folder of runs that SYNTHOS_RUNS leads to."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, name: str, group: str = "i2i", *overrides: str) -> Path:
        """A run that was prepared and never started."""
        folder = self.root / group / name
        (folder / "control").mkdir(parents=True)
        write_config(compose_for_test(*BASE, *overrides, f"runs_dir={self.root}"), folder / "config.yaml")
        return folder

    def begin(self, folder: Path, step: int | None = None, job: str = "") -> int:
        """Open an attempt, which has got as far as `step` if any."""
        number = attempts.begin(folder, ["test"], checkout=self.root, job=job)
        if step is not None:
            write_heartbeat(folder, number, Beat(step, 100, 0.5, 16.0, 0.1, 50.0))
        return number

    def end(self, folder: Path, number: int, status: str, **said: Any) -> None:
        """Close an attempt as its ranks and its agent do."""
        verdict = {"status": status, "cause": "finished", "step": 100, "attempt": number, "message": "", **said}
        write_verdict(folder, verdict)
        attempts.end(folder, number)

    def finished(self, name: str, status: str, group: str = "i2i", **said: Any) -> Path:
        """A run of one attempt that has ended."""
        folder = self.add(name, group)
        self.end(folder, self.begin(folder, 100), status, **said)
        return folder


def age_heartbeat(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the clock of whoever looks be so far ahead."""
    now = time.time
    monkeypatch.setattr("launch.look.time.time", lambda: now() + seconds)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    root = tmp_path / "runs"
    root.mkdir()
    monkeypatch.setenv("SYNTHOS_RUNS", str(root))
    return Runs(root)


def synthos(*arguments: str) -> int:
    """A verb in this process."""
    return main(list(arguments))


def squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str = "") -> None:
    """A Slurm whose queue is empty, or which answers so."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "squeue").write_text(f"#!/bin/sh\n{answer}\n")
    (folder / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
