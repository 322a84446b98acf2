"""What a config may say beyond its types: sums that must work out, numbers in range, settings that would be ignored.

Everything here is arithmetic on values; files are looked at in `launch/requests.py` and `launch/survey.py`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from launch.render import NOT_TO_SET, OWN_KEYS, limit_seconds, notice_seconds
from synthos.data.buckets import bucket_sizes
from synthos.schema import GenerateConfig, JobConfig, RunConfig

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
FILE_NAME_WORDS = "letters, digits and . _ + = - (it becomes a file name), a letter or digit first"

RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "nodes gpus_per_node batch.size batch.micro data.height data.width data.window data.lanes optim.lr "
        "optim.lr_groups optim.eps optim.steps optim.epochs optim.clip optim.decay_steps validate.every "
        "checkpoint.every checkpoint.keep_last cluster.threads cluster.gpu_memory_gb "
        "cluster.cpus_per_rank cluster.notice_seconds micro",
        lambda value: 0 < value < math.inf,
        "above 0",
    ),
    (
        "data.workers optim.weight_decay optim.warmup_steps validate.samples validate.from_split checkpoint.keep_best "
        "grid cluster.max_crashes cluster.backoff_seconds",
        lambda value: 0 <= value < math.inf,
        "0 or more",
    ),
    ("optim.betas", lambda value: 0 <= value < 1, "at least 0 and below 1"),
    ("ema.decay", lambda value: 0 < value < 1, "between 0 and 1"),
)


def value_problems(config: RunConfig, recipe: Any, recipe_config: Any) -> list[str]:
    """A line for everything wrong with the values of a config.

    Args:
        config: the shared part.
        recipe: the recipe's class.
        recipe_config: its Config.
    """
    problems = [*_names(config), *_ranges(config), *_probabilities(recipe_config)]
    if problems:  # the sums below would only repeat them
        return problems
    return [
        *batch_problems(config),
        *_lanes(config),
        *_length(config),
        *size_problems(config.data, recipe.size_multiple, "data"),
        *_buckets(config, recipe),
        *_held_out(config),
        *_validation(config),
        *_ranks(config),
        *cluster_problems(config),
    ]


def generation_problems(config: GenerateConfig) -> list[str]:
    """A line for everything wrong with the values of a generation; its requests are read by `launch/requests.py`."""
    return [*_names(config), *_ranges(config), *_debug_ranks(config), *cluster_problems(config)]


def batch_problems(config: RunConfig) -> list[str]:
    """The global batch must be whole micro-batches on every rank; says the nearest values that are."""
    size, micro, ranks = config.batch.size, config.batch.micro, config.ranks
    if size % (micro * ranks) == 0:
        return []
    near = {"batch.size": nearest_multiples(size, micro * ranks)}
    if size % ranks == 0:
        near["batch.micro"] = nearest_divisors(size // ranks, micro)
    if size % micro == 0:
        near["nodes x gpus_per_node"] = nearest_divisors(size // micro, ranks)
    legal = ", or ".join(f"{key} {' or '.join(map(str, values))}" for key, values in near.items())
    return [
        f"batch.size: {size} is not a multiple of batch.micro x ranks = {micro} x {ranks} = {micro * ranks}; "
        f"nearest legal: {legal}"
    ]


def _lanes(config: RunConfig) -> Iterator[str]:
    lanes, size = config.data.lanes, config.batch.size
    if lanes is not None and size % lanes:
        near = " or ".join(map(str, nearest_divisors(size, lanes)))
        yield f"data.lanes: {lanes} does not divide batch.size {size}; nearest: {near}, or null"


def _buckets(config: RunConfig, recipe: Any) -> Iterator[str]:
    try:
        bucket_sizes(config.data, recipe.size_multiple)
    except ValueError as error:
        yield str(error)


def nearest_multiples(value: int, of: int) -> list[int]:
    """The positive multiples of `of` next to `value`, one below and one above."""
    below = value // of * of
    return [multiple for multiple in (below, below + of) if multiple > 0]


def nearest_divisors(number: int, value: int) -> list[int]:
    """The divisors of `number` next to `value`, one below and one above where there are any."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below, above = [d for d in divisors if d < value], [d for d in divisors if d > value]
    return below[-1:] + above[:1]


def size_problems(sized: Any, multiple: int, path: str) -> list[str]:
    """The `height` and `width` (pixels) of `sized`, where it has any, must be multiples of what the network needs."""
    problems = []
    for key in ("height", "width"):
        value = getattr(sized, key, None)
        if value is not None and (value <= 0 or value % multiple):
            near = " or ".join(map(str, nearest_multiples(max(value, 0), multiple)))
            problems.append(f"{path}.{key}: {value} is not a multiple of {multiple}; nearest: {near}")
    return problems


def _names(config: JobConfig) -> Iterator[str]:
    for key, value in (("name", config.name), ("group", config.group)):
        if not FILE_NAME.fullmatch(value):
            yield f"{key}: {value!r} is not allowed; expected {FILE_NAME_WORDS}"


def _ranges(config: JobConfig) -> Iterator[str]:
    own = {field.name for field in dataclasses.fields(config)}
    for keys, fits, words in RANGES:
        for key in (key for key in keys.split() if key.split(".")[0] in own):
            for path, number in _numbers(key, _get(config, key)):
                if not fits(number):
                    yield f"{path}: {number} is not allowed; expected a number {words}"


def _numbers(path: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        yield from ((f"{path}.{name}", number) for name, number in value.items())
    elif isinstance(value, tuple):
        yield from ((f"{path}[{index}]", number) for index, number in enumerate(value))
    elif value is not None:
        yield path, value


def _get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _probabilities(recipe_config: Any) -> Iterator[str]:
    """Everywhere in the house `drop_<condition>` is a probability."""
    for name, value in dataclasses.asdict(recipe_config).items():
        if name.startswith("drop_") and not (isinstance(value, int | float) and 0 <= value <= 1):
            yield f"recipe.{name}: {value} is not allowed; expected a probability from 0 to 1"


def _length(config: RunConfig) -> Iterator[str]:
    optim = config.optim
    if (optim.steps is None) == (optim.epochs is None):
        found = "neither is set" if optim.steps is None else f"both are set ({optim.steps} and {optim.epochs})"
        yield f"optim.steps, optim.epochs: {found}; expected exactly one, the other null"
    if optim.decay_steps is not None and optim.schedule == "constant":
        yield f"optim.decay_steps: {optim.decay_steps} has no effect with optim.schedule=constant; expected null"
    end = optim.decay_steps or optim.steps
    if end is not None and optim.warmup_steps > end:
        yield f"optim.warmup_steps: {optim.warmup_steps} is more than the {end} steps of the schedule"


def length_problems(config: RunConfig, samples: int, steps: int) -> Iterator[str]:
    """What is wrong with `optim.epochs`, once the samples of an epoch are counted and make that many steps."""
    optim = config.optim
    if optim.epochs is None:
        return
    if steps < 1:
        yield (
            f"optim.epochs: {optim.epochs:g} epochs of {samples} samples are less than one step of batch.size "
            f"{config.batch.size}; expected more epochs, more samples or a smaller batch.size"
        )
    elif optim.decay_steps is None and optim.warmup_steps > steps:
        yield (
            f"optim.warmup_steps: {optim.warmup_steps} is more than the {steps} steps that optim.epochs "
            f"{optim.epochs:g} of {samples} samples are"
        )


def _held_out(config: RunConfig) -> Iterator[str]:
    data, validate = config.data, config.validate
    if data.validation is None and data.holdout_fraction == 0 and (validate.samples or validate.from_split):
        yield (
            "data.validation, data.holdout_fraction: nothing is held out to validate on; set one of them, "
            "or validate.samples=0 and validate.from_split=0"
        )


def _validation(config: RunConfig) -> Iterator[str]:
    validate, keep_best = config.validate, config.checkpoint.keep_best
    if keep_best and not validate.samples:
        yield f"checkpoint.keep_best: {keep_best} has no effect with validate.samples=0; expected 0"
    if validate.every is not None and not (validate.samples or validate.requests or validate.from_split):
        yield (
            f"validate.every: {validate.every} has no effect without validate.samples, validate.requests or "
            "validate.from_split; expected null, or one of them"
        )


def _debug_ranks(config: JobConfig) -> Iterator[str]:
    if config.cluster.backend == "debug" and config.ranks > 1:
        yield f"nodes x gpus_per_node: {config.ranks} ranks are not allowed with cluster=debug; expected 1"


def _ranks(config: RunConfig) -> Iterator[str]:
    yield from _debug_ranks(config)
    if config.mesh == "hybrid" and config.nodes == 1:
        yield "mesh: hybrid needs nodes above 1; expected auto, replicate or full"


def cluster_problems(config: JobConfig) -> Iterator[str]:
    """What is wrong with the `cluster` group."""
    cluster = config.cluster
    if not cluster.backoff_seconds:
        yield "cluster.backoff_seconds: [] is not allowed; expected seconds, as in [0, 30, 120]"
    if cluster.backend in ("debug", "local"):
        fields = [f for f in dataclasses.fields(cluster) if _default(f) is not dataclasses.MISSING]
        for field in fields:
            if (value := getattr(cluster, field.name)) != _default(field):
                yield f"cluster.{field.name}: {value!r} has no effect with cluster.backend={cluster.backend}"
        return
    yield from _travelling(cluster.environment)
    if cluster.cpus_per_rank is None and "exclusive" not in cluster.sbatch:
        yield (
            "cluster.cpus_per_rank: null is not allowed without +cluster.sbatch.exclusive=true: Slurm's default is one "
            "CPU for all ranks of a node; expected a number"
        )
    for key, value in cluster.sbatch.items():
        if key in NOT_TO_SET.split():
            yield f"cluster.sbatch.{key}: this flag is not allowed, the job depends on it"
        if not isinstance(value, str | int | float | None):
            yield f"cluster.sbatch.{key}: {value!r} is not allowed; expected text, a number, true or null"
        if key in OWN_KEYS or key == cluster.gpu_flag:
            own = OWN_KEYS.get(key, "gpus_per_node")
            yield f"cluster.sbatch.{key}: this flag is not allowed here; expected {own}, which the plan knows"
    if cluster.gpu_type and not cluster.gpu_flag:
        yield f"cluster.gpu_type: {cluster.gpu_type} has no effect with cluster.gpu_flag=null"
    if cluster.time is None:
        return
    seconds = limit_seconds(cluster.time)
    if seconds is None:
        yield f"cluster.time: {cluster.time!r} is not allowed; expected D-HH:MM:SS, HH:MM:SS, MM:SS or minutes"
    elif seconds <= (notice := notice_seconds(cluster)):
        yield (
            f"cluster.notice_seconds: {notice} is not below cluster.time {cluster.time}; "
            "the run would be told to stop as soon as it starts"
        )


def _travelling(names: list[str]) -> Iterator[str]:
    for name in names:
        if re.search("KEY|TOKEN|SECRET|PASSW|CREDENTIAL", name.upper()):
            yield (
                f"cluster.environment: {name} looks like a secret, and Slurm keeps what travels with a job; expected "
                "none: `wandb login` and `hf auth login` put keys into files below your home"
            )


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def machine_problems(config: JobConfig) -> Iterator[str]:
    """What a run on this machine needs and it has not: no obstacle to a dry run, which plans for another."""
    import torch

    if config.cluster.backend not in ("debug", "local"):
        return
    ranks, device = config.ranks, config.cluster.device
    if config.nodes > 1:
        yield f"nodes: {config.nodes} are more than cluster={config.cluster.name} has, this one machine"
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and not gpus:
        yield "cluster.device: cuda is not allowed, this machine has no GPU; expected auto or cpu"
    elif 0 < gpus < ranks:
        yield f"gpus_per_node: {config.gpus_per_node} is more than this machine's {gpus}; or set cluster.device=cpu"
