"""SD3's transformer behind a decomposer: composition against single calls, and what is read from its files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from synthos.models.parts import Models
from synthos.models.sd3 import TINY_TRANSFORMER, build_network, build_transformer, predict
from synthos.schema import ModelConfig, PartConfig
from tests.models.conftest import fill

SIZES = (3, 5, 32, 4, 2)  # components, tokens, width, heads, layers


class Identity(nn.Module):
    """One component: the text's own states."""

    def forward(self, text: Tensor) -> Tensor:
        return text.unsqueeze(1)


@pytest.fixture
def network(tiny: Models) -> Any:
    return fill(tiny, build_network(tiny, *SIZES))


def inputs(batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"text": (10, 32), "clip": (7, 24), "pooled": (24,), "x_t": (16, 8, 6)}
    given = {name: torch.randn(batch, *shape, generator=generator) for name, shape in shapes.items()}
    return given | {"t": torch.tensor([900.0, 123.4])[:batch]}


def base(network: Any, states: Tensor, given: dict[str, Tensor]) -> Tensor:
    """diffusers' own call under CLIP states, filled up with zeros, and then `states` [B, L, D]."""
    clip = torch.cat([given["clip"], torch.zeros(*given["clip"].shape[:2], 8)], dim=-1)
    context = torch.cat([clip, states], dim=1)
    output: Tensor = network.transformer(
        given["x_t"], encoder_hidden_states=context, pooled_projections=given["pooled"], timestep=given["t"]
    ).sample
    return output


@torch.no_grad()
def test_an_identity_decomposer_gives_the_base_model(network: Any) -> None:
    given = inputs()
    expected = base(network, given["text"], given)
    network.decomposer = Identity()
    _, velocity = network(**given)
    torch.testing.assert_close(velocity.mean(1), expected, rtol=0, atol=1e-6)
    assert (base(network, given["text"].flip(0), given) - expected).abs().max() > 1e-2  # it listens to its text


@torch.no_grad()
def test_a_whole_text_is_one_component(network: Any) -> None:
    given = inputs()
    components, velocity = network(**(given | {"components": given["text"].unsqueeze(1)}))
    assert torch.equal(components[:, 0], given["text"]) and velocity.shape == (2, 1, 16, 8, 6)
    torch.testing.assert_close(velocity[:, 0], base(network, given["text"], given), rtol=0, atol=1e-6)


@torch.no_grad()
def test_components_are_as_in_calls_of_their_own(network: Any) -> None:
    given = inputs()
    components, velocity = network(**given)
    assert components.shape == (2, 3, 5, 32) and velocity.shape == (2, 3, 16, 8, 6)
    for row in range(2):
        own = {name: value[row : row + 1] for name, value in given.items()}
        for index in range(3):
            expected = base(network, components[row : row + 1, index], own)
            torch.testing.assert_close(velocity[row : row + 1, index], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_components_found_before_give_the_same(network: Any) -> None:
    given = inputs()
    _, velocity = network(**given)
    found, nothing = network(text=given.pop("text"))
    assert nothing is None
    assert torch.equal(network(components=found, **given)[1], velocity)


def test_the_gradient_passes_the_frozen_transformer(network: Any) -> None:
    network.decomposer.requires_grad_(True)
    network(**inputs())[1].square().mean().backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    assert all((gradients[n] is not None) == n.startswith("decomposer.") for n in gradients)
    assert all(g.abs().max() > 0 for n, g in gradients.items() if g is not None and not n.endswith("bias"))


@torch.no_grad()
def test_predict_keeps_times_in_float32(network: Any) -> None:
    given = inputs()
    x_t, t = given.pop("x_t"), torch.tensor([998.0, 999.0])
    network.bfloat16()
    given = {name: value[:1].expand(2, *value.shape[1:]) for name, value in given.items() if name != "t"}
    _, velocity = predict(network, x_t[:1].expand(2, -1, -1, -1), t, given, torch.bfloat16)
    assert velocity.dtype == torch.float32 and not torch.equal(*velocity)


def test_the_table_of_positions_is_the_files(tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel

    theirs = SD3Transformer2DModel.from_config(TINY_TRANSFORMER.config)
    theirs.pos_embed.pos_embed.mul_(1.5)  # not what the class would compute
    theirs.save_pretrained(tmp_path / "transformer")
    models = Models(ModelConfig("local", {"transformer": PartConfig(str(tmp_path / "transformer"))}), tmp_path)
    ours = fill(models, build_transformer(models))
    assert torch.equal(ours.pos_embed.pos_embed, theirs.pos_embed.pos_embed)
    given = inputs()
    call = {"encoder_hidden_states": given["text"], "pooled_projections": given["pooled"], "timestep": given["t"]}
    with torch.no_grad():
        assert torch.equal(ours(given["x_t"], **call).sample, theirs.eval()(given["x_t"], **call).sample)


def test_the_network_is_a_part_with_the_tensors_of_both(tiny: Models) -> None:
    network = build_network(tiny, *SIZES)
    assert tiny.part(network) == "decomposer"
    names = {name for name, _ in network.named_parameters()}
    assert set(tiny.tensors(network)) == names
    assert tiny.added(network).names == {name for name in names if name.startswith("decomposer.")}
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert {name for name, p in network.named_parameters() if p.requires_grad} == tiny.added(network).names


def test_the_width_must_be_the_texts(tiny: Models) -> None:
    with pytest.raises(ValueError, match=r"recipe\.width: 64 is not allowed; .* reads texts of width 32"):
        build_network(tiny, 3, 5, 64, 4, 2)
