"""Data and weights, before the start."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import synthos.data
from launch.compose import compose
from launch.survey import Survey, space_problems, survey
from synthos.recipes.base import recipe_class
from synthos.train.memory import Sizes, checkpoint_bytes
from tests.launch.conftest import Submit, tree
from tests.launch.test_attempts import make_checkpoint


def look(tmp_path: Path, *overrides: str, dry_run: bool = False) -> Survey:
    base = ("recipe=i2i", "model=tiny", f"cache_dir={tmp_path / 'cache'}")
    return survey(compose([*base, *overrides]).config, recipe_class("i2i"), dry_run)


def unindexed(shards: Path, tmp_path: Path) -> str:
    for tar in shards.glob("*.tar"):
        shutil.copy(tar, tmp_path / tar.name)
    return f"data.shards={tmp_path}"


def test_indexed_shards_are_counted_at_once(shards: Path, tmp_path: Path) -> None:
    found = look(tmp_path, f"data.shards={shards}", "data.holdout_fraction=0.2", dry_run=True)
    assert found.data.samples is not None and found.data.held_out is not None
    assert found.data.samples + found.data.held_out == 24 and found.data.shards == 2
    assert found.missing == [] == found.notes


def test_only_a_real_submission_indexes(shards: Path, tmp_path: Path) -> None:
    override = unindexed(shards, tmp_path)
    before = tree(tmp_path)
    dry = look(tmp_path, override, dry_run=True)
    assert dry.data.samples is None and dry.notes == [
        "data: the shards of webdataset will be indexed, which reads each of them once"
    ]
    assert tree(tmp_path) == before
    real = look(tmp_path, override)
    assert real.data.samples and real.notes == []
    assert look(tmp_path, override, dry_run=True) == real


def test_a_run_that_streams_has_a_shard_for_each_reader(shards: Path, tmp_path: Path) -> None:
    streamed = ("data.streaming={samples_per_epoch: 24}", f"data.shards={shards}", "data.holdout_fraction=0")
    for dry_run in (True, False):
        assert look(tmp_path, *streamed, "data.workers=2", dry_run=dry_run).data.samples == 24
        with pytest.raises(ValueError, match="2 shards are too few for 2 ranks of 2 readers"):
            look(tmp_path, *streamed, "data.workers=2", "gpus_per_node=2", dry_run=dry_run)


def test_no_work_for_a_run_that_cannot_start(shards: Path, tmp_path: Path) -> None:
    override = unindexed(shards, tmp_path)
    before = tree(tmp_path)
    for overrides in ((override,), ("data=photos",)):
        found = look(tmp_path, *overrides, "+model.parts.vae.path=no/where")
        assert len(found.missing) == 1 and "model.parts.vae" in found.missing[0]
    assert tree(tmp_path) == before


def test_a_built_in_data_set_is_announced_by_a_dry_run(tmp_path: Path) -> None:
    found = look(tmp_path, "data=photos", dry_run=True)
    assert found.notes == [f"data: photos will be written to {tmp_path / 'cache' / 'photos-1'}"]
    assert found.missing == [] and list(tmp_path.iterdir()) == []


@pytest.fixture
def built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data module of the name `demo_for_test`, whose needs are the lines of the returned file."""
    needs, folder = tmp_path / "needs.txt", tmp_path / "modules"
    folder.mkdir()
    needs.touch()
    (folder / "demo_for_test.py").write_text(
        "from pathlib import Path\n"
        f"def missing():\n    return Path({str(needs)!r}).read_text().splitlines()\n"
        "def prepare(folder):\n    (folder / 'train').mkdir(parents=True)\n"
    )
    monkeypatch.setattr(synthos.data, "__path__", [*synthos.data.__path__, str(folder)])
    yield needs
    sys.modules.pop("synthos.data.demo_for_test", None)
    vars(synthos.data).pop("demo_for_test", None)


def test_what_a_built_in_data_set_needs_is_missing(tmp_path: Path, built_in: Path) -> None:
    shards = tmp_path / "cache" / "demo" / "train"
    overrides = ("data=photos", "data.prepare=demo_for_test", f"data.shards={shards}", f"data.validation={shards}")
    built_in.write_text("get the photographs\n")
    for dry_run in (True, False):
        assert look(tmp_path, *overrides, dry_run=dry_run).missing == ["get the photographs"]
    assert not (tmp_path / "cache").exists()
    built_in.write_text("")
    found = look(tmp_path, *overrides)
    assert shards.is_dir() and found.missing[0].startswith("data.shards: ")  # it was written, and is empty


@pytest.mark.parametrize("place", ["elsewhere/train", "cache/train", "cache/../elsewhere/train"])
def test_a_built_in_data_set_is_written_below_the_cache_only(tmp_path: Path, place: str) -> None:
    with pytest.raises(ValueError, match=r"^data\.shards: .* would be written outside of cache_dir "):
        look(tmp_path, "data=photos", f"data.shards={tmp_path / place}")
    assert list(tmp_path.iterdir()) == []


def test_absent_shards_are_missing_lines(tmp_path: Path) -> None:
    found = look(tmp_path, f"data.shards={tmp_path}/{{00000..00001}}.tar")
    assert found.missing == [f"data.shards: no such shard: {tmp_path}/0000{i}.tar" for i in range(2)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.prepare=nonesuch", "data.prepare: 'nonesuch' is unknown, there is no module synthos.data.nonesuch"),
        ("data.shards=[a.tar]", "data.shards: .* is not allowed with data.prepare; expected one folder"),
    ],
)
def test_what_cannot_be_prepared(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        look(tmp_path, "data=photos", override)


def test_three_checkpoints_fit_on_the_disk_or_the_run_does_not_start(tmp_path: Path) -> None:
    """Of a size of which two fit and three do not; what is there already takes no more space."""
    config = compose(["recipe=i2i", "model=tiny", f"runs_dir={tmp_path / 'new' / 'runs'}"]).config
    free = shutil.disk_usage(tmp_path).free
    shape = torch.Size([int(0.4 * free) // 12])
    sizes = Sizes({"all": [shape]}, [], [], [], {}, {}, {})
    assert checkpoint_bytes(config, sizes) == pytest.approx(0.4 * free, rel=1e-3)
    (line,) = space_problems([(config, sizes, None)])
    assert f" are free in {tmp_path}/new/runs, " in line and "are needed for 3 checkpoints" in line
    make_checkpoint(tmp_path, 5)
    assert space_problems([(config, sizes, tmp_path)]) == []
    assert not (tmp_path / "new").exists()


def test_a_disk_without_space_is_a_missing_line(submit: Submit, capsys: pytest.CaptureFixture[str]) -> None:
    too_many = f"checkpoint.keep_last={10**15}"
    assert submit(too_many, "dry_run=full") == 0
    assert "missing: runs_dir: " in capsys.readouterr().out
    assert submit(too_many) == 2
    assert f"are needed for {10**15 + 1} checkpoints; expected another runs_dir" in capsys.readouterr().err
