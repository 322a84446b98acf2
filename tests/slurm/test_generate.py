"""A generation as a job of a real Slurm."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.slurm.conftest import Cluster
from tests.support import ROOT, SMALL, synthos

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.slurm]


def test_a_job_on_two_nodes_makes_what_is_made_here(cluster: Cluster, tmp_path: Path) -> None:
    done = synthos("submit", *SMALL, "optim.steps=1", "validate.samples=2", "validate.from_split=0",
                   f"runs_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (weights,) = tmp_path.glob("i2i/*/weights/*")
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"name": f"p{i}", "prompt": "red", "seed": i}) + "\n" for i in range(5)))
    words = ["generate", f"weights={weights}", f"requests={asked}", "steps=2"]
    here = subprocess.run(
        [sys.executable, "-m", "launch.cli", *words, f"out={tmp_path / 'here'}"],
        cwd=ROOT, env={**cluster.env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert here.returncode == 0, here.stderr
    job = subprocess.run(
        [sys.executable, "-m", "launch.cli", *words, "cluster=practice", "nodes=2", "gpus_per_node=1", "follow=true",
         f"runs_dir={tmp_path}"],
        cwd=ROOT, env=cluster.env, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert job.returncode == 0, job.stdout + job.stderr
    assert "submitted job" in job.stdout and "done at step 5" in job.stdout
    (samples,) = tmp_path.glob("generate/*/samples")
    for name in (f"p{i}.png" for i in range(5)):
        assert np.array_equal(*(np.asarray(Image.open(folder / name)) for folder in (samples, tmp_path / "here")))
    assert len(list((samples.parent / "attempts" / "0001").glob("rank-*.log"))) == 2
