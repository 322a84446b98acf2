"""`synthos data write`: what goes in comes out again, by our reader and by webdataset's."""

import csv
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthos.data.check import facts
from synthos.data.commands.write import main
from synthos.data.stream import Stream
from synthos.data.write import Row, write_shards
from tests.data.make import INPUTS, config, encoded, noise, picture

KINDS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Seven pictures of three kinds, all of them called .jpg, with captions beside them."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for i in range(7):
        path = folder / ("sub" if i % 2 else "") / f"{i}.jpg"
        path.write_bytes(encoded(noise(20, 30, seed=i), list(KINDS.values())[i % 3]))
        path.with_suffix(".txt").write_text(f"caption {i}\n")
    return folder


def paths(images: Path) -> list[Path]:
    return sorted(images.rglob("*.jpg"))


def table(path: Path, header: tuple[str, str, str], images: Path) -> Path:
    rows = [(str(p.relative_to(images)), p.with_suffix(".txt").read_text(), i) for i, p in enumerate(paths(images))]
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    else:
        path.write_text("".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in rows))
    return path


def read_by_webdataset(out: Path) -> list[dict[str, bytes]]:
    import webdataset

    return list(webdataset.WebDataset(sorted(map(str, out.glob("*.tar"))), shardshuffle=False))


def test_folder_to_shards_and_back(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["--images", str(images), "--out", str(out), "--shard-size", "3", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["samples"], summary["skipped"], summary["shards"]) == (7, 0, 3)
    assert summary["fingerprint"] == json.loads((out / "manifest.json").read_text())["fingerprint"]
    names = {f"{i:05d}.{kind}" for i in range(3) for kind in ("tar", "idx.npz")} | {"manifest.json"}
    assert {p.name for p in out.iterdir()} == names
    samples = read_by_webdataset(out)
    keys = ["000000000", "000000001", "000000002", "000010000", "000010001", "000010002", "000020000"]
    assert [sample["__key__"] for sample in samples] == keys
    for sample, path in zip(samples, paths(images), strict=True):
        facts_ = json.loads(sample["json"])
        kind = next(k for k in KINDS if k in sample)
        assert sample[kind] == path.read_bytes() and Image.open(path).format == KINDS[kind]
        assert sample["txt"].decode() == facts_["caption"] == path.with_suffix(".txt").read_text().strip()
        assert facts_["file"] == str(path.relative_to(images))
        assert (facts_["width"], facts_["height"], facts_["key"]) == (30, 20, sample["__key__"])


def test_what_is_written_can_be_trained_on(tmp_path: Path, images: Path) -> None:
    out = tmp_path / "out"
    main(["--images", str(images), "--out", str(out), "--shard-size", "3"])
    data = config(out, height=20, width=30)
    assert facts(data, INPUTS, build=False).samples == 7  # the writer left the index
    batch = Stream(data, INPUTS, batch_size=7, rank=0, world=1, seed=0).next()
    for text, pixels in zip(batch.texts("text"), batch.images("image"), strict=True):
        path = next(p for p in paths(images) if p.stem == text.split()[1])
        expected = np.asarray(Image.open(path).convert("RGB")).astype(int).transpose(2, 0, 1)
        assert np.abs(pixels.numpy() - expected).max() <= 3  # decoders of JPEG differ by rounding


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
@pytest.mark.parametrize("header, options", [
    (("image", "caption", "extra"), []),
    (("video", "prompt", "extra"), []),
    (("where", "what", "extra"), ["--image-column", "where", "--caption-column", "what"]),
])  # fmt: skip
def test_tables(tmp_path: Path, images: Path, name: str, header: tuple[str, str, str], options: list[str]) -> None:
    given = table(tmp_path / name, header, images)
    out = tmp_path / "out"
    main(["--images", str(images), "--table", str(given), "--out", str(out), *options])
    samples = read_by_webdataset(out)
    assert [s["txt"].decode() for s in samples] == [p.with_suffix(".txt").read_text().strip() for p in paths(images)]
    assert [str(json.loads(s["json"])["extra"]) for s in samples] == [str(i) for i in range(7)]


def test_written_twice_the_bytes_are_equal(tmp_path: Path, images: Path) -> None:
    for out in ("one", "two"):
        main(["--images", str(images), "--out", str(tmp_path / out), "--shard-size", "4"])
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert len(files) == 5
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_rows_that_cannot_be_written_are_listed(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "0.txt").unlink()
    (images / "6.jpg").write_bytes((images / "6.jpg").read_bytes()[:-300])
    given = tmp_path / "t.csv"
    given.write_text("image,caption\n0.jpg,\n6.jpg,cut\nabsent.jpg,gone\n4.jpg,fine\n0.txt,not there\n")
    main(["--images", str(images), "--table", str(given), "--out", str(tmp_path / "out")])
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["row"] for line in skipped] == [1, 2, 3, 5]
    assert [Path(line["image"]).name for line in skipped] == ["0.jpg", "6.jpg", "absent.jpg", "0.txt"]
    assert skipped[0]["reason"] == "no caption" and "damaged" in skipped[1]["reason"]
    assert skipped[2]["reason"] == "No such file or directory"
    assert "1 sample in 1 shard; 4 rows left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("image,b\n1,2\n", [], "has the columns image, b; captions need one of captions, caption, text, prompt; or --"),
        ("a,caption\n1,2\n", [], "has the columns a, caption; pictures need one of image, image_path, path"),
        ("image,caption\n", [], "has no rows"),
        ("image,caption\n0.jpg,one, two\n", [], "line 2: more cells than columns"),
        ("image,caption\n0.jpg,x\n", ["--image-column", "file"], "--image-column: .* no column 'file'; allowed: image"),
        ("image,caption\nabsent.jpg,x\n", [], "none of 1 rows can be written; the first: No such file"),
        ("image,caption\n0.jpg,x\n", ["--shard-size", "10001"], "shard size 10001 is not allowed; 1 to 10000"),
    ],
)
def test_a_wrong_table(tmp_path: Path, images: Path, text: str, options: list[str], message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        main(["--images", str(images), "--table", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out"), *options])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "t.csv"]


@pytest.mark.parametrize("line, message", [("{", "line 2 is no JSON"), ("[1]", "line 2 is no JSON object")])
def test_a_wrong_jsonl(tmp_path: Path, images: Path, line: str, message: str) -> None:
    (tmp_path / "t.jsonl").write_text('{"image": "0.jpg", "caption": "x"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        main(["--images", str(images), "--table", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("name, line", [("t.csv", "%s,%s\r\n"), ("t.jsonl", '{"image": "%s", "caption": "%s"}\n')])
def test_a_table_in_latin_1(tmp_path: Path, images: Path, name: str, line: str) -> None:
    rows = [("image", "caption"), *[("0.jpg", "x")] * 1000, ("0.jpg", "caf\xe9"), ("0.jpg", "y")]
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + "".join(line % row for row in rows).encode("latin-1"))
    with pytest.raises(ValueError, match=rf"--table: .*{name} line 1002 is not UTF-8"):
        main(["--images", str(images), "--table", str(tmp_path / name), "--out", str(tmp_path / "out")])


def test_a_cell_that_is_too_large(tmp_path: Path, images: Path) -> None:
    (tmp_path / "t.csv").write_text("image,caption\n0.jpg,x\n0.jpg," + "y" * (1 << 18) + "\n")
    with pytest.raises(ValueError, match=r"--table: .*t\.csv line 3 is no CSV: field larger than"):
        main(["--images", str(images), "--table", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out")])


def test_a_caption_file_in_latin_1_is_left_out(tmp_path: Path, images: Path) -> None:
    (images / "2.txt").write_bytes("caf\xe9".encode("latin-1"))
    main(["--images", str(images), "--out", str(tmp_path / "out")])
    assert len(read_by_webdataset(tmp_path / "out")) == 6
    skipped = json.loads((tmp_path / "out" / "skipped.jsonl").read_text())
    assert skipped == {"row": 2, "image": str(images / "2.jpg"), "reason": "its caption is not UTF-8"}


def test_wrong_arguments(tmp_path: Path, images: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="--images: no such folder"):
        main(["--images", str(tmp_path / "absent"), *out])
    with pytest.raises(ValueError, match=r"--table: .* is of no known kind; allowed: \.csv, \.jsonl"):
        main(["--images", str(images), "--table", "t.xlsx", *out])
    with pytest.raises(ValueError, match="--table: no such file"):
        main(["--images", str(images), "--table", "t.csv", *out])
    with pytest.raises(ValueError, match="--image-column would be ignored: it tells of the columns of a --table"):
        main(["--images", str(images), "--image-column", "image", *out])


@pytest.mark.parametrize("samples, sizes", [(1, [1]), (3, [3]), (6, [3, 3]), (7, [3, 3, 1])])
def test_shards_are_filled_and_none_is_empty(tmp_path: Path, samples: int, sizes: list[int]) -> None:
    rows = [row for i in range(samples) for row in (Row(b"no picture", "x"), Row(picture((i, 0, 0)), str(i)))]
    write_shards(tmp_path / "out", [*rows, Row(b"no picture", "x")], shard_size=3)
    lines = json.loads((tmp_path / "out" / "manifest.json").read_text())["shards"]
    assert [line["samples"] for line in lines] == sizes and len(list(tmp_path.glob("out/*.tar"))) == len(sizes)


def test_a_shard_is_not_held_in_memory(tmp_path: Path) -> None:
    data = encoded(noise(300, 300), "PNG")
    rows = (Row(b"".join([data]) + bytes([i]), "caption") for i in range(60))  # each of them bytes of its own
    tracemalloc.start()
    write_shards(tmp_path / "out", rows, shard_size=60)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data) > 250_000 and peak < 20 * len(data)


def test_a_finished_data_set_is_never_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder may be there
    write_shards(out, [Row(picture(), "caption")])
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(ValueError, match="exists and is not empty"):
        write_shards(out, [Row(picture(), "other")])
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before and len(list(tmp_path.iterdir())) == 1
