"""The shared part of a run's config as dataclasses; `synthos.strict` converts YAML to them.

A recipe's own hyperparameters are its `Config` dataclass. Defaults live in `configs/run.yaml`, not here, so that one
page shows every value.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from synthos.files import DamagedFile
from synthos.strict import load, read_yaml, unknown


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
class SourceConfig:
    shards: str | list[str]  # as data.shards
    weight: float | dict[str, float] | None = None  # share of the samples, or from which step on which; null: its size


@dataclass(frozen=True)
class BucketConfig:
    """Shapes that pictures are read in, named one by one or generated."""

    sizes: list[tuple[int, int]] | None = None  # height, width in pixels
    areas: list[int] | None = None  # pixels; all shapes of about this area
    multiple: int = 64  # pixels; heights and widths of generated shapes are multiples of it
    max_aspect: float = 2.0  # longer edge / shorter edge of generated shapes


@dataclass(frozen=True)
class StreamingConfig:
    """Shards are read one after another, without an index."""

    samples_per_epoch: int  # declared, for nobody has counted them
    block: int = 1000  # samples that each reader holds and shuffles together


@dataclass(frozen=True)
class DataConfig:
    name: str
    shards: str | list[str] | None  # brace pattern, glob, folder, or a .txt / .json list of tars
    mix: dict[str, SourceConfig] | None  # several sources by name, in place of `shards`
    validation: str | list[str] | None  # shards of their own, or else `holdout_fraction`
    holdout_fraction: float  # share of samples kept out of training, by the hash of their id
    height: int  # pixels
    width: int  # pixels
    buckets: BucketConfig | None  # None: every picture is read at height x width
    window: int  # shards whose samples are shuffled together
    lanes: int | None  # default: the largest divisor of the global batch not above 64
    tail: Literal["carry", "drop", "pad"]  # what becomes of the rest of an epoch
    workers: int  # decoding processes per rank; 0 decodes in the training process
    read: Literal["auto", "ranges", "shards"]  # of remote shards: members alone, or whole to the cache; auto by scheme
    cache: str | None  # folder for remote shards and tables of large data sets, best on a node's own disk
    cache_gb: float | None  # 10^9 bytes that remote shards may take there; None: no limit
    known_bad: str | None  # JSONL of samples to leave out, as `synthos data quarantine` writes it
    max_bad_fraction: float  # of a source's samples, and of any 100,000 in a row, that may be bad
    max_bad_per_shard: int
    prepare: str | None  # module of synthos.data that writes this data set on first use
    streaming: StreamingConfig | None = None  # for shards without an index

    @property
    def title(self) -> str:
        """What it is called where people read it."""
        return self.name if self.mix is None else f"a mixture of {', '.join(self.mix)}"


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
    max_crashes: int  # in 24 hours, after each of which a run starts again by itself
    backoff_seconds: tuple[int, ...]  # before the first restart after a crash, the second, and all others
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
    notice_seconds: int | None = None  # between SIGUSR2 and the limit; default: by the measured time of a save
    requeue: Literal["scontrol", "chain", "none"] = "scontrol"  # the same job again, a successor, or not at all
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
    micro: int  # requests in one call of the network; above 1 it may change a picture's last bits
    grid: int  # columns of grid.png, references above pictures; 0: none


STAGES: dict[str, type[JobConfig]] = {"train": RunConfig, "generate": GenerateConfig}


def read_job(path: Path) -> JobConfig:
    """The frozen config of a run folder, of whatever stage.

    Raises ValueError where the folder is none, and DamagedFile where the config is not as it was written.
    """
    try:
        plain = read_yaml(path)
    except OSError as error:
        if (path.parent / "attempts").is_dir():  # it was one
            raise DamagedFile(path, error.strerror) from None
        raise ValueError(f"{path.parent} is no run folder: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DamagedFile(path, error) from None
    stage = plain.get("stage") if isinstance(plain, dict) else None
    if stage not in STAGES:
        raise DamagedFile(path, f"it has stage {stage!r}; {unknown(str(stage), list(STAGES))}")
    try:
        return load(STAGES[stage], plain)
    except ValueError as error:
        raise DamagedFile(path, f"it is no config of this version: {error}") from None
