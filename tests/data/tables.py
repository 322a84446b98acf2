"""What the tests of tables share: three pictures, and what `data write` makes of rows about them."""

import json
from pathlib import Path
from typing import Any

from synthos.data.commands.write import main
from tests.data.make import parquet, picture

COLORS = {"a": (250, 0, 0), "b": (0, 250, 0), "c": (0, 0, 250)}


def pictures(folder: Path) -> Path:
    """Pictures a, b and c in coco/ below the folder."""
    (folder / "coco").mkdir(parents=True)
    for name, color in COLORS.items():
        (folder / "coco" / f"{name}.png").write_bytes(picture(color))
    return folder


def written(tmp_path: Path, rows: list[dict[str, Any]], *options: str, name: str = "t.parquet") -> list[dict[str, Any]]:
    """What `data write` makes of the rows: each sample's .json, with its members' extensions, .txt and picture."""
    import webdataset

    table = tmp_path / name
    if table.suffix == ".parquet":
        parquet(table, rows)
    else:
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
    assert main(["--table", str(table), "--out", str(out), "--json", *options]) == 0
    samples = []
    for sample in webdataset.WebDataset(sorted(map(str, out.glob("*.tar"))), shardshuffle=False):
        members = {name: data for name, data in sample.items() if not name.startswith("__")}
        text = members["txt"].decode() if "txt" in members else None
        samples.append(json.loads(members.pop("json")) | {"members": sorted(members), "txt": text, "data": sample})
    return samples


def skipped(tmp_path: Path) -> list[tuple[int, str | None, str]]:
    """Row, picture and reason of what was left out."""
    lines = [json.loads(line) for path in tmp_path.glob("out-*/skipped.jsonl") for line in path.open()]
    return [(line["row"], line["image"], line["reason"]) for line in lines]
