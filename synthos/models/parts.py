"""The parts a model is made of: folders in the hub's layout, opened as meta-device modules plus named tensors.

Nothing here allocates a weight: `Models.build` returns a module whose parameters are on the meta device (its buffers
are real), and `Models.tensors` says where each of them comes from. `train/distributed` shards and fills.
"""

import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from synthos.keys import hash64, signed64
from synthos.schema import ModelConfig, PartConfig, unknown

Tensors = dict[str, Callable[[], Tensor]]  # parameter name -> its whole value, read or made when called
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")


@dataclass(frozen=True)
class Tiny:
    """A part small enough for a CPU test, of the same class as the real one."""

    class_name: str
    config: dict[str, Any]
    init: Callable[[nn.Module], None] | None = None  # changes the freshly initialised module in place
    save: Callable[[Path], None] | None = None  # writes what is no module (a tokenizer) into the part's folder


@dataclass
class Models:
    """Opens the parts of one model.

    Args:
        config: the model's name and, unless it is `tiny`, where its parts lie.
        cache_dir: where tiny parts are written on first use.
        meta_only: build modules from their configs alone, to count parameters; no file is read or written.
    """

    config: ModelConfig
    cache_dir: Path
    meta_only: bool = False
    _tensors: dict[int, Tensors] = field(default_factory=dict)
    _parts: dict[int, str] = field(default_factory=dict)

    def build(self, part: str, tiny: Tiny) -> nn.Module:
        """The part as a module with meta parameters, in eval mode, and its tensors remembered."""
        folder = None if self.meta_only else self.folder(part, tiny)
        with meta_parameters():
            if folder is None:
                spec = tiny if self.config.name == "tiny" else self._spec(part)
                module = _construct(spec.class_name or "", spec.config or {})
            else:
                config = read_json(folder / "config.json")
                module = _construct(self._class_name(part, config, tiny), config, folder)
        _to_meta(module)
        self._parts[id(module)] = part
        if folder is not None:
            self._tensors[id(module)] = match_tensors(module, folder)
        return module.eval().requires_grad_(False)

    def settings(self, part: str, tiny: Tiny) -> dict[str, Any]:
        """The part's own config, without building it."""
        if not self.meta_only:
            return dict(read_json(self.folder(part, tiny) / "config.json"))
        spec = tiny if self.config.name == "tiny" else self._spec(part)
        return dict(spec.config or {})

    def extend(self, module: nn.Module, init: Tensors) -> None:
        """Say how parameters that were added to a built module start."""
        self._tensors.setdefault(id(module), {}).update(init)

    def tensors(self, module: nn.Module) -> Tensors:
        """Where every parameter of a built module comes from."""
        known = self._tensors[id(module)]
        return {name: known[name] for name, _ in module.named_parameters()}  # a block may have been left out since

    def part(self, module: nn.Module) -> str:
        """The name of the part that a built module is."""
        return self._parts[id(module)]

    def folder(self, part: str, tiny: Tiny) -> Path:
        """The local folder that holds the part; a tiny one is written first."""
        if self.config.name == "tiny" and part not in self.config.parts:
            return _tiny_folder(self.cache_dir, part, tiny)
        return find_folder(part, self._spec(part))

    def _class_name(self, part: str, config: Mapping[str, Any], tiny: Tiny) -> str:
        """The class to build from a folder; a transformers folder may name a larger one (CLIP's, with both towers)."""
        chosen = None if self.config.name == "tiny" else self._spec(part).class_name
        return chosen or config.get("_class_name") or tiny.class_name

    def _spec(self, part: str) -> PartConfig:
        if part not in self.config.parts:
            raise ValueError(
                f"model.parts: no {part!r} in {self.config.name}; {unknown(part, list(self.config.parts))}"
            )
        return self.config.parts[part]


def find_folder(part: str, spec: PartConfig) -> Path:
    """The local folder of a part given by folder or hub id; nothing is downloaded.

    Raises ValueError that says which file is missing, or what to download.
    """
    root = Path(spec.path).expanduser()
    if not root.is_dir():
        root = _hub_folder(part, spec)
    folder = root / spec.subfolder if spec.subfolder else root
    absent = absent_files(folder)
    if absent:
        raise ValueError(f"model.parts.{part}: {folder} lacks {', '.join(absent)}")
    return folder


def absent_files(folder: Path) -> list[str]:
    """Files that a part's folder should have and has not."""
    if (folder / "tokenizer_config.json").is_file():
        return []
    if not (folder / "config.json").is_file():
        return ["config.json"]
    for name in WEIGHTS:
        if (folder / name).is_file():
            return []
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = sorted(set(read_json(index)["weight_map"].values()))
            return [f for f in files if not (folder / f).is_file()]
    return [" or ".join(WEIGHTS)]


def missing(config: ModelConfig) -> list[str]:
    """A line for every part of a model whose files are not on this machine."""
    lines = []
    for part, spec in config.parts.items():
        try:
            find_folder(part, spec)
        except ValueError as error:
            lines.append(str(error))
    return lines


def match_tensors(module: nn.Module, folder: Path) -> Tensors:
    """Every parameter of `module` to its tensor in the folder's safetensors files.

    Files may hold more (a CLIP folder has both towers), may carry a prefix that the class lacks, or the other way
    round, and hold a tied parameter under any of its names. Raises ValueError naming what is absent or misshapen.
    """
    where = _tensor_files(folder)
    keys = _stored_keys(module, where)
    absent = [name for name, key in keys.items() if key not in where]
    if absent:
        raise ValueError(f"{folder}: the weights lack {len(absent)} of {len(keys)} tensors, first {absent[0]!r}")
    found: Tensors = {}
    for name, parameter in module.named_parameters():
        path, key = where[keys[name]], keys[name]
        with safe_open(path, "pt") as file:
            shape = tuple(file.get_slice(key).get_shape())
        if shape != tuple(parameter.shape):
            raise ValueError(f"{path}: {key} has shape {shape}, the model needs {tuple(parameter.shape)}")
        found[name] = lambda path=path, key=key: _read_tensor(path, key)  # type: ignore[misc]
    return found


@contextmanager
def meta_parameters() -> Iterator[None]:
    """`torch.empty` gives meta tensors inside: weights cost nothing, while computed buffers (RoPE tables) are real."""
    with _EmptyOnMeta():
        yield


def seeded(name: str, make: Callable[[torch.Generator], Tensor]) -> Callable[[], Tensor]:
    """An initial value drawn from a generator keyed by the parameter's name: the same on every rank."""
    return lambda: make(torch.Generator().manual_seed(signed64(hash64("init", name))))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


class _EmptyOnMeta(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _to_meta(module: nn.Module) -> None:
    """Move what parameters a class made without `torch.empty` (gains, tables) to the meta device; ties are kept."""
    moved: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in moved:
                moved[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            setattr(owner, name, moved[id(parameter)])


def find_class(name: str) -> Any:
    """A module class by the name that its config carries: ours, diffusers' or transformers'."""
    for package in ("synthos.models.patch", "diffusers", "transformers"):
        found = getattr(importlib.import_module(package), name, None)
        if found is not None:
            return found
    raise ValueError(f"config.json names the class {name!r}, which neither diffusers nor transformers has")


def _construct(name: str, config: Mapping[str, Any], folder: Path | None = None) -> nn.Module:
    cls = find_class(name)
    if hasattr(cls, "from_config"):
        return cls.from_config(dict(config))  # type: ignore[no-any-return]
    settings = cls.config_class.from_pretrained(folder) if folder else cls.config_class.from_dict(dict(config))
    return cls(settings)  # type: ignore[no-any-return]


def _read_tensor(path: Path, key: str) -> Tensor:
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(key)
    return tensor


def _tensor_files(folder: Path) -> dict[str, Path]:
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return {key: folder / file for key, file in read_json(index)["weight_map"].items()}
        if (folder / name).is_file():
            with safe_open(folder / name, "pt") as file:
                return dict.fromkeys(file.keys(), folder / name)
    raise ValueError(f"{folder} lacks {' or '.join(WEIGHTS)}")


def _stored_keys(module: nn.Module, where: Mapping[str, Path]) -> dict[str, str]:
    """Each parameter's key in the files; a tied one may be stored under any of its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    rename = _prefix_rename(next(iter(names.values()))[0], where)
    return {n[0]: next((key for key in map(rename, n) if key in where), rename(n[0])) for n in names.values()}


def _prefix_rename(first: str, where: Mapping[str, Path]) -> Callable[[str], str]:
    """The one prefix to add to, or take from, every name so that the files know it, as found for the first name."""
    if first in where:
        return lambda name: name
    added = [key[: -len(first)] for key in where if key.endswith("." + first)]
    if added:
        return lambda name: added[0] + name
    taken = [first[: -len(key)] for key in where if first.endswith("." + key)]
    return (lambda name: name.removeprefix(taken[0])) if taken else (lambda name: name)


def _hub_folder(part: str, spec: PartConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(spec.path, revision=spec.revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        only = f" --include '{spec.subfolder}/*'" if spec.subfolder else ""
        raise ValueError(
            f"model.parts.{part}: {spec.path!r} is no local folder and not in the hub cache; "
            f"run `hf download {spec.path}{only}`, or use model=tiny"
        ) from None


def _tiny_folder(cache_dir: Path, part: str, tiny: Tiny) -> Path:
    """Write a tiny part once; ranks that meet here write the same bytes and one rename wins."""
    key = hash64(part, tiny.class_name, json.dumps(tiny.config, sort_keys=True))
    folder = cache_dir / "tiny" / f"{part}-{key:016x}"
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    temporary.mkdir(parents=True, exist_ok=True)
    if tiny.save:
        tiny.save(temporary)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(signed64(hash64("tiny", part)))
            module = _construct(tiny.class_name, tiny.config)
        if tiny.init:
            with torch.no_grad():
                tiny.init(module)
        module.save_pretrained(temporary)  # type: ignore[operator]
    try:
        temporary.rename(folder)
    except OSError:  # another rank was first
        for file in temporary.iterdir():
            file.unlink()
        temporary.rmdir()
    return folder
