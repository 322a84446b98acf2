"""Every other recipe on a real Slurm, by the user's command: two nodes of two ranks learn what one rank does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import Cluster
from tests.support import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.slurm]
COMMON = (
    "model=tiny", "data=photos", "precision=fp32", "mesh=full", "batch.size=4", "batch.micro=1", "optim.lr=1e-3",
    "optim.steps=3", "checkpoint.every=null", "validate.every=null", "validate.samples=4", "validate.from_split=1",
    "wandb.mode=off",
)  # fmt: skip
RECIPES = {
    "decomposer": ("recipe.num_components=2", "recipe.num_tokens=4", "recipe.num_heads=4", "recipe.num_layers=1",
                   "recipe.text_length=8", "recipe.kd_weight=1"),
    "siglip_projector": ("recipe.unet=trained", "recipe.projector_layers=2", "recipe.projector_hidden=32",
                         "recipe.num_tokens=16", "optim.warmup_steps=1"),
}  # fmt: skip
KEYS = ("train/loss", "val/loss")
PICTURES = {
    "decomposer": {f"split_000_text_{name}" for name in ("compose", "component_0", "component_1")},
    "siglip_projector": {"split_000_image"},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_nodes_of_two_ranks(cluster: Cluster, tmp_path: Path, recipe: str) -> None:
    shapes = {
        "slurm": ("cluster=practice", "nodes=2", "gpus_per_node=2", "follow=true"),
        "here": ("cluster=debug", "cluster.device=cpu", "cluster.threads=1"),
    }
    told = {}
    for name, shape in shapes.items():
        folders = (f"runs_dir={tmp_path / name}", f"cache_dir={tmp_path / 'cache'}")
        command = [sys.executable, "launch/submit.py", f"recipe={recipe}", *COMMON, *RECIPES[recipe], *shape, *folders]
        done = subprocess.run(command, cwd=ROOT, env=cluster.env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        (metrics,) = (tmp_path / name).glob("*/*/metrics.jsonl")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        told[name] = {(row["step"], key): row[key] for row in rows for key in KEYS if key in row}
    assert told["slurm"] == pytest.approx(told["here"], rel=2e-4) and len(told["slurm"]) == 3 + 2
    (samples,) = (tmp_path / "slurm").glob("*/*/samples/step_00000003")
    assert {file.stem for file in samples.glob("*.png")} == PICTURES[recipe]
