"""Reads what W&B wrote offline: a log of length-prefixed protobuf records in 32 KiB blocks, after a 7-byte header."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768


def records(path: Path) -> Iterator[Any]:
    """Every record of a `.wandb` file, as its protobuf message."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # too little room for a record's header: padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def history(path: Path) -> list[dict[str, Any]]:
    """The logged rows."""
    rows = [r.history for r in records(path) if r.HasField("history")]
    return [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item} for row in rows]


def run(path: Path) -> Any:
    """The run's own record: id, group, job type, tags, config."""
    return next(r.run for r in records(path) if r.HasField("run"))
