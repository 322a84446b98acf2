"""`synthos requests detailmaster`: the prompts of DetailMaster as requests, and the list that its scorer reads.

DetailMaster (arXiv 2505.16915) is a JSON list, or as JSONL a line for each, of objects with `dataset_target`,
`image_id` and `polished_prompt`, the long prompt. Its scorer finds the pictures of a prompt by the list that is written
here: their files, under the prompt's `dataset_target` and `image_id` joined by `_`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from launch.compose import file_name

KEYS = ("dataset_target", "image_id", "polished_prompt")
REQUESTS, LIST = "requests.jsonl", "image_info.json"


def main(arguments: list[str]) -> int:
    """Write both files; returns 0. Raises ValueError for what is no such data set."""
    options = parser().parse_args(arguments)
    requests, pictures = convert(read(options.dataset), str(options.dataset))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / REQUESTS).write_text("".join(json.dumps(request) + "\n" for request in requests))
    (options.out / LIST).write_text(json.dumps(pictures, indent=1))
    print(f"{options.out / REQUESTS}  {len(requests)} requests\n{options.out / LIST}  for the scorer")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="synthos requests detailmaster",
        description="DetailMaster's prompts as requests of `synthos generate`, and the list of their pictures.",
    )
    parser.add_argument("--dataset", type=Path, required=True, help="DetailMaster_Dataset.json, or the same as .jsonl")
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {REQUESTS} and {LIST}")
    return parser


def read(file: Path) -> list[Any]:
    """The rows of the data set."""
    if not file.is_file():
        raise ValueError(f"--dataset: {file} is no file")
    text = file.read_text()
    try:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()] if file.suffix == ".jsonl" else None
        rows = json.loads(text) if rows is None else rows
    except json.JSONDecodeError as error:
        raise ValueError(f"--dataset: {file} is no JSON: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"--dataset: {file} holds no list of prompts")
    return rows


def convert(rows: list[Any], where: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Requests, and for each the scorer's name of its prompt with the file of its picture.

    Raises ValueError for a row without the data set's keys, and for two prompts of one name.
    """
    requests: dict[str, str] = {}
    pictures = []
    for number, row in enumerate(rows):
        texts = [row.get(key) for key in KEYS] if isinstance(row, dict) else []
        found = [text for text in texts if isinstance(text, str) and text]
        if len(found) != len(KEYS):
            raise ValueError(f"--dataset: row {number} of {where} lacks one of {', '.join(KEYS)}")
        target, image, prompt = found
        name = file_name(f"{target}_{Path(image).stem}")
        if name in requests:
            raise ValueError(f"--dataset: row {number} of {where}: {name} is there already; expected one row for each")
        requests[name] = prompt
        pictures.append({"image_id": f"{target}_{image}", "output_image_name": f"{name}.png"})
    return [{"name": name, "prompt": prompt} for name, prompt in requests.items()], pictures
