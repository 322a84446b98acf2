"""What is said of a run's data before it starts."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from synthos.batch import Input
from synthos.data.check import DataFacts, facts
from synthos.data.shards import index_path
from synthos.data.stream import HeldOut
from tests.data.make import INPUTS, config, data_set, pairs, picture, tar


def test_nothing_is_written_unless_asked(tmp_path: Path) -> None:
    shards = [tar(tmp_path / f"{i}.tar", pairs(["a", "b"])) for i in range(2)]
    assert facts(config(tmp_path), INPUTS, build=False) == DataFacts(shards=2)
    assert not any(Path(index_path(str(shard))).exists() for shard in shards)
    found = facts(config(tmp_path), INPUTS, build=True)
    assert (found.samples, found.held_out, found.shards, found.missing) == (4, 0, 2, [])
    assert all(Path(index_path(str(shard))).exists() for shard in shards)
    assert facts(config(tmp_path), INPUTS, build=False) == found


def test_missing_shards_of_both_splits_are_lines(tmp_path: Path) -> None:
    found = facts(config(tmp_path / "{0..1}.tar", validation=str(tmp_path / "v.tar")), INPUTS, build=True)
    assert found == DataFacts(
        missing=[
            f"data.shards: no such shard: {tmp_path}/0.tar",
            f"data.shards: no such shard: {tmp_path}/1.tar",
            f"data.validation: no such shard: {tmp_path}/v.tar",
        ]
    )
    assert facts(config(None), INPUTS, build=False).missing[0].startswith("data.shards: not set; expected")


@pytest.mark.parametrize(
    "members, fault",
    [
        ([("b.png", picture())], "sample 'b' is without a caption: text needs a member txt, it has png"),
        (
            [("b.txt", b"x")],
            "sample 'b' is without an image: image needs a member jpg or jpeg or png or webp, it has txt",
        ),
        ([("b.1.png", picture()), ("b.txt", b"x")], "sample 'b' is without an image.*it has 1.png, txt"),
        ([("b.png", picture()), ("b.txt", b" \n")], "sample 'b' has an empty text, or one that is not UTF-8"),
        ([("b.png", picture()), ("b.txt", b"\xff\xfe")], "sample 'b' has an empty text, or one that is not UTF-8"),
        ([("b.png", b"GIF89a"), ("b.txt", b"x")], "sample 'b' has an unreadable image"),
    ],
)
def test_a_sample_that_lacks_an_input_is_named(tmp_path: Path, members: list[tuple[str, bytes]], fault: str) -> None:
    path = tar(tmp_path / "0.tar", [*pairs(["a"]), *members])
    for build in (True, False):  # the second time from the index
        with pytest.raises(ValueError, match=rf"data\.shards: {path}: {fault}"):
            facts(config(tmp_path), INPUTS, build)


@pytest.mark.parametrize("bad", [[("{}.png", picture())], [("{}.png", picture()), ("{}.txt", b" ")]])
def test_further_samples_with_the_fault_are_counted(tmp_path: Path, bad: list[tuple[str, bytes]]) -> None:
    members = [(name.format(key), data) for key in "bcd" for name, data in bad]
    tar(tmp_path / "0.tar", [*pairs(["a"]), *members])
    with pytest.raises(
        ValueError,
        match=r"(?s)sample 'b'.*sample 'c'.*sample 'd'.*3 of 4 samples can't be used: more than data.max_bad_fraction",
    ):
        facts(config(tmp_path), INPUTS, build=True)


def test_only_what_the_recipe_reads_must_be_there(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", [("a.png", picture())])
    assert facts(config(tmp_path), {"image": INPUTS["image"]}, build=True).samples == 1


def test_the_first_extension_is_read(tmp_path: Path) -> None:
    red, blue = picture((255, 0, 0)), picture((0, 0, 255))
    (tmp_path / "train").mkdir()
    tar(tmp_path / "train" / "0.tar", pairs(["x"]))
    (tmp_path / "held").mkdir()
    tar(tmp_path / "held" / "0.tar", [("a.png", red), ("a.ref.png", blue), ("b.png", red)])
    inputs = {"image": Input("image", ("ref.png", "png"))}
    held_out = HeldOut(config(tmp_path / "train", validation=str(tmp_path / "held")), inputs)
    colors = {tuple(image[:, 0, 0].tolist()) for image in held_out.batch([0, 1]).images("image")}
    assert colors == {(0, 0, 255), (255, 0, 0)}


def test_the_fingerprint_tells_data_sets_apart(tmp_path: Path) -> None:
    one, two = data_set(tmp_path / "1", 6, 3), data_set(tmp_path / "2", 6, 3, first=100)
    moved = shutil.copytree(one, tmp_path / "elsewhere")
    found = [facts(config(folder), INPUTS, build=True).fingerprint for folder in (one, two, moved)]
    assert found[0] == found[2] != found[1]
    validated = facts(config(one, validation=str(two)), INPUTS, build=True)
    assert validated.fingerprint not in found and (validated.samples, validated.held_out) == (6, 6)


def test_a_shard_that_contradicts_the_manifest(tmp_path: Path) -> None:
    folder = data_set(tmp_path / "set", 6, 3)
    (folder / "00001.idx.npz").unlink()
    tar(folder / "00001.tar", pairs(["a"]))
    with pytest.raises(ValueError, match=r"00001\.tar has 1 samples in \d+ bytes, manifest\.json says 3"):
        facts(config(folder), INPUTS, build=True)


def test_no_sample_is_in_both_splits(tmp_path: Path) -> None:
    train = data_set(tmp_path / "train", 6, 3)
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(train / "00001.tar", copy / "renamed.tar")
    for validation in (str(train / "00001.tar"), str(copy)):
        with pytest.raises(ValueError, match=r"data\.validation: sample '00001000[012]' is also in data\.shards"):
            facts(config(train, validation=validation), INPUTS, build=True)
    other = data_set(tmp_path / "other", 6, 3, first=100)  # the same keys, other pictures
    assert facts(config(train, validation=str(other)), INPUTS, build=True).held_out == 6


def test_a_picture_is_found_under_another_key_and_caption(tmp_path: Path) -> None:
    train = data_set(tmp_path / "train", 6, 3)
    shifted = data_set(tmp_path / "shifted", 6, 3, first=5)  # its first is the last of `train`, in another row
    with pytest.raises(
        ValueError, match=r"sample '000000000' is also in data\.shards, as sample '000010002' of .*train"
    ):
        facts(config(train, validation=str(shifted)), INPUTS, build=True)
    tar(tmp_path / "told.tar", [("x.png", picture((3, 0, 7))), ("x.txt", b"in other words")])
    with pytest.raises(ValueError, match=r"sample 'x' is also in data\.shards, as sample '000010000' of"):
        facts(config(train, validation=str(tmp_path / "told.tar")), INPUTS, build=True)


def test_without_pictures_all_that_is_read_is_compared(tmp_path: Path) -> None:
    inputs = {"text": Input("text", ("txt",)), "about": Input("text", ("md",))}
    for name, key, about in (("train", "a", b"1"), ("other", "a", b"2"), ("same", "b", b"1")):
        tar(tmp_path / f"{name}.tar", [(f"{key}.txt", b"caption"), (f"{key}.md", about)])
    train, other, same = (str(tmp_path / f"{name}.tar") for name in ("train", "other", "same"))
    assert facts(config(train, validation=other), inputs, build=True).held_out == 1
    with pytest.raises(ValueError, match=r"sample 'b' is also in data\.shards, as sample 'a' of"):
        facts(config(train, validation=same), inputs, build=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"holdout_fraction": 1.0}, r"data\.holdout_fraction: 1\.0 is not allowed"),
        ({"holdout_fraction": 0.1, "validation": "x.tar"}, "would be ignored"),
        ({"holdout_fraction": 1e-9}, "of 6 samples holds none out"),
        ({"window": 0}, r"data\.window: 0 is not allowed; at least 1"),
        ({"workers": -1}, r"data\.workers: -1 is not allowed; at least 0"),
    ],
)
def test_impossible_settings(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = data_set(tmp_path / "set", 6, 3)
    with pytest.raises(ValueError, match=message):
        facts(replace(config(folder), **changes), INPUTS, build=True)


def test_no_sample_to_train_on(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", [])
    with pytest.raises(ValueError, match=r"data\.shards: .* leaves no sample"):
        facts(config(tmp_path), INPUTS, build=True)
