"""`synthos data ...` in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from tests.data.make import data_set
from tests.data.store.conftest import content, s3, s3_api  # noqa: F401  (fixtures)

Command = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a verb with --json; its exit code, and the one object that it prints, with nothing beside it."""

    def run(*arguments: object) -> tuple[int, dict[str, Any]]:
        if arguments[0] in ("index", "validate") and "--workers" not in arguments:
            arguments = (*arguments, "--workers", 1)  # processes of their own are asked for where they matter
        capsys.readouterr()
        code = main(["data", *map(str, arguments), "--json"])
        said = capsys.readouterr()
        assert said.err == "" and said.out.count("\n") == 1
        return code, json.loads(said.out)

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a verb that is asked wrongly; what it says."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main(["data", *map(str, arguments)]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ")
        assert f"error: {json.loads(said.out)['error']}\n" == said.err if "--json" in arguments else said.out == ""
        return said.err

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven captioned pictures in three shards."""
    return data_set(tmp_path / "set", 11, shard_size=4)


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
