"""Two gloo ranks that save while they train: they agree on every end, good or bad, and nobody hangs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, environment
from tests.train.savers import SAVES
from tests.train.small import assert_equal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("savers")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "tests.train.savers", str(folder)]
    threads = environment() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=threads, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder


def told(folder: Path, part: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{part}-rank-{rank}.json").read_text()) for rank in range(2)]


def test_ranks_learn_of_the_end_together(folder: Path) -> None:
    first, second = told(folder, "late")
    assert first == second
    assert first["early"] == 0 and first["named"] == [] and first["whole"] == ["step_00000002"]
    assert first["metrics"]["checkpoint/step"] == 2


def test_what_was_saved_meanwhile_is_the_state_of_its_step(folder: Path) -> None:
    assert_equal(folder / "late" / "step_00000002", folder / "straight" / "step_00000002")


def test_the_failure_of_one_is_told_to_all_at_one_step(folder: Path) -> None:
    first, second = told(folder, "failing")
    assert first == second and first["left"] == ["step_00000000"]
    assert first["error"].startswith("the checkpoint of step 1 can't be saved: rank 1: FileNotFoundError")
    assert first["error"].endswith("that of step 0 is kept")


def test_saves_do_not_meet_the_collectives_of_training(folder: Path) -> None:
    first, second = told(folder, "many")
    assert first == second and first["told"] == list(range(1, SAVES + 1)) and first["total"] == 2 * 20 * SAVES
    assert first["left"] == [f"step_{SAVES:08d}"]


def test_one_rank_s_damaged_file_is_seen_by_all(folder: Path) -> None:
    first, second = told(folder, "damaged")
    assert first == second and first["step"] == 0
    (skipped,) = first["skipped"]
    assert skipped.startswith("step_00000001: __1_0.distcp has other content")
