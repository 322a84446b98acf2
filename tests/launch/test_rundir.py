"""The run folder: opened once, held by one process, read for how far it got."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from launch.compose import compose
from launch.rundir import RunState, hold, lock, open_folder, read_state, run_folder
from synthos.schema import RunConfig
from synthos.strict import read_config


def config(tmp_path: Path, *overrides: str) -> RunConfig:
    return compose(["recipe=i2i", "model=tiny", "data=photos", f"runs_dir={tmp_path}", *overrides]).config


def opened(tmp_path: Path, checkout: Path, *overrides: str) -> Path:
    made = config(tmp_path, *overrides)
    folder = run_folder(made, "1a2b3c4d")
    with hold(folder):
        open_folder(folder, made, ["synthos", "submit", "name=two words"], checkout)
    return folder


def test_a_folder_is_named_after_group_name_and_signature(tmp_path: Path) -> None:
    made = config(tmp_path, "group=g", "name=n")
    assert run_folder(made, "1a2b3c4d") == tmp_path / "g" / "n-1a2b3c4d"


def test_the_frozen_config_is_the_composed_one(tmp_path: Path, checkout: Path) -> None:
    frozen = read_config(RunConfig, opened(tmp_path, checkout) / "config.yaml")
    made = config(tmp_path)
    assert frozen == dataclasses.replace(made, validate=dataclasses.replace(made.validate, requests=[]))


def test_going_on_takes_the_new_machines(tmp_path: Path, checkout: Path) -> None:
    folder = opened(tmp_path, checkout)
    opened(tmp_path, checkout, "gpus_per_node=2")
    assert read_config(RunConfig, folder / "config.yaml").gpus_per_node == 2


def test_another_generation_stands_beside_the_first(tmp_path: Path) -> None:
    made = config(tmp_path, "group=g", "name=n")
    names = []
    for _ in range(3):
        folder = run_folder(made, "1a2b3c4d", new=True)
        assert not folder.exists()
        folder.mkdir(parents=True)
        assert run_folder(made, "1a2b3c4d", new=True) == folder  # locked by a start that was refused, never opened
        (folder / "config.yaml").touch()
        assert run_folder(made, "1a2b3c4d") == folder  # without being asked for a new one, the newest goes on
        names.append(folder.name)
    assert names == ["n-1a2b3c4d", "n-1a2b3c4d-g2", "n-1a2b3c4d-g3"]


def test_pictures_are_copied_and_named_relative_to_the_folder(tmp_path: Path, checkout: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.jpg")
    folder = opened(tmp_path, checkout, f"validate.requests=[{{name: a, reference: {tmp_path / 'photo.jpg'}}}]")
    requests = read_config(RunConfig, folder / "config.yaml").validate.requests
    assert isinstance(requests, list) and requests[0]["reference"] == "requests/a.reference.jpg"
    assert (folder / "requests" / "a.reference.jpg").read_bytes() == (tmp_path / "photo.jpg").read_bytes()


def test_every_picture_field_is_copied(tmp_path: Path, checkout: Path) -> None:
    pictures = {"reference": tmp_path / "a.jpg", "reference_depth": tmp_path / "b.png"}
    for picture in pictures.values():
        Image.new("RGB", (4, 4)).save(picture)
    row = ", ".join(f"{key}: {path}" for key, path in pictures.items())
    folder = opened(tmp_path, checkout, f"validate.requests=[{{name: x, {row}, reference_scale: 0.5}}]")
    (request,) = read_config(RunConfig, folder / "config.yaml").validate.requests or []
    assert isinstance(request, dict) and request["reference_scale"] == 0.5
    for key, picture in pictures.items():
        assert request[key] == f"requests/x.{key}{picture.suffix}"
        assert (folder / request[key]).read_bytes() == picture.read_bytes()


def test_a_folder_that_cannot_be_made_or_locked_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    not_a_folder = r"^runs_dir: .*/file/run/control/lock can't be locked: Not a directory; "
    with pytest.raises(ValueError, match=not_a_folder), hold(tmp_path / "file" / "run"):
        raise AssertionError("held what can't be")
    (tmp_path / "run" / "control" / "lock").mkdir(parents=True)
    not_a_file = r"^runs_dir: .*/lock can't be locked: Is a directory; "
    with pytest.raises(ValueError, match=not_a_file), hold(tmp_path / "run"):
        raise AssertionError("held what can't be")


@pytest.mark.skipif(not hasattr(os, "O_PATH"), reason="a descriptor that the kernel refuses to lock is Linux's")
def test_a_file_that_the_kernel_refuses_to_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    refused = pytest.raises(ValueError, match=r"^runs_dir: .*/lock can't be locked: Bad file descriptor; ")
    with open(tmp_path / "lock", opener=lambda path, _: os.open(path, os.O_PATH)) as file, refused:
        lock(file)


def test_only_one_process_holds_a_run(tmp_path: Path) -> None:
    with hold(tmp_path) as lock, hold(tmp_path) as second:
        assert lock is not None and second is None
        # What the kernel ties to the open file outlives this process' interest in it as long as a child has it.
        keeper = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.fileno()], text=True
        )
    with hold(tmp_path) as held:
        assert held is None
    keeper.communicate("\n", timeout=30)
    with hold(tmp_path) as free:
        assert free is not None


def test_the_state_of_a_run_that_never_started(tmp_path: Path) -> None:
    state = read_state(tmp_path / "absent")
    assert state == RunState(exists=False, attempts=0, step=None, verdict={}, weights=None) and not state.done


def test_the_state_counts_whole_checkpoints_only(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    for attempt in (1, 2):
        (tmp_path / "attempts" / f"{attempt:04d}").mkdir(parents=True)
    for step, whole in ((100, True), (200, True), (300, False)):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "data").write_text("12345" if whole else "123")
        (folder / "manifest.json").write_text(json.dumps({"data": [5, 0]}))
        (folder / "state.json").write_text("{}")
    (tmp_path / "checkpoints" / ".step_00000400.part").mkdir()
    (tmp_path / "weights" / "step_00000200").mkdir(parents=True)
    (tmp_path / "control").mkdir()
    verdict = {"status": "done", "cause": "finished", "step": 200, "attempt": 2, "message": ""}
    (tmp_path / "control" / "verdict.json").write_text(json.dumps(verdict))
    state = read_state(tmp_path)
    assert state == RunState(True, 2, 200, verdict, tmp_path / "weights" / "step_00000200") and state.done
