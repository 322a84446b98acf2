"""From a command line to a RunConfig."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import yaml

from launch.compose import CHECKOUT, CONFIGS, choices, compose
from synthos.recipes.base import recipe_class

BASE = ("recipe=i2i", "model=tiny")
RECIPES = ", ".join(choices()["recipe"])


def message(*arguments: str, config_dir: Path = CONFIGS) -> str:
    with pytest.raises(ValueError) as error:
        compose(arguments, config_dir)
    return str(error.value)


def test_defaults_are_filled_in() -> None:
    composed = compose([*BASE, "data=photos"])
    config = composed.config
    assert not composed.dry_run
    assert (config.name, config.group, config.experiment) == ("i2i", "i2i", None)
    assert (config.runs_dir, config.cache_dir) == (str(CHECKOUT / "runs"), str(CHECKOUT / ".cache"))
    assert config.data.shards == str(CHECKOUT / ".cache" / "photos-1" / "train")


def test_the_command_line_beats_the_recipe() -> None:
    config = compose([*BASE, "optim.lr=3e-4", "recipe.drop_text=0.3", "batch={size: 12, micro: 3}", "name=mine"]).config
    assert config.optim.lr == 3e-4 and config.recipe["drop_text"] == 0.3 and config.batch.size == 12
    assert (config.name, config.group) == ("mine", "i2i")


def test_dry_run_is_no_part_of_the_config() -> None:
    assert compose([*BASE, "dry_run=true"]).dry_run
    assert compose([*BASE, "dry_run=true"]).config == compose(BASE).config


def test_entries_are_added_to_open_mappings() -> None:
    assert compose([*BASE, "+optim.lr_groups.projector=1e-3"]).config.optim.lr_groups == {"projector": 1e-3}
    assert "+optim.lr_groups.projector=<value>" in message(*BASE, "optim.lr_groups.projector=1e-3")


def test_an_experiment_chooses_the_recipe_and_names_the_run(tmp_path: Path) -> None:
    shutil.copytree(CONFIGS, tmp_path / "configs")
    page = "# @package _global_\ndefaults:\n  - override /recipe: i2i\n  - override /model: tiny\noptim: {lr: 0.5}\n"
    (tmp_path / "configs" / "experiment").mkdir(exist_ok=True)
    (tmp_path / "configs" / "experiment" / "loud.yaml").write_text(page)
    config = compose(["experiment=loud"], tmp_path / "configs").config
    assert (config.name, config.group, config.experiment) == ("loud", "loud", "loud")
    assert config.recipe["name"] == "i2i" and config.model.name == "tiny" and config.optim.lr == 0.5


def test_null_is_the_choice_of_no_experiment() -> None:
    plain = compose(BASE).config
    assert compose([*BASE, "experiment=null"]).config == plain
    assert compose([*BASE, "experiment=i2i_photos", "experiment=null"]).config == plain
    assert compose(["experiment=null", "experiment=i2i_photos"]).config.experiment == "i2i_photos"


def test_a_mark_of_what_is_to_be_set_leaves_the_default_or_is_missing() -> None:
    assert compose([*BASE, "name=???", "runs_dir=???"]).config == compose(BASE).config
    assert "drop_text" not in compose([*BASE, "recipe.drop_text=???"]).config.recipe


@pytest.mark.parametrize("page", sorted((CONFIGS / "recipe").glob("*.yaml")), ids=lambda page: page.stem)
def test_a_recipe_page_sets_every_field_of_its_config_and_nothing_else(page: Path) -> None:
    recipe = yaml.safe_load(page.read_text())["recipe"]
    fields = {field.name for field in dataclasses.fields(recipe_class(recipe["name"]).Config)}
    assert recipe.keys() == {"name", *fields}
    assert None not in recipe.values() and "???" not in recipe.values()


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("/data/{00000..00013}.tar", "/data/{00000..00013}.tar"),
        ("{a,b}.tar", "HERE/{a,b}.tar"),
        ("set/*.tar", "HERE/set/*.tar"),
        ("it's here", "HERE/it's here"),
        ("[a.tar,/b.tar]", ["HERE/a.tar", "/b.tar"]),
        ("s3://bucket/a.tar", "s3://bucket/a.tar"),
        ("null", None),
    ],
)
def test_shards_as_people_write_them(written: str, expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = [e.replace("HERE", str(tmp_path)) for e in expected] if isinstance(expected, list) else expected
    expected = expected.replace("HERE", str(tmp_path)) if isinstance(expected, str) else expected
    assert compose([*BASE, f"data.shards={written}"]).config.data.shards == expected


def test_other_paths_are_taken_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    overrides = ["runs_dir=out", "cache_dir=~/c", "validate.requests=ask.jsonl", "+model.parts.vae.path=weights"]
    overrides += ["data.known_bad=bad.jsonl", "data.mix={near: {shards: here/}, far: {shards: s3://bucket/set/}}"]
    config = compose([*BASE, *overrides, "+model.parts.text.path=some/hub-id"]).config
    assert config.data.known_bad == str(tmp_path / "bad.jsonl") and config.data.mix is not None
    assert config.data.mix["near"].shards == str(tmp_path / "here")
    assert config.data.mix["far"].shards == "s3://bucket/set/"
    assert config.runs_dir == str(tmp_path / "out") and config.cache_dir == str(Path.home() / "c")
    assert config.validate.requests == str(tmp_path / "ask.jsonl")
    assert config.model.parts["vae"].path == str(tmp_path / "weights")
    assert config.model.parts["text"].path == "some/hub-id"


def test_misspelt_keys_of_both_levels_come_in_one_message() -> None:
    lines = message(*BASE, "optim.lrr=1", "recipe.drop_txt=0.1", "nodess=2").splitlines()
    assert lines[0].startswith("optim.lrr: unknown key; did you mean 'lr'? allowed: betas, clip,")
    assert lines[1].startswith(
        "recipe.drop_txt: unknown key; did you mean 'drop_text'? allowed: attention, drop_image,"
    )
    assert lines[2].startswith("nodess: unknown key; did you mean 'nodes'? allowed: ") and "hydra" not in lines[2]


@pytest.mark.parametrize("group", ["recipe", "model", "data", "optim", "cluster"])
def test_an_unknown_choice_lists_the_known_ones(group: str) -> None:
    expected = f"{group}: 'nonesuch' is unknown; allowed: {', '.join(choices()[group])}"
    assert message(*BASE, f"{group}=nonesuch") == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), f"recipe: missing; choose one with recipe=<name>, known: {RECIPES}"),
        (("model=tiny",), f"recipe: missing; choose one with recipe=<name>, known: {RECIPES}"),
        ((*BASE, "--dry-run"), "'--dry-run' is no override; write key=value, as in optim.lr=1e-4"),
        ((*BASE, "batch"), "'batch' is no override; write key=value, as in optim.lr=1e-4"),
        ((*BASE, "optim.lr=1,2"), "optim.lr=1,2: one value is expected; a list is written optim.lr=[a,b]"),
        ((*BASE, "hydra.run.dir=x"), "hydra.run.dir=x: Hydra's own settings have no effect here"),
        ((*BASE, "recipe.name.x=1"), "recipe.name.x: unknown key; recipe.name is a value, not a group of keys"),
        (
            (*BASE, "model=null"),
            f"model: missing; choose one with model=<name>, known: {', '.join(choices()['model'])}",
        ),
        ((*BASE, "optim=null"), "optim: None is unknown; allowed: adamw"),
        (("recipe=null",), f"recipe: None is unknown; allowed: {RECIPES}"),
        (("experiment=null",), f"recipe: missing; choose one with recipe=<name>, known: {RECIPES}"),
        ((*BASE, "dry_run=???"), "dry_run: None is not allowed; expected true, false or full"),
        ((*BASE, "batch.size=???"), "batch.size: missing; expected a whole number"),
        ((*BASE, "data.shards=???"), "data.shards: missing; expected text or list of text or null"),
        ((*BASE, "dry_run=half"), "dry_run: 'half' is not allowed; expected true, false or full"),
        ((*BASE, "follow=2"), "follow: 2 is not allowed; expected true or false"),
        ((*BASE, "optim.lr=abc"), "optim.lr: 'abc' is not allowed; expected a number"),
        ((*BASE, "+optim.foo=1"), "optim.foo: unknown key; allowed: betas,"),
        ((*BASE, "~optim.lr"), "optim.lr: missing; expected a number"),
        ((*BASE, "optim.betas=[0.9"), "optim.betas: '[0.9' is not allowed; expected (a number, a number)"),
        ((*BASE, "data.shards=${nowhere}"), "Interpolation key 'nowhere' not found"),
    ],
)
def test_what_is_wrong_is_said(arguments: tuple[str, ...], expected: str) -> None:
    assert message(*arguments).startswith(expected)


def test_a_group_that_a_recipe_leaves_open_must_be_chosen(tmp_path: Path) -> None:
    shutil.copytree(CONFIGS, tmp_path / "configs")
    page = "# @package _global_\nrecipe: {name: bare}\nbatch: {size: 1, micro: 1}\n"
    (tmp_path / "configs" / "recipe" / "bare.yaml").write_text(page)
    lines = message("recipe=bare", "model=tiny", config_dir=tmp_path / "configs").splitlines()
    assert lines == [f"data: missing; choose one with data=<name>, known: {', '.join(choices()['data'])}"]
