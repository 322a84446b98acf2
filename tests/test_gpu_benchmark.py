"""The speed benchmark: its operation counts against torch's counter and known figures, and the program at toy size.

Tests marked `gpu` need one and are skipped without.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from benchmarks.drawn import build_job, step_flops, with_batch
from benchmarks.flops import Tokens, autoencoder_flops, image_encoder_flops, text_encoder_flops, transformer_flops
from launch.compose import compose
from synthos.build import build_recipe
from synthos.models.parts import Models
from synthos.models.wan import predict
from synthos.schema import RunConfig
from synthos.train.distributed import World, local, open_world
from synthos.train.loop import Job, update

HEIGHT, WIDTH, TEXT, IMAGE = 480, 832, 512, 257  # pixels and tokens of the true size
TRAIN = ("full", "projector")
TRUE = Tokens(HEIGHT // 16 * (WIDTH // 16), TEXT, IMAGE)


def on_gpu(test: Callable[..., Any]) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: skipped")(test))


def toy_config(cache: Path, *overrides: str) -> RunConfig:
    return compose([*gpu.BASE, *gpu.TOY, "cluster.threads=1", f"cache_dir={cache}", *overrides]).config


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def world(cache: Path) -> Iterator[World]:
    opened = open_world(toy_config(cache, "cluster.device=cpu"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def real() -> Any:
    """The recipe at true size on the meta device, everything trained."""
    config = compose([*gpu.BASE, "recipe.train=full"]).config
    recipe: Any = build_recipe(config.recipe, Models(config.model, Path("no/such/folder"), meta_only=True))
    for part in (recipe.network, recipe.encoders, recipe.frozen):
        part.to("meta")  # tables too, which are real so far
    return recipe


def counted(run: Callable[[], object]) -> float:
    """What torch counts; plain attention, since it knows not every fused kernel's cost."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def transformer_step(recipe: Any) -> None:
    """Forward and backward of one image at true size."""
    shapes = (16, 1, HEIGHT // 8, WIDTH // 8), (), (TEXT, 4096), (IMAGE, 1280)
    inputs = [torch.empty(1, *shape, device="meta") for shape in shapes]
    predict(recipe.network, *inputs, torch.float32).mean().backward()


@pytest.mark.parametrize(("train", "total"), [("full", 14.40e12), ("projector", 10.20e12)])
def test_a_step_of_true_size_costs_what_torch_counts(real: Any, train: str, total: float) -> None:
    real.network.requires_grad_(train == "full")
    real.projector.requires_grad_(True)
    flops = transformer_flops(real.network.config, TRUE, 1280, train, recompute=False)
    assert flops.total == pytest.approx(counted(lambda: transformer_step(real)), rel=1e-6)
    assert flops.total == pytest.approx(total, rel=1e-2)
    assert flops.forward == pytest.approx(4.803e12, rel=1e-2)


def test_encoders_of_true_size_cost_what_torch_counts(real: Any) -> None:
    text, tower, vae = real.encoders["text"], real.encoders["image"], real.frozen["vae"]
    ids = torch.zeros(1, TEXT, dtype=torch.long, device="meta")
    picture, square = (torch.empty(1, 3, *size, device="meta") for size in ((HEIGHT, WIDTH), (224, 224)))
    pairs = [
        (text_encoder_flops(text.config, TEXT), counted(lambda: text(input_ids=ids))),
        (image_encoder_flops(tower.config, len(tower.encoder.layers)), counted(lambda: tower(pixel_values=square))),
        (
            autoencoder_flops("AutoencoderKLWan", vae.config, HEIGHT, WIDTH),
            counted(lambda: vae.encode(picture.unsqueeze(2))),
        ),
    ]
    for model, counter in pairs:
        assert model == pytest.approx(counter, rel=1e-6)
    whole_tower = image_encoder_flops(tower.config, tower.config.num_hidden_layers)
    assert [pairs[0][0], whole_tower, pairs[2][0]] == pytest.approx([4.84e12, 0.335e12, 2.72e12], rel=1e-2)


@pytest.mark.parametrize(
    "overrides",
    [
        ("recipe.train=full",),
        ("recipe.train=projector",),
        ("recipe.train=full", "activation_checkpointing=true"),
        ("recipe.train=projector", "activation_checkpointing=true"),
        ("recipe.train=image_attention", "recipe.attention=decoupled", "recipe.text_length=512"),
    ],
    ids=",".join,
)
@pytest.mark.parametrize("online", [True, False], ids=["online", "memory"])
def test_an_update_costs_what_torch_counts(
    world: World, cache: Path, tmp_path: Path, overrides: tuple[str, ...], online: bool
) -> None:
    job = with_batch(build_job(toy_config(cache, *overrides), world, tmp_path, online), 2)
    flops = step_flops(job)
    assert counted(lambda: update(job)) == pytest.approx(2 * sum(flops.values()), rel=1e-6)
    assert ("text_encoder" in flops) == online
    assert (flops["recompute"] > 0) == ("activation_checkpointing=true" in overrides)


def test_features_from_memory_are_the_encoders_own(world: World, cache: Path, tmp_path: Path) -> None:
    """So both cases train the same network on inputs of the same shape, and nothing but encoding is left out."""
    seen = []
    for online in (True, False):
        (tmp_path / str(online)).mkdir()
        job = with_batch(build_job(toy_config(cache), world, tmp_path / str(online), online), 2)
        batch = job.stream.next()
        encoded = {group: job.recipe.encode(batch, group) for group in ("target", "image", "text")}
        seen.append({name: value for group in encoded.values() for name, value in group.items()})
        assert len(job.recipe.encoders) == (2 if online else 0)
        assert bool(batch.columns) == online
    first, second = seen
    assert {k: (v.shape, v.dtype) for k, v in first.items()} == {k: (v.shape, v.dtype) for k, v in second.items()}
    assert torch.equal(first["text"][0], second["text"][0])  # the captions are the same in both, the pictures are not
    assert first["text"].shape[1] == 16 and bool(first["text"].any(-1).all())  # captions fill the text length


def test_the_job_trains_what_its_recipe_says(world: World, cache: Path, tmp_path: Path) -> None:
    job = with_batch(build_job(toy_config(cache, "recipe.train=projector"), world, tmp_path, online=True), 2)
    before = {name: local(p.detach()).clone() for name, p in job.recipe.network.named_parameters()}
    metrics = update(job)
    moved = {n for n, p in job.recipe.network.named_parameters() if not torch.equal(before[n], local(p.detach()))}
    assert moved and all("image_embedder" in name for name in moved)
    assert math.isfinite(float(metrics["train/loss"]))


def test_the_whole_program_at_toy_size(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "toy.json"
    arguments = ["--toy", "--batch", "1", "3", "--out", str(out), "cluster.device=cpu", "cluster.threads=1"]
    assert gpu.main([*arguments, f"cache_dir={cache}"]) == 0
    check(json.loads(out.read_text()), batches=[1, 3])
    printed = capsys.readouterr().out
    for words in ("full, online", "full, memory", "projector, online", "projector, memory", "TFLOP/s", "1 CPU threads"):
        assert words in printed
    assert "…" not in printed, "the table fits a terminal of 80 columns"


def check(record: dict[str, Any], batches: list[int]) -> None:
    """What every record holds."""
    assert record["toy"] and record["model"] == "tiny" and record["precision"] == "bf16"
    for key in ("device", "python", "torch", "diffusers", "transformers", "commit", "changed_since_commit"):
        assert key in record
    assert "train" not in record["recipe"] and record["recipe"]["text_length"] == 16
    rate = max(record["matmul_tflops"].values())
    assert min(record["matmul_tflops"].values()) > 0
    cases = [(case["train"], case["features"]) for case in record["cases"]]
    assert cases == [(train, features) for train in ("full", "projector") for features in ("online", "memory")]
    for case in record["cases"]:
        assert [row["batch"] for row in case["batches"]] == batches and case["does_not_fit"] is None
        for row in case["batches"]:
            low, high = row["images_per_s_range"]
            assert 0 < low <= row["images_per_s"] <= high
            assert row["peak_memory_gb"] > 0
            per_image = sum(case["tflop_per_image"].values())
            assert row["tflops"] == pytest.approx(row["images_per_s"] * per_image)
            assert row["fraction_of_matmul"] == pytest.approx(row["tflops"] / rate)
    costs = {(c["train"], c["features"]): sum(c["tflop_per_image"].values()) for c in record["cases"]}
    assert costs["full", "online"] > costs["full", "memory"] > costs["projector", "memory"] > 0


def test_a_batch_that_does_not_fit_ends_its_case_only(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has no limit to run into; the GPU's own is met below."""

    def small(job: Job) -> dict[str, float | str]:
        if job.config.batch.size > 1:
            raise torch.OutOfMemoryError("too large")
        return update(job)

    monkeypatch.setattr(gpu, "update", small)
    configs = [toy_config(cache, "cluster.device=cpu", f"recipe.train={train}") for train in TRAIN]
    kept: list[int] = []
    effort = gpu.Effort((1, 2, 4), (64,), warmup=0, steps=1, repeats=1)
    record = gpu.measure(configs, effort, lambda record: kept.append(len(record["cases"])))
    assert kept == list(range(1, len(record["cases"]) + 1))  # a case that fails takes no earlier one with it
    assert [[row["batch"] for row in case["batches"]] for case in record["cases"]] == [[1]] * 4
    assert [case["does_not_fit"] for case in record["cases"]] == [2] * 4
    assert "no room" in [str(cell) for cell in gpu.table(record).columns[3].cells]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--toy", "recipe.train=full"], "recipe.train: not to be overridden; use --train"),
        (["--toy", "batch.size=4"], "batch.size: not to be overridden"),
        (["--toy", "--batch", "0"], "--batch: 0 is not allowed"),
        (["--toy", "recipe.atention=decoupled"], "atention"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: skipped")
def test_true_size_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main([])
    assert "no GPU on this machine; --toy" in capsys.readouterr().err


@on_gpu
def test_a_bf16_update_on_the_gpu(cache: Path, tmp_path: Path) -> None:
    config = toy_config(cache, "recipe.train=full", "cluster.device=cuda")
    world = open_world(config)
    try:
        job = with_batch(build_job(config, world, tmp_path, online=True), 4)
        metrics = [update(job) for _ in range(3)]
        assert all(math.isfinite(float(m["train/loss"])) for m in metrics)
        assert all(0 < float(m["train/mem_gb"]) < 4 for m in metrics)
        assert {p.dtype for p in job.recipe.network.parameters()} == {torch.float32}
        assert {p.dtype for p in job.recipe.encoders.parameters()} == {torch.bfloat16}
        assert {p.device.type for p in job.recipe.network.parameters()} == {"cuda"}
    finally:
        world.close()


@on_gpu
def test_the_whole_program_on_the_gpu(tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "toy.json"
    assert gpu.main(["--toy", "--out", str(out), "cluster.device=cuda", f"cache_dir={cache}"]) == 0
    record = json.loads(out.read_text())
    check(record, batches=list(gpu.TOY_EFFORT.batches))
    assert record["device"] == torch.cuda.get_device_name() and record["memory_gb"] > 0 and record["cuda"]


@on_gpu
def test_the_gpus_own_limit_ends_a_case_and_the_next_one_runs(cache: Path) -> None:
    share = 2e9 / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        configs = [toy_config(cache, "cluster.device=cuda", f"recipe.train={train}") for train in TRAIN]
        record = gpu.measure(configs, gpu.Effort((1, 8192), (64,), warmup=1, steps=1, repeats=1), lambda record: None)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [case["does_not_fit"] for case in record["cases"]] == [8192] * 4
    assert all(case["batches"][0]["peak_memory_gb"] < 1 for case in record["cases"])
