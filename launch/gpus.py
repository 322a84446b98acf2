"""What nvidia-smi says of the GPUs that a node's ranks will use, in the fields of `nvidia-smi --help-query-gpu`."""

import math
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

from synthos.schema import ClusterConfig

TIMEOUT_SECONDS = 60  # a GPU that is lost lets nvidia-smi hang
RELEASE_SECONDS = 30  # memory of ranks that were just killed is free a little later
FREE_SHARE = 0.9  # of a GPU's memory; a driver keeps some
BASE = "index,uuid,memory.used,memory.total"
# The reasons have another name since driver 535; some GPUs know nothing of ECC, but all drivers know the word.
HEALTH = tuple(f"ecc.errors.uncorrected.volatile.total,clocks_{name}_reasons.active" for name in ("event", "throttle"))
SLOWDOWNS = {0x08: "hardware slowdown", 0x40: "too hot", 0x80: "power brake"}  # nvml.h, nvmlClocksEventReason*


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        index: by which nvidia-smi calls it.
        uuid: that no other GPU has.
        used: bytes of its memory that processes hold.
        total: bytes of its memory.
        slowdowns: why its hardware has lowered its clocks; the driver's own reasons, like a power cap, are no fault.
        uncorrected: ECC errors since its driver was loaded; None where it counts none.
    """

    index: int
    uuid: str
    used: float
    total: float
    slowdowns: tuple[str, ...] = ()
    uncorrected: int | None = None


def read_gpus(environment: Mapping[str, str]) -> list[Gpu] | None:
    """The GPUs that CUDA will see, in its order; None where nobody tells: without nvidia-smi, and for parts of a GPU.

    Raises RuntimeError where nvidia-smi fails or hangs.
    """
    if not shutil.which("nvidia-smi"):
        return None
    for health in (*HEALTH, ""):
        done = _ask(f"{BASE},{health}".rstrip(","))
        if done.returncode == 0:
            return _visible([_parse(line) for line in done.stdout.splitlines() if line.strip()], environment)
        said = " ".join(f"{done.stdout} {done.stderr}".split())
        if "not a valid field" not in said:
            break
    raise RuntimeError(f"nvidia-smi fails: {said}")


def gpu_faults(
    cluster: ClusterConfig, count: int, environment: Mapping[str, str], patience_seconds: float = RELEASE_SECONDS
) -> list[str]:
    """A line for each thing that keeps `count` ranks from this node's GPUs; none where the run needs no GPU.

    Memory that an earlier job still holds is waited for.
    """
    if cluster.device == "cpu":
        return []
    needed = cluster.device == "cuda" or cluster.gpu_flag is not None
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            gpus = read_gpus(environment)
        except RuntimeError as error:
            return [str(error)] if needed else []
        if gpus is None:
            return []
        used = [line for gpu in gpus[:count] for line in _memory(gpu, cluster.gpu_memory_gb)]
        if not used or time.monotonic() > deadline:
            break
        time.sleep(2)
    few = [f"{len(gpus)} GPUs, gpus_per_node is {count}"] if needed and len(gpus) < count else []
    return [*few, *used, *(line for gpu in gpus[:count] for line in _health(gpu))]


def _memory(gpu: Gpu, wanted_gb: float | None) -> list[str]:
    wanted = min(FREE_SHARE * gpu.total, math.inf if wanted_gb is None else 1e9 * wanted_gb)
    if gpu.total - gpu.used >= wanted:
        return []
    return [f"GPU {gpu.index}: {gpu.used / 1e9:.1f} of its {gpu.total / 1e9:.1f} GB are in use by others"]


def _health(gpu: Gpu) -> list[str]:
    errors = [f"GPU {gpu.index}: {gpu.uncorrected} uncorrected ECC errors"] if gpu.uncorrected else []
    slow = [f"GPU {gpu.index}: clocks lowered ({', '.join(gpu.slowdowns)})"] if gpu.slowdowns else []
    return [*errors, *slow]


def _ask(fields: str) -> subprocess.CompletedProcess[str]:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"nvidia-smi did not answer in {TIMEOUT_SECONDS} s") from None


def _parse(line: str) -> Gpu:
    """A line of CSV without units: memory in MiB, "[N/A]" and the like where a GPU does not know a field."""
    words = [word.strip() for word in line.split(",")]
    try:
        index, uuid, used, total = int(words[0]), words[1], float(words[2]), float(words[3])
    except (ValueError, IndexError):  # as "[GPU is lost]"
        raise RuntimeError(f"nvidia-smi says of a GPU: {line.strip()}") from None
    errors, reasons = [*words[4:6], "", ""][:2]
    active = int(reasons, 16) if reasons.startswith("0x") else 0
    slowdowns = tuple(name for bit, name in SLOWDOWNS.items() if active & bit)
    return Gpu(index, uuid, used * 2**20, total * 2**20, slowdowns, int(errors) if errors.isdigit() else None)


def _visible(gpus: list[Gpu], environment: Mapping[str, str]) -> list[Gpu] | None:
    if "CUDA_VISIBLE_DEVICES" not in environment:
        return gpus
    names = [name.strip() for name in environment["CUDA_VISIBLE_DEVICES"].split(",")]
    if any(name.startswith("MIG-") for name in names):
        return None
    return [gpu for name in names for gpu in gpus if name and (name == str(gpu.index) or gpu.uuid.startswith(name))]
