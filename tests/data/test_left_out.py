"""Which rows are left out, by choice or because they are bad, and what is told of it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from synthos.data.commands.write import main
from synthos.data.rows import keep_sources
from tests.data.make import parquet, picture
from tests.data.tables import pictures, skipped, written


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return pictures(tmp_path / "images")


def test_rows_of_other_sources_are_left_out_and_told(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = ["coco", "COCO ", "coco2", "laion", None, "sa1b", "laion"]
    rows = [{"path": "coco/a.png", "caption": str(i), "source": source} for i, source in enumerate(sources)]
    given = ["--images", str(images)]
    assert [s["txt"] for s in written(tmp_path, rows, *given, "--source", "Coco")] == ["0", "1"]
    assert json.loads(capsys.readouterr().out)["sources_left_out"] == {"laion": 2, "coco2": 1, "": 1, "sa1b": 1}
    assert [s["txt"] for s in written(tmp_path, rows, *given, "--source", "coco, sa1b")] == ["0", "1", "5"]
    assert len(written(tmp_path, rows, *given, "--source", "*")) == len(written(tmp_path, rows, *given)) == 7
    main(["--table", str(tmp_path / "t.parquet"), "--out", str(tmp_path / "last"), *given, "--source", "coco"])
    assert "5 rows of other sources: laion 2, coco2 1, none named 1, sa1b 1" in capsys.readouterr().out


def test_a_row_keeps_its_number_in_the_table(tmp_path: Path, images: Path) -> None:
    rows = [{"path": f"coco/{name}.png", "caption": "x", "source": source} for name, source in ("ab", "ad", "ac", "xb")]
    assert len(written(tmp_path, rows, "--images", str(images), "--source", "b,d,c")) == 3
    assert [(row, reason) for row, _, reason in skipped(tmp_path)] == [(4, "No such file or directory")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--source", "coco"], "--source: no row is of coco; the table has 'laion'"),
        (["--source", ","], "--source: ',' names none; allowed: a list as in coco,laion, or \\* for all"),
        (["--caption-column", "words"], r"--caption-column: .* has no column 'words'; allowed: path, caption, source"),
        (["--no-captions", "--caption-column", "caption"], "--caption-column would be ignored: .* --no-captions"),
        (["--no-captions", "--seed", "1"], "--seed would be ignored: .* --no-captions"),
        (["--triplets"], "triplets need one of target_image, image_path"),
        (["--triplets", "--image-column", "path"], "--image-column would be ignored: .* --triplets"),
    ],
)
def test_wrong_options(tmp_path: Path, images: Path, options: list[str], message: str) -> None:
    rows = [{"path": "coco/a.png", "caption": "x", "source": "laion"}]
    with pytest.raises(ValueError, match=message):
        written(tmp_path, rows, "--images", str(images), *options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "t.parquet"]


def test_options_that_need_a_table_or_a_folder(tmp_path: Path, images: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    for option in (["--source", "coco"], ["--triplets"], ["--seed", "0"]):
        with pytest.raises(ValueError, match=f"{option[0]} would be ignored: .* --table, and none is given"):
            main(["--images", str(images), *out, *option])
    with pytest.raises(ValueError, match="--images or --table: one of them says what to write"):
        main(out)
    table = parquet(tmp_path / "t.parquet", [{"path": "coco/a.png", "caption": "x"}])
    with pytest.raises(ValueError, match="--images: needed, for the table names pictures by path, as in 'coco/a.png'"):
        main(["--table", str(table), *out])
    with pytest.raises(ValueError, match="--source: .* has no column 'source' to choose by; it has path, caption"):
        main(["--table", str(table), "--images", str(images), *out, "--source", "coco"])
    with pytest.raises(ValueError, match=r"no picture below .* has a .txt beside it; .* --no-captions"):
        main(["--images", str(images), *out])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "t.parquet"]


def test_bad_rows_are_counted_by_reason(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "cut.png").write_bytes(picture()[:-30])
    (images / "text.png").write_text("no picture")
    records: list[dict[str, Any]] = [
        {"path": "coco/a.png", "caption": "good"},
        *[{"path": f"absent{i}.png", "caption": "x"} for i in range(3)],
        {"path": "coco/a.png", "caption": None},
        {"path": "coco/a.png"},
        {"path": None, "caption": "x"},
        {"path": "cut.png", "caption": "x"},
        {"path": "text.png", "caption": "x"},
        {"path": "coco/a.png", "caption": "\ud800"},
        {"path": "coco/a.png", "caption": "x", "note": "\ud800"},
        {"path": "a\0b.png", "caption": "x"},
        {"path": "x" * 300, "caption": "x"},
    ]
    assert len(written(tmp_path, records, "--images", str(images), name="t.jsonl")) == 1
    told = capsys.readouterr()
    assert told.err == "" and json.loads(told.out)["reasons"] == {
        "No such file or directory": 3,
        "no caption": 2,
        "no picture": 1,
        "damaged PNG": 1,
        "not a readable JPEG, PNG, WebP or AVIF": 1,
        "its caption is not UTF-8": 1,
        "its metadata is not UTF-8": 1,
        "embedded null byte": 1,
        "File name too long": 1,
    }
    main(["--table", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "last"), "--images", str(images)])
    told = capsys.readouterr()
    assert "12 rows left out, see" in told.out and "  3: No such file or directory\n" in told.out
    assert "writing" in told.err and "100%" in told.err  # of the table's rows, whose number is known


def test_a_picture_too_large_for_a_shard_is_left_out(tmp_path: Path, images: Path) -> None:
    with (images / "large.png").open("wb") as file:
        file.truncate((64 << 20) + 1)
    rows = [{"path": name, "caption": "x"} for name in ("large.png", "coco/a.png")]
    assert len(written(tmp_path, rows, "--images", str(images))) == 1
    assert skipped(tmp_path) == [(1, str(images / "large.png"), "more than 67108864 bytes")]


def test_records_are_asked_for_one_by_one() -> None:
    asked: list[int] = []

    def records() -> Any:
        for number in range(1, 1_000_001):
            asked.append(number)
            yield number, {"source": "b" if number % 3 else "a"}

    kept = keep_sources(records(), frozenset("a"), Counter())
    assert [next(kept)[0] for _ in range(2)] == [3, 6] and asked == [1, 2, 3, 4, 5, 6]


def test_written_twice_a_parquet_table_gives_the_same_bytes(tmp_path: Path, images: Path) -> None:
    table = parquet(tmp_path / "t.parquet", [{"path": f"coco/{n}.png", "captions": ["x", n]} for n in "abc"])
    for out in ("one", "two"):
        assert main(["--table", str(table), "--images", str(images), "--out", str(tmp_path / out), "--json"]) == 0
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert files == ["00000.idx.npz", "00000.tar", "manifest.json"]
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
