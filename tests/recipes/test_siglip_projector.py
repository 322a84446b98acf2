"""siglip_projector: what it trains, its loss read plainly in float64, sampling and exports against diffusers."""

import dataclasses
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from launch.cli import main
from launch.compose import compose
from synthos.batch import Batch
from synthos.build import fill_frozen
from synthos.data.stream import Stream
from synthos.keys import FixedDraws, KeyedDraws
from synthos.models import sd_unet
from synthos.models.clip import squash
from synthos.models.parts import Models
from synthos.models.siglip import encode_image
from synthos.recipes.base import recipe_config
from synthos.recipes.siglip_projector import SigLIPConfig, SigLIPProjector, SigLIPRequest
from synthos.schema import ModelConfig
from synthos.train.distributed import World, build_mesh, fill_sharded, fill_whole, set_dtypes, shard
from synthos.train.optim import lr_multiplier
from synthos.train.validate import encode_all
from tests.support import here, run_config, synthos, world_of_one

CONFIG = SigLIPConfig("mlp", 2, 32, 16, "crop", "trained", 0.0, 0.5, 7.5)
CPU = torch.device("cpu")
SMALL = (
    "recipe=siglip_projector", "model=tiny", "data=photos", "cluster=local", "cluster.device=cpu",
    "cluster.threads=1", "precision=fp32", "recipe.unet=trained", "recipe.projector_layers=2",
    "recipe.projector_hidden=64", "recipe.num_tokens=16", "recipe.drop_image=0.5", "recipe.noise_offset=0.1",
    "batch.size=8", "batch.micro=2", "optim.lr=1e-3", "optim.warmup_steps=2", "optim.steps=4",
    "+optim.lr_groups.projector=2e-3", "validate.every=null", "validate.samples=8", "validate.from_split=1",
    "checkpoint.every=2", "wandb.mode=off",
)  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def world() -> Iterator[World]:
    yield from world_of_one()


def build(cache: Path, config: SigLIPConfig = CONFIG) -> SigLIPProjector:
    models = Models(ModelConfig("tiny"), cache)
    recipe = SigLIPProjector(config, models)
    fill_whole(recipe.network, models.tensors(recipe.network), CPU)
    fill_frozen(recipe, models, CPU, torch.float32)
    return recipe


def batch(size: int = 4, **columns: Any) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, 64, 64), dtype=torch.uint8, generator=generator)
    ids = torch.arange(100, 100 + size)
    return Batch(ids, torch.zeros(size, dtype=torch.int64), {"image": images, **columns})


def changed(**changes: Any) -> SigLIPConfig:
    return dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(("unet", "groups"), [("frozen", {"projector"}), ("trained", {"projector", "unet"}),
                                              ("from_scratch", {"projector", "unet"})])  # fmt: skip
def test_what_trains_is_in_a_group_of_its_own(cache: Path, unet: Any, groups: set[str]) -> None:
    recipe = build(cache, changed(unet=unet))
    assert set(recipe.param_groups()) == groups
    grouped = [id(p) for group in recipe.param_groups().values() for p in group]
    trained = [id(p) for p in recipe.network.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained)


def test_a_step_moves_the_projector_through_a_frozen_unet(cache: Path) -> None:
    recipe = build(cache, changed(unet="frozen", drop_image=0.0))
    before = {name: p.detach().clone() for name, p in recipe.network.named_parameters()}
    optimizer = torch.optim.AdamW(recipe.param_groups()["projector"], lr=1e-2)
    loss = recipe.loss(encode_all(recipe, batch()), recipe.null(), KeyedDraws(0, batch().ids, batch().epochs))
    loss.per_sample.mean().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    moved = {name for name, p in recipe.network.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith("projector.")}


def test_features_are_what_is_declared(cache: Path) -> None:
    recipe = build(cache)
    features = encode_all(recipe, batch())
    shapes = {name: tuple(value.shape) for name, value in features.items()}
    assert shapes == {"latents_mean": (4, 4, 8, 8), "latents_std": (4, 4, 8, 8), "image": (4, 16, 64)}
    assert set(features) == set(recipe.features)
    assert tuple(recipe.null()["image"].shape) == (1, 16, 64) and not recipe.null()["image"].any()


def test_the_encoder_sees_the_crop_or_the_whole_picture(cache: Path) -> None:
    crop, whole = build(cache), build(cache, changed(image_view="whole"))
    assert set(crop.inputs) == {"image"} and whole.inputs["whole"].crop == "whole"
    seen = batch(whole=batch().images("image").flip(3))
    tokens = encode_image(whole.encoders["image"], seen.images("whole"), 16)
    assert torch.equal(whole.encode(seen, "image")["image"], tokens)
    assert not torch.allclose(crop.encode(batch(), "image")["image"], tokens, atol=0.01)
    assert torch.equal(whole.encode(seen, "target")["latents_mean"], crop.encode(batch(), "target")["latents_mean"])


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_loss_is_the_equation_in_float64(cache: Path, offset: float) -> None:
    recipe = build(cache, changed(noise_offset=offset))
    features, draws = encode_all(recipe, batch()), KeyedDraws(7, batch().ids, batch().epochs)
    features["latents_std"] = torch.rand_like(features["latents_std"])  # the tiny autoencoder's has none
    loss = recipe.loss(features, recipe.null(), draws)
    dropped, u = draws.uniform("drop_image") < 0.5, draws.uniform("t")
    assert dropped.any() and not dropped.all()
    n, r, z = (draws.normal(k, s).double() for k, s in (("noise", (4, 8, 8)), ("noise_offset", (4, 1, 1)),
                                                        ("latents", (4, 8, 8))))  # fmt: skip
    network = build(cache).network.double()
    for row in range(4):
        t, alpha = int(1000 * u[row]), 1.0
        for k in range(t + 1):
            alpha *= 1 - (0.00085**0.5 + k / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2
        e = n[row] + offset * r[row]
        x0 = features["latents_mean"][row].double() + features["latents_std"][row].double() * z[row]
        x_t = alpha**0.5 * x0 + (1 - alpha) ** 0.5 * e
        tokens = features["image"][row].double() * float(not dropped[row])
        with torch.no_grad():
            found = network(x_t[None], torch.tensor([t]), encoder_hidden_states=tokens[None], return_dict=False)[0]
        expected = (found[0] - e).square().mean()
        assert loss.per_sample[row].item() == pytest.approx(expected.item(), rel=1e-4)
        assert loss.t[row].item() == pytest.approx(t / 1000)


def test_dropped_is_a_context_of_zeros_and_validation_never_drops(cache: Path) -> None:
    recipe = build(cache, changed(drop_image=1.0))
    seen: list[Tensor] = []
    recipe.network.down_blocks[0].register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    features = encode_all(recipe, batch())
    recipe.loss(features, recipe.null(), KeyedDraws(0, batch().ids, batch().epochs))
    assert seen[0].shape == (4, 77, 64) and not seen[0].any()
    recipe.loss(features, recipe.null(), FixedDraws(0, batch().ids, [3] * 4))
    assert seen[1][:, :16].any(2).all() and not seen[1][:, 16:].any()


def request(**changes: Any) -> SigLIPRequest:
    return SigLIPRequest("one", **{"steps": 4, **changes})


@pytest.mark.parametrize("mode", [("mlp", 2, 32), ("xattn", 1, None), ("xattnffn", 1, None), ("transformer", 1, 32)])
@pytest.mark.parametrize(("sampler", "guidance"), [("pndm", 7.5), ("ddim", 3.0), ("euler", 7.5), ("dpm", 6.0)])
def test_sampling_is_stable_diffusions_pipeline_given_our_context(
    cache: Path, tmp_path: Path, sampler: str, guidance: float, mode: tuple[Any, int, int | None]
) -> None:
    """Its scheduler from SD1.5's published config, the same noise, a UNet of its own without a projector."""
    import diffusers

    recipe = build(cache, changed(projector=mode[0], projector_layers=mode[1], projector_hidden=mode[2]))
    Image.fromarray(batch().images("image")[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    asked = request(reference=str(tmp_path / "a.png"), sampler=sampler, guidance=guidance, steps=6)
    encoded = recipe.encode_requests([asked], (64, 64))
    draws = KeyedDraws(0, torch.tensor([5]), torch.tensor([0]))
    ours = recipe.sample(encoded, recipe.null(), draws)
    published = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "skip_prk_steps": True,
                 "num_train_timesteps": 1000, "set_alpha_to_one": False, "steps_offset": 1,
                 "clip_sample": False}  # fmt: skip
    base = diffusers.PNDMScheduler.from_config(published)
    names = {"pndm": "PNDM", "ddim": "DDIM", "euler": "EulerDiscrete", "dpm": "DPMSolverMultistep"}
    scheduler = getattr(diffusers, f"{names[sampler]}Scheduler").from_config(base.config)
    unet: Any = diffusers.UNet2DConditionModel.from_pretrained(
        Models(ModelConfig("tiny"), cache).folder("unet", sd_unet.TINY_UNET)
    )
    pipe: Any = diffusers.StableDiffusionPipeline(
        vae=recipe.frozen["vae"], text_encoder=None, tokenizer=None, unet=unet.eval(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        context = recipe.network.projector(encoded.conditions["image"])
    theirs = pipe(
        prompt_embeds=context, negative_prompt_embeds=torch.zeros_like(context), guidance_scale=guidance,
        num_inference_steps=6, height=64, width=64, latents=draws.normal("noise", (4, 8, 8)), output_type="pt",
    ).images  # fmt: skip
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_guidance_of_one_asks_the_network_once_and_an_absent_image_is_null(cache: Path) -> None:
    recipe = build(cache)
    sizes: list[int] = []
    recipe.network.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    draws = KeyedDraws(0, torch.tensor([5]), torch.tensor([0]))
    pictures = [
        recipe.sample(recipe.encode_requests([request(sampler="ddim", guidance=g)], (64, 64)), recipe.null(), draws)
        for g in (1.0, 6.0)
    ]
    assert sizes == [1] * 4 + [2] * 4
    assert torch.allclose(pictures[0], pictures[1], atol=1e-4)  # null against null


def test_an_embedding_is_the_picture_it_was_made_from(cache: Path, tmp_path: Path) -> None:
    recipe = build(cache)
    Image.fromarray(batch().images("image")[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    by_picture = recipe.encode_requests([request(reference=str(tmp_path / "a.png"))], (64, 64)).conditions["image"]
    pixels = squash(batch().images("image")[:1], 36) / 127.5 - 1
    with torch.no_grad():
        states = recipe.encoders["image"](pixel_values=pixels).last_hidden_state
    np.save(tmp_path / "a.npy", states.numpy())
    by_file = recipe.encode_requests([request(embedding=str(tmp_path / "a.npy"))], (64, 64)).conditions["image"]
    assert torch.allclose(by_picture, by_file, atol=1e-6)
    np.save(tmp_path / "own.npy", by_picture.numpy())
    again = recipe.encode_requests([request(embedding=str(tmp_path / "own.npy"))], (64, 64)).conditions["image"]
    assert torch.allclose(again, by_picture, atol=1e-6)


def test_requests_that_can_not_be_met(cache: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "odd.npy", np.ones((10, 64), np.float32))
    recipe = build(cache)
    with pytest.raises(ValueError, match=r"request 'one': embedding .*odd.npy.: has shape \[10, 64\]; expected"):
        recipe.setting(request(embedding=str(tmp_path / "odd.npy")), (64, 64))
    with pytest.raises(ValueError, match="request 'one': width 60 is no multiple of 8"):
        recipe.setting(request(width=60), (64, 64))
    with pytest.raises(ValueError, match="request 'one': guidance inf is not allowed; expected a finite number"):
        recipe.setting(request(guidance=[6.0, float("inf")]), (64, 64))
    with pytest.raises(ValueError, match=r"request 'one': guidance \[\] is not allowed"):
        request(guidance=[])
    with pytest.raises(ValueError, match="reference and embedding are both set"):
        request(reference="a.png", embedding="a.npy")
    with pytest.raises(ValueError, match="steps 1000 is not allowed; expected 1 to 999"):
        request(steps=1000)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("recipe.num_tokens=60",), "recipe.num_tokens: 60 is no square number; nearest: 49 or 64"),
        (("recipe.projector=mpl",), "recipe.projector: 'mpl' is not allowed; expected one of mlp, xattn, xattnffn, tr"),
        (("recipe.projector=xattn",), "recipe.projector_hidden: 4096 has no effect with recipe.projector=xattn"),
        (("recipe.projector_layers=1",), "recipe.projector_layers: 1 is not allowed with recipe.projector=mlp"),
        (
            ("recipe.unet=thawed",),
            "recipe.unet: 'thawed' is not allowed; expected one of frozen, trained, from_scratch",
        ),
        (("recipe.noise_offset=-0.1",), "recipe.noise_offset: -0.1 is not allowed; expected 0 or more"),
    ],
)
def test_values_that_can_not_be(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError) as error:
        recipe_config(compose(["recipe=siglip_projector", "cluster=local", *overrides]).config.recipe)
    assert words in str(error.value)


@pytest.mark.parametrize("mode", [("mlp", 2, 32), ("xattn", 1, None), ("xattnffn", 1, None), ("transformer", 1, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_network_computes_what_the_plain_one_does(
    cache: Path, world: World, mode: tuple[Any, int, int | None], dtype: torch.dtype
) -> None:
    config = changed(projector=mode[0], projector_layers=mode[1], projector_hidden=mode[2])
    models, plain = Models(ModelConfig("tiny"), cache), build(cache, config)
    recipe = SigLIPProjector(config, models)
    recipe.compute_dtype = dtype
    set_dtypes(recipe.network, frozen=dtype)
    mesh = build_mesh("full", run_config(), world.device)
    shard(recipe.network, recipe.fsdp_units(), mesh, dataclasses.replace(world, dtype=dtype), recompute=True)
    fill_sharded(recipe.network, models.tensors(recipe.network), world.device)
    assert isinstance(recipe.network, FSDPModule) and isinstance(recipe.network.projector, FSDPModule)
    features, draws = encode_all(plain, batch()), KeyedDraws(0, batch().ids, batch().epochs)
    ours, theirs = (r.loss(features, r.null(), draws).per_sample for r in (recipe, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 0.05, atol=0)
    for loss in (ours, theirs):
        loss.mean().backward()  # type: ignore[no-untyped-call]
    for (name, sharded), whole in zip(recipe.network.named_parameters(), plain.network.parameters(), strict=True):
        assert sharded.grad is not None and whole.grad is not None, name
        if dtype == torch.float32:
            torch.testing.assert_close(sharded.grad.to_local(), whole.grad, rtol=1e-3, atol=1e-6)  # type: ignore[attr-defined]


def test_times_998_and_999_differ_under_bf16(cache: Path) -> None:
    recipe = build(cache)
    network = recipe.network.bfloat16()
    x, tokens = torch.ones(1, 4, 8, 8), recipe.null()["image"]
    with torch.no_grad():
        found = [sd_unet.predict(network, x, torch.tensor([t]), tokens, torch.bfloat16) for t in (998, 999)]
    assert not torch.equal(*found)


def test_frozen_modules_are_in_eval_and_need_no_gradient(cache: Path) -> None:
    recipe = build(cache)
    parts: list[nn.Module] = [*recipe.encoders.children(), *recipe.frozen.children()]
    assert len(parts) == 2 and not any(m.training for part in parts for m in part.modules())
    assert not any(p.requires_grad for part in parts for p in part.parameters())


def test_the_experiment_is_the_published_command() -> None:
    config = compose(["recipe=siglip_projector", "experiment=siglip_sd15_mlp", "cluster=local"]).config
    asked = recipe_config(config.recipe)
    assert (asked.projector, asked.projector_layers, asked.projector_hidden, asked.num_tokens) == ("mlp", 2, 2048, 64)
    assert (asked.unet, asked.drop_image, asked.noise_offset) == ("trained", 0.8, 0.0)
    assert (config.data.height, config.data.width, config.batch.size) == (512, 512, 24 * 8)
    optim = config.optim
    assert (optim.lr, optim.betas, optim.weight_decay, optim.clip) == (1e-5, (0.9, 0.999), 0.01, None)
    assert (config.ema.decay, optim.steps) == (None, 12000)
    published = {0: 0.0, 10: 0.289, 100: 0.556, 1000: 0.833, 4000: 1.0, 12000: 0.333, 16000: 0.0}
    for step, factor in published.items():
        found = lr_multiplier(optim.schedule, step, optim.warmup_steps, optim.decay_steps or 0)
        assert found == pytest.approx(factor, abs=5e-4)


def test_every_field_of_the_config_is_on_the_page() -> None:
    page = compose(["recipe=siglip_projector", "cluster=local"]).config.recipe
    assert set(page) == {field.name for field in dataclasses.fields(SigLIPConfig)} | {"name"}
    assert recipe_config(page).num_tokens == 64


class Finished:
    """One run of two ranks through the real command, and the same stopped in its middle and gone on with."""

    def __init__(self, home: Path) -> None:
        self.arguments = [*SMALL, "gpus_per_node=2", f"cache_dir={home / 'cache'}"]
        self.home = home
        self.folder = self.run("straight")

    def run(self, name: str, *overrides: str) -> Path:
        done = synthos("submit", *self.arguments, f"runs_dir={self.home / name}", *overrides)
        assert done.returncode == 0, done.stderr + done.stdout
        return self.found(name)

    def alone(self, name: str, *overrides: str) -> Path:
        """The same on one rank, which is this process."""
        arguments = [*self.arguments, "cluster=debug", "cluster.device=cpu", "cluster.threads=1", "gpus_per_node=1"]
        assert here("submit", *arguments, f"runs_dir={self.home / name}", *overrides) == 0
        return self.found(name)

    def found(self, name: str) -> Path:
        (config,) = (self.home / name).glob("*/*/config.yaml")
        return config.parent

    def losses(self, folder: Path) -> dict[int, float]:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(tmp_path_factory.mktemp("siglip"))


@pytest.mark.slow
def test_the_exported_unet_is_diffusers_own(finished: Finished) -> None:
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    folder = finished.folder / "weights" / "step_00000004" / "unet"
    unet: Any = UNet2DConditionModel.from_pretrained(folder)
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {f"projector.{n}" for n in ("body.0.weight", "body.4.bias")} <= set(tensors)
    assert all(torch.equal(p, tensors[name]) for name, p in unet.state_dict().items())
    with_prefix = {name for name in tensors if name.startswith("projector.")}
    assert set(tensors) - with_prefix == set(unet.state_dict())


@pytest.mark.slow
def test_the_exported_unet_and_our_context_are_diffusers_pipelines(finished: Finished, tmp_path: Path) -> None:
    """From saved tokens to pictures at two scales: ours, and StableDiffusionPipeline's with the exported UNet."""
    import diffusers

    from synthos import load
    from synthos.keys import hash64, signed64

    generator = load(finished.folder / "weights" / "step_00000004", device="cpu", encoders=False)
    recipe: Any = generator.recipe
    assert not recipe.encoders
    with pytest.raises(ValueError, match="request 'picture': has to be encoded, and there are no encoders"):
        generator.generate(reference="a.png")
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(81, 64)).astype(np.float32))
    given = {"embedding": str(tmp_path / "a.npy"), "steps": 5, "seed": 9, "guidance": [6.0, 12.5]}
    (ours,) = generator.sample([generator.request({"name": "one", **given}, "request")])
    assert ours.shape == (2, 3, 64, 64)
    unet = diffusers.UNet2DConditionModel.from_pretrained(finished.folder / "weights" / "step_00000004" / "unet")
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    pipe: Any = diffusers.StableDiffusionPipeline(
        vae=recipe.frozen["vae"], text_encoder=None, tokenizer=None, unet=unet.eval(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        context = recipe.network.projector(recipe.encode_requests([request(**given)], (64, 64)).conditions["image"])
    noise = KeyedDraws(0, torch.tensor([signed64(hash64("request", 9))]), torch.tensor([0])).normal("noise", (4, 8, 8))
    for picture, guidance in zip(ours, (6.0, 12.5), strict=True):
        theirs = pipe(
            prompt_embeds=context, negative_prompt_embeds=torch.zeros_like(context), guidance_scale=guidance,
            num_inference_steps=5, height=64, width=64, latents=noise, output_type="pt",
        ).images  # fmt: skip
        torch.testing.assert_close(picture[None], theirs, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="is answered by 2 pictures; expected one, or generate_all"):
        generator.generate(**given)
    assert [picture.size for picture in generator.generate_all([{"name": "one", **given}])] == [(64, 64)] * 2


@pytest.mark.slow
def test_from_scratch_takes_no_weights_but_in_generating(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    from synthos import load

    export = shutil.copytree(finished.folder / "weights" / "step_00000004", tmp_path / "export")
    given = ["submit", *SMALL, "dry_run=full", f"cache_dir={finished.home / 'cache'}", f"init_from={export}"]
    assert main([*given, "recipe.unet=from_scratch"]) == 2
    assert f"init_from: {export} would be ignored: recipe.unet=from_scratch starts from no" in capsys.readouterr().err
    assert main([*given, f"runs_dir={tmp_path}"]) == 0
    about = json.loads((export / "synthos.json").read_text())
    about["recipe"]["unet"] = "from_scratch"
    (export / "synthos.json").write_text(json.dumps(about))
    tensors = load_file(export / "unet" / "diffusion_pytorch_model.safetensors")
    network = load(export, device="cpu").recipe.network
    assert all(torch.equal(p, tensors[name]) for name, p in network.named_parameters())


@pytest.mark.slow
@pytest.mark.long
def test_an_interrupted_run_is_the_same_run_bit_for_bit(finished: Finished) -> None:
    from safetensors.torch import load_file

    folder = finished.home / "again"
    (path,) = (finished.home / "straight").glob("*/*/config.yaml")
    copy = folder / path.parent.relative_to(finished.home / "straight")
    shutil.copytree(path.parent, copy, symlinks=True)
    for late in ("checkpoints/step_00000004", "weights", "control"):
        shutil.rmtree(copy / late)
    text = (copy / "config.yaml").read_text().replace(str(finished.home / "straight"), str(folder))
    (copy / "config.yaml").write_text(text)
    again = finished.run("again")
    assert again == copy and len(list((again / "attempts").iterdir())) == 2
    assert finished.losses(again) == finished.losses(finished.folder)
    name = "weights/step_00000004/unet/diffusion_pytorch_model.safetensors"
    ours, theirs = load_file(again / name), load_file(finished.folder / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_one_rank_agrees_with_two(finished: Finished) -> None:
    """And four with one, in tests/slurm/test_recipes.py."""
    ours, theirs = finished.losses(finished.alone("alone")), finished.losses(finished.folder)
    assert list(ours) == list(theirs) == [1, 2, 3, 4]
    assert [*ours.values()] == pytest.approx([*theirs.values()], rel=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_bf16_and_activations_computed_again(finished: Finished) -> None:
    """The losses are those of float32 on two ranks but for bfloat16's rounding."""
    low = finished.alone("low", "precision=bf16", "activation_checkpointing=true", "mesh=full")
    ours, theirs = finished.losses(low), finished.losses(finished.folder)
    assert [*ours.values()] == pytest.approx([*theirs.values()], rel=0.02) and ours != theirs


@pytest.mark.slow
def test_each_group_has_its_own_rate(finished: Finished) -> None:
    rows = [json.loads(line) for line in (finished.folder / "metrics.jsonl").open()]
    first, *later = [(r["train/lr/projector"], r["train/lr/unet"]) for r in rows if "train/lr/unet" in r]
    assert first == (0.0, 0.0)  # ln(1): the published shape starts at nothing
    assert later and all(projector == pytest.approx(2 * unet) and unet > 0 for projector, unet in later)


@pytest.mark.slow
def test_pictures_come_from_a_picture_at_several_scales_and_from_an_embedding(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = f"weights={finished.folder / 'weights' / 'step_00000004'}"
    Image.fromarray(batch().images("image")[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32))
    np.save(tmp_path / "odd.npy", np.ones((3, 64), np.float32))
    scales, reference = "requests=[{name: output_0}, {name: output_1, seed: 1}]", f"reference={tmp_path}/a.png"
    done = synthos("generate", weights, scales, reference, "guidance=6,7.5", "steps=3", f"out={tmp_path}/scales")
    assert done.returncode == 0, done.stderr
    names = {f"output_{i}_scale_{g}" for i in (0, 1) for g in ("6", "7.5")}
    assert {file.stem for file in (tmp_path / "scales").iterdir()} == {*names, "grid"}
    made = {name: np.asarray(Image.open(tmp_path / "scales" / f"{name}.png")).astype(int) for name in names}
    assert all(picture.shape == (64, 64, 3) for picture in made.values())
    assert abs(made["output_0_scale_6"] - made["output_0_scale_7.5"]).max() > 1
    assert here("generate", weights, reference, "guidance=7.5", "steps=3", f"out={tmp_path}/one.png") == 0
    alone = np.asarray(Image.open(tmp_path / "one.png")).astype(int)
    assert abs(alone - made["output_0_scale_7.5"]).max() <= 1  # another batch's rounding
    embedding = f"embedding={tmp_path}/a.npy"
    assert here("generate", weights, embedding, "steps=3", f"out={tmp_path}/b.png") == 0
    assert Image.open(tmp_path / "b.png").size == (64, 64)
    assert here("generate", weights, f"embedding={tmp_path}/odd.npy", f"out={tmp_path}/c.png") == 2
    assert "has shape [3, 64]; expected [16, 64] or [81, 64]" in capsys.readouterr().err
    assert not (tmp_path / "c.png").exists()
    threads = f"cluster.threads={torch.get_num_threads()}"  # as here: float sums depend on it
    job = [weights, embedding, "steps=3", "cluster=local", "cluster.device=cpu", threads, f"runs_dir={tmp_path / 'r'}"]
    done = synthos("generate", *job)
    assert done.returncode == 0, done.stderr
    (made,) = (tmp_path / "r").glob("*/*/samples/*.png")
    assert (np.asarray(Image.open(made)) == np.asarray(Image.open(tmp_path / "b.png"))).all()
    assert list((tmp_path / "r").glob("*/*/requests/*.embedding.npy"))


@pytest.mark.slow
def test_python_generates_without_a_prompt(finished: Finished) -> None:
    from synthos import load

    generator = load(finished.folder / "weights" / "step_00000004")
    picture = generator.generate(steps=2, guidance=1.0)
    assert picture.size == (64, 64)
    with pytest.raises(ValueError, match="prompt: unknown key"):
        generator.generate("a barn")


def test_image_only_jpegs_are_read_from_a_json_list_of_tars(cache: Path, tmp_path: Path) -> None:
    """As the original took them: a JSON list of tars, members called .jpeg, no captions; indexed on first use."""
    random = np.random.default_rng(0)
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for row in range(6):
                buffer = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (80, 120, 3), dtype=np.uint8)).save(buffer, "JPEG")
                member = tarfile.TarInfo(f"{row:03d}.{'jpg' if row == 5 else 'jpeg'}")
                member.size = buffer.tell()
                tar.addfile(member, io.BytesIO(buffer.getvalue()))
    (tmp_path / "list.json").write_text(json.dumps(["0.tar", str(tmp_path / "1.tar")]))
    recipe = build(cache, changed(image_view="whole"))
    data = dataclasses.replace(
        run_config().data, name="own", shards=str(tmp_path / "list.json"), validation=None, holdout_fraction=0.0
    )
    stream = Stream(data, recipe.inputs, batch_size=4, rank=0, world=1, seed=0)
    assert len(stream) == 12
    ranks = [Stream(data, recipe.inputs, batch_size=4, rank=rank, world=4, seed=0) for rank in range(4)]
    read = [int(i) for _ in range(3) for own in ranks for i in own.next().ids]  # two tars, four ranks, one epoch
    assert len(set(read)) == len(read) == 12
    seen = stream.next()
    crop, whole = seen.images("image"), seen.images("whole")
    assert crop.shape == whole.shape == (4, 3, 64, 64) and not torch.equal(crop, whole)
    loss = recipe.loss(encode_all(recipe, seen), recipe.null(), KeyedDraws(0, seen.ids, seen.epochs))
    assert loss.per_sample.isfinite().all()
    with tarfile.open(tmp_path / "2.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("000.txt"))
    with pytest.raises(ValueError, match="2.tar: sample '000' is without an image: .* jpg or jpeg or png"):
        Stream(dataclasses.replace(data, shards=str(tmp_path / "2.tar")), recipe.inputs, batch_size=4, rank=0, world=1,
               seed=0)  # fmt: skip
