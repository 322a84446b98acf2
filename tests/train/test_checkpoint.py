"""Checkpoints of one rank: what a save under way holds, what is damaged, what is kept, what is left on a full disk."""

import json
import logging
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.futures import Future

from synthos.train.checkpoint import Checkpoints
from synthos.train.checkpoint_files import is_whole, read_counters, write_counters
from synthos.train.checkpoint_writer import Writer
from synthos.train.distributed import World
from tests.support import world_of_one
from tests.train.small import advance, assert_equal, ended, new, read, save, slow_writer, small_state, wait_until


@pytest.fixture
def world() -> Iterator[World]:
    yield from world_of_one()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_save_holds_its_step_while_training_goes_on(world: World, tmp_path: Path) -> None:
    """Weights, moments, average, counters and the stream's state are those of the step at which it was begun."""
    state, let = small_state(), threading.Event()
    checkpoints = new(tmp_path / "while", world, keep_last=1)
    advance(state)
    save(checkpoints, state)
    checkpoints.writer = writer = slow_writer(let.is_set)
    advance(state)
    save(checkpoints, state, wait=False)
    checkpoints.settle()
    wait_until(lambda: writer.log)
    state.best, state.validation_due = [(0.5, 2)], False
    for _ in range(3):
        advance(state)
        assert checkpoints.settle() == []
    assert names(tmp_path / "while") == [".step_00000002.part", "step_00000001"]
    let.set()
    (news,) = ended(checkpoints)
    assert news.metrics["checkpoint/step"] == 2 and not news.message
    assert 0 < float(news.metrics["checkpoint/stall_seconds"]) < float(news.metrics["checkpoint/save_seconds"])
    assert names(tmp_path / "while") == ["step_00000002"]

    other, straight = small_state(), new(tmp_path / "straight", world)
    for _ in range(2):
        advance(other)
    assert_equal(tmp_path / "while" / "step_00000002", save(straight, other))
    for _ in range(3):
        advance(other)
    later, _ = read(save(straight, other))
    saved, _ = read(tmp_path / "while" / "step_00000002")
    assert not any(torch.equal(saved[name], later[name]) for name in saved)


def test_one_save_is_under_way_at_a_time(world: World, tmp_path: Path) -> None:
    state, let = small_state(), threading.Event()
    checkpoints = new(tmp_path, world)
    checkpoints.writer = writer = slow_writer(let.is_set)
    advance(state)
    save(checkpoints, state, wait=False)
    advance(state)
    opener = threading.Timer(0.2, let.set)
    opener.start()
    save(checkpoints, state)
    opener.join()
    assert writer.log == [f"{what} step_{step:08d}" for step in (1, 2) for what in ("begin", "end")]
    first, second = checkpoints.settle()
    assert [first.metrics["checkpoint/step"], second.metrics["checkpoint/step"]] == [1, 2]
    assert float(first.metrics["checkpoint/wait_seconds"]) < float(second.metrics["checkpoint/wait_seconds"])
    assert float(second.metrics["checkpoint/wait_seconds"]) < float(second.metrics["checkpoint/stall_seconds"])


def test_a_run_that_fails_lets_its_save_end(world: World, tmp_path: Path) -> None:
    state, let = small_state(), threading.Event()
    checkpoints = new(tmp_path, world)
    checkpoints.writer = slow_writer(let.is_set)
    opener = threading.Timer(0.2, let.set)
    with pytest.raises(RuntimeError, match="loss nan"), checkpoints:
        save(checkpoints, state, wait=False)
        opener.start()
        raise RuntimeError("loss nan")
    opener.join()
    assert is_whole(tmp_path / "step_00000000")


def data_file(folder: Path) -> Path:
    return next(folder.glob("*.distcp"))


def truncate(folder: Path) -> None:
    file = data_file(folder)
    file.write_bytes(file.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, "distcp has .* bytes instead of "),
    "flipped": (lambda folder: flip(data_file(folder)), "distcp has other content than was written"),
    "flipped_metadata": (lambda folder: flip(folder / ".metadata"), r"\.metadata has other content"),
    "deleted": (lambda folder: data_file(folder).unlink(), "distcp is missing"),
    "no_manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "no_sense_in_the_manifest": (
        lambda folder: (folder / "manifest.json").write_text("[1]"),
        "manifest.json is damaged",
    ),
    "half_a_manifest": (lambda folder: (folder / "manifest.json").write_text('{"a": ['), "manifest.json is damaged"),
    "other_counters": (
        lambda folder: (folder / "state.json").write_text((folder / "state.json").read_text().replace("16", "24")),
        "state.json is damaged",
    ),
    "no_counters": (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    "empty": (lambda folder: [file.unlink() for file in folder.iterdir()], "state.json is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_one_is_passed_over_loudly(
    world: World, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    state, checkpoints = small_state(), new(tmp_path, world)
    for _ in range(2):
        advance(state)
        save(checkpoints, state)
    damage, reason = DAMAGE[kind]
    damage(tmp_path / "step_00000002")
    other, again = small_state(), new(tmp_path, world)
    with caplog.at_level(logging.WARNING, "synthos"):
        assert again.restore(other) == {"cursor": 8} and other.step == 1
    (news,) = again.settle()
    told = str(news.metrics["checkpoint_skipped"])
    assert told.startswith("step_00000002: ") and told in news.message.replace(" is damaged and passed over", "")
    ours = [record for record in caplog.records if record.name.startswith("synthos")]
    warned = [record.getMessage() for record in ours if record.levelno >= logging.WARNING]
    assert len(warned) == 1 and warned[0] in news.message
    assert re.search(reason, told)
    advance(other)
    assert_equal(save(again, other), save(new(tmp_path / "straight", world), state))  # goes on as if nothing was
    assert names(tmp_path) == ["step_00000001", "step_00000002", "straight"]


def test_damaged_ones_never_push_out_whole_ones(world: World, tmp_path: Path) -> None:
    """Not even where only the content tells."""
    state, checkpoints = small_state(), new(tmp_path, world, keep_last=3)
    for _ in range(3):
        advance(state)
        save(checkpoints, state)
    for step in (2, 3):
        flip(data_file(tmp_path / f"step_{step:08d}"))
    other, again = small_state(), new(tmp_path, world, keep_last=2)
    again.restore(other)
    assert [str(news.metrics["checkpoint_skipped"])[:13] for news in again.settle()] == [
        "step_00000003",
        "step_00000002",
    ]
    for _ in range(3):
        advance(other)
    save(again, other)
    assert names(tmp_path) == ["step_00000001", "step_00000004"]


def test_all_damaged_is_no_beginning(world: World, tmp_path: Path) -> None:
    state, checkpoints = small_state(), new(tmp_path, world)
    assert new(tmp_path / "none", world).restore(state) is None
    for _ in range(2):
        advance(state)
        save(checkpoints, state)
    truncate(tmp_path / "step_00000001")
    flip(data_file(tmp_path / "step_00000002"))
    with pytest.raises(RuntimeError, match="no checkpoint is whole .step_00000002: .* other content.*step_00000001: "):
        new(tmp_path, world).restore(small_state())
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_what_a_kill_left_is_removed(world: World, tmp_path: Path) -> None:
    state, checkpoints = small_state(), new(tmp_path, world)
    save(checkpoints, state)
    shutil.copytree(tmp_path / "step_00000000", tmp_path / ".step_00000005.part")
    (tmp_path / ".step_00000004.gone").mkdir()
    new(tmp_path, world).restore(state)
    assert names(tmp_path) == ["step_00000000"]


def test_the_best_stay_until_the_new_one_is_whole(world: World, tmp_path: Path) -> None:
    state, let = small_state(), threading.Event()
    checkpoints = new(tmp_path, world, keep_last=1, keep_best=1)
    state.best = [(0.5, 0)]
    for _ in range(2):
        save(checkpoints, state)
        advance(state)
    checkpoints.writer = slow_writer(let.is_set)
    save(checkpoints, state, wait=False)
    assert [path.name for path in checkpoints.list()] == ["step_00000000", "step_00000001"]
    let.set()
    ended(checkpoints)
    assert names(tmp_path) == ["step_00000000", "step_00000002"]


def test_a_failing_writer_is_an_error_at_the_next_step(world: World, tmp_path: Path) -> None:
    state, let = small_state(), threading.Event()
    checkpoints = new(tmp_path, world)
    save(checkpoints, state)
    checkpoints.writer = writer = slow_writer(let.is_set)
    advance(state)
    save(checkpoints, state, wait=False)
    wait_until(lambda: writer.log)
    shutil.rmtree(tmp_path / ".step_00000001.part")
    let.set()
    with pytest.raises(
        RuntimeError, match="the checkpoint of step 1 can't be saved: rank 0: FileNotFoundError.* of step 0"
    ):
        ended(checkpoints)
    assert names(tmp_path) == ["step_00000000"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class Filling(Writer):
    """Something else fills the disk after the check for room."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        fill(self.final.parent.parent)
        return super().write_data(plan, planner)


def fill(folder: Path) -> None:
    with pytest.raises(OSError, match="No space left"), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_full_disk_keeps_the_old_and_training_goes_on(world: World, small_disk: Path, when: str) -> None:
    folder = small_disk / "checkpoints"
    state, checkpoints = small_state(), new(folder, world)
    advance(state)
    save(checkpoints, state)
    checkpoints.settle()
    before = read(folder / "step_00000001")
    if when == "before":
        fill(small_disk)
    else:
        checkpoints.writer = Filling
    advance(state)
    save(checkpoints, state, wait=False)
    (news,) = ended(checkpoints)
    assert news.metrics == {"checkpoint/failed_step": 2}
    needed = 4 * 4 * (64 * 64 + 64 + 7 * 64 + 7) + 4 * 4
    said = (
        rf"of step 2 can't be saved: rank 0: OSError.*{needed / 1e6:.2f} MB needed.*, 0\.00 MB free.*of step 1 is kept"
    )
    assert re.search(f"{said}, and training goes on", news.message)
    assert names(folder) == ["step_00000001"]
    advance(state)
    with pytest.raises(
        RuntimeError, match=r"the checkpoint of step 3 can't be saved: .* 0\.00 MB free.*step 1 is kept$"
    ):
        save(checkpoints, state)
    assert names(folder) == ["step_00000001"] and before[1] == read(folder / "step_00000001")[1]
    (small_disk / "filler").unlink()
    checkpoints.writer = Writer
    other = small_state()
    for _ in range(3):
        advance(other)
    assert_equal(save(checkpoints, state), save(new(folder / "straight", world), other))


def test_a_full_disk_at_the_step_that_was_restored(world: World, small_disk: Path) -> None:
    """A save that is due at once writes the counters only; the old ones stay, and training goes on."""
    folder = small_disk / "checkpoints"
    state = small_state()
    save(new(folder, world), state)
    before = read_counters(folder / "step_00000000")
    again = new(folder, world)
    again.restore(state)
    fill(small_disk)
    state.best = [(0.25, 0)]
    save(again, state, wait=False)
    (news,) = again.settle()
    assert news.metrics == {"checkpoint/failed_step": 0}
    assert re.search("its counters can't be written again: .*No space left.*, and training goes on", news.message)
    assert is_whole(folder / "step_00000000") and read_counters(folder / "step_00000000") == before
    with pytest.raises(RuntimeError, match="its counters can't be written again: .*No space left"):
        save(again, state)


def test_a_copy_that_a_person_has_made_is_no_checkpoint(world: World, tmp_path: Path) -> None:
    """It sorts behind its original, and would be restored from, or push others out."""
    state, checkpoints = small_state(), new(tmp_path, world, keep_last=1)
    copies = [tmp_path / f"step_0000000{name}" for name in ("0_keep", "9.old")]
    first = save(checkpoints, state)
    for copy in copies:
        shutil.copytree(first, copy)
    for _ in range(2):
        advance(state)
        save(checkpoints, state)
    assert names(tmp_path) == [copies[0].name, "step_00000002", copies[1].name]
    other = small_state()
    new(tmp_path, world).restore(other)
    assert other.step == 2


def test_counters_are_read_as_json_has_them(tmp_path: Path) -> None:
    write_counters(tmp_path, {"train": {"loss": float("inf")}, "stream": {2: (0.1, None), 10: "a"}})
    assert read_counters(tmp_path) == {"train": {"loss": float("inf")}, "stream": {"2": [0.1, None], "10": "a"}}


def test_a_save_that_is_there_already_is_not_repeated(world: World, tmp_path: Path) -> None:
    state, checkpoints = small_state(), new(tmp_path, world)
    save(checkpoints, state)
    file, listed = (
        data_file(tmp_path / "step_00000000"),
        json.loads((tmp_path / "step_00000000/manifest.json").read_text()),
    )
    written = file.stat().st_mtime_ns
    state.best = [(0.5, 0)]
    again: Checkpoints = new(tmp_path, world)
    again.restore(state)
    state.best = [(0.25, 0)]
    save(again, state)
    assert file.stat().st_mtime_ns == written and set(listed) == {".metadata", file.name}
    other = small_state()
    new(tmp_path, world).restore(other)
    assert other.best == [(0.25, 0)]
