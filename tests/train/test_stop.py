"""The stop protocol: which cause a run ends with, and that signal handlers are put back."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from synthos.train.distributed import World
from synthos.train.stop import Stop


@pytest.fixture
def world() -> Iterator[World]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    made = World(0, 0, 1, torch.device("cpu"), torch.float32, None)
    yield made
    made.close()


def test_signals_name_their_cause_and_handlers_come_back(world: World, tmp_path: Path) -> None:
    former = signal.getsignal(signal.SIGTERM)
    with Stop(tmp_path / "stop", world) as stop:
        assert stop.agreed() == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed() == "terminate"
    assert signal.getsignal(signal.SIGTERM) is former


def test_second_interrupt_raises(world: World, tmp_path: Path) -> None:
    with Stop(tmp_path / "stop", world) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed() == "interrupt"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("content", "cause"),
    [("", "stop"), (json.dumps({"cause": "terminate"}), "terminate"), ('{"cause"', "stop"), ("[]", "stop"),
     (json.dumps({"cause": "something else"}), "stop")],
)  # fmt: skip
def test_file_asks_for_a_stop(world: World, tmp_path: Path, content: str, cause: str) -> None:
    (tmp_path / "stop").write_text(content)
    with Stop(tmp_path / "stop", world) as stop:
        assert stop.agreed() == cause
