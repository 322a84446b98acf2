"""Generating from a small trained run: from Python, from the command line here, and as jobs on several ranks."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import synthos
from launch.cli import main
from launch.rundir import read_state
from synthos.generate import Generator
from synthos.models.autoencoder import decode_latents
from synthos.train.checkpoint import read_tensors
from synthos.train.pictures import to_image
from synthos.weights import find_source
from tests.support import ROOT, SMALL, environment
from tests.support import synthos as command

ASKED: list[dict[str, Any]] = [
    {"name": "text", "prompt": "a red barn"},
    {"name": "image", "reference": "mine.jpg"},
    {"name": "both", "reference": "mine.jpg", "prompt": "a blue, old barn", "seed": 3},
    {"name": "negative", "reference": "mine.jpg", "prompt": "a barn", "negative_prompt": "ugly"},
    {"name": "unipc", "prompt": "a red barn", "sampler": "unipc"},
    {"name": "wide", "reference": "mine.jpg", "height": 32, "width": 96},
    {"name": "plain", "prompt": "a", "guidance_text": 1.0, "guidance_image": 1.0},
]
STEPS = "steps=3"


class Trained:
    """A small run that trained everything on two ranks, and was asked for the same pictures as these tests ask for."""

    def __init__(self, home: Path) -> None:
        self.home = home
        noise = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((100, 80)).save(home / "mine.jpg", quality=95)
        self.asked = home / "asked.jsonl"
        self.asked.write_text("".join(json.dumps({"steps": 3, **row}) + "\n" for row in ASKED))
        folders = (f"runs_dir={home / 'runs'}", f"cache_dir={home / 'cache'}")
        # fmt: off
        done = command("submit", *SMALL, *folders, "optim.steps=3", "optim.lr=3e-3", "gpus_per_node=2",
                       "recipe.guidance_text=2", "recipe.guidance_image=2", f"validate.requests={self.asked}")
        # fmt: on
        assert done.returncode == 0, done.stderr
        (config,) = (home / "runs").glob("*/*/config.yaml")
        self.run = config.parent
        self.weights = self.run / "weights" / "step_00000003"
        self.checkpoint = self.run / "checkpoints" / "step_00000003"

    def validated(self, name: str) -> np.ndarray[Any, Any]:
        return pixels(self.run / "samples" / "step_00000003" / f"{name}.png")


def pixels(file: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def generator(trained: Trained) -> Generator:
    return synthos.load(trained.weights)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the ranks compute: the order of float sums is part of "bit for bit"."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_here_makes_the_pictures_that_validation_made(trained: Trained, tmp_path: Path) -> None:
    assert (
        main(["generate", f"weights={trained.weights}", f"requests={trained.asked}", f"out={tmp_path / 'a' / 'b'}"])
        == 0
    )
    made = {file.stem: pixels(file) for file in (tmp_path / "a" / "b").glob("*.png")}
    assert set(made) == {row["name"] for row in ASKED} | {"grid"}
    for name in set(made) - {"grid"}:
        assert np.array_equal(made[name], trained.validated(name)), name
    shapes = [made[row["name"]].shape for row in ASKED]
    assert shapes == [(row.get("height", 64), row.get("width", 64), 3) for row in ASKED]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_job_makes_the_same_on_any_number_of_ranks(trained: Trained, tmp_path: Path, ranks: int) -> None:
    arguments = (f"weights={trained.weights}", f"requests={trained.asked}", "cluster=local", "cluster.device=cpu")
    done = command("generate", *arguments, "cluster.threads=1", f"gpus_per_node={ranks}", f"runs_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    (config,) = tmp_path.glob("generate/*/config.yaml")
    folder = config.parent
    for row in ASKED:
        assert np.array_equal(pixels(folder / "samples" / f"{row['name']}.png"), trained.validated(row["name"]))
    names = {"attempts", "code", "config.yaml", "control", "grid.png", "provenance", "requests", "samples"}
    assert {path.name for path in folder.iterdir()} == names
    assert f"pictures: {folder / 'samples'}" in done.stdout
    assert not [path for path in folder.rglob("*") if ".part" in path.name]
    verdict = read_state(folder).verdict
    assert (verdict["status"], verdict["step"], verdict["message"]) == ("done", len(ASKED), "")
    beat = json.loads((folder / "control" / "heartbeat.json").read_text())
    assert (beat["step"], beat["last_step"], beat["unit"]) == (len(ASKED), len(ASKED), "picture")
    # done is done, also on other machines, and the folder needs no file of the user's any more
    before = {file: file.stat().st_mtime_ns for file in (folder / "samples").iterdir()}
    again = command("generate", *arguments, f"runs_dir={tmp_path}")
    assert again.returncode == 0 and f"{folder} is done" in again.stdout
    assert before == {file: file.stat().st_mtime_ns for file in (folder / "samples").iterdir()}


@pytest.mark.slow
@pytest.mark.long
def test_a_stopped_job_goes_on_with_other_ranks(trained: Trained, generator: Generator, tmp_path: Path) -> None:
    asked = tmp_path / "many.jsonl"
    asked.write_text("".join(json.dumps({"name": f"p{i}", "seed": i}) + "\n" for i in range(60)))
    words = ["generate", f"weights={trained.weights}", f"requests={asked}", "steps=30", "cluster=local", "grid=0",
             "cluster.device=cpu", "cluster.threads=1", f"runs_dir={tmp_path / 'runs'}"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *words, "gpus_per_node=2"], cwd=ROOT, env=environment()
    )
    try:
        while not (made := list((tmp_path / "runs").glob("generate/*/samples/[!.]*.png"))):
            assert process.poll() is None
            time.sleep(0.05)
        folder = made[0].parents[1]
        (folder / "control" / "stop").touch()
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
        process.wait()
    verdict, kept = read_state(folder).verdict, sorted((folder / "samples").iterdir())
    assert (verdict["status"], verdict["cause"], verdict["step"]) == ("stopped", "stop", len(kept)) and len(kept) < 60
    times = {file: file.stat().st_mtime_ns for file in kept}
    (folder / "samples" / ".p59.part.png").write_bytes(b"cut short")  # as a kill leaves it
    done = command(*words, "gpus_per_node=1")
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "samples").glob("[!.]*.png"))) == 60 and read_state(folder).done
    assert times == {file: file.stat().st_mtime_ns for file in kept}
    late = next(i for i in range(60) if folder / "samples" / f"p{i}.png" not in times)
    assert np.array_equal(
        pixels(folder / "samples" / f"p{late}.png"), np.asarray(generator.generate(seed=late, steps=30))
    )


def test_a_picture_is_the_same_in_any_company(trained: Trained, generator: Generator) -> None:
    asked = [{"steps": 3, **row, **mine(trained, row)} for row in ASKED]
    together = generator.generate_all(asked)
    for row, picture in zip(asked, together, strict=True):
        alone = generator.generate_all([row])[0]
        assert np.array_equal(picture, alone) and np.array_equal(picture, trained.validated(row["name"]))
    at_once = generator.generate_all(asked, micro=4)
    worst = max(np.abs(np.int16(a) - np.int16(b)).max() for a, b in zip(at_once, together, strict=True))
    assert worst <= 1  # levels: the rounding of another batch's float sums


def mine(trained: Trained, row: dict[str, Any]) -> dict[str, Any]:
    return {"reference": str(trained.home / "mine.jpg")} if "reference" in row else {}


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
@pytest.mark.parametrize("negative", ["", "ugly, deformed"])
def test_the_negative_prompt_stands_for_the_null_text(
    trained: Trained, generator: Generator, sampler: str, negative: str
) -> None:
    """Against guidance written out plainly, integrated by diffusers' scheduler called directly."""
    import diffusers

    options: dict[str, Any] = {"steps": 4, "guidance_text": 3.0, "guidance_image": 2.0, "seed": 5, "sampler": sampler}
    reference = trained.home / "mine.jpg"
    made = generator.generate("a red barn", reference, negative_prompt=negative, **options)
    recipe: Any = generator.recipe
    encoded = recipe.encode_requests([recipe.Request("x", "a red barn", str(reference))], (64, 64))
    text, image = encoded.conditions["text"], encoded.conditions["image"]
    null_text, null_image = recipe._encode_text([negative]), generator.null["image"]
    from synthos.keys import KeyedDraws, hash64, signed64

    draws = KeyedDraws(0, torch.tensor([signed64(hash64("request", 5))]), torch.tensor([0]))
    x = draws.normal("noise", (16, 1, 8, 8))
    levels = [5 * s / (1 + 4 * s) for s in (1.0, 0.75, 0.5, 0.25)]
    scheduler: Any = (
        diffusers.FlowMatchEulerDiscreteScheduler()
        if sampler == "euler"
        else diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    )
    scheduler.set_timesteps(sigmas=np.array(levels), device="cpu")

    def v(t: float, text: Tensor, image: Tensor) -> Tensor:
        with torch.no_grad():
            return recipe.network(x, torch.tensor([1000 * t]), text, image, return_dict=False)[0]  # type: ignore[no-any-return]

    for level, step in zip(levels, scheduler.timesteps, strict=True):
        nothing, seen, both = v(level, null_text, null_image), v(level, null_text, image), v(level, text, image)
        velocity = nothing + 2.0 * (seen - nothing) + 3.0 * (both - seen)
        x = scheduler.step(velocity, step, x, return_dict=False)[0]
    expected = to_image(decode_latents(recipe.frozen["vae"], x)[0])
    assert np.abs(np.int16(made) - np.int16(expected)).max() <= 1


def test_the_negative_prompt_and_the_sampler_change_the_picture(trained: Trained, generator: Generator) -> None:
    options: dict[str, Any] = {"steps": 4, "guidance_text": 3.0, "guidance_image": 1.0}
    plain = generator.generate("a red barn", **options)
    for change in ({"negative_prompt": "ugly"}, {"sampler": "unipc"}, {"seed": 1}, {"guidance_text": 2.0}):
        assert not np.array_equal(plain, generator.generate("a red barn", **{**options, **change})), change


def test_a_checkpoint_gives_what_the_export_gives(trained: Trained, generator: Generator) -> None:
    exported = dict(generator.recipe.network.named_parameters())
    for average in (None, True):
        other = synthos.load(trained.checkpoint, average=average)
        assert all(torch.equal(p, exported[name]) for name, p in other.recipe.network.named_parameters())
        assert all(torch.equal(value, generator.null[name]) for name, value in other.null.items())
    asked = {"steps": 3, **ASKED[2], **mine(trained, ASKED[2])}
    assert np.array_equal(*(g.generate_all([asked])[0] for g in (generator, other)))
    raw = dict(synthos.load(trained.checkpoint, average=False).recipe.network.named_parameters())
    stored = read_tensors(trained.checkpoint, "network.")
    assert stored.keys() == raw.keys() and all(torch.equal(raw[name], stored[name]) for name in raw)
    assert not any(torch.equal(raw[name], exported[name]) for name in raw if "proj" in name and "weight" in name)


def test_a_file_of_an_export_gives_what_the_export_gives(
    trained: Trained, generator: Generator, tmp_path: Path
) -> None:
    file = trained.weights / "transformer" / "diffusion_pytorch_model.safetensors"
    assert find_source(file).path == trained.weights
    for name in ("synthos.json", "null.safetensors"):
        shutil.copy(trained.weights / name, tmp_path)
    shutil.copy(file, tmp_path / "elsewhere.safetensors")
    other = synthos.load(tmp_path / "elsewhere.safetensors")
    exported = dict(generator.recipe.network.named_parameters())
    assert all(torch.equal(p, exported[name]) for name, p in other.recipe.network.named_parameters())


@pytest.mark.slow
def test_a_checkpoint_of_a_second_phase_has_what_the_first_one_trained(trained: Trained, tmp_path: Path) -> None:
    done = command("submit", *SMALL, f"runs_dir={tmp_path}", f"cache_dir={trained.home / 'cache'}", "optim.steps=2",
                   "recipe.train=projector", "ema.decay=null", f"init_from={trained.weights}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (checkpoint,) = tmp_path.glob("*/*/checkpoints/*")
    first, second = (dict(synthos.load(w).recipe.network.named_parameters()) for w in (trained.weights, checkpoint))
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert moved and all(name.startswith("condition_embedder.image_embedder.") for name in moved)
    (exported,) = tmp_path.glob("*/*/weights/*")
    assert all(torch.equal(p, second[name]) for name, p in synthos.load(exported).recipe.network.named_parameters())
    with pytest.raises(ValueError, match="average: true is not allowed.*raw weights only"):
        synthos.load(checkpoint, average=True)


def test_several_references_make_a_picture_each(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    references = [tmp_path / "one.jpg", tmp_path / "two b.png"]
    for file in references:
        Image.open(trained.home / "mine.jpg").rotate(90 * references.index(file)).save(file)
    given = [f"weights={trained.weights}", STEPS, "prompt=a, b", f"out={tmp_path / 'out'}"]
    assert main(["generate", *given, f"reference={references[0]},{references[1]}"]) == 0
    *pictures, grid = capsys.readouterr().out.splitlines()
    assert pictures == [f"{tmp_path / 'out' / n}.png  64 x 64" for n in ("one", "two_b")]
    with Image.open(tmp_path / "out" / "grid.png") as drawn:
        assert grid == f"{tmp_path / 'out' / 'grid.png'}  {drawn.width} x {drawn.height}"
    single = [
        f"weights={trained.weights}",
        STEPS,
        "prompt=a, b",
        f"reference={references[1]}",
        f"out={tmp_path / 'x.png'}",
    ]
    assert main(["generate", *single]) == 0
    assert np.array_equal(pixels(tmp_path / "x.png"), pixels(tmp_path / "out" / "two_b.png"))
    assert not np.array_equal(pixels(tmp_path / "out" / "one.png"), pixels(tmp_path / "x.png"))
    assert not (tmp_path / "grid.png").exists()


def test_a_dry_run_of_a_job_prints_the_plan_and_writes_nothing(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"weights={trained.checkpoint}", f"requests={trained.asked}", f"runs_dir={tmp_path}", "dry_run=true"]
    assert main(["generate", *given, "cluster=slurm", "nodes=2", "gpus_per_node=2", "average=false"]) == 0
    shown = capsys.readouterr().out
    assert f"weights:    {trained.checkpoint}, raw, of recipe i2i, model tiny" in shown
    assert f"run folder: {tmp_path / 'generate' / trained.run.name}-step_00000003-" in shown
    assert "requests:   7, 2 on a rank: 6 of 64 x 64 pixels, 1 of 32 x 96 pixels" in shown
    assert "batch script:" in shown and "--nodes=2" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_job_is_checked_like_a_new_one(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()  # without sbatch: the line for it is typed elsewhere
    (tmp_path / "bin" / "git").symlink_to(str(shutil.which("git")))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    given = [f"weights={trained.weights}", "prompt=a", f"runs_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}"]
    assert main(["generate", *given, "cluster=slurm", "cluster.backend=sbatch", "nodes=1"]) == 0
    (config,) = tmp_path.glob("generate/*/config.yaml")
    before = config.read_bytes()
    monkeypatch.setenv("SOME_PASSWORD", "planted-0451")
    capsys.readouterr()
    for override, message in {
        "cluster.time=soon": "error: cluster.time: 'soon' is not allowed",
        "cluster.account=planted-0451": "error: cluster.account: '***' holds a secret",
    }.items():
        assert main(["resume", str(config.parent), override]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.startswith(message), shown.err
    assert config.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out=x.png", "weights={h}"], "lacks synthos.json; expected a folder like"),
        (["out=x.png", "weights={h}/absent"], "does not exist; expected a folder like"),
        (["out=x.png", "weights={h}/mine.jpg"], "beside it; expected a folder like"),
        (
            ["out=x.png", "promt=a"],
            "promt: unknown; did you mean 'prompt'? allowed: average, cache_dir, cluster, device",
        ),
        (["out=x.png", "nodes=2"], "nodes: has no effect without cluster=<name>"),
        (["out=x.png", "cluster.threads=1"], "cluster.threads: has no effect without cluster=<name>"),
        (["out=x.png", "cluster=local"], "out: has no effect with cluster=local; the pictures go to samples/"),
        (["device=cpu", "cluster=local"], "device: has no effect with cluster=local; expected cluster.device"),
        (["cluster=lokal"], "cluster: 'lokal' is unknown; did you mean 'local'?"),
        (["cluster=local", "cluster.thread=1"], "cluster.thread: unknown key; did you mean 'threads'?"),
        (["cluster=debug", "gpus_per_node=2"], "nodes x gpus_per_node: 2 ranks are not allowed with cluster=debug"),
        (["prompt=a"], "out: missing"),
        (["out=x.doc"], "out: 'x.doc' is not allowed; expected a folder, or a picture file as in x.png"),
        (["out=/dev/null/x.png"], "out: /dev/null can't be written: /dev/null is no folder"),
        (["out=x.png", "reference={h}/mine.jpg,{h}/asked.jsonl"], "can't be read as a picture"),
        (["out=x.png", "reference={h}/mine.jpg,{h}/mine.jpg"], "request: the name 'mine' is used more than once"),
        (["out=x.png", "requests={h}/asked.jsonl"], "out: 'x.png' is one picture, and 7 are asked for"),
        (["out=x", "requests=bad.jsonl"], "bad.jsonl, line 2 is no JSON"),
        (["out=x", "requests=[{name: a, height: 40}]"], "requests[0].height: 40 is not a multiple of 16"),
        (["out=x", "requests=[{name: grid}, {name: b}]"], "requests: the name 'grid' is that of grid.png"),
        (["out=x", "requests=[]"], "requests: [] asks for no picture"),
        (["out=x", "requests=[{name: a}]", "reference=a.jpg,b.jpg"], "reference: 2 are not allowed with requests="),
        (["out=x.png", "steps=2.5"], "steps: '2.5' is not allowed; expected a whole number"),
        (["out=x.png", "micro=0"], "micro: 0 is not allowed; expected a number above 0"),
        (["out=x.png", "grid=-1"], "grid: -1 is not allowed; expected a number 0 or more"),
        (["out=x.png", "average=false"], "average: false is not allowed"),
        (["out=x.png", "average=perhaps"], "average: 'perhaps' is not allowed; expected true or false or null"),
        (["out=x.png", "device=cuda:9"], "device: 'cuda:9' is not allowed; expected one of cpu"),
        (["out=x.png", "dtype=fp8"], "dtype: 'fp8' is not allowed; expected one of bf16, fp32"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"name": "a"}\n{"name": b}\n')
    given = [word.replace("{h}", str(trained.home)) for word in words]
    weights = [] if any(word.startswith("weights=") for word in given) else [f"weights={trained.weights}"]
    runs = [f"runs_dir={tmp_path / 'runs'}"] if any(word.startswith("cluster=") for word in given) else []
    assert main(["generate", *weights, *runs, *given]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and message in shown.err, shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_weights_that_are_damaged_or_of_another_version(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    export, checkpoint = run / "weights" / "step_00000003", run / "checkpoints" / "step_00000003"
    about = json.loads((export / "synthos.json").read_text())
    (export / "synthos.json").write_text(json.dumps({**about, "format": 99}))
    with pytest.raises(ValueError, match="has format 99, this version reads 1"):
        find_source(export)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("optim:", "optimiser:"))
    with pytest.raises(ValueError, match="is a checkpoint of another version.*optimiser: unknown key"):
        find_source(checkpoint)
    (run / "config.yaml").write_text(config.replace("train: full", "train: projector"))
    with pytest.raises(ValueError, match="does not hold exactly what the recipe trains"):
        synthos.load(checkpoint)
    (run / "config.yaml").unlink()
    with pytest.raises(ValueError, match="is a checkpoint away from its run folder: there is no .*config.yaml"):
        find_source(checkpoint)
    next(checkpoint.glob("*.distcp")).write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged: its files are not those that manifest.json lists"):
        find_source(checkpoint)
