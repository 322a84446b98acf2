"""The shared part of a run's config as dataclasses, and `load`: the one strict conversion from YAML to them.

A recipe's own hyperparameters are its `Config` dataclass, converted by the same `load`. Defaults live in
`configs/run.yaml`, not here, so that one page shows every value.
"""

import dataclasses
import difflib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


@dataclass(frozen=True)
class BatchConfig:
    size: int  # samples in a global batch
    micro: int  # samples in one forward pass on one rank


@dataclass(frozen=True)
class PartConfig:
    path: str  # hub id or local folder
    subfolder: str | None = None
    revision: str | None = None
    class_name: str | None = None  # with `config`: builds the part on the meta device without its files
    config: dict[str, Any] | None = None
    parameters: int | None = None  # a test counts them on the meta device


@dataclass(frozen=True)
class ModelConfig:
    name: str
    parts: dict[str, PartConfig] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    name: str
    shards: str | list[str] | None  # brace pattern, glob, folder, or a .txt / .json list of tars
    validation: str | list[str] | None  # shards of their own, or else `holdout_fraction`
    holdout_fraction: float  # share of samples kept out of training, by the hash of their id
    height: int  # pixels
    width: int  # pixels
    window: int  # shards whose samples are shuffled together
    lanes: int | None  # default: the largest divisor of the global batch not above 64
    workers: int  # decoding processes per rank; 0 decodes in the training process
    prepare: str | None  # module of synthos.data that writes this data set on first use


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw"]
    lr: float
    lr_groups: dict[str, float]  # learning rate of single parameter groups, by name
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    schedule: Literal["constant", "linear", "cosine", "log_warmup_linear"]
    warmup_steps: int
    decay_steps: int | None  # step at which the schedule reaches zero; default: the run's last step
    steps: int | None  # optimiser steps; or epochs
    epochs: float | None
    clip: float | None  # largest norm of the whole gradient


@dataclass(frozen=True)
class EmaConfig:
    decay: float | None  # None: off
    warmup: bool  # decay at step n is at most (1 + n) / (10 + n)


@dataclass(frozen=True)
class ValidateConfig:
    every: int | None  # steps; None: only at the end
    samples: int  # held-out samples of the fixed-grid loss
    requests: str | list[dict[str, Any]] | None  # list, or a JSONL file, of the recipe's Request
    from_split: int  # held-out samples asked as text, as image and as both
    seed: int


@dataclass(frozen=True)
class CheckpointConfig:
    every: int | None  # steps; None: only at a stop and at the end
    keep_last: int
    keep_best: int  # further ones kept, by validation loss


@dataclass(frozen=True)
class WandbConfig:
    mode: Literal["auto", "online", "offline", "off"]
    project: str
    entity: str | None
    name: str | None
    group: str | None
    tags: list[str]


@dataclass(frozen=True)
class ClusterConfig:
    """A site, and how jobs start there. Everything from `launcher` on is for Slurm."""

    name: str
    backend: Literal["debug", "local", "submitit", "sbatch"]
    device: Literal["auto", "cpu", "cuda"]
    threads: int | None  # intra-op CPU threads per rank; default: the machine's cores divided by its ranks
    gpu_memory_gb: float | None  # 10^9 bytes that a rank may count on; default: what its device has
    launcher: Literal["torchrun", "srun"] = "torchrun"  # one agent per node and its torchrun, or one task per rank
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpu_flag: Literal["gpus-per-node", "gres"] | None = None  # how a node's GPUs are asked for; null: not at all
    gpu_type: str | None = None  # as in --gpus-per-node=h200:8
    cpus_per_rank: int | None = None
    mem: str | None = None  # of a node, as in 200G; "0" is all of it
    time: str | None = None  # limit, D-HH:MM:SS or HH:MM:SS; in quotes, or YAML reads a number
    notice_seconds: int = 300  # between SIGUSR2 and the limit: in which a run saves
    python: str | None = None  # interpreter on the nodes; default: the one that submits
    environment: list[str] = dataclasses.field(default_factory=list)  # further variables that travel with a job
    setup: list[str] = dataclasses.field(default_factory=list)  # shell lines before the job's command
    sbatch: dict[str, Any] = dataclasses.field(default_factory=dict)  # further flags; null removes one of ours


@dataclass(frozen=True)
class JobConfig:
    """What every stage has: where it runs, and the folder that it is told in."""

    stage: Literal["train", "generate"]
    name: str
    group: str
    nodes: int
    gpus_per_node: int
    runs_dir: str
    cache_dir: str  # built-in data sets and tiny models
    cluster: ClusterConfig

    @property
    def ranks(self) -> int:
        """Data ranks: every rank of the job works on its own share."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class RunConfig(JobConfig):
    """Everything one training run is made of; frozen in its folder as config.yaml."""

    seed: int
    init_from: str | None  # weights to start from: an export of a run, a safetensors file or folder, or a hub id
    mesh: Literal["auto", "replicate", "hybrid", "full"]  # of the network
    encoders: Literal["auto", "replicate", "full"]
    precision: Literal["bf16", "fp32"]  # of the computation; trained weights are always fp32
    activation_checkpointing: bool
    batch: BatchConfig
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    ema: EmaConfig
    validate: ValidateConfig
    checkpoint: CheckpointConfig
    wandb: WandbConfig
    recipe: dict[str, Any]  # `name`, and the fields of the recipe's Config
    experiment: str | None

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimiser step on each rank."""
        return self.batch.size // (self.batch.micro * self.ranks)


@dataclass(frozen=True)
class GenerateConfig(JobConfig):
    """Pictures to make with trained weights; frozen in the job's folder as config.yaml."""

    weights: str  # weights/step_N of a run, a .safetensors file of one, or checkpoints/step_N
    average: bool | None  # averaged weights or raw ones; default: what an export holds, a checkpoint's average if any
    requests: str | list[dict[str, Any]] | None  # list, or a JSONL file, of the recipe's Request
    dtype: Literal["bf16", "fp32"] | None  # of network and encoders; default: bf16 on a GPU, fp32 on the CPU
    micro: int  # pictures in one call of the network; above 1 it may change a picture's last bits
    grid: int  # columns of grid.png, references above pictures; 0: none


STAGES: dict[str, type[JobConfig]] = {"train": RunConfig, "generate": GenerateConfig}


def load(cls: type[T], mapping: Mapping[str, Any], path: str = "") -> T:
    """Convert `mapping` to the dataclass `cls`; nothing is guessed and nothing is ignored.

    Raises ValueError naming every wrong key at once: unknown (with the nearest known one), missing, or of the wrong
    type, each with its config path, its value and what is allowed.
    """
    errors: list[str] = []
    value = _dataclass(cls, mapping, path, errors)
    if errors:
        raise ValueError("\n".join(errors))
    return value  # type: ignore[no-any-return]


def read_config(cls: type[T], path: Path) -> T:
    """The frozen config of a run folder."""
    return load(cls, yaml.safe_load(path.read_text()))


def read_job(path: Path) -> JobConfig:
    """The frozen config of a run folder, of whatever stage."""
    plain = yaml.safe_load(path.read_text())
    return load(STAGES[plain["stage"]], plain)


def write_config(value: Any, path: Path) -> None:
    """Freeze a config: plain YAML that `read_config` turns back into the same dataclass."""
    path.write_text(yaml.safe_dump(dump(value), sort_keys=False, allow_unicode=True))


def dump(value: Any) -> Any:
    """The plain dicts and lists that `load` turns back into the same dataclass."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: dump(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: dump(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [dump(v) for v in value]
    return value


def unknown(key: str, allowed: list[str]) -> str:
    """`did you mean` and the list of what is allowed: the second half of every unknown-name message."""
    near = difflib.get_close_matches(key, allowed, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}allowed: {', '.join(sorted(allowed))}"


def _dataclass(cls: Any, mapping: Any, path: str, errors: list[str]) -> Any:
    if not isinstance(mapping, Mapping):
        errors.append(f"{path or 'config'}: {mapping!r} is not a group of keys")
        return None
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in mapping:
        if key not in fields:
            errors.append(f"{_join(path, str(key))}: unknown key; {unknown(str(key), list(fields))}")
    values = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _value(hints[name], mapping[name], _join(path, name), errors)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            errors.append(f"{_join(path, name)}: missing; expected {_describe(hints[name])}")
    return None if errors else cls(**values)


def _value(hint: Any, value: Any, path: str, errors: list[str]) -> Any:
    """`value` as the type `hint`, or an entry in `errors`."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _union(args, value, path, errors)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, path, errors)
    if origin is Literal and value in args:
        return value
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _value(args[1], v, _join(path, str(k)), errors) for k, v in value.items()}
    if origin is list and isinstance(value, list | tuple):
        return [_value(args[0], v, f"{path}[{i}]", errors) for i, v in enumerate(value)]
    if origin is tuple and isinstance(value, list | tuple) and (args[-1] is ... or len(value) == len(args)):
        kinds = [args[0]] * len(value) if args[-1] is ... else args
        return tuple(_value(k, v, f"{path}[{i}]", errors) for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    errors.append(f"{path}: {value!r} is not allowed; expected {_describe(hint)}")
    return None


def _union(args: tuple[Any, ...], value: Any, path: str, errors: list[str]) -> Any:
    if value is None and type(None) in args:
        return None
    attempts = []
    for hint in (a for a in args if a is not type(None)):
        tried: list[str] = []
        result = _value(hint, value, path, tried)
        if not tried:
            return result
        attempts.append(tried)
    deepest = [a for a in attempts if not a[0].startswith(f"{path}: ")]
    errors.extend(deepest[0] if deepest else [f"{path}: {value!r} is not allowed; expected {_describe(args)}"])
    return None


def _describe(hint: Any) -> str:
    """A type in words a user can act on."""
    if isinstance(hint, tuple) or get_origin(hint) in (Union, types.UnionType):
        args = hint if isinstance(hint, tuple) else get_args(hint)
        return " or ".join(_describe(a) for a in args)
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(a) for a in get_args(hint))
    if get_origin(hint) is tuple:
        return "(" + ", ".join("..." if a is ... else _describe(a) for a in get_args(hint)) + ")"
    if get_origin(hint) in (list, dict):
        return f"{'list' if get_origin(hint) is list else 'mapping'} of {_describe(get_args(hint)[-1])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
