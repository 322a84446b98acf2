"""Which experiment a config is: `sig8`, the end of its run folder's name.

Moving to other machines, other micro-batches or another W&B project is the same experiment; other data or other
pretrained weights behind the same path are not.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from synthos.models.exported import ABOUT_FILE, NULL_FILE
from synthos.models.initial import find
from synthos.schema import GenerateConfig, PartConfig, RunConfig
from synthos.strict import dump

LEFT_OUT = (
    "cluster",
    "nodes",
    "gpus_per_node",
    "batch.micro",
    "mesh",
    "encoders",
    "activation_checkpointing",
    "data.workers",
    "wandb",
    "runs_dir",
    "cache_dir",
    "data.shards",  # their content enters as the data's fingerprint
    "data.validation",
)
GENERATION_LEFT_OUT = ("cluster", "nodes", "gpus_per_node", "micro", "runs_dir", "cache_dir")
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
    plain["init_from"] = _weights(config.init_from)
    requests = plain["validate"]["requests"] or []
    plain["validate"]["requests"] = [{k: _by_content(v) for k, v in request.items()} for request in requests]
    return _hash8(plain)


def sig8_of_generation(config: GenerateConfig) -> str:
    """8 hex digits of the hash of a generation whose requests are loaded; as `sig8`."""
    plain = dump(config)
    for key in GENERATION_LEFT_OUT:
        _remove(plain, key)
    plain["weights"] = _trained(Path(config.weights))
    plain["requests"] = [{k: _by_content(v) for k, v in request.items()} for request in plain["requests"]]
    return _hash8(plain)


def _trained(path: Path) -> dict[str, str]:
    """Weights that one of our runs trained. Others of the same network differ in nothing but numbers: these are read.

    A checkpoint is told by its run's name too, which ends in the run's own signature.
    """
    files = sorted(path.rglob("*")) if path.is_dir() else [path, path.parent / ABOUT_FILE, path.parent / NULL_FILE]
    digest = hashlib.sha256()
    for file in (file for file in files if file.is_file()):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        digest.update(hashlib.sha256(_sampled(file)).digest())
    return {"run": path.parents[1].name if path.is_dir() else "", "content": digest.hexdigest()}


def _sampled(file: Path) -> bytes:
    """A file's content, and of a large one 64 blocks of 64 KiB, spread over it."""
    size = file.stat().st_size
    if size < WHOLE_BELOW:
        return file.read_bytes()
    with file.open("rb") as stream:
        blocks = []
        for index in range(64):
            stream.seek((size - 2**16) * index // 63)
            blocks.append(stream.read(2**16))
    return b"".join(blocks)


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


def _weights(init_from: str | None) -> Any:
    """Weights by their content, where they are on this machine."""
    path = find(init_from) if init_from else None
    if path is None:
        return init_from
    if path.is_dir():
        return {"content": digest_folder(path)}
    return {"bytes": path.stat().st_size, "content": hashlib.sha256(_content(path)).hexdigest()}


def _by_content(value: Any) -> Any:
    """A file of a request by its content, anything else as it is."""
    if isinstance(value, str) and Path(value).is_absolute() and Path(value).is_file():
        return hashlib.sha256(Path(value).read_bytes()).hexdigest()
    return value


def _hash8(plain: dict[str, Any]) -> str:
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _remove(plain: dict[str, Any], key: str) -> None:
    *groups, last = key.split(".")
    for group in groups:
        plain = plain[group]
    del plain[last]
