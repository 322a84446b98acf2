"""Sums, ranges and settings without effect."""

import dataclasses
from typing import Any

import pytest

from launch.check import (
    batch_problems,
    length_problems,
    limit_seconds,
    machine_problems,
    nearest_divisors,
    nearest_multiples,
    value_problems,
)
from launch.compose import compose
from synthos.recipes.base import recipe_class, recipe_config
from synthos.schema import RunConfig

RIGHT = ("recipe=i2i", "model=tiny", "data=photos", "cluster=local", "cluster.device=cpu", "batch={size: 24, micro: 4}")


def config(*overrides: str) -> RunConfig:
    return compose([*RIGHT, *overrides]).config


def problems(*overrides: str) -> list[str]:
    composed = config(*overrides)
    return value_problems(composed, recipe_class("i2i"), recipe_config(composed.recipe))


def test_a_right_config_has_no_problems() -> None:
    assert problems() == [] and problems("gpus_per_node=3", "mesh=full", "ema.decay=0.99") == []


def test_batch_arithmetic_agrees_with_counting() -> None:
    """A config is legal exactly if some whole number of micro-batches on all ranks makes the global batch."""
    base = config()
    for size in range(1, 25):
        for micro in range(1, 9):
            for ranks in range(1, 5):
                batch = dataclasses.replace(base.batch, size=size, micro=micro)
                changed = dataclasses.replace(base, batch=batch, gpus_per_node=ranks)
                legal = any(micro * ranks * accumulation == size for accumulation in range(1, 25))
                assert (batch_problems(changed) == []) == legal
                if legal:
                    assert changed.accumulation * micro * ranks == size


def test_the_nearest_legal_values_are_named() -> None:
    assert problems("batch={size: 30, micro: 4}", "gpus_per_node=2") == [
        "batch.size: 30 is not a multiple of batch.micro x ranks = 4 x 2 = 8; "
        "nearest legal: batch.size 24 or 32, or batch.micro 3 or 5"
    ]
    assert problems("batch={size: 24, micro: 4}", "gpus_per_node=4") == [
        "batch.size: 24 is not a multiple of batch.micro x ranks = 4 x 4 = 16; "
        "nearest legal: batch.size 16 or 32, or batch.micro 3 or 6, or nodes x gpus_per_node 3 or 6"
    ]
    assert "batch.size 16;" not in problems("batch={size: 3, micro: 16}")[0]  # zero is no batch


def test_nearest_values_agree_with_a_plain_search() -> None:
    for number in range(1, 40):
        for value in range(1, 45):
            divisors = [d for d in range(1, number + 1) if number % d == 0 and d != value]
            expected = {max((d for d in divisors if d < value), default=None)}
            expected |= {min((d for d in divisors if d > value), default=None)}
            assert set(nearest_divisors(number, value)) == expected - {None}
    assert nearest_multiples(30, 8) == [24, 32] and nearest_multiples(3, 8) == [8]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=0", "optim.lr: 0.0 is not allowed; expected a number above 0"),
        ("optim.lr=nan", "optim.lr: nan is not allowed; expected a number above 0"),
        ("optim.lr=inf", "optim.lr: inf is not allowed; expected a number above 0"),
        ("+optim.lr_groups.projector=-1", "optim.lr_groups.projector: -1.0 is not allowed; expected a number above 0"),
        ("optim.betas=[0.9,1.0]", "optim.betas[1]: 1.0 is not allowed; expected a number at least 0 and below 1"),
        ("optim.warmup_steps=-1", "optim.warmup_steps: -1 is not allowed; expected a number 0 or more"),
        ("batch.micro=0", "batch.micro: 0 is not allowed; expected a number above 0"),
        ("nodes=0", "nodes: 0 is not allowed; expected a number above 0"),
        ("data.height=0", "data.height: 0 is not allowed; expected a number above 0"),
        ("data.workers=-1", "data.workers: -1 is not allowed; expected a number 0 or more"),
        ("ema.decay=1.0", "ema.decay: 1.0 is not allowed; expected a number between 0 and 1"),
        ("validate.every=0", "validate.every: 0 is not allowed; expected a number above 0"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last: 0 is not allowed; expected a number above 0"),
        ("recipe.drop_text=1.5", "recipe.drop_text: 1.5 is not allowed; expected a probability from 0 to 1"),
        ("recipe.drop_image=-0.1", "recipe.drop_image: -0.1 is not allowed; expected a probability from 0 to 1"),
        ("optim.steps=0", "optim.steps: 0 is not allowed; expected a number above 0"),
        ("cluster.gpu_memory_gb=0", "cluster.gpu_memory_gb: 0.0 is not allowed; expected a number above 0"),
        (
            "optim.epochs=2",
            "optim.steps, optim.epochs: both are set (2000 and 2.0); expected exactly one, the other null",
        ),
        ("optim.steps=null", "optim.steps, optim.epochs: neither is set; expected exactly one, the other null"),
        ("optim.decay_steps=5", "optim.decay_steps: 5 has no effect with optim.schedule=constant; expected null"),
        ("optim.warmup_steps=3000", "optim.warmup_steps: 3000 is more than the 2000 steps of the schedule"),
        ("data.height=100", "data.height: 100 is not a multiple of 16; nearest: 96 or 112"),
        ("data.width=8", "data.width: 8 is not a multiple of 16; nearest: 16"),
        ("data.lanes=7", "data.lanes: 7 does not divide batch.size 24; nearest: 6 or 8, or null"),
        ("mesh=hybrid", "mesh: hybrid needs nodes above 1; expected auto, replicate or full"),
        ("name=a/b", "name: 'a/b' is not allowed; expected letters, digits and . _ + = - (it becomes a file name),"),
        ("group=..", "group: '..' is not allowed; expected letters, digits and . _ + = - (it becomes a file name),"),
    ],
)
def test_each_wrong_value_is_the_only_problem(override: str, expected: str) -> None:
    found = problems(override)
    assert len(found) == 1 and found[0].startswith(expected)


def test_nothing_held_out_to_validate_on() -> None:
    assert problems("data.validation=null")[0].startswith("data.validation, data.holdout_fraction: nothing is held out")
    assert problems("data.validation=null", "validate.samples=0", "validate.from_split=0", "validate.every=null") == []
    assert problems("data.validation=null", "data.holdout_fraction=0.1") == []


def test_validation_settings_without_effect() -> None:
    nothing = ("validate.samples=0", "validate.from_split=0")
    assert problems(*nothing, "validate.every=null") == [] and problems("checkpoint.keep_best=1") == []
    (line,) = problems(*nothing)
    assert line.startswith("validate.every: 200 has no effect without validate.samples, validate.requests or")
    for something in ("validate.samples=1", "validate.from_split=1", "validate.requests=[{name: a}]"):
        kept = [override for override in nothing if override.split("=")[0] != something.split("=")[0]]
        assert problems(*kept, something) == []
    (line,) = problems("validate.samples=0", "checkpoint.keep_best=1")
    assert line.startswith("checkpoint.keep_best: 1 has no effect with validate.samples=0")


def test_epochs_are_checked_when_their_steps_are_known() -> None:
    def found(samples: int, steps: int, *overrides: str) -> list[str]:
        return [*length_problems(config("optim.steps=null", *overrides), samples, steps)]

    assert found(24, 1, "optim.epochs=1") == []
    assert found(12, 0, "optim.epochs=1.5") == [
        "optim.epochs: 1.5 epochs of 12 samples are less than one step of batch.size 24; "
        "expected more epochs, more samples or a smaller batch.size"
    ]
    assert found(48, 4, "optim.epochs=2", "optim.warmup_steps=4") == []
    assert found(48, 4, "optim.epochs=2", "optim.warmup_steps=5") == [
        "optim.warmup_steps: 5 is more than the 4 steps that optim.epochs 2 of 48 samples are"
    ]


def test_one_machine_is_one_node_and_debug_is_one_rank() -> None:
    assert [*machine_problems(config("nodes=2"))][0].startswith("nodes: 2 are more than cluster=local has")
    assert problems("cluster=debug", "gpus_per_node=2")[0].startswith("nodes x gpus_per_node: 2 ranks are not allowed")


def test_several_wrong_values_come_together() -> None:
    assert len(problems("optim.lr=0", "recipe.drop_text=2", "batch.micro=-1", "name=''")) == 4


def test_recipe_values_of_a_wrong_type_do_not_get_this_far() -> None:
    wrong: dict[str, Any] = {**config().recipe, "drop_text": "often"}
    with pytest.raises(ValueError, match=r"^recipe\.drop_text: 'often' is not allowed; expected a number$"):
        recipe_config(wrong)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cluster=slurm", "cluster.time='25'"], ""),
        (["cluster=slurm", "cluster.time=soon"], "cluster.time: 'soon' is not allowed; expected D-HH:MM:SS, HH:MM:SS"),
        (
            ["cluster=slurm", "cluster.time=00:05:00", "cluster.notice_seconds=300"],
            "cluster.notice_seconds: 300 is not below cluster.time 00:05:00",
        ),
        (["cluster=slurm", "cluster.time=00:05:00"], ""),
        (
            ["cluster=slurm", "+cluster.sbatch.partition=x"],
            "cluster.sbatch.partition: this flag is not allowed here; expected cluster.partition",
        ),
        (["cluster=slurm", "+cluster.sbatch.gres=nvme:1"], ""),
        (
            ["cluster=slurm", "cluster.gpu_flag=gres", "+cluster.sbatch.gres=nvme:1"],
            "cluster.sbatch.gres: this flag is not allowed here; expected gpus_per_node",
        ),
        (["cluster=slurm", "cluster.gpu_flag=null", "cluster.gpu_type=h200"], "cluster.gpu_type: h200 has no effect"),
        (
            ["cluster=slurm", "cluster.cpus_per_rank=0"],
            "cluster.cpus_per_rank: 0 is not allowed; expected a number above 0",
        ),
        (
            ["cluster=slurm", "cluster.cpus_per_rank=null"],
            "cluster.cpus_per_rank: null is not allowed without +cluster",
        ),
        (["cluster=slurm", "cluster.cpus_per_rank=null", "+cluster.sbatch.exclusive=true"], ""),
        (
            ["cluster=slurm", "cluster.environment=[WANDB_API_KEY]"],
            "cluster.environment: WANDB_API_KEY looks like a sec",
        ),
        (["cluster=slurm", "+cluster.sbatch.array=0-1"], "cluster.sbatch.array: this flag is not allowed, the job"),
        (
            ["cluster=slurm", "+cluster.sbatch.exclude=[a,b]"],
            "cluster.sbatch.exclude: ['a', 'b'] is not allowed; expec",
        ),
        (["+cluster.partition=gpu"], "cluster.partition: 'gpu' has no effect with cluster.backend=local"),
    ],
)
def test_the_cluster_group(overrides: list[str], said: str) -> None:
    found = problems(*overrides)
    assert found == [] if not said else found[0].startswith(said), found


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400), ("90:30", 5430), ("1:02:03", 3723), ("2-0", 172800), ("1-02:03", 93780), ("1-00:00:05", 86405),
        ("", None), ("1:2:3:4", None), ("-5", None), ("infinite", None),
    ],
)  # fmt: skip
def test_time_limits_are_read_as_slurm_does(time: str, seconds: int | None) -> None:
    """The forms of man sbatch, --time."""
    assert limit_seconds(time) == seconds
