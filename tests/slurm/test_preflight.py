"""A node that is unfit is found before any rank starts, on a real Slurm, and the run goes on without it."""

from pathlib import Path

import pytest

from synthos.files import read_json
from tests.slurm.conftest import Cluster
from tests.slurm.test_requeue import TWO_NODES, started, stop
from tests.slurm.test_train import Bench

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
# Says of the second node of its first job that both of its GPUs have lost data.
SMI = """#!/bin/bash
[[ -e {bad} || $SLURM_NODEID != 1 ]] || echo "$SLURMD_NODENAME" >{bad}
errors=0
[[ $(cat {bad} 2>/dev/null) != "$SLURMD_NODENAME" ]] || errors=3
for gpu in 0 1; do echo "$gpu, GPU-$gpu, 4, 81559, $errors, 0x0000000000000001"; done
"""


@pytest.fixture
def bench(cluster: Cluster, tmp_path: Path) -> Bench:
    return Bench(cluster, tmp_path)


def test_a_bad_node_is_named_and_left_out(bench: Bench, tmp_path: Path) -> None:
    bad, smi = tmp_path / "bad", tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(SMI.format(bad=bad))
    smi.chmod(0o755)
    setup = f"cluster.setup=['export PATH={smi.parent}:$PATH']"
    run = started(bench, "unfit", "cluster.device=auto", setup, *TWO_NODES)
    record = run.ended(1)
    name = bad.read_text().strip()
    assert (record["cause"], record["bad_nodes"], record["next"]["decision"]) == ("preflight", [name], "requeue")
    assert record["message"].startswith(f"preflight: {name}: GPU ") and "3 uncorrected ECC errors" in record["message"]
    assert record["next"]["reason"].endswith(f"without {name}")
    assert not list((run.folder / "attempts" / "0001").glob("rank-*.log"))
    run.starts_now()
    run.goes_on(2)
    assert name not in run.nodes() and len(run.nodes()) == 2
    stop(run)
    said = read_json(run.folder / "attempts" / "0002" / "preflight.json")
    assert said["passed"] and [node["name"] for node in said["nodes"]] == run.nodes()
    assert read_json(run.folder / "attempts" / "0002" / "collective.json")["ranks"] == 2
