"""The average against its closed form, and the network's weights untouched by being averaged."""

import torch
from torch import nn

from synthos.schema import EmaConfig
from synthos.train.ema import Ema


def test_average_follows_the_recursion_in_float64() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    ema = Ema({"w": parameter}, EmaConfig(decay=0.9, warmup=True))
    expected = parameter.detach().double().clone()
    for step in range(40):
        parameter.data += 0.1 * (step % 3)
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach().double()
    torch.testing.assert_close(ema.averages["w"].double(), expected, rtol=1e-6, atol=1e-6)


def test_without_warmup_the_decay_is_constant() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    ema = Ema({"w": parameter}, EmaConfig(decay=0.5, warmup=False))
    parameter.data += 1
    ema.update(0)
    ema.update(1)
    assert ema.averages["w"].item() == 0.75


def test_applied_swaps_and_restores_bit_for_bit() -> None:
    network = nn.Linear(3, 3)
    named = dict(network.named_parameters())
    ema = Ema(named, EmaConfig(decay=0.5, warmup=False))
    before = {name: p.detach().clone() for name, p in named.items()}
    network.weight.data += 1
    ema.update(0)
    raw, averaged = network.weight.detach().clone(), ema.averages["weight"].clone()
    with ema.applied(network):
        assert torch.equal(network.weight, averaged) and not torch.equal(averaged, raw)
    assert torch.equal(network.weight, raw) and torch.equal(ema.averages["weight"], averaged)
    assert torch.equal(network.bias, before["bias"])
