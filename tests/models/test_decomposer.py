"""The resampler against a plain reading of its description with torch's own attention."""

import pytest
import torch
from torch import Tensor, nn

from synthos.models.decomposer import Decomposer, initial_values, mean_cosine
from synthos.models.meta import meta_parameters


def made(*sizes: int, seed: int = 0) -> Decomposer:
    """A decomposer with its initial values."""
    decomposer = Decomposer(*sizes)
    init = initial_values(decomposer, seed)
    decomposer.load_state_dict({name: value() for name, value in init.items()})
    return decomposer


def plain(decomposer: Decomposer, text: Tensor, component: int) -> Tensor:
    """One component of one text [L, D] in float64, with nn.MultiheadAttention."""
    width = text.shape[-1]
    norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
    z, text = decomposer.queries[component].double(), text.double()
    for layer in decomposer.layers:
        own = layer.attention
        attention = nn.MultiheadAttention(width, own.num_heads, batch_first=True).double()
        attention.in_proj_weight.data = torch.cat([own.query.weight, own.key_value.weight]).double()
        attention.in_proj_bias.data = torch.cat([own.query.bias, own.key_value.bias]).double()
        attention.out_proj.weight.data, attention.out_proj.bias.data = own.out.weight.double(), own.out.bias.double()
        query, keys = norm(z)[None], torch.cat([norm(z), norm(text)])[None]
        z = z + attention(query, keys, keys, need_weights=False)[0][0]
        inner = norm(z) @ layer.up.weight.double().T + layer.up.bias.double()
        z = z + torch.relu(inner) ** 2 @ layer.down.weight.double().T + layer.down.bias.double()
    return z


def test_it_is_the_described_perceiver_for_every_component_and_sample() -> None:
    decomposer = made(3, 5, 16, 4, 2)
    for parameter in decomposer.parameters():  # biases too
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    text = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        components = decomposer(text)
        assert components.shape == (2, 3, 5, 16)
        for row in range(2):
            for component in range(3):
                expected = plain(decomposer, text[row], component).float()
                torch.testing.assert_close(components[row, component], expected, rtol=1e-4, atol=1e-5)


def test_components_do_not_see_each_other() -> None:
    decomposer, text = made(2, 4, 16, 4, 2), torch.randn(1, 6, 16)
    before = decomposer(text)
    decomposer.queries.data[1] += 1
    after = decomposer(text)
    assert torch.equal(before[:, 0], after[:, 0]) and not torch.allclose(before[:, 1], after[:, 1])


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((4, 128, 4096, 32, 6), 1_210_277_888), ((4, 128, 4096, 32, 3), 3 * (12 * 4096**2 + 9 * 4096) + 4 * 128 * 4096)],
)
def test_its_parameters_are_counted(sizes: tuple[int, ...], expected: int) -> None:
    with meta_parameters():
        decomposer = Decomposer(*sizes)
    assert sum(p.numel() for p in decomposer.parameters()) == expected
    assert {p.device.type for p in decomposer.parameters()} == {"meta"}


def test_it_starts_as_torch_would_start_it() -> None:
    width = 128
    values = {name: value() for name, value in initial_values(Decomposer(4, 32, width, 4, 2), 0, "x.").items()}
    assert values["x.queries"].std().item() == pytest.approx(width**-0.5, rel=0.03)
    torch.manual_seed(0)
    reference = {"attention": nn.MultiheadAttention(width, 4), "up": nn.Linear(width, 4 * width),
                 "down": nn.Linear(4 * width, width)}  # fmt: skip
    joint = reference["attention"].in_proj_weight
    pairs = {
        "attention.query.weight": joint,
        "attention.key_value.weight": joint,
        "attention.out.weight": reference["attention"].out_proj.weight,
        "up.weight": reference["up"].weight,
        "up.bias": reference["up"].bias,
        "down.weight": reference["down"].weight,
        "down.bias": reference["down"].bias,
    }
    for name, theirs in pairs.items():
        ours = values[f"x.layers.1.{name}"]
        assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.05), name
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.15), name
    for name in ("query", "key_value", "out"):
        assert not values[f"x.layers.0.attention.{name}.bias"].any()
    assert not torch.equal(values["x.layers.0.up.weight"], values["x.layers.1.up.weight"])


def test_its_start_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = made(2, 3, 8, 2, 1).state_dict()
    torch.manual_seed(2)
    again, other = made(2, 3, 8, 2, 1).state_dict(), made(2, 3, 8, 2, 1, seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["queries"], other["queries"])


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"recipe\.num_heads: 5 is not allowed; expected a divisor of .* 16"):
        Decomposer(2, 3, 16, 5, 1)


def test_mean_cosine_is_that_of_all_pairs() -> None:
    components = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    for row in range(3):
        flat = components[row].double().reshape(4, -1)
        pairs = [torch.dot(a, b) / (a.norm() * b.norm()) for i, a in enumerate(flat) for b in flat[i + 1 :]]
        assert mean_cosine(components)[row].item() == pytest.approx(sum(pairs).item() / 6, abs=1e-6)  # type: ignore[union-attr]
    same = components[:, :1].expand(-1, 4, -1, -1)
    torch.testing.assert_close(mean_cosine(same), torch.ones(3))
