"""One small run through the real command, in one process: everything that it leaves behind, and generating from it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import synthos
from synthos.schema import RunConfig
from synthos.strict import read_config
from tests import wandb_file
from tests.support import SMALL, environment

CLI = "import sys; from launch.cli import main; sys.exit(main(sys.argv[1:]))"


def cli(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CLI, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)


class Finished:
    """A finished run, and how it was started."""

    def __init__(self, home: Path) -> None:
        picture = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
        Image.fromarray(picture).save(home / "mine.jpg", quality=95)
        asked = f"[{{name: mine, reference: {home / 'mine.jpg'}, prompt: a barn, steps: 3}}]"
        self.arguments = (
            *SMALL,
            "cluster=debug",
            f"runs_dir={home / 'runs'}",
            f"cache_dir={home / 'cache'}",
            "optim.steps=4",
            "validate.every=2",
            "checkpoint.every=1",
            "checkpoint.keep_last=1",
            "checkpoint.keep_best=1",
            "optim.lr=0.03",  # so high that the first validation is the best
            "wandb.mode=auto",
            "wandb.project=testing",
            "wandb.tags=[small]",
            f"validate.requests={asked}",
        )
        done = cli("submit", *self.arguments)
        assert done.returncode == 0, done.stderr
        (config,) = (home / "runs").glob("*/*/config.yaml")
        self.folder, self.output = config.parent, done.stdout
        self.config = read_config(RunConfig, config)
        self.weights = self.folder / "weights" / "step_00000004"
        self.metrics: list[dict[str, Any]] = [json.loads(x) for x in (self.folder / "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(tmp_path_factory.mktemp("run"))


def test_folder_explains_itself(finished: Finished) -> None:
    names = {p.name for p in finished.folder.iterdir()}
    assert names == {"config.yaml", "provenance", "requests", "attempts", "control", "checkpoints", "weights",
                     "samples", "data", "metrics.jsonl", "wandb"}  # fmt: skip
    verdict = json.loads((finished.folder / "control" / "verdict.json").read_text())
    assert (verdict["status"], verdict["step"], verdict["message"]) == ("done", 4, "")
    assert not list(finished.folder.rglob("*.part"))


def test_metrics_have_the_agreed_keys(finished: Finished) -> None:
    step = next(m for m in finished.metrics if "train/loss" in m)
    expected = {"train/loss", "train/loss_velocity_mse", "train/lr/projector", "train/lr/transformer",
                "train/grad_norm", "train/grad_norm/projector", "train/grad_norm/transformer", "train/sigma_mean",
                "train/samples_per_s", "data/wait", "data/digest"}  # fmt: skip
    assert expected <= set(step) and any(key.startswith("train/loss_by_t/") for key in step)
    values = [v for m in finished.metrics for v in m.values() if isinstance(v, float)]
    assert np.isfinite(values).all()
    assert [m["step"] for m in finished.metrics if "val/loss" in m] == [0, 2, 4]
    grid = next(m for m in finished.metrics if "val/loss" in m)
    assert np.mean([grid[f"val/loss_by_t/{i}"] for i in range(8)]) == pytest.approx(grid["val/loss"])


def test_wandb_offline_holds_the_same_numbers(finished: Finished) -> None:
    (path,) = (finished.folder / "wandb").glob("offline-run-*/run-*.wandb")
    run, rows = wandb_file.run(path), wandb_file.history(path)
    assert run.run_id == (finished.folder / "wandb" / "run_id").read_text()
    assert (run.project, run.run_group, run.job_type, list(run.tags)) == ("testing", "i2i", "i2i", ["small"])
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["recipe"]["train"] == "full" and config["batch"] == {"size": 8, "micro": 2}
    for key in ("train/loss", "val/loss", "val/loss_ema", "train/lr/projector"):
        ours = [(m["step"], m[key]) for m in finished.metrics if key in m]
        np.testing.assert_allclose([(row["step"], row[key]) for row in rows if key in row], ours)
    pictures = [row for row in rows if any(key.startswith("val/samples/") for key in row)]
    assert [row["step"] for row in pictures] == [0, 2, 4] and "val/samples/mine/path" in pictures[-1]


def test_pictures_are_saved_with_what_was_asked(finished: Finished) -> None:
    folder = finished.folder / "samples" / "step_00000004"
    names = {"mine", "split_000_text", "split_000_image", "split_000_both"}
    assert {p.stem for p in folder.glob("*.png")} == names == {p.stem for p in (folder / "cards").glob("*.png")}
    assert Image.open(folder / "mine.png").size == (64, 64)
    assert Image.open(folder / "cards" / "mine.png").width > 2 * 256  # reference and picture side by side
    assert (finished.folder / "requests" / "mine.reference.jpg").is_file()
    assert finished.config.validate.requests[0]["reference"] == "requests/mine.reference.jpg"  # type: ignore[index]


def test_generate_in_a_fresh_process_gives_the_validation_picture(finished: Finished, tmp_path: Path) -> None:
    reference = finished.folder / "requests" / "mine.reference.jpg"
    done = cli("generate", f"weights={finished.weights}", f"reference={reference}", "prompt=a barn", "steps=3",
               f"out={tmp_path / 'a' / 'x.png'}", "dtype=fp32")  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours = np.asarray(Image.open(tmp_path / "a" / "x.png"), np.int16)
    theirs = np.asarray(Image.open(finished.folder / "samples" / "step_00000004" / "mine.png"), np.int16)
    assert np.abs(ours - theirs).max() <= 1  # levels: the rounding of another batch's float sums


def test_generator_answers_to_its_conditions(finished: Finished) -> None:
    generator = synthos.load(finished.weights)
    reference = finished.folder / "requests" / "mine.reference.jpg"
    plain = {"steps": 2, "guidance_image": 1.0, "guidance_text": 1.0}
    same = [np.asarray(generator.generate("red", reference, seed=1, **plain)) for _ in range(2)]
    assert np.array_equal(*same)
    others = [("red", None, 1), ("blue", reference, 1), ("red", reference, 2)]
    for prompt, picture, seed in others:
        assert not np.array_equal(same[0], np.asarray(generator.generate(prompt, picture, seed=seed, **plain)))
    assert generator.generate("red", height=32, width=96, steps=1).size == (96, 32)


def test_export_holds_the_average_and_loads_in_diffusers(finished: Finished) -> None:
    from diffusers import WanTransformer3DModel

    about = json.loads((finished.weights / "synthos.json").read_text())
    assert about["weights"] == "ema" and about["step"] == 4 and about["images_seen"] == 32 and about["complete"]
    model = WanTransformer3DModel.from_pretrained(finished.weights / "transformer").eval()
    generator = synthos.load(finished.weights, dtype="fp32")
    ours = dict(generator.recipe.network.named_parameters())
    assert all(torch.equal(p, ours[name]) for name, p in model.named_parameters())
    for p in model.parameters():
        p.data = p.data.clone()  # aligned as ours: a view of the file differs in the last bit of a product
    x, t = torch.ones(1, 16, 1, 4, 4), torch.tensor([500.0])
    context = {"encoder_hidden_states": torch.ones(1, 8, 32), "encoder_hidden_states_image": torch.ones(1, 17, 64)}
    with torch.no_grad():
        pair = [m(x, t, **context, return_dict=False)[0] for m in (model, generator.recipe.network)]
    assert torch.equal(*pair)


def test_best_and_last_checkpoints_are_kept(finished: Finished) -> None:
    steps = sorted(int(p.name[5:]) for p in (finished.folder / "checkpoints").iterdir())
    by_step = {m["step"]: m["val/loss_ema"] for m in finished.metrics if "val/loss_ema" in m and m["step"]}
    best = min(by_step, key=by_step.__getitem__)
    assert best == 2 and steps == [2, 4]  # 2 by its loss, 4 as the last


def test_the_time_of_a_save_is_told(finished: Finished) -> None:
    saves = [m for m in finished.metrics if "checkpoint/step" in m]
    assert [m["checkpoint/step"] for m in saves] == [1, 2, 3, 4] and all(
        m["step"] >= m["checkpoint/step"] for m in saves
    )
    assert all(0 <= m["checkpoint/wait_seconds"] <= m["checkpoint/stall_seconds"] for m in saves)
    beat = json.loads((finished.folder / "control" / "heartbeat.json").read_text())
    assert beat["save_seconds"] == saves[-1]["checkpoint/save_seconds"] > 0


def test_what_is_exported_can_be_read_by_others(finished: Finished) -> None:
    """As any file that this process writes."""
    (finished.folder / "any").touch()
    usual = (finished.folder / "any").stat().st_mode
    files = [path for path in finished.weights.rglob("*") if path.is_file()]
    assert len(files) >= 4 and {path.stat().st_mode for path in files} == {usual}


def test_same_command_says_done(finished: Finished) -> None:
    done = cli("submit", *finished.arguments)
    assert done.returncode == 0 and "done" in done.stdout and str(finished.weights) in done.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("out=x.png",), ["weights", "missing"]),
        (("weights={w}", "out=x.png", "promt=a"), ["promt", "did you mean 'prompt'"]),
        (("weights={w}", "out=x.png", "height=40"), ["height", "40", "16"]),
        (("weights={w}", "out=x.png", "steps=two"), ["steps", "two", "number"]),
        (("weights={w}", "out=x.png", "sampler=magic"), ["magic", "euler", "unipc"]),
        (("weights={w}", "out=x.png", "reference=absent.jpg"), ["absent.jpg"]),
        (("weights={w}", "out=x.png", "dtype=fp8"), ["fp8", "bf16", "fp32"]),
        (("weights={w}", "out=x.png", "prompt"), ["prompt", "key=value"]),
        (("weights={w}/..", "out=x.png"), ["synthos.json"]),
    ],
)
def test_generate_explains_bad_input(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    change: tuple[str, ...], words: list[str],
) -> None:  # fmt: skip
    from launch.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["generate", *(a.replace("{w}", str(finished.weights)) for a in change)]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words) and "Traceback" not in message
    assert not os.listdir(tmp_path)


def test_export_that_lacks_a_file_is_named(finished: Finished, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(finished.weights, tmp_path / "w")
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks transformer/diffusion_pytorch_model.safetensors"):
        synthos.load(copy)


def test_projector_export_holds_the_projector_and_names_its_base(tmp_path: Path) -> None:
    done = cli("submit", *SMALL, "cluster=debug", f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}",
               "recipe.train=projector", "precision=bf16", "ema.decay=null", "optim.steps=2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (weights,) = (tmp_path / "runs").glob("*/*/weights/*")
    trained = load_file(weights / "transformer" / "trained.safetensors")
    assert trained and all(name.startswith("condition_embedder.image_embedder.") for name in trained)
    assert {t.dtype for t in trained.values()} == {torch.float32}
    about = json.loads((weights / "synthos.json").read_text())
    assert about["weights"] == "raw" and not about["complete"] and about["model"]["name"] == "tiny"
    generator = synthos.load(weights, dtype="fp32")
    network = dict(generator.recipe.network.named_parameters())
    assert all(torch.equal(network[name], value) for name, value in trained.items())
    assert generator.generate("red", steps=1).size == (64, 64)
    trained.popitem()
    from safetensors.torch import save_file

    save_file(trained, weights / "transformer" / "trained.safetensors")
    with pytest.raises(ValueError, match="does not hold exactly what the recipe trains"):
        synthos.load(weights)
