"""Which experiment a config is: `sig8`, the end of its run folder's name.

Moving to other machines, other micro-batches or another W&B project is the same experiment; other data or other
pretrained weights behind the same path are not.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from synthos.models.content import digest
from synthos.models.exported import ABOUT_FILE, NULL_FILE
from synthos.models.initial import find
from synthos.schema import GenerateConfig, PartConfig, RunConfig
from synthos.strict import dump
from synthos.weights import is_run

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
    "data.read",
    "data.cache",
    "data.cache_gb",
    "data.max_bad_fraction",
    "data.max_bad_per_shard",
)
GENERATION_LEFT_OUT = ("cluster", "nodes", "gpus_per_node", "micro", "runs_dir", "cache_dir")


def sig8(config: RunConfig, fingerprint: str, content: Callable[[Path], str] = digest) -> str:
    """8 hex digits of the hash of a config whose requests are loaded.

    Args:
        config: the composed config; a model part's `path` is a folder on this machine or a hub id.
        fingerprint: of the data set's samples.
        content: tells what a file or folder of weights holds.
    """
    plain = dump(config)
    for key in LEFT_OUT:
        _remove(plain, key)
    plain["data"]["fingerprint"] = fingerprint
    plain["data"]["known_bad"] = _by_content(config.data.known_bad)
    for source in (plain["data"]["mix"] or {}).values():
        del source["shards"]
    plain["model"]["parts"] = {name: _part(part, content) for name, part in config.model.parts.items()}
    plain["init_from"] = _weights(config.init_from, content)
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


def _trained(path: Path) -> dict[str, Any]:
    """Weights that one of our runs trained. A checkpoint is told by its run's name too, which ends in its signature."""
    if is_run(path):  # its last weights, perhaps before there are any; its name ends in the signature that makes them
        return {"run": path.name}
    files = [path] if path.is_dir() else [path, path.parent / ABOUT_FILE, path.parent / NULL_FILE]
    run = path.parents[1].name if path.is_dir() else ""
    return {"run": run, "content": [digest(file) for file in files]}


def _part(part: PartConfig, content: Callable[[Path], str]) -> dict[str, Any]:
    root = Path(part.path)
    if root.is_dir():
        return {"content": content(root / part.subfolder if part.subfolder else root)}
    return {"path": part.path, "subfolder": part.subfolder, "revision": part.revision}


def _weights(init_from: str | None, content: Callable[[Path], str]) -> Any:
    """Weights by their content, where they are on this machine."""
    path = find(init_from) if init_from else None
    return {"content": content(path)} if path else init_from


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
