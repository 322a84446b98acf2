"""decomposer end to end through the real commands: two ranks, resumed bit for bit, exported, and asked for pictures."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from launch.cli import main
from tests.support import synthos

pytestmark = pytest.mark.slow
SMALL = (
    "recipe=decomposer", "model=tiny", "data=photos", "cluster=local", "cluster.device=cpu", "cluster.threads=1",
    "precision=fp32", "recipe.num_components=3", "recipe.num_tokens=8", "recipe.num_heads=4", "recipe.num_layers=2",
    "recipe.text_length=16", "recipe.kd_weight=1", "batch.size=4", "batch.micro=1", "optim.lr=1e-3", "optim.steps=4",
    "checkpoint.every=2", "validate.every=2", "validate.samples=4", "validate.from_split=1", "wandb.mode=off",
)  # fmt: skip
ASKED = [
    {"name": "all", "prompt": "a cat. a red dog", "save_components": True, "steps": 3},
    {"name": "one", "prompt": "a cat. a red dog", "component": 2, "steps": 3},
    {"name": "plain", "prompt": "a cat. a red dog", "guidance": 1.0, "steps": 3},
]


def train(folder: Path, *overrides: str) -> Path:
    """Run to the end; returns the run folder."""
    asked = folder.parent / "asked.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in ASKED))
    paths = (f"runs_dir={folder}", f"cache_dir={folder.parent / 'cache'}", f"validate.requests={asked}")
    done = synthos("submit", *SMALL, *paths, *overrides)
    assert done.returncode == 0, done.stderr
    (config,) = folder.glob("*/*/config.yaml")
    return config.parent


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("decomposer") / "straight", "gpus_per_node=2", "mesh=full")


def numbers(run: Path) -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("train/loss", "train/loss_kd", "train/loss_component_cosine", "train/grad_norm", "val/loss")
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row["step"], {}).update({key: row[key] for key in kept if key in row})
    return found


def trained(run: Path) -> Path:
    return run / "weights" / "step_00000004" / "decomposer" / "trained.safetensors"


def pixels(file: Path) -> Any:
    return np.asarray(Image.open(file)).astype(int)


def test_what_is_logged(straight: Path) -> None:
    story = numbers(straight)
    assert set(story) == {0, 1, 2, 3, 4} and set(story[0]) == {"val/loss"}
    assert len(story[4]) == 5 and story[4]["train/loss_kd"] > 0 and abs(story[4]["train/loss_component_cosine"]) < 1


def test_resumed_from_its_middle_it_is_the_same_run(straight: Path) -> None:
    """As if every process had been killed right after the checkpoint of step 2."""
    again = straight.parents[2] / "again" / straight.parent.name / straight.name
    shutil.copytree(straight, again, symlinks=True)
    for left in ("checkpoints/step_00000004", "weights"):
        shutil.rmtree(again / left)
    (again / "control" / "verdict.json").unlink()
    assert train(again.parents[1], "gpus_per_node=2", "mesh=full") == again
    assert trained(again).read_bytes() == trained(straight).read_bytes()
    assert numbers(again) == numbers(straight)


def test_one_rank_learns_the_same_but_for_rounding(straight: Path) -> None:
    alone = numbers(train(straight.parents[2] / "alone", "gpus_per_node=1"))
    for step, values in numbers(straight).items():
        assert alone[step] == pytest.approx(values, rel=1e-3), step


def test_the_export_holds_the_decomposer_and_its_shape(straight: Path) -> None:
    names = load_file(trained(straight))
    assert names["decomposer.queries"].shape == (3, 8, 32)
    assert all(name.startswith("decomposer.") for name in names)
    about = json.loads((straight / "weights" / "step_00000004" / "synthos.json").read_text())
    assert (about["recipe"]["num_components"], about["recipe"]["num_layers"]) == (3, 2)
    assert set(load_file(straight / "weights" / "step_00000004" / "null.safetensors")) == {"text", "clip", "pooled"}


def test_generate_makes_what_validation_made(straight: Path, tmp_path: Path) -> None:
    given = ["generate", f"weights={straight / 'weights' / 'step_00000004'}", "steps=3", "prompt=a cat. a red dog"]
    shown = {}
    for name, words in {"all": ["save_components=true"], "one": ["component=2"], "plain": ["guidance=1"]}.items():
        assert main([*given, *words, f"out={tmp_path / name}.png"]) == 0
        shown[name] = pixels(tmp_path / f"{name}.png")
        validated = pixels(straight / "samples" / "step_00000004" / f"{name}.png")
        assert abs(shown[name] - validated).max() <= 1  # other numbers of threads round otherwise
    assert shown["all"].shape == (64, 4 * 64, 3) and shown["one"].shape == (64, 64, 3)
    assert abs(shown["all"][:, 3 * 64 :] - shown["one"]).max() <= 1
    assert abs(shown["all"][:, :64] - shown["one"]).max() > 1 < abs(shown["all"][:, :64] - shown["plain"]).max()


@pytest.mark.parametrize("where", ["out={tmp}/x.png", "cluster=local runs_dir={tmp}"])
def test_a_component_out_of_range_is_one_message(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    words = where.format(tmp=tmp_path).split()
    assert main(["generate", f"weights={straight / 'weights' / 'step_00000004'}", "component=3", *words]) == 2
    assert "component 3 is not allowed; expected 0 to 2, or null" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
