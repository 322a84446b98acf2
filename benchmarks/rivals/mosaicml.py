"""MosaicML streaming: the same files in its own format, which this module also writes; it decodes with Pillow.

python -m benchmarks.rivals.mosaicml FOLDER convert
"""

import sys
import tarfile
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image
from streaming import MDSWriter, StreamingDataset

from benchmarks.rivals.clock import compete
from benchmarks.rivals.pillow import batches


def convert(folder: Path) -> None:
    """tar/ -> mds/, the JPEGs byte for byte."""
    columns = {"jpg": "jpeg", "txt": "str"}
    with tempfile.TemporaryDirectory() as scratch, MDSWriter(out=str(folder / "mds"), columns=columns) as writer:
        for shard in sorted((folder / "tar").glob("*.tar")):
            with tarfile.open(shard) as tar:
                tar.extractall(scratch, filter="data")
            for path in sorted(Path(scratch).glob("*.jpg")):  # a picture that knows its file is written as it is
                with Image.open(path) as image:
                    writer.write({"jpg": image, "txt": path.with_suffix(".txt").read_text()})
                path.unlink()


@cache
def opened(folder: Path, batch: int) -> Any:
    return StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=batch)


def epoch(folder: Path, edge: int, batch: int) -> Iterable[Any]:
    return batches(((row["jpg"], row["txt"]) for row in opened(folder, batch)), edge, batch)


if __name__ == "__main__":
    if sys.argv[2] == "convert":
        convert(Path(sys.argv[1]))
    else:
        compete(epoch, ("mosaicml-streaming", "pillow", "torch"))
