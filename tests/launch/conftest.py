"""A small data set, a command line that is right in every respect, and `submit`, which runs it in this process.

Also commands of Slurm that answer as told, and a run whose first attempt has ended.
"""

import io
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from launch import attempts, requeue
from launch.cli import main
from launch.render import NOTICE
from synthos.data.index import open_index
from synthos.data.shards import ShardPlace
from synthos.run import write_verdict
from synthos.schema import JobConfig
from synthos.strict import write_config
from tests.support import compose_for_test

Submit = Callable[..., int]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two indexed shards of twelve captioned 40 x 40 pictures each."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(2):
        write_shard(folder / f"{number:05d}.tar", {f"{number}{key:04d}": "a plain colour" for key in range(12)})
        open_index(ShardPlace.beside(str(folder / f"{number:05d}.tar")))
    return folder


def write_shard(path: Path, captions: dict[str, str | None]) -> None:
    """A tar of one-coloured pictures by key, each with its caption, or without one where it is None."""
    with tarfile.open(path, "w") as tar:
        for number, (key, caption) in enumerate(captions.items()):
            picture = io.BytesIO()
            Image.new("RGB", (40, 40), (number * 20, 90, 50)).save(picture, "jpeg")
            _add(tar, f"{key}.jpg", picture.getvalue())
            if caption is not None:
                _add(tar, f"{key}.txt", caption.encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def arguments(tmp_path: Path, shards: Path) -> list[str]:
    """A run of three steps on one CPU, everything it writes under tmp_path."""
    return [
        *("recipe=i2i", "model=tiny", "cluster=debug", "cluster.device=cpu", "precision=fp32", "wandb.mode=off"),
        *(f"data.shards={shards}", "data.holdout_fraction=0.2", "data.height=32", "data.width=32", "data.workers=0"),
        *("batch.size=4", "batch.micro=2", "optim.steps=3", "recipe.text_length=8", "validate.every=null"),
        *("validate.samples=2", "validate.from_split=0", "checkpoint.every=null"),
        *(f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}"),
    ]


@pytest.fixture
def submit(arguments: list[str]) -> Submit:
    """`synthos submit` with the right command line and what a test changes of it; returns the exit code."""

    def run(*overrides: str) -> int:
        changed = {override.lstrip("+~").split("=")[0] for override in overrides}
        kept = [argument for argument in arguments if argument.split("=")[0] not in changed]
        return main(["submit", *kept, *overrides])

    return run


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git repository with a commit, a change and a file that git does not know."""
    folder = tmp_path / "checkout"
    (folder / "synthos").mkdir(parents=True)
    (folder / "synthos" / "__init__.py").touch()
    git(folder, "init", "-q", "-b", "topic")
    (folder / "code.py").write_text("old\n")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    (folder / "code.py").write_text("new\n")
    (folder / "extra.py").write_text("")
    return folder


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def tree(*folders: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below, with size and time of its last change."""
    paths = [path for folder in folders for path in (folder, *folder.rglob("*")) if path.exists()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Commands of Slurm that say what a test has them say, and note what they were asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(requeue, "PAUSES_SECONDS", (0, 0))
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT", NOTICE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "2")

    def write(**says: str) -> Path:
        for name, text in says.items():
            (folder / name).write_text(f"#!/bin/bash\necho {name} \"$@\" >>{tmp_path}/asked\nprintf '%s\\n' '{text}'\n")
            (folder / name).chmod(0o755)
        return tmp_path / "asked"

    return write


@pytest.fixture
def ended(tmp_path: Path) -> Callable[..., tuple[Path, JobConfig]]:
    """A run folder whose first attempt has ended."""

    def make(cause: str, *overrides: str) -> tuple[Path, JobConfig]:
        folder = tmp_path / "run-1a2b3c4d"
        (folder / "control").mkdir(parents=True)
        (folder / "slurm").mkdir()
        config = compose_for_test("recipe=i2i", "model=tiny", "data=photos", "cluster=slurm", *overrides)
        write_config(config, folder / "config.yaml")
        attempts.begin(folder, [], job="2.0", nodes=["node1", "node2"])
        status = "failed" if cause in ("crash", "config") else "stopped"
        write_verdict(folder, {"status": status, "cause": cause, "step": 3, "attempt": 1, "message": ""})
        attempts.end(folder, 1)
        return folder, config

    return make
