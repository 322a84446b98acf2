"""webdataset, decoding with Pillow, its default; pictures of another size are fitted with BICUBIC."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import webdataset
from PIL import Image

from benchmarks.rivals.clock import compete
from benchmarks.rivals.pillow import fit, stack


def epoch(folder: Path, edge: int, batch: int) -> Iterable[Any]:
    shards = [str(path) for path in sorted((folder / "tar").glob("*.tar"))]

    def shape(sample: tuple[Image.Image, str]) -> tuple[Any, str]:
        return fit(sample[0], edge), sample[1]

    data = webdataset.WebDataset(shards, shardshuffle=len(shards), detshuffle=True)
    batches: Iterable[Any] = (
        data.decode("pil").to_tuple("jpg", "txt").map(shape).batched(batch, collation_fn=stack, partial=False)
    )
    return batches


if __name__ == "__main__":
    compete(epoch, ("webdataset", "pillow"))
