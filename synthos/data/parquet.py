"""Parquet, here and on the hub: footers are read first, then the rows stream by row group, once.

It is read with pyarrow (the `parquet` extra), from any file system that fsspec opens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from glob import has_magic
from pathlib import Path
from typing import Any

import fsspec

SCHEMES = ("hf", "s3", "gs", "file")
BATCH = 64  # rows that are Python objects at a time; a row may hold a picture


def find_parquet(name: str) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    """The file system of `name` and its Parquet files, in the order of their paths.

    `name` is a file, a folder (searched with all below it), a glob, or an address of one, as hf://datasets/OWNER/NAME.
    Raises ValueError for what isn't there or can't be reached.
    """
    system, path = _file_system(name)
    with _told(name):
        found = system.glob(path) if has_magic(path) and not Path(name).exists() else system.find(path)
    files = sorted(file for file in found if file.endswith(".parquet"))
    if not files:
        raise ValueError(f"--table: there is no .parquet at {name}; tables of other kinds are read from local files")
    return system, files


def parquet_columns(system: fsspec.AbstractFileSystem, files: list[str]) -> tuple[list[str], int]:
    """The columns that any of the files has, and the number of all rows; ValueError names a file that is no Parquet."""
    columns: dict[str, None] = {}
    size = 0
    for file in files:
        with _opened(system, file) as parquet:
            columns |= dict.fromkeys(parquet.schema_arrow.names)
            size += parquet.metadata.num_rows
    return list(columns), size


def parquet_records(system: fsspec.AbstractFileSystem, files: list[str]) -> Iterator[dict[str, Any]]:
    """Every row of the files, in order, at most one row group in memory; ValueError names a file that is damaged."""
    for file in files:
        with _opened(system, file) as parquet:
            for group in range(parquet.num_row_groups):
                for batch in parquet.iter_batches(BATCH, row_groups=[group], use_threads=False):
                    yield from batch.to_pylist()


def load_pyarrow() -> Any:
    """pyarrow.parquet; ValueError names the extra where it is not installed."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ValueError("Parquet is read with pyarrow, which is not installed: pip install -e '.[parquet]'") from None
    return pyarrow.parquet


def _file_system(name: str) -> tuple[fsspec.AbstractFileSystem, str]:
    scheme, _, rest = name.rpartition("://")
    if not scheme:
        return fsspec.filesystem("file"), str(Path(name).absolute())
    if scheme not in SCHEMES or "::" in name:
        raise ValueError(f"--table: {name!r} is not read; allowed: paths and {', '.join(f'{s}://' for s in SCHEMES)}")
    if scheme == "hf" and len(rest.split("/")) < 3:
        raise ValueError(f"--table: {name!r} names no data set; allowed: hf://datasets/OWNER/NAME")
    try:
        system, path = fsspec.core.url_to_fs(name)
    except ImportError as error:  # s3fs and gcsfs are packages of their own
        raise ValueError(f"--table: {name}: {error}") from None
    return system, path


@contextmanager
def _opened(system: fsspec.AbstractFileSystem, file: str) -> Iterator[Any]:
    """The file as a pyarrow.parquet.ParquetFile."""
    pyarrow = load_pyarrow()
    with _told(file), system.open(file, "rb") as opened:
        yield pyarrow.ParquetFile(opened)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What goes wrong with a file, as a ValueError that names it."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # its own name for the client it is built on

    try:
        yield
    except (OSError, ValueError, NotImplementedError, httpx.HTTPError) as error:  # pyarrow's errors are among these
        raise ValueError(f"--table: {name} can't be read: {str(error) or type(error).__name__}") from None
