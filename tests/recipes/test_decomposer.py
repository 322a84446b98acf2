"""decomposer: its loss read plainly in float64, dropout, guidance, and sampling against StableDiffusion3Pipeline."""

import dataclasses
import io
import math
import tarfile
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from launch.check import value_problems
from launch.compose import compose
from synthos.batch import Batch
from synthos.build import fill_frozen, measure
from synthos.data.stream import Stream
from synthos.keys import Draws, FixedDraws, KeyedDraws
from synthos.models.autoencoder_kl import decode_latents
from synthos.models.parts import Models
from synthos.recipes.base import recipe_config
from synthos.recipes.decomposer import DecomposerConfig, DecomposerRecipe, DecomposerRequest
from synthos.schema import ModelConfig
from synthos.train.distributed import World, build_mesh, fill_sharded, fill_whole, set_dtypes, shard
from synthos.train.validate import encode_all, sample
from tests.models.test_sd3 import Identity
from tests.support import run_config, world_of_one

CONFIG = DecomposerConfig(
    num_components=3, num_tokens=4, width="t5", num_heads=4, num_layers=2, text_length=12, clip_text="cut",
    clip_length=77, shift=3.0, density="logit_normal", logit_mean=0.0, logit_std=1.0, mode_scale=1.29, space="x0",
    diff_weight=1.0, kd_weight=0.5, drop_text=0.5, guidance=4.5,
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def build(cache: Path, **changes: Any) -> DecomposerRecipe:
    models = Models(ModelConfig("tiny"), cache)
    recipe = DecomposerRecipe(dataclasses.replace(CONFIG, **changes), models)
    fill_whole(recipe.network, models.tensors(recipe.network), CPU)
    fill_frozen(recipe, models, CPU, torch.float32)
    return recipe


@pytest.fixture(scope="module")
def recipe(cache: Path) -> DecomposerRecipe:
    return build(cache)


def batch(size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, 32, 48), dtype=torch.uint8, generator=generator)
    texts = [f"a red photograph number {i}" for i in range(size)]
    return Batch(torch.arange(100, 100 + size), torch.zeros(size, dtype=torch.int64), {"image": images, "text": texts})


def keyed() -> KeyedDraws:
    return KeyedDraws(7, batch().ids, batch().epochs)


def with_config(recipe: DecomposerRecipe, **changes: Any) -> DecomposerRecipe:
    """The same modules under a config that differs in what only `loss` reads."""
    other = object.__new__(DecomposerRecipe)
    other.__dict__ |= recipe.__dict__ | {"config": dataclasses.replace(recipe.config, **changes)}
    return other


def test_features_are_what_is_declared(recipe: DecomposerRecipe) -> None:
    features = encode_all(recipe, batch())
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "latents": (4, 16, 4, 6), "text": (4, 12, 32), "clip": (4, 77, 24), "pooled": (4, 24)}  # fmt: skip
    assert set(features) == set(recipe.features)
    assert {name: tuple(value.shape) for name, value in recipe.null().items()} == {
        "text": (1, 12, 32), "clip": (1, 77, 24), "pooled": (1, 24)}  # fmt: skip


def test_the_decomposer_alone_trains(recipe: DecomposerRecipe) -> None:
    trained = {name for name, p in recipe.network.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("decomposer.") for name in trained)
    (group,) = recipe.param_groups().values()
    assert len(group) == len(trained)
    parts = [*recipe.encoders.children(), *recipe.frozen.children(), recipe.network.transformer]
    assert not any(m.training for part in parts for m in part.modules())
    assert not any(p.requires_grad for part in parts for p in part.parameters())


def levels(u: float, config: DecomposerConfig) -> tuple[float, float]:
    """Noise level and weight of a uniform number, from the formulas."""
    place = {
        "logit_normal": lambda: 1 / (1 + math.exp(-NormalDist(config.logit_mean, config.logit_std).inv_cdf(u))),
        "mode": lambda: 1 - u - config.mode_scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u),
    }.get(config.density, lambda: u)()
    unshifted = 1 - math.floor(1000 * place) / 1000
    s = 3 * unshifted / (1 + 2 * unshifted)
    return s, {"cosmap": 2 / (math.pi * (1 - 2 * s + 2 * s * s)), "sigma_sqrt": s**-2}.get(config.density, 1.0)


@torch.no_grad()
def velocities(recipe: DecomposerRecipe, x: Tensor, s: float, prompt: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Under the mean of one call for each component, and under the whole prompt; float64."""
    clip = torch.nn.functional.pad(prompt["clip"], (0, 8))
    found = recipe.network.decomposer(prompt["text"])

    def call(states: Tensor) -> Tensor:
        output: Tensor = recipe.network.transformer(
            x.float(), torch.cat([clip, states], 1), prompt["pooled"], torch.tensor([1000 * s]), return_dict=False
        )[0]
        return output.double()

    mean = torch.stack([call(found[:, i]) for i in range(found.shape[1])]).mean(0)
    return mean, call(prompt["text"])


@pytest.mark.parametrize("space", ["x0", "velocity"])
@pytest.mark.parametrize("density", ["logit_normal", "mode", "cosmap", "sigma_sqrt"])
def test_loss_is_the_equation(cache: Path, density: str, space: str) -> None:
    recipe = build(cache, density=density, space=space, logit_mean=0.2, logit_std=1.5)
    features, null, draws = encode_all(recipe, batch()), recipe.null(), keyed()
    loss = recipe.loss(features, null, draws)
    noise, dropped = draws.normal("noise", (16, 4, 6)).double(), draws.uniform("drop_text") < 0.5
    assert dropped.any() and not dropped.all()
    for row in range(4):
        s, weight = levels(draws.uniform("t")[row].item(), recipe.config)
        x0, n = features["latents"][row : row + 1].double(), noise[row : row + 1]
        prompt = {name: null[name] if dropped[row] else features[name][row : row + 1] for name in null}
        x_s = (1 - s) * x0 + s * n
        v, teacher = velocities(recipe, x_s, s, prompt)
        if space == "x0":
            diff, kd = (x_s - s * v - x0).square().mean(), (s * v - s * teacher).square().mean()
        else:
            diff, kd = (v - (n - x0)).square().mean(), (v - teacher).square().mean()
        assert kd > 1e-4 * diff  # of some weight here
        assert loss.parts["diff"][row].item() == pytest.approx((weight * diff).item(), rel=1e-4)
        assert loss.parts["kd"][row].item() == pytest.approx((weight * kd).item(), rel=1e-3)
        assert loss.per_sample[row].item() == pytest.approx((weight * (diff + 0.5 * kd)).item(), rel=1e-4)
        assert loss.t[row].item() == pytest.approx(s, rel=1e-6)


def test_weights_switch_the_terms(recipe: DecomposerRecipe) -> None:
    features, null = encode_all(recipe, batch()), recipe.null()
    distilled = with_config(recipe, diff_weight=0.0, kd_weight=2.0).loss(features, null, keyed())
    torch.testing.assert_close(distilled.per_sample, 2 * distilled.parts["kd"])
    plain = with_config(recipe, kd_weight=0.0).loss(features, null, keyed())
    assert set(plain.parts) == {"diff", "component_cosine"}
    torch.testing.assert_close(plain.per_sample, plain.parts["diff"])


def test_an_identity_decomposer_has_nothing_to_distil(cache: Path) -> None:
    recipe = build(cache, num_components=1)
    recipe.network.decomposer = Identity()
    loss = recipe.loss(encode_all(recipe, batch()), recipe.null(), keyed())
    assert loss.parts["kd"].max() < 1e-12 and loss.parts["diff"].min() > 1e-2
    assert "component_cosine" not in loss.parts


def test_the_teacher_has_no_gradient_and_the_student_has(cache: Path) -> None:
    recipe = build(cache, diff_weight=0.0, kd_weight=1.0)
    features, null = encode_all(recipe, batch()), recipe.null()
    loss = recipe.loss(features, null, keyed()).per_sample.mean()
    loss.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for p in recipe.param_groups()["decomposer"]:
            assert p.grad is not None
            p -= 1e-2 * p.grad / (p.grad.norm() + 1e-12) * p.norm()
    assert recipe.loss(features, null, keyed()).per_sample.mean() < loss


def test_dropped_means_the_empty_prompt_for_all_encoders(recipe: DecomposerRecipe) -> None:
    features, null = encode_all(recipe, batch()), recipe.null()
    absent = features | {name: value.expand_as(features[name]) for name, value in null.items()}
    always = with_config(recipe, drop_text=1.0).loss(features, null, keyed()).per_sample
    assert torch.equal(always, with_config(recipe, drop_text=0.0).loss(absent, null, keyed()).per_sample)
    assert not torch.equal(always, with_config(recipe, drop_text=0.0).loss(features, null, keyed()).per_sample)


def test_validation_never_drops(recipe: DecomposerRecipe) -> None:
    features, null = encode_all(recipe, batch()), recipe.null()
    draws = FixedDraws(0, batch().ids, [3] * 4)
    always, never = (with_config(recipe, drop_text=p).loss(features, null, draws).per_sample for p in (1.0, 0.0))
    assert torch.equal(always, never)


def asked(recipe: DecomposerRecipe, *requests: DecomposerRequest) -> Tensor:
    """The pictures of all requests in one call, one after the other."""
    encoded = recipe.encode_requests(list(requests), (32, 48))
    with torch.no_grad():
        return torch.cat(sample(recipe, encoded, recipe.null(), CPU))


def request(name: str = "one", **fields: Any) -> DecomposerRequest:
    given = {"prompt": "a red barn, a blue car", "steps": 4, **fields}
    return DecomposerRequest(name, **given)


def noise_of(seed: int) -> Tensor:
    caught: list[Tensor] = []

    class Catch:
        def sample(self, requests: object, null: object, draws: Draws) -> Tensor:
            caught.append(draws.normal("noise", (16, 4, 6)))
            return caught[0]

    settings = type("Settings", (), {"settings": [{"seed": seed}]})()
    sample(Catch(), settings, {}, CPU)  # type: ignore[arg-type]
    return caught[0]


def test_the_base_path_is_the_pipelines(cache: Path) -> None:
    """With an identity decomposer: prompts to pictures as StableDiffusion3Pipeline, its scheduler on our grid."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    recipe = build(cache, num_components=1)
    recipe.network.decomposer = Identity()
    assert recipe.tokenizers is not None
    pipe = StableDiffusion3Pipeline(
        transformer=recipe.network.transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=recipe.frozen["vae"], text_encoder=recipe.encoders["clip_l"], tokenizer=recipe.tokenizers.clips[0],
        text_encoder_2=recipe.encoders["clip_g"], tokenizer_2=recipe.tokenizers.clips[1],
        text_encoder_3=recipe.encoders["t5"], tokenizer_3=recipe.tokenizers.t5,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    for guidance, negative in ((4.5, "ugly"), (1.0, "")):
        theirs = pipe(
            "a red barn", negative_prompt=negative, height=32, width=48, guidance_scale=guidance, output_type="pt",
            num_inference_steps=4, sigmas=[1.0, 0.75, 0.5, 0.25], latents=noise_of(3), max_sequence_length=12,
        ).images  # fmt: skip
        one = request(prompt="a red barn", negative_prompt=negative, guidance=guidance, seed=3)
        torch.testing.assert_close(asked(recipe, one), theirs, rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_component_is_guided_and_the_mean_taken(recipe: DecomposerRecipe) -> None:
    one = request(negative_prompt="ugly", guidance=3.0, seed=5)
    encoded = recipe.encode_requests([one], (32, 48))
    x, network = noise_of(5).double(), recipe.network
    grid = [3 * s / (1 + 2 * s) for s in (1.0, 0.75, 0.5, 0.25)] + [0.0]

    def single(prompt: dict[str, Tensor], index: int, s: float) -> Tensor:
        found = network.decomposer(prompt["text"])[:, index]
        context = torch.cat([torch.nn.functional.pad(prompt["clip"], (0, 8)), found], 1)
        time = torch.tensor([1000 * s])
        output: Tensor = network.transformer(x.float(), context, prompt["pooled"], time, return_dict=False)[0]
        return output.double()

    for now, after in zip(grid, grid[1:], strict=False):
        pairs = [(single(encoded.negatives, i, now), single(encoded.conditions, i, now)) for i in range(3)]
        x = x + (after - now) * torch.stack([u + 3.0 * (c - u) for u, c in pairs]).mean(0)
    expected = decode_latents(recipe.frozen["vae"], x.float())
    torch.testing.assert_close(asked(recipe, one), expected, rtol=0, atol=1e-4)


def test_components_come_with_their_composition_from_the_same_noise(recipe: DecomposerRecipe) -> None:
    every = request(save_components=True)
    assert recipe.setting(every, (32, 48))["pictures"] == ["compose", "component_0", "component_1", "component_2"]
    pictures = asked(recipe, every)
    assert pictures.shape == (4, 3, 32, 48)
    singles = [asked(recipe, request()), *(asked(recipe, request(component=i)) for i in range(3))]
    for picture, single in zip(pictures, singles, strict=True):
        torch.testing.assert_close(picture[None], single, rtol=0, atol=1e-5)
    assert all((a - singles[0]).abs().max() > 1e-3 for a in singles[1:])


@pytest.mark.parametrize("guidance", [1.0, 0.5, 4.0])
def test_requests_in_one_batch_are_as_alone(recipe: DecomposerRecipe, guidance: float) -> None:
    requests = [
        request("a", guidance=guidance),
        request("b", guidance=guidance, prompt="a cat", negative_prompt="a dog" if guidance != 1 else "", seed=9),
        request("c", guidance=guidance, component=1),
        request("d", guidance=guidance, save_components=True, seed=3),
    ]
    together = asked(recipe, *requests)
    assert len(together) == 3 + 4
    torch.testing.assert_close(together, torch.cat([asked(recipe, one) for one in requests]), rtol=0, atol=1e-5)


def test_the_negative_prompt_is_decomposed_too(recipe: DecomposerRecipe) -> None:
    """Guided to scale 0, a picture is that of its negative prompt, unguided."""
    negative = asked(recipe, request(negative_prompt="a green hill", guidance=0.0))
    plain = asked(recipe, request(prompt="a green hill", guidance=1.0))
    torch.testing.assert_close(negative, plain, rtol=0, atol=1e-5)


def test_a_shorter_prompt_is_that_of_as_many_t5_tokens(cache: Path, recipe: DecomposerRecipe) -> None:
    """As a recipe of that text length has it; the default is the length of training."""
    short = build(cache, text_length=8)
    one = request(max_sequence_length=8, negative_prompt="ugly")
    torch.testing.assert_close(asked(recipe, one), asked(short, request(negative_prompt="ugly")), rtol=0, atol=1e-5)
    default, full = (asked(recipe, request(negative_prompt="ugly", max_sequence_length=n)) for n in (None, 12))
    assert torch.equal(default, full) and (default - asked(recipe, one)).abs().max() > 1e-4
    encoded = recipe.encode_requests([one, request("b"), request("c", max_sequence_length=8)], (32, 48))
    assert encoded.groups() == [[0, 2], [1]]


def saved(recipe: DecomposerRecipe, file: Path, prompt: str) -> str:
    """A prompt's features in a file, as another program would leave them; `recipe` has the encoders."""
    found = recipe._encode_text([prompt])
    save_file({"t5": found["text"][0], "clip": found["clip"], "pooled": found["pooled"][0]}, file)
    return str(file)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_embeddings_are_the_prompt_they_were_made_of_and_need_no_encoder(
    cache: Path, recipe: DecomposerRecipe, tmp_path: Path, guidance: float
) -> None:
    models = Models(ModelConfig("tiny"), cache)
    bare = DecomposerRecipe(CONFIG, models, encoders=False)
    fill_whole(bare.network, models.tensors(bare.network), CPU)
    fill_frozen(bare, models, CPU, torch.float32)
    assert not bare.encoders
    file = saved(recipe, tmp_path / "a.safetensors", "a red barn, a blue car")
    negative = saved(recipe, tmp_path / "n.safetensors", "ugly")
    pairs = [({}, {})] if guidance == 1 else [({}, {}), ({"negative_prompt": "ugly"}, {"embedding_negative": negative})]
    for text, embedding in pairs:
        by_file = DecomposerRequest("one", embedding=file, steps=4, guidance=guidance, **embedding)
        assert by_file.is_encoded and not request(**text).is_encoded
        encoded = bare.encode_requests([by_file], (32, 48))
        with torch.no_grad():
            (found,) = sample(bare, encoded, recipe.null(), CPU)
        expected = asked(recipe, request(guidance=guidance, **text))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_embeddings_are_those_of_the_pipeline(recipe: DecomposerRecipe, tmp_path: Path) -> None:
    """What docs/generate.md says to save of StableDiffusion3Pipeline.encode_prompt."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    assert recipe.tokenizers is not None
    pipe = StableDiffusion3Pipeline(
        transformer=recipe.network.transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=recipe.frozen["vae"],
        text_encoder=recipe.encoders["clip_l"], tokenizer=recipe.tokenizers.clips[0],
        text_encoder_2=recipe.encoders["clip_g"], tokenizer_2=recipe.tokenizers.clips[1],
        text_encoder_3=recipe.encoders["t5"], tokenizer_3=recipe.tokenizers.t5,
    )  # fmt: skip
    states, _, pooled, _ = pipe.encode_prompt(
        "a red barn", None, None, do_classifier_free_guidance=False, max_sequence_length=12
    )
    tensors = {"t5": states[0, 77:], "clip": states[0, :77, :24], "pooled": pooled[0]}
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "a.safetensors")
    one = DecomposerRequest("one", embedding=str(tmp_path / "a.safetensors"), steps=4)
    torch.testing.assert_close(asked(recipe, one), asked(recipe, request(prompt="a red barn")), rtol=0, atol=1e-5)


WHOLE = {"t5": (12, 32), "clip": (77, 24), "pooled": (24,)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({**WHOLE, "t5": (16, 32)}, r"t5 has shape \[16, 32\]; expected t5 \[12, 32\], clip \[77, 24\], pooled \[24\]"),
        ({**WHOLE, "clip": (2, 77, 24)}, r"clip has shape \[2, 77, 24\]; expected"),
        ({**WHOLE, "pooled": (16,)}, r"pooled has shape \[16\]; expected"),
        ({"t5": (12, 32)}, r"holds t5; expected a .safetensors file of t5 \[12, 32\], clip"),
    ],
)
@pytest.mark.parametrize("key", ["embedding", "embedding_negative"])
def test_embeddings_of_another_shape(
    recipe: DecomposerRecipe, tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str, key: str
) -> None:
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "odd.safetensors")
    fields = {"prompt": ""} if key == "embedding" else {}
    with pytest.raises(ValueError, match=f"request 'one': {key} '.*odd.safetensors': {message}"):
        recipe.setting(request(**fields, **{key: str(tmp_path / "odd.safetensors")}), (32, 48))


def test_embeddings_that_are_not_finite_or_no_safetensors(recipe: DecomposerRecipe, tmp_path: Path) -> None:
    save_file({n: torch.full(shape, torch.inf) for n, shape in WHOLE.items()}, tmp_path / "odd.safetensors")
    np.save(tmp_path / "odd.npy", np.ones((12, 32), np.float32))
    for name, message in {
        "odd.safetensors": "t5 holds values that are not finite",
        "odd.npy": "holds one array",
    }.items():
        with pytest.raises(ValueError, match=f"{name}': {message}"):
            recipe.setting(DecomposerRequest("one", embedding=str(tmp_path / name)), (32, 48))


def test_segments_reach_the_end_of_a_long_prompt(cache: Path) -> None:
    long = "a red motorcycle in a garage. " * 12
    for kind, length, differs in (("cut", 77, False), ("segments", 200, True)):
        recipe = build(cache, clip_text=kind, clip_length=length)
        one, two = (recipe._encode_text([long + end]) for end in ("A cat.", "A dog."))
        assert one["clip"].shape == (1, length, 24)
        assert torch.equal(one["clip"], two["clip"]) != differs and torch.equal(one["pooled"], two["pooled"]) != differs
        loss = recipe.loss(encode_all(recipe, batch()), recipe.null(), keyed())
        assert torch.isfinite(loss.per_sample).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_components": 0}, "recipe.num_components: 0 is not allowed"),
        ({"logit_std": 0.0}, "recipe.logit_std: 0.0 is not allowed"),
        ({"diff_weight": 0.0, "kd_weight": 0.0}, "recipe.diff_weight, recipe.kd_weight: 0.0 and 0.0"),
        ({"kd_weight": -1.0}, "1.0 and -1.0 are not allowed"),
        ({"mode_scale": 2.0}, "recipe.mode_scale: 2.0 is not allowed; expected -1 to 1.75"),
        ({"clip_length": 154}, "recipe.clip_length: 154 is not allowed with recipe.clip_text=cut; expected 77"),
    ],
)
def test_values_that_cannot_work_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_an_unknown_mode_is_answered_by_those_there_are() -> None:
    with pytest.raises(ValueError) as error:
        recipe_config(compose(["recipe=decomposer", "cluster=local", "recipe.density=cosmop"]).config.recipe)
    assert "'cosmop' is not allowed; expected one of logit_normal, mode, cosmap, sigma_sqrt" in str(error.value)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"jpg": True}, "sample '000' is without a caption: text needs a member txt, it has jpg"),
        ({"jpg": True, "txt": b""}, "sample '000' has an empty text, or one that is not UTF-8"),
        (
            {"txt": b"a cat"},
            "sample '000' is without an image: image needs a member jpg or jpeg or png or webp or avif, it has",
        ),
        ({"jpg": b"no picture", "txt": b"a cat"}, "sample '000' has an unreadable image"),
    ],
)
def test_samples_that_it_can_not_read_are_named(tmp_path: Path, members: dict[str, bytes | bool], message: str) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (40, 40)).save(picture, "jpeg")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for extension, content in members.items():
            data = content if isinstance(content, bytes) else picture.getvalue()
            member = tarfile.TarInfo(f"000.{extension}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    data = dataclasses.replace(run_config().data, shards=str(tmp_path / "0.tar"), validation=None, holdout_fraction=0.0)
    with pytest.raises(ValueError, match=f"0.tar: {message}"):
        Stream(data, DecomposerRecipe.inputs, batch_size=1, rank=0, world=1, seed=0)


def test_a_width_that_is_not_t5s_and_heads_that_do_not_divide_it(cache: Path) -> None:
    models = Models(ModelConfig("tiny"), cache)
    with pytest.raises(ValueError, match="recipe.width: 64 is not allowed"):
        DecomposerRecipe(dataclasses.replace(CONFIG, width=64), models)
    with pytest.raises(ValueError, match="recipe.num_heads: 5 is not allowed"):
        DecomposerRecipe(dataclasses.replace(CONFIG, num_heads=5), models)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"height": 40}, "'one': height 40 is no multiple of 16"),
        ({"steps": 0}, "'one': steps 0 is not allowed"),
        ({"component": 3}, "'one': component 3 is not allowed; expected 0 to 2, or null"),
        ({"component": 1, "save_components": True}, "expected null with save_components"),
        ({"height": 528}, "'one': height 528 is not allowed; expected at most 512"),
        ({"max_sequence_length": 13}, "'one': max_sequence_length 13 is not allowed; expected 1 to 12, as trained"),
        ({"max_sequence_length": 0}, "'one': max_sequence_length 0 is not allowed"),
        ({"negative_prompt": "x", "guidance": 1.0}, "'one': negative_prompt has no effect with guidance 1"),
        ({"embedding_negative": "x", "guidance": 1.0}, "'one': embedding_negative has no effect with guidance 1"),
        ({"embedding": "x"}, "'one': prompt and embedding are both set; expected one of them"),
        ({"prompt": "", "embedding": "x", "max_sequence_length": 8}, "max_sequence_length and embedding are both set"),
    ],
)
def test_requests_that_cannot_work_are_named(recipe: DecomposerRecipe, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe.setting(request(**fields), (32, 48))


@pytest.fixture
def world() -> Iterator[World]:
    yield from world_of_one()


def test_sharded_it_computes_the_same(cache: Path, recipe: DecomposerRecipe, world: World) -> None:
    models = Models(ModelConfig("tiny"), cache)
    ours = DecomposerRecipe(CONFIG, models)
    mesh = build_mesh("full", run_config(), world.device)
    set_dtypes(ours.network, frozen=torch.float32)
    shard(ours.network, ours.fsdp_units(), mesh, world, recompute=True)
    fill_sharded(ours.network, models.tensors(ours.network), world.device)
    fill_frozen(ours, models, world.device, torch.float32, mesh)
    features, theirs = encode_all(ours, batch()), encode_all(recipe, batch())
    for name, value in theirs.items():
        torch.testing.assert_close(features[name], value, rtol=0, atol=1e-6)
    losses = [r.loss(theirs, recipe.null(), keyed()) for r in (ours, recipe)]
    torch.testing.assert_close(losses[0].per_sample, losses[1].per_sample, rtol=1e-5, atol=0)
    gradients = []
    for r, loss in zip((ours, recipe), losses, strict=True):
        loss.per_sample.mean().backward()  # type: ignore[no-untyped-call]
        found = [p.grad for p in r.param_groups()["decomposer"]]
        gradients.append([g.full_tensor() if hasattr(g, "full_tensor") else g for g in found if g is not None])
        r.network.zero_grad()
    assert len(gradients[0]) == len(gradients[1]) > 0
    for mine, its in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-7)


def test_the_original_run_is_a_plan() -> None:
    config = compose(
        ["recipe=decomposer", "experiment=decomposer_coco_minimal", "cluster=local", "gpus_per_node=4"]
    ).config
    values = recipe_config(config.recipe)
    assert value_problems(config, DecomposerRecipe, values) == []
    assert (values.num_components, values.num_tokens, values.num_heads, values.num_layers) == (4, 128, 32, 6)
    assert (values.text_length, values.shift, values.density, values.space) == (512, 3.0, "logit_normal", "x0")
    assert (values.diff_weight, values.kd_weight, values.drop_text, values.guidance) == (1.0, 0.0, 0.1, 4.5)
    assert (config.data.height, config.data.width, config.batch.micro, config.accumulation) == (512, 512, 1, 8)
    optim = config.optim
    assert (optim.lr, optim.steps, optim.betas, optim.eps) == (1e-5, 2000, (0.9, 0.999), 1e-8)
    assert (optim.weight_decay, optim.clip, optim.schedule, config.ema.decay) == (0.01, 1.0, "constant", None)
    assert config.validate.every == config.checkpoint.every == 200


def test_the_real_network_has_its_published_sizes() -> None:
    sizes = measure(compose(["recipe=decomposer", "cluster=local"]).config)
    assert sizes.trainable == 1_210_277_888
    assert sizes.parts == {
        "network": 1_210_277_888 + 2_243_171_520,
        "clip_l": 123_650_304,
        "clip_g": 694_659_840,
        "t5": 4_762_310_656,
        "vae": 83_819_683,
    }
