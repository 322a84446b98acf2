"""i2i's three ways to train and two ways to attend: what learns in each, where it starts, what may not be combined."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from synthos.build import build_recipe, fill_frozen
from synthos.keys import FixedDraws, KeyedDraws
from synthos.models.parts import Models
from synthos.recipes.i2i import I2I, I2IConfig
from synthos.schema import ModelConfig, OptimConfig
from synthos.train.distributed import World, build_mesh, fill_sharded, fill_whole, set_dtypes, shard
from synthos.train.optim import build_optimizer
from synthos.train.validate import encode_all
from tests.recipes.test_i2i import CONFIG, batch, trained_names
from tests.support import compose_for_test, run_config, world_of_one

DECOUPLED = dataclasses.replace(CONFIG, attention="decoupled", text_length=512)
MODES = [
    dataclasses.replace(CONFIG, train="projector"),
    CONFIG,
    dataclasses.replace(DECOUPLED, train="projector"),
    dataclasses.replace(DECOUPLED, train="image_attention"),
    DECOUPLED,
]
OPTIM = OptimConfig("adamw", 1e-3, {}, (0.9, 0.999), 1e-8, 0.0, "constant", 0, None, 3, None, None)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def world() -> Iterator[World]:
    yield from world_of_one()


def unfilled(cache: Path, config: I2IConfig) -> tuple[I2I, Models]:
    """A recipe whose image keys and values, where the projector is to learn through given ones, are drawn."""
    models = Models(ModelConfig("tiny"), cache)
    recipe = I2I(config, models)
    waiting = models.added(recipe.network).waiting
    generator = torch.Generator().manual_seed(5)
    drawn = {n: 0.1 * torch.randn(recipe.network.get_parameter(n).shape, generator=generator) for n in waiting}
    models.extend(recipe.network, {name: lambda value=value: value for name, value in drawn.items()})
    fill_frozen(recipe, models, torch.device("cpu"), torch.float32)
    return recipe, models


def built(cache: Path, config: I2IConfig) -> I2I:
    recipe, models = unfilled(cache, config)
    fill_whole(recipe.network, models.tensors(recipe.network), torch.device("cpu"))
    return recipe


def expected_names(recipe: I2I) -> set[str]:
    """What each mode trains, by the names that diffusers gives to what reads images."""
    added = ("add_k_proj", "add_v_proj", "norm_added_k")
    kinds = {
        "projector": lambda name: "image_embedder" in name,
        "image_attention": lambda name: "image_embedder" in name or any(word in name for word in added),
        "full": lambda name: True,
    }
    return {name for name, _ in recipe.network.named_parameters() if kinds[recipe.config.train](name)}


@pytest.mark.parametrize("config", MODES, ids=lambda c: f"{c.train}-{c.attention}")
def test_gradients_reach_what_trains_and_nothing_else(cache: Path, config: I2IConfig) -> None:
    recipe = built(cache, config)
    names = expected_names(recipe)
    assert trained_names(recipe) == names
    modules = (recipe.network, recipe.encoders, recipe.frozen)
    before = [{n: p.clone() for n, p in module.named_parameters()} for module in modules]
    optimizer = build_optimizer(recipe.param_groups(), OPTIM)
    features, null = encode_all(recipe, batch()), recipe.null()
    for step in range(3):
        draws = KeyedDraws(step, batch().ids, batch().epochs)
        recipe.loss(features, null, draws).per_sample.mean().backward()  # type: ignore[no-untyped-call]
        assert {n for n, p in recipe.network.named_parameters() if p.grad is not None} == names
        optimizer.step()
        optimizer.zero_grad()
    moved = [
        {n for n, p in module.named_parameters() if not torch.equal(p, old[n])}
        for module, old in zip(modules, before, strict=True)
    ]
    assert moved == [names, set(), set()]


def test_at_first_only_the_image_values_learn(cache: Path) -> None:
    """Values of zero let no gradient through: keys and projector follow from the second step on."""
    recipe = built(cache, dataclasses.replace(DECOUPLED, train="image_attention"))
    features, null = encode_all(recipe, batch()), recipe.null()
    recipe.loss(features, null, KeyedDraws(0, batch().ids, batch().epochs)).per_sample.mean().backward()  # type: ignore[no-untyped-call]
    reached = {n for n, p in recipe.network.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached and all("add_v_proj" in name for name in reached)


def test_a_decoupled_start_loses_exactly_what_the_base_model_loses(cache: Path) -> None:
    from diffusers import WanTransformer3DModel

    from synthos.models.wan import TINY_TRANSFORMER

    recipe, models = unfilled(cache, DECOUPLED)
    fill_whole(recipe.network, models.tensors(recipe.network), torch.device("cpu"))
    base = WanTransformer3DModel.from_pretrained(models.folder("transformer", TINY_TRANSFORMER)).eval()
    features, draws = encode_all(recipe, batch()), FixedDraws(0, batch().ids, [3] * 4)
    index = (draws.uniform("t") * 1000).long()
    sigma = recipe.grid[index].float()
    noise = draws.normal("noise", (16, 1, 4, 4))
    mixed = sigma.view(-1, 1, 1, 1, 1)
    x_t = (1 - mixed) * features["latents"] + mixed * noise
    with torch.no_grad():
        loss = recipe.loss(features, recipe.null(), draws).parts["velocity_mse"]
        velocity = base(x_t, 1000 * sigma, features["text"].float(), return_dict=False)[0]
    expected = (velocity - (noise - features["latents"])).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("length", [8, 512, 600])
def test_text_is_padded_to_exactly_the_length(cache: Path, length: int) -> None:
    recipe = built(cache, dataclasses.replace(CONFIG, text_length=length))
    texts = ["", "a red barn", "one two three four five six seven eight nine " * 90]
    states = recipe._encode_text(texts)
    assert states.shape == (3, length, 32)
    own = [len(row) for row in recipe.tokenizer(texts, truncation=True, max_length=length).input_ids]
    assert own[0] == 1 and own[1] < own[2] == length
    for row, count in zip(states, own, strict=True):
        assert row[:count].abs().sum(1).all() and not row[count:].any()
    assert recipe.null()["text"].shape == (1, length, 32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention": "decoupled"}, r"recipe\.text_length: 8 .*recipe\.attention=decoupled.*expected 512"),
        ({"train": "image_attention"}, r"recipe\.train: image_attention .*attention=shared_kv.*expected .*decoupled"),
    ],
)
def test_what_does_not_go_together_names_the_key(change: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_decoupled_network_computes_and_learns_as_the_plain_one(
    cache: Path, world: World, dtype: torch.dtype
) -> None:
    """Keys and values train in float32 inside of blocks whose other weights are frozen, in `dtype`."""
    config = dataclasses.replace(DECOUPLED, train="image_attention")
    plain = built(cache, config)
    recipe, models = unfilled(cache, config)
    recipe.compute_dtype = dtype
    set_dtypes(recipe.network, frozen=dtype)
    mesh = build_mesh("full", run_config(), world.device)
    shard(recipe.network, recipe.fsdp_units(), mesh, dataclasses.replace(world, dtype=dtype), recompute=False)
    fill_sharded(recipe.network, models.tensors(recipe.network), world.device)
    features, null, draws = encode_all(plain, batch()), plain.null(), FixedDraws(0, batch().ids, [3] * 4)
    losses = [r.loss(features, null, draws).per_sample for r in (recipe, plain)]
    torch.testing.assert_close(*losses, rtol=1e-6 if dtype == torch.float32 else 0.05, atol=0)
    for loss in losses:
        loss.mean().backward()  # type: ignore[no-untyped-call]
    for name, parameter in recipe.network.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else dtype)
        if "add_v_proj" in name:
            ours, theirs = parameter.grad.full_tensor(), plain.network.get_parameter(name).grad  # type: ignore[union-attr]
            assert ours.dtype == torch.float32
            assert (ours - theirs).norm() <= (1e-5 if dtype == torch.float32 else 0.05) * theirs.norm()  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(
    ("overrides", "trains"),
    [
        (("recipe.train=projector",), 3_612_928),
        (("recipe.train=full",), 1_418_996_800 + 3_612_928),
        (("recipe.train=image_attention", "recipe.attention=decoupled"), 145_308_928),
        (("recipe.train=full", "recipe.attention=decoupled"), 1_418_996_800 + 145_308_928),
        (("recipe.train=projector", "recipe.attention=decoupled"), 3_612_928),
    ],
)
def test_real_sizes(overrides: tuple[str, ...], trains: int) -> None:
    config = compose_for_test("recipe=i2i", *overrides)
    recipe = build_recipe(config.recipe, Models(config.model, Path(config.cache_dir), meta_only=True))
    counts = {name: p.numel() for name, p in recipe.network.named_parameters()}
    assert sum(p.numel() for p in recipe.network.parameters() if p.requires_grad) == trains
    added = 145_308_928 if "recipe.attention=decoupled" in overrides else 3_612_928
    assert sum(counts.values()) == 1_418_996_800 + added
    assert sum(p.numel() for group in recipe.param_groups().values() for p in group) == trains
