"""Triplets: target, object and mask become one sample, and a mask that can't be used says why."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from synthos.batch import Input
from synthos.data.commands.write import main
from synthos.data.stream import Stream
from synthos.data.triplet import clean_mask
from tests.data.make import config, encoded, noise, parquet, picture

WIDTH, HEIGHT = 30, 20
INPUTS = {
    "target": Input("image", ("target.jpg", "target.png")),
    "object": Input("image", ("object.jpg", "object.png")),
    "mask": Input("image", ("mask.png",)),
}


def mask(*, grey: int = 255, kind: str = "PNG", mode: str = "L", size: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    """White (or `grey`) in its left half, black in its right."""
    pixels = np.zeros(size[::-1], np.uint8)
    pixels[:, : size[0] // 2] = grey
    return encoded(Image.fromarray(pixels).convert(mode), kind)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        (folder / f"scene{i}.jpg").write_bytes(encoded(noise(HEIGHT, WIDTH, i), "JPEG", quality=95))
        (folder / f"cup{i}.png").write_bytes(encoded(noise(16, 16, i + 10), "PNG"))
        (folder / f"mask{i}.png").write_bytes(mask())
    return folder


def write(tmp_path: Path, images: Path | None, table: Path, *options: str) -> tuple[list[dict[str, Any]], Path]:
    import webdataset

    out = tmp_path / "out"
    folder = [] if images is None else ["--images", str(images)]
    assert main(["--table", str(table), *folder, "--triplets", "--out", str(out), *options]) == 0
    return list(webdataset.WebDataset(sorted(map(str, out.glob("*.tar"))), shardshuffle=False)), out


def csv(tmp_path: Path, header: str, rows: list[str]) -> Path:
    (tmp_path / "t.csv").write_text("\n".join([header, *rows]) + "\n")
    return tmp_path / "t.csv"


@pytest.mark.parametrize("header", ["target_image,object_image,mask,note", "image_path,object_image_path,mask,note"])
def test_a_table_of_triplets(tmp_path: Path, images: Path, header: str) -> None:
    table = csv(tmp_path, header, [f"scene{i}.jpg,cup{i}.png,mask{i}.png,note {i}" for i in range(3)])
    samples, out = write(tmp_path, images, table)
    assert len(samples) == 3
    for i, sample in enumerate(samples):
        assert {name for name in sample if not name.startswith("__")} == {
            "target.jpg",
            "object.png",
            "mask.png",
            "json",
        }
        for member, name in {
            "target.jpg": f"scene{i}.jpg",
            "object.png": f"cup{i}.png",
            "mask.png": f"mask{i}.png",
        }.items():
            assert sample[member] == (images / name).read_bytes()
        facts = json.loads(sample["json"])
        assert (facts["file"], facts["note"], facts["width"], facts["height"]) == (f"scene{i}.jpg", f"note {i}", 30, 20)
    batch = Stream(config(out, height=HEIGHT, width=WIDTH), INPUTS, batch_size=3, rank=0, world=1, seed=0).next()
    white = np.zeros((HEIGHT, WIDTH), np.uint8)
    white[:, : WIDTH // 2] = 255
    assert all((pixels.numpy() == white).all() for pixels in batch.images("mask"))


def test_embedded_triplets_with_captions(tmp_path: Path) -> None:
    rows = [
        {
            "target_image": {"bytes": encoded(noise(HEIGHT, WIDTH), "PNG"), "path": None},
            "object_image": picture(),
            "mask": mask(),
            "prompt": prompt,
        }
        for prompt in ("a cup", "")
    ]
    samples, _ = write(tmp_path, None, parquet(tmp_path / "t.parquet", rows))
    assert [sample.get("txt") for sample in samples] == [b"a cup", None]
    assert sorted(name for name in samples[0] if name[0] != "_") == [
        "json",
        "mask.png",
        "object.png",
        "target.png",
        "txt",
    ]


def test_masks_that_hold_greys_are_rounded_and_counted(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "mask1.png").write_bytes(mask(grey=128))
    (images / "mask2.png").write_bytes(mask(kind="JPEG", mode="RGB", grey=250))
    table = csv(tmp_path, "target_image,object_image,mask", [f"scene{i}.jpg,cup{i}.png,mask{i}.png" for i in range(3)])
    samples, _ = write(tmp_path, images, table, "--json")
    assert json.loads(capsys.readouterr().out)["masks_rounded"] == 2
    assert samples[0]["mask.png"] == mask()
    for sample in samples:
        image = Image.open(io.BytesIO(sample["mask.png"]))
        assert (image.format, image.mode, image.size) == ("PNG", "L", (WIDTH, HEIGHT))
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(mask()))))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
def test_a_clean_mask_of_any_mode_is_not_counted(mode: str) -> None:
    white = np.asarray(Image.open(io.BytesIO(mask()))) > 0
    data = encoded(Image.fromarray(white.astype(np.uint16) * 65535), "PNG") if mode == "I;16" else mask(mode=mode)
    cleaned, rounded = clean_mask(data, WIDTH, HEIGHT)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(cleaned))) == 255, white) and not rounded


def test_a_mask_is_turned_as_it_is_seen() -> None:
    turned = Image.open(io.BytesIO(mask(size=(HEIGHT, WIDTH))))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen, it is turned by a quarter: its left half becomes the upper one
    cleaned, rounded = clean_mask(encoded(turned, "WEBP", lossless=True, exif=exif), WIDTH, HEIGHT)
    pixels = np.asarray(Image.open(io.BytesIO(cleaned)))
    assert (pixels[: HEIGHT // 2] == 255).all() and (pixels[HEIGHT // 2 :] == 0).all() and not rounded


def test_triplets_that_cannot_be_written_are_listed(tmp_path: Path, images: Path) -> None:
    (images / "other.png").write_bytes(mask(size=(WIDTH, HEIGHT + 1)))
    (images / "black.png").write_bytes(mask(grey=100))
    (images / "cut.png").write_bytes(encoded(noise(HEIGHT, WIDTH), "PNG")[:-30])
    good = "scene0.jpg", "cup0.png", "mask0.png"
    bad = [
        (2, "other.png", "mask, not of the target's size: 30 x 21 for 30 x 20"),
        (2, "black.png", "mask, black: there is nowhere to insert the object"),
        (2, "cut.png", "mask, damaged PNG: "),
        (2, "", "mask, no picture"),
        (2, "../mask0.png", "mask, leads out of --images"),
        (1, "absent.png", "object, No such file or directory"),
        (0, "cut.png", "target, damaged PNG: "),
    ]
    rows = [",".join((*good[:place], name, *good[place + 1 :])) for place, name, _ in bad]
    samples, out = write(tmp_path, images, csv(tmp_path, "target_image,object_image,mask", [*rows, ",".join(good)]))
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert len(samples) == 1 and [line["row"] for line in lines] == list(range(1, len(bad) + 1))
    for line, (_, _, reason) in zip(lines, bad, strict=True):
        assert line["reason"].startswith(reason)
    assert [Path(line["image"]).name for line in lines] == ["scene0.jpg"] * 6 + ["cut.png"]


@pytest.mark.parametrize("missing", ["target_image", "object_image", "mask"])
def test_a_table_that_lacks_a_column(tmp_path: Path, images: Path, missing: str) -> None:
    there = [name for name in ("target_image", "object_image", "mask") if name != missing]
    with pytest.raises(ValueError, match=f"has the columns {', '.join(there)}; triplets need one of {missing}"):
        write(tmp_path, images, csv(tmp_path, ",".join(there), ["a,b"]))
