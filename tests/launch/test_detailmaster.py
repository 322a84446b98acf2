"""DetailMaster's prompts as requests, and its scorer's list."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.requests import read_requests
from synthos.recipes.base import recipe_class

LONG = "A bowl of broccoli stands to the left of a metallic kettle, \u201csilver\u201d and round. " * 12
ROWS: list[dict[str, Any]] = [  # in the data set's form: arXiv 2505.16915
    {"image_id": "000000238708.jpg", "ori_prompt": "a bowl", "polished_prompt": LONG, "dataset_target": "ln_coco",
     "character_attributes": [{"main_character": "bowl", "characteristics_list": ["round"], "cls": "object"}],
     "character_locations": [], "scene_attributes": []},
    {"image_id": "train_06374.jpg", "polished_prompt": "A view of a display.", "dataset_target": "docci"},
    {"image_id": "000000238708.jpg", "polished_prompt": "The same picture elsewhere.", "dataset_target": "docci"},
]  # fmt: skip


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_prompts_become_requests_and_pictures_are_listed(tmp_path: Path, form: str) -> None:
    text = json.dumps(ROWS) if form == "json" else "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / f"set.{form}").write_text(text)
    out = tmp_path / "out"
    assert main(["requests", "detailmaster", "--dataset", str(tmp_path / f"set.{form}"), "--out", str(out)]) == 0
    requests = read_requests(str(out / "requests.jsonl"), recipe_class("decomposer"), "requests", 0, {"seed": 42})
    names = ["ln_coco_000000238708", "docci_train_06374", "docci_000000238708"]
    assert [(r["name"], r["prompt"], r["seed"]) for r in requests] == [
        (name, row["polished_prompt"], 42) for name, row in zip(names, ROWS, strict=True)
    ]
    # As the scorer reads it: by data set and picture, to the names of files in one folder.
    listed = {row["image_id"]: row["output_image_name"] for row in json.loads((out / "image_info.json").read_text())}
    assert listed == {
        f"{row['dataset_target']}_{row['image_id']}": f"{name}.png" for row, name in zip(ROWS, names, strict=True)
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{", "is no JSON"),
        ("{}", "holds no list of prompts"),
        ("[]", "holds no list of prompts"),
        ("[3]", "row 0 of .* lacks one of dataset_target, image_id, polished_prompt"),
        ('[{"image_id": "a.jpg", "dataset_target": "x", "polished_prompt": ""}]', "row 0 of .* lacks one of"),
        (json.dumps([ROWS[1], ROWS[1]]), "row 1 of .*: docci_train_06374 is there already"),
    ],
)
def test_what_is_no_such_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    (tmp_path / "set.json").write_text(text)
    out = tmp_path / "out"
    assert main(["requests", "detailmaster", "--dataset", str(tmp_path / "set.json"), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert re.match(f"error: --dataset: .*{message}", said), said
    assert not out.exists()
