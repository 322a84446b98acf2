"""decomposer end to end through the real commands: two ranks, resumed bit for bit, exported, and asked for pictures."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from launch.cli import main
from synthos.recipes.base import load_encoded
from synthos.run import read_verdict
from tests.support import here, synthos

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


def train(folder: Path, *overrides: str, alone: bool = False) -> Path:
    """Run to the end, on the ranks asked for or `alone`, as this process; returns the run folder."""
    asked = folder.parent / "asked.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in ASKED))
    paths = (f"runs_dir={folder}", f"cache_dir={folder.parent / 'cache'}", f"validate.requests={asked}")
    if alone:
        debug = ("cluster=debug", "cluster.device=cpu", "cluster.threads=1")
        assert here("submit", *SMALL, *debug, *paths, *overrides) == 0
    else:
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


@pytest.mark.long
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
    """And four as one does, in tests/slurm/test_recipes.py."""
    other = numbers(train(straight.parents[2] / "alone", alone=True))
    for step, values in numbers(straight).items():
        assert other[step] == pytest.approx(values, rel=2e-4), step


def test_bf16_and_activations_computed_again(straight: Path) -> None:
    """The losses are those of float32 on two ranks but for bfloat16's rounding."""
    given = ("precision=bf16", "activation_checkpointing=true", "validate.every=null", "validate.from_split=0")
    low = numbers(train(straight.parents[2] / "low", "mesh=full", *given, alone=True))
    ours, theirs = ([story[step]["train/loss"] for step in range(1, 5)] for story in (low, numbers(straight)))
    assert ours == pytest.approx(theirs, rel=0.05) and ours != theirs


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
    for name, words in {"one": ["component=2"], "plain": ["guidance=1"]}.items():
        assert main([*given, *words, f"out={tmp_path / name}.png"]) == 0
        shown[name] = pixels(tmp_path / f"{name}.png")
    assert main([*given, "save_components=true", "grid=0", f"out={tmp_path / 'all'}"]) == 0
    pictures = ["component_0", "component_1", "component_2", "compose"]
    assert sorted(file.stem for file in (tmp_path / "all").iterdir()) == pictures
    shown |= {f"all_{name}": pixels(tmp_path / "all" / f"{name}.png") for name in pictures}
    for name, picture in shown.items():
        validated = pixels(straight / "samples" / "step_00000004" / f"{name}.png")
        assert abs(picture - validated).max() <= 1  # other numbers of threads round otherwise
        assert picture.shape == (64, 64, 3)
    assert abs(shown["all_component_2"] - shown["one"]).max() <= 1
    assert abs(shown["all_compose"] - shown["one"]).max() > 1 < abs(shown["all_compose"] - shown["plain"]).max()


def test_validation_shows_composition_and_components_of_every_sample(straight: Path) -> None:
    """Also of those from the split: at the training's size, with its guidance, all on one card."""
    folder = straight / "samples" / "step_00000004"
    kinds = ("compose", *(f"component_{i}" for i in range(3)))
    several = {f"{name}_{kind}" for name in ("all", "split_000_text") for kind in kinds}
    assert {file.stem for file in folder.glob("*.png")} == several | {"one", "plain"}
    assert {file.stem for file in (folder / "cards").iterdir()} == {"all", "split_000_text", "one", "plain"}
    with Image.open(folder / "cards" / "all.png") as four, Image.open(folder / "cards" / "one.png") as single:
        assert four.width > 3.9 * single.width - 4 * 16
    encoded, _ = load_encoded(straight / "requests" / "encoded.safetensors")
    (split,) = (setting for setting in encoded.settings if setting["name"].startswith("split"))
    assert (split["height"], split["width"], split["guidance"]) == (64, 64, 4.5)
    assert pixels(folder / "split_000_text_compose.png").shape == (64, 64, 3)


@pytest.mark.long
def test_a_job_goes_on_with_the_pictures_that_are_missing(straight: Path, tmp_path: Path) -> None:
    """One process, then two ranks; a request of which a file is gone is made again. Prompts come encoded."""
    weights = straight / "weights" / "step_00000004"
    null = load_file(weights / "null.safetensors")
    save_file({"t5": null["text"], "clip": null["clip"], "pooled": null["pooled"]}, tmp_path / "a.safetensors")
    asked = tmp_path / "asked.jsonl"
    rows = [{"name": f"p{i}", "embedding": "a.safetensors", "seed": i, "save_components": True} for i in range(3)]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["generate", f"weights={weights}", f"requests={asked}", "steps=2", "cluster.device=cpu",
             "cluster.threads=1", f"runs_dir={tmp_path / 'runs'}"]  # fmt: skip
    assert here(*words, "cluster=debug") == 0
    (folder,) = (tmp_path / "runs").glob("generate/*")
    files = {file.name: file for file in (folder / "samples").iterdir()}
    assert len(files) == 3 * 4 and read_verdict(folder)["step"] == 12
    before = {name: (file.read_bytes(), file.stat().st_mtime_ns) for name, file in files.items()}
    for name in ("p0_compose.png", "p2_component_1.png"):
        files[name].unlink()
    (folder / "control" / "verdict.json").unlink()
    done = synthos(*words, "cluster=local", "gpus_per_node=2")
    assert done.returncode == 0, done.stderr
    after = {name: (file.read_bytes(), file.stat().st_mtime_ns) for name, file in files.items()}
    assert {name: content for name, (content, _) in after.items()} == {name: c for name, (c, _) in before.items()}
    assert {name for name in after if after[name] == before[name]} == {n for n in files if n.startswith("p1_")}
    assert "4 of 12 pictures are there" in next((folder / "attempts" / "0002").glob("rank-00000.log")).read_text()


@pytest.mark.parametrize("where", ["out={tmp}/x.png", "cluster=local runs_dir={tmp}"])
def test_a_component_out_of_range_is_one_message(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    words = where.format(tmp=tmp_path).split()
    assert main(["generate", f"weights={straight / 'weights' / 'step_00000004'}", "component=3", *words]) == 2
    assert "component 3 is not allowed; expected 0 to 2, or null" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
