"""The built-in photographs: three splits that share no pixel, with captions that say what can be measured."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthos.data import photos as photographs
from synthos.data.check import facts
from synthos.data.photos import SEEN, SPLITS, UNSEEN, color_name, crops, missing, prepare
from synthos.data.stream import HeldOut
from tests.data.make import INPUTS, config

pytest.importorskip("skimage")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "photos"
    prepare(folder)
    return folder


def samples(folder: Path) -> list[dict[str, bytes]]:
    import webdataset

    return list(webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False))


def test_splits_and_counts(photos: Path) -> None:
    assert [len(samples(photos / split)) for split in ("train", "region", "photo")] == [3000, 48, 40]
    data = config(photos / "train", validation=str(photos / "region"), height=64, width=64)
    found = facts(data, INPUTS, build=False)
    assert (found.samples, found.held_out) == (3000, 48)
    assert HeldOut(data, INPUTS).batch([0, 1]).images("image").shape == (2, 3, 64, 64)


def test_no_pixel_is_in_two_splits(photos: Path) -> None:
    used: dict[tuple[str, str], np.ndarray] = {}
    for split in ("train", "region", "photo"):
        for sample in samples(photos / split):
            fact = json.loads(sample["json"])
            left, top, right, bottom = fact["box"]
            assert right - left == bottom - top >= 64
            mask = used.setdefault((split, fact["photo"]), np.zeros((2000, 2000), bool))
            mask[top:bottom, left:right] = True
    assert {photo for split, photo in used if split == "photo"} == set(UNSEEN)
    assert {photo for split, photo in used if split == "train"} == set(SEEN)
    for photo in SEEN:
        assert not (used["train", photo] & used["region", photo]).any()
        assert used["train", photo].sum() > used["region", photo].sum() > 0


def test_a_crop_is_what_its_box_says(photos: Path) -> None:
    import skimage

    for sample in samples(photos / "region"):
        fact = json.loads(sample["json"])
        whole = Image.open(Path(skimage.__file__).parent / "data" / fact["photo"]).convert("RGB")
        expected = whole.crop(fact["box"]).resize((64, 64), Image.Resampling.LANCZOS)
        found = np.asarray(Image.open(io.BytesIO(sample["jpg"])))
        assert np.abs(found.astype(int) - np.asarray(expected)).mean() < 4


def test_captions_have_two_to_five_sentences(photos: Path) -> None:
    counts = set()
    captions = [sample["txt"].decode() for split in ("train", "region", "photo") for sample in samples(photos / split)]
    for caption in captions:
        sentences = caption.removesuffix(".").split(". ")
        counts.add(len(sentences))
        assert caption.endswith(".") and sentences[0].startswith("A piece of the photograph of")
        assert sentences[1].startswith("The top left is ")
    assert counts == {2, 3, 4, 5}
    assert len(set(captions)) > 1000


def test_quarters_are_named_by_their_colour() -> None:
    photo = Image.new("RGB", (300, 300), (255, 0, 0))
    photo.paste((0, 0, 255), (150, 0, 300, 300))  # red on the left, blue on the right: every crop shows the edge
    rows = list(crops("photo", dict.fromkeys(UNSEEN, photo)))
    halves = [(row.caption, row.facts["box"][0], sum(row.facts["box"][::2]) // 2) for row in rows]  # left edge, middle
    reds = [caption for caption, _, middle in halves if middle <= 150]
    blues = [caption for caption, left, middle in halves if middle >= 150]
    assert reds and all("top left is red" in c and "bottom left red" in c for c in reds)
    assert blues and all("top right blue" in c and "bottom right blue" in c for c in blues)
    assert all(left < 150 for _, left, _ in halves)


@pytest.mark.parametrize(
    "rgb, name",
    [((255, 0, 0), "red"), ((0, 0, 80), "dark blue"), ((20, 20, 20), "black"), ((250, 250, 250), "white"),
     ((128, 128, 128), "grey"), ((255, 170, 180), "pink"), ((150, 190, 255), "pale blue"),
     ((120, 70, 30), "brown"), ((0, 200, 0), "green")],
)  # fmt: skip
def test_colour_names(rgb: tuple[int, int, int], name: str) -> None:
    assert color_name(np.array(rgb, float)) == name


def test_prepared_once_and_always_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer crops of each photograph."""
    monkeypatch.setattr(photographs, "SPLITS", {name: (*split[:2], 8) for name, split in SPLITS.items()})
    prepare(tmp_path / "one")
    before = (tmp_path / "one" / "train" / "manifest.json").stat().st_mtime_ns
    prepare(tmp_path / "one")
    assert (tmp_path / "one" / "train" / "manifest.json").stat().st_mtime_ns == before
    prepare(tmp_path / "two")
    for split in SPLITS:
        name = f"{split}/manifest.json"
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_without_scikit_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing() == []
    monkeypatch.setitem(sys.modules, "skimage", None)  # how Python marks a module that can't be imported
    with pytest.raises(ValueError, match=r"pip install -e '\.\[demo\]'"):
        prepare(tmp_path / "photos")
    assert not list(tmp_path.iterdir())
    (line,) = missing()
    assert "pip install -e '.[demo]'" in line and "\n" not in line
