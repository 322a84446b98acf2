"""What is made of nvidia-smi's words, by a program of that name which says what the real one does."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launch import gpus
from launch.gpus import gpu_faults, read_gpus
from synthos.schema import ClusterConfig
from tests.support import compose_for_test

IDLE = "{}, GPU-{}a3f, 4, 81559, 0, 0x0000000000000001"  # idle is no fault
Say = Callable[..., Path]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Lets nvidia-smi print lines, leave with a code, and not know the `unknown` fields; returns the log of calls."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def write(*lines: str, code: int = 0, unknown: str = "$.", then: str = "") -> Path:
        body = f"echo $1 >>{tmp_path}/asked\n"
        body += f'[[ $1 =~ {unknown} ]] && echo "Field \\"x\\" is not a valid field to query." && exit 2\n{then}\n'
        body += "".join(f"echo '{line}'\n" for line in lines)
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/bash\n{body}exit {code}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        return tmp_path / "asked"

    return write


@pytest.fixture(scope="module")
def cluster() -> ClusterConfig:
    return compose_for_test("recipe=i2i", "model=tiny", "data=photos", "cluster=slurm").cluster


def idle(count: int) -> list[str]:
    return [IDLE.format(index, index) for index in range(count)]


def test_fit_gpus_have_no_fault(say: Say, cluster: ClusterConfig) -> None:
    say(*idle(8))
    assert gpu_faults(cluster, 8, {}) == []
    found = read_gpus({})
    assert found is not None and [gpu.index for gpu in found] == list(range(8))
    assert found[0].total == 81559 * 1024**2 and found[0].uncorrected == 0 and found[0].slowdowns == ()


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("1, GPU-1, 4, 81559, 3, 0x0000000000000001", "GPU 1: 3 uncorrected ECC errors"),
        ("1, GPU-1, 4, 81559, 0, 0x0000000000000048", "GPU 1: clocks lowered (hardware slowdown, too hot)"),
        ("1, GPU-1, 4, 81559, 0, 0x0000000000000080", "GPU 1: clocks lowered (power brake)"),
        ("1, GPU-1, 40000, 81559, 0, 0x0000000000000000", "GPU 1: 41.9 of its 85.5 GB are in use by others"),
        ("1, GPU-1, [GPU is lost], [GPU is lost], 0, 0x0", "nvidia-smi says of a GPU: 1, GPU-1, [GPU is lost]"),
        ("", "1 GPUs, gpus_per_node is 2"),
    ],
)
def test_each_fault(say: Say, cluster: ClusterConfig, line: str, fault: str) -> None:
    say(*idle(1), line)
    (found,) = gpu_faults(cluster, 2, {}, patience_seconds=0)
    assert found.startswith(fault)
    assert gpu_faults(cluster, 1, {}) == ([] if "lost" not in line else [found])  # no rank uses the second GPU


@pytest.mark.parametrize("line", ["0, GPU-0, 4, 81559, [N/A], [N/A]", "0, GPU-0, 4, 81559, [Not Supported], 0x04"])
def test_what_a_gpu_does_not_know_is_no_fault(say: Say, cluster: ClusterConfig, line: str) -> None:
    say(line)
    assert gpu_faults(cluster, 1, {}) == []


@pytest.mark.parametrize(("unknown", "asked"), [("event_reasons", 2), ("reasons", 3)])
def test_older_drivers_are_asked_in_their_words(say: Say, cluster: ClusterConfig, unknown: str, asked: int) -> None:
    calls = say(IDLE.format(0, 0), unknown=unknown)
    assert gpu_faults(cluster, 1, {}) == [] and len(calls.read_text().splitlines()) == asked


def test_memory_that_a_killed_process_still_holds_is_waited_for(say: Say, cluster: ClusterConfig) -> None:
    busy = "0, GPU-0, 70000, 81559, 0, 0x0"
    first = f"[[ $(wc -l <${{0%/*}}/asked) == 1 ]] && echo '{busy}' && exit"
    calls = say(*idle(1), then=first)
    assert gpu_faults(cluster, 1, {}) == [] and len(calls.read_text().splitlines()) == 2


def test_a_rank_that_needs_less_takes_what_is_free(say: Say, cluster: ClusterConfig) -> None:
    say("0, GPU-0, 30000, 81559, 0, 0x0")
    assert gpu_faults(replace(cluster, gpu_memory_gb=40), 1, {}) == []


@pytest.mark.parametrize(
    ("visible", "found"),
    [("3,1", [3, 1]), ("GPU-2a3f", [2]), ("", []), ("0,MIG-7", None)],
)
def test_only_what_cuda_will_see_counts(say: Say, visible: str, found: list[int] | None) -> None:
    say(*idle(4))
    seen = read_gpus({"CUDA_VISIBLE_DEVICES": visible})
    assert (seen if seen is None else [gpu.index for gpu in seen]) == found


def test_a_driver_that_fails_or_hangs_is_a_fault_where_gpus_are_needed(
    say: Say, cluster: ClusterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = replace(cluster, gpu_flag=None)
    say("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.".replace("'", ""), code=9)
    assert gpu_faults(cluster, 1, {})[0].startswith("nvidia-smi fails: NVIDIA-SMI has failed")
    assert gpu_faults(without, 1, {}) == gpu_faults(replace(cluster, device="cpu"), 1, {}) == []
    monkeypatch.setattr(gpus, "TIMEOUT_SECONDS", 0.2)
    say(then="exec sleep 60")
    assert gpu_faults(cluster, 1, {}) == ["nvidia-smi did not answer in 0.2 s"]


def test_without_nvidia_smi_nobody_tells(
    tmp_path: Path, cluster: ClusterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_faults(cluster, 8, {}) == []
