"""Which experiment a config is: `sig8`, the end of its run folder's name.

Moving to other machines, other micro-batches or another W&B project is the same experiment; other data or other
pretrained weights behind the same path are not.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from synthos.schema import PartConfig, RunConfig, dump

LEFT_OUT = (
    "cluster",
    "nodes",
    "gpus_per_node",
    "batch.micro",
    "mesh",
    "activation_checkpointing",
    "data.workers",
    "wandb",
    "runs_dir",
    "cache_dir",
    "data.shards",  # their content enters as the data's fingerprint
    "data.validation",
)
WHOLE_BELOW = 64 * 2**20  # bytes; of larger files only the name, the size and a safetensors header are read


def sig8(config: RunConfig, fingerprint: str) -> str:
    """8 hex digits of the hash of a config whose requests are loaded.

    Args:
        config: the composed config; a model part's `path` is a folder on this machine or a hub id.
        fingerprint: of the data set's samples.
    """
    plain = dump(config)
    for key in LEFT_OUT:
        _remove(plain, key)
    plain["data"]["fingerprint"] = fingerprint
    plain["model"]["parts"] = {name: _part(part) for name, part in config.model.parts.items()}
    requests = plain["validate"]["requests"] or []
    plain["validate"]["requests"] = [{k: _picture(v) for k, v in request.items()} for request in requests]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def digest_folder(folder: Path) -> str:
    """Hash of a local model folder: file names, sizes, safetensors headers, whole content below 64 MB.

    Hidden files are no part of a model: `hf download` leaves its own records in `.cache/`.
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder)
        if not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()}\0{file.stat().st_size}\0".encode())
            digest.update(hashlib.sha256(_content(file)).digest())
    return digest.hexdigest()


def _content(file: Path) -> bytes:
    if file.stat().st_size < WHOLE_BELOW:
        return file.read_bytes()
    if file.suffix != ".safetensors":
        return b""
    with file.open("rb") as stream:  # 8 bytes: the length of the JSON header that follows
        return stream.read(int.from_bytes(stream.read(8), "little"))


def _part(part: PartConfig) -> dict[str, Any]:
    root = Path(part.path)
    if root.is_dir():
        return {"content": digest_folder(root / part.subfolder if part.subfolder else root)}
    return {"path": part.path, "subfolder": part.subfolder, "revision": part.revision}


def _picture(value: Any) -> Any:
    """A request's picture file by its content, anything else as it is."""
    if isinstance(value, str) and Path(value).is_absolute() and Path(value).is_file():
        return hashlib.sha256(Path(value).read_bytes()).hexdigest()
    return value


def _remove(plain: dict[str, Any], key: str) -> None:
    *groups, last = key.split(".")
    for group in groups:
        plain = plain[group]
    del plain[last]
