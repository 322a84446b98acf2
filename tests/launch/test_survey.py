"""Data and weights, before the start."""

import shutil
from pathlib import Path

import pytest

from launch.compose import compose
from launch.survey import Survey, survey
from synthos.build import recipe_class
from tests.launch.conftest import tree


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


def test_no_work_for_a_run_that_cannot_start(shards: Path, tmp_path: Path) -> None:
    override = unindexed(shards, tmp_path)
    before = tree(tmp_path)
    for overrides in ((override,), ("data=photos",)):
        found = look(tmp_path, *overrides, "+model.parts.vae.path=no/where")
        assert len(found.missing) == 1 and "model.parts.vae" in found.missing[0]
    assert tree(tmp_path) == before


def test_a_built_in_data_set_is_announced_by_a_dry_run(tmp_path: Path) -> None:
    found = look(tmp_path, "data=photos", dry_run=True)
    assert found.notes == [f"data: photos will be written to {tmp_path / 'cache' / 'photos'}"]
    assert found.missing == [] and list(tmp_path.iterdir()) == []


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
