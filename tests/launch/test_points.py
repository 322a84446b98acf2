"""Hydra's sweep syntax as points; each is compared with the config that its own command line composes."""

from pathlib import Path

import pytest

from launch.compose import compose
from launch.points import Point, compose_points

BASE = ("recipe=i2i", "model=tiny", "data=photos", "cluster=local")


def line(*arguments: str) -> list[str]:
    """A whole command line: `BASE` as far as it is not said otherwise."""
    said = {argument.split("=")[0] for argument in arguments}
    return [*(argument for argument in BASE if argument.split("=")[0] not in said), *arguments]


def points(*arguments: str) -> list[Point]:
    return compose_points(line(*arguments))


def message(*arguments: str) -> str:
    with pytest.raises(ValueError) as caught:
        points(*arguments)
    return str(caught.value)


def test_what_sweeps_nothing_is_one_point() -> None:
    (only,) = points("seed=3")
    assert only.values == {} and only.composed == compose([*BASE, "seed=3"])


@pytest.mark.parametrize(
    ("swept", "own"),
    [
        (["optim.lr=1e-4,3e-4", "seed=7,3"],
         ["optim.lr=1e-4 seed=7", "optim.lr=1e-4 seed=3", "optim.lr=3e-4 seed=7", "optim.lr=3e-4 seed=3"]),
        (["seed=range(0,6,3)", "optim.schedule=choice(constant,cosine)", "optim.lr=2e-4"],
         ["seed=0 optim.schedule=constant optim.lr=2e-4", "seed=0 optim.schedule=cosine optim.lr=2e-4",
          "seed=3 optim.schedule=constant optim.lr=2e-4", "seed=3 optim.schedule=cosine optim.lr=2e-4"]),
        (["data=glob(p*)", "batch.size=8,16", "batch.micro=4"],
         ["data=photos batch.size=8 batch.micro=4", "data=photos batch.size=16 batch.micro=4"]),
        (["recipe=i2i,decomposer", "optim.steps=10,20"],
         ["recipe=i2i optim.steps=10", "recipe=i2i optim.steps=20",
          "recipe=decomposer optim.steps=10", "recipe=decomposer optim.steps=20"]),
        (["+optim.lr_groups.image=1e-5,2e-5"], ["+optim.lr_groups.image=1e-5", "+optim.lr_groups.image=2e-5"]),
        (["optim.betas=[0.9,0.95],[0.9,0.99]"], ["optim.betas=[0.9,0.95]", "optim.betas=[0.9,0.99]"]),
        (["wandb={tags:[a]},{project:b}"], ["wandb={tags:[a]}", "wandb={project:b}"]),  # merged into what is there
        (["wandb.project=a,b", "wandb={project:c}"], ["wandb={project:c}"] * 2),  # the last word
        (["wandb={project:c}", "wandb.project=a,b"], ["wandb.project=a", "wandb.project=b"]),
        (["runs_dir=out,/runs", "seed=1,2"],  # other paths hang on it
         ["runs_dir=out seed=1", "runs_dir=out seed=2", "runs_dir=/runs seed=1", "runs_dir=/runs seed=2"]),
        (["optim.steps=5", "optim.steps=10,20"], ["optim.steps=10", "optim.steps=20"]),
    ],
)  # fmt: skip
def test_points_are_what_their_own_command_lines_compose_the_last_key_fastest(
    swept: list[str], own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = points(*swept)
    expected = [compose(line(*words.split(), f"group={made[0].composed.config.group}")) for words in own]
    assert [point.composed for point in made] == expected


@pytest.mark.parametrize("name", ["17", "17_3", "12345678", "1e234567", "first"])
def test_a_run_to_wait_for_is_named_by_text_whatever_it_looks_like(name: str) -> None:
    assert points(f"after={name}")[0].composed.after == name
    assert points("after=null")[0].composed.after is None


def test_the_group_is_named_by_what_is_swept_and_not_by_its_values() -> None:
    """So more values, in whatever order, are more points of the same sweep."""
    groups = {
        point.composed.config.group
        for swept in (("seed=0,1", "optim.lr=1e-4,3e-4"), ("optim.lr=1e-5,1e-4", "seed=range(5)"))
        for point in points(*swept)
    }
    assert groups == {"i2i-optim.lr+seed"}
    assert points("seed=choice(4)")[0].composed.config.group == "i2i-seed"
    assert points("seed=0,1", "name=mine")[0].composed.config.group == "mine-seed"
    assert points("seed=0,1", "group=mine")[1].composed.config.group == "mine"
    assert {point.composed.config.group for point in points("recipe=i2i,decomposer")} == {"recipe"}


def test_every_problem_is_said_once_with_the_points_that_have_it() -> None:
    assert message("optim.lr=1e-4,x", "batch.size=4,y", "seed=z").splitlines() == [
        "seed: 'z' is not allowed; expected a whole number",
        "optim.lr=0.0001 batch.size=y, optim.lr=x batch.size=y: batch.size: 'y' is not allowed; expected "
        "a whole number",
        "optim.lr=x batch.size=4, optim.lr=x batch.size=y: optim.lr: 'x' is not allowed; expected a number",
    ]
    assert message("optim.lrr=1,2").startswith("optim.lrr: unknown key; did you mean 'lr'?")
    assert message("model=tiny,tinny").startswith("model=tinny: model: 'tinny' is unknown")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("dry_run=true,false",), "dry_run: one value is expected, the same for all points"),
        (("seed=1,2", "seed=3"), "seed: is swept, and given again; expected all its values in one"),
        (("seed=interval(0,1)",), "seed=interval(0,1): has no list of values; expected choice(...) or range(...)"),
        (("experiment=glob(nonesuch*)",), "experiment=glob(nonesuch*): stands for no value"),
        (("array_parallelism=0",), "array_parallelism: 0 is not allowed; expected null, or 1 or more"),
    ],
)
def test_what_can_be_no_sweep_is_said(arguments: tuple[str, ...], expected: str) -> None:
    assert message(*arguments).startswith(expected)
