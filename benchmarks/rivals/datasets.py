"""Hugging Face datasets: the same tars through its webdataset builder, streamed; it decodes with Pillow."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import datasets

from benchmarks.rivals.clock import compete
from benchmarks.rivals.pillow import batches


@cache
def opened(folder: Path) -> Any:
    shards = [str(path) for path in sorted((folder / "tar").glob("*.tar"))]
    return datasets.load_dataset("webdataset", data_files={"train": shards}, split="train", streaming=True)


def epoch(folder: Path, edge: int, batch: int) -> Iterable[Any]:
    return batches(((row["jpg"], row["txt"]) for row in opened(folder)), edge, batch)


if __name__ == "__main__":
    compete(epoch, ("datasets", "pillow"))
