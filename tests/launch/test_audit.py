"""`synthos data audit` and `quarantine`: clean where a run is, and each damage is named."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.audit import read_traces
from launch.cli import main
from launch.compose import compose
from synthos.data.index import load_index
from synthos.data.stream import Stream
from synthos.keys import sample_id
from synthos.recipes.i2i import I2I
from synthos.schema import RunConfig, StreamingConfig, read_job
from synthos.strict import write_config
from synthos.train.distributed import World
from synthos.train.report import PADDING, SUBSTITUTE, TRACE, Report
from tests.data.make import data_set
from tests.launch.conftest import Submit

Audit = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def audit(capsys: pytest.CaptureFixture[str]) -> Audit:
    """Run a verb on a run folder; its exit code and its JSON."""

    def run(folder: Path, *options: object, verb: str = "audit") -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = main(["data", verb, str(folder), *map(str, options), "--json"])
        said = capsys.readouterr()
        assert said.err == "" and said.out.count("\n") == 1
        return code, json.loads(said.out)

    return run


class Life:
    """The data side of a run, with its real streams and reports, on any number of ranks after another."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config, self.attempt = folder, config, 0
        (folder / "control").mkdir(parents=True)
        write_config(config, folder / "config.yaml")
        self.state: Any = None  # of the last checkpoint, and its step
        self.step = 0

    def attempt_of(
        self, ranks: int, stop: int, save: int, late: dict[int, int] | None = None, validation_due: bool = False
    ) -> None:
        """Go on from the checkpoint to step `stop`, saved at `save`; ranks in `late` end so many steps earlier."""
        self.attempt += 1
        (self.folder / "attempts" / f"{self.attempt:04d}").mkdir(parents=True)
        worlds = [World(rank, rank, ranks, torch.device("cpu"), torch.float32, None) for rank in range(ranks)]
        reports = [Report(self.folder, self.config, world, self.attempt) for world in worlds]
        streams = [self.stream(rank, ranks) for rank in range(ranks)]
        for stream, report in zip(streams, reports, strict=True):
            if self.state is not None:
                stream.load_state_dict(self.state)
            report.start(self.step, 100, validation_due)
        for step in range(self.step + 1, stop + 1):
            batches = [stream.next() for stream in streams]
            for rank, (report, batch) in enumerate(zip(reports, batches, strict=True)):
                if step <= stop - (late or {}).get(rank, 0):
                    report.trace(step, batch)
            if any(batch.faults for batch in batches):
                reports[0].quarantine(step, [batch.faults for batch in batches])
            reports[0]._log({"data/digest": streams[0].digest()}, step)
            if step == save:
                self.state, self.step = json.loads(json.dumps(streams[0].state_dict())), step
        for report in reports:
            report.close({"status": "failed", "cause": "error"})

    def stream(self, rank: int, ranks: int) -> Stream:
        config = self.config
        return Stream(config.data, I2I.inputs, batch_size=config.batch.size, rank=rank, world=ranks, seed=config.seed)


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run on 23 samples, eight at a time."""
    home = tmp_path_factory.mktemp("audit")
    data = data_set(home / "shards", 23, shard_size=5)
    return compose(
        [
            *("recipe=i2i", "model=tiny", "cluster=debug", "batch.size=8", "batch.micro=2", "wandb.mode=off"),
            *(f"data.shards={data}", "data.name=set", "data.holdout_fraction=0", "data.workers=0", "data.width=16"),
            *("data.height=16", "data.window=2", f"runs_dir={home}", f"cache_dir={home / 'cache'}"),
        ]
    ).config


@pytest.fixture
def make_life(tmp_path: Path, composed: RunConfig) -> Callable[..., Life]:
    """One of its own, with shards of its own."""

    def make(**changes: Any) -> Life:
        shards = shutil.copytree(str(composed.data.shards), tmp_path / "shards")
        return Life(tmp_path / "run", replace(composed, data=replace(composed.data, shards=str(shards), **changes)))

    return make


@pytest.fixture(scope="module")
def four_steps(composed: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is to be copied before anything is done to it."""
    life = Life(tmp_path_factory.mktemp("life") / "run", composed)
    life.attempt_of(1, stop=4, save=4)
    return life.folder


def rewrite(folder: Path, rank: int, change: Callable[[Any], Any]) -> None:
    """Change the rows that a rank traced."""
    path = folder / "data" / f"trace-rank-{rank:05d}.bin"
    path.write_bytes(change(np.fromfile(path, TRACE)).tobytes())


def counts(said: dict[str, Any]) -> tuple[int, int, int]:
    return said["lost"], said["repeated"], said["unplanned"]


@pytest.fixture
def run_folder(submit: Submit, tmp_path: Path) -> Path:
    assert submit() == 0
    (config,) = (tmp_path / "runs").glob("*/*/config.yaml")
    return config.parent


def test_a_run_is_audited_by_its_name(run_folder: Path, audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTHOS_RUNS", str(run_folder.parents[1]))
    assert audit(Path(run_folder.name)) == audit(run_folder)


def test_a_real_run(run_folder: Path, audit: Audit, capsys: pytest.CaptureFixture[str], shards: Path) -> None:
    code, said = audit(run_folder)
    assert code == 0 and said["clean"] and counts(said) == (0, 0, 0)
    assert (said["steps"], said["samples"], said["beyond"]) == (3, 12, 0)
    assert [(c["epoch"], c["consumed"]) for c in said["coverage"]] == [(0, 12)]
    assert main(["data", "audit", str(run_folder)]) == 0
    shown = capsys.readouterr()
    assert "0 lost, 0 repeated, 0 unplanned" in shown.out and "partial" in shown.out and "auditing" in shown.err

    whole = {path: path.read_bytes() for path in (run_folder / "data").iterdir()}
    rewrite(run_folder, 0, lambda rows: np.delete(rows, 5))  # a row of step 2
    code, said = audit(run_folder)
    assert code == 1 and counts(said) == (1, 0, 0)
    (wrong,) = said["wrong"]
    assert (wrong["kind"], wrong["step"], wrong["rows_by_rank"]) == ("lost", 2, {"0": 3})
    assert sample_id("webdataset", wrong["shard"], wrong["key"]) == wrong["id"]
    assert main(["data", "audit", str(run_folder)]) == 1
    shown = capsys.readouterr().out
    assert "lost" in shown and wrong["key"] in shown and wrong["shard"] in shown
    for path, content in whole.items():
        path.write_bytes(content)
    rewrite(run_folder, 0, lambda rows: rows[:-1])  # of the last step, which the verdict says is done
    assert counts(audit(run_folder)[1]) == (1, 0, 0)


def swap_ids(rows: Any) -> Any:
    """Two samples of different steps change places."""
    rows["id"][[1, 17]] = rows["id"][[17, 1]]
    return rows


def changed(field: str, value: int) -> Callable[[Any], Any]:
    def change(rows: Any) -> Any:
        rows[field][10] = value
        return rows

    return change


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda rows: np.delete(rows, 4), (1, 0, 0)),
        (lambda rows: np.insert(rows, 4, rows[4]), (0, 1, 0)),
        (lambda rows: rows[rows["step"] != 2], (8, 0, 0)),
        (changed("id", 12345), (1, 0, 1)),
        (changed("epoch", 1), (1, 0, 1)),
        (changed("kind", SUBSTITUTE), (1, 1, 0)),
        (changed("kind", PADDING), (1, 1, 0)),
        (swap_ids, (2, 0, 2)),
    ],
)
def test_damage(four_steps: Path, tmp_path: Path, audit: Audit, damage: Any, expected: tuple[int, int, int]) -> None:
    folder = shutil.copytree(four_steps, tmp_path / "run")
    assert audit(folder)[0] == 0
    rewrite(folder, 0, damage)
    code, said = audit(folder)
    assert code == 1 and counts(said) == expected and not said["clean"]
    assert all(sample_id("set", w["shard"], w["key"]) == w["id"] for w in said["wrong"] if w["id"] != 12345)
    assert all(not w["key"] for w in said["wrong"] if w["id"] == 12345)


def test_two_then_four_ranks_then_one(make_life: Callable[..., Life], audit: Audit) -> None:
    """Each attempt but the last is killed beyond its checkpoint, with ranks at different steps."""
    life = make_life()
    life.attempt_of(2, stop=3, save=2, late={1: 1})
    code, said = audit(life.folder)
    assert code == 0 and (said["steps"], said["beyond"]) == (2, 4)
    life.attempt_of(4, stop=6, save=4, late={3: 2, 2: 1})
    code, said = audit(life.folder)
    assert code == 0 and said["steps"] == 4
    life.attempt_of(1, stop=7, save=7)
    code, said = audit(life.folder)
    assert code == 0 and (said["steps"], said["samples"], said["beyond"]) == (7, 56, 0)
    assert [(c["epoch"], c["consumed"], c["samples"]) for c in said["coverage"]] == [
        (0, 23, 23),
        (1, 23, 23),
        (2, 10, 23),
    ]
    ranks, rows = read_traces(life.folder)
    assert [sorted(set(ranks[rows["step"] == step].tolist())) for step in (2, 3, 7)] == [[0, 1], [0, 1, 2, 3], [0]]

    rewrite(life.folder, 2, lambda rows: rows[rows["step"] != 4])
    code, said = audit(life.folder)
    assert code == 1 and counts(said) == (2, 0, 0)
    assert all(w["step"] == 4 and w["rows_by_rank"] == {"0": 2, "1": 2, "3": 2} for w in said["wrong"])
    assert said["coverage"][1]["consumed"] + said["coverage"][0]["consumed"] == 44


def test_a_row_that_a_kill_has_cut(make_life: Callable[..., Life], audit: Audit) -> None:
    life = make_life()
    life.attempt_of(1, stop=3, save=2)
    path = life.folder / "data" / "trace-rank-00000.bin"
    path.write_bytes(path.read_bytes()[:-5])
    code, said = audit(life.folder)
    assert code == 0 and (said["steps"], said["beyond"]) == (2, 7)


def test_a_kill_before_a_bad_sample_was_written_down(spoilt: Life, audit: Audit) -> None:
    quarantine, metrics = (spoilt.folder / name for name in ("data/quarantine.jsonl", "metrics.jsonl"))
    lines = quarantine.read_text().splitlines()
    last = json.loads(lines[-1])["step"]
    quarantine.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] < last))
    logged = metrics.read_text().splitlines()
    metrics.write_text("".join(f"{line}\n" for line in logged if json.loads(line)["step"] < last))
    code, said = audit(spoilt.folder)
    assert code == 0 and said["steps"] == last - 1 and said["beyond"] == 8 * (7 - last)


def test_padding(make_life: Callable[..., Life], audit: Audit) -> None:
    life = make_life(tail="pad")
    life.attempt_of(2, stop=6, save=6)
    code, said = audit(life.folder)
    assert code == 0 and (said["samples"], said["padding"]) == (46, 2)
    assert [c["consumed"] for c in said["coverage"]] == [23, 23]
    path = life.folder / "data" / "trace-rank-00001.bin"
    rows = np.fromfile(path, TRACE)
    (padding,) = np.flatnonzero((rows["kind"] == PADDING) & (rows["step"] == 3))
    rewrite(life.folder, 1, lambda rows: np.delete(rows, padding))
    assert counts(audit(life.folder)[1]) == (1, 0, 0)


def spoil(life: Life) -> None:
    """Damage two samples."""
    shards = Path(str(life.config.data.shards))
    for name, row, extension in (("00001.tar", 2, "png"), ("00003.tar", 0, "txt")):
        index = load_index(shards / name.replace(".tar", ".idx.npz"))
        member = index.member(row, index.extensions.index(extension))
        with (shards / name).open("r+b") as file:
            file.seek(member.offset + member.size - 4)
            file.write(b"\xff\xff\xff")


@pytest.fixture
def spoilt(make_life: Callable[..., Life]) -> Life:
    """A run that met two bad samples, in two epochs each."""
    life = make_life(max_bad_fraction=0.5)
    spoil(life)
    life.attempt_of(2, stop=6, save=6)
    return life


def test_a_bad_sample_met_again_after_a_kill_is_written_down_once(make_life: Callable[..., Life], audit: Audit) -> None:
    """Validation, which is made up at the restored step, takes no line of that step away."""
    life = make_life(max_bad_fraction=0.5)
    spoil(life)
    path = life.folder / "data" / "quarantine.jsonl"
    life.attempt_of(2, stop=5, save=2)
    before = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["step"] <= 2 for line in before} == {True, False}  # some come again
    with path.open("a") as file:
        file.write(json.dumps({**before[0], "step": 2, "error": 'of "val/a"', "source": "val/a"}) + "\n")
        file.write('{"step": 5, "rank"')  # a kill has cut it
    life.attempt_of(2, stop=6, save=6, validation_due=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (other,) = [line for line in lines if line["source"] == "val/a"]
    lines.remove(other)
    assert lines[: len(before)] == before and len(lines) == 4
    assert len({(line["step"], line["shard"], line["key"]) for line in lines}) == 4
    assert audit(life.folder)[1]["substituted"] == 4


def test_bad_samples_are_accounted_for(spoilt: Life, audit: Audit) -> None:
    code, said = audit(spoilt.folder)
    assert code == 0 and said["substituted"] == 4 and said["samples"] == 48
    path = spoilt.folder / "data" / "quarantine.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 4
    path.write_text("\n".join(lines[1:]) + "\n")
    code, said = audit(spoilt.folder)
    first = json.loads(lines[0])
    assert code == 1 and counts(said)[0] == 1 and sum(counts(said)) == 2
    (lost,) = [w for w in said["wrong"] if w["kind"] == "lost"]
    assert (lost["shard"], lost["key"], lost["step"]) == (first["shard"], first["key"], first["step"])


def test_a_wrong_substitute(spoilt: Life, audit: Audit) -> None:
    """Only samples that the reader would have tried may stand for a bad one."""

    def change(rows: Any) -> Any:
        rows["id"][rows["kind"] == SUBSTITUTE] = 99
        return rows

    for rank in range(2):
        rewrite(spoilt.folder, rank, change)
    assert counts(audit(spoilt.folder)[1]) == (4, 0, 4)


def test_quarantine(spoilt: Life, audit: Audit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = audit(spoilt.folder, verb="quarantine")
    assert code == 0 and said["bad"] == 2 and said["still_bad"] is None
    assert [(b["shard"], b["member"], b["times"]) for b in said["samples"]] == [
        ("00001.tar", "png", 2),
        ("00003.tar", "txt", 2),
    ]
    out = tmp_path / "bad.jsonl"
    code, said = audit(spoilt.folder, "--recheck", "--out", out, verb="quarantine")
    assert said["still_bad"] == 2
    known = replace(spoilt.config.data, known_bad=str(out), max_bad_fraction=0.0)
    stream = Stream(known, I2I.inputs, batch_size=7, rank=0, world=1, seed=0)
    assert len(stream) == 21 and not any(stream.next().faults for _ in range(3))

    data_set(tmp_path / "whole", 23, shard_size=5)
    shutil.copy(tmp_path / "whole" / "00001.tar", str(spoilt.config.data.shards))
    assert main(["data", "quarantine", str(spoilt.folder), "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    again = tmp_path / "again.jsonl"
    code, said = audit(spoilt.folder, "--recheck", "--out", again, verb="quarantine")
    assert said["still_bad"] == 1 and [b["now"] for b in said["samples"]] == ["", "has changed since it was indexed"]
    assert [json.loads(line)["shard"] for line in again.read_text().splitlines()] == ["00003.tar"]
    assert main(["data", "quarantine", str(spoilt.folder), "--recheck"]) == 0
    shown = capsys.readouterr()
    assert "1 are still bad" in shown.out and "good" in shown.out and "00003.tar" in shown.out
    shutil.rmtree(str(spoilt.config.data.shards))
    assert audit(spoilt.folder, "--recheck", verb="quarantine")[1]["still_bad"] == 2


def test_another_seed_than_it_was_trained_with(make_life: Callable[..., Life], audit: Audit) -> None:
    life = make_life()
    life.attempt_of(1, stop=3, save=3)
    config = read_job(life.folder / "config.yaml")
    assert isinstance(config, RunConfig)
    write_config(replace(config, seed=7), life.folder / "config.yaml")
    code, said = audit(life.folder)
    assert code == 1 and said["other_order"] == [1, 2, 3] and said["lost"] > 0


def test_a_run_without_an_index_has_nothing_to_be_held_against(
    make_life: Callable[..., Life], capsys: pytest.CaptureFixture[str]
) -> None:
    life = make_life(streaming=StreamingConfig(23), window=16)
    assert main(["data", "audit", str(life.folder)]) == 2
    assert capsys.readouterr().err.endswith("run: a run with data.streaming has no plan to hold its traces against\n")


def test_nothing_traced_yet(make_life: Callable[..., Life], audit: Audit) -> None:
    life = make_life()
    code, said = audit(life.folder)
    assert code == 0 and said["steps"] == said["samples"] == 0 and said["coverage"] == []
    assert audit(life.folder, verb="quarantine")[1]["bad"] == 0


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("audit", "quarantine"):
        assert main(["data", verb, str(tmp_path)]) == 2
        assert "is no run folder" in capsys.readouterr().err
