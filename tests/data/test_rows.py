"""Which picture and which caption of a record is written, and what becomes of its other columns."""

import json
from collections import Counter
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from synthos.data.commands.write import main
from synthos.data.rows import Reader, find_picture
from synthos.data.write import Lost
from tests.data.make import picture
from tests.data.tables import COLORS, pictures, skipped, written


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return pictures(tmp_path / "images")


@pytest.mark.parametrize(
    ("record", "options", "caption", "rest"),
    [
        ({"captions": "s", "caption": "c", "text": "t", "prompt": "p"}, [], "s", {"text": "t", "prompt": "p"}),
        ({"captions": None, "caption": "c", "text": "t", "prompt": "p"}, [], "c", {"text": "t", "captions": None}),
        ({"caption": " \n", "text": "t", "prompt": "p"}, [], "t", {"prompt": "p"}),
        ({"caption": "", "text": None, "prompt": "p"}, [], "p", {"text": None}),
        ({"caption": "c", "alt": "a"}, ["--caption-column", "alt"], "a", {}),
        ({"caption": "c", "alt": " "}, ["--caption-column", "alt"], "c", {"alt": " "}),
        ({"captions": [], "caption": "c"}, [], "c", {"captions": []}),
        ({"captions": [" ", None], "text": "t"}, [], "t", {}),
        ({"caption": 7}, [], "7", {}),
        ({"caption": "One.\n\n \nTwo.\nThree.\n\n"}, [], "One. Two.\nThree.", {}),  # LongAlign's double newlines
        ({"caption": "Ünïcödé 猫 \U0001f408"}, [], "Ünïcödé 猫 \U0001f408", {}),
    ],
)
def test_the_first_column_with_a_caption_counts(
    tmp_path: Path, images: Path, record: dict[str, Any], options: list[str], caption: str, rest: dict[str, Any]
) -> None:
    rows = [{"path": "coco/a.png", **record}]
    (sample,) = written(tmp_path, rows, "--images", str(images), *options, name="t.jsonl")
    assert (sample["txt"], sample["caption"], sample["file"]) == (caption, caption, "coco/a.png")
    assert sample.items() >= rest.items()


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"image": "coco/a.png", "image_path": "coco/b.png", "path": "coco/c.png"}, "a"),
        ({"image": None, "image_path": "coco/b.png", "path": "coco/c.png"}, "b"),
        ({"image_path": "", "path": "coco/c.png"}, "c"),
        ({"image": {"bytes": picture(COLORS["a"]), "path": "elsewhere.png"}, "path": "coco/c.png"}, "a"),
        ({"image": {"bytes": None, "path": "coco/b.png"}, "path": "coco/c.png"}, "b"),
        ({"image": {"bytes": None, "path": None}, "path": "coco/c.png"}, "c"),
        ({"image": picture(COLORS["b"]), "path": "coco/c.png"}, "b"),
        ({"path": "./coco//../coco/c.png"}, "c"),
        ({"file_name": "coco/a.png"}, "a"),
    ],
)
def test_the_first_column_with_a_picture_counts(
    tmp_path: Path, images: Path, record: dict[str, Any], name: str
) -> None:
    (sample,) = written(tmp_path, [{**record, "caption": "x"}], "--images", str(images))
    assert sample["data"]["png"] == picture(COLORS[name])


def test_embedded_pictures_need_no_folder(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": picture(color), "path": f"{name}.png"}, "text": name} for name, color in COLORS.items()]
    samples = written(tmp_path, rows)
    assert [(s["txt"], s["file"], s["data"]["png"]) for s in samples] == [
        (name, f"{name}.png", picture(color)) for name, color in COLORS.items()
    ]


def test_a_table_reaches_no_file_beyond_the_folder(tmp_path: Path, images: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture())
    (tmp_path / "images-2").mkdir()
    (tmp_path / "images-2" / "x.png").write_bytes(picture())
    paths = [
        str(secret),
        "../secret.png",
        "coco/../../secret.png",
        "../images-2/x.png",
        "/etc/passwd",
        "file:///etc/passwd",
    ]
    rows = [{"path": path, "caption": "x"} for path in [*paths, "coco/a.png", str(images / "coco" / "b.png"), "coco"]]
    samples = written(tmp_path, rows, "--images", str(images))
    assert [s["data"]["png"] for s in samples] == [picture(COLORS["a"]), picture(COLORS["b"])]
    reason = "leads out of --images"
    address = "an address; pictures are fetched first, as img2dataset does"
    assert skipped(tmp_path) == [
        *[(row, path, reason) for row, path in enumerate(paths[:5], 1)],
        (6, paths[5], address),
        (9, str(images / "coco"), "Is a directory"),
    ]


def test_a_path_as_it_stands_counts_where_it_leads_below_the_folder(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"path": path, "caption": "x"} for path in ("images/coco/a.png", "coco/b.png", "images/coco/absent.png")]
    assert [s["data"]["png"] for s in written(tmp_path, rows, "--images", "images")] == [
        picture(COLORS["a"]),
        picture(COLORS["b"]),
    ]
    assert [(row, reason) for row, _, reason in skipped(tmp_path)] == [(3, "No such file or directory")]
    (sample,) = written(tmp_path, [{"path": str(images / "coco" / "c.png"), "caption": "x"}], "--images", "/")
    assert sample["data"]["png"] == picture(COLORS["c"])  # a table that is trusted with every path


def test_links_below_the_folder_are_followed(tmp_path: Path, images: Path) -> None:
    images.rename(tmp_path / "elsewhere")
    images.mkdir()
    (images / "train").symlink_to(tmp_path / "elsewhere" / "coco")
    (sample,) = written(tmp_path, [{"path": "train/a.png", "caption": "x"}], "--images", str(images))
    assert sample["data"]["png"] == picture(COLORS["a"])


def test_of_several_captions_one_is_chosen_by_seed_and_picture_and_all_are_kept(tmp_path: Path) -> None:
    captions = ["first", "second", " ", None, "third\n\nline"]
    rows = [{"image": {"bytes": picture((i, 0, 0)), "path": f"{i}.png"}, "captions": captions} for i in range(60)]
    samples = written(tmp_path, rows)
    kept = ["first", "second", "third line"]
    assert all(s["captions"] == kept and s["txt"] == s["caption"] for s in samples)
    counts = Counter(s["txt"] for s in samples)
    assert set(counts) == set(kept) and min(counts.values()) >= 10  # 20 expected of each
    chosen = {s["file"]: s["txt"] for s in samples}
    assert {s["file"]: s["txt"] for s in written(tmp_path, rows[::-1][:30])} == dict(list(chosen.items())[30:])
    assert {s["file"]: s["txt"] for s in written(tmp_path, rows, "--seed", "1")} != chosen


def test_the_choice_for_an_embedded_picture_without_a_name_hangs_on_its_bytes() -> None:
    reader = Reader(None, [("image",)], ("captions",))
    texts = [
        reader.row(row, {"image": bytes([i]), "captions": ["a", "b"]}).caption for i in range(40) for row in (1, i)
    ]
    assert texts[::2] == texts[1::2] and set(texts) == {"a", "b"}


def test_without_captions_there_are_pictures_only(tmp_path: Path, images: Path) -> None:
    (images / "coco" / "b.png").rename(images / "coco" / "b.jpeg")
    rows = [{"path": "coco/a.png", "caption": "x"}, {"path": "coco/b.jpeg", "caption": ""}]
    samples = written(tmp_path, rows, "--images", str(images), "--no-captions")
    assert [(s["members"], s["caption"]) for s in samples] == [(["png"], "x"), (["png"], "")]  # a column like others
    assert main(["--images", str(images), "--no-captions", "--out", str(tmp_path / "folder"), "--json"]) == 0
    assert json.loads((tmp_path / "folder" / "manifest.json").read_text())["shards"][0]["samples"] == 3


def test_rows_that_are_alike_are_samples_of_their_own(tmp_path: Path, images: Path) -> None:
    samples = written(tmp_path, [{"path": "coco/a.png", "caption": "x"}] * 3, "--images", str(images))
    assert [s["key"] for s in samples] == ["000000000", "000000001", "000000002"]


def test_other_columns_become_json(tmp_path: Path, images: Path) -> None:
    extra = {"day": date(2024, 2, 3), "price": Decimal("1.50"), "score": float("nan"), "raw": b"\xff",
             "tags": ["a", None], "box": {"x": 1.5, "raw": b"x"}}  # fmt: skip
    rows = [{"path": "coco/a.png", "caption": "x", **extra}]
    (sample,) = written(tmp_path, rows, "--images", str(images))
    assert {name: sample[name] for name in extra} == {
        "day": "2024-02-03",
        "price": "1.50",
        "score": None,
        "raw": None,
        "tags": ["a", None],
        "box": {"x": 1.5, "raw": None},
    }


def test_a_record_without_a_picture_is_lost_not_an_error() -> None:
    assert find_picture({"image": [1, 2], "path": "  "}, ("image", "path"), None).picture == Lost("", "no picture")
