"""`synthos data plan` against what the stream then does."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.compose import compose
from synthos.data.forecast import forecast
from synthos.data.index import load_index
from synthos.data.source import open_split
from synthos.data.stream import Stream, build_planner
from synthos.data.write import Row, write_shards
from synthos.recipes.i2i import I2I
from tests.data.faults import serving
from tests.data.make import data_set, encoded, noise

SIZES = [(64, 64)] * 9 + [(64, 128)] * 7 + [(128, 64)] * 2 + [(32, 32)] * 3  # height, width


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Pictures of four shapes, five in a shard."""
    rows = [Row(encoded(noise(*size, seed=i), "JPEG"), f"caption {i}") for i, size in enumerate(SIZES)]
    write_shards(tmp_path / "shards", rows, 5)
    return tmp_path / "shards"


@pytest.fixture
def overrides(shards: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def make(*more: str) -> list[str]:
        base = {"recipe": "i2i", "model": "tiny", "cluster": "slurm", "batch.size": "4", "batch.micro": "1",
                "data.shards": str(shards), "data.name": "set", "data.holdout_fraction": "0", "data.height": "64",
                "data.width": "64", "data.workers": "0", "data.cache": "null", "optim.steps": "10",
                "validate.samples": "0", "validate.from_split": "0", "validate.every": "null",
                "cache_dir": str(tmp_path / "cache")}  # fmt: skip
        changed = dict(override.split("=", 1) for override in more)
        return [f"{key}={value}" for key, value in {**base, **changed}.items()]

    return make


@pytest.fixture
def plan(overrides: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def run(*more: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["data", "plan", *overrides(*more), "--json"]) == 0
        said = capsys.readouterr()
        assert said.err == "" and said.out.count("\n") == 1
        found: dict[str, Any] = json.loads(said.out)
        return found

    return run


def test_one_source(plan: Callable[..., dict[str, Any]], shards: Path) -> None:
    said = plan("nodes=2")
    assert (said["samples"], said["batches"], said["ranks"], said["per_rank"]) == (21, 5.25, 2, 10.5)
    assert (said["lanes"], said["node"]["lanes"], said["tail"], said["left_over"]) == (4, 2, "carry", 1)
    assert (said["steps"], said["epochs"]) == (10, 40 / 21)
    (source,) = said["sources"]
    assert (source["samples"], source["shards"], source["share"], source["epochs"]) == (21, 5, 1, 1)
    assert source["bytes"] == sum(path.stat().st_size for path in shards.glob("*.tar"))
    read = 0
    for path in shards.glob("*.npz"):
        index = load_index(path)
        columns = [index.extensions.index(name) for name in ("jpg", "txt")]
        read += int(index.members["size"][:, columns].sum())
    pictures = [item for item in I2I.inputs.values() if item.kind == "image"]
    assert said["node"]["bytes"] >= read // 2 and len(pictures) >= 1
    (bucket,) = said["buckets"]
    assert bucket["samples"] == 21 and bucket["enlarged"] == 3 / 21
    assert bucket["cropped"] == pytest.approx(9 * 0.5 / 21)  # of 9 pictures one half is cut off


def test_held_out_and_known_bad(plan: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    known = tmp_path / "known.jsonl"
    known.write_text(
        "".join(json.dumps({"source": "set", "shard": "00000.tar", "key": f"00000000{n}"}) + "\n" for n in (0, 3))
    )
    said = plan(f"data.known_bad={known}", "data.holdout_fraction=0.3")
    assert said["sources"][0]["known_bad"] == 2 and said["held_out"] == said["sources"][0]["held_out"] > 0
    assert said["samples"] + said["held_out"] == 19


@pytest.mark.parametrize("tail", ["carry", "drop", "pad"])
def test_batches_of_an_epoch_are_those_of_the_stream(
    plan: Callable[..., dict[str, Any]], overrides: Callable[..., list[str]], tail: str
) -> None:
    """Counted in the plan itself, with buckets."""
    more = (f"data.tail={tail}", "data.buckets={sizes: [[64, 64], [64, 128], [128, 64], [192, 64]]}")
    said = plan(*more)
    config = compose(overrides(*more)).config
    sources, _ = open_split(config.data, I2I.inputs)
    planner = build_planner(config.data, sources, 4, config.seed)
    in_epoch: Counter[int] = Counter()
    batches = 0
    while planner.drawn < 21 or (tail == "pad" and any(queue.shape[1] for queue in planner.queues)):
        planned = planner.next()
        if planned.epochs.max() > 0:
            break
        batches += 1
        in_epoch[planned.bucket] += int(planned.real.sum())
    assert [b["samples"] for b in said["buckets"]] == [12, 7, 2, 0]
    assert [b["epochs_per_batch"] for b in said["buckets"]] == [4 / 12, 4 / 7, 2, None]
    assert said["left_over"] == 0 + 3 + 2
    if tail == "pad":
        assert said["batches"] == batches == 6 and in_epoch == {0: 12, 1: 7, 2: 2}
    if tail == "drop":
        assert said["batches"] == 4 and 21 - said["left_over"] == 16
    if tail == "carry":
        assert said["batches"] == 5.25
    starving, empty = said["notes"][:2]
    assert "bucket 128 x 64 starves" in starving and "after 2 epochs" in starving
    assert empty == "no picture is nearest to 192 x 64"


def test_mixture(
    plan: Callable[..., dict[str, Any]], overrides: Callable[..., list[str]], tmp_path: Path, shards: Path
) -> None:
    other = data_set(tmp_path / "other", 7, shard_size=3)
    mix = f"data.mix={{photos: {{shards: {shards}, weight: 3}}, art: {{shards: {other}, weight: {{0: 1, 5: 9}}}}}}"
    said = plan("data.shards=null", mix)
    photos, art = said["sources"]
    assert photos["weights"] == {"0": 0.75, "5": 0.25} and art["weights"] == {"0": 0.25, "5": 0.75}
    config = compose(overrides("data.shards=null", mix)).config
    stream = Stream(config.data, I2I.inputs, batch_size=4, rank=0, world=1, seed=config.seed)
    drawn = [source for _ in range(7) for source in stream.planner.next().sources.tolist()]  # 28 samples: an epoch
    assert said["samples"] == 28
    assert [photos["share"], art["share"]] == [drawn.count(0) / 28, drawn.count(1) / 28]
    assert [photos["epochs"], art["epochs"]] == [drawn.count(0) / 21, drawn.count(1) / 7]


def test_remote_shards(
    plan: Callable[..., dict[str, Any]], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a node is said to fetch at most is not exceeded by a stream that reads an epoch."""
    with serving({f"/data/{path.name}": path.read_bytes() for path in shards.iterdir()}) as server:
        url = server.url("/data/")
        ranges = plan(f"data.shards={url}")
        assert ranges["node"]["requests"] == 21 and ranges["node"]["cache_bytes"] == 0
        whole = plan(
            f"data.shards={url}", "data.read=shards", f"data.cache={tmp_path / 'kept'}", "data.cache_gb=0.0001"
        )
    sizes = [path.stat().st_size for path in shards.glob("*.tar")]
    assert whole["node"]["bytes"] == sum(sizes) and whole["node"]["shards"] == 5
    assert whole["node"]["cache_bytes"] == sum(sizes)  # four lanes of two shards each, of five
    assert any("data.cache_gb" in note for note in whole["notes"])


def test_indexes_that_are_missing_are_built(plan: Callable[..., dict[str, Any]], shards: Path) -> None:
    whole = {path.name: path.read_bytes() for path in shards.glob("*.npz")}
    for name in ("00000.idx.npz", "00003.idx.npz"):
        (shards / name).unlink()
    assert plan()["samples"] == 21
    assert {path.name: len(path.read_bytes()) for path in shards.glob("*.npz")} == {n: len(c) for n, c in whole.items()}


def test_on_the_screen(overrides: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "plan", *overrides("nodes=2", "data.tail=drop")]) == 0
    said = capsys.readouterr().out
    assert "An epoch" in said and "64 x 64" in said and "10 steps = 1.9 epochs" in said
    assert "note: data.tail=drop leaves 1 of 21 samples out of each epoch" in said


def test_help_and_what_is_asked_wrongly(
    overrides: Callable[..., list[str]], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "plan", "--help"]) == 0
    assert "usage: synthos data plan" in capsys.readouterr().out
    assert main(["data", "plan", *overrides(f"data.shards={tmp_path / 'none'}")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["data", "plan", *overrides("batch.size=7"), "nodes=2"]) == 2
    assert "batch" in capsys.readouterr().err
    streamed = overrides("data.streaming={samples_per_epoch: 21}")
    assert main(["data", "plan", *streamed]) == 2
    assert "data.streaming: what is read without an index can't be planned" in capsys.readouterr().err
    (shards / "00001.tar").write_bytes((shards / "00001.tar").read_bytes()[:3000])
    (shards / "00001.idx.npz").unlink()
    assert main(["data", "plan", *overrides(), "--json"]) == 2
    assert "00001.tar is cut" in capsys.readouterr().err


def test_a_built_in_data_set_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from synthos.data import photos

    monkeypatch.setattr(photos, "SPLITS", {name: (*split[:2], 2) for name, split in photos.SPLITS.items()})
    config = compose(
        ["recipe=i2i", "model=tiny", "data=photos", "batch.size=4", "batch.micro=1", f"cache_dir={tmp_path}"]
    )
    with pytest.raises(ValueError, match="no such folder"):
        forecast(config.config, I2I.inputs)
    assert (
        main(
            [
                "data",
                "plan",
                "recipe=i2i",
                "model=tiny",
                "data=photos",
                "batch={size: 4, micro: 1}",
                f"cache_dir={tmp_path}",
            ]
        )
        == 0
    )
    assert forecast(config.config, I2I.inputs).held_out > 0
