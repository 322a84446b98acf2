"""Shards travel: ours are read by webdataset and by Hugging Face's `datasets`, theirs and img2dataset's by us."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthos.batch import Input
from synthos.data.stream import Stream
from tests.data.make import INPUTS, config, data_set, encoded, noise, parquet, picture, tar


@pytest.fixture
def ours(tmp_path: Path) -> list[str]:
    return sorted(map(str, data_set(tmp_path / "ours", 5, 3).glob("*.tar")))


def captions(shards: Path | list[str], samples: int) -> dict[str, tuple[int, ...]]:
    """Caption -> colour of the first pixel, as training would read them."""
    stream = Stream(config(shards), INPUTS, batch_size=samples, rank=0, world=1, seed=0)
    batch = stream.next()
    colors = [tuple(pixels[:, 0, 0].tolist()) for pixels in batch.images("image")]
    return dict(zip(batch.texts("text"), colors, strict=True))


def test_our_shards_in_a_plain_pipeline_of_webdataset(ours: list[str]) -> None:
    import webdataset as wds

    pipeline = wds.DataPipeline(
        wds.SimpleShardList(ours),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.decode("pil"),
        wds.to_tuple("png", "txt", "json"),
    )
    for i, (image, text, facts) in enumerate(pipeline):
        assert image.getpixel((0, 0)) == (i, 0, 7) and text == facts["caption"] == f"caption {i}"
        assert facts["number"] == i and (facts["width"], facts["height"]) == image.size
    assert i == 4


def test_our_shards_in_datasets(ours: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    loaded = datasets.load_dataset("webdataset", data_files={"train": ours}, split="train", streaming=True)
    rows = list(loaded)
    assert [row["__key__"] for row in rows] == ["000000000", "000000001", "000000002", "000010000", "000010001"]
    for i, row in enumerate(rows):
        assert row["png"].getpixel((0, 0)) == (i, 0, 7)
        assert row["txt"] == row["json"]["caption"] == f"caption {i}" and row["json"]["number"] == i


def test_shards_of_webdatasets_writer(tmp_path: Path) -> None:
    import webdataset as wds

    with wds.ShardWriter(f"{tmp_path}/%06d.tar", maxcount=3, verbose=0) as writer:
        for i in range(7):
            image = Image.new("RGB", (16, 16), (i, 100, 7))
            writer.write({"__key__": f"folder/sample{i}", "png": image, "txt": f"caption {i}", "json": {"number": i}})
    assert len(list(tmp_path.glob("*.tar"))) == 3
    assert captions(tmp_path, 7) == {f"caption {i}": (i, 100, 7) for i in range(7)}


def test_shards_of_img2dataset(tmp_path: Path) -> None:
    """Five digits and nine, members in the order of completion, a table with the failures and the stats beside."""
    for shard in range(2):
        rows, members = [], []
        for row in (2, 0, 1):
            key, fetched = f"{shard * 10_000 + row:09d}", row != 1
            rows.append({"caption": key, "key": key, "status": "success" if fetched else "failed_to_download"})
            if fetched:
                data = encoded(Image.new("RGB", (32, 24), (50 * row, 0, 0)), "JPEG", quality=95)
                facts = {"caption": key, "key": key, "status": "success", "original_width": 32, "exif": "{}"}
                members += [(f"{key}.jpg", data), (f"{key}.json", json.dumps(facts).encode())]
                members += [(f"{key}.txt", key.encode())]
        tar(tmp_path / f"{shard:05d}.tar", members)
        parquet(tmp_path / f"{shard:05d}.parquet", rows)
        (tmp_path / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 3, "successes": 2}))
    read = captions(tmp_path, 4)
    assert set(read) == {"000000000", "000000002", "000010000", "000010002"}
    assert all(abs(color[0] - 50 * int(key[-1])) <= 2 for key, color in read.items())


def test_tars_of_pictures_only_by_a_json_list(tmp_path: Path) -> None:
    """What the SigLIP projector is trained on: members .jpeg and no captions."""
    pictures = {f"{shard}{i}": noise(16, 16, 10 * shard + i) for shard in range(2) for i in range(3)}
    for shard in range(2):
        members = [(f"{k}.jpeg", encoded(p, "JPEG", quality=95)) for k, p in pictures.items() if k[0] == str(shard)]
        tar(tmp_path / f"{shard}.tar", members)
    (tmp_path / "shards.json").write_text(json.dumps(["1.tar", "0.tar"]))
    inputs = {"image": Input("image", ("jpg", "jpeg", "png", "webp"))}
    data = config(tmp_path / "shards.json", height=16, width=16)
    batch = Stream(data, inputs, batch_size=6, rank=0, world=1, seed=0).next()
    expected = [
        np.asarray(Image.open(io.BytesIO(encoded(p, "JPEG", quality=95)))).astype(int) for p in pictures.values()
    ]
    for pixels in batch.images("image"):
        assert min(np.abs(pixels.numpy().transpose(1, 2, 0) - image).max() for image in expected) <= 3


def test_a_tar_without_pictures_is_named(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", [("a.txt", b"words"), ("a.json", b"{}")])
    tar(tmp_path / "1.tar", [("b.png", picture()), ("b.txt", b"words")])
    with pytest.raises(ValueError, match=r"0\.tar: sample 'a' is without an image: .* it has json, txt"):
        Stream(config(tmp_path), INPUTS, batch_size=1, rank=0, world=1, seed=0)


def test_pictures_of_all_makes_and_names(tmp_path: Path) -> None:
    """Upper-case extensions, folders, dots behind the key; every mode a camera or a designer leaves. Left half red."""
    half = Image.new("RGB", (16, 16), "white")
    half.paste((255, 0, 0), (0, 0, 8, 16))
    clear = half.convert("RGBA")
    clear.paste((0, 0, 255, 0), (8, 0, 16, 16))  # transparent: white
    lying = Image.Exif()
    lying[0x0112] = 6  # a quarter turn is to be undone
    grey = Image.fromarray(np.repeat(np.repeat(np.array([[20_000, 65_535]], np.uint16), 8, axis=1), 16, axis=0))
    red, grey_red = (255, 0, 0), (78, 78, 78)
    kinds = {
        "A.PNG": (encoded(half, "PNG"), red),
        "folder/b.v2/c.Jpeg": (encoded(half, "JPEG", quality=95), red),
        "d.JPG": (encoded(half.convert("CMYK"), "JPEG", quality=95), red),
        "e.webp": (encoded(half, "WEBP", lossless=True), red),
        "f.WEBP": (encoded(clear, "WEBP", lossless=True), red),
        "g.png": (encoded(clear, "PNG"), red),
        "h.png": (encoded(half.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), red),
        "i.png": (encoded(grey, "PNG"), grey_red),
        "j.jpg": (encoded(half.rotate(90), "JPEG", quality=95, exif=lying), red),
        "k.png": (encoded(half.rotate(90), "PNG", exif=lying), red),
    }
    members = []
    for name, (data, _) in kinds.items():
        members += [(name, data), (f"{name.rpartition('.')[0]}.TXT", name.encode())]
    tar(tmp_path / "0.tar", members)
    batch = Stream(config(tmp_path), INPUTS, batch_size=len(kinds), rank=0, world=1, seed=0).next()
    assert sorted(batch.texts("text")) == sorted(kinds) and not batch.faults
    for name, pixels in zip(batch.texts("text"), batch.images("image").numpy().astype(int), strict=True):
        assert np.abs(pixels[:, 4, 1] - kinds[name][1]).max() <= 3, name
        assert np.abs(pixels[:, 4, 6] - 255).max() <= 3, name
