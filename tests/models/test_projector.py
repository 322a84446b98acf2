"""The four ways from image tokens to a context: sizes, shapes, the null, and each against its plain reading."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad, relu

from synthos.models.fresh import fresh
from synthos.models.projector import Mode, Projector, build_projector

MODES: dict[Mode, tuple[int, int | None]] = {  # layers, hidden
    "mlp": (3, 48),
    "xattn": (2, None),
    "xattnffn": (2, None),
    "transformer": (2, 40),
}


def build(mode: Mode, in_width: int = 24, out_width: int = 32) -> Projector:
    layers, hidden = MODES[mode]
    projector = build_projector(mode, in_width, out_width, layers, hidden).to_empty(device="cpu")
    init = fresh(projector, seed=0)
    with torch.no_grad():
        for name, parameter in projector.named_parameters():
            parameter.copy_(init[name]())
    return projector


def tokens(rows: int = 2, count: int = 16, width: int = 24) -> Tensor:
    drawn = torch.randn(rows, count, width, generator=torch.Generator().manual_seed(0))
    return nn.functional.normalize(drawn, dim=-1)


@pytest.mark.parametrize(
    ("mode", "layers", "hidden", "parameters"),
    [
        ("mlp", 2, 2048, 3_940_608),
        ("mlp", 3, 4096, 24_668_416),
        ("xattn", 3, None, 8_037_888),
        ("xattnffn", 3, None, 22_209_792),
        ("transformer", 2, 2048, 239_112_960),
        ("transformer", 3, 4096, 84 * 4096**2 + 2098 * 4096 + 768),
    ],
)
def test_sizes_are_those_published(mode: Mode, layers: int, hidden: int | None, parameters: int) -> None:
    projector = build_projector(mode, 1152, 768, layers, hidden)
    assert {p.device.type for p in projector.parameters()} == {"meta"}
    assert sum(p.numel() for p in projector.parameters()) == parameters


@pytest.mark.parametrize("mode", MODES)
def test_the_context_has_77_tokens_and_every_parameter_learns(mode: Mode) -> None:
    projector = build(mode)
    context = projector(tokens())
    assert context.shape == (2, 77, 32)
    assert context[:, 16:].any() == (mode != "mlp")  # only the mlp keeps its 16 tokens, and is padded
    (context * torch.randn_like(context)).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.any() for _, p in projector.named_parameters())


@pytest.mark.parametrize("mode", MODES)
def test_the_null_picture_is_a_context_of_zeros_with_no_gradient(mode: Mode) -> None:
    projector = build(mode)
    mixed = tokens()
    mixed[1] = 0
    context = projector(mixed)
    assert not context[1].any() and context[0].any()
    assert torch.allclose(context[0], projector(tokens())[0], atol=1e-6)
    context[1].square().sum().backward()  # type: ignore[no-untyped-call]
    assert not any(p.grad.any() for p in projector.parameters() if p.grad is not None)


def test_more_tokens_than_a_text_has_stay_as_many() -> None:
    assert build("mlp")(tokens(count=100)).shape == (2, 100, 32)
    assert build("xattn")(tokens(count=100)).shape == (2, 77, 32)


def test_mlp_is_linear_norm_relu_in_float64() -> None:
    projector = build("mlp").double()
    w = [p.detach() for p in projector.parameters()]  # weight, bias, gain, shift of each layer
    x = tokens().double()
    for row, width in ((0, 48), (4, 48), (8, 32)):
        x = layer_norm(x @ w[row].T + w[row + 1], (width,), w[row + 2], w[row + 3])
        x = relu(x) if row < 8 else x
    assert torch.allclose(projector(tokens().double()), pad(x, (0, 0, 0, 61)), atol=1e-12)


@pytest.mark.parametrize("mode", ["xattn", "xattnffn"])
def test_a_block_is_attention_and_sum_then_norm_in_float64(mode: Mode) -> None:
    projector = build(mode).double()
    w = {name.removeprefix("body."): p.detach() for name, p in projector.named_parameters()}
    x = tokens(1).double()[0]
    memory = layer_norm(x @ w["memory.0.weight"].T + w["memory.0.bias"], (32,))
    asked = w["tokens"]
    for index in range(2):
        block = {name.removeprefix(f"blocks.{index}."): p for name, p in w.items()}
        q, k, v = block["attention.in_proj_weight"].chunk(3)
        heads = []
        for rows in torch.arange(32).chunk(8):
            scores = (asked @ q[rows].T) @ (memory @ k[rows].T).T / 2.0  # 4 wide, so 1 / sqrt(4)
            heads.append(scores.softmax(-1) @ (memory @ v[rows].T))
        mixed = torch.cat(heads, -1) @ block["attention.out_proj.weight"].T
        asked = layer_norm(asked + mixed, (32,))
        if mode == "xattnffn":
            inner = relu(asked @ block["ffn.0.weight"].T + block["ffn.0.bias"])
            asked = layer_norm(asked + inner @ block["ffn.2.weight"].T + block["ffn.2.bias"], (32,))
    assert torch.allclose(projector(tokens(1).double())[0], asked, atol=1e-12)


def test_transformer_is_torchs_own_between_two_linears() -> None:
    projector = build("transformer").double()
    body = projector.body
    reference = nn.Transformer(40, 4, 2, 2, 160, dropout=0.0, batch_first=True, norm_first=True).double()
    reference.encoder.load_state_dict(body.encoder.state_dict())  # type: ignore[operator, union-attr]
    reference.decoder.load_state_dict(body.decoder.state_dict())  # type: ignore[operator, union-attr]
    x = tokens().double()
    asked = reference(body.before(x), body.tokens.expand(2, -1, -1))  # type: ignore[operator, union-attr]
    assert torch.allclose(projector(x), body.after(asked), atol=1e-10)  # type: ignore[operator]


def test_fresh_values_have_torchs_spread_and_do_not_depend_on_each_other() -> None:
    wide = build_projector("xattnffn", 1152, 768, 1, None)
    init = fresh(wide, seed=3, prefix="projector.")
    assert torch.equal(init["projector.body.tokens"](), init["projector.body.tokens"]())
    assert init["projector.body.tokens"]().std().item() == pytest.approx(1, abs=0.02)
    bounds = {"memory.0.weight": 1152**-0.5, "memory.0.bias": 1152**-0.5, "blocks.0.ffn.2.weight": 3072**-0.5,
              "blocks.0.attention.in_proj_weight": (6 / (4 * 768)) ** 0.5}  # fmt: skip
    for name, bound in bounds.items():
        value = init[f"projector.body.{name}"]()
        assert 0.97 * bound < value.abs().max() <= bound
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(768, 8)
    ours = init["projector.body.blocks.0.attention.in_proj_weight"]()
    assert ours.std().item() == pytest.approx(theirs.in_proj_weight.std().item(), rel=0.01)
    assert not init["projector.body.blocks.0.attention.out_proj.bias"]().any()
    assert not torch.equal(init["projector.body.tokens"](), fresh(wide, 4, "projector.")["projector.body.tokens"]())


def test_the_transformer_starts_as_torchs_own() -> None:
    """Every matrix of `nn.Transformer` is Xavier-uniform; what stands before and behind it is as linear layers are."""
    projector = build_projector("transformer", 96, 64, 1, 128)
    init = fresh(projector, seed=0)
    torch.manual_seed(0)
    theirs = nn.Transformer(128, 4, 1, 1, 512, dropout=0.0, batch_first=True, norm_first=True)
    for name, parameter in theirs.named_parameters():
        ours = init[f"body.{name}"]()
        assert ours.shape == parameter.shape
        if name.endswith(("linear1.bias", "linear2.bias")) or parameter.ndim > 1:
            assert ours.abs().max().item() == pytest.approx(parameter.abs().max().item(), rel=0.05), name
            assert ours.std().item() == pytest.approx(parameter.std().item(), rel=0.15), name
        else:
            assert torch.equal(ours, parameter), name  # norms, and attention's biases of zero
    for name, inputs in {"before.weight": 96, "after.weight": 128, "after.bias": 128}.items():
        assert 0.9 * inputs**-0.5 < init[f"body.{name}"]().abs().max() <= inputs**-0.5


@pytest.mark.parametrize(
    ("mode", "out_width", "layers", "hidden", "words"),
    [
        ("mlp", 32, 1, 8, "recipe.projector_layers: 1 is not allowed with recipe.projector=mlp; expected 2 or more"),
        ("mlp", 32, 2, None, "recipe.projector_hidden: null is not allowed with recipe.projector=mlp"),
        ("xattn", 32, 2, 64, "recipe.projector_hidden: 64 has no effect with recipe.projector=xattn"),
        ("xattnffn", 32, 0, None, "recipe.projector_layers: 0 is not allowed"),
        ("xattn", 36, 1, None, "cross-attention has width 36; expected one that its 8 heads divide"),
        ("transformer", 32, 1, 42, "recipe.projector_hidden: 42 .* expected a multiple of its 4 heads"),
    ],
)
def test_what_does_not_suit_the_mode(mode: Mode, out_width: int, layers: int, hidden: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_projector(mode, 24, out_width, layers, hidden)


def test_units_hold_no_module_twice() -> None:
    for mode in MODES:
        units = build(mode).units()
        assert len({id(unit) for unit in units}) == len(units) and isinstance(units[-1], Projector)
