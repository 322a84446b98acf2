"""The experiments that are shipped: each is a plan that works, says its command, cost and outcome, and has the figures
of the original where it has one."""

import shlex
from pathlib import Path

import pytest

from launch.check import value_problems
from launch.compose import CONFIGS, compose
from synthos.recipes.base import recipe_class, recipe_config

EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
ORIGINALS = {  # of the optimiser, the batch on 8 GPUs, validation and the recipe
    "i2i_full_contrastyles": {
        "lr": 1e-5, "epochs": 10.0, "size": 8 * 2 * 8, "every": 200 // 2,
        "train": "full", "drop_text": 0.2, "drop_image": 0.2,
    },
    "i2i_projector_contrastyles": {
        "lr": 1e-4, "epochs": 1.0, "size": 32 * 2 * 8, "every": 100 // 2,
        "train": "projector", "drop_text": 0.9, "drop_image": 0.0, "guidance_image": 1.0,
    },
}  # fmt: skip


def command(name: str) -> list[str]:
    """The arguments of the command on an experiment's page."""
    page = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith("# Command: "))
    words = shlex.split(line.removeprefix("# Command: ").split("     (")[0])
    assert words[:2] == ["python", "launch/submit.py"]
    return words[2:]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_command_of_the_page_is_a_plan(name: str, tmp_path: Path) -> None:
    config = compose([*command(name), "cluster=local", f"cache_dir={tmp_path}"]).config
    assert config.experiment == name
    recipe = recipe_class(config.recipe["name"])
    assert value_problems(config, recipe, recipe_config(config.recipe)) == []


@pytest.mark.parametrize("name", [n for n in EXPERIMENTS if not n.endswith("_photos")])
def test_the_page_says_what_it_costs_and_what_to_expect(name: str) -> None:
    page = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    assert "\n# Cost:    an estimate: " in page and "\n# Expect:  " in page


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_originals_figures(name: str) -> None:
    config = compose(["recipe=i2i", f"experiment={name}", "cluster=local"]).config
    values = {"lr": config.optim.lr, "epochs": config.optim.epochs} | config.recipe
    values |= {"size": config.batch.size, "every": config.validate.every}
    assert not config.activation_checkpointing
    assert {key: values[key] for key in ORIGINALS[name]} == ORIGINALS[name]
    assert (config.data.height, config.data.width) == (480, 832)
    assert (config.recipe["shift"], config.recipe["loss_weight"]) == (5.0, "bell")
    assert (config.recipe["attention"], config.recipe["image_preprocess"]) == ("shared_kv", "squash")
    optim = config.optim
    assert (optim.betas, optim.weight_decay, optim.clip, optim.schedule) == ((0.9, 0.999), 0.01, None, "constant")
    assert config.ema.decay is None and optim.warmup_steps == 0
