"""The page that a dry run prints."""

import dataclasses
from pathlib import Path
from typing import Any

from launch.compose import compose
from launch.plan import Plan, describe_state
from launch.rundir import RunState
from launch.survey import Survey
from synthos.data.check import DataFacts


def plan(*overrides: str, **changes: Any) -> Plan:
    base = ("recipe=i2i", "model=tiny", "data=photos", "runs_dir=/runs", "batch={size: 24, micro: 2}")
    made = Plan(
        config=compose([*base, *overrides]).config,
        folder=Path("/runs/i2i/i2i-1a2b3c4d"),
        state=None,
        survey=Survey(DataFacts(1200, 80, 7, "f", []), [], []),
        sizes=None,
        last_step=100,
    )
    return dataclasses.replace(made, **changes)


def lines(made: Plan) -> dict[str, str]:
    return {key: text.strip() for key, text in (line.split(":", 1) for line in made.render().splitlines())}


def test_it_shows_the_arithmetic() -> None:
    shown = lines(plan("gpus_per_node=3"))
    assert shown["world size"] == "3 ranks = nodes 1 x gpus_per_node 3"
    assert shown["batch"] == "size 24 = micro 2 x accumulation 4 x ranks 3"
    assert shown["length"] == "100 steps = 2,400 samples = 2 epochs"
    assert shown["parameters"] == "dry_run=full counts them"
    assert shown["data"] == "1,200 samples to train on and 80 held out, in 7 shards"
    assert shown["run folder"] == "/runs/i2i/i2i-1a2b3c4d" and shown["holds"] == "nothing yet"


def test_a_mixture_is_called_by_its_sources_and_one_is_no_plural() -> None:
    mix = "data.mix={coco: {shards: /a}, art: {shards: /b}}"
    survey = Survey(DataFacts(1, 1, 1, "f", []), [], [])
    shown = lines(plan("data=webdataset", mix, survey=survey))
    assert shown["recipe"] == "i2i, model tiny, data a mixture of coco, art"
    assert shown["data"] == "1 sample to train on and 1 held out, in 1 shard"


def test_what_only_an_index_tells_is_unknown() -> None:
    survey = Survey(DataFacts(), ["data.shards: no such shard: a.tar", "model.parts.vae: b"], ["data: will be written"])
    made = plan("optim={steps: null, epochs: 2}", folder=None, survey=survey, last_step=None)
    shown = lines(made)
    assert shown["run folder"] == "/runs/i2i/i2i-unindexed, unknown until indexed"
    assert shown["data"] == "unknown until indexed" and shown["length"] == "2 epochs, steps unknown until indexed"
    assert made.render().splitlines()[-3:] == [
        "note: data: will be written",
        "missing: data.shards: no such shard: a.tar",
        "missing: model.parts.vae: b",
    ]


def test_it_shows_what_the_folder_holds() -> None:
    stopped = RunState(True, 2, 40, {"status": "stopped"}, None)
    done = RunState(True, 1, 100, {"status": "done"}, Path("/runs/x/weights/step_00000100"))
    assert lines(plan(state=stopped))["holds"] == "2 attempts, checkpoint of step 40, stopped"
    assert describe_state(done) == "1 attempt, checkpoint of step 100, done, weights step_00000100"
    assert describe_state(RunState(True, 1, None, {}, None)) == "1 attempt, no checkpoint, no verdict"


def test_it_says_what_a_run_starts_from() -> None:
    assert "init_from" not in lines(plan())
    assert lines(plan("init_from=alibaba-pai/Wan2.1-Fun-1.3B-InP"))["init_from"] == "alibaba-pai/Wan2.1-Fun-1.3B-InP"
