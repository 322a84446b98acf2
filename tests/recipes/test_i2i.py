"""i2i: what it trains, its loss read plainly from the equations in float64, guidance, sampling against diffusers."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from synthos.batch import Batch, Features
from synthos.build import fill_frozen
from synthos.keys import FixedDraws, KeyedDraws
from synthos.models.parts import Models
from synthos.recipes.base import Encoded
from synthos.recipes.i2i import I2I, I2IConfig, I2IRequest
from synthos.schema import ModelConfig
from synthos.train.distributed import World, build_mesh, fill_sharded, fill_whole, set_dtypes, shard
from synthos.train.validate import encode_all, sample
from tests.support import run_config, world_of_one

CONFIG = I2IConfig("full", "shared_kv", "squash", 8, 5.0, "bell", 0.1, 0.1, 5.0, 5.0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def world() -> Iterator[World]:
    yield from world_of_one()


def build(cache: Path, config: I2IConfig = CONFIG) -> I2I:
    models = Models(ModelConfig("tiny"), cache)
    recipe = I2I(config, models)
    fill_whole(recipe.network, models.tensors(recipe.network), torch.device("cpu"))
    fill_frozen(recipe, models, torch.device("cpu"), torch.float32)
    return recipe


def batch(size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    texts = [f"a red photograph number {i}" for i in range(size)]
    return Batch(torch.arange(100, 100 + size), torch.zeros(size, dtype=torch.int64), {"image": images, "text": texts})


def trained_names(recipe: I2I) -> set[str]:
    return {name for name, p in recipe.network.named_parameters() if p.requires_grad}


def test_projector_trains_the_projector_alone(cache: Path) -> None:
    recipe = build(cache, dataclasses.replace(CONFIG, train="projector"))
    assert trained_names(recipe) and all("image_embedder" in name for name in trained_names(recipe))
    assert set(recipe.param_groups()) == {"projector"}


def test_full_trains_everything_once(cache: Path) -> None:
    recipe = build(cache)
    grouped = [p for group in recipe.param_groups().values() for p in group]
    assert len({id(p) for p in grouped}) == len(grouped) == len(list(recipe.network.parameters()))


def test_features_are_what_is_declared(cache: Path) -> None:
    recipe = build(cache)
    features = encode_all(recipe, batch())
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "latents": (4, 16, 1, 4, 4), "image": (4, 17, 64), "text": (4, 8, 32)}  # fmt: skip
    assert set(features) == set(recipe.features)


def test_null_is_the_empty_prompt_and_zero_tokens(cache: Path) -> None:
    recipe = build(cache)
    null = recipe.null()
    assert not null["image"].any() and null["image"].shape == (1, 17, 64)
    assert null["text"][0, 0].any() and not null["text"][0, 1:].any()  # an end-of-sequence vector, then zeros
    projected = recipe.projector(null["image"])
    assert not projected.any()  # zero biases: null in is null out at the start


def test_loss_is_the_equation(cache: Path) -> None:
    recipe = build(cache, dataclasses.replace(CONFIG, drop_text=0.5, drop_image=0.5))
    features, null = encode_all(recipe, batch()), recipe.null()
    draws = KeyedDraws(7, batch().ids, batch().epochs)
    loss = recipe.loss(features, null, draws)
    u, noise = draws.uniform("t"), draws.normal("noise", (16, 1, 4, 4)).double()
    drop_text, drop_image = draws.uniform("drop_text") < 0.5, draws.uniform("drop_image") < 0.5
    s_prime = [1 - i / 1000 for i in range(1000)]
    bells = [torch.exp(torch.tensor(-2 * (5 * s / (1 + 4 * s) - 0.5) ** 2, dtype=torch.float64)) for s in s_prime]
    total = sum(b - min(bells) for b in bells)
    for row in range(4):
        index = int(u[row] * 1000)
        s = 5 * s_prime[index] / (1 + 4 * s_prime[index])
        weight = 1000 * (bells[index] - min(bells)) / total
        x0 = features["latents"][row : row + 1].double()
        text = (null["text"] if drop_text[row] else features["text"][row : row + 1]).float()
        image = (null["image"] if drop_image[row] else features["image"][row : row + 1]).float()
        x_s = (1 - s) * x0 + s * noise[row : row + 1]
        with torch.no_grad():
            output = recipe.network(x_s.float(), torch.tensor([1000 * s]), text, image, return_dict=False)[0]
        expected = weight * (output.double() - (noise[row : row + 1] - x0)).square().mean()
        assert loss.per_sample[row].item() == pytest.approx(expected.item(), rel=1e-4)
        assert loss.t[row].item() == pytest.approx(s, rel=1e-6)
    assert drop_text.any() or drop_image.any()


def test_dropped_means_null_exactly(cache: Path) -> None:
    recipe = build(cache, dataclasses.replace(CONFIG, drop_text=1.0, drop_image=1.0))
    features, null = encode_all(recipe, batch()), recipe.null()
    draws = KeyedDraws(0, batch().ids, batch().epochs)
    absent = {"latents": features["latents"]} | {k: v.expand(4, -1, -1) for k, v in null.items()}
    dropped = recipe.loss(features, null, draws).per_sample
    assert torch.equal(dropped, recipe.loss(absent, null, draws).per_sample)
    kept = build(cache, dataclasses.replace(CONFIG, drop_text=0.0, drop_image=0.0))
    assert not torch.equal(dropped, kept.loss(features, null, draws).per_sample)


def test_validation_never_drops(cache: Path) -> None:
    always = build(cache, dataclasses.replace(CONFIG, drop_text=1.0, drop_image=1.0))
    never = build(cache, dataclasses.replace(CONFIG, drop_text=0.0, drop_image=0.0))
    features, null = encode_all(always, batch()), always.null()
    draws = FixedDraws(0, batch().ids, [3] * 4)
    assert torch.equal(always.loss(features, null, draws).per_sample, never.loss(features, null, draws).per_sample)


def request(cache: Path, recipe: I2I, tmp_path: Path, **changes: object) -> Encoded:
    from PIL import Image

    Image.fromarray(batch().images("image")[0].permute(1, 2, 0).numpy()).save(tmp_path / "reference.png")
    fields: dict[str, Any] = {"reference": str(tmp_path / "reference.png"), "steps": 4} | changes
    asked = I2IRequest("one", **fields)
    return recipe.encode_requests([asked], (32, 32))


def test_image_guidance_does_not_cancel_with_empty_prompts(cache: Path, tmp_path: Path) -> None:
    recipe = build(cache)
    null = recipe.null()
    requests = [request(cache, recipe, tmp_path, guidance_image=scale, guidance_text=1.0) for scale in (1.0, 4.0)]
    one, other = (torch.cat(sample(recipe, asked, null, torch.device("cpu"))) for asked in requests)
    assert (one - other).abs().max() > 1e-3


def test_negative_prompt_stands_for_the_null_text_in_unguided_branches(cache: Path, tmp_path: Path) -> None:
    recipe = build(cache)
    encoded = request(cache, recipe, tmp_path, prompt="blue", negative_prompt="ugly")
    assert torch.equal(encoded.negatives["text"], recipe._encode_text(["ugly"]))
    empty = request(cache, recipe, tmp_path, prompt="blue")
    assert torch.equal(empty.negatives["text"], recipe.null()["text"])


@pytest.mark.parametrize(("scale_image", "branches"), [(2.0, 3), (1.0, 2)])
def test_guided_sampling_is_the_plain_euler_loop_in_float64(
    cache: Path, tmp_path: Path, scale_image: float, branches: int
) -> None:
    recipe = build(cache)
    asked = {"prompt": "red", "negative_prompt": "ugly", "guidance_image": scale_image, "guidance_text": 3.0}
    encoded, null = request(cache, recipe, tmp_path, **asked), recipe.null()
    assert encoded.settings[0]["guided"] == branches
    draws = KeyedDraws(0, torch.tensor([5]), torch.tensor([0]))
    x = draws.normal("noise", (16, 1, 4, 4)).double()
    text, image, no_text, no_image = (
        t.double() for t in (*encoded.conditions.values(), encoded.negatives["text"], null["image"])
    )
    network = build(cache).network.double()
    levels = [5 * s / (1 + 4 * s) for s in (1.0, 0.75, 0.5, 0.25)] + [0.0]

    def v(t: float, text: Tensor, image: Tensor) -> Tensor:
        with torch.no_grad():
            return network(x, torch.tensor([1000 * t]), text, image, return_dict=False)[0]  # type: ignore[no-any-return]

    for now, after in zip(levels, levels[1:], strict=False):
        none, seen, both = v(now, no_text, no_image), v(now, no_text, image), v(now, text, image)
        x = x + (after - now) * (none + scale_image * (seen - none) + 3.0 * (both - seen))
    vae = recipe.frozen["vae"]
    from synthos.models.autoencoder import decode_latents

    expected = decode_latents(vae, x.float())
    torch.testing.assert_close(recipe.sample(encoded, null, draws), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"height": 40}, "'one'.*height 40.*16"),
        ({"steps": 0}, "'one'.*steps 0"),
        ({"guidance_text": float("nan")}, "'one'.*guidance_text nan"),
        (
            {"negative_prompt": "ugly", "guidance_text": 1.0, "guidance_image": 1.0},
            "'one'.*negative_prompt has no effect",
        ),
    ],
)
def test_what_a_request_may_not_ask(cache: Path, tmp_path: Path, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        request(cache, build(cache), tmp_path, **asked)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_the_shift_is_a_number_above_0(value: float) -> None:
    with pytest.raises(ValueError, match="recipe.shift: .* expected a number above 0"):
        dataclasses.replace(CONFIG, shift=value)


def test_times_998_and_999_differ_under_bf16(cache: Path, world: World) -> None:
    recipe, _ = sharded(cache, world, CONFIG, torch.bfloat16)
    text, image = torch.zeros(1, 8, 32).bfloat16(), torch.zeros(1, 17, 64).bfloat16()
    x = torch.ones(1, 16, 1, 4, 4).bfloat16()
    outputs = []
    with torch.no_grad():
        for t in (998.0, 999.0):
            outputs.append(recipe.network(x, torch.tensor([t]), text, image, return_dict=False)[0])
    assert outputs[0].dtype == torch.bfloat16 and not torch.equal(*outputs)
    assert torch.tensor(998.0).bfloat16() == torch.tensor(999.0).bfloat16()  # what would have happened to cast times


def sharded(cache: Path, world: World, config: I2IConfig, dtype: torch.dtype) -> tuple[I2I, Features]:
    models = Models(ModelConfig("tiny"), cache)
    recipe = I2I(config, models)
    recipe.compute_dtype = dtype
    fill_frozen(recipe, models, world.device, dtype)
    set_dtypes(recipe.network, frozen=dtype)
    world = dataclasses.replace(world, dtype=dtype)
    shard(recipe.network, recipe.fsdp_units(), build_mesh("full", run_config(), world.device), world, recompute=False)
    fill_sharded(recipe.network, models.tensors(recipe.network), world.device)
    return recipe, recipe.null()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_network_computes_what_the_plain_one_does(cache: Path, world: World, dtype: torch.dtype) -> None:
    recipe, null = sharded(cache, world, CONFIG, dtype)
    assert isinstance(recipe.network, FSDPModule) and {p.dtype for p in recipe.network.parameters()} == {torch.float32}
    plain = build(cache)
    draws = FixedDraws(0, batch().ids, [3] * 4)
    features = encode_all(plain, batch())
    ours, theirs = (r.loss(features, plain.null(), draws).per_sample for r in (recipe, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-6 if dtype == torch.float32 else 0.05, atol=0)


def test_sampler_agrees_with_diffusers_pipeline_on_its_own_grid(cache: Path) -> None:
    """A network without image embedder, guided by text: WanPipeline with our noise levels in its scheduler."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    from synthos.diffusion.sampling import sample_flow
    from synthos.diffusion.timesteps import shifted_grid
    from synthos.models.autoencoder import TINY_WAN
    from synthos.models.wan import TINY_TRANSFORMER

    class OurGrid(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, num_inference_steps: int, device: object = None, **_: object) -> None:  # type: ignore[override]
            super().set_timesteps(sigmas=shifted_grid(num_inference_steps, 5.0).tolist(), device=device)

    torch.manual_seed(0)
    recipe = build(cache)
    network = WanTransformer3DModel.from_config(TINY_TRANSFORMER.config).eval()
    vae = AutoencoderKLWan.from_config(TINY_WAN.config).eval()
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=OurGrid(), transformer=network)
    pipe.set_progress_bar_config(disable=True)
    text, null = recipe._encode_text(["a red barn"]), recipe._encode_text([""])
    noise = torch.randn(1, 16, 1, 4, 4)
    theirs = pipe(prompt_embeds=text, negative_prompt_embeds=null, height=32, width=32, num_frames=1,
                  latents=noise.clone(), num_inference_steps=6, guidance_scale=4.0, output_type="latent"
                  ).frames  # fmt: skip

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            v, u = (network(x, t, states, return_dict=False)[0] for states in (text, null))
        return u + 4.0 * (v - u)  # type: ignore[no-any-return]

    ours = sample_flow(velocity, noise, 6, 5.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_frozen_modules_are_in_eval_and_need_no_gradient(cache: Path) -> None:
    recipe = build(cache)
    parts: list[nn.Module] = [*recipe.encoders.children(), *recipe.frozen.children()]
    assert parts and not any(m.training for part in parts for m in part.modules())
    assert not any(p.requires_grad for part in parts for p in part.parameters())


def test_projector_starts_as_published_at_its_real_width() -> None:
    from synthos.models.meta import meta_parameters
    from synthos.models.wan import _projector_init

    with meta_parameters():
        from diffusers.models.transformers.transformer_wan import WanImageEmbedding

        init = _projector_init(WanImageEmbedding(1280, 1536), seed=0)
    values = {name.removeprefix("condition_embedder.image_embedder."): make() for name, make in init.items()}
    for name in ("ff.net.0.proj.weight", "ff.net.2.weight"):
        assert values[name].std().item() == pytest.approx(0.02, rel=0.01) and abs(values[name].mean()) < 1e-4
    assert (
        not values["ff.net.0.proj.bias"].any()
        and (values["norm1.weight"] == 1).all()
        and not values["norm2.bias"].any()
    )
