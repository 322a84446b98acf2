"""The learning benchmark's measures: on pictures and prompts that match, that are swapped, and that know nothing."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import tiny_base
from benchmarks.learning import MEASURES
from benchmarks.measures import Limit, matching_score, pair_score, split_pairs
from benchmarks.measures_decomposer import draw, measure_dependence, measure_loss, measure_pairs
from launch.compose import compose
from synthos.batch import Batch, Features
from synthos.build import build_recipe
from synthos.generate import Generator
from synthos.keys import FixedDraws, KeyedDraws
from synthos.models.parts import Models
from synthos.schema import ModelConfig
from synthos.train.validate import encode_all
from tests.models.test_sd3 import Identity
from tests.recipes.test_decomposer import batch, build

PAIRS = list(itertools.combinations(range(8), 2))


@pytest.fixture
def references() -> torch.Tensor:
    coarse = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return coarse.repeat_interleave(16, 2).repeat_interleave(16, 3)


def test_copies_match_and_swapped_ones_do_not(references: torch.Tensor) -> None:
    assert matching_score(references, [references, references + 0.01], PAIRS) == 1.0
    swapped = references[[1, 0]]
    assert matching_score(references[:2], [swapped], [(0, 1)]) == 0.0


def test_layout_counts_and_not_the_palette_alone(references: torch.Tensor) -> None:
    picture = references[:1]
    pair = torch.cat([picture, picture.flip(3)])  # the same colours, mirrored
    assert matching_score(pair, [pair], [(0, 1)]) == 1.0
    assert matching_score(pair, [pair.flip(0)], [(0, 1)]) == 0.0


def test_pictures_that_know_nothing_score_a_half(references: torch.Tensor) -> None:
    same = references[:1].mean((2, 3), keepdim=True).expand_as(references)
    assert matching_score(references, [same], PAIRS) == 0.5
    noise = [torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(draw)) for draw in range(200)]
    assert matching_score(references, noise, PAIRS) == pytest.approx(0.5, abs=0.1)


def test_pairs_are_told_apart_by_the_costs_of_their_own() -> None:
    cost = torch.tensor([[0.0, 1.0, 1.0], [2.0, 3.0, 2.0], [1.0, 1.0, 1.0]])
    assert pair_score(cost, [(0, 1)]) == 0.5  # 0 is nearer to its own, 1 is not
    assert pair_score(cost, [(0, 2)]) == 0.5  # a tie is not nearer
    assert pair_score(cost, [(0, 1), (0, 2), (1, 2)]) == pytest.approx(2 / 6)
    assert pair_score(torch.stack([cost, 1 - torch.eye(3)]), [(0, 1)]) == 0.75


def test_pairs_are_of_different_photographs_or_of_the_same() -> None:
    different, same = split_pairs([json.dumps({"photo": name}) for name in "aba"])
    assert sorted(different) == [(0, 1), (1, 2)] and same == [(0, 2)]


@pytest.mark.parametrize(("sign", "inside", "outside"), [("<=", 0.5, 0.51), (">=", 0.5, 0.49), ("+-", 0.59, 0.61)])
def test_a_limit_holds_up_to_its_bound(sign: Any, inside: float, outside: float) -> None:
    limit = Limit("words", sign, 0.5)
    assert limit.holds(inside) and not limit.holds(outside)


def test_the_limits_are_those_that_were_set() -> None:
    bounds = {name: {k: (v.sign, v.bound) for k, v in limits.items()} for name, (_, limits) in MEASURES.items()}
    chance = {f"match_{kind}_dropped": ("+-", 0.5) for kind in ("different", "same")}
    assert bounds["i2i"] == {
        "end_over_start": ("<=", 0.4), "with_over_without": ("<=", 0.75), "match_different": (">=", 0.9),
        "match_same": (">=", 0.85), **chance,
    }  # fmt: skip
    assert bounds["siglip_projector"] == {"match_different": (">=", 0.8), **chance}
    assert bounds["decomposer"] == {
        "kd_end_over_start": ("<=", 0.5), "match_all": (">=", 0.8), "base_dependence": (">=", 0.1)
    }  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build(tmp_path_factory.mktemp("cache"), kd_weight=1.0, num_components=2, text_length=24)


class Same(torch.nn.Module):
    """Components that say nothing of their text."""

    def forward(self, text: Tensor) -> Tensor:
        return torch.ones_like(text).unsqueeze(1)


def asked(recipe: Any) -> tuple[Batch, Features]:
    return batch(), encode_all(recipe, batch())


def test_a_prompt_as_its_own_component_has_no_loss_and_always_matches(recipe: Any) -> None:
    original = recipe.network.decomposer
    given, features = asked(recipe)
    try:
        recipe.network.decomposer = Identity()
        cost = measure_pairs(recipe, given, features)
        assert cost.diagonal().max() < 1e-9 < 1e-6 < cost[0, 1]
        assert pair_score(cost, [(0, 1), (1, 3)]) == 1.0
        recipe.network.decomposer = Same()
        cost = measure_pairs(recipe, given, features)
        torch.testing.assert_close(cost, cost.diagonal()[:, None].expand(4, 4))
    finally:
        recipe.network.decomposer = original


def test_the_loss_is_the_recipes_on_the_fixed_grid(recipe: Any) -> None:
    given, features = asked(recipe)
    generator = Generator(recipe, recipe.null(), (32, 48), torch.device("cpu"))
    found = []
    for index in range(8):
        draws = FixedDraws(0, given.ids, [index] * len(given))
        found.append(recipe.loss(features, recipe.null(), draws).parts["kd"])
    assert measure_loss(generator, given, features)[0] == pytest.approx(torch.stack(found).mean().item())


def test_dependence_is_the_change_by_the_next_rows_prompt_over_the_variance(recipe: Any) -> None:
    given, features = asked(recipe)
    clip = torch.nn.functional.pad(features["clip"], (0, 8))
    other = [1, 2, 3, 0]
    found: dict[str, list[Tensor]] = {"own": [], "both": [], "t5": []}
    for index in range(8):
        s = recipe.grid[int(1000 * (index + 0.5) / 8)].float()
        noise = FixedDraws(0, given.ids, [index] * 4).normal("noise", (16, 4, 6))
        x_t = (1 - s) * features["latents"] + s * noise
        for name, (text_rows, clip_rows) in {"own": (range(4), range(4)), "both": (other, other),
                                             "t5": (other, range(4))}.items():  # fmt: skip
            context = torch.cat([clip[list(clip_rows)], features["text"][list(text_rows)]], 1)
            pooled = features["pooled"][list(clip_rows)]
            with torch.no_grad():
                out = recipe.network.transformer(x_t, context, pooled, (1000 * s).expand(4), return_dict=False)[0]
            found[name].append(out.double())
    own, both, t5 = (torch.stack(found[name]) for name in ("own", "both", "t5"))
    variance = (own - own.mean()).square().mean()
    expected = [((changed - own).square().mean() / variance).item() for changed in (both, t5)]
    assert measure_dependence(recipe, given, features) == pytest.approx(expected, rel=1e-3)
    alike: Features = {name: value[:1].expand_as(value) for name, value in features.items()}
    assert max(measure_dependence(recipe, given, alike)) < 1e-9


def test_what_is_drawn_are_references_base_composition_and_components(recipe: Any) -> None:
    given, features = asked(recipe)
    rows = draw(recipe, given, features)
    assert [len(row) for row in rows] == [4] * 5  # two components
    assert torch.equal(rows[0][2], given.images("image")[2] / 255)
    assert not torch.equal(rows[3][0], rows[4][0])


def test_the_bases_loss_is_flow_matching_under_the_whole_prompt(recipe: Any) -> None:
    given, features = asked(recipe)
    draws, null = KeyedDraws(7, given.ids, given.epochs), recipe.null()
    clip = torch.nn.functional.pad(features["clip"], (0, 8))
    no_clip = torch.nn.functional.pad(null["clip"], (0, 8))
    total = 0.0
    for row in range(4):
        place = torch.sigmoid(torch.special.ndtri(draws.uniform("t")[row]))
        s = recipe.grid[int(1000 * place)].float()
        noise = draws.normal("noise", (16, 4, 6))[row]
        no_t5, no_clips = (draws.uniform(f"drop_{name}")[row] < 0.3 for name in ("t5", "clip"))
        text = null["text"] if no_t5 else features["text"][row : row + 1]
        context = torch.cat([no_clip if no_clips else clip[row : row + 1], text], 1)
        pooled = null["pooled"] if no_clips else features["pooled"][row : row + 1]
        x_0 = features["latents"][row]
        with torch.no_grad():
            v = recipe.network.transformer(
                ((1 - s) * x_0 + s * noise)[None], context, pooled, (1000 * s)[None], return_dict=False
            )[0][0]
        total += (v - (noise - x_0)).square().mean().item() / 4
    assert tiny_base.flow_loss(recipe, features, null, draws).item() == pytest.approx(total, rel=1e-4)


@pytest.mark.slow
def test_the_base_is_trained_once_and_is_what_the_experiment_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("skimage")
    cache = f"cache_dir={tmp_path}"
    folder = tiny_base.prepare(2, cache)
    about = json.loads((folder / "base.json").read_text())
    assert about["steps"] == 2 and about["region"]["dependence"] > 0 < about["photo"]["dependence_t5"]
    config = compose([f"experiment={tiny_base.EXPERIMENT}", "cluster=local", cache]).config
    name, starts = "transformer_blocks.0.attn.to_q.weight", []
    for model in (config.model, ModelConfig("tiny")):
        models = Models(model, tmp_path)
        network = build_recipe(config.recipe, models).network
        starts.append(models.tensors(network)[f"transformer.{name}"]())
    trained = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")[name]
    assert torch.equal(starts[0], trained) and not torch.equal(starts[1], trained)
    monkeypatch.setattr(tiny_base, "train", None)
    assert tiny_base.prepare(2, cache) == folder
