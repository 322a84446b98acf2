"""The transformer and what is added to it: where it starts, what it is called, what diffusers makes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synthos.models.parts import Models
from synthos.models.wan import (
    PROJECTOR,
    TINY_TRANSFORMER,
    build_transformer,
    connector_keys,
    original_body_name,
    original_name,
    split_parameters,
)
from synthos.schema import ModelConfig, PartConfig
from tests.models.conftest import fill

TOKENS = {"shared_kv": 8, "decoupled": 512}  # of the text
INPUT = torch.randn(2, 16, 1, 4, 6, generator=torch.Generator().manual_seed(0))
TIMES = torch.tensor([31.0, 870.0])


def built(models: Models, attention: str) -> Any:
    return fill(models, build_transformer(models, 64, attention))


def context(attention: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, TOKENS[attention], 32, generator=generator), torch.randn(2, 17, 64, generator=generator)


@torch.no_grad()
def output(network: Any, text: Tensor, image: Tensor | None) -> Tensor:
    return network(INPUT, TIMES, text, image, return_dict=False)[0]  # type: ignore[no-any-return]


def text_to_video(models: Models) -> Any:
    """The base as diffusers itself loads it."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_pretrained(models.folder("transformer", TINY_TRANSFORMER)).eval()


def test_decoupled_starts_as_exactly_the_base_model(tiny: Models) -> None:
    text, image = context("decoupled")
    base = output(text_to_video(tiny), text, None)
    network = built(tiny, "decoupled")
    assert torch.equal(output(network, text, image), base)
    assert torch.equal(output(network, text, torch.zeros_like(image)), base)
    with torch.no_grad():  # it is the values alone that keep the image out
        network.blocks[0].attn2.add_v_proj.weight += 0.1
    assert not torch.equal(output(network, text, image), base)


def test_decoupled_keys_are_the_texts(tiny: Models) -> None:
    for block, base in zip(built(tiny, "decoupled").blocks, text_to_video(tiny).blocks, strict=True):
        ours, theirs = block.attn2, base.attn2
        for added, source in ((ours.add_k_proj, theirs.to_k), (ours.norm_added_k, theirs.norm_k)):
            assert all(torch.equal(added.state_dict()[k], value) for k, value in source.state_dict().items())
        assert not ours.add_v_proj.weight.any() and not ours.add_v_proj.bias.any()


def test_shared_starts_elsewhere_than_the_base_because_image_tokens_take_part_in_the_softmax(tiny: Models) -> None:
    text, image = context("shared_kv")
    assert not torch.allclose(output(built(tiny, "shared_kv"), text, image), output(text_to_video(tiny), text, None))


def test_the_projector_starts_alike_whatever_the_attention(tiny: Models) -> None:
    shared, decoupled = (built(tiny, a).get_submodule(PROJECTOR).state_dict() for a in TOKENS)
    assert shared.keys() == decoupled.keys() and all(torch.equal(shared[k], decoupled[k]) for k in shared)


@pytest.mark.parametrize("attention", TOKENS)
def test_diffusers_reloads_what_is_saved(tiny: Models, tmp_path: Path, attention: str) -> None:
    from diffusers import WanTransformer3DModel

    network = built(tiny, attention)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    network.save_pretrained(tmp_path / "t")
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "t").eval()
    text, image = context(attention)
    expected = output(network, text, image)
    assert torch.equal(output(theirs, text, image), expected)
    assert not torch.allclose(output(theirs, text, image.flip(0)), expected)
    ours = built(parts(tmp_path / "t"), attention)  # and so do we, with nothing added
    assert torch.equal(output(ours, text, image), expected)


def parts(folder: Path) -> Models:
    return Models(ModelConfig("local", {"transformer": PartConfig(str(folder))}), folder / "none")


@pytest.mark.parametrize(("attention", "other"), [("shared_kv", "decoupled"), ("decoupled", "shared_kv")])
def test_a_model_of_the_other_attention_is_refused(tiny: Models, tmp_path: Path, attention: str, other: str) -> None:
    built(tiny, attention).save_pretrained(tmp_path / "t")
    with pytest.raises(ValueError, match=f"recipe.attention: {other} .* by {attention}; expected {attention}"):
        build_transformer(parts(tmp_path / "t"), 64, other)
    with pytest.raises(ValueError, match="image tokens of width 64, the image encoder gives 80"):
        build_transformer(parts(tmp_path / "t"), 80, attention)


@pytest.mark.parametrize("change", [{"in_channels": 36, "image_dim": 64}, {"added_kv_proj_dim": 128}])
def test_a_base_of_another_kind_is_refused(tmp_path: Path, change: dict[str, int]) -> None:
    from diffusers import WanTransformer3DModel

    WanTransformer3DModel(**(TINY_TRANSFORMER.config | change)).save_pretrained(tmp_path / "t")
    with pytest.raises(ValueError, match=r"^model\.parts\.transformer: in_channels .*; expected a text-to-video"):
        build_transformer(parts(tmp_path / "t"), 64, "shared_kv")


def test_groups_hold_every_parameter_once(tiny: Models) -> None:
    for attention, names in (("shared_kv", {"projector", "transformer"}),
                             ("decoupled", {"projector", "image_attention", "transformer"})):  # fmt: skip
        network = build_transformer(tiny, 64, attention)
        groups = split_parameters(network)
        grouped = [id(p) for parameters in groups.values() for p in parameters]
        assert set(groups) == names and sorted(grouped) == sorted(id(p) for p in network.parameters())
    assert len(groups["projector"]) == 8 and len(groups["image_attention"]) == 4 * 5


SPECIFIED = {  # the projector is a Sequential in the original: norm, linear, (gelu,) linear, norm
    "img_emb.proj.0.weight": "condition_embedder.image_embedder.norm1.weight",
    "img_emb.proj.1.bias": "condition_embedder.image_embedder.ff.net.0.proj.bias",
    "img_emb.proj.3.weight": "condition_embedder.image_embedder.ff.net.2.weight",
    "img_emb.proj.4.bias": "condition_embedder.image_embedder.norm2.bias",
    "blocks.0.cross_attn.k_img.weight": "blocks.0.attn2.add_k_proj.weight",
    "blocks.29.cross_attn.v_img.bias": "blocks.29.attn2.add_v_proj.bias",
    "blocks.12.cross_attn.norm_k_img.weight": "blocks.12.attn2.norm_added_k.weight",
}


def test_original_names_are_those_of_the_release() -> None:
    assert {original_name(ours): ours for ours in SPECIFIED.values()} == SPECIFIED
    for name in ("blocks.0.attn2.to_k.weight", "blocks.0.attn1.norm_k.weight", "condition_embedder.time_proj.bias"):
        assert original_name(name) is None


def test_an_original_projector_computes_what_the_sequential_does(tiny: Models) -> None:
    """The original module written plainly, its tensors under its own names, taken over by name."""
    torch.manual_seed(3)
    plain = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 64), torch.nn.GELU(),
                                torch.nn.Linear(64, 128), torch.nn.LayerNorm(128)).requires_grad_(False)  # fmt: skip
    for parameter in plain.parameters():
        parameter.normal_()
    stored = {f"img_emb.proj.{name}": value for name, value in plain.state_dict().items()}
    network = built(tiny, "shared_kv")
    keys = connector_keys(network, {name: tuple(value.shape) for name, value in stored.items()})
    assert len(keys) == len(stored) == 8
    network.load_state_dict({name: stored[key] for name, key in keys.items()}, strict=False)
    _, image = context("shared_kv")
    torch.testing.assert_close(network.get_submodule(PROJECTOR)(image), plain(image), rtol=1e-5, atol=1e-5)


Shapes = dict[str, tuple[int, ...]]
OTHER = {"patch_embedding.weight": (128, 36, 1, 2, 2)}  # of a model that also reads latents of the reference


def shapes(network: Any) -> Shapes:
    return {name: tuple(p.shape) for name, p in network.named_parameters()}


def original(network: Any) -> Shapes:
    return {name: shape for ours, shape in shapes(network).items() if (name := original_name(ours))}


def body(network: Any) -> Shapes:
    """All that is neither projector nor image keys and values, by diffusers' names."""
    return {name: shape for name, shape in shapes(network).items() if not original_name(name)}


def test_only_the_connector_is_taken_from_a_larger_model(tiny: Models) -> None:
    shared, decoupled = (build_transformer(tiny, 64, attention) for attention in TOKENS)
    release = original(decoupled) | {original_body_name(name): s for name, s in body(decoupled).items()} | OTHER
    assert set(connector_keys(decoupled, release).values()) == set(original(decoupled))
    assert set(connector_keys(shared, release).values()) == set(original(shared))
    keys = connector_keys(decoupled, shapes(decoupled) | OTHER)  # by diffusers' names
    assert all(name == key for name, key in keys.items()) and len(keys) == 8 + 4 * 5


@pytest.mark.parametrize("attention", TOKENS)
def test_a_body_that_fits_is_not_lost_unnoticed(tiny: Models, attention: str) -> None:
    network = build_transformer(tiny, 64, attention)
    ours = body(network)
    theirs = {original_body_name(name): shape for name, shape in ours.items()}
    assert "blocks.0.self_attn.q.weight" in theirs and "blocks.0.attn1.to_q.weight" in ours
    for whole, first in ((ours, "scale_shift_table"), (theirs, "head.modulation")):
        with pytest.raises(ValueError, match=f"^holds {len(ours)} tensors besides .* and be lost, first '{first}'"):
            connector_keys(network, original(network) | whole)
        for name in whole:  # a single one would be lost as well
            with pytest.raises(ValueError, match=f"^holds 1 tensors .* first '{name}'"):
                connector_keys(network, original(network) | {name: whole[name]})


def test_original_body_names_are_what_diffusers_converts(tiny: Models) -> None:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    names = {name: original_body_name(name) for name in body(build_transformer(tiny, 64, "decoupled"))}
    assert set(convert_wan_transformer_to_diffusers(dict.fromkeys(names.values()))) == names.keys()
    for ours, theirs in names.items():
        assert [*convert_wan_transformer_to_diffusers({theirs: None})] == [ours]


def test_a_projector_alone_may_be_taken_but_no_part_of_anything(tiny: Models) -> None:
    decoupled = build_transformer(tiny, 64, "decoupled")
    everything = original(decoupled)

    def without(*names: str) -> Shapes:
        return {name: shape for name, shape in everything.items() if name not in names}

    projector = {name: shape for name, shape in everything.items() if name.startswith("img_emb")}
    assert set(connector_keys(decoupled, projector).values()) == set(projector)
    with pytest.raises(ValueError, match=r"^lacks 1 tensors of the projector, first 'img_emb\.proj\.3\.bias'"):
        connector_keys(decoupled, without("img_emb.proj.3.bias"))
    with pytest.raises(
        ValueError, match=r"^lacks 1 tensors of the image attention, first 'blocks\.2\.cross_attn\.v_img"
    ):
        connector_keys(decoupled, without("blocks.2.cross_attn.v_img.weight"))
    with pytest.raises(ValueError, match="^lacks 8 tensors of the projector"):
        connector_keys(decoupled, without(*projector))


def test_values_that_must_be_given_are_asked_for(tiny: Models) -> None:
    network = build_transformer(tiny, 64, "decoupled", fresh_attention=False)
    with pytest.raises(ValueError, match=r"^recipe\.train: projector is not allowed here .* init_from="):
        tiny.tensors(network)
    given = [name for name, _ in network.named_parameters() if "attn2.add_" in name or "norm_added_k" in name]
    tiny.extend(network, {name: lambda name=name: torch.zeros(network.get_parameter(name).shape) for name in given})
    assert set(given) < tiny.added(network).names and len(tiny.tensors(network)) == len(list(network.parameters()))
