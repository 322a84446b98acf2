"""The plan's rows about parameters, memory and files; and what a plain dry run does not do for them."""

import subprocess
import sys

import pytest

from launch.compose import compose
from launch.sizes import counted_rows, stated_rows
from synthos.build import measure
from synthos.schema import RunConfig
from synthos.train.memory import Sizes, rank_bytes, rank_memory
from tests.launch.conftest import Submit
from tests.support import ROOT, environment

Capture = pytest.CaptureFixture[str]
HEAVY = ("diffusers", "transformers", "wandb", "webdataset", "submitit")


def config(*overrides: str) -> RunConfig:
    return compose(
        ["recipe=i2i", "recipe.train=full", "nodes=4", "gpus_per_node=8", "batch.micro=2", *overrides]
    ).config


@pytest.fixture(scope="module")
def sizes() -> Sizes:
    return measure(config())


def test_a_plain_dry_run_shows_what_the_model_says_of_itself() -> None:
    assert stated_rows(config()) == {
        "parameters": "transformer 1,418,996,800, text_encoder 5,680,910,336, image_encoder 630,766,080, "
        "vae 126,892,531; dry_run=full counts what trains"
    }
    assert stated_rows(config("model=tiny"))["parameters"] == "dry_run=full counts them"


def test_a_full_one_counts_and_plans_for_the_gpus_named(sizes: Sizes) -> None:
    rows = counted_rows(config("cluster=slurm", "cluster.gpu_memory_gb=40"), sizes)
    assert rows == {
        "parameters": "1,422,609,728 trainable, 7,841,501,235 in all",
        "trained": "projector 3,612,928, transformer 1,418,996,800",
        "parts": "network 1,422,609,728, text 5,680,910,336, image 611,088,640, vae 126,892,531",
        "layout": "mesh hybrid, encoders replicate: 15.94 GB of weights and states fit into 20.00 GB, 50% of a rank's "
        "memory",
        "memory": "18.79 GB a rank and activations: weights 0.71 GB, gradients 0.71 GB, optimizer 1.42 GB, encoders "
        "12.58 GB, frozen 0.51 GB, gathered 2.85 GB",
        "on disk": "17.07 GB a checkpoint, 5.69 GB of exported weights",
        "saving": "2.14 GB of host memory a rank for what is written",
    }


def test_gpus_that_only_the_nodes_know_are_not_guessed(sizes: Sizes) -> None:
    composed = config("cluster=slurm")
    layout = counted_rows(composed, sizes)["layout"]
    needed = 2 * rank_memory(composed, sizes, "replicate", "replicate").held / 1e9
    assert layout.startswith(f"mesh replicate, encoders replicate: fits where a rank has {needed:.2f} GB; ")
    assert "cluster.gpu_memory_gb" in layout
    enough = counted_rows(config("cluster=slurm", f"cluster.gpu_memory_gb={needed + 0.01}"), sizes)
    short = counted_rows(config("cluster=slurm", f"cluster.gpu_memory_gb={needed - 0.01}"), sizes)
    assert enough["layout"].startswith("mesh replicate") and short["layout"].startswith("mesh hybrid")


def test_a_run_on_this_machine_is_planned_for_its_memory(sizes: Sizes) -> None:
    import torch

    composed = config("cluster=local", "cluster.device=cpu")
    half = rank_bytes(composed, torch.device("cpu")) / 2 / 1e9
    assert f"into {half:.2f} GB" in counted_rows(composed, sizes)["layout"]


def test_a_full_dry_run_builds_and_a_plain_one_does_not(submit: Submit, capsys: Capture) -> None:
    wrong = "+optim.lr_groups.no_such=1.0"
    assert submit("dry_run=true", wrong) == 0
    assert submit("dry_run=full", wrong) == 2 and submit(wrong) == 2
    assert "optim.lr_groups: no group 'no_such'; allowed: projector" in capsys.readouterr().err
    assert submit("dry_run=full") == 0
    assert "\ntrained:    projector " in capsys.readouterr().out


def test_a_plain_dry_run_imports_nothing_heavy() -> None:
    """Every import costs the one who waits on a login node: diffusers alone more than all the rest."""
    program = (
        "import sys; from launch.cli import main; main(['submit', 'recipe=i2i', 'nodes=4', 'dry_run=true']); "
        f"print('loaded:', *[name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "loaded:", done.stderr
    assert "parameters: transformer 1,418,996,800, " in done.stdout
