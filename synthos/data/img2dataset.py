"""What img2dataset says of its shards beside them.

NNNNN.parquet holds a row for every address it tried, with `key` and `status`; NNNNN_stats.json is written last, so a
shard without it was interrupted (img2dataset writes it anew when it is started again).
"""

from collections.abc import Iterable
from pathlib import Path

from synthos.data.parquet import load_pyarrow

SUCCESS = "success"


def failed_keys(shard: str | Path) -> set[str]:
    """Keys that the shard's .parquet does not call a success; none where there is no such table beside the shard.

    Raises ValueError for a table that can't be read, and where pyarrow is missing to read it.
    """
    table = Path(shard).with_suffix(".parquet")
    if not table.is_file():
        return set()
    parquet = load_pyarrow()
    try:
        if not {"key", "status"} <= set(parquet.read_schema(table).names):
            return set()  # a table of someone else's
        rows = parquet.read_table(table, columns=["key", "status"], use_threads=False).to_pylist()
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise ValueError(f"{table} is damaged: {error}; move it away to use {Path(shard).name} without it") from None
    return {row["key"] for row in rows if row["status"] != SUCCESS}


def incomplete(shards: Iterable[str | Path]) -> list[str]:
    """Those shards that lack their _stats.json in a folder where others have one; each folder is listed once."""
    finished: dict[Path, set[str]] = {}
    found = []
    for shard in map(Path, shards):
        if shard.parent not in finished:
            finished[shard.parent] = {p.name.removesuffix("_stats.json") for p in shard.parent.glob("*_stats.json")}
        if finished[shard.parent] and shard.stem not in finished[shard.parent]:
            found.append(str(shard))
    return found


def is_complete(shard: str | Path) -> bool:
    """False for a shard that img2dataset was interrupted in; for many shards, `incomplete` lists a folder once."""
    return not incomplete([shard])
