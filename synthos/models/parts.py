"""The parts a model is made of: folders in the hub's layout, opened as meta-device modules plus named tensors.

Nothing here allocates a weight: `Models.build` returns a module whose parameters are on the meta device (its buffers
are real), and `Models.tensors` says where each of them comes from. `train/distributed` shards and fills.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from synthos.models.content import digest
from synthos.models.meta import construct, meta_parameters, to_meta
from synthos.models.tensors import WEIGHTS, Shape, Tensors, absent_shards, match_tensors, read_json, weights_file
from synthos.models.tiny import Tiny, tiny_folder
from synthos.schema import ModelConfig, PartConfig
from synthos.strict import unknown

Adopt = Callable[[Mapping[str, Shape]], dict[str, str]]  # tensors of files -> {parameter: its name in the files}


@dataclass
class Added:
    """What a module has besides, or instead of, the tensors in its part's files.

    Attributes:
        names: the parameters that those files do not give.
        adopt: which of its parameters weights of another origin give; None: no such weights are known.
        waiting: parameters that only other weights can give, each with what to do about it.
        closed: why a run's network can't start from other weights; None: it can.
    """

    names: set[str] = field(default_factory=set)
    adopt: Adopt | None = None
    waiting: dict[str, str] = field(default_factory=dict)
    closed: str | None = None


@dataclass
class Models:
    """Opens the parts of one model.

    Args:
        config: the model's name and, unless it is `tiny`, where its parts lie.
        cache_dir: where tiny parts are written on first use.
        seed: of what is added to a pretrained part.
        meta_only: build modules from their configs alone, to count parameters; no file is read or written.
    """

    config: ModelConfig
    cache_dir: Path
    meta_only: bool = False
    seed: int = 0
    _tensors: dict[int, Tensors] = field(default_factory=dict)
    _parts: dict[int, str] = field(default_factory=dict)
    _added: dict[int, Added] = field(default_factory=dict)

    def build(self, part: str, tiny: Tiny) -> nn.Module:
        """The part as a module with meta parameters, in eval mode, and its tensors remembered."""
        name, config, folder = self._describe(part, tiny)
        with meta_parameters():
            module = construct(name, config, folder)
        to_meta(module)
        self._parts[id(module)] = part
        if folder and not self.meta_only:
            self._tensors[id(module)] = match_tensors(module, folder)
        return module.eval().requires_grad_(False)

    def settings(self, part: str, tiny: Tiny) -> dict[str, Any]:
        """The part's own config, without building it."""
        return self._describe(part, tiny)[1]

    def extend(self, module: nn.Module, init: Tensors) -> None:
        """Say how parameters of a built module start: ones that were added, or that other weights give."""
        added = self.added(module)
        added.names.update(init)
        added.waiting = {name: advice for name, advice in added.waiting.items() if name not in init}
        self._tensors.setdefault(id(module), {}).update(init)

    def compose(self, part: str, module: nn.Module) -> None:
        """Let a module of built children be a part itself, with their tensors under their names in it."""
        self._parts[id(module)] = part
        children = [(name, self._tensors.get(id(child), {})) for name, child in module.named_children()]
        self._tensors[id(module)] = {f"{name}.{key}": value for name, own in children for key, value in own.items()}

    def added(self, module: nn.Module) -> Added:
        """What a built module has that its part's files do not give; for reading and writing."""
        return self._added.setdefault(id(module), Added())

    def check_start(self, module: nn.Module) -> None:
        """Raise ValueError where nothing says how a parameter of a built module starts."""
        for advice in self.added(module).waiting.values():
            raise ValueError(advice)

    def tensors(self, module: nn.Module) -> Tensors:
        """Where every parameter of a built module comes from; ValueError where nothing says so."""
        self.check_start(module)
        known = self._tensors[id(module)]
        return {name: known[name] for name, _ in module.named_parameters()}  # a block may have been left out since

    def part(self, module: nn.Module) -> str:
        """The name of the part that a built module is."""
        return self._parts[id(module)]

    def folder(self, part: str, tiny: Tiny) -> Path:
        """The local folder that holds the part; a tiny one is written first."""
        if self.config.name == "tiny" and part not in self.config.parts:
            return tiny_folder(self.cache_dir, part, tiny)
        return find_folder(part, self._spec(part))

    def _describe(self, part: str, tiny: Tiny) -> tuple[str, dict[str, Any], Path | None]:
        """Class, config and folder of a part; with `meta_only` the folder may be absent."""
        own = part in self.config.parts
        if self.meta_only and self.config.name == "tiny" and not own:
            return tiny.class_name, tiny.config, None
        if self.meta_only and absent(part, self._spec(part)):
            spec = self._spec(part)
            if not spec.class_name or spec.config is None:
                raise ValueError(
                    f"{absent(part, spec)}; without files, class_name and config are needed to plan with it"
                )
            return spec.class_name, spec.config, None
        folder = self.folder(part, tiny)
        config = dict(read_json(folder / "config.json"))
        # A transformers folder may name a larger class than the part needs (a CLIP folder has both towers): the tiny
        # part's class decides.
        chosen = self.config.parts[part].class_name if own else None
        return chosen or config.get("_class_name") or tiny.class_name, config, folder

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
    return absent_shards(folder) if weights_file(folder) else [" or ".join(WEIGHTS)]


def absent(part: str, spec: PartConfig) -> str | None:
    """What is missing of a part's files on this machine, and what to do about it; None if nothing is."""
    try:
        find_folder(part, spec)
    except ValueError as error:
        return str(error)
    return None


def missing(config: ModelConfig) -> list[str]:
    """A line for every part of a model whose files are not on this machine."""
    lines = [line for part, spec in config.parts.items() if (line := absent(part, spec))]
    return [*(line.removesuffix(gate()) for line in lines[:-1]), *lines[-1:]]  # the last one says it for all


def content(part: str, spec: PartConfig) -> str | None:
    """The digest of a part's files; None where they are not on this machine."""
    return None if absent(part, spec) else digest(find_folder(part, spec))


def contents(config: ModelConfig) -> dict[str, str]:
    """The digests of all parts of a model that are on this machine."""
    return {part: found for part, spec in config.parts.items() if (found := content(part, spec))}


def pinned(config: ModelConfig) -> ModelConfig:
    """The same model, each hub part in the cache fixed to its commit: what a later download brings is another one."""
    return dataclasses.replace(config, parts={part: _pin(spec) for part, spec in config.parts.items()})


def _pin(spec: PartConfig) -> PartConfig:
    if Path(spec.path).expanduser().is_dir() or absent("part", spec):
        return spec
    return dataclasses.replace(spec, revision=_hub_folder("part", spec).name)  # .../snapshots/<commit>


def hub_folder(name: str, revision: str | None = None) -> Path | None:
    """The snapshot of a hub id in this machine's cache; None where there is none, or `name` is no id."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _hub_folder(part: str, spec: PartConfig) -> Path:
    if Path(spec.path).is_absolute():
        raise ValueError(f"model.parts.{part}: {spec.path!r} does not exist")
    folder = hub_folder(spec.path, spec.revision)
    if folder is None:
        only = f" --include '{spec.subfolder}/*'" if spec.subfolder else ""
        raise ValueError(
            f"model.parts.{part}: {spec.path!r} is no local folder and not in the hub cache; "
            f"run `hf download {spec.path}{only}`, or use model=tiny{gate()}"
        )
    return folder


def gate() -> str:
    """What the download of a gated model needs besides; said to whoever has no token, since the cache can't tell."""
    from huggingface_hub import get_token

    return "" if get_token() else "; a gated model also needs `hf auth login`, there is no Hugging Face token here"
